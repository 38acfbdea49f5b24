//! A look at the chunks of a PNG, since the decoder (png 0.18) panics at a palette that ends within a colour.

/// Whether a palette before the pixels ends within a colour. Chunks are a length, a kind, so many bytes and a checksum
/// (PNG specification, 5.3).
pub(super) fn has_torn_palette(bytes: &[u8]) -> bool {
    const SIGNATURE: usize = 8;
    let mut rest = bytes.get(SIGNATURE..).unwrap_or_default();
    while let Some((&[a, b, c, d, kind @ ..], behind)) = rest.split_first_chunk::<8>() {
        let length = u32::from_be_bytes([a, b, c, d]);
        match &kind {
            b"IDAT" => return false,
            b"PLTE" if !length.is_multiple_of(3) => return true,
            _ => rest = behind.get(length as usize + 4..).unwrap_or_default(),
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::preprocess::{DecodeError, Limits, decode};

    fn chunk(kind: [u8; 4], content: &[u8]) -> Vec<u8> {
        let length = (content.len() as u32).to_be_bytes();
        [&length[..], &kind, content, &[0; 4]].concat()
    }

    fn file(chunks: &[Vec<u8>]) -> Vec<u8> {
        [&b"\x89PNG\r\n\x1a\n"[..], &chunks.concat()].concat()
    }

    #[test]
    fn only_a_palette_before_the_pixels_counts() {
        let (whole, torn) = (chunk(*b"PLTE", &[0; 6]), chunk(*b"PLTE", &[0; 4]));
        let (header, pixels) = (chunk(*b"IHDR", &[0; 13]), chunk(*b"IDAT", &[0; 9]));
        assert!(has_torn_palette(&file(&[header.clone(), torn.clone(), pixels.clone()])));
        assert!(!has_torn_palette(&file(&[header.clone(), whole, pixels.clone()])));
        assert!(!has_torn_palette(&file(&[header, pixels, torn])));
        for length in 0..20 {
            assert!(!has_torn_palette(&vec![0xFF; length]));
        }
    }

    #[test]
    fn a_palette_that_ends_within_a_colour_is_broken_and_no_panic() {
        let file = include_bytes!("../../../fuzz/corpus/decode/palette-of-broken-length.png");
        let limits = Limits { max_pixels: 1 << 20, max_side: 1 << 10, max_memory: 1 << 24 };
        assert!(matches!(decode(file, &limits), Err(DecodeError::Broken(_))));
    }
}
