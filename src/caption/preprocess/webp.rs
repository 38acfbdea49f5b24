//! Sizes that hide inside a WebP file.

/// Width and height of every lossy frame. The decoder allocates by these and compares them with the canvas only
/// afterwards, so a file of a tiny canvas could cost what its frame claims.
///
/// Frames are found by chunk name and start code (RFC 9649, section 2.5; RFC 6386, section 9.1) wherever they stand,
/// so that no disagreement about the nesting of chunks hides one.
pub(super) fn lossy_frames(bytes: &[u8]) -> impl Iterator<Item = (u32, u32)> + '_ {
    const START_CODE: [u8; 3] = [0x9D, 0x01, 0x2A];
    // Chunk name, chunk length, frame tag, start code, then two little-endian 14-bit sides with two bits of scale.
    let headers = bytes.windows(18).filter(|header| header.starts_with(b"VP8 ") && header[11..14] == START_CODE);
    headers.map(|header| {
        let side = |at: usize| u32::from(u16::from_le_bytes([header[at], header[at + 1]]) & 0x3FFF);
        (side(14), side(16))
    })
}
