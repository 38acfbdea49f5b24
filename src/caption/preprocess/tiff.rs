//! TIFFs of inks, which `image` converts by a formula of its own, and a look at what a file says of itself.

mod directory;

use std::io::Cursor;

use tiff::TiffError;
use tiff::decoder::{Decoder, DecodingResult, Limits as Allocations};

use super::decode::{DecodeError, Limits};

pub(in crate::caption::preprocess) use directory::Directory;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::preprocess::decode;

    fn lists(file: &[u8]) -> u64 {
        Directory::of(file).bytes_of_lists()
    }

    fn planes(file: &[u8]) -> bool {
        Directory::of(file).has_tiles_of_planes()
    }

    #[test]
    fn lists_in_the_header_count_before_they_are_read() {
        let file = include_bytes!("../../../fuzz/corpus/decode/huge-list-in-header.tiff");
        let limits = Limits { max_pixels: 1 << 20, max_side: 1 << 10, max_memory: 1 << 20 };
        assert!(lists(file) > 90 << 20, "{}", lists(file));
        assert_eq!(decode(file, &limits), Err(DecodeError::TooMuchMemory { limit: 1 << 20 }));
    }

    #[test]
    fn both_orders_of_bytes_and_both_widths_are_read() {
        // One entry of 1,000 numbers.
        let little = [&b"II\x2a\0\x08\0\0\0\x01\0"[..], &[0x11, 1, 4, 0, 0xE8, 3, 0, 0, 0, 0, 0, 0]].concat();
        let big = [&b"MM\0\x2a\0\0\0\x08\0\x01"[..], &[1, 0x11, 0, 4, 0, 0, 3, 0xE8, 0, 0, 0, 0]].concat();
        let mut wide = b"II\x2b\0\x08\0\0\0\x10\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
        wide.extend([0x11, 1, 4, 0, 0xE8, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for file in [little, big, wide] {
            assert_eq!(lists(&file), 32_000);
            for length in 0..file.len() {
                lists(&file[..length]);
            }
        }
        assert_eq!(lists(&[b"II\x2a\0", &[0xFF; 40][..]].concat()), 0);
    }

    #[test]
    fn tiles_of_single_colours_are_refused_before_the_decoder_panics() {
        let entry = |tag: u16, value: u16| {
            let [tag, kind] = [tag, 3].map(u16::to_le_bytes);
            [&tag[..], &kind, &1_u32.to_le_bytes(), &value.to_le_bytes(), &[0, 0]].concat()
        };
        let file = |planes, tag| [&b"II\x2a\0\x08\0\0\0\x02\0"[..], &entry(284, planes), &entry(tag, 16)].concat();
        assert!(planes(&file(2, 322)));
        assert!(!planes(&file(1, 322)) && !planes(&file(2, 278)));
        let limits = Limits { max_pixels: 1 << 20, max_side: 1 << 10, max_memory: 1 << 20 };
        let refused = decode(&file(2, 322), &limits);
        assert!(matches!(&refused, Err(DecodeError::UnsupportedMedia(why)) if why.contains("tiles")), "{refused:?}");
    }

    #[test]
    fn a_jpeg_in_a_strip_that_is_larger_than_the_strip_is_refused_before_it_is_decoded() {
        let limits = Limits { max_pixels: 1 << 14, max_side: 1 << 9, max_memory: 1 << 20 };
        let file = include_bytes!("../../../fuzz/corpus/decode/large-jpeg-in-strip.tiff");
        assert!(Directory::of(file).holds_jpegs() && !Directory::of(file).jpegs_fit());
        let refused = decode(file, &limits);
        assert!(matches!(&refused, Err(DecodeError::Broken(why)) if why.contains("JPEG")), "{refused:?}");
    }

    /// A grey TIFF of 8 × 8 in one strip, which is a JPEG of this size.
    fn with_strip(width: u16, height: u16) -> Vec<u8> {
        let entry = |tag: u16, value: u32| {
            let [tag, kind] = [tag, 4].map(u16::to_le_bytes);
            [&tag[..], &kind, &1_u32.to_le_bytes(), &value.to_le_bytes()].concat()
        };
        let entries = [(256, 8), (257, 8), (258, 8), (259, 7), (262, 1), (273, 106), (277, 1), (278, 8)];
        let [width, height] = [width, height].map(u16::to_be_bytes);
        let frame = [&b"\xFF\xD8\xFF\xC0\0\x0B\x08"[..], &height, &width, b"\x01\x01\x11\0\xFF\xDA\0\x02"].concat();
        let entries: Vec<u8> = entries.into_iter().flat_map(|(tag, value)| entry(tag, value)).collect();
        [&b"II\x2a\0\x08\0\0\0\x08\0"[..], &entries, &frame].concat()
    }

    #[test]
    fn a_jpeg_fits_its_strip_up_to_whole_blocks() {
        for (width, height, fits) in [(8, 8, true), (16, 16, true), (17, 8, false), (8, 17, false), (65_535, 1, false)]
        {
            assert_eq!(Directory::of(&with_strip(width, height)).jpegs_fit(), fits, "{width}x{height}");
        }
        let whole = with_strip(8, 8);
        for length in 0..whole.len() {
            Directory::of(&whole[..length]).jpegs_fit();
        }
    }
}
