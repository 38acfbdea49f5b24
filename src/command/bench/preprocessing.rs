//! `blipstream bench preprocessing`: from the bytes of an image to the model's pixels, on one thread.

use std::hint::black_box;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;

use crate::caption::pictures;
use crate::caption::preprocess::{Limits, Preprocessor, Resizer, TurboJpeg, decode, decode_at_least};
use crate::command::{Exit, Usage, print_json};

/// Photographs that are made where no files are given.
const SIZES: [(u32, u32); 4] = [(640, 427), (1024, 683), (2048, 1365), (4000, 3000)];

/// Whoever measures trusts the files.
const LIMITS: Limits = Limits { max_pixels: u64::MAX, max_side: u32::MAX, max_memory: u64::MAX };

/// Arguments of `bench preprocessing`.
#[derive(Debug, clap::Args)]
pub(super) struct PreprocessingArgs {
    /// Images; without any, photographs of several sizes are made
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Side of the model's square, in pixels
    #[arg(long, default_value_t = 384, value_name = "PIXELS")]
    side: usize,
    /// As decode.jpeg_reducing_gap of the configuration
    #[arg(long, default_value_t = 0.0, value_name = "TIMES")]
    gap: f64,
    /// How long each image is measured
    #[arg(long, default_value = "2s", value_name = "TIME", value_parser = humantime::parse_duration)]
    time: Duration,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is measured.
#[derive(Serialize)]
struct Report {
    version: &'static str,
    side: usize,
    gap: f64,
    images: Vec<Image>,
}

/// Times are milliseconds, medians.
#[derive(Serialize)]
struct Image {
    name: String,
    width: u32,
    height: u32,
    bytes: usize,
    /// Width and height that it was decoded at.
    decoded: (u32, u32),
    decode: f64,
    resize: f64,
    both: f64,
}

/// Runs the command.
pub(super) fn run(args: &PreprocessingArgs) -> anyhow::Result<Exit> {
    if args.side == 0 || args.time.is_zero() {
        return Err(Usage("--side and --time are more than 0".into()).into());
    }
    let gap = args.gap;
    if gap != 0.0 && !(1.0..=f64::from(u16::MAX)).contains(&gap) {
        return Err(Usage(format!("--gap is 0, or 1 or more, not {gap}")).into());
    }
    let turbo = if gap > 0.0 { Some(TurboJpeg::open()?) } else { None };
    let mut out = io::stdout().lock();
    if !args.json {
        writeln!(out, "       size  decoded at      bytes   decode ms   resize ms   both ms")?;
    }
    let mut images = Vec::new();
    for (name, bytes) in pictures(&args.files)? {
        let image = measure(name, &bytes, args, turbo.as_ref())?;
        if !args.json {
            let Image { name, width, height, bytes, decoded, decode, resize, both } = &image;
            let [size, decoded] = [(*width, *height), *decoded].map(|(width, height)| format!("{width}x{height}"));
            writeln!(out, "{size:>11} {decoded:>11} {bytes:10} {decode:11.2} {resize:11.2} {both:9.2}   {name}")?;
        }
        images.push(image);
    }
    drop(out);
    if args.json {
        print_json(&Report { version: env!("CARGO_PKG_VERSION"), side: args.side, gap, images })?;
    }
    Ok(Exit::Done)
}

/// Name and bytes of each.
fn pictures(files: &[PathBuf]) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    if files.is_empty() {
        let made = SIZES.map(|(width, height)| Ok(("photograph".into(), pictures::photograph(width, height, 1)?)));
        return made.into_iter().collect();
    }
    let read = |file: &PathBuf| std::fs::read(file).with_context(|| format!("cannot read {}", file.display()));
    files.iter().map(|file| Ok((file.display().to_string(), read(file)?))).collect()
}

fn measure(name: String, bytes: &[u8], args: &PreprocessingArgs, turbo: Option<&TurboJpeg>) -> anyhow::Result<Image> {
    let (preprocessor, mut resizer) = (Preprocessor::blip(args.side), Resizer::new());
    let least = (args.side as f64 * args.gap).ceil() as u32;
    let mut times: [Vec<f64>; 3] = Default::default();
    let (mut size, mut decoded_at) = ((0, 0), (0, 0));
    let begun = Instant::now();
    while times[0].is_empty() || begun.elapsed() < args.time {
        let start = Instant::now();
        let picture = match turbo {
            Some(turbo) => decode_at_least(bytes, &LIMITS, least, turbo),
            None => decode(bytes, &LIMITS),
        };
        let picture = picture.with_context(|| name.clone())?;
        let decoded = start.elapsed();
        black_box(preprocessor.resize(&picture, &mut resizer).with_context(|| name.clone())?);
        let both = start.elapsed();
        (size, decoded_at) = (picture.full_size, (picture.width, picture.height));
        for (times, time) in times.iter_mut().zip([decoded, both.saturating_sub(decoded), both]) {
            times.push(time.as_secs_f64() * 1e3);
        }
    }
    let [decode, resize, both] = times.map(|times| super::median(&times));
    Ok(Image { name, width: size.0, height: size.1, bytes: bytes.len(), decoded: decoded_at, decode, resize, both })
}
