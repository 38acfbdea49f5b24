//! Which rows look at which image, where images have slots in buffers: the rows of a beam share theirs.

use candle_core::{Device, Result, Tensor};

use super::Block;

/// The image of each row. Images are numbered from 0 without gaps, as rows are.
#[derive(Default)]
pub(super) struct Images {
    /// Of each row.
    images: Vec<usize>,
    /// How many rows have each image.
    users: Vec<usize>,
}

/// An image that takes the place of one that no row has any more; it was the last.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Moved {
    pub(super) from: usize,
    pub(super) to: usize,
}

impl Images {
    pub(super) fn rows(&self) -> usize {
        self.images.len()
    }

    /// How many images there are.
    pub(super) fn count(&self) -> usize {
        self.users.len()
    }

    /// A new row with an image of its own, which has the last number.
    pub(super) fn push(&mut self) {
        self.images.push(self.users.len());
        self.users.push(1);
    }

    /// Row `to`, or one more row, has the image of row `from` from now on.
    pub(super) fn fork(&mut self, from: usize, to: usize) -> Option<Moved> {
        let image = self.images[from];
        self.users[image] += 1;
        if to == self.images.len() {
            self.images.push(image);
            return None;
        }
        let left = std::mem::replace(&mut self.images[to], image);
        self.leave(left)
    }

    /// Removes a row; the last row takes its number.
    pub(super) fn swap_remove(&mut self, row: usize) -> Option<Moved> {
        let image = self.images.swap_remove(row);
        self.leave(image)
    }

    fn leave(&mut self, image: usize) -> Option<Moved> {
        self.users[image] -= 1;
        if self.users[image] > 0 {
            return None;
        }
        self.users.swap_remove(image);
        let last = self.users.len();
        for of_row in &mut self.images {
            if *of_row == last {
                *of_row = image;
            }
        }
        (image < last).then_some(Moved { from: last, to: image })
    }

    /// How the tokens of a block are put together by image.
    ///
    /// # Errors
    /// The device has no memory.
    pub(super) fn by_image(&self, block: &Block, device: &Device) -> Result<ByImage> {
        let count = self.users.len();
        if self.images.iter().copied().eq(0..count) {
            return Ok(ByImage { width: block.width, order: None });
        }
        let most = self.users.iter().max().copied().unwrap_or(0);
        let width = most * block.width;
        // Short images are filled up with whatever comes first.
        let (mut there, mut back) = (vec![0; count * width], Vec::with_capacity(self.images.len() * block.width));
        let mut taken = vec![0; count];
        for (row, &image) in self.images.iter().enumerate() {
            for offset in 0..block.width {
                let place = image * width + taken[image];
                taken[image] += 1;
                there[place] = (row * block.width + offset) as u32;
                back.push(place as u32);
            }
        }
        let order = Some((Tensor::new(there, device)?, Tensor::new(back, device)?));
        Ok(ByImage { width, order })
    }
}

/// The tokens of a block, put together by image.
pub(super) struct ByImage {
    /// Tokens of an image.
    pub(super) width: usize,
    /// Where rows share images: for each place the token that is put there, and for each token its place.
    order: Option<(Tensor, Tensor)>,
}

impl ByImage {
    /// Attends to the images: `attend` gets queries `[images · width, hidden]` and gives contexts as they.
    pub(super) fn attend(&self, queries: &Tensor, attend: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        match &self.order {
            None => attend(queries),
            Some((there, back)) => attend(&queries.index_select(there, 0)?)?.index_select(back, 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rows_keep_their_images_whoever_comes_shares_and_goes(steps in prop::collection::vec((0..4u8, any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..60)) {
            let mut images = Images::default();
            // What each image's slot holds, and which each row should see.
            let (mut slots, mut rows): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
            for (next, (what, a, b)) in (0..).zip(steps) {
                let moved = match what {
                    0 | 1 => {
                        images.push();
                        slots.truncate(images.count() - 1);
                        slots.push(next);
                        rows.push(next);
                        None
                    }
                    _ if rows.is_empty() => None,
                    2 => {
                        let (from, to) = (a.index(rows.len()), b.index(rows.len() + 1));
                        if from == to {
                            continue;
                        }
                        let image = rows[from];
                        if to == rows.len() { rows.push(image) } else { rows[to] = image }
                        images.fork(from, to)
                    }
                    _ => {
                        let row = a.index(rows.len());
                        rows.swap_remove(row);
                        images.swap_remove(row)
                    }
                };
                if let Some(Moved { from, to }) = moved {
                    slots[to] = slots[from];
                }
                let seen: Vec<u32> = images.images.iter().map(|image| slots[*image]).collect();
                prop_assert_eq!(&seen, &rows);
                let different: std::collections::BTreeSet<_> = rows.iter().collect();
                prop_assert_eq!(images.count(), different.len());
            }
        }
    }
}
