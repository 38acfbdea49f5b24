//! One run: a fresh set of topics, three workers, a load that goes on whatever happens, one fault, and the account.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blipstream::kafka::{group_offsets, producer_queue_bytes};
use blipstream::settings::{Delivery, RetryTopic, Settings};
use bytesize::ByteSize;
use serde_json::Value;

use crate::load::{self, Load};
use crate::rows::{Evidence, Row, strike};
use crate::site::{SLOTS, Site};
use crate::support::flow::settings;
use crate::support::images::ImageServer;
use crate::support::kafka::new_topics;
use crate::tally::{Reader, Tally};
use crate::watch::{Watched, Watcher};
use crate::worker::{Worker, ask};

/// Partitions of every topic.
pub const PARTITIONS: i32 = 6;
/// Workers that a run begins with; the last slot is free.
pub const WORKERS: usize = 3;
/// After this time without a word the group gives a worker's partitions to others.
pub const SESSION: Duration = Duration::from_secs(6);
/// The brokers abort transactions that take longer.
pub const TRANSACTION: Duration = Duration::from_secs(5);
/// `kafka.max_poll_interval` of every run.
pub const MAX_POLL: Duration = Duration::from_secs(8);
/// Offsets of a partition under way: what a crash may repeat of each.
const MAX_SPAN: u64 = 500;
/// Lag must be gone this long after the healing, and every id answered this long after the end of the load.
const RECOVERY: Duration = Duration::from_secs(60);
/// Lag of this much of the load is none: offsets are committed in intervals.
const SETTLED: Duration = Duration::from_secs(2);
/// What a process takes beside what its settings allow: code, threads, clients.
const PROCESS: u64 = 64 << 20;
/// The load goes on for so long after the healing, and is at most so many times what was asked for.
const AFTER: Duration = Duration::from_secs(3);
const MOST: usize = 4;
/// Longest wait for anything that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// What came of a run.
pub struct Outcome {
    pub ids: usize,
    pub lost: usize,
    pub duplicates: usize,
    /// From the healing until the lag was gone.
    pub recovery: Option<Duration>,
    /// The most memory of a worker, in bytes.
    pub memory: u64,
    pub evidence: Evidence,
    /// What broke a promise; empty is a pass.
    pub problems: Vec<String>,
}

/// A run under way.
pub struct Run<'a> {
    pub site: &'a Site,
    pub settings: Settings,
    pub random: fastrand::Rng,
    folder: PathBuf,
    workers: [Option<Worker>; SLOTS],
    started: usize,
    load: Option<Load>,
    rate: f64,
    reader: Reader,
    watcher: Watcher,
    images: ImageServer,
    /// First strike, and what the counters were then.
    struck: Option<(Instant, Evidence)>,
    in_flight: u64,
    /// Times that a partition may have changed hands without a last commit.
    torn: u64,
    problems: Vec<String>,
}

/// Runs a row, in `folder`, with at least `ids` requests.
pub async fn run(site: &Site, row: &Row, mode: Delivery, seed: u64, ids: usize, folder: &Path) -> Outcome {
    let mut run = Run::begin(site, row, mode, seed, ids, folder).await;
    strike(&mut run, row.fault).await;
    let healed = Instant::now();
    tokio::time::sleep(AFTER).await;
    if run.load.as_ref().is_some_and(Load::is_over) {
        run.problems.push("the load was over before the fault was".into());
    }
    let outcome = run.account(row, healed).await;
    site.mend();
    outcome
}

impl<'a> Run<'a> {
    async fn begin(site: &'a Site, row: &Row, mode: Delivery, seed: u64, ids: usize, folder: &Path) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let names = ["requests", "captions", "dlq", "retry.1", "retry.2"];
        let topics = new_topics(site.cluster.bootstrap(), names, PARTITIONS).await;
        let group = topics[0].replace("requests", "fleet");
        let [requests, captions, letters, first, second] = topics;
        let mut settings =
            settings(site.cluster.bootstrap().to_owned(), group.clone(), [requests.clone(), captions, letters]);
        configure(&mut settings, mode);
        settings.kafka.retry_topics =
            [(first, 1), (second, 2)].map(|(topic, s)| RetryTopic { topic, delay: Duration::from_secs(s) }).into();
        let most = ids * MOST;
        let images = load::images(most).await;
        let mut run = Self {
            site,
            folder: folder.to_owned(),
            workers: Default::default(),
            started: 0,
            load: None,
            rate: ids as f64 / row.load.as_secs_f64(),
            reader: Reader::begin(&settings.kafka),
            watcher: Watcher::begin(&settings.kafka, PARTITIONS),
            images,
            struck: None,
            in_flight: 0,
            torn: 0,
            problems: Vec::new(),
            random: fastrand::Rng::with_seed(random.u64(..)),
            settings,
        };
        if row.own_ids {
            run.settings.kafka.transactional_id = Some(group);
        }
        for slot in 0..WORKERS {
            run.start(slot);
        }
        run.until("every partition has a worker", |run| run.owned() == PARTITIONS as usize).await;
        run.load = Some(Load::begin(site.cluster.bootstrap(), &requests, &run.images, ids, row.load, most));
        run.until("results come", |run| run.reader.answered() >= ids / 20).await;
        run
    }

    async fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds(self) {
            if Instant::now() > deadline {
                self.problems.push(format!("not in time: {what}"));
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    // --- what a fault does

    /// `kafka.transactional_id` of the worker in a slot, where the row sets them.
    pub fn transactional_id(&self, slot: usize) -> Option<String> {
        self.settings.kafka.transactional_id.as_ref().map(|id| format!("{id}-{slot}"))
    }

    /// Starts a worker in a slot.
    pub fn start(&mut self, slot: usize) {
        let mut settings = self.settings.clone();
        self.site.servers(slot).clone_into(&mut settings.kafka.bootstrap_servers);
        settings.kafka.transactional_id = self.transactional_id(slot);
        self.started += 1;
        let name = format!("worker-{}-in-slot-{slot}", self.started);
        self.workers[slot] = Some(Worker::start(&settings, &self.folder, &name));
        self.watch();
    }

    fn watch(&self) {
        let running = self.workers.iter().flatten();
        self.watcher.watch(running.map(|w| Watched { process: w.id(), admin: w.admin() }).collect());
    }

    fn owned(&self) -> usize {
        self.workers.iter().flatten().map(|worker| self.watcher.owned(worker.id())).sum()
    }

    /// Slots with a worker, in an order of chance.
    pub fn running(&mut self) -> Vec<usize> {
        let mut running: Vec<_> = (0..SLOTS).filter(|slot| self.workers[*slot].is_some()).collect();
        self.random.shuffle(&mut running);
        running
    }

    /// Waits for a moment at which workers of these slots have messages in flight; the fault is to come at once.
    pub async fn aim(&mut self, slots: &[usize]) {
        self.until_in_flight(async |run| {
            let mut in_flight = 0;
            for slot in slots {
                in_flight += run.in_flight_in(*slot).await;
            }
            (in_flight > 0).then_some(((), in_flight))
        })
        .await;
    }

    /// Waits until some worker has at least two messages in flight, and names its slot. Some worker, since one may have
    /// drawn partitions of retry topics only, which are nearly empty. Two messages, since one that is alone in its worker,
    /// where workers died before, is taken for the cause of the next death, by whatever it came, and quarantined.
    pub async fn pick(&mut self) -> Option<usize> {
        let slots = self.running();
        self.until_in_flight(async |run| {
            for &slot in &slots {
                let in_flight = run.in_flight_in(slot).await;
                if in_flight >= 2 {
                    return Some((slot, in_flight));
                }
            }
            None
        })
        .await
    }

    /// Looks until something is found, which comes with the messages in flight.
    async fn until_in_flight<T>(&mut self, mut look: impl AsyncFnMut(&mut Self) -> Option<(T, u64)>) -> Option<T> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some((found, in_flight)) = look(self).await {
                self.in_flight = if self.struck.is_some() { self.in_flight.min(in_flight) } else { in_flight };
                if self.struck.is_none() {
                    self.struck = Some((Instant::now(), self.counters()));
                }
                return Some(found);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.problems.push("too little was in flight at the fault".into());
        None
    }

    async fn in_flight_in(&self, slot: usize) -> u64 {
        let Some(worker) = &self.workers[slot] else { return 0 };
        let status = ask(worker.admin(), "GET", "/status").await.unwrap_or_default();
        let status: Value = serde_json::from_str(&status).unwrap_or_default();
        status["messages_in_flight"].as_u64().unwrap_or(0)
    }

    /// SIGKILL.
    pub fn kill(&mut self, slot: usize) {
        self.torn += 1;
        drop(self.workers[slot].take());
        self.watch();
    }

    /// SIGTERM; the worker must end well.
    pub async fn terminate(&mut self, slot: usize) {
        self.look_for_the_dead();
        let Some(worker) = self.workers[slot].take() else { return };
        self.watch();
        worker.signal("TERM");
        match worker.end().await {
            Some(0) => {}
            Some(code) => self.problems.push(format!("a worker ended with exit code {code} after SIGTERM")),
            None => self.problems.push("a worker did not end after SIGTERM".into()),
        }
    }

    /// SIGSTOP for so long.
    pub async fn suspend(&mut self, slot: usize, time: Duration) {
        self.torn += 1;
        let Some(worker) = &self.workers[slot] else { return };
        worker.signal("STOP");
        tokio::time::sleep(time).await;
        worker.signal("CONT");
    }

    /// Posts to the admin port of every worker.
    pub async fn post(&mut self, path: &str) {
        for worker in self.workers.iter().flatten() {
            if ask(worker.admin(), "POST", path).await.is_none() {
                self.problems.push(format!("a worker does not answer to POST {path}"));
            }
        }
    }

    /// Says that partitions may change hands without a last commit.
    pub fn may_tear(&mut self) {
        self.torn += 1;
    }

    // --- the account

    fn counters(&self) -> Evidence {
        let total = |name| self.watcher.total(name);
        Evidence {
            in_flight: self.in_flight,
            rebalances: total("kafka_rebalances_total"),
            aborts: total("transaction_aborts_total"),
            fences: total("transaction_fences_total"),
            refusals: total("publish_refusals_total"),
            touched: self.site.links.iter().map(crate::proxy::Link::touched).sum(),
            ..Evidence::default()
        }
    }

    async fn account(mut self, row: &Row, healed: Instant) -> Outcome {
        let (ids, acknowledged) = tokio::task::block_in_place(|| self.load.take().map_or((0, 0), Load::end));
        if acknowledged != ids {
            self.problems.push(format!("{acknowledged} of {ids} requests were written"));
        }
        let last = Instant::now() + RECOVERY;
        let lag = (self.rate * SETTLED.as_secs_f64()) as i64;
        let caught_up = || self.watcher.caught_up(healed, lag);
        while (self.reader.answered() < ids || caught_up().is_none()) && Instant::now() < last {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let recovery = caught_up().map(|at| at - healed);
        if recovery.is_none_or(|recovery| recovery > RECOVERY) {
            self.problems.push(format!("the lag was not gone {RECOVERY:?} after the healing"));
        }
        let evidence = self.evidence(healed);
        if !(row.felt)(&evidence) {
            self.problems.push("the fault was not felt".into());
        }
        self.look_for_the_dead();
        for slot in self.running() {
            self.terminate(slot).await;
        }
        let tally = Tally::read(&self.settings.kafka);
        self.problems.extend(tally.complaints(ids));
        self.problems.extend(tally.whereabouts(&self.settings.kafka, ids));
        self.judge_duplicates(row, &tally);
        self.judge_offsets(tally.requests);
        let memory = self.watcher.peak_memory();
        let budget = budget(&self.settings);
        if memory == 0 || memory > budget {
            self.problems.push(format!("a worker took {memory} bytes, its budget is {budget}"));
        }
        self.problems.extend(self.watcher.breaches());
        if self.watcher.looks_at_group() < 10 {
            self.problems.push("the group was hardly looked at".into());
        }
        let kafka = &self.settings.kafka;
        let retries = kafka.retry_topics.iter().map(|retry| retry.topic.as_str());
        let topics: Vec<_> = [&kafka.inputs[0].topic, &kafka.captions_topic, &kafka.dead_letter_topic]
            .map(String::as_str)
            .into_iter()
            .chain(retries)
            .collect();
        // Who still reads would be told that they are gone.
        drop((self.reader, self.watcher));
        self.site.remove_topics(&topics).await;
        let (lost, duplicates) = (tally.lost(ids), tally.duplicates());
        Outcome { ids, lost, duplicates, recovery, memory, evidence, problems: self.problems }
    }

    /// Workers that have ended without being told to.
    fn look_for_the_dead(&mut self) {
        for slot in 0..SLOTS {
            if let Some(code) = self.workers[slot].as_mut().and_then(Worker::ended) {
                self.problems.push(format!("the worker in slot {slot} ended by itself, with exit code {code}"));
                self.workers[slot] = None;
            }
        }
    }

    fn evidence(&self, healed: Instant) -> Evidence {
        let now = self.counters();
        let Some((struck, before)) = &self.struck else { return Evidence::default() };
        Evidence {
            in_flight: self.in_flight,
            rebalances: now.rebalances - before.rebalances,
            aborts: now.aborts - before.aborts,
            fences: now.fences - before.fences,
            refusals: now.refusals - before.refusals,
            touched: now.touched - before.touched,
            stall: self.reader.longest_gap(*struck, healed, false),
            caption_stall: self.reader.longest_gap(*struck, healed, true),
            lag: self.watcher.most_lag(*struck, healed) as f64 / self.rate,
        }
    }

    fn judge_duplicates(&mut self, row: &Row, tally: &Tally) {
        let duplicates = tally.duplicates() as u64;
        let most = match self.settings.kafka.delivery {
            Delivery::AtLeastOnce if !row.orderly => self.torn * PARTITIONS as u64 * MAX_SPAN,
            _ => 0,
        };
        if duplicates > most {
            self.problems.push(format!("{duplicates} duplicates, {most} at most are promised"));
        }
    }

    /// Everything is committed in the end, and nothing beyond.
    fn judge_offsets(&mut self, requests: usize) {
        let committed = group_offsets(&self.settings.kafka, &self.settings.kafka.inputs[0].topic, PATIENCE).unwrap();
        let sum: i64 = committed.into_iter().flatten().sum();
        if sum != requests as i64 {
            self.problems.push(format!("{sum} of {requests} offsets are committed in the end"));
        }
    }
}

/// Settings of every run beside its topics.
fn configure(settings: &mut Settings, mode: Delivery) {
    let kafka = &mut settings.kafka;
    kafka.delivery = mode;
    kafka.session_timeout = SESSION;
    kafka.max_poll_interval = MAX_POLL;
    kafka.transaction_timeout = TRANSACTION;
    kafka.commit_interval = Duration::from_millis(500);
    kafka.prefetch = ByteSize::mib(4);
    // An answer that does not come is given up, and asked for on another connection.
    kafka.options.insert("socket.timeout.ms".into(), "5000".into());
    // Brokers on a small machine have better things to do than to say that nothing is new.
    kafka.options.insert("fetch.wait.max.ms".into(), "200".into());
    kafka.linger = Duration::from_millis(20);
    // What librdkafka forgets to fetch is sought anew within the time that a run has to recover.
    kafka.stuck_after = Duration::from_secs(10);
    settings.fetch.attempts = 1;
    // Most requests to the images' one host fail. Were it left alone for that, some flaky images would be asked for at their
    // last chance only, and those fail when they are asked for first.
    settings.fetch.breaker_failures = 0;
    settings.flow.max_span = MAX_SPAN;
    settings.flow.max_message_bytes = ByteSize::mib(8);
    settings.flow.max_image_bytes = ByteSize::mib(32);
    settings.admin.listen = "127.0.0.1:0".parse().unwrap();
}

/// The most memory that a worker with these settings may take, in bytes.
fn budget(settings: &Settings) -> u64 {
    let pools = settings.flow.max_message_bytes.as_u64() + settings.flow.max_image_bytes.as_u64();
    pools + settings.kafka.prefetch.as_u64() + producer_queue_bytes(&settings.kafka) as u64 + PROCESS
}
