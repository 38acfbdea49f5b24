//! Every metric of the program. Labels are enums or names from the configuration; no URL and no host is ever one.
//!
//! Seconds and bytes throughout; the prefix is `blipstream_`. `docs/metrics.md` explains them to operators.

mod answers;
mod blocked;
mod cache;
mod endpoint;
mod fetch;
mod filter;
mod labels;
mod models;
mod publish;
mod registrar;

use std::collections::BTreeMap;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    CounterVec, Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Registry, TextEncoder,
};

use self::answers::AnswerMetrics;
use self::cache::CacheMetrics;
use self::endpoint::EndpointMetrics;
use self::filter::FilterMetrics;
use self::models::ModelMetrics;
use self::publish::PublishMetrics;
use self::registrar::{Registrar, opts};
use crate::disposition::{Code, Stage};

use self::blocked::Stopwatch;

pub use blocked::Blocked;
pub use endpoint::Route;
pub use labels::{FetchCache, Flush, Phase, PoolName, ResponseClass, State};
pub use registrar::Family;

/// Latencies from half a millisecond to a minute: a decode is at the lower end, a caption on a small CPU at the upper.
const SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Batches are powers of two at best; the buckets show which were reached.
const BATCH: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Stages that can be blocked. `consume` never waits: it pauses, and says why in `backpressure_active`.
const BLOCKING: [Stage; 5] = [Stage::Parse, Stage::Fetch, Stage::Decode, Stage::Infer, Stage::Publish];

/// All metrics, registered. Every process has one.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    families: Vec<Family>,
    messages_consumed: IntCounterVec,
    messages_skipped: IntCounter,
    captions: IntCounterVec,
    failures: IntCounterVec,
    dead_lettered: IntCounterVec,
    retries: IntCounterVec,
    retry_records: IntCounterVec,
    publish: PublishMetrics,
    stage_duration: HistogramVec,
    model_phase: HistogramVec,
    end_to_end: Histogram,
    clock_skew: IntCounter,
    batch_size: HistogramVec,
    batch_flush: IntCounterVec,
    queue_items: IntGaugeVec,
    queue_bytes: IntGaugeVec,
    stage_blocked: CounterVec,
    /// What `stage_blocked` is read from, a stage each.
    stopwatches: [Stopwatch; Stage::ALL.len()],
    in_flight_bytes: IntGaugeVec,
    in_flight_bytes_limit: IntGaugeVec,
    device_busy: GaugeVec,
    device_up: IntGaugeVec,
    lag: IntGaugeVec,
    committed: IntGaugeVec,
    incomplete: IntGaugeVec,
    paused: IntGauge,
    prefetched: IntGauge,
    rebalances: IntCounter,
    backpressure: IntGaugeVec,
    fetch_responses: IntCounterVec,
    fetch_bytes: IntCounter,
    caption_cache: CacheMetrics,
    filter: FilterMetrics,
    answers: AnswerMetrics,
    endpoint: EndpointMetrics,
    models: ModelMetrics,
    fetch_shared: IntCounter,
    fetch_cache: IntCounterVec,
    fetch_put_off: IntCounter,
    fetch_hosts_left_alone: IntGauge,
    state: IntGaugeVec,
    memory: IntGauge,
    build_info: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Registers everything. Series of closed label sets start at 0, so that a rate over them is right from the
    /// first event on.
    pub fn new() -> Self {
        let mut r = Registrar::default();
        let metrics = Self {
            messages_consumed: r.counters("messages_consumed_total", &["topic"], "Messages consumed."),
            messages_skipped: r.counter("messages_skipped_total", "Messages without a value, skipped."),
            captions: r.counters("captions_total", &["device", "model"], "Images captioned."),
            failures: r.counters(
                "failures_total",
                &["stage", "code"],
                "Rows that failed, by stage and reason, counted before their dead letter is acknowledged.",
            ),
            dead_lettered: r.counters("dead_lettered_total", &["code"], "Dead letters the broker has acknowledged."),
            retries: r.counters("retries_total", &["stage", "code"], "Tries after the first."),
            retry_records: r.counters(
                "retry_records_total",
                &["code"],
                "Records of the retry topics the broker has acknowledged.",
            ),
            publish: PublishMetrics::new(&mut r),
            stage_duration: r.histograms(
                "stage_duration_seconds",
                &["stage"],
                SECONDS,
                "Time a row spends in a stage; consume: a message is held; commit: of one commit.",
            ),
            model_phase: r.histograms(
                "model_phase_seconds",
                &["device", "model", "phase"],
                SECONDS,
                "Time a batch spends in a phase of the model.",
            ),
            end_to_end: r.add(Histogram::with_opts(
                HistogramOpts::from(opts(
                    "end_to_end_seconds",
                    "From the request's timestamp to the acknowledged caption.",
                ))
                .buckets([SECONDS, &[300.0, 1800.0, 7200.0]].concat()),
            )),
            clock_skew: r.counter(
                "clock_skew_total",
                "Latencies that would have been negative: the producer's clock is ahead of this machine's.",
            ),
            batch_size: r.histograms("batch_size", &["device", "model", "phase"], BATCH, "Images in a batch."),
            batch_flush: r.counters("batch_flush_total", &["reason"], "Batches started, by why at that size."),
            queue_items: r.gauges("queue_items", &["stage"], "Rows that wait for a stage; parse: messages."),
            queue_bytes: r.gauges("queue_bytes", &["stage"], "Bytes that wait for a stage."),
            stage_blocked: r.add(CounterVec::new(
                opts(
                    "stage_blocked_seconds_total",
                    "Time a stage waited for room: in the queue behind it, in a pool, or at the brokers.",
                ),
                &["stage"],
            )),
            stopwatches: Default::default(),
            in_flight_bytes: r.gauges("in_flight_bytes", &["pool"], "Bytes of a pool in use."),
            in_flight_bytes_limit: r.gauges("in_flight_bytes_limit", &["pool"], "Bytes of a pool."),
            device_busy: r.add(GaugeVec::new(
                opts("device_busy_ratio", "Share of the time since the last scrape that a device was at work."),
                &["device"],
            )),
            device_up: r.gauges("device_up", &["device"], "1 while a device is sound, 0 once it was taken out."),
            lag: r.gauges("kafka_consumer_lag", &["topic", "partition"], "Messages behind the end of a partition."),
            committed: r.gauges("kafka_committed_offset", &["topic", "partition"], "Offset committed last."),
            incomplete: r.gauges(
                "kafka_incomplete_offsets",
                &["topic", "partition"],
                "Messages consumed and not resolved.",
            ),
            paused: r.gauge("kafka_paused_partitions", "Partitions paused by backpressure or by an operator."),
            prefetched: r.gauge("kafka_prefetched_bytes", "Bytes read ahead and not yet consumed, a second ago."),
            rebalances: r.counter("kafka_rebalances_total", "Changes of this worker's partitions."),
            backpressure: r.gauges("backpressure_active", &["reason"], "1 while consumption waits for this reason."),
            fetch_responses: r.counters("fetch_responses_total", &["class"], "Answers of image hosts."),
            fetch_bytes: r
                .counter("fetch_bytes_total", "Bytes of bodies received over HTTP, those of failed fetches included."),
            caption_cache: CacheMetrics::new(&mut r),
            filter: FilterMetrics::new(&mut r),
            answers: AnswerMetrics::new(&mut r),
            endpoint: EndpointMetrics::new(&mut r),
            models: ModelMetrics::new(&mut r),
            fetch_shared: r.counter("fetch_shared_total", "Images that came with the fetch of another row."),
            fetch_cache: r.counters("fetch_cache_total", &["result"], "Images looked for in fetch.cache."),
            fetch_put_off: r
                .counter("fetch_put_off_total", "Fetches that were not tried since their host is left alone."),
            fetch_hosts_left_alone: r.gauge(
                "fetch_hosts_left_alone",
                "Hosts that failed too often, or asked for a wait, and are left alone.",
            ),
            state: r.gauges("state", &["state"], "1 for the state the worker is in."),
            memory: r.gauge("resident_memory_bytes", "Memory of this process that is resident."),
            build_info: r.add(Gauge::with_opts(
                opts("build_info", "Always 1; the version is a label.")
                    .const_label("version", env!("CARGO_PKG_VERSION")),
            )),
            registry: r.registry,
            families: r.families,
        };
        metrics.build_info.set(1.0);
        metrics.start_at_zero();
        metrics
    }

    fn start_at_zero(&self) {
        for code in Code::ALL {
            self.dead_lettered.with_label_values(&[code.as_str()]);
        }
        for flush in Flush::ALL {
            self.batch_flush.with_label_values(&[flush.as_str()]);
        }
        for result in FetchCache::ALL {
            self.fetch_cache.with_label_values(&[result.as_str()]);
        }
        for class in ResponseClass::ALL {
            self.fetch_responses.with_label_values(&[class.as_str()]);
        }
        self.set_state(State::Starting);
    }

    /// What is registered, in the order of this file.
    pub fn families(&self) -> &[Family] {
        &self.families
    }

    /// The text exposition format.
    pub fn render(&self) -> String {
        self.memory.set(resident_bytes().unwrap_or(0) as i64);
        for stage in BLOCKING {
            let blocked = self.stage_blocked.with_label_values(&[stage.as_str()]);
            // Two renderings at a time may add the same seconds twice; the next ones then wait for the stopwatch.
            blocked.inc_by((self.blocked_so_far(stage).as_secs_f64() - blocked.get()).max(0.0));
        }
        let mut text = Vec::new();
        // Writing into memory, and every family has a name and a help: it cannot fail.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8(text).unwrap_or_default()
    }

    /// What the consumer has counted since the start: messages of each topic, tombstones, rebalances.
    pub fn consumer_totals(&self, messages: &BTreeMap<String, u64>, tombstones: u64, rebalances: u64) {
        for (topic, total) in messages {
            raise(&self.messages_consumed.with_label_values(&[topic]), *total);
        }
        raise(&self.messages_skipped, tombstones);
        raise(&self.rebalances, rebalances);
    }

    /// Captions published so far, over all devices.
    pub fn captions_so_far(&self) -> u64 {
        sum(&self.captions)
    }

    /// Dead letters published so far.
    pub fn dead_letters_so_far(&self) -> u64 {
        sum(&self.dead_lettered)
    }

    /// Batches run so far, and the images in them.
    pub fn batches_so_far(&self) -> (u64, u64) {
        let families = self.batch_size.collect();
        let encode = families.iter().flat_map(prometheus::proto::MetricFamily::get_metric);
        let encode = encode.filter(|m| m.get_label().iter().any(|l| l.value() == Phase::Encode.as_str()));
        encode.fold((0, 0), |(batches, images), m| {
            let h = m.get_histogram();
            (batches + h.get_sample_count(), images + h.get_sample_sum() as u64)
        })
    }

    /// Rows that went through a stage, and their time in it.
    pub fn stage_so_far(&self, stage: Stage) -> (u64, Duration) {
        let histogram = self.stage_duration.with_label_values(&[stage.as_str()]);
        (histogram.get_sample_count(), Duration::from_secs_f64(histogram.get_sample_sum()))
    }

    /// A caption was acknowledged.
    pub fn captioned(&self, device: &str, model: &str) {
        self.captions.with_label_values(&[device, model]).inc();
    }

    /// A row failed.
    pub fn failed(&self, stage: Stage, code: Code) {
        self.failures.with_label_values(&[stage.as_str(), code.as_str()]).inc();
    }

    /// A dead letter was acknowledged.
    pub fn dead_lettered(&self, code: Code) {
        self.dead_lettered.with_label_values(&[code.as_str()]).inc();
    }

    /// Something is tried again.
    pub fn retried(&self, stage: Stage, code: Code) {
        self.retries.with_label_values(&[stage.as_str(), code.as_str()]).inc();
    }

    /// A record of a retry topic was acknowledged.
    pub fn retried_later(&self, code: Code) {
        self.retry_records.with_label_values(&[code.as_str()]).inc();
    }

    /// A row left a stage after this time in it.
    pub fn stage(&self, stage: Stage, duration: Duration) {
        self.stage_duration.with_label_values(&[stage.as_str()]).observe(duration.as_secs_f64());
    }

    /// A stage waits for room, until this is dropped. Time in which several of its workers wait counts once.
    pub fn blocked(&self, stage: Stage) -> Blocked<'_> {
        self.stopwatches[stage as usize].start()
    }

    /// How long a stage was blocked in all.
    pub fn blocked_so_far(&self, stage: Stage) -> Duration {
        self.stopwatches[stage as usize].total()
    }

    /// A caption was acknowledged this many milliseconds after its request's timestamp; negative where clocks differ.
    pub fn end_to_end(&self, milliseconds: i64) {
        if milliseconds < 0 {
            self.clock_skew.inc();
        }
        self.end_to_end.observe(milliseconds.max(0) as f64 / 1000.0);
    }

    /// A device ran a phase on `items` images or rows.
    pub fn phase(&self, device: &str, model: &str, phase: Phase, items: usize, duration: Duration) {
        self.model_phase.with_label_values(&[device, model, phase.as_str()]).observe(duration.as_secs_f64());
        self.batch_size.with_label_values(&[device, model, phase.as_str()]).observe(items as f64);
    }

    /// A batch was started.
    pub fn flushed(&self, reason: Flush) {
        self.batch_flush.with_label_values(&[reason.as_str()]).inc();
    }

    /// Rows that wait for a stage.
    pub fn queue(&self, stage: Stage, items: usize) {
        self.queue_items.with_label_values(&[stage.as_str()]).set(items as i64);
    }

    /// Bytes that wait for a stage.
    pub fn queue_bytes(&self, stage: Stage, bytes: usize) {
        self.queue_bytes.with_label_values(&[stage.as_str()]).set(bytes as i64);
    }

    /// Bytes that wait for a stage from now on; to be followed by [`Metrics::bytes_taken`].
    pub fn bytes_queued(&self, stage: Stage, bytes: usize) {
        self.queue_bytes.with_label_values(&[stage.as_str()]).add(bytes as i64);
    }

    /// Bytes that a stage has waited for and takes.
    pub fn bytes_taken(&self, stage: Stage, bytes: usize) {
        self.queue_bytes.with_label_values(&[stage.as_str()]).sub(bytes as i64);
    }

    /// Use and limit of a pool, in bytes.
    pub fn pool(&self, pool: PoolName, used: usize, limit: usize) {
        self.in_flight_bytes.with_label_values(&[pool.as_str()]).set(used as i64);
        self.in_flight_bytes_limit.with_label_values(&[pool.as_str()]).set(limit as i64);
    }

    /// Share of the time that a device was at work.
    pub fn device_busy(&self, device: &str, ratio: f64) {
        self.device_busy.with_label_values(&[device]).set(ratio);
    }

    /// Whether a device is sound.
    pub fn device_up(&self, device: &str, up: bool) {
        self.device_up.with_label_values(&[device]).set(i64::from(up));
    }

    /// Where a partition stands.
    pub fn partition(&self, topic: &str, partition: i32, standing: Standing) {
        let labels = [topic, &partition.to_string()];
        if let Some(lag) = standing.lag {
            self.lag.with_label_values(&labels).set(lag);
        }
        if let Some(committed) = standing.committed {
            self.committed.with_label_values(&labels).set(committed);
        }
        self.incomplete.with_label_values(&labels).set(standing.incomplete);
    }

    /// A partition went to another worker: its series are removed.
    pub fn partition_gone(&self, topic: &str, partition: i32) {
        let labels = [topic, &partition.to_string()];
        for family in [&self.lag, &self.committed, &self.incomplete] {
            // An error only says that the series was never set.
            let _ = family.remove_label_values(&labels);
        }
    }

    /// Partitions paused.
    pub fn paused_partitions(&self, count: usize) {
        self.paused.set(count as i64);
    }

    /// Bytes that the consumer has read ahead.
    pub fn prefetched(&self, bytes: u64) {
        self.prefetched.set(bytes as i64);
    }

    /// Consumption is held for a reason, or no longer.
    pub fn backpressure(&self, reason: &'static str, active: bool) {
        self.backpressure.with_label_values(&[reason]).set(i64::from(active));
    }

    /// The worker is in this state.
    pub fn set_state(&self, state: State) {
        for other in State::ALL {
            self.state.with_label_values(&[other.as_str()]).set(i64::from(*other == state));
        }
    }
}

/// Where a partition stands.
#[derive(Debug, Clone, Copy, Default)]
pub struct Standing {
    /// Messages behind its end, if known.
    pub lag: Option<i64>,
    /// Offset committed last, if any.
    pub committed: Option<i64>,
    /// Messages consumed and not resolved.
    pub incomplete: i64,
}

/// Raises a counter to a total that somebody else counts.
fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

fn sum(counters: &IntCounterVec) -> u64 {
    let families = counters.collect();
    let metrics = families.iter().flat_map(prometheus::proto::MetricFamily::get_metric);
    metrics.map(|m| m.get_counter().get_value() as u64).sum()
}

/// Resident memory from `/proc/self/status`, in bytes; `None` where there is no such file.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

#[cfg(test)]
mod tests;
