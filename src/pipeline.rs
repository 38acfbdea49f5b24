//! The flow: the only module that knows the order of the stages.
//!
//! [`Core`] is the middle of it, from rows to captions, and needs no Kafka: `blipstream caption` runs on it, so that its
//! captions are the pipeline's. [`worker`] puts Kafka at both ends, and [`Endpoint`] lets rows in that are answered directly;
//! both ways in meet at the queue for the devices.

mod budget;
mod control;
pub mod endpoint;
mod models;
pub mod server;
mod status;
pub mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_channel::{Receiver, Sender, bounded};
use tokio::task::JoinHandle;

use crate::caption::preprocess::Preprocessor;
use crate::disposition::Stage;
use crate::message::Row;
use crate::metrics::Flush;
use crate::settings::Settings;
use crate::stage::batch::{Guests, Queue, Take};
use crate::stage::infer::{Device, DeviceFailure, DeviceStats, Mailbox, Queued, Trials};
use crate::stage::{Answers, Beside, Finished, Ready, decode, fetch, infer};
use crate::tracked::Tracked;

pub use crate::stage::infer::Loaded;
pub use budget::{Budget, Part, shares};
pub use control::{Control, Limits, Waiting, Wiring};
pub use endpoint::Endpoint;
pub use models::{Load, Models, Named, Refused, Wanted};
pub use status::{Component, DeviceStatus, PoolStatus, QueueStatus, Readiness, Status, Totals};

/// Rows between two stages that are neither waiting in a stage nor in a device: enough to hide a hand-over, few enough
/// that the budget, not the channel, decides what is in flight.
const HANDOVER: usize = 32;

/// What the flow is made of.
pub struct Parts {
    /// The devices, at least one; all with the same models.
    pub engines: Vec<Loaded>,
    /// The model's preprocessing.
    pub preprocessor: Preprocessor,
    /// Terms that set `flags` on a record.
    pub flag_terms: Vec<String>,
    /// Name of this worker in records.
    pub worker: String,
    /// What loads other models while the flow runs; without it they are fixed.
    pub load: Option<Arc<dyn Load>>,
}

/// The running middle of the flow: rows in, captions and failures out.
pub struct Core {
    /// Where rows go in. Dropping it drains the core: every stage finishes what it has and drops its senders.
    pub rows: Sender<Tracked<Row>>,
    /// Where captions and failures come out; closes when everything that went in has come out.
    pub finished: Receiver<Finished>,
    /// For failures of stages before the core.
    pub failures: Sender<Finished>,
    /// Devices that broke; closes when all device threads have ended.
    pub device_failures: Receiver<DeviceFailure>,
    /// The fetch stage; ends when all rows are fetched, and says so if it panicked.
    pub fetching: JoinHandle<()>,
    /// The way in for rows that are answered directly, where the budget has a part for them.
    pub endpoint: Option<Entrance>,
}

/// A second way to the devices, with a budget of its own.
pub struct Entrance {
    /// Where rows go in. The devices end when this and [`Core::rows`] are dropped.
    pub rows: Sender<Tracked<Row>>,
    /// Where captions and failures come out; closes when everything that went in has come out.
    pub finished: Receiver<Finished>,
    /// The fetch stage; ends when all rows are fetched, and says so if it panicked.
    pub fetching: JoinHandle<()>,
}

impl Core {
    /// Wires the stages, from the last one back, so that each holds only what lies downstream.
    ///
    /// # Errors
    /// A thread or an HTTP client could not be made.
    pub fn start(settings: &Settings, parts: Parts, control: &Control) -> anyhow::Result<Self> {
        let model = parts.engines.first().map(|e| e.engine.model().clone());
        let model = model.ok_or_else(|| anyhow::anyhow!("a flow needs at least one engine"))?;
        let first = parts.engines.first();
        let filter = first.and_then(|one| one.filter.as_ref()).map(|filter| filter.model().clone());
        let answerer = first.and_then(|one| one.answerer.as_ref()).map(|answerer| answerer.model().clone());
        let canary = first.and_then(|one| one.canary.as_ref()).map(|canary| canary.model().clone());
        let pixel_bytes = model.image_size * model.image_size * 3;
        let metrics = control.metrics().clone();
        let lanes = Lanes::new(settings);

        // infer → publish
        let (finished_in, finished) = bounded(settings.flow.max_images.max(HANDOVER));
        let endpoint = control.budget().endpoint.clone();
        let (answered_in, answered) = bounded(settings.endpoint.max_in_flight.max(HANDOVER));
        let room = room(settings.batch.queue, &parts.engines);
        let due = |queued: &Queued| queued.due;
        let queue = match &endpoint {
            Some(part) => Queue::with_guests(room, &lanes.weights, Guests { share: part.share, room }, due),
            None => Queue::new(room, &lanes.weights, due),
        };
        let beside = Beside {
            filter: parts.engines.iter().all(|loaded| loaded.filter.is_some()),
            answerer: parts.engines.iter().all(|loaded| loaded.answerer.is_some()),
        };
        let answers = Answers::new(settings, beside, parts.worker, parts.flag_terms, metrics.clone());
        let answers = Arc::new(answers);
        let mut ends = vec![finished_in.clone(); lanes.weights.len()];
        ends.push(answered_in.clone());
        let shared = Arc::new(infer::Shared {
            supply: Box::new(queue.clone()),
            finished: ends,
            metrics: metrics.clone(),
            model: settings.model.clone(),
            linger: settings.batch.linger,
            answers: answers.clone(),
            trials: Trials { share: settings.canary.share, lanes: lanes.weights.len() },
        });
        let (failures_in, device_failures) = bounded(parts.engines.len());
        let devices = start_devices(parts.engines, &shared, &queue, failures_in)?;

        // fetch → decode → batch
        let config = decode::Config::new(parts.preprocessor, &settings.decode, &settings.output);
        let outputs = |finished: Sender<Finished>, lane: LaneOf| decode::Outputs {
            ready: into_queue(&queue, lane),
            finished,
            answers: Some(answers.clone()),
            metrics: metrics.clone(),
        };
        let of_endpoint = lanes.weights.len();
        // What the endpoint has of the fetches and of the decoders, the stream has not.
        let (mut fetch, mut threads, mut guests) = (settings.fetch.clone(), config.threads, None);
        if let Some(part) = endpoint {
            let (shares, counts) = (part.split_fetch(&fetch), part.split(threads));
            (fetch, threads) = (shares.0, counts.0);
            let fetcher = fetch::Fetcher::new(&shares.1, part.images.clone(), pixel_bytes, metrics.clone())?;
            guests = Some((fetcher, decode::Config { threads: counts.1, ..config.clone() }));
        }
        let mut fetcher = fetch::Fetcher::new(&fetch, control.budget().images.clone(), pixel_bytes, metrics.clone())?
            .looking_for_outages(
                &fetch,
                fetch::Surroundings {
                    gate: control.gate().clone(),
                    ledger: control.ledger().clone(),
                    draining: control.draining().clone(),
                },
            );
        if let Some(last) = settings.kafka.retry_topics.last() {
            fetcher = fetcher.leaving_failing_hosts_alone(&fetch, &last.topic);
        }
        let config = decode::Config { threads, ..config };
        let stream = WayIn::start(fetcher, &config, &outputs(finished_in.clone(), Box::new(move |row| lanes.of(row))))?;
        let (mut decoders, mut before_fetch, mut before_decode) =
            (stream.decoders, stream.before_fetch, stream.before_decode);
        let mut entrance = None;
        if let Some((fetcher, config)) = guests {
            let way = WayIn::start(fetcher, &config, &outputs(answered_in, Box::new(move |_| of_endpoint)))?;
            decoders.extend(way.decoders);
            before_fetch = Box::new(move || before_fetch() + (way.before_fetch)());
            before_decode = Box::new(move || before_decode() + (way.before_decode)());
            entrance = Some(Entrance { rows: way.rows, finished: answered, fetching: way.fetching });
        }
        close_behind(decoders, &queue)?;

        control.wired(Wiring {
            devices: devices.iter().map(|(stats, _)| stats.clone()).collect(),
            models: Models::new(
                Named { caption: model, filter, vqa: answerer, canary },
                devices,
                parts.load,
                answers,
                metrics,
            ),
            queues: vec![
                (Stage::Fetch, before_fetch),
                (Stage::Decode, before_decode),
                (Stage::Batch, Box::new(move || queue.len())),
                (Stage::Publish, waiting(&finished)),
            ],
        });
        Ok(Self {
            rows: stream.rows,
            finished,
            failures: finished_in,
            device_failures,
            fetching: stream.fetching,
            endpoint: entrance,
        })
    }
}

/// The lane of a row.
type LaneOf = Box<dyn Fn(&Row) -> usize + Send + Sync>;

/// Puts rows that are decoded into the queue for the devices.
fn into_queue(queue: &Queue<Queued>, lane_of: LaneOf) -> Arc<decode::PushReady> {
    let queue = queue.clone();
    #[expect(clippy::result_large_err, reason = "the stage gets its row back where a sink refuses it")]
    Arc::new(move |ready: Tracked<Ready>| {
        let lane = lane_of(&ready.value.row);
        if let Err(refused) = queue.push(lane, Queued::new(ready, lane)) {
            // No device is left, and the worker stops: the next one reads the message again.
            refused.ready.abandon();
        }
        Ok(())
    })
}

/// Fetching and decoding, from rows to the queue for the devices.
struct WayIn {
    rows: Sender<Tracked<Row>>,
    fetching: JoinHandle<()>,
    decoders: Vec<std::thread::JoinHandle<()>>,
    before_fetch: Waiting,
    before_decode: Waiting,
}

impl WayIn {
    fn start(fetcher: fetch::Fetcher, config: &decode::Config, outputs: &decode::Outputs) -> anyhow::Result<Self> {
        let (fetched_in, fetched) = bounded(HANDOVER);
        let decoders = decode::spawn(config, &fetched, outputs)?;
        let (rows, rows_out) = bounded(HANDOVER);
        let (before_fetch, before_decode) = (waiting(&rows_out), waiting(&fetched));
        let fetching = tokio::spawn(fetch::run(Arc::new(fetcher), rows_out, fetched_in, outputs.finished.clone()));
        Ok(Self { rows, fetching, decoders, before_fetch, before_decode })
    }
}

/// Closes the queue when nothing more can come into it.
fn close_behind(decoders: Vec<std::thread::JoinHandle<()>>, queue: &Queue<Queued>) -> std::io::Result<()> {
    let queue = queue.clone();
    std::thread::Builder::new().name("decode end".into()).spawn(move || {
        // A panic outside of a decoder loses its row, which the ledger reports.
        for thread in decoders {
            let _ = thread.join();
        }
        queue.close();
    })?;
    Ok(())
}

/// Rows that may wait for a device: as many as are configured, and at least a batch for each device, or no batch could
/// ever be full.
fn room(configured: usize, engines: &[Loaded]) -> usize {
    configured.max(engines.iter().map(|loaded| loaded.batch_size).sum())
}

/// Starts the devices, and beside each a thread that waits for its end, so that a failure is noticed when it happens.
/// When the last device is gone, what waits for one is given up, or the stages before would wait for ever.
fn start_devices(
    engines: Vec<Loaded>,
    shared: &Arc<infer::Shared>,
    queue: &Queue<Queued>,
    failures: Sender<DeviceFailure>,
) -> anyhow::Result<Vec<(Arc<DeviceStats>, Arc<Mailbox>)>> {
    let left = Arc::new(AtomicUsize::new(engines.len()));
    let mut all = Vec::with_capacity(engines.len());
    for loaded in engines {
        let Device { stats, mailbox, thread } = infer::spawn(loaded, shared.clone())?;
        all.push((stats.clone(), mailbox));
        let (queue, failures, left) = (queue.clone(), failures.clone(), left.clone());
        std::thread::Builder::new().name(format!("watch {}", stats.name)).spawn(move || {
            let failure = match thread.join() {
                Ok(Ok(())) => None,
                Ok(Err(failure)) => Some(failure),
                Err(_) => Some(DeviceFailure::panicked(&stats.name)),
            };
            if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                queue.abandon().into_iter().for_each(|queued| drop(queued.ready.abandon()));
            }
            if let Some(failure) = failure {
                // Nobody listens only when the flow is gone already.
                let _ = failures.send_blocking(failure);
            }
        })?;
    }
    Ok(all)
}

impl infer::Supply for Queue<Queued> {
    fn take(&self, max: usize, linger: Duration, last: Option<Duration>) -> Option<(Vec<Queued>, Flush)> {
        Queue::take(self, Take { max, linger, work: Take::work_after(last) })
    }

    fn try_take(&self, max: usize, linger: Duration, last: Option<Duration>) -> Option<(Vec<Queued>, Flush)> {
        Queue::try_take(self, Take { max, linger, work: Take::work_after(last) })
    }

    fn done(&self) {
        Queue::done(self);
    }

    fn put_back(&self, rows: Vec<Queued>) {
        Queue::put_back(self, rows.into_iter().map(|row| (row.lane, row)).collect());
    }
}

/// Counts what waits in a channel, without keeping it open: its senders must notice when the stage behind it is gone.
fn waiting<T: Send + 'static>(channel: &Receiver<T>) -> Waiting {
    let channel = channel.downgrade();
    Box::new(move || channel.upgrade().map_or(0, |channel| channel.len()))
}

/// Which lane a topic's rows wait in. A row that comes back from a retry topic has the lane of its first one.
#[derive(Debug, Clone)]
struct Lanes {
    topics: Vec<String>,
    weights: Vec<u32>,
}

impl Lanes {
    fn new(settings: &Settings) -> Self {
        let inputs = &settings.kafka.inputs;
        Self {
            topics: inputs.iter().map(|i| i.topic.clone()).collect(),
            weights: inputs.iter().map(|i| i.weight).collect(),
        }
    }

    fn of(&self, row: &Row) -> usize {
        self.topics.iter().position(|topic| **topic == *row.origin.topic).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::fake::{FakeEngine, FakeOptions};

    #[test]
    fn the_queue_has_room_for_a_batch_of_every_device() {
        let engine = |batch_size| Loaded {
            engine: Box::new(FakeEngine::new(FakeOptions::default())),
            filter: None,
            answerer: None,
            canary: None,
            batch_size,
            replica: None,
        };
        assert_eq!(room(128, &[engine(256), engine(64)]), 320);
        assert_eq!(room(128, &[engine(8), engine(8)]), 128);
    }
}
