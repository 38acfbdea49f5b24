//! `blipstream demo`: the main job in one process, with nothing else installed.
//!
//! Everything is real but small: the broker is librdkafka's mock cluster (the Kafka protocol over loopback, nothing
//! durable), the images come over HTTP from a server of this process, the worker is the one of `blipstream worker`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use async_channel::Receiver;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytesize::ByteSize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::collect::{dead_letters, records};
use super::{Exit, Usage, assets, models, runtime, telemetry, worker::drain_on_signal};
use crate::admin;
use crate::config::ConfigOptions;
use crate::disposition::Stage;
use crate::kafka::{EMBEDDED_PARTITION_BYTES, EmbeddedBroker, Follower, From, NewRecord, write_records};
use crate::message::Message;
use crate::metrics::Metrics;
use crate::pipeline::{Control, worker};
use crate::settings::Settings;

/// Partitions of the demo's topics.
const PARTITIONS: i32 = 3;
/// The demo gives up when nothing arrives for this long.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest wait for one answer before the reader looks whether it is to stop.
const POLL: Duration = Duration::from_millis(50);
/// The longest record, with key and headers: a caption and a judged text. A test reads all of them.
const MAX_RECORD: usize = 1280;
/// A reference to nothing: what becomes of it is part of the show.
const MISSING: &str = "no-such-picture.jpg";

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// Submit the images this many times; from the second time on only a count is shown
    #[arg(long, default_value_t = 1, value_name = "N")]
    rounds: usize,
    /// Leave broker, image server and worker up, and print how to talk to them
    #[arg(long)]
    keep_running: bool,
    /// Folder or hub id of another model to use
    #[arg(long, value_name = "DIR|HUB-ID", default_value = assets::DEMO_MODEL)]
    model: String,
    #[command(flatten)]
    config: ConfigOptions,
}

/// Runs the command.
pub fn run(args: DemoArgs) -> anyhow::Result<Exit> {
    let mut settings = args.config.load()?.settings;
    let most = most_rounds();
    if !(1..=most).contains(&args.rounds) {
        let size = ByteSize::b(EMBEDDED_PARTITION_BYTES as u64);
        return Err(Usage(format!(
            "--rounds is between 1 and {most}: the embedded broker keeps {size} of a partition, and more captions might \
             not fit. For a longer run, start `blipstream worker` with brokers of your own"
        ))
        .into());
    }
    telemetry::init(&telemetry::quiet(&settings.log))?;
    settings.model.source.clone_from(&args.model);
    if args.model == assets::DEMO_MODEL {
        settings.filter.source.get_or_insert_with(|| assets::DEMO_MODEL.into());
    }
    if settings.filter.source.is_some() {
        settings.kafka.filtered_topic.get_or_insert_with(|| "blipstream.filtered".into());
    }
    let runtime = runtime()?;
    let exit = runtime.block_on(show(args, settings));
    runtime.shutdown_background();
    exit
}

/// Rounds whose records fit into the embedded broker, should their keys put all of them into one partition.
fn most_rounds() -> usize {
    EMBEDDED_PARTITION_BYTES / (assets::images().len() * MAX_RECORD)
}

async fn show(args: DemoArgs, mut settings: Settings) -> anyhow::Result<Exit> {
    let mut out = io::stdout();
    let broker = start_broker(&mut settings, PARTITIONS)?;
    // Of several rounds, each is captioned.
    settings.model.caption_cache = bytesize::ByteSize::b(0);
    settings.kafka.bootstrap_servers = broker.bootstrap_servers()?;
    let stop = CancellationToken::new();
    let images = serve_images(stop.clone()).await?;
    settings.fetch.allow_networks.push(ipnet::IpNet::from(images.ip()));
    settings.admin.listen.set_port(0);
    writeln!(out, "broker   {} (embedded: real protocol, nothing durable)", settings.kafka.bootstrap_servers)?;
    writeln!(out, "images   http://{images}/ ({} pictures)", assets::images().len())?;

    let model = {
        let settings = settings.clone();
        tokio::task::spawn_blocking(move || models::load_for_stream(&settings)).await??
    };
    let info = model.info.clone();
    let filter = model.engines.first().and_then(|loaded| loaded.filter.as_ref()).map(|filter| filter.model().clone());
    writeln!(
        out,
        "model    {} on {} in {} ({}), {:.1} M parameters",
        info.id,
        info.device,
        info.dtype,
        info.backend,
        info.parameters as f64 / 1e6
    )?;
    if let Some(info) = filter {
        let millions = info.parameters as f64 / 1e6;
        writeln!(out, "filter   {}, {millions:.1} M parameters: judges captions and the pages' own texts", info.id)?;
    }
    let control = Control::new(&settings.flow, Arc::new(Metrics::new()));
    drain_on_signal(&control)?;
    let (admin, token) = (&settings.admin, settings.admin.token.clone());
    let address = admin::serve(admin.listen, token, control.clone(), stop.clone()).await?.address;
    writeln!(out, "metrics  http://{address}/metrics, http://{address}/status\n")?;

    let parts = models::parts(&settings, model)?;
    let worker = {
        let (settings, control) = (settings.clone(), control.clone());
        tokio::spawn(async move {
            let end = worker::run(&settings, parts, &control).await;
            // One that ends by itself, or never starts, must not leave the demo waiting for captions.
            control.drain("the worker has ended");
            end
        })
    };
    let begun = Instant::now();
    let expected = submit(&settings, images, args.rounds).await?;
    let (answers, reading) = answers(&settings, &stop)?;
    let seen = watch(&mut out, &answers, expected, &control).await?;
    let took = begun.elapsed();
    summary(&mut out, &control, seen, took)?;
    if args.keep_running && seen.answers() == expected {
        talk(&mut out, &settings, images, address)?;
        control.draining().cancelled().await;
        writeln!(out, "\ndraining…")?;
    }
    control.drain("the demo is over");
    let end = worker.await.context("the worker panicked")??;
    stop.cancel();
    drop(answers);
    // Its client would complain if the broker went first.
    tokio::task::spawn_blocking(move || reading.join())
        .await?
        .map_err(|_| anyhow::anyhow!("reading the answers panicked"))?;
    drop(broker);
    Ok(if seen.answers() == expected && end.clean() { Exit::Done } else { Exit::Failed })
}

/// An embedded broker with the topics of the settings.
pub(super) fn start_broker(settings: &mut Settings, partitions: i32) -> anyhow::Result<EmbeddedBroker> {
    let kafka = &mut settings.kafka;
    // A worker is one member of its group then. A second one that came late, on a busy machine, would wait for most of a
    // session's time-out in this broker, and everybody with it.
    kafka.retry_topics.clear();
    let (filtered, canary) = (kafka.filtered_topic.as_ref(), kafka.canary_topic.as_ref());
    let outputs = [Some(&kafka.captions_topic), filtered, canary, Some(&kafka.dead_letter_topic)];
    let topics = kafka.consumed_topics().chain(outputs.into_iter().flatten().map(String::as_str));
    let topics: Vec<_> = topics.map(|topic| (topic, partitions)).collect();
    Ok(EmbeddedBroker::start(1, &topics)?)
}

/// Serves the demo images.
async fn serve_images(stop: CancellationToken) -> anyhow::Result<SocketAddr> {
    let images: BTreeMap<&'static str, &'static [u8]> = assets::images().into_iter().collect();
    serve(axum::Router::new().route("/{name}", get(image)).with_state(Arc::new(images)), stop).await
}

/// Serves images on a free loopback port.
pub(super) async fn serve(app: axum::Router, stop: CancellationToken) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("no loopback port for the image server")?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await });
    Ok(address)
}

type Images = Arc<BTreeMap<&'static str, &'static [u8]>>;

async fn image(State(images): State<Images>, Path(name): Path<String>) -> Response {
    match images.get(name.as_str()) {
        Some(bytes) => ([(header::CONTENT_TYPE, content_type(&name))], *bytes).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

fn content_type(name: &str) -> &'static str {
    match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("png") => "image/png",
        Some("webp") => "image/webp",
        _ => "image/jpeg",
    }
}

/// Submits every image `rounds` times, and a reference to nothing. Returns how many answers will come.
async fn submit(settings: &Settings, images: SocketAddr, rounds: usize) -> anyhow::Result<usize> {
    let names = assets::images().into_iter().map(|(name, _)| name);
    let names: Vec<_> = names.cycle().take(assets::images().len() * rounds).chain([MISSING]).collect();
    let expected = names.len();
    let kafka = settings.kafka.clone();
    let topic = kafka.inputs.first().context("kafka.inputs is empty")?.topic.clone();
    let texts = if settings.filter.source.is_some() { assets::alt_texts() } else { BTreeMap::new() };
    let records: Vec<_> = names
        .into_iter()
        .map(|name| {
            let mut request = json!({"id": name, "image": format!("http://{images}/{name}")});
            if let Some(text) = texts.get(name) {
                request["text"] = json!([text]);
                request["tasks"] = json!(["caption", "filter"]);
            }
            NewRecord { key: Some(name.into()), value: Some(request.to_string().into()), headers: Vec::new() }
        })
        .collect();
    tokio::task::spawn_blocking(move || write_records(&kafka, &topic, records, PATIENCE)).await??;
    Ok(expected)
}

/// What came back for one request.
enum Answer {
    Caption(Value),
    DeadLetter { name: String, code: String, message: String },
}

/// Reads captions and dead letters in the background until `stop`; the thread is joined before the broker ends.
fn answers(settings: &Settings, stop: &CancellationToken) -> anyhow::Result<(Receiver<Answer>, JoinHandle<()>)> {
    let (sender, receiver) = async_channel::bounded(64);
    let kafka = &settings.kafka;
    let letters = kafka.dead_letter_topic.clone();
    let topics = [records(kafka), vec![dead_letters(kafka)]].concat();
    let follower = Follower::open(kafka, &topics, From::Beginning, PATIENCE)?;
    let stop = stop.clone();
    let thread = std::thread::Builder::new().name("answers".into()).spawn(move || {
        while !stop.is_cancelled() {
            let answer = match follower.next(POLL) {
                Ok(Some(message)) if *message.topic == *letters => dead_letter(&message),
                Ok(message) => message.as_ref().and_then(caption),
                Err(error) => {
                    tracing::error!(%error, "cannot read the answers");
                    return;
                }
            };
            if let Some(answer) = answer
                && sender.send_blocking(answer).is_err()
            {
                return;
            }
        }
    })?;
    Ok((receiver, thread))
}

fn caption(message: &Message) -> Option<Answer> {
    Some(Answer::Caption(serde_json::from_slice(message.payload.as_ref()?).ok()?))
}

fn dead_letter(message: &Message) -> Option<Answer> {
    let request: Value = serde_json::from_slice(message.payload.as_ref()?).ok()?;
    let header = |name: &str| message.header(name).unwrap_or("?").to_owned();
    Some(Answer::DeadLetter {
        name: request["id"].as_str().unwrap_or("?").to_owned(),
        code: header("blipstream-error-code"),
        message: header("blipstream-error-message"),
    })
}

/// What was seen.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    captions: usize,
    dead_letters: usize,
    /// Texts that came with the images.
    kept: usize,
    rejected: usize,
}

impl Seen {
    fn answers(self) -> usize {
        self.captions + self.dead_letters
    }
}

/// The caption that was written, and the texts that were found: whether each is kept, and the probability that it matches.
fn candidates(record: &Value) -> (&str, Vec<(&str, bool, f64)>) {
    let all = record["candidates"].as_array().map_or(&[][..], Vec::as_slice);
    let written = all.iter().find(|one| one["source"] == "generated").unwrap_or(record);
    let found = all.iter().filter(|one| one["source"] == "found");
    let judged = |one| (text(one), one["kept"] == true, one["itm"].as_f64().unwrap_or_default());
    (text(written), found.map(judged).collect())
}

fn text(one: &Value) -> &str {
    one["text"].as_str().unwrap_or("?")
}

/// Prints the answers as they arrive.
async fn watch(
    out: &mut impl Write,
    answers: &Receiver<Answer>,
    expected: usize,
    control: &Control,
) -> anyhow::Result<Seen> {
    let shown = assets::images().len();
    let names = assets::images().into_iter().map(|(name, _)| name.len()).chain([MISSING.len()]);
    let width = names.max().unwrap_or(0);
    let digits = expected.to_string().len();
    let mut seen = Seen::default();
    while seen.answers() < expected {
        let next = tokio::select! {
            biased; // an answer that is here is shown before the end
            answer = tokio::time::timeout(PATIENCE, answers.recv()) => answer,
            () = control.draining().cancelled() => break,
        };
        let answer = next.with_context(|| format!("nothing arrived for {} s", PATIENCE.as_secs()))??;
        let count = seen.answers() + 1;
        match answer {
            Answer::Caption(record) => {
                seen.captions += 1;
                let (caption, found) = candidates(&record);
                for (_, kept, _) in &found {
                    *(if *kept { &mut seen.kept } else { &mut seen.rejected }) += 1;
                }
                if seen.captions <= shown {
                    let id = record["id"].as_str().unwrap_or("?");
                    writeln!(out, "[{count:digits$}/{expected}]  {id:width$}  {caption}")?;
                    let indent = 2 * digits + width + 5;
                    for (text, kept, itm) in found {
                        let kept = if kept { "kept    " } else { "rejected" };
                        writeln!(out, "{:indent$}  alt text {kept} {itm:.2}  {text}", "")?;
                    }
                } else if count % 100 == 0 {
                    writeln!(out, "[{count:digits$}/{expected}]")?;
                }
            }
            Answer::DeadLetter { name, code, message } => {
                seen.dead_letters += 1;
                let note = if name == MISSING { " (on purpose)" } else { "" };
                writeln!(out, "[{count:digits$}/{expected}]  {name:width$}  dead letter{note}: {code}: {message}")?;
            }
        }
        out.flush()?;
    }
    Ok(seen)
}

fn summary(out: &mut impl Write, control: &Control, seen: Seen, took: Duration) -> io::Result<()> {
    let metrics = control.metrics();
    let (batches, images) = metrics.batches_so_far();
    let seconds = took.as_secs_f64();
    writeln!(out, "\n{} images in {seconds:.2} s: {:.1} images/s", seen.captions, seen.captions as f64 / seconds)?;
    writeln!(out, "{batches} batches, {:.1} images each on average", images as f64 / batches.max(1) as f64)?;
    if seen.kept + seen.rejected > 0 {
        let all = seen.kept + seen.rejected;
        writeln!(out, "{all} alt texts judged: {} kept, {} rejected", seen.kept, seen.rejected)?;
    }
    writeln!(out, "{} dead letter(s)", seen.dead_letters)?;
    writeln!(out, "mean time of a row in each stage (of a commit in the last):")?;
    for stage in Stage::ALL {
        let (count, total) = metrics.stage_so_far(*stage);
        if count > 0 {
            writeln!(out, "  {:8} {:9.2} ms", stage.as_str(), total.as_secs_f64() * 1000.0 / count as f64)?;
        }
    }
    out.flush()
}

fn talk(out: &mut impl Write, settings: &Settings, images: SocketAddr, admin: SocketAddr) -> anyhow::Result<()> {
    let kafka = &settings.kafka;
    let (servers, captions, letters) = (&kafka.bootstrap_servers, &kafka.captions_topic, &kafka.dead_letter_topic);
    let input = &kafka.inputs.first().context("kafka.inputs is empty")?.topic;
    writeln!(
        out,
        "
The worker stays up until Ctrl-C.

  bootstrap servers  {servers}
  topics             {input} in, {captions} out, {letters} for what failed
  metrics            http://{admin}/metrics
  status             http://{admin}/status
  pause, resume      curl -X POST http://{admin}/admin/pause   (or resume, or drain)

Send a request and read the captions with kcat:

  echo '{{\"image\": \"http://{images}/{name}\"}}' | kcat -b {servers} -t {input} -P
  kcat -b {servers} -t {captions} -C -o beginning -e

or with this program:

  blipstream submit --set kafka.bootstrap_servers={servers} --wait photo.jpg",
        name = assets::images().first().map_or("", |(name, _)| name),
    )?;
    out.flush()?;
    Ok(())
}
