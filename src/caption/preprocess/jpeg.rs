//! A look at the structure of a JPEG file, since the decoder paints over what is missing.

use std::io::BufRead;

use super::DecodeError;

/// What the markers of a JPEG say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Survey {
    /// Whether the first image ends with its end marker; libjpeg (and so Pillow) calls the file truncated otherwise.
    pub complete: bool,
    /// Whether its coefficients are held in memory until the last scan: progressive, or one scan a component.
    pub buffered: bool,
    /// How often it goes over its pixels.
    pub scans: u32,
    /// Whether it is of the kinds that everybody reads: baseline, extended or progressive, with Huffman codes.
    pub usual: bool,
    /// Bits of a sample, as its first frame says; 8 without one.
    pub bits: u8,
}

/// Bytes of memory a pixel that hold coefficients, where they are held until the last scan.
pub(super) const COEFFICIENTS: u64 = 8;

impl Survey {
    /// Bytes of memory a pixel that hold coefficients, of 16 bits and of up to four components.
    pub(super) fn coefficient_bytes(self) -> u64 {
        if self.buffered { COEFFICIENTS } else { 0 }
    }
}

/// What is wrong with a file that is not complete.
pub(super) fn truncated() -> DecodeError {
    DecodeError::Broken("the JPEG is truncated: it has no end marker".into())
}

// Between the markers of frames.
const TABLES_OF_HUFFMAN: u8 = 0xC4;
const TABLES_OF_ARITHMETIC: u8 = 0xCC;
const START_OF_SCAN: u8 = 0xDA;
const END_OF_IMAGE: u8 = 0xD9;

/// Walks the markers (ITU T.81, annex B): segments by their length, entropy-coded data up to the next marker.
pub(super) fn survey(bytes: &[u8]) -> Survey {
    let mut rest = bytes.get(2..).unwrap_or_default();
    let (mut complete, mut scans) = (false, 0_u32);
    let (mut progressive, mut known, mut strange) = (false, false, false);
    let mut bits = None;
    while let Some(marker) = next_marker(&mut rest) {
        match marker {
            END_OF_IMAGE => {
                complete = true;
                break;
            }
            // Stuffed bytes and restarts inside a scan, TEM, and a repeated start: no segment follows.
            0x00 | 0x01 | 0xD0..=0xD8 => continue,
            TABLES_OF_HUFFMAN | TABLES_OF_ARITHMETIC => {}
            // Frames: baseline, extended and progressive; then lossless, of differences, and with arithmetic codes. Of
            // each four, the third is progressive.
            0xC0..=0xCF => {
                progressive |= marker % 4 == 2;
                known |= marker <= 0xC2;
                strange |= marker > 0xC2;
                // Behind the length.
                bits = bits.or(rest.get(2).copied());
            }
            START_OF_SCAN => scans = scans.saturating_add(1),
            _ => {}
        }
        let Some(length) = rest.first_chunk().map(|&length| usize::from(u16::from_be_bytes(length))) else { break };
        rest = rest.get(length..).unwrap_or_default();
    }
    Survey { complete, buffered: progressive || scans > 1, scans, usual: known && !strange, bits: bits.unwrap_or(8) }
}

/// Width and height of the frames that come before the first scan of a JPEG, whose first two bytes are not looked at. `None`
/// where its segments do not follow each other, or where they are more than `steps`, which it takes from them.
pub(super) fn frames(bytes: &[u8], steps: &mut usize) -> Option<Vec<[u64; 2]>> {
    let mut frames = Vec::new();
    let mut rest = bytes.get(2..)?;
    while let Some((0xFF, behind)) = rest.split_first() {
        *steps = steps.checked_sub(1)?;
        let (marker, segment) = behind.split_first()?;
        rest = segment;
        match *marker {
            START_OF_SCAN | END_OF_IMAGE => return Some(frames),
            // Fill, whose last byte begins the marker.
            0xFF => {
                rest = behind;
                continue;
            }
            // No segment follows.
            0x01 | 0xD0..=0xD8 => continue,
            0xC0..=0xCF if ![TABLES_OF_HUFFMAN, TABLES_OF_ARITHMETIC, 0xC8].contains(marker) => {
                let sides = segment.get(3..7)?;
                let side = |at: usize| u64::from(u16::from_be_bytes([sides[at], sides[at + 1]]));
                frames.push([side(2), side(0)]);
            }
            _ => {}
        }
        let length = usize::from(u16::from_be_bytes(*segment.first_chunk()?));
        rest = segment.get(length.max(2)..)?;
    }
    // Tables may end without an end marker.
    rest.is_empty().then_some(frames)
}

/// The byte behind the next 0xFF, fill bytes skipped; 0 for a stuffed 0xFF.
fn next_marker(rest: &mut &[u8]) -> Option<u8> {
    // A slice can't fail to be read.
    let skipped = rest.skip_until(0xFF).unwrap_or_default();
    if skipped == 0 {
        return None;
    }
    let fill = rest.iter().take_while(|byte| **byte == 0xFF).count();
    let (marker, behind) = rest.get(fill..)?.split_first()?;
    *rest = behind;
    Some(*marker)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOI: &[u8] = &[0xFF, 0xD8];
    const EOI: &[u8] = &[0xFF, 0xD9];
    /// A segment whose content looks like an end marker, as the thumbnail in an EXIF segment does.
    const APP1: &[u8] = &[0xFF, 0xE1, 0, 4, 0xFF, 0xD9];
    const SOF0: &[u8] = &[0xFF, 0xC0, 0, 2];
    const SOF2: &[u8] = &[0xFF, 0xC2, 0, 2];
    const DHT: &[u8] = &[0xFF, 0xC4, 0, 2];
    const SCAN: &[u8] = &[0xFF, 0xDA, 0, 2, 1, 2, 0xFF, 0x00, 3, 0xFF, 0xD0, 4, 0xFF];

    fn of(parts: &[&[u8]]) -> Survey {
        survey(&parts.concat())
    }

    #[test]
    fn the_end_marker_of_the_image_itself_is_what_counts() {
        assert!(of(&[SOI, APP1, SCAN, EOI]).complete);
        assert!(of(&[SOI, APP1, SCAN, EOI, b"trailing junk"]).complete);
        assert!(!of(&[SOI, APP1, SCAN]).complete);
        assert!(!of(&[SOI, APP1, SCAN, &EOI[..1]]).complete);
        assert!(!of(&[SOI, APP1]).complete);
        assert!(!of(&[SOI, &APP1[..4]]).complete);
    }

    #[test]
    fn tells_whether_coefficients_are_buffered() {
        assert!(!of(&[SOI, SCAN, EOI]).buffered);
        assert!(of(&[SOI, SOF2, SCAN, EOI]).buffered);
        assert!(of(&[SOI, SCAN, SCAN, EOI]).buffered);
    }

    #[test]
    fn a_file_of_tiny_scans_is_refused_by_what_they_cost_together() {
        let limits = super::super::Limits { max_pixels: 1000, max_side: 1000, max_memory: 1 << 20 };
        let scans = of(&[SOI, SOF2, &SCAN.repeat(17), EOI]).scans;
        assert_eq!(scans, 17);
        assert!(limits.check_scans(10, 100, 16).is_ok() && limits.check_scans(10, 10, 160).is_ok());
        assert!(matches!(limits.check_scans(10, 100, scans), Err(DecodeError::TooManyScans { scans: 17, .. })));
    }

    #[test]
    fn usual_are_those_with_no_frame_of_another_kind() {
        assert!(of(&[SOI, DHT, SOF0, SCAN, EOI]).usual);
        assert!(of(&[SOI, SOF2, DHT, SCAN, EOI]).usual);
        assert!(!of(&[SOI, DHT, SCAN, EOI]).usual);
        // Lossless, and with arithmetic codes.
        for other in [0xC3, 0xC9, 0xCF] {
            assert!(!of(&[SOI, SOF0, &[0xFF, other, 0, 2], SCAN, EOI]).usual);
        }
    }

    #[test]
    fn the_bits_of_a_sample_are_those_of_the_first_frame() {
        let frame = |bits| [0xFF, 0xC1, 0, 3, bits];
        assert_eq!(of(&[SOI, &frame(12), &frame(8), SCAN, EOI]).bits, 12);
        assert_eq!(of(&[SOI, SCAN, EOI]).bits, 8);
    }

    #[test]
    fn frames_before_the_first_scan_are_found_and_gaps_are_not_guessed_over() {
        let frame = |width: u8| [0xFF, 0xC0, 0, 8, 8, 0, 3, 0, width, 1];
        let found = |parts: &[&[u8]]| frames(&parts.concat(), &mut 10);
        assert_eq!(
            found(&[SOI, DHT, &frame(5), &[0xFF, 0xFF], &frame(6)[1..], SCAN, &frame(9)]),
            Some(vec![[5, 3], [6, 3]])
        );
        assert_eq!(found(&[SOI, DHT, EOI]), Some(vec![]));
        assert_eq!(found(&[SOI, DHT]), Some(vec![]));
        assert_eq!(found(&[SOI, DHT, &[1], &frame(5)]), None);
        assert_eq!(found(&[SOI, &[0xFF, 0xC0, 0, 8, 8]]), None);
        assert_eq!(found(&[SOI, &DHT.repeat(11)]), None, "more segments than are looked at");
    }

    #[test]
    fn empty_and_tiny_input_is_incomplete() {
        for length in 0..4 {
            assert!(!survey(&[0xFF, 0xD8, 0xFF, 0xFF][..length]).complete);
        }
    }
}
