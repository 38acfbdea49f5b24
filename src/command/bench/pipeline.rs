//! `blipstream bench pipeline`: the flow of `blipstream worker`, in this process, against its own captioner.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use bytesize::ByteSize;
use serde::Serialize;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{peak_memory, pictures, print_json};
use crate::caption::{Params, caption};
use crate::command::models::LoadedModel;
use crate::command::{Exit, Usage, models, runtime, telemetry};
use crate::config::ConfigOptions;
use crate::disposition::Stage;
use crate::kafka::{EMBEDDED_PARTITION_BYTES, EmbeddedBroker, NewRecord, write_records};
use crate::metrics::Metrics;
use crate::pipeline::{Control, worker};
use crate::settings::Settings;

/// Partitions of every topic.
const PARTITIONS: i32 = 8;
/// The longest caption record, with key and headers.
const RECORD: usize = 1536;
/// Pictures that differ.
const PICTURES: u64 = 16;
/// The bench gives up when nothing arrives for this long.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often progress is looked for.
const LOOK: Duration = Duration::from_millis(10);
/// A device or a group of threads that is at work for this share of the time is what holds the others up.
const BUSY: f64 = 0.9;

/// Arguments of `bench pipeline`.
#[derive(Debug, clap::Args)]
pub(super) struct PipelineArgs {
    /// `random-base`, `random-large`, a folder, a hub id, or `demo`
    #[arg(long, value_name = "NAME|DIR|HUB-ID", default_value = "random-base")]
    model: String,
    /// Width and height of the JPEGs that are fetched
    #[arg(long, value_name = "WxH", default_value = "640x427", value_parser = size)]
    size: (u32, u32),
    /// Tokens of every caption
    #[arg(long, default_value_t = 20, value_name = "N")]
    tokens: usize,
    /// How long the captioner alone is measured, and the pipeline about as long
    #[arg(long, default_value = "20s", value_name = "TIME", value_parser = humantime::parse_duration)]
    time: Duration,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigOptions,
}

fn size(text: &str) -> Result<(u32, u32), String> {
    let sides = text.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
    sides
        .filter(|(width, height)| (1..=8192).contains(width) && (1..=8192).contains(height))
        .ok_or_else(|| format!("{text:?} is no size: write it as 640x427, with sides up to 8192"))
}

/// What is measured.
#[derive(Serialize)]
struct Report {
    model: String,
    device: String,
    dtype: String,
    version: &'static str,
    images: u64,
    /// Bytes of a JPEG, on average.
    jpeg: usize,
    batch: usize,
    captioner_images_per_second: f64,
    pipeline_images_per_second: f64,
    /// Of the captioner's rate.
    ratio: f64,
    stages: Vec<StageReport>,
    /// What holds the others up.
    bottleneck: String,
    peak_memory: Option<u64>,
}

#[derive(Serialize)]
struct StageReport {
    stage: &'static str,
    mean_ms: f64,
    /// Share of the time in which its threads, or its device, were at work; none where it waits for others.
    busy: Option<f64>,
}

/// Runs the command.
pub(super) fn run(args: PipelineArgs) -> anyhow::Result<Exit> {
    if args.tokens == 0 || args.time.is_zero() {
        return Err(Usage("--tokens and --time are more than 0".into()).into());
    }
    let mut settings = args.config.load()?.settings;
    telemetry::init(&telemetry::quiet(&settings.log))?;
    settings.model.source.clone_from(&args.model);
    (settings.model.max_new_tokens, settings.model.min_new_tokens) = (args.tokens, args.tokens);
    let mut model = models::load(&settings.model, &settings.batch)?;
    let batch = model.engines.iter().map(|loaded| loaded.batch_size).sum();
    let captioner = captioner(&mut model, &args)?;
    let runtime = runtime()?;
    let report = runtime.block_on(pipeline(&args, settings, model, captioner, batch));
    runtime.shutdown_background();
    let report = report?;
    if args.json {
        print_json(&report)?;
    } else {
        show(&report)?;
    }
    Ok(Exit::Done)
}

/// Images a second of the engines alone, on pixels that are there.
fn captioner(model: &mut LoadedModel, args: &PipelineArgs) -> anyhow::Result<f64> {
    let params = Params { max_new_tokens: args.tokens, min_new_tokens: args.tokens, ..Params::default() };
    let mut rate = 0.0;
    // One device after the other: where they share a machine's cores, they would share them in the pipeline, too.
    let share = args.time / model.engines.len() as u32;
    for loaded in &mut model.engines {
        let size = loaded.engine.model().image_size;
        let pixels = (0..loaded.batch_size as u64).map(|seed| pictures::pixels(size, seed));
        let items: Vec<_> = pixels.map(|pixels| Ok((pixels?, params.clone()))).collect::<anyhow::Result<_>>()?;
        caption(loaded.engine.as_mut(), &items)?;
        let (begun, mut images) = (Instant::now(), 0);
        while images == 0 || begun.elapsed() < share {
            caption(loaded.engine.as_mut(), &items)?;
            images += items.len();
        }
        rate += images as f64 / begun.elapsed().as_secs_f64();
    }
    Ok(rate)
}

async fn pipeline(
    args: &PipelineArgs,
    mut settings: Settings,
    model: LoadedModel,
    captioner: f64,
    batch: usize,
) -> anyhow::Result<Report> {
    let info = model.info.clone();
    let jpegs = (0..PICTURES).map(|seed| pictures::jpeg(args.size.0, args.size.1, seed));
    let jpegs: Vec<Vec<u8>> = jpegs.collect::<anyhow::Result<_>>()?;
    let jpeg = jpegs.iter().map(Vec::len).sum::<usize>() / jpegs.len();
    let broker = start_broker(&settings)?;
    settings.kafka.bootstrap_servers = broker.bootstrap_servers()?;
    let stop = CancellationToken::new();
    let address = serve(jpegs, stop.clone()).await?;
    settings.fetch.allow_networks.push(ipnet::IpNet::from(address.ip()));

    // Enough for the time, after a start in which every queue is filled; no more than the embedded broker holds.
    let most = PARTITIONS as usize / 2 * EMBEDDED_PARTITION_BYTES / RECORD;
    let images = ((captioner * args.time.as_secs_f64()) as usize + 4 * batch).min(most);
    submit(&settings, address, images).await?;
    let control = Control::new(&settings.flow, Arc::new(Metrics::new()));
    let parts = models::parts(&settings, model)?;
    let worker = {
        let (settings, control) = (settings.clone(), control.clone());
        tokio::spawn(async move { worker::run(&settings, parts, &control).await })
    };
    // From the first captions on, when all stages have something to do.
    let (mut first, mut last) = (None, Instant::now());
    let mut done = 0;
    while done < images as u64 && !worker.is_finished() {
        tokio::time::sleep(LOOK).await;
        let totals = control.totals();
        if totals.dead_letters > 0 {
            bail!("{} images became dead letters; look at the log", totals.dead_letters);
        }
        if totals.captions > done {
            (done, last) = (totals.captions, Instant::now());
            first.get_or_insert((last, done, busy(&control)));
        } else if last.elapsed() > PATIENCE {
            bail!("no caption for {} s, after {done} of {images}", PATIENCE.as_secs());
        }
    }
    let (begun, before, busy_before) = first.context("the worker ended before the first caption")?;
    let wall = last.duration_since(begun).as_secs_f64();
    let rate = (done - before) as f64 / wall;
    let devices = control.status().devices.len().max(1) as f64;
    let device = (busy(&control) - busy_before) / (wall * devices);
    let stages = stages(&control, &settings, wall, device);
    control.drain("measured");
    let end = worker.await.context("the worker panicked")??;
    stop.cancel();
    drop(broker);
    if !end.clean() || done < images as u64 {
        bail!("the worker did not caption everything: {done} of {images}");
    }
    Ok(Report {
        model: info.id,
        device: info.device,
        dtype: info.dtype,
        version: env!("CARGO_PKG_VERSION"),
        images: done,
        jpeg,
        batch,
        captioner_images_per_second: captioner,
        pipeline_images_per_second: rate,
        ratio: rate / captioner,
        bottleneck: bottleneck(&stages),
        stages,
        peak_memory: peak_memory(),
    })
}

/// Seconds that all devices together were at work.
fn busy(control: &Control) -> f64 {
    control.status().devices.iter().map(|device| device.busy_s).sum()
}

fn stages(control: &Control, settings: &Settings, wall: f64, device: f64) -> Vec<StageReport> {
    let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let decoders = if settings.decode.threads == 0 { cores() } else { settings.decode.threads } as f64;
    let report = |stage: &Stage| {
        let (count, total) = control.metrics().stage_so_far(*stage);
        let total = total.as_secs_f64();
        let busy = match stage {
            Stage::Infer => Some(device),
            Stage::Decode => Some(total / (wall * decoders)),
            Stage::Fetch => Some(total / (wall * settings.fetch.concurrency as f64)),
            _ => None,
        };
        (count > 0).then(|| StageReport { stage: stage.as_str(), mean_ms: total * 1e3 / count as f64, busy })
    };
    Stage::ALL.iter().filter_map(report).collect()
}

fn bottleneck(stages: &[StageReport]) -> String {
    let busiest = stages.iter().filter_map(|stage| Some((stage.busy?, stage.stage)));
    match busiest.max_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((busy, stage)) if busy >= BUSY => format!("{stage}: at work {:.0} % of the time", busy.min(1.0) * 100.0),
        Some((busy, stage)) => format!(
            "no single stage: {stage} is the busiest, with {:.0} % of the time; the stages share this machine's cores",
            busy * 100.0
        ),
        None => "unknown".into(),
    }
}

fn start_broker(settings: &Settings) -> anyhow::Result<EmbeddedBroker> {
    let kafka = &settings.kafka;
    let topics = kafka.consumed_topics().chain([kafka.captions_topic.as_str(), kafka.dead_letter_topic.as_str()]);
    let topics: Vec<_> = topics.map(|topic| (topic, PARTITIONS)).collect();
    Ok(EmbeddedBroker::start(1, &topics)?)
}

/// Serves the pictures on a free loopback port: `/N.jpg`.
async fn serve(jpegs: Vec<Vec<u8>>, stop: CancellationToken) -> anyhow::Result<SocketAddr> {
    let jpegs: Arc<Vec<bytes::Bytes>> = Arc::new(jpegs.into_iter().map(Into::into).collect());
    let app = axum::Router::new().route("/{number}", get(picture)).with_state(jpegs);
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("no loopback port for the image server")?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await });
    Ok(address)
}

async fn picture(State(jpegs): State<Arc<Vec<bytes::Bytes>>>, Path(number): Path<usize>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "image/jpeg")], jpegs[number % jpegs.len()].clone())
}

async fn submit(settings: &Settings, address: SocketAddr, images: usize) -> anyhow::Result<()> {
    let kafka = settings.kafka.clone();
    let topic = kafka.inputs.first().context("kafka.inputs is empty")?.topic.clone();
    let records = (0..images).map(move |id| NewRecord {
        key: Some(id.to_string().into()),
        value: Some(json!({"id": id.to_string(), "image": format!("http://{address}/{id}")}).to_string().into()),
        headers: Vec::new(),
    });
    tokio::task::spawn_blocking(move || write_records(&kafka, &topic, records, PATIENCE)).await??;
    Ok(())
}

fn show(report: &Report) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{} on {} in {}, {} at a time; {} JPEGs of {} on average",
        report.model,
        report.device,
        report.dtype,
        report.batch,
        report.images,
        ByteSize::b(report.jpeg as u64)
    )?;
    writeln!(out, "captioner alone   {:8.2} images/s", report.captioner_images_per_second)?;
    let (rate, share) = (report.pipeline_images_per_second, report.ratio * 100.0);
    writeln!(out, "whole pipeline    {rate:8.2} images/s, {share:.0} % of it\n")?;
    writeln!(out, "stage     mean ms   at work")?;
    for StageReport { stage, mean_ms, busy } in &report.stages {
        let busy = busy.map_or_else(|| "-".into(), |busy| format!("{:.0} %", busy * 100.0));
        writeln!(out, "{stage:8} {mean_ms:8.1} {busy:>9}")?;
    }
    writeln!(out, "\nwhat holds it up  {}", report.bottleneck)?;
    if let Some(peak) = report.peak_memory {
        writeln!(out, "most memory       {}", ByteSize::b(peak))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_two_numbers() {
        assert_eq!(size("640x427"), Ok((640, 427)));
        for text in ["640", "x", "0x5", "9000x1", "640x427x3"] {
            assert!(size(text).unwrap_err().contains("640x427"), "{text}");
        }
    }

    #[test]
    fn the_busiest_stage_is_named_and_whether_it_is_to_blame() {
        let stage = |stage, busy| StageReport { stage, mean_ms: 1.0, busy };
        let stages = [stage("decode", Some(0.4)), stage("infer", Some(0.97)), stage("publish", None)];
        assert_eq!(bottleneck(&stages), "infer: at work 97 % of the time");
        assert!(bottleneck(&stages[..1]).contains("no single stage: decode"));
    }
}
