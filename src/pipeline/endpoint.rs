//! Rows that are answered directly: whoever asks waits for the answer. No Kafka, and the same devices, stages and records.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::{Entrance, Part};
use crate::budget::Permit;
use crate::disposition::Failure;
use crate::message::{CaptionRecord, Message, Origin, Request, Row, Timing};
use crate::metrics::Metrics;
use crate::offsets::{Ledger, Lost, Outcome, TopicPartition};
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
    /// A row had no answer: a bug, or a device that hangs.
    #[error("no answer came in time; the log of the worker says more")]
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
    ledger: Ledger,
    next: AtomicI64,
    part: Part,
    places: Arc<Semaphore>,
    settings: settings::Endpoint,
    metrics: Arc<Metrics>,
    /// How long the latest answers took, in milliseconds: what a place is waited for.
    took_ms: AtomicU64,
}

/// Who waits for a row, and the place that it takes.
struct Waiter {
    answer: oneshot::Sender<Answer>,
    _place: OwnedSemaphorePermit,
}

/// Room for a request, held until it is answered.
#[derive(Debug)]
pub struct Admitted {
    body: Permit,
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
        let ledger = Ledger::new();
        ledger.assign(partition());
        let places = Arc::new(Semaphore::new(settings.max_in_flight));
        let endpoint = Self(Arc::new(Inner {
            rows: Mutex::new(Some(rows)),
            waiting: Mutex::default(),
            ledger,
            next: AtomicI64::new(0),
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
        // A task of its own: a client that leaves in the middle must not drop rows on their way in.
        let asking = self.clone();
        let asked = tokio::spawn(async move { asking.send(entrance, admitted, message, requests, places).await });
        let (begun, limit) = (Instant::now(), self.0.settings.timeout + GRACE);
        let answers = tokio::time::timeout(limit, async {
            let mut answers = Vec::with_capacity(rows);
            for receiver in asked.await.map_err(|_| Refused::Lost)? {
                answers.push(receiver.await.map_err(|_| Refused::Lost)?);
            }
            Ok(answers)
        });
        let answers = answers.await.unwrap_or(Err(Refused::Lost));
        self.0.took_ms.store(begun.elapsed().as_millis() as u64, Ordering::Relaxed);
        answers
    }

    /// Sends rows in, and returns where their answers come.
    async fn send(
        self,
        entrance: Sender<Tracked<Row>>,
        Admitted { body }: Admitted,
        mut message: Message,
        requests: Vec<Request>,
        mut places: OwnedSemaphorePermit,
    ) -> Vec<oneshot::Receiver<Answer>> {
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        // Numbers only rise, and the partition is never revoked.
        let Some(ticket) = self.0.ledger.open(&partition(), number) else { return Vec::new() };
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
        let Ok(rows) = Tracked::new((), ticket, body).split(rows) else { return Vec::new() };
        let mut receivers = Vec::with_capacity(rows.len());
        for row in rows {
            let Some(place) = places.split(1) else { unreachable!("a place was taken for each row") };
            let (answer, receiver) = oneshot::channel();
            receivers.push(receiver);
            lock(&self.0.waiting).insert((number, row.value.index), Waiter { answer, _place: place });
            if let Err(closed) = entrance.send(row).await {
                // The flow is going down: nobody waits for this row, and nobody is told of it but who asked.
                let row = closed.into_inner().abandon();
                lock(&self.0.waiting).remove(&(number, row.index));
            }
        }
        receivers
    }

    /// Hands answers to those who wait for them, until no more will come.
    async fn hand_out(&self, finished: Receiver<Finished>) {
        while let Ok(finished) = finished.recv().await {
            let number = finished.offset();
            let (index, answer) = match finished.resolve(Outcome::Published) {
                Output::Caption { record, .. } => (record.index, Ok(record)),
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
        self.0.ledger.take_lost()
    }

    /// The answer to who finds no room for `what`.
    fn busy(&self, what: &str) -> Refused {
        let took = Duration::from_millis(self.0.took_ms.load(Ordering::Relaxed));
        let after = Duration::from_secs(took.as_secs() + 1).min(LONGEST_RETRY);
        Refused::Busy { what: what.to_owned(), after }
    }
}

fn partition() -> TopicPartition {
    TopicPartition { topic: TOPIC.into(), partition: 0 }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
