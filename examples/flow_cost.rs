//! What the flow itself costs, without a model: messages a second, CPU time of each part, and the price of exactly-once
//! delivery against at-least-once, in turns on one Apache Kafka.
//!
//! ```text
//! make kafka
//! cargo run --release --example flow_cost -- 127.0.0.1:PORT [MESSAGES]
//! ```
//!
//! Messages carry their image, a JPEG of about 10 kB; the captioner is a fake that takes no time.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blipstream::caption::fake::{FakeEngine, FakeOptions};
use blipstream::caption::preprocess::Preprocessor;
use blipstream::kafka::{Follower, From, NewRecord, TopicCheck, write_records};
use blipstream::metrics::Metrics;
use blipstream::pipeline::{Control, Loaded, Parts, worker};
use blipstream::settings::{Delivery, Input, Settings};
use image::{ImageFormat, Rgb, RgbImage};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use tokio::runtime::{Builder, Runtime};

const PARTITIONS: i32 = 6;
/// Pairs of runs, one in each mode.
const PAIRS: usize = 3;
/// Messages a second while latency is measured, and for how many seconds.
const RATE: usize = 200;
const SECONDS: usize = 15;
/// Side of the model's images, in pixels, as base has it.
const SIDE: usize = 384;
const PATIENCE: Duration = Duration::from_secs(300);
/// Of Linux, the unit of a thread's CPU time.
const TICKS_A_SECOND: f64 = 100.0;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let servers = arguments.next().ok_or("name the bootstrap servers; `make kafka` starts some")?;
    let messages: usize = arguments.next().map_or(Ok(20_000), |text| text.parse())?;
    let pictures: Vec<String> = (0..64).map(|seed| STANDARD.encode(picture(seed))).collect();
    let bytes = pictures.iter().map(String::len).sum::<usize>() / pictures.len() / 4 * 3;
    say(&format!("{messages} messages, each with a JPEG of {bytes} bytes on average, {PARTITIONS} partitions"));
    let modes = [Delivery::AtLeastOnce, Delivery::ExactlyOnce];
    let mut speeds: BTreeMap<bool, Vec<f64>> = BTreeMap::new();
    for _ in 0..PAIRS {
        for mode in modes {
            let (speed, cpu) = throughput(&servers, mode, messages, &pictures)?;
            speeds.entry(mode == Delivery::ExactlyOnce).or_default().push(speed);
            let parts: Vec<_> = cpu.iter().map(|(part, micros)| format!("{part} {micros:.0}")).collect();
            let all: f64 = cpu.values().sum();
            say(&format!("{mode:?}: {speed:.0} messages/s; CPU µs a message: {all:.0} ({})", parts.join(", ")));
        }
    }
    let median = |exactly: bool| {
        let mut all = speeds[&exactly].clone();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    say(&format!("exactly-once has {:.2} of the throughput of at-least-once", median(true) / median(false)));
    for mode in modes.into_iter().chain(modes) {
        let mut latencies = latency(&servers, mode, &pictures)?;
        latencies.sort();
        let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize].as_millis();
        say(&format!(
            "{mode:?}: at {RATE} messages/s a caption is readable after {} ms (median), {} ms (99 %)",
            at(0.5),
            at(0.99)
        ));
    }
    Ok(())
}

/// A JPEG of about 10 kB: noise on a gradient.
fn picture(seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let picture = RgbImage::from_fn(320, 240, |x, y| Rgb([x as u8, y as u8, seed as u8].map(|c| c ^ random.u8(..24))));
    let mut out = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut out, ImageFormat::Jpeg).expect("an encoded picture");
    out.into_inner()
}

/// Settings on fresh topics.
fn settings(servers: &str, mode: Delivery) -> Result<Settings> {
    let topics = ["requests", "captions", "dlq"].map(|name| format!("flow-cost.{name}.{:016x}", fastrand::u64(..)));
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new().set("bootstrap.servers", servers).create()?;
    let new: Vec<_> = topics.iter().map(|t| NewTopic::new(t, PARTITIONS, TopicReplication::Fixed(-1))).collect();
    runtime("ask")?.block_on(admin.create_topics(&new, &AdminOptions::new()))?;
    let mut settings = Settings::default();
    let [requests, captions, letters] = topics;
    servers.clone_into(&mut settings.kafka.bootstrap_servers);
    settings.kafka.group_id.clone_from(&requests);
    settings.kafka.inputs = vec![Input { topic: requests, weight: 1 }];
    (settings.kafka.captions_topic, settings.kafka.dead_letter_topic) = (captions, letters);
    settings.kafka.retry_topics.clear();
    settings.kafka.delivery = mode;
    Ok(settings)
}

fn runtime(name: &str) -> Result<Runtime> {
    Ok(Builder::new_multi_thread().enable_all().thread_name(name).build()?)
}

fn requests(pictures: &[String], ids: std::ops::Range<usize>) -> impl Iterator<Item = NewRecord> {
    ids.map(|id| NewRecord {
        key: Some(id.to_string().into_bytes()),
        value: Some(format!(r#"{{"id":"{id}","image":"{}"}}"#, pictures[id % pictures.len()]).into_bytes()),
        headers: Vec::new(),
    })
}

/// A worker in this process, on a runtime of its own.
struct Running {
    control: Control,
    task: tokio::task::JoinHandle<anyhow::Result<worker::Summary>>,
    runtime: Runtime,
}

impl Running {
    fn start(settings: &Settings) -> Result<Self> {
        let control = Control::new(&settings.flow, Arc::new(Metrics::new()));
        let engine = FakeEngine::new(FakeOptions { image_size: SIDE, ..FakeOptions::default() });
        let parts = Parts {
            engines: vec![Loaded {
                engine: Box::new(engine),
                filter: None,
                answerer: None,
                canary: None,
                batch_size: 8,
                replica: None,
            }],
            preprocessor: Preprocessor::blip(SIDE),
            flag_terms: Vec::new(),
            worker: "flow-cost".into(),
            load: None,
        };
        let runtime = runtime("flow")?;
        let (settings, handle) = (settings.clone(), control.clone());
        let task = runtime.spawn(async move { worker::run(&settings, parts, &handle).await });
        Ok(Self { control, task, runtime })
    }

    fn stop(self) -> Result<()> {
        self.control.drain("measured");
        let summary = self.runtime.block_on(self.task)??;
        if summary.clean() { Ok(()) } else { Err("the worker did not end well".into()) }
    }
}

/// Messages a second from the first caption on, and CPU µs a message by part.
fn throughput(
    servers: &str,
    mode: Delivery,
    messages: usize,
    pictures: &[String],
) -> Result<(f64, BTreeMap<&'static str, f64>)> {
    let settings = settings(servers, mode)?;
    write_records(&settings.kafka, &settings.kafka.inputs[0].topic, requests(pictures, 0..messages), PATIENCE)?;
    let worker = Running::start(&settings)?;
    let done = || worker.control.totals().captions as usize;
    let wait_for = |captions: usize| -> Result<Instant> {
        let deadline = Instant::now() + PATIENCE;
        while done() < captions {
            if Instant::now() > deadline || worker.task.is_finished() {
                return Err(format!("{} of {captions} captions", done()).into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Instant::now())
    };
    // Joining the group is no part of it.
    let begun = wait_for(1)?;
    let (first, before) = (done(), cpu());
    let ended = wait_for(messages)?;
    let (after, count) = (cpu(), (messages - first) as f64);
    worker.stop()?;
    let spent = |part: &'static str, ticks: f64| {
        (part, (ticks - before.get(part).copied().unwrap_or(0.0)) / TICKS_A_SECOND * 1e6 / count)
    };
    let cpu = after.into_iter().map(|(part, ticks)| spent(part, ticks)).filter(|(_, micros)| *micros >= 0.5).collect();
    Ok((count / (ended - begun).as_secs_f64(), cpu))
}

/// CPU ticks so far, by part of the flow, as the threads' names tell it.
fn cpu() -> BTreeMap<&'static str, f64> {
    let mut parts = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let Ok(stat) = fs::read_to_string(task.path().join("stat")) else { continue };
        let (Some(name), Some((_, rest))) = (stat.split(['(', ')']).nth(1), stat.rsplit_once(") ")) else { continue };
        let part = match name {
            "consume" => "consume",
            name if name.starts_with("decode") => "decode",
            name if name.starts_with("infer") => "infer",
            name if name.starts_with("rdk") => "librdkafka",
            "flow" => "parse, fetch, publish",
            _ => "other",
        };
        // User and system time are the 12th and 13th after the name (proc(5)).
        let ticks: f64 = rest.split(' ').skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum();
        *parts.entry(part).or_default() += ticks;
    }
    parts
}

/// From a request's writing until a reader of committed records has its caption.
fn latency(servers: &str, mode: Delivery, pictures: &[String]) -> Result<Vec<Duration>> {
    let settings = settings(servers, mode)?;
    let checks = [TopicCheck { topic: settings.kafka.captions_topic.clone(), setting: "the topic" }];
    let follower = Follower::open(&settings.kafka, &checks, From::Beginning, PATIENCE)?;
    let worker = Running::start(&settings)?;
    let topic = settings.kafka.inputs[0].topic.clone();
    // The group has formed when the first ones are answered; they are not counted.
    write_records(&settings.kafka, &topic, requests(pictures, 0..RATE), PATIENCE)?;
    let count = RATE * SECONDS;
    let written: Arc<std::sync::Mutex<Vec<Instant>>> = Arc::default();
    let mut latencies = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let mut seen = 0;
        let mut writer = None;
        let deadline = Instant::now() + PATIENCE;
        while latencies.len() < count && Instant::now() < deadline {
            let Some(message) = follower.next(Duration::from_millis(100))? else { continue };
            let now = Instant::now();
            let key = message.key.as_deref().and_then(|key| std::str::from_utf8(key).ok()).unwrap_or_default();
            let id: usize = key.parse()?;
            if id >= RATE {
                latencies.push(now - written.lock().expect("no panic")[id - RATE]);
                continue;
            }
            seen += 1;
            if seen == RATE {
                let (written, kafka, topic) = (written.clone(), settings.kafka.clone(), topic.clone());
                writer = Some(scope.spawn(move || {
                    let begun = Instant::now();
                    let paced = requests(pictures, RATE..RATE + count).enumerate().map(|(index, record)| {
                        let due = begun + Duration::from_secs_f64(index as f64 / RATE as f64);
                        std::thread::sleep(due.saturating_duration_since(Instant::now()));
                        written.lock().expect("no panic").push(Instant::now());
                        record
                    });
                    write_records(&kafka, &topic, paced, PATIENCE).map(|_| ())
                }));
            }
        }
        writer.ok_or("the worker has not begun")?.join().expect("no panic")?;
        Ok(())
    })?;
    worker.stop()?;
    if latencies.len() < count {
        return Err(format!("{} of {count} captions came", latencies.len()).into());
    }
    Ok(latencies)
}

#[allow(clippy::print_stdout)] // what it measures is what it is for
fn say(line: &str) {
    println!("{line}");
}
