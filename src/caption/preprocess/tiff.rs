//! TIFFs of inks, which `image` converts by a formula of its own.

use std::io::Cursor;

use tiff::TiffError;
use tiff::decoder::{Decoder, DecodingResult, Limits as Allocations};

use super::decode::{DecodeError, Limits};

/// Decodes a TIFF of 8 bits of cyan, magenta, yellow and black, and converts it to RGB as Pillow does (`cmyk2rgb` in
/// its `Convert.c`). The size has been checked.
pub(super) fn cmyk_to_rgb(bytes: &[u8], limits: &Limits) -> Result<Vec<u8>, DecodeError> {
    let explain = |error| explain(error, limits);
    let mut decoder = Decoder::new(Cursor::new(bytes)).map_err(explain)?;
    let (width, height) = decoder.dimensions().map_err(explain)?;
    // Four inks and three colours a pixel; what is left may be taken while the strips are unpacked.
    let pixels = u64::from(width) * u64::from(height);
    let left = limits.max_memory.saturating_sub(pixels.saturating_mul(7));
    let mut allocations = Allocations::unlimited();
    allocations.decoding_buffer_size = usize::try_from(pixels.saturating_mul(4)).unwrap_or(usize::MAX);
    allocations.intermediate_buffer_size = usize::try_from(left).unwrap_or(usize::MAX);
    allocations.ifd_value_size = allocations.intermediate_buffer_size;
    decoder = decoder.with_limits(allocations);
    let mut samples = DecodingResult::U8(Vec::new());
    let layout = decoder.read_image_to_buffer(&mut samples).map_err(explain)?;
    match samples {
        DecodingResult::U8(samples) if layout.planes == 1 => {
            Ok(samples.as_chunks().0.iter().flat_map(|inks| rgb(*inks)).collect())
        }
        _ => Err(DecodeError::UnsupportedMedia("the tiff has its inks apart from each other".into())),
    }
}

fn rgb([cyan, magenta, yellow, black]: [u8; 4]) -> [u8; 3] {
    let light = u16::from(255 - black);
    // The product is rounded to the nearest.
    [cyan, magenta, yellow].map(|ink| (light - (u16::from(ink) * light + 127) / 255) as u8)
}

fn explain(error: TiffError, limits: &Limits) -> DecodeError {
    match error {
        TiffError::UnsupportedError(error) => {
            DecodeError::UnsupportedMedia(format!("the tiff is of an unusual kind ({error})"))
        }
        TiffError::LimitsExceeded => DecodeError::TooMuchMemory { limit: limits.max_memory },
        error => DecodeError::Broken(error.to_string()),
    }
}
