//! Pillow's resize: two passes, the horizontal one first, with 8-bit pixels between them.

use fast_image_resize as fir;
use fir::images::{Image, ImageRef};
use fir::{FilterType, PixelType, ResizeAlg, ResizeOptions};

use super::{DecodeError, Filter, Picture};
use crate::caption::Pixels;

/// Scratch memory of the resize: at most `size * max(width, height) * 3` bytes of the largest picture so far.
#[derive(Debug, Default)]
pub struct Resizer {
    inner: fir::Resizer,
    /// The picture between the passes: one side is the model's, the other its own.
    middle: Vec<u8>,
}

impl Resizer {
    /// Empty scratch memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stretches a picture to a square of `size`, as `Image.resize` of Pillow does (`ImagingResample` in its
    /// `Resample.c`): the kernel widens with the scale when it shrinks, and its support is clipped at the edges.
    ///
    /// The filter's weights have 15 bits here and 22 in Pillow, so that some 0.3 % of the values differ by one level.
    pub(super) fn stretch(&mut self, picture: &Picture, size: usize, filter: Filter) -> Result<Pixels, DecodeError> {
        let side = u32::try_from(size).map_err(internal)?;
        // CatmullRom is the cubic with a = −0.5.
        let filter = match filter {
            Filter::Bilinear => FilterType::Bilinear,
            Filter::Bicubic => FilterType::CatmullRom,
        };
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
        let source = ImageRef::new(picture.width, picture.height, &picture.rgb, PixelType::U8x3).map_err(internal)?;
        // Two calls of one pass each, since one call would choose the order of the passes by itself.
        let (width, height) = if vertical_first(picture.width, picture.height, side) {
            (picture.width, side)
        } else {
            (side, picture.height)
        };
        self.middle.resize(width as usize * height as usize * 3, 0);
        let mut middle = Image::from_slice_u8(width, height, &mut self.middle, PixelType::U8x3).map_err(internal)?;
        self.inner.resize(&source, &mut middle, &options).map_err(internal)?;
        let mut square = Image::new(side, side, PixelType::U8x3);
        self.inner.resize(&middle, &mut square, &options).map_err(internal)?;
        Pixels::new(size, square.into_vec()).map_err(internal)
    }
}

/// The order of Pillow's passes: horizontal first, but since Pillow 13 (its pull request 9549) vertical first where
/// the height shrinks by more than twice as many pixels as the width. It shows in a fifth of the values, by one level.
fn vertical_first(width: u32, height: u32, side: u32) -> bool {
    let shrinks_by = |length: u32| i64::from(length) - i64::from(side);
    shrinks_by(height) > 0 && shrinks_by(height) > 2 * shrinks_by(width)
}

/// The buffers fit by construction, so that this is never seen; an error is still better than a panic.
fn internal(error: impl std::fmt::Display) -> DecodeError {
    DecodeError::Broken(format!("it can't be resized: {error}"))
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

    #[test]
    fn scratch_memory_is_reused_without_traces() {
        let picture = |width: u32, height: u32, value| Picture {
            width,
            height,
            format: crate::caption::preprocess::Format::Png,
            rgb: vec![value; (width * height * 3) as usize],
        };
        let mut resizer = Resizer::new();
        for (picture, value) in [(picture(9, 200, 7), 7), (picture(3, 2, 250), 250), (picture(200, 9, 0), 0)] {
            let pixels = resizer.stretch(&picture, 12, Filter::Bicubic).unwrap();
            assert!(pixels.data().iter().all(|v| *v == value));
        }
    }
}
