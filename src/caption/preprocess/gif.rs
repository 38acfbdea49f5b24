//! The first frame of a GIF on its screen, as Pillow shows it.

use std::num::NonZeroU64;

use gif::{ColorOutput, DecodeOptions, Frame, MemoryLimit};

use super::decode::{DecodeError, Format, Limits, Picture};

/// Decodes the first frame. What it leaves uncovered has the transparent colour, or else the first of the palette; a
/// frame that reaches beyond the screen widens it.
pub(super) fn first_frame(bytes: &[u8], limits: &Limits) -> Result<Picture, DecodeError> {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    options.set_memory_limit(NonZeroU64::new(limits.max_memory).map_or(MemoryLimit::Unlimited, MemoryLimit::Bytes));
    let mut decoder = options.read_info(bytes).map_err(broken)?;
    let (screen_width, screen_height) = (u32::from(decoder.width()), u32::from(decoder.height()));
    let global = palette(decoder.global_palette());
    let frame = decoder.next_frame_info().map_err(broken)?;
    let frame = frame.ok_or_else(|| DecodeError::Broken("the GIF has no frame".into()))?.clone();
    let place = Place::of(&frame);
    let width = screen_width.max((place.left + place.width) as u32);
    let height = screen_height.max((place.top + place.height) as u32);
    limits.check(width, height, 4)?;
    let colours = if frame.palette.is_some() { palette(frame.palette.as_deref()) } else { global };
    let mut indices = vec![0; place.width * place.height];
    decoder.read_into_buffer(&mut indices).map_err(broken)?;

    let uncovered = colours[usize::from(frame.transparent.unwrap_or(0))];
    let mut rgb = uncovered.repeat(width as usize * height as usize);
    if place.width > 0 {
        let rows = rgb.chunks_exact_mut(width as usize * 3).skip(place.top);
        for (row, indices) in rows.zip(indices.chunks_exact(place.width)) {
            let pixels = row[place.left * 3..].chunks_exact_mut(3);
            for (pixel, index) in pixels.zip(indices) {
                pixel.copy_from_slice(&colours[usize::from(*index)]);
            }
        }
    }
    Ok(Picture::whole(width, height, Format::Gif, rgb))
}

/// Where a frame lies on the screen, in pixels.
struct Place {
    left: usize,
    top: usize,
    width: usize,
    height: usize,
}

impl Place {
    fn of(frame: &Frame<'_>) -> Self {
        let [left, top, width, height] = [frame.left, frame.top, frame.width, frame.height].map(usize::from);
        Self { left, top, width, height }
    }
}

/// 256 colours; those that the file does not define are grey, as in Pillow.
fn palette(defined: Option<&[u8]>) -> [[u8; 3]; 256] {
    let mut colours: [[u8; 3]; 256] = std::array::from_fn(|grey| [grey as u8; 3]);
    for (colour, defined) in colours.iter_mut().zip(defined.unwrap_or_default().chunks_exact(3)) {
        colour.copy_from_slice(defined);
    }
    colours
}

fn broken(error: gif::DecodingError) -> DecodeError {
    DecodeError::Broken(format!("the GIF can't be decoded: {error}"))
}
