//! `blipstream bench pipeline`: the flow of `blipstream worker`, in this process, against its own captioner.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use bytesize::ByteSize;
use serde::Serialize;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::clients::{Answered, Clients};
use super::peak_memory;
use crate::caption::{Engine, Params, caption, pictures};
use crate::command::models::LoadedModel;
use crate::command::{Exit, Usage, demo, models, print_json, runtime, telemetry};
use crate::config::ConfigOptions;
use crate::disposition::Stage;
use crate::endpoint;
use crate::kafka::{EMBEDDED_PARTITION_BYTES, NewRecord, write_records};
use crate::metrics::Metrics;
use crate::pipeline::{Budget, Control, worker};
use crate::settings::{Log, Settings};

/// Partitions of every topic.
const PARTITIONS: i32 = 8;
/// The longest caption record, with key and headers.
const RECORD: usize = 1536;
/// Pictures that differ.
const PICTURES: u64 = 16;
/// The bench gives up when nothing arrives for this long, and four batches more.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest side of a picture.
const SIDE: u32 = 4096;
/// How often progress is looked for.
const LOOK: Duration = Duration::from_millis(5);
/// Captions that never cease to come for so long are no bursts.
const STREAM: Duration = Duration::from_millis(500);
/// Who warns of what a drain leaves behind.
const UNFINISHED: &str = "blipstream::pipeline::worker";
/// How long the rest may take when all is measured.
const DRAIN: Duration = Duration::from_secs(1);
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
    /// Clients that ask the endpoint beside the stream, one image after another each; see endpoint.share
    #[arg(long, default_value_t = 0, value_name = "N")]
    clients: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigOptions,
}

fn size(text: &str) -> Result<(u32, u32), String> {
    let sides = text.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
    sides
        .filter(|(width, height)| (1..=SIDE).contains(width) && (1..=SIDE).contains(height))
        .ok_or_else(|| format!("{text:?} is no size: write it as 640x427, with sides up to {SIDE}"))
}

/// What is measured.
#[derive(Serialize)]
struct Report {
    model: String,
    device: String,
    dtype: String,
    backend: String,
    version: &'static str,
    images: u64,
    /// Bytes of a JPEG, on average.
    jpeg: usize,
    batch: usize,
    captioner_images_per_second: f64,
    pipeline_images_per_second: f64,
    /// Of the captioner's rate.
    ratio: f64,
    /// What clients of the endpoint got beside it.
    endpoint: Option<Answered>,
    stages: Vec<StageReport>,
    /// What holds the others up.
    bottleneck: String,
    peak_memory: Option<u64>,
}

#[derive(Serialize)]
struct StageReport {
    stage: &'static str,
    mean_ms: f64,
    /// Share of the time in which its threads, or its devices, were at work; none where it waits for others.
    busy: Option<f64>,
}

/// Runs the command.
pub(super) fn run(args: PipelineArgs) -> anyhow::Result<Exit> {
    if args.tokens == 0 || args.time.is_zero() {
        return Err(Usage("--tokens and --time are more than 0".into()).into());
    }
    let mut settings = args.config.load()?.settings;
    let mut log = telemetry::quiet(&settings.log);
    if settings.log.filter == Log::default().filter {
        // That something is left unfinished is no news here.
        log.filter = format!("{},{}=error", log.filter, UNFINISHED);
    }
    telemetry::init(&log)?;
    // The engines alone are measured as they are at their fastest, and so is the pipeline.
    let plain = crate::settings::Model::default();
    settings.model.source.clone_from(&args.model);
    (settings.model.num_beams, settings.model.do_sample) = (plain.num_beams, plain.do_sample);
    settings.model.repetition_penalty = plain.repetition_penalty;
    settings.model.num_return_sequences = plain.num_return_sequences;
    (settings.filter.source, settings.answerer.source) = (None, None);
    (settings.model.max_new_tokens, settings.model.min_new_tokens) = (args.tokens, args.tokens);
    settings.model.max_new_tokens_limit = settings.model.max_new_tokens_limit.max(args.tokens);
    let mut model = models::load(&settings)?;
    let batch = model.engines.iter().map(|loaded| loaded.batch_size).sum();
    let captioner = captioner(&mut model, &settings, &args)?;
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

/// Images a second of the engines alone, all of them at a time, on pixels that are there.
fn captioner(model: &mut LoadedModel, settings: &Settings, args: &PipelineArgs) -> anyhow::Result<f64> {
    let params = Params {
        prompt: settings.model.prompt.clone(),
        max_new_tokens: args.tokens,
        min_new_tokens: args.tokens,
        ..Params::default()
    };
    let rates = std::thread::scope(|scope| {
        let threads: Vec<_> = model
            .engines
            .iter_mut()
            .map(|loaded| scope.spawn(|| rate(loaded.engine.as_mut(), loaded.batch_size, &params, args.time)))
            .collect();
        let rates = threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("an engine panicked"))?);
        rates.collect::<anyhow::Result<Vec<f64>>>()
    })?;
    Ok(rates.into_iter().sum())
}

fn rate(engine: &mut dyn Engine, batch: usize, params: &Params, time: Duration) -> anyhow::Result<f64> {
    let size = engine.model().image_size;
    let pixels = (0..batch as u64).map(|seed| pictures::pixels(size, seed));
    let items: Vec<_> = pixels.map(|pixels| Ok((pixels?, params.clone()))).collect::<anyhow::Result<_>>()?;
    let mut run = || -> anyhow::Result<()> {
        caption(engine, &items)?.into_iter().try_for_each(|result| result.map(drop)).context("no caption")
    };
    run()?;
    let (begun, mut images) = (Instant::now(), 0);
    while images == 0 || begun.elapsed() < time {
        run()?;
        images += batch;
    }
    Ok(images as f64 / begun.elapsed().as_secs_f64())
}

/// What had happened at some moment.
#[derive(Clone, Copy)]
struct Mark {
    at: Instant,
    captions: u64,
    /// Seconds that all devices together were at work.
    device: f64,
    /// Seconds that all images together were decoded.
    decode: f64,
}

/// Finds the beginnings of bursts: captions come a batch at a time, and a rate is exact only from one burst to another.
struct Bursts {
    seen: u64,
    quiet: bool,
    last: Option<Mark>,
}

impl Bursts {
    /// A look at the count of captions; a mark where a burst has begun, or where there has been none for a while since
    /// captions never cease to come.
    fn look(&mut self, control: &Control) -> Option<Mark> {
        let (at, captions) = (Instant::now(), control.totals().captions);
        let (before, changed) = (self.seen, captions > self.seen);
        let stream = self.last.is_some_and(|last| at - last.at > STREAM);
        let begins = changed && (self.quiet || stream);
        (self.seen, self.quiet) = (captions, !changed);
        if !begins {
            return None;
        }
        let decode = control.metrics().stage_so_far(Stage::Decode).1.as_secs_f64();
        self.last = Some(Mark { at, captions: before, device: busy(control), decode });
        self.last
    }
}

async fn pipeline(
    args: &PipelineArgs,
    mut settings: Settings,
    model: LoadedModel,
    captioner: f64,
    batch: usize,
) -> anyhow::Result<Report> {
    let info = model.info.clone();
    let jpegs = (0..PICTURES).map(|seed| pictures::photograph(args.size.0, args.size.1, seed));
    let jpegs: Vec<Vec<u8>> = jpegs.collect::<Result<_, _>>().context("cannot encode a picture")?;
    let jpeg = jpegs.iter().map(Vec::len).sum::<usize>() / jpegs.len();
    let broker = demo::start_broker(&mut settings, PARTITIONS)?;
    settings.kafka.bootstrap_servers = broker.bootstrap_servers()?;
    let stop = CancellationToken::new();
    let jpegs: Arc<Vec<bytes::Bytes>> = Arc::new(jpegs.into_iter().map(Into::into).collect());
    let app = axum::Router::new().route("/{number}", get(picture)).with_state(jpegs.clone());
    let address = demo::serve(app, stop.clone()).await?;
    settings.fetch.allow_networks.push(ipnet::IpNet::from(address.ip()));
    // The same few pictures again and again, each as if it were another one.
    settings.fetch.share = false;
    settings.model.caption_cache = bytesize::ByteSize::b(0);
    // What is measured ends while there is more to do; the rest is not waited for.
    settings.flow.drain_timeout = DRAIN;
    let under_way = settings.flow.max_images;
    let most = PARTITIONS as usize / 2 * EMBEDDED_PARTITION_BYTES / RECORD;
    let images = ((captioner * args.time.as_secs_f64() * 1.5) as usize + under_way + 4 * batch).min(most);
    submit(&settings, address, images).await?;
    let budget = Budget::new(&settings.flow);
    let budget = if args.clients > 0 { budget.with_endpoint(settings.endpoint.share) } else { budget };
    let control = Control::with_budget(budget, Arc::new(Metrics::new()));
    settings.endpoint.listen = (args.clients > 0).then_some(SocketAddr::from(([127, 0, 0, 1], 0)));
    let parts = models::parts(&settings, model)?;
    let worker = {
        let (settings, control) = (settings.clone(), control.clone());
        tokio::spawn(async move { worker::run(&settings, parts, &control).await })
    };
    let mut clients = None;
    // A batch takes as long as it takes.
    let patience = PATIENCE + Duration::from_secs_f64(4.0 * batch as f64 / captioner);
    let mut bursts = Bursts { seen: 0, quiet: true, last: None };
    let mut first: Option<Mark> = None;
    let mut progress = Instant::now();
    let (first, last) = loop {
        tokio::time::sleep(LOOK).await;
        if worker.is_finished() {
            worker.await.context("the worker panicked")??;
            bail!("the worker ended by itself");
        }
        let letters = control.totals().dead_letters;
        if letters > 0 {
            bail!("{letters} images became dead letters; --set log.filter=info tells why");
        }
        let Some(mark) = bursts.look(&control) else {
            if progress.elapsed() > patience {
                bail!("no caption for {} s, after {} of {images}", patience.as_secs(), bursts.seen);
            }
            continue;
        };
        progress = mark.at;
        // The first batch is captioned while everything behind it fills up.
        match first {
            None if mark.captions >= batch as u64 => {
                first = Some(mark);
                if args.clients > 0 {
                    let port = endpoint::serve(&settings.endpoint, control.clone(), stop.clone()).await?;
                    clients = Some(Clients::start(args.clients, port.address, &jpegs)?);
                }
            }
            None => {}
            Some(first) => {
                let left = images as u64 - mark.captions;
                if mark.at - first.at >= args.time || left <= under_way as u64 {
                    break (first, mark);
                }
            }
        }
    };
    let wall = (last.at - first.at).as_secs_f64().max(f64::EPSILON);
    let measured = last.captions - first.captions;
    let rate = measured as f64 / wall;
    let devices = control.status().devices.len().max(1) as f64;
    let busy = [
        (Stage::Infer, (last.device - first.device) / (wall * devices)),
        (Stage::Decode, (last.decode - first.decode) / (wall * decoders(&settings))),
    ];
    let stages = stages(&control, &busy);
    let endpoint = match clients {
        None => None,
        Some(clients) => Some(clients.stop([first.at, last.at], measured, settings.endpoint.share).await?),
    };
    control.drain("measured");
    // What was under way is given up, so its end is not a clean one.
    worker.await.context("the worker panicked")??;
    stop.cancel();
    // A client that was given up still speaks to it, until this process ends.
    std::mem::forget(broker);
    Ok(Report {
        model: info.id,
        device: info.device,
        dtype: info.dtype,
        backend: info.backend,
        version: env!("CARGO_PKG_VERSION"),
        images: measured,
        jpeg,
        batch,
        captioner_images_per_second: captioner,
        pipeline_images_per_second: rate,
        ratio: rate / captioner,
        endpoint,
        bottleneck: bottleneck(&stages),
        stages,
        peak_memory: peak_memory(),
    })
}

/// Seconds that all devices together were at work.
fn busy(control: &Control) -> f64 {
    control.status().devices.iter().map(|device| device.busy_s).sum()
}

fn decoders(settings: &Settings) -> f64 {
    let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (if settings.decode.threads == 0 { cores() } else { settings.decode.threads }) as f64
}

fn stages(control: &Control, busy: &[(Stage, f64)]) -> Vec<StageReport> {
    let report = |stage: &Stage| {
        let (count, total) = control.metrics().stage_so_far(*stage);
        let busy = busy.iter().find(|(of, _)| of == stage).map(|(_, share)| *share);
        let mean_ms = total.as_secs_f64() * 1e3 / count as f64;
        (count > 0).then(|| StageReport { stage: stage.as_str(), mean_ms, busy })
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
        "{} on {} in {} ({}), {} at a time; {} JPEGs of {} on average",
        report.model,
        report.device,
        report.dtype,
        report.backend,
        report.batch,
        report.images,
        ByteSize::b(report.jpeg as u64)
    )?;
    writeln!(out, "captioner alone   {:8.2} images/s", report.captioner_images_per_second)?;
    let (rate, share) = (report.pipeline_images_per_second, report.ratio * 100.0);
    writeln!(out, "whole pipeline    {rate:8.2} images/s, {share:.0} % of it\n")?;
    if let Some(Answered { clients, images, images_per_second, share, configured_share, p50_ms, p99_ms, most_ms }) =
        &report.endpoint
    {
        writeln!(
            out,
            "endpoint          {images_per_second:8.2} images/s, {:.0} % of all ({:.0} % set), {images} images, {clients} clients",
            share * 100.0,
            configured_share * 100.0
        )?;
        writeln!(
            out,
            "an answer took    {p50_ms:8.0} ms in the middle, {p99_ms:.0} ms at p99, {most_ms:.0} ms at most\n"
        )?;
    }
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
