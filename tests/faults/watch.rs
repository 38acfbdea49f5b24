//! Looks at the workers and at the group while a run goes on, and keeps what must never be.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blipstream::settings::{Delivery, Kafka};
use jiff::Timestamp;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use serde_json::Value;

use crate::support::flow::peak_memory;
use crate::worker::ask;

/// Between two looks.
const EVERY: Duration = Duration::from_millis(200);
/// The longest that brokers may take to answer one look.
const ASKING: Duration = Duration::from_secs(1);
/// Breaches that are kept.
const KEPT: usize = 5;

/// A worker as the watcher knows it: by its process.
#[derive(Debug, Clone, Copy)]
pub struct Watched {
    pub process: u32,
    pub admin: SocketAddr,
}

/// What one look at a worker brought.
#[derive(Debug, Clone, Default)]
struct Look {
    /// Metrics without labels, and sums over labels.
    counters: BTreeMap<String, f64>,
    /// Of when the partitions are.
    as_of: Option<Timestamp>,
    /// Committed offset and watermark of each input partition it owns.
    partitions: BTreeMap<i32, (Option<i64>, Option<i64>)>,
}

/// What a group was seen to have.
#[derive(Debug, Clone)]
struct Group {
    at: Instant,
    /// The same by the clock that workers have, too.
    time: Timestamp,
    /// Messages of the input behind the committed offsets.
    lag: i64,
    committed: BTreeMap<i32, i64>,
}

#[derive(Default)]
struct Seen {
    watched: Vec<Watched>,
    /// The last look at each process, those that are gone included.
    looks: BTreeMap<u32, Look>,
    groups: Vec<Group>,
    peak_memory: u64,
    breaches: BTreeSet<String>,
    /// Whether offsets are committed in transactions.
    transactions: bool,
}

/// The watcher; it ends when it is dropped.
pub struct Watcher {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    workers: tokio::task::JoinHandle<()>,
    group: Option<std::thread::JoinHandle<()>>,
}

impl Watcher {
    /// Watches the workers that are named later, and a group on one topic.
    pub fn begin(kafka: &Kafka, partitions: i32) -> Self {
        let (servers, group, topic) = (&kafka.bootstrap_servers, &kafka.group_id, &kafka.inputs[0].topic);
        let seen = Seen { transactions: kafka.delivery == Delivery::ExactlyOnce, ..Seen::default() };
        let (seen, stop) = (Arc::new(Mutex::new(seen)), Arc::new(AtomicBool::new(false)));
        let workers = tokio::spawn(watch_workers(seen.clone(), topic.clone()));
        let (shared, stopped, topic) = (seen.clone(), stop.clone(), topic.clone());
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", servers).set("group.id", group).set("enable.auto.commit", "false");
        // Offsets of open transactions are not waited for: those before them count.
        config.set("isolation.level", "read_uncommitted");
        config.set("reconnect.backoff.ms", "50").set("reconnect.backoff.max.ms", "500");
        let group = std::thread::spawn(move || {
            let mut client = None;
            while !stopped.load(Ordering::Relaxed) {
                // Brokers that do not answer are part of what is watched; who is asked next is found out anew.
                let asking = client.take().unwrap_or_else(|| config.create::<BaseConsumer>().unwrap());
                if let Some(group) = look_at_group(&asking, &topic, partitions) {
                    shared.lock().unwrap().take_group(group);
                    client = Some(asking);
                }
                std::thread::sleep(EVERY);
            }
        });
        Self { seen, stop, workers, group: Some(group) }
    }

    /// Watches these from now on.
    pub fn watch(&self, workers: Vec<Watched>) {
        self.seen.lock().unwrap().watched = workers;
    }

    /// Sum of a counter over all processes that there were.
    pub fn total(&self, counter: &str) -> u64 {
        let seen = self.seen.lock().unwrap();
        seen.looks.values().filter_map(|look| look.counters.get(counter)).sum::<f64>() as u64
    }

    /// Partitions of the input that a process had when it was seen last.
    pub fn owned(&self, process: u32) -> usize {
        self.seen.lock().unwrap().looks.get(&process).map_or(0, |look| look.partitions.len())
    }

    /// When the lag was at most `lag` for the first time after `from`.
    pub fn caught_up(&self, from: Instant, lag: i64) -> Option<Instant> {
        self.seen.lock().unwrap().groups.iter().find(|group| group.at >= from && group.lag <= lag).map(|group| group.at)
    }

    /// The most lag that was seen between two moments.
    pub fn most_lag(&self, from: Instant, to: Instant) -> i64 {
        let seen = self.seen.lock().unwrap();
        seen.groups.iter().filter(|group| group.at >= from && group.at <= to).map(|group| group.lag).max().unwrap_or(0)
    }

    /// The most memory that a worker ever had, in bytes.
    pub fn peak_memory(&self) -> u64 {
        self.seen.lock().unwrap().peak_memory
    }

    /// How often the group's offsets were seen.
    pub fn looks_at_group(&self) -> usize {
        self.seen.lock().unwrap().groups.len()
    }

    /// What must never be, and was.
    pub fn breaches(&self) -> Vec<String> {
        self.seen.lock().unwrap().breaches.iter().cloned().collect()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.workers.abort();
        if let Some(group) = self.group.take() {
            let _ = group.join();
        }
    }
}

impl Seen {
    fn breach(&mut self, what: String) {
        if self.breaches.len() < KEPT {
            self.breaches.insert(what);
        }
    }

    fn take_group(&mut self, group: Group) {
        if let Some(last) = self.groups.last() {
            let back = last.committed.iter().find_map(|(partition, before)| {
                let now = group.committed.get(partition)?;
                (now < before).then(|| format!("partition {partition}: committed went back from {before} to {now}"))
            });
            if let Some(what) = back {
                self.breach(what);
            }
        }
        self.groups.push(group);
    }

    /// Offsets that a group had before a worker looked at its watermarks are no further than these, unless another worker has
    /// the partition, too, as far as it knows. Offsets of a transaction are committed with the results that they answer, and
    /// the worker learns of both afterwards.
    fn take_look(&mut self, process: u32, look: Look) {
        let before = |group: &&Group| look.as_of.is_some_and(|as_of| group.time <= as_of);
        let group_before = self.groups.iter().rev().find(before).cloned();
        for (partition, (committed, watermark)) in &look.partitions {
            let Some(watermark) = watermark else { continue };
            if committed.is_some_and(|committed| committed > *watermark) {
                self.breach(format!("partition {partition}: {committed:?} is committed, the watermark is {watermark}"));
            }
            let others = self.looks.iter().filter(|(other, look)| {
                **other != process
                    && self.watched.iter().any(|watched| watched.process == **other)
                    && look.partitions.contains_key(partition)
            });
            let group = group_before.as_ref().and_then(|group| group.committed.get(partition));
            if !self.transactions && others.count() == 0 && group.is_some_and(|group| group > watermark) {
                self.breach(format!("partition {partition}: the group has {group:?}, the watermark is {watermark}"));
            }
        }
        self.looks.insert(process, look);
    }
}

async fn watch_workers(seen: Arc<Mutex<Seen>>, topic: String) {
    loop {
        let watched = seen.lock().unwrap().watched.clone();
        for Watched { process, admin } in watched {
            let memory = peak_memory(process).unwrap_or(0);
            let looks = tokio::join!(ask(admin, "GET", "/metrics"), ask(admin, "GET", "/status"));
            let mut seen = seen.lock().unwrap();
            seen.peak_memory = seen.peak_memory.max(memory);
            if let (Some(metrics), Some(status)) = looks {
                seen.take_look(process, look(&metrics, &status, &topic));
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}

fn look(metrics: &str, status: &str, topic: &str) -> Look {
    let mut look = Look::default();
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        if let Some((name, value)) = line.rsplit_once(' ') {
            let name = name.split('{').next().unwrap_or_default().trim_start_matches("blipstream_");
            *look.counters.entry(name.to_owned()).or_default() += value.parse::<f64>().unwrap_or(0.0);
        }
    }
    let status: Value = serde_json::from_str(status).expect("/status is JSON");
    look.as_of = status["consumer"]["as_of"].as_str().and_then(|time| time.parse().ok());
    let partitions = status["consumer"]["partitions"].as_array().into_iter().flatten();
    look.partitions = partitions
        .filter(|partition| partition["topic"] == topic)
        .map(|p| (p["partition"].as_i64().unwrap() as i32, (p["committed"].as_i64(), p["watermark"].as_i64())))
        .collect();
    look
}

fn look_at_group(client: &BaseConsumer, topic: &str, partitions: i32) -> Option<Group> {
    let mut list = TopicPartitionList::new();
    list.add_partition_range(topic, 0, partitions - 1);
    let offsets = client.committed_offsets(list, ASKING).ok()?;
    let (mut lag, mut committed) = (0, BTreeMap::new());
    for element in offsets.elements() {
        let (low, high) = client.fetch_watermarks(topic, element.partition(), ASKING).ok()?;
        let offset = match element.offset() {
            Offset::Offset(offset) => {
                committed.insert(element.partition(), offset);
                offset
            }
            _ => low,
        };
        lag += high - offset;
    }
    Some(Group { at: Instant::now(), time: Timestamp::now(), lag, committed })
}
