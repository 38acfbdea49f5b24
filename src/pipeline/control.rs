//! The handle on a running flow: what it is doing, and how to steer it.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::budget::{Limit, Pool};
use crate::caption::ModelInfo;
use crate::disposition::Stage;
use crate::gate::{Gate, Reason};
use crate::metrics::{Metrics, PoolName, Standing, State};
use crate::offsets::{Ledger, Lost};
use crate::settings::{self, Flow};
use crate::stage::consume::ConsumeView;
use crate::stage::infer::DeviceStats;

use super::budget::Budget;
use super::models::Models;
use super::status::{Component, DeviceStatus, PoolStatus, QueueStatus, Readiness, Status, Totals};
use super::{Endpoint, Entrance};

/// Steers a flow and tells what it is doing. Cheap to clone.
#[derive(Clone)]
pub struct Control(Arc<Inner>);

struct Inner {
    gate: Gate,
    budget: Budget,
    has_stream: bool,
    ledger: Ledger,
    metrics: Arc<Metrics>,
    started: Instant,
    drain: CancellationToken,
    wiring: OnceLock<Wiring>,
    consumer: OnceLock<ConsumeView>,
    endpoint: OnceLock<Endpoint>,
    /// Messages that wait to be parsed.
    messages: OnceLock<Waiting>,
    /// Last reading of the devices' busy time, for the ratio since then.
    busy: Mutex<(Instant, Vec<Duration>)>,
    why_draining: Mutex<Option<String>>,
    /// Partitions that have series.
    partitions: Mutex<BTreeSet<(String, i32)>>,
}

/// Tells how much waits in a queue.
pub type Waiting = Box<dyn Fn() -> usize + Send + Sync>;

/// What the flow tells its handle once it is wired.
pub struct Wiring {
    /// The models.
    pub models: Models,
    /// The devices.
    pub devices: Vec<Arc<DeviceStats>>,
    /// Rows that wait for each stage.
    pub queues: Vec<(Stage, Waiting)>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("state", &self.state()).finish_non_exhaustive()
    }
}

/// Limits that may be changed while the worker runs (`PUT /admin/limits`); what is absent stays as it is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Messages consumed and not resolved.
    pub max_messages: Option<usize>,
    /// Bytes of those.
    pub max_message_bytes: Option<bytesize::ByteSize>,
    /// Images from the head of the response to the published caption.
    pub max_images: Option<usize>,
    /// Bytes of those.
    pub max_image_bytes: Option<bytesize::ByteSize>,
    /// Consume only while fewer messages than this are in flight; 0 lifts the limit.
    pub in_flight: Option<usize>,
    /// Images a device takes at once, on every device, as far as `model.max_state` allows.
    pub batch_size: Option<usize>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    /// A handle on a flow that is yet to be wired.
    pub fn new(flow: &Flow, metrics: Arc<Metrics>) -> Self {
        Self::with_budget(Budget::new(flow), metrics)
    }

    /// The same with this budget.
    pub fn with_budget(budget: Budget, metrics: Arc<Metrics>) -> Self {
        Self::of(budget, metrics, true)
    }

    /// A handle on a flow that consumes nothing, and only answers directly.
    pub fn without_stream(budget: Budget, metrics: Arc<Metrics>) -> Self {
        Self::of(budget, metrics, false)
    }

    fn of(budget: Budget, metrics: Arc<Metrics>, has_stream: bool) -> Self {
        Self(Arc::new(Inner {
            gate: Gate::new(),
            budget,
            has_stream,
            ledger: Ledger::new(),
            metrics,
            started: Instant::now(),
            drain: CancellationToken::new(),
            wiring: OnceLock::new(),
            consumer: OnceLock::new(),
            endpoint: OnceLock::new(),
            messages: OnceLock::new(),
            busy: Mutex::new((Instant::now(), Vec::new())),
            why_draining: Mutex::default(),
            partitions: Mutex::default(),
        }))
    }

    /// Tells the handle what it steers. Only the first call counts.
    pub fn wired(&self, wiring: Wiring) {
        let _ = self.0.wiring.set(wiring);
        self.0.metrics.set_state(self.state());
    }

    /// The gate in front of the consumer.
    pub fn gate(&self) -> &Gate {
        &self.0.gate
    }

    /// The permits.
    pub fn budget(&self) -> &Budget {
        &self.0.budget
    }

    /// The tickets.
    pub fn ledger(&self) -> &Ledger {
        &self.0.ledger
    }

    /// The metrics.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.0.metrics
    }

    /// Cancelled when the flow is to drain.
    pub fn draining(&self) -> &CancellationToken {
        &self.0.drain
    }

    /// State of the worker.
    pub fn state(&self) -> State {
        if self.0.drain.is_cancelled() {
            State::Draining
        } else if self.0.gate.reasons().contains(&Reason::Operator) {
            State::Paused
        } else if self.0.wiring.get().is_none() {
            State::Starting
        } else {
            State::Running
        }
    }

    /// Stops consumption until [`Control::resume`]; what is in flight is finished.
    pub fn pause(&self) {
        if self.0.gate.shut(Reason::Operator) {
            tracing::info!("paused by an operator");
        }
        self.0.metrics.set_state(self.state());
    }

    /// Lifts an operator's pause.
    pub fn resume(&self) {
        if self.0.gate.clear(Reason::Operator) {
            tracing::info!("resumed by an operator");
        }
        self.0.metrics.set_state(self.state());
    }

    /// Begins the drain; the first reason is kept.
    pub fn drain(&self, why: &str) {
        locked(&self.0.why_draining).get_or_insert_with(|| why.to_owned());
        self.0.drain.cancel();
        self.0.metrics.set_state(State::Draining);
    }

    /// Why the flow drains.
    pub fn why_draining(&self) -> Option<String> {
        locked(&self.0.why_draining).clone()
    }

    /// Changes limits, and tells all of them as they are now.
    ///
    /// # Errors
    /// A limit of 0, where that would stop the worker for ever; nothing is changed then.
    pub fn set_limits(&self, limits: Limits) -> Result<Limits, String> {
        for (name, zero) in [
            ("max_messages", limits.max_messages == Some(0)),
            ("max_message_bytes", limits.max_message_bytes.is_some_and(|b| b.as_u64() == 0)),
            ("max_images", limits.max_images == Some(0)),
            ("max_image_bytes", limits.max_image_bytes.is_some_and(|b| b.as_u64() == 0)),
            ("batch_size", limits.batch_size == Some(0)),
        ] {
            if zero {
                return Err(format!("{name} must be at least 1; to stop consumption, POST /admin/pause"));
            }
        }
        if limits.batch_size.is_some() && self.0.wiring.get().is_none() {
            return Err("batch_size cannot be changed yet: the model is being loaded".into());
        }
        let changed = |now: Limit, items: Option<usize>, bytes: Option<bytesize::ByteSize>| Limit {
            items: items.unwrap_or(now.items),
            bytes: bytes.map_or(now.bytes, |b| b.as_u64() as usize),
        };
        let (messages, images) = self.0.budget.limits();
        let messages = changed(messages, limits.max_messages, limits.max_message_bytes);
        let images = changed(images, limits.max_images, limits.max_image_bytes);
        self.0.budget.set_limits(messages, images);
        if let Some(in_flight) = limits.in_flight {
            self.0.gate.limit((in_flight > 0).then_some(in_flight));
        }
        if let (Some(size), Some(wiring)) = (limits.batch_size, self.0.wiring.get()) {
            wiring.devices.iter().for_each(|device| device.set_batch_size(size));
        }
        let now = Limits {
            max_messages: Some(messages.items),
            max_message_bytes: Some(bytesize::ByteSize(messages.bytes as u64)),
            max_images: Some(images.items),
            max_image_bytes: Some(bytesize::ByteSize(images.bytes as u64)),
            in_flight: Some(self.0.gate.limit_now().unwrap_or(0)),
            batch_size: self
                .0
                .wiring
                .get()
                .and_then(|w| w.devices.first())
                .map(|d| d.batch_size.load(Ordering::Relaxed)),
        };
        tracing::info!(limits = %serde_json::to_string(&now).unwrap_or_default(), "limits changed by an operator");
        Ok(now)
    }

    /// Tells the handle of the consumer, and of the messages that wait behind it. Only the first call counts.
    pub fn consuming(&self, consumer: ConsumeView, messages: Waiting) {
        let _ = self.0.consumer.set(consumer);
        let _ = self.0.messages.set(messages);
    }

    /// Begins to answer rows directly, where the flow has an entrance for them. The task ends with the flow.
    pub fn answer(
        &self,
        entrance: Option<Entrance>,
        settings: &settings::Endpoint,
    ) -> Option<tokio::task::JoinHandle<()>> {
        let part = self.0.budget.endpoint.clone()?;
        let (endpoint, task) = Endpoint::start(entrance?, part, settings.clone(), self.0.metrics.clone());
        let _ = self.0.endpoint.set(endpoint);
        Some(task)
    }

    /// A message or a row that was dropped without an answer: a bug.
    pub fn take_lost(&self) -> Option<Lost> {
        self.0.ledger.take_lost().or_else(|| self.0.endpoint.get()?.take_lost())
    }

    /// Who is answered directly, once the flow is wired and if it has a part for them.
    pub fn endpoint(&self) -> Option<&Endpoint> {
        self.0.endpoint.get()
    }

    /// What waits for each stage, in the order of the flow.
    fn queues(&self) -> impl Iterator<Item = (Stage, usize)> {
        let messages = self.0.messages.get().map(|waiting| (Stage::Parse, waiting()));
        let rows = self.0.wiring.get().into_iter().flat_map(|wiring| &wiring.queues);
        messages.into_iter().chain(rows.map(|(stage, waiting)| (*stage, waiting())))
    }

    /// Whether captions can be made: the flow is starting, or a device is sound. Devices that have ended with a drain
    /// are.
    pub fn alive(&self) -> bool {
        self.0.wiring.get().is_none_or(|w| w.devices.iter().any(|d| !d.broken.load(Ordering::Acquire)))
    }

    /// The models, once they are loaded.
    pub fn models(&self) -> Option<&Models> {
        self.0.wiring.get().map(|wiring| &wiring.models)
    }

    /// The captioner, once it is loaded.
    pub fn model(&self) -> Option<ModelInfo> {
        self.models().map(|models| models.now().caption)
    }

    /// The judge of texts beside it, once it is loaded and if there is one.
    pub fn filter(&self) -> Option<ModelInfo> {
        self.models().and_then(|models| models.now().filter)
    }

    /// The model that answers questions, once it is loaded and if there is one.
    pub fn answerer(&self) -> Option<ModelInfo> {
        self.models().and_then(|models| models.now().vqa)
    }

    /// Whether rows can be answered directly: the model is loaded, a device is sound, and nobody has said pause or drain.
    pub fn answers(&self) -> bool {
        self.0.endpoint.get().is_some() && self.alive() && self.state() == State::Running
    }

    /// Whether the worker can do its job, part by part.
    pub fn readiness(&self) -> Readiness {
        let part =
            |ready: bool, yes: String, no: &str| Component { ready, detail: if ready { yes } else { no.to_owned() } };
        let wiring = self.0.wiring.get();
        let devices = wiring.map_or(0, |w| w.devices.iter().filter(|d| d.alive.load(Ordering::Acquire)).count());
        let id = self.model().map_or_else(String::new, |model| model.id);
        let no_model = if wiring.is_some() { "no device is left" } else { "the model is being loaded" };
        let model = part(devices > 0, format!("{id} on {devices} device(s)"), no_model);
        let consumer = self.0.consumer.get().map(ConsumeView::status).unwrap_or_default();
        let brokers = consumer.brokers_up;
        let no_broker =
            consumer.last_error.as_deref().unwrap_or("no broker has answered: check kafka.bootstrap_servers");
        let broker = part(brokers > 0, format!("{brokers} connected"), no_broker);
        let partitions = consumer.partitions.len();
        let group = part(consumer.joined, format!("{partitions} partition(s)"), "the group has not settled yet");
        if !self.0.has_stream {
            return Readiness { ready: model.ready, model, broker: None, group: None };
        }
        Readiness { ready: model.ready && broker.ready && group.ready, model, broker: Some(broker), group: Some(group) }
    }

    /// The metrics as text, with the gauges as of now.
    pub fn render_metrics(&self) -> String {
        let Inner { metrics, budget, gate, .. } = &*self.0;
        for (name, pool) in budget.pools() {
            metrics.pool(name, pool.used().bytes, pool.limit().bytes);
        }
        if let Some(endpoint) = self.endpoint() {
            metrics.endpoint_in_flight(endpoint.in_flight());
        }
        let reasons = gate.reasons();
        for reason in Reason::ALL {
            metrics.backpressure(reason.as_str(), reasons.contains(reason));
        }
        let wiring = self.0.wiring.get();
        let pixels = self.model().map_or(0, |model| model.image_size.pow(2) * 3);
        for (stage, items) in self.queues() {
            metrics.queue(stage, items);
            // The bodies before `decode` are counted as they come and go.
            if stage == Stage::Batch {
                metrics.queue_bytes(stage, items * pixels);
            }
        }
        if let Some(wiring) = wiring {
            for device in &wiring.devices {
                metrics.device_up(&device.name, !device.broken.load(Ordering::Acquire));
            }
            self.busy_ratios(wiring);
        }
        self.partitions();
        metrics.set_state(self.state());
        metrics.render()
    }

    /// Brings the consumer's metrics up to date, and removes the series of partitions that are no longer ours.
    fn partitions(&self) {
        let Some(consumer) = self.0.consumer.get() else { return };
        let (metrics, status) = (&self.0.metrics, consumer.status());
        metrics.consumer_totals(&status.messages, status.tombstones, status.rebalances);
        metrics.prefetched(status.prefetched_bytes);
        metrics.paused_partitions(status.partitions.iter().filter(|p| p.paused).count());
        let mut known = locked(&self.0.partitions);
        let ours: BTreeSet<_> = status.partitions.iter().map(|p| (p.topic.clone(), p.partition)).collect();
        for (topic, partition) in known.difference(&ours) {
            metrics.partition_gone(topic, *partition);
        }
        *known = ours;
        for p in &status.partitions {
            let lag = p.lag.map(|lag| lag as i64);
            let standing = Standing { lag, committed: p.committed, incomplete: p.open as i64 };
            metrics.partition(&p.topic, p.partition, standing);
        }
    }

    fn busy_ratios(&self, wiring: &Wiring) {
        let mut last = locked(&self.0.busy);
        let now = Instant::now();
        let elapsed = now.duration_since(last.0).as_secs_f64();
        let busy: Vec<_> = wiring.devices.iter().map(|device| device.busy()).collect();
        // Two scrapes in the same instant have no time between them to be busy in.
        if elapsed > 0.01 {
            for (index, device) in wiring.devices.iter().enumerate() {
                let before = last.1.get(index).copied().unwrap_or_default();
                let ratio = (busy[index].saturating_sub(before)).as_secs_f64() / elapsed;
                self.0.metrics.device_busy(&device.name, ratio.min(1.0));
            }
            *last = (now, busy);
        }
    }

    /// Everything `/status` tells.
    pub fn status(&self) -> Status {
        let Inner { budget, gate, ledger, .. } = &*self.0;
        let wiring = self.0.wiring.get();
        let pool = |name: PoolName, pool: &Pool| {
            let (used, limit) = (pool.used(), pool.limit());
            PoolStatus {
                name: name.as_str(),
                items: used.items,
                items_limit: limit.items,
                bytes: used.bytes,
                bytes_limit: limit.bytes,
            }
        };
        let device = |stats: &Arc<DeviceStats>| DeviceStatus {
            name: stats.name.clone(),
            backend: stats.backend.clone(),
            alive: stats.alive.load(Ordering::Acquire),
            batch_size: stats.batch_size.load(Ordering::Relaxed),
            max_batch_size: stats.max_batch_size(),
            busy_s: stats.busy().as_secs_f64(),
        };
        Status {
            state: self.state().as_str(),
            draining_because: self.why_draining(),
            version: env!("CARGO_PKG_VERSION"),
            uptime_s: self.0.started.elapsed().as_secs_f64(),
            held_by: gate.reasons().into_iter().map(Reason::as_str).collect(),
            model: self.model(),
            devices: wiring.map_or_else(Vec::new, |w| w.devices.iter().map(device).collect()),
            messages_in_flight: ledger.open_tickets(),
            pools: budget.pools().into_iter().map(|(name, one)| pool(name, one)).collect(),
            queues: self.queues().map(|(stage, items)| QueueStatus { stage: stage.as_str(), items }).collect(),
            consumer: self.0.consumer.get().map(ConsumeView::status),
            totals: self.totals(),
        }
    }

    /// Counts since the start.
    pub fn totals(&self) -> Totals {
        let metrics = &self.0.metrics;
        Totals {
            consumed: self.0.consumer.get().map_or(0, |c| c.status().messages.values().sum()),
            captions: metrics.captions_so_far(),
            dead_letters: metrics.dead_letters_so_far(),
        }
    }
}
