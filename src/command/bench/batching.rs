//! `blipstream bench batching`: the sizes that encoder and decoder are fed with, and what it gains when rows join a batch
//! under way instead of waiting for its end.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;

use super::{ModelArgs, median};
use crate::caption::{BlipEngine, Encoded, Engine, Model, ModelInfo, Params, Pixels, caption, pictures};
use crate::command::{Exit, Usage, print_json, telemetry};
use crate::settings;

/// How often each way of feeding is measured, in turns.
const TURNS: usize = 3;

/// Arguments of `bench batching`.
#[derive(Debug, clap::Args)]
pub(super) struct BatchingArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Images encoded at a time
    #[arg(long, value_delimiter = ',', value_name = "N,N", default_values_t = [1, 2, 4, 8])]
    encode: Vec<usize>,
    /// Rows decoded at a time; the last number is also the batch of both ways of feeding
    #[arg(long, value_delimiter = ',', value_name = "N,N", default_values_t = [1, 2, 4, 8, 16])]
    rows: Vec<usize>,
    /// Tokens of the longest caption; where rows join, the shortest has a quarter of them
    #[arg(long, default_value_t = 20, value_name = "N")]
    tokens: usize,
    /// How long each size, and each turn of each way of feeding, is measured, about
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
    encode: Vec<Encoding>,
    decode: Vec<Decoding>,
    feeding: Feeding,
}

#[derive(Serialize)]
struct Encoding {
    images: usize,
    /// In the encoder alone.
    ms_an_image: f64,
}

#[derive(Serialize)]
struct Decoding {
    rows: usize,
    ms_a_step: f64,
    ms_a_row: f64,
}

/// Captions of mixed lengths, in images a second, the medians of all turns.
#[derive(Serialize)]
struct Feeding {
    rows: usize,
    /// Batches that end before the next begins.
    by_batches: f64,
    /// Images that are encoded as soon as rows are free.
    by_rows: f64,
    /// `by_rows` over `by_batches`, turn by turn.
    ratios: Vec<f64>,
}

/// Runs the command.
pub(super) fn run(args: &BatchingArgs) -> anyhow::Result<Exit> {
    let sizes = args.encode.iter().chain(&args.rows).copied();
    if sizes.min().is_none_or(|least| least == 0) || args.rows.is_empty() || args.tokens == 0 || args.time.is_zero() {
        return Err(Usage("--encode, --rows and --tokens are at least 1, and --time is more than 0".into()).into());
    }
    telemetry::init(&telemetry::quiet(&settings::Log::default()))?;
    let model = args.model.load()?;
    let mut out = io::stdout().lock();
    let info = model.info();
    if !args.json {
        writeln!(out, "{} on {} in {} ({})\n", info.id, info.device, info.dtype, info.backend)?;
        writeln!(out, "encoded at a time   ms an image")?;
    }
    let mut encode = Vec::new();
    for &images in &args.encode {
        let measured = encoding(&model, images, args.time)?;
        if !args.json {
            writeln!(out, "{images:17} {:13.1}", measured.ms_an_image)?;
        }
        encode.push(measured);
    }
    if !args.json {
        writeln!(out, "\ndecoded at a time   ms a step   ms a row")?;
    }
    let mut decode = Vec::new();
    for &rows in &args.rows {
        let measured = decoding(&model, rows, args)?;
        if !args.json {
            writeln!(out, "{rows:17} {:11.1} {:10.1}", measured.ms_a_step, measured.ms_a_row)?;
        }
        decode.push(measured);
    }
    let feeding = feeding(&model, args)?;
    if !args.json {
        let Feeding { rows, by_batches, by_rows, ratios } = &feeding;
        writeln!(out, "\ncaptions of {} to {} tokens, {rows} rows", shortest(args.tokens), args.tokens)?;
        writeln!(out, "batch after batch {by_batches:8.3} images/s")?;
        writeln!(out, "rows that join    {by_rows:8.3} images/s")?;
        let ratios: Vec<_> = ratios.iter().map(|ratio| format!("{ratio:.3}")).collect();
        writeln!(out, "ratio in each turn    {}", ratios.join("  "))?;
    }
    drop(out);
    if args.json {
        let (model, version) = (model.info().clone(), env!("CARGO_PKG_VERSION"));
        print_json(&Report { model, version, tokens: args.tokens, encode, decode, feeding })?;
    }
    Ok(Exit::Done)
}

fn images(model: &Model, count: usize) -> anyhow::Result<Vec<Pixels>> {
    let size = model.info().image_size;
    Ok((0..count as u64).map(|seed| pictures::pixels(size, seed)).collect::<Result<_, _>>()?)
}

fn exactly(tokens: usize) -> Params {
    Params { max_new_tokens: tokens, min_new_tokens: tokens, ..Params::default() }
}

fn encoding(model: &Arc<Model>, at_a_time: usize, time: Duration) -> anyhow::Result<Encoding> {
    let mut engine = BlipEngine::new(model.clone()).with_encode_size(at_a_time);
    let images = images(model, at_a_time)?;
    engine.encode(&images)?;
    engine.take_phases();
    let begun = Instant::now();
    loop {
        engine.encode(&images)?;
        if begun.elapsed() >= time {
            break;
        }
    }
    let phases = engine.take_phases();
    Ok(Encoding { images: at_a_time, ms_an_image: phases.encode.as_secs_f64() * 1e3 / phases.images as f64 })
}

fn decoding(model: &Arc<Model>, rows: usize, args: &BatchingArgs) -> anyhow::Result<Decoding> {
    let mut engine = BlipEngine::new(model.clone());
    // One image for all rows would stay in the caches.
    let encoded = engine.encode(&images(model, rows)?)?;
    let captions = |engine: &mut BlipEngine| -> anyhow::Result<()> {
        for image in &encoded {
            engine.admit(image, &exactly(args.tokens))?;
        }
        while engine.active() > 0 {
            engine.step()?;
        }
        Ok(())
    };
    captions(&mut engine)?;
    engine.take_phases();
    let begun = Instant::now();
    loop {
        captions(&mut engine)?;
        if begun.elapsed() >= args.time {
            break;
        }
    }
    let phases = engine.take_phases();
    let ms_a_step = phases.decode.as_secs_f64() * 1e3 / phases.steps as f64;
    Ok(Decoding { rows, ms_a_step, ms_a_row: ms_a_step / rows as f64 })
}

fn shortest(tokens: usize) -> usize {
    tokens.div_ceil(4)
}

fn feeding(model: &Arc<Model>, args: &BatchingArgs) -> anyhow::Result<Feeding> {
    let rows = args.rows.last().copied().unwrap_or(1);
    let mut engine = BlipEngine::new(model.clone());
    let mut random = fastrand::Rng::with_seed(1);
    let lengths = std::iter::repeat_with(|| random.usize(shortest(args.tokens)..=args.tokens));
    let items: Vec<_> = images(model, rows)?.into_iter().zip(lengths.map(exactly)).collect();
    let begun = Instant::now();
    by_batches(&mut engine, &items, rows)?;
    // As many batches as fill the time, and enough that how the last rows run out weighs little.
    let batches = (args.time.as_secs_f64() / begun.elapsed().as_secs_f64()).ceil().max(4.0) as usize;
    let mut rates: [Vec<f64>; 2] = Default::default();
    for _ in 0..TURNS {
        // The same images again and again, but in another order, so that long captions do not keep their places.
        let items: Vec<_> = (0..batches)
            .flat_map(|_| {
                let mut batch = items.clone();
                random.shuffle(&mut batch);
                batch
            })
            .collect();
        for (rates, way) in rates.iter_mut().zip([by_batches, by_rows]) {
            let begun = Instant::now();
            way(&mut engine, &items, rows)?;
            rates.push(items.len() as f64 / begun.elapsed().as_secs_f64());
        }
    }
    let [by_batches, by_rows] = &rates;
    let ratios = by_rows.iter().zip(by_batches).map(|(rows, batches)| rows / batches).collect();
    Ok(Feeding { rows, by_batches: median(by_batches), by_rows: median(by_rows), ratios })
}

fn by_batches(engine: &mut BlipEngine, items: &[(Pixels, Params)], rows: usize) -> anyhow::Result<()> {
    for batch in items.chunks(rows) {
        caption(engine, batch)?.into_iter().try_for_each(|result| result.map(drop)).context("no caption")?;
    }
    Ok(())
}

/// Encodes some images whenever so many rows are free, and steps in between.
fn by_rows(engine: &mut BlipEngine, items: &[(Pixels, Params)], rows: usize) -> anyhow::Result<()> {
    // With all rows at a time nobody would join anybody.
    let at_a_time = engine.encode_size().min(rows.div_ceil(4));
    let (mut waiting, mut captions) = (items, 0);
    while !waiting.is_empty() || engine.active() > 0 {
        while !waiting.is_empty() && rows - engine.active() >= at_a_time {
            let (next, rest) = waiting.split_at(at_a_time.min(waiting.len()));
            let pixels: Vec<Pixels> = next.iter().map(|(pixels, _)| pixels.clone()).collect();
            let encoded: Vec<Encoded> = engine.encode(&pixels)?;
            for (image, (_, params)) in encoded.iter().zip(next) {
                engine.admit(image, params)?;
            }
            waiting = rest;
        }
        captions += engine.step()?.len();
    }
    anyhow::ensure!(captions == items.len(), "{captions} captions of {} images", items.len());
    Ok(())
}
