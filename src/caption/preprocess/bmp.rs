//! BMPs of 16 bits a pixel, whose channels Pillow widens by cutting off where the decoder rounds.

/// Length of the header. The oldest kind, of 12 bytes, has its fields elsewhere.
const LENGTH: usize = 14;
const OLDEST: u8 = 12;
/// Bits of a pixel.
const DEPTH: usize = 28;
/// Whether masks say where the channels are, and that of green.
const COMPRESSION: usize = 30;
const BITFIELDS: u8 = 3;
const GREEN_MASK: usize = 58;

/// Makes the channels of a decoded BMP what Pillow makes of them.
pub(super) fn widen_as_pillow(bytes: &[u8], rgb: &mut [u8]) {
    if bytes.get(LENGTH) == Some(&OLDEST) || bytes.get(DEPTH) != Some(&16) {
        return;
    }
    let masks = bytes.get(COMPRESSION) == Some(&BITFIELDS);
    let wide_green = masks && bytes.get(GREEN_MASK..GREEN_MASK + 2) == Some(&0x07E0_u16.to_le_bytes());
    let largest = [31, if wide_green { 63 } else { 31 }, 31];
    for pixel in rgb.as_chunks_mut::<3>().0 {
        for (channel, largest) in pixel.iter_mut().zip(largest) {
            // To the nearest gives back what the file holds.
            let narrow = (u16::from(*channel) * largest + 127) / 255;
            *channel = (narrow * 255 / largest) as u8;
        }
    }
}
