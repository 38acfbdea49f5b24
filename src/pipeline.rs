//! The flow: the only module that knows the order of the stages.
//!
//! [`Core`] is the middle of it, from rows to captions, and needs no Kafka: `blipstream caption` runs on it, so that its
//! captions are the pipeline's. [`worker`] puts Kafka at both ends.

mod control;
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
use crate::stage::batch::{Queue, Take};
use crate::stage::infer::{Device, DeviceFailure, DeviceStats, Queued};
use crate::stage::{Answers, Finished, Ready, decode, fetch, infer};
use crate::tracked::Tracked;

pub use crate::stage::infer::Loaded;
pub use control::{Budget, Control, Limits, Waiting, Wiring};
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
}

impl Core {
    /// Wires the stages, from the last one back, so that each holds only what lies downstream.
    ///
    /// # Errors
    /// A thread or an HTTP client could not be made.
    pub fn start(settings: &Settings, parts: Parts, control: &Control) -> anyhow::Result<Self> {
        let model = parts.engines.first().map(|e| e.engine.model().clone());
        let model = model.ok_or_else(|| anyhow::anyhow!("a flow needs at least one engine"))?;
        let pixel_bytes = model.image_size * model.image_size * 3;
        let metrics = control.metrics().clone();
        let lanes = Lanes::new(settings);

        // infer → publish
        let (finished_in, finished) = bounded(settings.flow.max_images.max(HANDOVER));
        let queue =
            Queue::new(room(settings.batch.queue, &parts.engines), &lanes.weights, |queued: &Queued| queued.due);
        let has_filter = parts.engines.iter().all(|loaded| loaded.filter.is_some());
        let answers = Answers::new(settings, has_filter, parts.worker, parts.flag_terms, metrics.clone());
        let answers = Arc::new(answers);
        let shared = Arc::new(infer::Shared {
            supply: Box::new(queue.clone()),
            finished: finished_in.clone(),
            metrics: metrics.clone(),
            model: settings.model.clone(),
            linger: settings.batch.linger,
            answers: answers.clone(),
        });
        let (failures_in, device_failures) = bounded(parts.engines.len());
        let devices = start_devices(parts.engines, &shared, &queue, failures_in)?;

        // decode → batch
        let (fetched_in, fetched) = bounded(HANDOVER);
        let outputs = decode::Outputs {
            ready: Arc::new({
                let queue = queue.clone();
                #[expect(clippy::result_large_err, reason = "the stage gets its row back where a sink refuses it")]
                move |ready: Tracked<Ready>| {
                    let lane = lanes.of(&ready.value.row.origin.topic);
                    if let Err(refused) = queue.push(lane, Queued::new(ready, lane)) {
                        // No device is left, and the worker stops: the next one reads the message again.
                        refused.ready.abandon();
                    }
                    Ok(())
                }
            }),
            finished: finished_in.clone(),
            answers: Some(answers),
            metrics: metrics.clone(),
        };
        let config = decode::Config::new(parts.preprocessor, &settings.decode, &settings.output);
        let decoders = decode::spawn(&config, &fetched, &outputs)?;
        std::thread::Builder::new().name("decode end".into()).spawn({
            let queue = queue.clone();
            move || {
                // A panic outside of a decoder loses its row, which the ledger reports.
                for thread in decoders {
                    let _ = thread.join();
                }
                queue.close();
            }
        })?;

        // fetch → decode
        let (rows, rows_out) = bounded(HANDOVER);
        let mut fetcher = fetch::Fetcher::new(&settings.fetch, control.budget().images.clone(), pixel_bytes, metrics)?
            .looking_for_outages(
                &settings.fetch,
                fetch::Surroundings {
                    gate: control.gate().clone(),
                    ledger: control.ledger().clone(),
                    draining: control.draining().clone(),
                },
            );
        if let Some(last) = settings.kafka.retry_topics.last() {
            fetcher = fetcher.leaving_failing_hosts_alone(&settings.fetch, &last.topic);
        }
        let (before_fetch, before_decode) = (waiting(&rows_out), waiting(&fetched));
        let fetching = tokio::spawn(fetch::run(Arc::new(fetcher), rows_out, fetched_in, finished_in.clone()));

        control.wired(Wiring {
            model,
            devices,
            queues: vec![
                (Stage::Fetch, before_fetch),
                (Stage::Decode, before_decode),
                (Stage::Batch, Box::new(move || queue.len())),
                (Stage::Publish, waiting(&finished)),
            ],
        });
        Ok(Self { rows, finished, failures: finished_in, device_failures, fetching })
    }
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
) -> anyhow::Result<Vec<Arc<DeviceStats>>> {
    let left = Arc::new(AtomicUsize::new(engines.len()));
    let mut all = Vec::with_capacity(engines.len());
    for loaded in engines {
        let Device { stats, thread } = infer::spawn(loaded, shared.clone())?;
        all.push(stats.clone());
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

    fn of(&self, topic: &str) -> usize {
        self.topics.iter().position(|t| t == topic).unwrap_or(0)
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
            batch_size,
            replica: None,
        };
        assert_eq!(room(128, &[engine(256), engine(64)]), 320);
        assert_eq!(room(128, &[engine(8), engine(8)]), 128);
    }
}
