//! Memory on any device in any precision, on candle's operations: every active row has a slot in shared buffers, so
//! that one product serves all rows. Slots are kept without gaps; a row that leaves is overwritten by the last.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::images::{ByImage, Images, Moved};
use super::{Block, ImageMemory, Memory, Room, Sizes, move_slot};
use crate::caption::compute::{ImageProjection, attend_memory};

/// See the [module](self).
pub(in crate::caption) struct DeviceMemory {
    sizes: Sizes,
    device: Device,
    dtype: DType,
    images: Images,
    room: Room,
    layers: Vec<Layer>,
    block: Option<Prepared>,
}

struct Layer {
    text: KeysValues,
    image: KeysValues,
}

/// Both `[slots, heads, head, length]`.
struct KeysValues {
    keys: Tensor,
    values: Tensor,
}

/// What all layers of a pass share.
struct Prepared {
    rows: usize,
    width: usize,
    /// Columns that any row looks at.
    length: usize,
    /// Where each new column goes: `[rows, heads, head, width]`.
    targets: Tensor,
    /// Hides columns after a token's own, where rows differ: `[rows, 1, width, length]`.
    mask: Option<Tensor>,
    by_image: ByImage,
}

impl DeviceMemory {
    pub(in crate::caption) fn new(sizes: Sizes, device: Device, dtype: DType) -> Self {
        Self { sizes, device, dtype, images: Images::default(), room: Room::default(), layers: Vec::new(), block: None }
    }

    /// Makes room for `slots` rows of `columns` tokens and for so many images.
    fn reserve(&mut self, slots: usize, columns: usize, images: usize) -> Result<()> {
        let Some(room) = self.room.grown(slots, columns, images) else { return Ok(()) };
        let empty = |slots: usize, length: usize| -> Result<KeysValues> {
            // Zeros, since what a mask hides still takes part in products.
            let shape = (slots, self.sizes.heads, self.sizes.head, length);
            let zeros = || Tensor::zeros(shape, self.dtype, &self.device);
            Ok(KeysValues { keys: zeros()?, values: zeros()? })
        };
        let text = || empty(room.slots, room.columns);
        let image = || empty(room.images, self.sizes.image_tokens);
        if self.layers.is_empty() {
            for _ in 0..self.sizes.layers {
                self.layers.push(Layer { text: text()?, image: image()? });
            }
        } else {
            for layer in &mut self.layers {
                if (room.slots, room.columns) != (self.room.slots, self.room.columns) {
                    let text = text()?;
                    text.copy_rows(&layer.text, self.images.rows())?;
                    layer.text = text;
                }
                if room.images > self.room.images {
                    let image = image()?;
                    image.copy_rows(&layer.image, self.images.count())?;
                    layer.image = image;
                }
            }
        }
        self.room = room;
        Ok(())
    }

    /// Overwrites the image of a slot that no row looks at any more.
    fn move_image(&self, moved: Option<Moved>) -> Result<()> {
        let Some(Moved { from, to }) = moved else { return Ok(()) };
        self.layers.iter().try_for_each(|layer| layer.image.move_row(from, to))
    }

    fn prepared(&self) -> Result<&Prepared> {
        self.block.as_ref().ok_or_else(|| candle_core::Error::Msg("no block was announced".into()))
    }

    /// `[rows · width, hidden]` to `[rows, heads, width, head]`.
    fn split_heads(&self, x: &Tensor, width: usize) -> Result<Tensor> {
        x.reshape(((), width, self.sizes.heads, self.sizes.head))?.transpose(1, 2)?.contiguous()
    }

    /// The reverse of [`Self::split_heads`].
    fn join_heads(&self, x: &Tensor) -> Result<Tensor> {
        x.transpose(1, 2)?.reshape(((), self.sizes.hidden()))
    }
}

impl Memory for DeviceMemory {
    fn admit(&mut self, image: &Arc<ImageMemory>, capacity: usize) -> Result<()> {
        let ImageMemory::Projected(image) = &**image else {
            candle_core::bail!("a device remembers keys and values, not hidden states")
        };
        let place = self.images.count();
        self.reserve(self.images.rows() + 1, capacity, place + 1)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let part = |which: usize| image.narrow(0, index, 1)?.narrow(1, which, 1)?.squeeze(1);
            layer.image.keys.slice_set(&part(0)?, 0, place)?;
            layer.image.values.slice_set(&part(1)?, 0, place)?;
        }
        self.images.push();
        Ok(())
    }

    fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        self.reserve(to + 1, 0, 0)?;
        for layer in &self.layers {
            layer.text.move_row(from, to)?;
        }
        let moved = self.images.fork(from, to);
        self.move_image(moved)
    }

    fn swap_remove(&mut self, row: usize) -> Result<()> {
        let last = self.images.rows() - 1;
        if row < last {
            for layer in &self.layers {
                layer.text.move_row(last, row)?;
            }
        }
        let moved = self.images.swap_remove(row);
        self.move_image(moved)
    }

    fn clear(&mut self) {
        // The buffers go too: an error may have left values in them that are not numbers, which no mask hides.
        *self = Self::new(self.sizes, self.device.clone(), self.dtype);
    }

    fn bytes_for(&self, rows: usize, capacity: usize) -> usize {
        self.sizes.bytes_in_slots(rows, capacity, self.dtype)
    }

    fn begin(&mut self, block: &Block) -> Result<()> {
        let (rows, width) = (block.starts.len(), block.width);
        let last = block.longest();
        self.reserve(rows, last, 0)?;
        let positions = block.starts.iter().flat_map(|start| (0..width).map(move |offset| (start + offset) as u32));
        let targets = Tensor::from_iter(positions, &self.device)?
            .reshape((rows, 1, 1, width))?
            .broadcast_as((rows, self.sizes.heads, self.sizes.head, width))?
            .contiguous()?;
        let alike = width == 1 && block.starts.windows(2).all(|pair| pair[0] == pair[1]);
        let mask = (!alike).then(|| self.mask(block, last)).transpose()?;
        let by_image = self.images.by_image(block, &self.device)?;
        self.block = Some(Prepared { rows, width, length: last, targets, mask, by_image });
        Ok(())
    }

    fn attend_text(&mut self, layer: usize, qkv: &Tensor) -> Result<Tensor> {
        let block = self.prepared()?;
        let hidden = self.sizes.hidden();
        let part = |which: usize| qkv.narrow(1, which * hidden, hidden);
        let memory = &self.layers[layer].text;
        for (which, buffer) in [(1, &memory.keys), (2, &memory.values)] {
            let columns = self.split_heads(&part(which)?, block.width)?.transpose(2, 3)?.contiguous()?;
            buffer.narrow(0, 0, block.rows)?.scatter_set(&block.targets, &columns, 3)?;
        }
        let queries = self.split_heads(&part(0)?, block.width)?;
        let seen = |buffer: &Tensor| buffer.narrow(0, 0, block.rows)?.narrow(3, 0, block.length)?.contiguous();
        let contexts = attend_memory(&queries, &seen(&memory.keys)?, &seen(&memory.values)?, block.mask.as_ref())?;
        self.join_heads(&contexts)
    }

    fn attend_image(&mut self, layer: usize, queries: &Tensor, _: Option<&ImageProjection>) -> Result<Tensor> {
        let by_image = &self.prepared()?.by_image;
        let memory = &self.layers[layer].image;
        by_image.attend(queries, |queries| {
            let queries = self.split_heads(queries, by_image.width)?;
            let seen = |buffer: &Tensor| buffer.narrow(0, 0, self.images.count());
            let contexts = attend_memory(&queries, &seen(&memory.keys)?, &seen(&memory.values)?, None)?;
            self.join_heads(&contexts)
        })
    }
}

impl DeviceMemory {
    fn mask(&self, block: &Block, length: usize) -> Result<Tensor> {
        let rows = block.starts.len();
        let mut mask = Vec::with_capacity(rows * block.width * length);
        for start in &block.starts {
            for own in (0..block.width).map(|offset| start + offset) {
                mask.extend((0..length).map(|column| if column <= own { 0.0 } else { f32::NEG_INFINITY }));
            }
        }
        Tensor::from_vec(mask, (rows, 1, block.width, length), &self.device)?.to_dtype(self.dtype)
    }
}

impl KeysValues {
    /// Takes over the first `rows` of a smaller buffer.
    fn copy_rows(&self, from: &Self, rows: usize) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        for (to, from) in [(&self.keys, &from.keys), (&self.values, &from.values)] {
            to.narrow(0, 0, rows)?.slice_set(&from.narrow(0, 0, rows)?, 3, 0)?;
        }
        Ok(())
    }

    fn move_row(&self, from: usize, to: usize) -> Result<()> {
        move_slot(&self.keys, from, to)?;
        move_slot(&self.values, from, to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_take_the_memory_that_was_told() {
        let sizes = Sizes { layers: 2, heads: 3, head: 4, image_tokens: 5, image_width: 12 };
        let mut memory = DeviceMemory::new(sizes, Device::Cpu, DType::F16);
        let image = Arc::new(ImageMemory::Projected(Tensor::zeros((2, 2, 3, 4, 5), DType::F16, &Device::Cpu).unwrap()));
        for rows in 1..=5 {
            memory.admit(&image, 40).unwrap();
            let buffers = memory.layers.iter().flat_map(|layer| [&layer.text, &layer.image]);
            let held: usize = buffers.map(|both| both.keys.elem_count() + both.values.elem_count()).sum();
            let encoded = rows * image.bytes();
            assert_eq!(memory.bytes_for(rows, 40), held * DType::F16.size_in_bytes() + encoded, "{rows} rows");
        }
    }
}
