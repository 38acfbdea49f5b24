//! `blipstream bench captioner`.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytesize::ByteSize;
use serde::Serialize;

use super::{ModelArgs, peak_memory};
use crate::caption::{
    BeamSearch, BlipEngine, Ceilings, Engine, Model, ModelInfo, Params, Phases, Pixels, Strategy, caption, number,
    pictures,
};
use crate::command::{Exit, Usage, print_json, telemetry};
use crate::settings;

/// A batch that would take longer than this many times the time to measure is left out.
const TOO_LONG: u32 = 6;

/// Arguments of `bench captioner`.
#[derive(Debug, clap::Args)]
pub(super) struct CaptionerArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Images captioned together
    #[arg(long, value_delimiter = ',', value_name = "N,N", default_values_t = [1, 2, 4, 8, 16, 32])]
    batch: Vec<usize>,
    /// Captions followed at a time, each number with each batch; 1 takes the likeliest token each time
    #[arg(long, value_delimiter = ',', value_name = "N,N", default_values_t = [1])]
    beams: Vec<usize>,
    /// Tokens of every caption
    #[arg(long, default_value_t = 20, value_name = "N")]
    tokens: usize,
    /// How long each batch size is measured, after a warm-up
    #[arg(long, default_value = "8s", value_name = "TIME", value_parser = humantime::parse_duration)]
    time: Duration,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is measured.
#[derive(Serialize)]
struct Report {
    model: ModelInfo,
    version: &'static str,
    tokens: usize,
    /// From the start of loading to the first caption, in seconds.
    first_caption: f64,
    /// In bytes.
    peak_memory: Option<u64>,
    ceilings: Ceilings,
    batches: Vec<Batch>,
}

/// One batch size. Times are seconds for one image, but for `step`.
#[derive(Serialize)]
struct Batch {
    #[serde(rename = "batch")]
    size: usize,
    beams: usize,
    images_per_second: f64,
    encode: f64,
    cross_keys_values: f64,
    decode: f64,
    /// Seconds of one step of the decoder, for all rows.
    step: f64,
    /// Operations a second of the encoder.
    encode_flops: f64,
    /// Bytes of weights a second that steps read.
    step_bytes: f64,
}

/// Runs the command.
pub(super) fn run(args: &CaptionerArgs) -> anyhow::Result<Exit> {
    let numbers = [&args.batch, &args.beams];
    if numbers.iter().any(|n| n.contains(&0) || n.is_empty()) || args.tokens == 0 || args.time.is_zero() {
        return Err(Usage("--batch, --beams and --tokens are at least 1, and --time is more than 0".into()).into());
    }
    telemetry::init(&telemetry::quiet(&settings::Log::default()))?;
    let begun = Instant::now();
    let model = args.model.load()?;
    let mut engine = BlipEngine::new(Arc::clone(&model));
    let once = measure(&mut engine, &model, args, (1, 1), Duration::ZERO)?;
    let first_caption = begun.elapsed().as_secs_f64();
    if !args.json {
        head(&model, first_caption)?;
    }
    let mut batches: Vec<Batch> = Vec::new();
    // Seconds an image, at the batch size before.
    let mut last = 1.0 / once.images_per_second;
    for &batch in &args.batch {
        if !batches.is_empty() && last * batch as f64 > args.time.as_secs_f64() * f64::from(TOO_LONG) {
            tracing::warn!(batch, "left out: one batch would take too long; see --time");
            continue;
        }
        for &beams in &args.beams {
            measure(&mut engine, &model, args, (batch, beams), Duration::ZERO)?;
            let measured = measure(&mut engine, &model, args, (batch, beams), args.time)?;
            last = 1.0 / measured.images_per_second;
            if !args.json {
                line(&measured)?;
            }
            batches.push(measured);
        }
    }
    // Before the ceilings, which take memory of their own.
    let peak_memory = peak_memory();
    let ceilings = model.ceilings()?;
    let report = Report {
        model: model.info().clone(),
        version: env!("CARGO_PKG_VERSION"),
        tokens: args.tokens,
        first_caption,
        peak_memory,
        ceilings,
        batches,
    };
    if args.json {
        print_json(&report)?;
    } else {
        foot(&report)?;
    }
    Ok(Exit::Done)
}

/// Captions batches of so many images with so many beams for some time, and one at least.
fn measure(
    engine: &mut BlipEngine,
    model: &Model,
    args: &CaptionerArgs,
    (batch, beams): (usize, usize),
    time: Duration,
) -> anyhow::Result<Batch> {
    let strategy = match beams {
        0 | 1 => Strategy::Greedy,
        beams => Strategy::Beam(BeamSearch { beams, length_penalty: number(1.0) }),
    };
    let params = Params { max_new_tokens: args.tokens, min_new_tokens: args.tokens, strategy, ..Params::default() };
    let size = model.info().image_size;
    let items: Vec<(Pixels, Params)> = (0..batch as u64)
        .map(|seed| Ok((pictures::pixels(size, seed)?, params.clone())))
        .collect::<anyhow::Result<_>>()?;
    engine.take_phases();
    let (begun, mut images) = (Instant::now(), 0);
    while images == 0 || begun.elapsed() < time {
        for result in caption(engine, &items)? {
            result.context("no caption")?;
        }
        images += batch;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let Phases { encode, cross_kv, decode, steps, .. } = engine.take_phases();
    let (each, work) = (|phase: Duration| phase.as_secs_f64() / images as f64, model.work());
    let step = decode.as_secs_f64() / steps.max(1) as f64;
    Ok(Batch {
        size: batch,
        beams,
        images_per_second: images as f64 / seconds,
        encode: each(encode),
        cross_keys_values: each(cross_kv),
        decode: each(decode),
        step,
        encode_flops: work.encode / each(encode),
        step_bytes: work.step_weights * model.weight_bytes() as f64 / step,
    })
}

fn head(model: &Model, first_caption: f64) -> io::Result<()> {
    let info = model.info();
    let millions = info.parameters as f64 / 1e6;
    let mut out = io::stdout().lock();
    writeln!(out, "{} on {} in {} ({}), {millions:.0} M parameters", info.id, info.device, info.dtype, info.backend)?;
    writeln!(out, "from nothing to the first caption: {first_caption:.1} s\n")?;
    writeln!(out, "                      ------- ms an image --------     step   encoder   weights")?;
    writeln!(out, "batch  beams  images/s   encode  keys+val   decode       ms   GFLOP/s      GB/s")
}

fn line(batch: &Batch) -> io::Result<()> {
    let ms = |seconds: f64| seconds * 1e3;
    writeln!(
        io::stdout().lock(),
        "{:5}  {:5}  {:8.2} {:8.1} {:9.1} {:8.1} {:8.1} {:9.0} {:9.1}",
        batch.size,
        batch.beams,
        batch.images_per_second,
        ms(batch.encode),
        ms(batch.cross_keys_values),
        ms(batch.decode),
        ms(batch.step),
        batch.encode_flops / 1e9,
        batch.step_bytes / 1e9
    )
}

fn foot(report: &Report) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out)?;
    let Ceilings { multiply_adds, product, memory } = report.ceilings;
    let registers = multiply_adds.map(|most| format!("{:.0} GFLOP/s in registers (f32), ", most / 1e9));
    writeln!(
        out,
        "this {} at its best: {}{:.0} GFLOP/s of products in {} on {}, {:.1} GB/s from memory",
        if registers.is_some() { "machine" } else { "GPU" },
        registers.unwrap_or_default(),
        product / 1e9,
        report.model.dtype,
        report.model.backend,
        memory / 1e9
    )?;
    if let Some(peak) = report.peak_memory {
        writeln!(out, "most memory: {}", ByteSize::b(peak))?;
    }
    Ok(())
}
