//! Pictures made on the spot: to measure with, to warm up with, to tell a broken device by.

use std::io::Cursor;

use image::{ImageFormat, ImageResult, Rgb, RgbImage};

use super::{EngineError, Pixels};

/// Noise that a photograph has, in levels of a byte.
const NOISE: u8 = 24;

/// Noise, `size` pixels square. What is on a picture does not matter to the time that its caption takes. The size 0 is an
/// error.
pub fn pixels(size: usize, seed: u64) -> Result<Pixels, EngineError> {
    let mut random = fastrand::Rng::with_seed(seed);
    let bytes: Vec<u8> = (0..size * size * 3).map(|_| random.u8(..)).collect();
    Pixels::new(size, bytes)
}

/// Grey, `size` pixels square, which no sound device fails on. The size 0 is an error.
pub fn grey(size: usize) -> Result<Pixels, EngineError> {
    Pixels::new(size, vec![128u8; size * size * 3])
}

/// A JPEG, so many pixels wide and high, with the smooth surfaces and the noise of a photograph. Fails where the encoder
/// does: at a side of 0, or over 65,535.
pub fn photograph(width: u32, height: u32, seed: u64) -> ImageResult<Vec<u8>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let waves: [(f32, f32); 3] = std::array::from_fn(|_| (random.f32() * 0.05, random.f32() * 0.05));
    let picture = RgbImage::from_fn(width, height, |x, y| {
        Rgb(waves.map(|(across, down)| {
            let level = (x as f32 * across + y as f32 * down).sin() * 100.0 + 112.0;
            (level as u8).saturating_add(random.u8(..NOISE))
        }))
    });
    let mut out = Cursor::new(Vec::new());
    picture.write_to(&mut out, ImageFormat::Jpeg)?;
    Ok(out.into_inner())
}
