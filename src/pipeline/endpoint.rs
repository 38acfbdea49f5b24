//! Rows that are answered directly: whoever asks waits for the answer. No Kafka, and the same devices, stages and records.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_channel::{Receiver, Sender};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, timeout_at};

use super::{Entrance, Part};
use crate::budget::Permit;
use crate::disposition::{Code, Failure, Stage};
use crate::message::{CaptionRecord, Message, Origin, Request, Row, Timing};
use crate::metrics::Metrics;
use crate::offsets::{Ledger, Lost, Outcome, Ticket, TopicPartition};
use crate::settings;
use crate::stage::{Finished, Output};
use crate::tracked::Tracked;

/// The topic that stands for the endpoint in an image's origin.
const TOPIC: &str = "endpoint";
/// How long after its deadline an answer is waited for: rows are told of it at the next stage.
const GRACE: Duration = Duration::from_secs(10);
/// The longest wait that is told to who comes too early.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// What became of a row.
pub type Answer = Result<Box<CaptionRecord>, Failure>;

/// Why a request is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is no room now.
    #[error("{what}; come again in {} s", after.as_secs())]
    Busy {
        /// What there is no room for.
        what: String,
        /// When to come again.
        after: Duration,
    },
    /// The flow drains.
    #[error("this worker is shutting down; ask another one")]
    Draining,
    /// A row ended without an answer: the flow went down, or a bug.
    #[error("a row was given up; the log of the worker says more")]
    Lost,
}

/// Asks the flow and waits. Cheap to clone.
#[derive(Clone)]
pub struct Endpoint(Arc<Inner>);

struct Inner {
    /// `None` once the flow drains.
    rows: Mutex<Option<Sender<Tracked<Row>>>>,
    /// Who waits for which row: number of the request, and row in it.
    waiting: Mutex<HashMap<(i64, usize), Waiter>>,
    numbers: Numbers,
    part: Part,
    places: Arc<Semaphore>,
    settings: settings::Endpoint,
    metrics: Arc<Metrics>,
    /// How long the latest answers took, in milliseconds: what a place is waited for.
    took_ms: AtomicU64,
}

/// Gives requests their numbers, which only rise, and with each the ticket of that number.
struct Numbers {
    ledger: Ledger,
    /// Held while the ledger opens a ticket: it takes none below the newest.
    next: Mutex<i64>,
}

impl Numbers {
    fn new() -> Self {
        let ledger = Ledger::new();
        // It is never revoked.
        ledger.assign(partition());
        Self { ledger, next: Mutex::new(0) }
    }

    fn next(&self) -> Option<(i64, Ticket)> {
        let mut next = lock(&self.next);
        let number = *next;
        *next += 1;
        Some((number, self.ledger.open(&partition(), number)?))
    }
}

/// Who waits for a row, and the place that it takes.
struct Waiter {
    answer: oneshot::Sender<Answer>,
    _place: OwnedSemaphorePermit,
}

/// Rows that may be sent in, and where their answers come.
type Registered = (Vec<Tracked<Row>>, Vec<oneshot::Receiver<Answer>>);

/// Room for a request, held until it is answered.
#[derive(Debug)]
pub struct Admitted {
    body: Permit,
}

impl Admitted {
    /// The body has come and has so many bytes: room for more is given back.
    pub fn shrink(&mut self, bytes: usize) {
        self.body.shrink(bytes);
    }
}

impl Endpoint {
    /// The endpoint of a flow that has an entrance. The task ends when everything that went in has been answered.
    pub fn start(
        entrance: Entrance,
        part: Part,
        settings: settings::Endpoint,
        metrics: Arc<Metrics>,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let Entrance { rows, finished, fetching } = entrance;
        let places = Arc::new(Semaphore::new(settings.max_in_flight));
        let endpoint = Self(Arc::new(Inner {
            rows: Mutex::new(Some(rows)),
            waiting: Mutex::default(),
            numbers: Numbers::new(),
            part,
            places,
            settings,
            metrics,
            took_ms: AtomicU64::new(0),
        }));
        let task = tokio::spawn({
            let endpoint = endpoint.clone();
            async move {
                endpoint.hand_out(finished).await;
                if fetching.await.is_err() {
                    tracing::error!("fetching images for the endpoint panicked; the message is in the log");
                }
            }
        });
        (endpoint, task)
    }

    /// What it was told.
    pub fn settings(&self) -> &settings::Endpoint {
        &self.0.settings
    }

    /// Room for a body of so many bytes, or of any length that is allowed.
    ///
    /// # Errors
    /// There is none now, or the flow drains.
    pub fn admit(&self, length: Option<usize>) -> Result<Admitted, Refused> {
        if lock(&self.0.rows).is_none() {
            return Err(Refused::Draining);
        }
        let bytes = length.unwrap_or(self.0.settings.max_body.as_u64() as usize);
        let busy = || self.busy("the bodies of other requests take all the memory that there is for them");
        Ok(Admitted { body: self.0.part.messages.try_acquire(bytes).ok_or_else(busy)? })
    }

    /// Asks for all rows of a request, and waits for the answers, which come in the order of `requests`.
    ///
    /// Who stops waiting does not stop the rows: they end at their deadline at the latest.
    ///
    /// # Errors
    /// There is no room for so many rows now, the flow drains, or an answer is missing.
    pub async fn ask(
        &self,
        admitted: Admitted,
        message: Message,
        requests: Vec<Request>,
    ) -> Result<Vec<Answer>, Refused> {
        let rows = requests.len();
        if rows == 0 {
            return Ok(Vec::new());
        }
        let many = u32::try_from(rows).unwrap_or(u32::MAX);
        let places = self.0.places.clone().try_acquire_many_owned(many);
        let places = places.map_err(|_| self.busy("as many rows are under way as endpoint.max_in_flight allows"))?;
        let Some(entrance) = lock(&self.0.rows).clone() else { return Err(Refused::Draining) };
        let begun = Instant::now();
        let (rows, receivers) = self.register(admitted, message, requests, places).ok_or(Refused::Lost)?;
        // A task of its own: a client that leaves in the middle must not drop rows on their way in.
        tokio::spawn(self.clone().send(entrance, rows));
        let limit = begun + self.0.settings.timeout + GRACE;
        let mut answers = Vec::with_capacity(receivers.len());
        for receiver in receivers {
            answers.push(match timeout_at(limit, receiver).await {
                Ok(answer) => answer.map_err(|_| Refused::Lost)?,
                // What the others have is not thrown away.
                Err(_) => Err(late()),
            });
        }
        self.0.took_ms.store(begun.elapsed().as_millis() as u64, Ordering::Relaxed);
        Ok(answers)
    }

    /// Gives rows their numbers, and notes who waits for them.
    fn register(
        &self,
        Admitted { body }: Admitted,
        mut message: Message,
        requests: Vec<Request>,
        mut places: OwnedSemaphorePermit,
    ) -> Option<Registered> {
        let (number, ticket) = self.0.numbers.next()?;
        (message.topic, message.offset) = (TOPIC.into(), number);
        let (message, only) = (Arc::new(message), requests.len() == 1);
        let latest = SignedDuration::try_from(self.0.settings.timeout).ok();
        let latest = latest.and_then(|timeout| Timestamp::now().checked_add(timeout).ok());
        let row = |(index, mut request): (usize, Request)| {
            request.deadline = request.deadline.into_iter().chain(latest).min();
            let origin = Origin { topic: TOPIC.into(), partition: 0, offset: number, index: (!only).then_some(index) };
            Row { message: message.clone(), request, origin, index, only, timing: Timing::default() }
        };
        let rows = requests.into_iter().enumerate().map(row).collect();
        let rows = Tracked::new((), ticket, body).split(rows).ok()?;
        let mut waiting = lock(&self.0.waiting);
        let receivers = rows.iter().map(|row| {
            let Some(place) = places.split(1) else { unreachable!("a place was taken for each row") };
            let (answer, receiver) = oneshot::channel();
            waiting.insert((number, row.value.index), Waiter { answer, _place: place });
            receiver
        });
        let receivers = receivers.collect();
        drop(waiting);
        Some((rows, receivers))
    }

    /// Sends rows in.
    async fn send(self, entrance: Sender<Tracked<Row>>, rows: Vec<Tracked<Row>>) {
        for row in rows {
            if let Err(closed) = entrance.send(row).await {
                // The flow is going down: nobody waits for this row, and nobody is told of it but who asked.
                let row = closed.into_inner();
                let number = row.offset();
                lock(&self.0.waiting).remove(&(number, row.abandon().index));
            }
        }
    }

    /// Hands answers to those who wait for them, until no more will come.
    async fn hand_out(&self, finished: Receiver<Finished>) {
        while let Ok(finished) = finished.recv().await {
            let number = finished.offset();
            let (index, answer) = match finished.resolve(Outcome::Published) {
                Output::Caption { record, .. } => (record.index, Ok(record)),
                // Canaries have the stream's images only.
                Output::Canary { .. } => continue,
                Output::FailedRow(row, failure) => (row.index, Err(failure)),
                Output::FailedMessage { index, failure, .. } => (index.unwrap_or(0), Err(failure)),
            };
            self.0.metrics.row_answered(answer.as_ref().err().map(|failure| failure.code));
            if let Some(waiting) = lock(&self.0.waiting).remove(&(number, index)) {
                // Who asked may have gone.
                let _ = waiting.answer.send(answer);
            }
        }
        // Nobody will answer those who still wait.
        lock(&self.0.waiting).clear();
    }

    /// Takes no more requests; those under way are finished.
    pub fn close(&self) {
        lock(&self.0.rows).take();
    }

    /// Rows under way.
    pub fn in_flight(&self) -> usize {
        self.0.settings.max_in_flight - self.0.places.available_permits()
    }

    /// A row that was dropped without an answer: a bug.
    pub fn take_lost(&self) -> Option<Lost> {
        self.0.numbers.ledger.take_lost()
    }

    /// The answer to who finds no room for `what`.
    fn busy(&self, what: &str) -> Refused {
        let took = Duration::from_millis(self.0.took_ms.load(Ordering::Relaxed));
        let after = Duration::from_secs(took.as_secs() + 1).min(LONGEST_RETRY);
        Refused::Busy { what: what.to_owned(), after }
    }
}

/// The answer to who has waited as long as may be.
fn late() -> Failure {
    let text = "there was no answer within endpoint.timeout; a device is still at work on it, or hangs";
    Failure::with_message(Stage::Infer, Code::Deadline, text.into())
}

fn partition() -> TopicPartition {
    TopicPartition { topic: TOPIC.into(), partition: 0 }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
