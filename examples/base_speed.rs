//! How fast a BLIP of a published size captions on this machine, with random weights: no file is needed.
//!
//! ```text
//! cargo run --release --example base_speed -- [random-base|random-large|DIRECTORY] [DEVICE] [DTYPE] [BATCH...]
//! ```

use std::fs;
use std::time::Instant;

use blipstream::caption::{Engine, LoadOptions, ModelSource, Params, Pixels, caption, load};

const TOKENS: usize = 20;
/// Batches are repeated for about this long, once after a warm-up.
const SECONDS: f32 = 8.0;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |index: usize, default: &str| arguments.get(index).map_or(default, String::as_str).to_owned();
    let source: ModelSource = argument(0, "random-base").parse()?;
    let options = LoadOptions {
        device: argument(1, "auto").parse()?,
        dtype: argument(2, "auto").parse()?,
        ..LoadOptions::new(source)
    };
    let batches: Vec<usize> = arguments.iter().skip(3).map(|text| text.parse()).collect::<Result<_, _>>()?;
    let started = Instant::now();
    let mut engine = load(&options)?;
    let model = engine.model();
    say(&format!(
        "{} of {} M parameters, {} on {}: loaded in {:.2} s, {} tokens a caption",
        model.id,
        model.parameters / 1_000_000,
        model.dtype,
        model.device,
        started.elapsed().as_secs_f32(),
        TOKENS
    ));
    for batch in if batches.is_empty() { vec![1, 4, 8] } else { batches } {
        measure(&mut *engine, batch)?;
    }
    say(&format!("peak memory {}", peak_memory().unwrap_or_else(|| "unknown".into())));
    Ok(())
}

fn measure(engine: &mut dyn Engine, batch: usize) -> Result<(), Box<dyn std::error::Error>> {
    let size = engine.model().image_size;
    let params = Params { max_new_tokens: TOKENS, min_new_tokens: TOKENS, ..Params::default() };
    let items: Vec<_> =
        (0..batch).map(|seed| Ok((noise(size, seed)?, params.clone()))).collect::<Result<_, String>>()?;
    caption(engine, &items)?;
    engine.take_phases();
    let (started, busy, mut rounds) = (Instant::now(), processor_seconds(), 0);
    while rounds == 0 || started.elapsed().as_secs_f32() < SECONDS {
        caption(engine, &items)?;
        rounds += 1;
    }
    let images = (rounds * batch) as f32;
    let seconds = started.elapsed().as_secs_f32();
    let phases = engine.take_phases();
    let each = |phase: std::time::Duration| phase.as_secs_f32() / images;
    let processor = (processor_seconds() - busy) / images;
    say(&format!(
        "batch {batch:>3}: {:>6.2} images/s; an image: {processor:.2} s of processor time, encode {:.3} s, keys and values {:.3} s, decode {:.3} s; a step {:.1} ms",
        images / seconds,
        each(phases.encode),
        each(phases.cross_kv),
        each(phases.decode),
        phases.decode.as_secs_f32() * 1e3 / phases.steps as f32
    ));
    Ok(())
}

fn noise(size: usize, seed: usize) -> Result<Pixels, String> {
    let mut state = seed as u32 + 1;
    let bytes: Vec<u8> = (0..size * size * 3)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect();
    Pixels::new(size, bytes).map_err(|error| error.to_string())
}

/// Processor time of all threads so far: on a machine that others use too, it says more than the clock.
fn processor_seconds() -> f32 {
    const TICKS_A_SECOND: f32 = 100.0;
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 14 and 15 of proc(5), counted from the end of the command's name.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    fields.filter_map(|ticks| ticks.parse::<f32>().ok()).sum::<f32>() / TICKS_A_SECOND
}

/// The high-water mark of resident memory, where the system tells.
fn peak_memory() -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[expect(clippy::print_stdout, reason = "a program that reports")]
fn say(line: &str) {
    println!("{line}");
}
