//! A whole flow for tests: embedded broker or Apache Kafka, settings for haste, workers in this process or as processes of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blipstream::caption::Engine;
use blipstream::caption::fake::{FakeAnswerer, FakeEngine, FakeFilter, FakeOptions};
use blipstream::caption::preprocess::Preprocessor;
use blipstream::kafka::{EmbeddedBroker, NewRecord, group_offsets, write_records};
use blipstream::message::Message;
use blipstream::metrics::Metrics;
use blipstream::pipeline::worker::Summary;
use blipstream::pipeline::{Budget, Control, Load, Loaded, Parts, Wanted, worker};
use blipstream::settings::{Delivery, Settings};
use blipstream::stage::infer::Replacement;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::client::{PATIENCE, Topics, assert_nothing_was_trimmed, hasty, read_all};
use super::kafka;
use super::promises::slow;

/// The topics.
pub const REQUESTS: &str = "requests";
pub const CAPTIONS: &str = "captions";
pub const DEAD_LETTERS: &str = "dlq";
/// Topics of the embedded broker for tests that set `kafka.retry_topics`.
pub const RETRIES: [&str; 2] = ["retry.1", "retry.2"];

/// A broker and the settings of workers on it.
pub struct Flow {
    /// The embedded broker, unless the flow is on Apache Kafka.
    pub broker: Option<EmbeddedBroker>,
    pub settings: Settings,
}

impl Flow {
    /// The embedded broker with topics of `partitions` partitions, settings under which nothing waits for long, loopback open.
    pub fn start(partitions: i32) -> Self {
        Self::start_with(partitions, &RETRIES)
    }

    /// The same with these topics beside the three.
    pub fn start_with(partitions: i32, more: &[&str]) -> Self {
        let topics = [REQUESTS, CAPTIONS, DEAD_LETTERS];
        let all: Vec<_> = topics.iter().chain(more).map(|topic| (*topic, partitions)).collect();
        let broker = EmbeddedBroker::start(1, &all).unwrap();
        let servers = broker.bootstrap_servers().unwrap();
        let topics = topics.map(str::to_owned);
        Self { broker: Some(broker), settings: settings(servers, "fleet".into(), topics) }
    }

    /// The same on the broker of [`kafka::broker`], with topics and a group that nobody else uses; `None` where the
    /// test is to be skipped.
    pub async fn on_kafka(partitions: i32) -> Option<Self> {
        Some(Self::on(kafka::broker()?, partitions).await)
    }

    /// The same on a broker of the test's own.
    pub async fn on(servers: &str, partitions: i32) -> Self {
        let topics = kafka::new_topics(servers, [REQUESTS, CAPTIONS, DEAD_LETTERS], partitions).await;
        let group = topics[0].replace(REQUESTS, "fleet");
        Self { broker: None, settings: settings(servers.to_owned(), group, topics) }
    }

    /// The embedded broker.
    pub fn embedded(&self) -> &EmbeddedBroker {
        self.broker.as_ref().expect("a flow on the embedded broker")
    }

    /// The topic that requests are read from.
    pub fn requests(&self) -> &str {
        &self.settings.kafka.inputs[0].topic
    }

    pub fn write(&self, records: impl IntoIterator<Item = NewRecord>) {
        self.write_to(self.requests(), records);
    }

    pub fn write_to(&self, topic: &str, records: impl IntoIterator<Item = NewRecord>) {
        write_records(&self.settings.kafka, topic, records, PATIENCE).unwrap();
    }

    /// Every record of a topic that is there now.
    pub fn read(&self, topic: &str) -> Vec<Message> {
        let messages = read_all(&self.settings.kafka, topic);
        if self.broker.is_some() {
            assert_nothing_was_trimmed(topic, &messages);
        }
        messages
    }

    /// Counts the records of topics as they are written.
    pub fn counter(&self) -> Counter {
        let consumer = rdkafka::ClientConfig::new()
            .set("bootstrap.servers", &self.settings.kafka.bootstrap_servers)
            .create()
            .unwrap();
        Counter { consumer }
    }

    /// Waits until as many answers are written, duplicates included: soon after they are, where a test has to be quicker than
    /// its worker.
    pub fn until_written(&self, answers: usize) {
        let (deadline, counter) = (Instant::now() + PATIENCE, self.counter());
        let topics = [&self.settings.kafka.captions_topic, &self.settings.kafka.dead_letter_topic];
        while topics.map(|topic| counter.records(topic)).iter().sum::<usize>() < answers {
            assert!(Instant::now() < deadline, "no {answers} answers in time");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn committed(&self) -> Vec<Option<i64>> {
        group_offsets(&self.settings.kafka, self.requests(), PATIENCE).unwrap()
    }

    /// Waits until as many answers are there, duplicates included.
    pub fn until_answered(&self, answers: usize) -> Answers {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = Answers::read(self);
            if found.count() >= answers {
                return found;
            }
            assert!(Instant::now() < deadline, "{} of {answers} answers in time", found.count());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A worker in this process, on a fake engine.
    pub fn worker(&self, options: FakeOptions) -> Worker {
        self.worker_on(vec![options])
    }

    /// A worker in this process, with a device for each of `engines`.
    pub fn worker_on(&self, engines: Vec<FakeOptions>) -> Worker {
        let endpoint = &self.settings.endpoint;
        let budget = Budget::new(&self.settings.flow);
        let budget = if endpoint.listen.is_some() { budget.with_endpoint(endpoint.share) } else { budget };
        let control = Control::with_budget(budget, Arc::new(Metrics::new()));
        let size = engines.first().map_or(8, |options| options.image_size);
        let loaded = |(replica, options)| Loaded {
            engine: Box::new(FakeEngine::new(options)),
            filter: self.settings.filter.source.as_ref().map(|_| Box::new(FakeFilter::default()) as _),
            answerer: self.settings.answerer.source.as_ref().map(|_| Box::new(FakeAnswerer::default()) as _),
            canary: self.settings.canary.source.as_ref().map(|id| canary(id)),
            batch_size: 8,
            replica: Some(replica),
        };
        let count = engines.len();
        let parts = Parts {
            engines: engines.into_iter().enumerate().map(loaded).collect(),
            preprocessor: Preprocessor::blip(size),
            flag_terms: Vec::new(),
            worker: "test".into(),
            load: Some(Arc::new(FakeLoad { devices: count })),
        };
        let (settings, handle) = (self.settings.clone(), control.clone());
        let task = tokio::spawn(async move { worker::run(&settings, parts, &handle).await });
        Worker { control, task }
    }

    /// The same flow under another promise of delivery.
    pub fn delivering(mut self, delivery: Delivery) -> Self {
        self.settings.kafka.delivery = delivery;
        self.settings.kafka.transaction_interval = Duration::from_millis(100);
        self
    }

    /// `blipstream worker` with the configured models, the demo model unless a test has others, as a process of its own.
    pub fn process(&self) -> Process {
        self.process_with(&[])
    }

    /// The same with more in its environment.
    pub fn process_with(&self, environment: &[(&str, &str)]) -> Process {
        let toml = toml::to_string(&self.settings).unwrap();
        let file = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
        std::fs::write(file.path(), toml).unwrap();
        let log = tempfile::NamedTempFile::new().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_blipstream"))
            .args(["worker", "--set", "batch.max_size=4", "--set", "admin.listen=127.0.0.1:0"])
            .arg("--config")
            .arg(file.path())
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stderr(log.reopen().unwrap())
            .spawn()
            .unwrap();
        Process { child, log, _config: file }
    }
}

/// A captioner on trial that is called like this: `other` writes other captions, `broken` none at all, `brief` takes no
/// prompt of more than two words, and `large` takes larger images.
fn canary(id: &str) -> Box<dyn Engine> {
    let options = FakeOptions { id: id.into(), ..FakeOptions::default() };
    Box::new(FakeEngine::new(match id {
        "other" => FakeOptions { article: "the", ..options },
        "broken" => FakeOptions { memory_for: 0, ..options },
        "brief" => FakeOptions { max_prompt_words: 2, ..options },
        "large" => FakeOptions { image_size: 16, ..options },
        _ => options,
    }))
}

/// Makes the model that is asked for by its name: `broken` cannot be loaded, `slow` takes half a second, `large` takes larger
/// images.
struct FakeLoad {
    devices: usize,
}

impl Load for FakeLoad {
    fn load(&self, wanted: &Wanted, devices: &[usize]) -> anyhow::Result<Vec<Replacement>> {
        assert!(devices.iter().all(|at| *at < self.devices));
        let names = [&wanted.caption, &wanted.filter];
        let named = |name: &str| names.iter().any(|one| one.as_deref() == Some(name));
        anyhow::ensure!(!named("broken"), "caption: cannot load broken: model.safetensors is missing");
        if named("slow") {
            std::thread::sleep(Duration::from_millis(500));
        }
        let replacement = |_| Replacement {
            engine: wanted.caption.as_ref().map(|id| {
                let image_size = if id == "large" { 16 } else { 8 };
                let options = FakeOptions { id: id.clone(), image_size, ..slow() };
                Box::new(FakeEngine::new(options)) as _
            }),
            filter: wanted.filter.as_ref().map(|id| Box::new(FakeFilter::called(id)) as _),
            canary: wanted.canary.as_ref().map(|id| canary(id)),
            answerer: wanted.vqa.as_ref().map(|id| Box::new(FakeAnswerer::called(id)) as _),
        };
        Ok(devices.iter().map(replacement).collect())
    }
}

/// Knows how many records were written to a topic, without reading them.
pub struct Counter {
    consumer: BaseConsumer,
}

impl Counter {
    /// Records in all partitions of a topic, those of other attempts included.
    pub fn records(&self, topic: &str) -> usize {
        let metadata = self.consumer.fetch_metadata(Some(topic), PATIENCE).unwrap();
        let partitions = metadata.topics()[0].partitions().iter();
        let end = |partition: i32| self.consumer.fetch_watermarks(topic, partition, PATIENCE).unwrap().1;
        partitions.map(|partition| end(partition.id())).sum::<i64>() as usize
    }
}

/// Settings under which nothing waits for long, loopback open; `topics` are those of requests, captions and dead letters.
pub fn settings(servers: String, group: String, topics: Topics) -> Settings {
    let mut settings = Settings { kafka: hasty(servers, group, topics), ..Settings::default() };
    settings.fetch.allow_networks = vec!["127.0.0.0/8".parse().unwrap()];
    settings.fetch.backoff = Duration::from_millis(1);
    settings.fetch.max_backoff = Duration::from_millis(5);
    settings.flow.drain_timeout = Duration::from_secs(30);
    settings.model.source = "demo".into();
    // Tests write the same few pictures again and again, and each is to reach a device.
    settings.model.caption_cache = bytesize::ByteSize::b(0);
    settings
}

/// A worker in this process.
pub struct Worker {
    pub control: Control,
    pub task: JoinHandle<anyhow::Result<Summary>>,
}

impl Worker {
    /// Drains it.
    pub async fn stop(self) -> Summary {
        self.control.drain("the test is over");
        tokio::time::timeout(PATIENCE, self.task).await.expect("an end in time").unwrap().unwrap()
    }
}

/// A worker as a process; killed when dropped.
pub struct Process {
    child: Child,
    log: tempfile::NamedTempFile,
    _config: tempfile::NamedTempFile,
}

impl Process {
    /// What it has logged, a JSON object a line.
    pub fn log(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.log.path()).unwrap();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Where its admin port listens, once it does.
    pub fn admin(&self) -> Option<SocketAddr> {
        self.log().iter().find_map(|line| line["address"].as_str()?.parse().ok())
    }

    /// The most memory that was ever resident, in bytes.
    pub fn peak_memory(&self) -> u64 {
        peak_memory(self.child.id()).unwrap()
    }

    /// What is resident now, in bytes.
    pub fn memory(&self) -> u64 {
        memory(self.child.id(), "VmRSS:").unwrap()
    }

    /// Sets the most memory to what is resident now (proc(5), `clear_refs`).
    pub fn forget_peak_memory(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").unwrap();
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; returns the exit code.
    pub fn terminate(self) -> Option<i32> {
        self.signal("TERM");
        self.end()
    }

    /// Sends a signal.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits for its end; returns the exit code.
    pub fn end(mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the worker does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    #[allow(clippy::print_stderr)] // a failed test shows the log
    fn drop(&mut self) {
        // It has ended already, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.log.path()).unwrap_or_default());
        }
    }
}

/// The most memory of a process that was ever resident, in bytes; `None` when it is gone.
pub fn peak_memory(process: u32) -> Option<u64> {
    memory(process, "VmHWM:")
}

fn memory(process: u32, kind: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(kind))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// What came out, by origin (`topic/partition/offset`, with `/index` for a row of several).
pub struct Answers {
    pub captions: BTreeMap<String, Vec<Value>>,
    /// Where the flow has a topic for them.
    pub filtered: BTreeMap<String, Vec<Value>>,
    pub dead_letters: BTreeMap<String, Vec<Message>>,
}

impl Answers {
    pub fn read(flow: &Flow) -> Self {
        let records = |topic: &str| {
            let mut records: BTreeMap<String, Vec<Value>> = BTreeMap::new();
            for message in flow.read(topic) {
                let record: Value = serde_json::from_slice(message.payload.as_ref().unwrap()).unwrap();
                let origin = message.header("blipstream-origin").unwrap().to_owned();
                records.entry(origin).or_default().push(record);
            }
            records
        };
        let kafka = &flow.settings.kafka;
        let filtered = kafka.filtered_topic.as_deref().map(records).unwrap_or_default();
        let mut answers = Self { captions: records(&kafka.captions_topic), filtered, dead_letters: BTreeMap::new() };
        for message in flow.read(&flow.settings.kafka.dead_letter_topic) {
            let origin = message.header("blipstream-origin").unwrap().to_owned();
            answers.dead_letters.entry(origin).or_default().push(message);
        }
        answers
    }

    /// Records in all.
    pub fn count(&self) -> usize {
        let records = self.captions.values().chain(self.filtered.values()).map(Vec::len).sum::<usize>();
        records + self.dead_letters.values().map(Vec::len).sum::<usize>()
    }

    /// Every origin that has an answer.
    pub fn origins(&self) -> BTreeSet<&str> {
        self.captions.keys().chain(self.dead_letters.keys()).map(String::as_str).collect()
    }

    /// The ids that were captioned.
    pub fn captioned_ids(&self) -> BTreeSet<&str> {
        self.captions.values().flatten().map(|record| record["id"].as_str().unwrap()).collect()
    }
}

/// A native request.
pub fn request(id: impl ToString, image: impl ToString) -> NewRecord {
    let id = id.to_string();
    let value = json!({"id": id, "image": image.to_string()}).to_string();
    NewRecord { key: Some(id.into_bytes()), value: Some(value.into_bytes()), headers: Vec::new() }
}

/// A request as JSON, without a key.
pub fn asking(value: &Value) -> NewRecord {
    NewRecord { value: Some(value.to_string().into_bytes()), ..request("", "") }
}
