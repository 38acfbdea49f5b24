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

/// Memory that the decoder takes for the lists in the first directory before it knows a limit: 32 bytes a number (tiff 0.11,
/// which has its own limit of 256 MiB). A directory is a count and entries of a tag, a type, a count and a value (TIFF 6.0;
/// BigTIFF has the same in wider numbers).
pub(super) fn bytes_of_lists(bytes: &[u8]) -> u64 {
    /// The last of the tags that say how pixels are stored, which are all that it reads; metadata has higher numbers.
    const LAST: u64 = 532;
    /// A value in the decoder's memory.
    const VALUE: u64 = 32;
    let little = bytes.starts_with(b"II");
    let number = |at: u64, width: u64| -> Option<u64> {
        let (from, to) = (usize::try_from(at).ok()?, usize::try_from(at.checked_add(width)?).ok()?);
        let digits = bytes.get(from..to)?.iter().map(|digit| u64::from(*digit));
        let join = |number: u64, digit: u64| number << 8 | digit;
        Some(if little { digits.rev().fold(0, join) } else { digits.fold(0, join) })
    };
    let lists = || {
        // Widths of the number of entries, of a count and of an entry.
        let (first, head, wide, entry) = match number(2, 2)? {
            43 => (number(8, 8)?, 8, 8, 20),
            _ => (number(4, 4)?, 2, 4, 12),
        };
        let count = number(first, head)?;
        let begin = first.checked_add(head)?;
        let counts = (0..count).map_while(|index| {
            let at = begin.checked_add(index.checked_mul(entry)?)?;
            Some((number(at, 2)?, number(at.checked_add(4)?, wide)?))
        });
        // A number that is alone in its entry takes no list.
        let read = counts.filter(|(tag, count)| *count > 1 && *tag <= LAST);
        Some(read.fold(0, |sum: u64, (_, count)| sum.saturating_add(count)))
    };
    lists().unwrap_or_default().saturating_mul(VALUE)
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
}
