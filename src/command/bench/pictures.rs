//! Pictures to measure with, made on the spot.

use std::io::Cursor;

use anyhow::Context;
use image::{ImageFormat, Rgb, RgbImage};

use crate::caption::Pixels;

/// Noise that a photograph has, in levels of a byte.
const NOISE: u8 = 24;

/// A picture of the model's size. What is on it does not matter to the time.
pub(super) fn pixels(size: usize, seed: u64) -> anyhow::Result<Pixels> {
    let mut random = fastrand::Rng::with_seed(seed);
    let bytes: Vec<u8> = (0..size * size * 3).map(|_| random.u8(..)).collect();
    Pixels::new(size, bytes).context("a picture of the model's size")
}

/// A JPEG with the smooth surfaces and the noise of a photograph.
pub(super) fn jpeg(width: u32, height: u32, seed: u64) -> anyhow::Result<Vec<u8>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let waves: [(f32, f32); 3] = std::array::from_fn(|_| (random.f32() * 0.05, random.f32() * 0.05));
    let picture = RgbImage::from_fn(width, height, |x, y| {
        Rgb(waves.map(|(across, down)| {
            let level = (x as f32 * across + y as f32 * down).sin() * 100.0 + 112.0;
            (level as u8).saturating_add(random.u8(..NOISE))
        }))
    });
    let mut out = Cursor::new(Vec::new());
    picture.write_to(&mut out, ImageFormat::Jpeg).context("cannot encode a picture")?;
    Ok(out.into_inner())
}
