//! Pillow's resize: two passes, the horizontal one first, with 8-bit pixels between them.

use fast_image_resize as fir;
use fir::images::{Image, ImageRef};
use fir::{FilterType, PixelType, ResizeAlg, ResizeOptions};

use super::{DecodeError, Filter, Picture};
use crate::caption::Pixels;

/// Scratch memory of the resize: at most `size * height * 3` bytes of the tallest picture so far.
#[derive(Debug, Default)]
pub struct Resizer {
    inner: fir::Resizer,
    /// The picture between the passes: the model's width, its own height.
    middle: Vec<u8>,
}

impl Resizer {
    /// Empty scratch memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stretches a picture to a square of `size`, as `Image.resize` of Pillow does (`ImagingResample` in its
    /// `Resample.c`): the kernel widens with the scale when it shrinks, and its support is clipped at the edges.
    pub(super) fn stretch(
        &mut self,
        picture: &Picture,
        size: usize,
        filter: Filter,
    ) -> Result<Pixels, DecodeError> {
        let (width, height) = (picture.width, picture.height);
        let side = u32::try_from(size).map_err(internal)?;
        // CatmullRom is the cubic with a = −0.5.
        let filter = match filter {
            Filter::Bilinear => FilterType::Bilinear,
            Filter::Bicubic => FilterType::CatmullRom,
        };
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
        // One call would go vertically first, which rounds differently from Pillow between the passes.
        self.middle.resize(size * height as usize * 3, 0);
        let source = ImageRef::new(width, height, &picture.rgb, PixelType::U8x3).map_err(internal)?;
        let mut middle =
            Image::from_slice_u8(side, height, &mut self.middle, PixelType::U8x3).map_err(internal)?;
        self.inner.resize(&source, &mut middle, &options).map_err(internal)?;
        let mut square = Image::new(side, side, PixelType::U8x3);
        self.inner.resize(&middle, &mut square, &options).map_err(internal)?;
        Pixels::new(size, square.into_vec()).map_err(internal)
    }
}

/// The buffers fit by construction, so that this is never seen; an error is still better than a panic.
fn internal(error: impl std::fmt::Display) -> DecodeError {
    DecodeError::Broken(format!("it can't be resized: {error}"))
}
