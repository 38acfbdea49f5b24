//! From pixels to captions: one OS thread owns one device and its model, and pulls batches from the shared queue.

mod canary;
mod exchange;
mod queued;
mod size;
mod stats;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use async_channel::Sender;
use jiff::Timestamp;

use self::canary::{Canary, Trial};
pub use self::exchange::{Mailbox, Replacement};
pub use self::queued::Queued;
pub use self::size::{Measured, WarmUp, best_of, most_rows, warm_up};
pub use self::stats::DeviceStats;
use self::stats::Life;
use super::{Answers, AskError, Finished, Models, Ready, Writer, failed, send_blocking};
use crate::caption::{self, Ask, Engine, EngineError, ErrorKind, Filter, Phases, Pixels, Respondent, Told, Viewer};
use crate::disposition::{Code, Disposed, Disposition, Failure, Stage};
use crate::message::Timing;
use crate::metrics::{Flush, Metrics, Phase};
use crate::settings;

/// Why one row got no caption.
#[derive(Debug, thiserror::Error)]
enum InferError {
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("{0}")]
    Params(EngineError),
    #[error("the model failed on this image alone, while others work: {0}")]
    Image(EngineError),
    #[error("the request's deadline passed while it waited for a device")]
    Deadline,
}

impl Disposed for InferError {
    fn disposition(&self) -> Disposition {
        Disposition::Permanent
    }

    fn code(&self) -> Code {
        match self {
            Self::Ask(AskError::NoModel { .. }) => Code::ModelUnavailable,
            Self::Params(error) if error.kind() == ErrorKind::Unavailable => Code::ModelUnavailable,
            Self::Ask(AskError::Params(_)) | Self::Params(_) => Code::BadParams,
            Self::Image(_) => Code::Inference,
            Self::Deadline => Code::Deadline,
        }
    }
}

/// A device that fails on an image it should caption: it is taken out, and its rows go to the others.
#[derive(Debug, thiserror::Error)]
#[error("device {device} is broken and was taken out: {error}")]
pub struct DeviceFailure {
    /// Name of the device.
    pub device: String,
    /// What it says.
    pub error: EngineError,
}

impl DeviceFailure {
    /// The device's thread panicked. Rows that it held are reported by the ledger.
    pub fn panicked(device: &str) -> Self {
        let error = EngineError::new(ErrorKind::Internal, "its thread panicked; the message is in the log");
        Self { device: device.to_owned(), error }
    }
}

/// Says that a batch is done, however its device fares.
struct Done<'a>(&'a dyn Supply);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.done();
    }
}

/// Where devices pull their batches from.
pub trait Supply: Send + Sync {
    /// Waits for a batch of at most `max` rows; a free device may wait for `linger` for a fuller one, as far as
    /// deadlines allow it when its last batch took `last`. `None` when no more will come.
    fn take(&self, max: usize, linger: Duration, last: Option<Duration>) -> Option<(Vec<Queued>, Flush)>;
    /// The same without waiting: `None` where nothing is to be started now.
    fn try_take(&self, max: usize, linger: Duration, last: Option<Duration>) -> Option<(Vec<Queued>, Flush)>;
    /// A device is done with a batch that it took.
    fn done(&self);
    /// Takes back the rows of a batch that a device could not finish: they are the next ones.
    fn put_back(&self, rows: Vec<Queued>);
}

/// What all devices share.
pub struct Shared {
    /// Where batches come from.
    pub supply: Box<dyn Supply>,
    /// Where the captions and failures of each lane go.
    pub finished: Vec<Sender<Finished>>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Defaults and limits of a request's parameters.
    pub model: settings::Model,
    /// How long a free device waits for a fuller batch.
    pub linger: Duration,
    /// What rows ask, and the records that answer them.
    pub answers: Arc<Answers>,
    /// What a canary captions, where devices have one.
    pub trials: Trials,
}

/// The images that canaries caption.
#[derive(Debug, Clone, Copy)]
pub struct Trials {
    /// How many of them, 0 to 1.
    pub share: f64,
    /// The stream's lanes are those before this one; no other has trials.
    pub lanes: usize,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("infer::Shared").field("worker", &self.answers.worker()).finish_non_exhaustive()
    }
}

/// The models of a device, and how the flow uses it.
pub struct Loaded {
    /// The captioner.
    pub engine: Box<dyn Engine>,
    /// The judge of its captions and of texts that were found, where there is one.
    pub filter: Option<Box<dyn Filter>>,
    /// What answers questions, where there is such a model.
    pub answerer: Option<Box<dyn Respondent>>,
    /// A second captioner, whose captions are compared with those of the first, where there is one.
    pub canary: Option<Box<dyn Engine>>,
    /// Images it takes at once.
    pub batch_size: usize,
    /// Number of this copy, where a device has several.
    pub replica: Option<usize>,
}

/// A running device.
pub struct Device {
    /// What it has done.
    pub stats: Arc<DeviceStats>,
    /// Where it finds other models.
    pub mailbox: Arc<Mailbox>,
    /// Its thread; ends when the queue is closed and empty, or when the device breaks.
    pub thread: JoinHandle<Result<(), DeviceFailure>>,
}

/// Starts the thread of one device. The batches are no larger than `model.max_state` allows.
pub fn spawn(loaded: Loaded, shared: Arc<Shared>) -> std::io::Result<Device> {
    let Loaded { engine, filter, answerer, canary, batch_size, replica } = loaded;
    let info = engine.model();
    let name = replica.map_or_else(|| info.device.clone(), |n| format!("{}#{n}", info.device));
    let max_batch_size = most_rows(engine.as_ref(), &shared.model);
    let batch_size = batch_size.clamp(1, max_batch_size);
    tracing::info!(
        device = name,
        batch_size,
        max_batch_size,
        "images that the device takes at once, and the most that fit into model.max_state"
    );
    let stats = Arc::new(DeviceStats::new(name.clone(), info.backend.clone(), batch_size, max_batch_size));
    let models = Arc::new(models_of(engine.as_ref(), filter.as_deref(), answerer.as_deref()));
    let mailbox = Arc::<Mailbox>::default();
    let inbox = mailbox.clone();
    let canary = canary.map(|engine| Canary::new(engine, &shared.model));
    let mut runner =
        Runner { engine, filter, answerer, canary, models, shared, stats: stats.clone(), inbox, last: None };
    let thread = thread::Builder::new().name(format!("infer {name}")).spawn(move || {
        let life = Life::of(runner.stats.clone());
        life.over(runner.run())
    })?;
    Ok(Device { stats, mailbox, thread })
}

/// The models of a device, as records name them.
fn models_of(engine: &dyn Engine, filter: Option<&dyn Filter>, answerer: Option<&dyn Respondent>) -> Models {
    Models::of(engine.model(), filter.map(Viewer::model), answerer.map(Viewer::model))
}

struct Runner {
    engine: Box<dyn Engine>,
    filter: Option<Box<dyn Filter>>,
    answerer: Option<Box<dyn Respondent>>,
    canary: Option<Canary>,
    /// What records say of them.
    models: Arc<Models>,
    shared: Arc<Shared>,
    stats: Arc<DeviceStats>,
    inbox: Arc<Mailbox>,
    /// How long the last batch took.
    last: Option<Duration>,
}

impl Runner {
    fn run(&mut self) -> Result<(), DeviceFailure> {
        loop {
            let Some((batch, reason)) = self.take() else { return Ok(()) };
            let shared = self.shared.clone();
            // Also when this thread panics, or the other devices would wait for what it may put back.
            let _done = Done(&*shared.supply);
            self.shared.metrics.flushed(reason);
            self.exchange();
            let begun = Instant::now();
            self.stats.begin();
            let batch = self.admit(batch, begun);
            let result = self.caption_all(batch);
            self.stats.end();
            self.last = Some(begun.elapsed());
            if let Err((error, rest)) = result {
                self.shared.supply.put_back(rest.into_iter().map(|row| row.queued).collect());
                self.give_trials_up("the device failed");
                return Err(DeviceFailure { device: self.stats.name.clone(), error });
            }
        }
    }

    /// The next batch. What is gathered for the canary has its turn before that when it is enough or has waited for long, and
    /// where there is no batch to be started.
    fn take(&mut self) -> Option<(Vec<Queued>, Flush)> {
        loop {
            let size = self.stats.batch_size.load(Ordering::Relaxed);
            let (supply, linger, last) = (&self.shared.supply, self.shared.linger, self.last);
            match &self.canary {
                Some(canary) if canary.is_due(size) => {}
                Some(canary) if canary.has_trials() => {
                    if let Some(taken) = supply.try_take(size, linger, last) {
                        return Some(taken);
                    }
                }
                _ => return supply.take(size, linger, last),
            }
            self.try_canary();
        }
    }

    /// Takes the models that were left for it, if there are any.
    fn exchange(&mut self) {
        let Replacement { engine, filter, answerer, canary } = self.inbox.take();
        if let Some(canary) = canary {
            let new = Canary::new(canary, &self.shared.model);
            self.canary = Some(match self.canary.take() {
                Some(old) => new.in_the_place_of(old),
                None => new,
            });
        }
        if engine.is_none() && filter.is_none() && answerer.is_none() {
            return;
        }
        if let Some(engine) = engine {
            self.stats.set_max_batch_size(most_rows(engine.as_ref(), &self.shared.model));
            self.engine = engine;
        }
        self.filter = filter.or_else(|| self.filter.take());
        self.answerer = answerer.or_else(|| self.answerer.take());
        let models = models_of(self.engine.as_ref(), self.filter.as_deref(), self.answerer.as_deref());
        self.models = Arc::new(models);
    }

    /// Rows that can be captioned now; those that cannot are finished as failures.
    fn admit(&self, batch: Vec<Queued>, now: Instant) -> Vec<Admitted> {
        let mut rows = Vec::with_capacity(batch.len());
        for mut queued in batch {
            let waited = now.saturating_duration_since(queued.since);
            self.shared.metrics.stage(Stage::Batch, waited);
            let row = &mut queued.ready.value.row;
            row.timing.queue = Timing::ms(waited);
            if row.request.deadline.is_some_and(|deadline| Timestamp::now() > deadline) {
                self.fail(queued, Stage::Batch, &InferError::Deadline);
                continue;
            }
            match self.shared.answers.ask(&row.request, &queued.ready.value.image.sha256) {
                Ok(ask) => rows.push(Admitted { queued, ask }),
                Err(error) => self.fail(queued, Stage::Infer, &error.into()),
            }
        }
        rows
    }

    /// Captions a batch, as much of it at a time as there is memory for: an image of which more than one caption is followed
    /// takes more than one row. An error gives back the rows that are unfinished.
    fn caption_all(&mut self, batch: Vec<Admitted>) -> Result<(), (EngineError, Vec<Admitted>)> {
        let mut parts = parts(batch, self.stats.max_batch_size(), |admitted| admitted.ask.rows()).into_iter();
        while let Some(part) = parts.next() {
            if let Err((error, mut unfinished)) = self.caption(part) {
                unfinished.extend(parts.flatten());
                return Err((error, unfinished));
            }
        }
        Ok(())
    }

    /// Captions a batch. One that fails as a whole is halved until the guilty image is alone; whether image or device
    /// is guilty then is told by a picture that is known to be good. An error gives back the rows that are unfinished.
    fn caption(&mut self, mut batch: Vec<Admitted>) -> Result<(), (EngineError, Vec<Admitted>)> {
        if batch.is_empty() {
            return Ok(());
        }
        let items: Vec<_> = batch.iter().map(|a| (a.queued.ready.value.pixels.clone(), a.ask.clone())).collect();
        let begun = Instant::now();
        let error = match self.tell(&items) {
            Ok(results) => {
                let took = begun.elapsed();
                self.observe(batch.len(), took);
                let cost = took / u32::try_from(batch.len()).unwrap_or(u32::MAX);
                for (row, result) in batch.into_iter().zip(results) {
                    self.finish(row, result, took, cost);
                }
                return Ok(());
            }
            Err(error) => error,
        };
        let device = &self.stats.name;
        if batch.len() > 1 {
            let half = batch.len() / 2;
            if error.kind() == ErrorKind::OutOfMemory {
                // Images of several rows each say nothing of how many of one there is room for.
                if batch.iter().all(|admitted| admitted.ask.rows() == 1) {
                    self.stats.batch_size.fetch_min(half, Ordering::Relaxed);
                }
                tracing::warn!(device, size = batch.len(), now = half, "out of memory: smaller batches");
            } else {
                tracing::warn!(device, size = batch.len(), %error, "the batch failed: trying its halves");
            }
            let rest = batch.split_off(half);
            return match self.caption(batch) {
                Ok(()) => self.caption(rest),
                Err((error, mut unfinished)) => {
                    unfinished.extend(rest);
                    Err((error, unfinished))
                }
            };
        }
        if let Err(broken) = self.probe() {
            return Err((broken, batch));
        }
        for row in batch {
            self.fail(row.queued, Stage::Infer, &InferError::Image(EngineError::new(error.kind(), error.to_string())));
        }
        Ok(())
    }

    /// Captions a grey picture, judges a text of it and answers a question about it, which no sound device fails on.
    fn probe(&mut self) -> Result<(), EngineError> {
        let size = self.engine.model().image_size;
        let items = caption::probe(size, true, self.filter.is_some(), self.answerer.is_some())?;
        self.tell(&items)?;
        Ok(())
    }

    fn tell(&mut self, items: &[(Pixels, Ask)]) -> Result<Vec<Result<Told, EngineError>>, EngineError> {
        let filter = self.filter.as_mut().map(|filter| &mut **filter as &mut dyn Filter);
        let answerer = self.answerer.as_mut().map(|answerer| &mut **answerer as &mut dyn Respondent);
        caption::tell(self.engine.as_mut(), filter, answerer, items)
    }

    fn observe(&mut self, images: usize, took: Duration) {
        let phases = self.engine.take_phases();
        self.observe_phases(&self.models.model.id, phases);
        for _ in 0..images {
            self.shared.metrics.stage(Stage::Infer, took);
        }
    }

    fn observe_phases(&self, model: &str, phases: Phases) {
        let Phases { encode, cross_kv, decode, images: captioned, steps, tokens } = phases;
        let (metrics, device) = (&self.shared.metrics, self.stats.name.as_str());
        // The models beside it may have worked alone.
        if captioned > 0 {
            metrics.phase(device, model, Phase::Encode, captioned, encode);
            metrics.phase(device, model, Phase::CrossKv, captioned, cross_kv);
            metrics.phase(device, model, Phase::Decode, tokens.div_ceil(steps.max(1)), decode);
        }
    }

    /// Has the canary caption what is gathered for it.
    fn try_canary(&mut self) {
        let Some(canary) = &mut self.canary else { return };
        self.stats.begin();
        let compared = canary.compare(self.shared.answers.worker());
        if let Some((id, phases)) = canary.take_phases() {
            self.observe_phases(&id, phases);
        }
        self.send_all(compared);
        self.stats.end();
    }

    /// Ends what is gathered for the canary, which cannot work on it any more.
    fn give_trials_up(&mut self, why: &str) {
        let Some(canary) = &mut self.canary else { return };
        let ended = canary.give_up(why, self.shared.answers.worker());
        self.send_all(ended);
        self.stats.end();
    }

    /// Answers a row of a batch that took so long, `cost` of it for this row.
    fn finish(&mut self, row: Admitted, result: Result<Told, EngineError>, took: Duration, cost: Duration) {
        let Admitted { queued, ask } = row;
        let lane = queued.lane;
        let told = match result {
            Ok(told) => told,
            Err(error) => return self.fail(queued, Stage::Infer, &InferError::Params(error)),
        };
        let by = Writer { models: &self.models, device: &self.stats.name, cost };
        let mut ready = queued.ready;
        let Trials { share, lanes } = self.shared.trials;
        if let (Some(params), Some(caption)) = (&ask.caption, &told.caption)
            && let Some(canary) = self.canary.as_mut().filter(|_| lane < lanes)
            && canary.chooses(&ready.value.image.sha256, share)
        {
            let trial = Trial::of(&ready.value, params, caption, by);
            let (first, second) = ready.fork(trial);
            ready = first;
            canary.gather(lane, second);
        }
        let finished = ready.map(|ready| {
            let Ready { mut row, image, .. } = ready;
            row.timing.caption = Timing::ms(took);
            self.shared.answers.written(row, image, ask, told, by)
        });
        self.send(lane, finished);
    }

    fn fail(&self, queued: Queued, stage: Stage, error: &InferError) {
        let failure = Failure::new(stage, error);
        self.send(queued.lane, failed(queued.ready.map(|ready| ready.row), failure));
    }

    fn send_all(&self, finished: Vec<(usize, Finished)>) {
        for (lane, finished) in finished {
            self.send(lane, finished);
        }
    }

    fn send(&self, lane: usize, finished: Finished) {
        let Shared { finished: to, metrics, .. } = &*self.shared;
        let Some(to) = to.get(lane) else { unreachable!("a lane without an end") };
        // Waiting for the publisher is not work.
        self.stats.end();
        if let Err(closed) = send_blocking(to, finished, Stage::Infer, metrics) {
            // The publisher is gone, which happens only after the drain deadline: the next worker reads it again.
            closed.into_inner().abandon();
        }
        self.stats.begin();
    }
}

#[derive(Debug)]
struct Admitted {
    queued: Queued,
    ask: Ask,
}

/// The batch in parts that take at most so many rows of the engine, one image at least; `rows` tells how many one takes.
fn parts<T>(batch: Vec<T>, most: usize, rows: impl Fn(&T) -> usize) -> Vec<Vec<T>> {
    let mut parts: Vec<Vec<T>> = Vec::new();
    let mut room = 0;
    for item in batch {
        let rows = rows(&item);
        match parts.last_mut() {
            Some(part) if rows <= room => part.push(item),
            _ => {
                parts.push(vec![item]);
                room = most;
            }
        }
        room = room.saturating_sub(rows);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_taken_in_parts_of_the_rows_that_there_is_memory_for() {
        let of = |rows: &[usize], most: usize| parts(rows.to_vec(), most, |rows| *rows);
        assert_eq!(of(&[1, 1, 1, 1], 4), [[1, 1, 1, 1]]);
        assert_eq!(of(&[3, 1, 1, 3, 4, 1], 4), [vec![3, 1], vec![1, 3], vec![4], vec![1]]);
        assert_eq!(of(&[8, 8, 1], 4), [[8], [8], [1]], "one image at least");
        assert!(of(&[], 4).is_empty());
    }
}
