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

/// The last of the tags that say how pixels are stored; metadata has higher numbers.
const LAST_OF_PIXELS: u64 = 532;
/// Whether the colours of a pixel are together (1) or apart (2).
const PLANAR_CONFIGURATION: u64 = 284;
const TILE_WIDTH: u64 = 322;

/// An entry of the first directory.
struct Entry {
    tag: u64,
    /// How many numbers it has.
    count: u64,
    /// The first of them, where it is of 16 bits and in the entry itself.
    value: u64,
}

/// What stands in the first directory of a file, as far as it is there: a count and entries of a tag, a type, a count and
/// a value (TIFF 6.0; BigTIFF has the same in wider numbers).
fn entries(bytes: &[u8]) -> Vec<Entry> {
    let little = bytes.starts_with(b"II");
    let number = |at: u64, width: u64| -> Option<u64> {
        let (from, to) = (usize::try_from(at).ok()?, usize::try_from(at.checked_add(width)?).ok()?);
        let digits = bytes.get(from..to)?.iter().map(|digit| u64::from(*digit));
        let join = |number: u64, digit: u64| number << 8 | digit;
        Some(if little { digits.rev().fold(0, join) } else { digits.fold(0, join) })
    };
    let found = || {
        // Widths of the number of entries, of a count and of an entry.
        let (first, head, wide, entry) = match number(2, 2)? {
            43 => (number(8, 8)?, 8, 8, 20),
            _ => (number(4, 4)?, 2, 4, 12),
        };
        let count = number(first, head)?;
        let begin = first.checked_add(head)?;
        let entries = (0..count).map_while(|index| {
            let at = begin.checked_add(index.checked_mul(entry)?)?;
            let (tag, count) = (number(at, 2)?, number(at.checked_add(4)?, wide)?);
            Some(Entry { tag, count, value: number(at.checked_add(4 + wide)?, 2)? })
        });
        Some(entries.collect())
    };
    found().unwrap_or_default()
}

/// Memory that the decoder takes for the lists in the first directory before it knows a limit: 32 bytes a number (tiff 0.11,
/// which has its own limit of 256 MiB).
pub(super) fn bytes_of_lists(bytes: &[u8]) -> u64 {
    /// A value in the decoder's memory.
    const VALUE: u64 = 32;
    // A number that is alone in its entry takes no list.
    let read = entries(bytes).into_iter().filter(|entry| entry.count > 1 && entry.tag <= LAST_OF_PIXELS);
    read.fold(0, |sum: u64, entry| sum.saturating_add(entry.count)).saturating_mul(VALUE)
}

/// Whether it has tiles of single colours, on which the decoder panics (image 0.25.10).
pub(super) fn has_tiles_of_planes(bytes: &[u8]) -> bool {
    let entries = entries(bytes);
    let apart = entries.iter().any(|entry| entry.tag == PLANAR_CONFIGURATION && entry.value == 2);
    apart && entries.iter().any(|entry| entry.tag == TILE_WIDTH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::preprocess::decode;

    #[test]
    fn lists_in_the_header_count_before_they_are_read() {
        let file = include_bytes!("../../../fuzz/corpus/decode/huge-list-in-header.tiff");
        let limits = Limits { max_pixels: 1 << 20, max_side: 1 << 10, max_memory: 1 << 20 };
        assert!(bytes_of_lists(file) > 90 << 20, "{}", bytes_of_lists(file));
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
            assert_eq!(bytes_of_lists(&file), 32_000);
            for length in 0..file.len() {
                bytes_of_lists(&file[..length]);
            }
        }
        assert_eq!(bytes_of_lists(&[b"II\x2a\0", &[0xFF; 40][..]].concat()), 0);
    }

    #[test]
    fn tiles_of_single_colours_are_refused_before_the_decoder_panics() {
        let entry = |tag: u16, value: u16| {
            let [tag, kind] = [tag, 3].map(u16::to_le_bytes);
            [&tag[..], &kind, &1_u32.to_le_bytes(), &value.to_le_bytes(), &[0, 0]].concat()
        };
        let file = |planes, tag| [&b"II\x2a\0\x08\0\0\0\x02\0"[..], &entry(284, planes), &entry(tag, 16)].concat();
        assert!(has_tiles_of_planes(&file(2, 322)));
        assert!(!has_tiles_of_planes(&file(1, 322)) && !has_tiles_of_planes(&file(2, 278)));
        let limits = Limits { max_pixels: 1 << 20, max_side: 1 << 10, max_memory: 1 << 20 };
        let refused = decode(&file(2, 322), &limits);
        assert!(matches!(&refused, Err(DecodeError::UnsupportedMedia(why)) if why.contains("tiles")), "{refused:?}");
    }
}
