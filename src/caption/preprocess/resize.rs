//! Pillow's resize, bit for bit: two passes of integer arithmetic, with 8-bit pixels between them.
//!
//! The algorithm is that of `ImagingResample` in Pillow's `Resample.c`. No crate computes with weights of as many bits,
//! and a weight that is rounded otherwise moves some values by a level.

mod kernels;
mod portable;
mod weights;
#[cfg(target_arch = "x86_64")]
mod x86;

use self::kernels::Kernels;
use self::weights::Weights;
use super::{DecodeError, Filter, Picture};
use crate::caption::Pixels;

/// Scratch memory of the resize: at most `size * max(width, height) * 3` bytes of the largest picture so far.
#[derive(Debug, Default)]
pub struct Resizer {
    kernels: Kernels,
    /// The picture between the passes: one side is the model's, the other its own.
    middle: Vec<u8>,
}

impl Resizer {
    /// Empty scratch memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stretches a picture to a square of `size`, as `Image.resize` of Pillow does: the kernel widens with the scale
    /// when it shrinks, and its support is clipped at the edges.
    pub(super) fn stretch(&mut self, picture: &Picture, size: usize, filter: Filter) -> Result<Pixels, DecodeError> {
        let [width, height] = [picture.width, picture.height].map(|side| side as usize);
        if size == 0 || picture.rgb.is_empty() || picture.rgb.len() != width * height * 3 {
            let problem = format!("{} bytes are no {width}x{height} pixels to make a square of", picture.rgb.len());
            return Err(DecodeError::Broken(problem));
        }
        let (across, down) = (Weights::new(width, size, filter), Weights::new(height, size, filter));
        let mut square = vec![0; size * size * 3];
        if vertical_first(width, height, size) {
            self.middle.resize(width * size * 3, 0);
            self.kernels.vertical(&picture.rgb, width * 3, &down, &mut self.middle);
            self.kernels.horizontal(&self.middle, width, &across, &mut square);
        } else {
            self.middle.resize(size * height * 3, 0);
            self.kernels.horizontal(&picture.rgb, width, &across, &mut self.middle);
            self.kernels.vertical(&self.middle, size * 3, &down, &mut square);
        }
        Pixels::new(size, square).map_err(|error| DecodeError::Broken(error.to_string()))
    }
}

/// The order of Pillow's passes: horizontal first, but since Pillow 13 (its pull request 9549) vertical first where
/// the height shrinks by more than twice as many pixels as the width. It shows in a fifth of the values, by one level.
fn vertical_first(width: usize, height: usize, size: usize) -> bool {
    let shrinks_by = |length: usize| length as i64 - size as i64;
    shrinks_by(height) > 0 && shrinks_by(height) > 2 * shrinks_by(width)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tall_pictures_are_resized_vertically_first() {
        // Found with Pillow 13.0.0, by comparing with two resizes of one pass each.
        for (width, height) in [(427, 640), (683, 1024), (500, 617), (1, 385), (383, 385)] {
            assert!(vertical_first(width, height, 384), "{width}x{height}");
        }
        for (width, height) in [(640, 427), (500, 616), (1365, 2048), (10, 20), (10, 384), (385, 386)] {
            assert!(!vertical_first(width, height, 384), "{width}x{height}");
        }
    }

    fn picture(width: u32, height: u32, value: u8) -> Picture {
        let rgb = vec![value; (width * height * 3) as usize];
        Picture::whole(width, height, crate::caption::preprocess::Format::Png, rgb)
    }

    #[test]
    fn scratch_memory_is_reused_without_traces() {
        let mut resizer = Resizer::new();
        for (width, height, value) in [(9, 200, 7), (3, 2, 250), (200, 9, 0)] {
            let pixels = resizer.stretch(&picture(width, height, value), 12, Filter::Bicubic).unwrap();
            assert!(pixels.data().iter().all(|v| *v == value));
        }
    }

    #[test]
    fn a_picture_of_the_right_size_stays_as_it_is() {
        let mut square = picture(50, 50, 0);
        square.rgb.iter_mut().enumerate().for_each(|(i, value)| *value = (i * i % 251) as u8);
        for filter in [Filter::Bilinear, Filter::Bicubic] {
            let pixels = Resizer::new().stretch(&square, 50, filter).unwrap();
            assert!(pixels.data() == square.rgb);
        }
    }

    #[test]
    fn a_picture_that_is_none_is_refused() {
        let refused = |picture: &Picture, size| Resizer::new().stretch(picture, size, Filter::Bicubic).is_err();
        assert!(refused(&picture(0, 3, 0), 4));
        assert!(refused(&picture(3, 3, 0), 0));
        assert!(refused(&Picture { width: 4, ..picture(3, 3, 0) }, 4));
    }
}
