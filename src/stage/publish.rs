//! Publish: captions and dead letters to Kafka. A ticket is resolved when the broker has acknowledged its record.
//!
//! Nothing is dropped. A record that cannot be delivered stalls the stage: nothing more is taken from the input, which
//! is bounded, so that the whole flow waits. A record that is too long becomes a dead letter, and a dead letter that is
//! too long becomes a pointer.
//!
//! This file is at-least-once delivery; `exact` and `transactor` are exactly-once.

mod ceiling;
mod exact;
mod failures;
mod record;
mod transactor;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_channel::{Receiver, bounded};
use jiff::Timestamp;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use self::ceiling::Before;
pub use self::ceiling::DeadLetters;
use self::failures::Failures;
use super::{Finished, Output};
use crate::disposition::Stage;
use crate::kafka::{Class, Deliver, Error, Membership, NotDelivered, NotSent, Producer};
use crate::metrics::Metrics;
use crate::offsets::{Ledger, Outcome};
use crate::retry::Backoff;
use crate::settings;

/// Wait between two tries of a record that the brokers refuse for a reason that a person must remove.
const REFUSED: Backoff = Backoff { attempts: u32::MAX, base: Duration::from_millis(500), max: Duration::from_secs(30) };

/// Most time for the producer to give back what it has, once that was given up.
const PURGE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the stage needs.
pub struct Setup {
    /// Broker and topics.
    pub kafka: settings::Kafka,
    /// Name of this worker, for dead letters.
    pub worker: String,
    /// What is finished. The stage ends when it is closed, empty, and everything is acknowledged.
    pub input: Receiver<Finished>,
    /// Cancelled at the deadline of a drain: what is not acknowledged then is given up, and read again by the next
    /// worker.
    pub give_up: CancellationToken,
    /// Cancelled by the stage when the producer has failed for good, so that the worker stops.
    pub failed: CancellationToken,
    /// Counts what the broker has, what it refuses, and how long that blocks the stage.
    pub metrics: Arc<Metrics>,
    /// How fast dead letters may be written.
    pub dead_letters: DeadLetters,
    /// What exactly-once delivery needs; at-least-once without.
    pub exactly_once: Option<ExactlyOnce>,
}

/// What exactly-once delivery needs.
#[derive(Debug)]
pub struct ExactlyOnce {
    /// The consumer's membership of its group.
    pub group: Membership,
    /// What is in hand, and may be committed.
    pub ledger: Ledger,
}

/// What became of everything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Records that the broker has acknowledged.
    pub published: usize,
    /// Records that were given up at the deadline.
    pub abandoned: usize,
}

/// A record under way.
struct Flight {
    finished: Finished,
    /// To a retry topic, if the output is worth it; a dead letter otherwise.
    retry: bool,
    /// As a pointer, or without its texts, since the broker refused it whole.
    pointer: bool,
    /// With the time of sending, since the topic refuses the request's.
    now: bool,
    /// To be sent while nothing else is under way, so that a refusal is about this record and not about its batch.
    alone: bool,
    /// When it was handed to the producer.
    sent: Option<Instant>,
}

/// What the producer's thread and the stage share.
struct Shared {
    metrics: Arc<Metrics>,
    /// Refused by the broker. As many as are under way at most.
    returned: Mutex<VecDeque<(Box<Flight>, NotDelivered)>>,
    under_way: AtomicUsize,
    published: AtomicUsize,
    /// Told after every delivery, good or bad.
    changed: Notify,
}

/// The producer's side of [`Shared`].
struct Acknowledge(Arc<Shared>);

impl Deliver for Acknowledge {
    type Tag = Flight;

    fn delivered(&self, flight: Box<Flight>, result: Result<(), NotDelivered>) {
        let shared = &self.0;
        match result {
            Ok(()) => {
                flight.count(&shared.metrics);
                shared.published.fetch_add(1, Ordering::Relaxed);
                flight.finished.resolve(Outcome::Published);
            }
            Err(failure) => {
                let mut returned = shared.returned.lock().unwrap_or_else(PoisonError::into_inner);
                returned.push_back((flight, failure));
            }
        }
        // After the rest, so that whoever sees nothing under way sees also what was returned.
        shared.under_way.fetch_sub(1, Ordering::Release);
        shared.changed.notify_one();
    }
}

/// Runs the stage. After `give_up` it goes on taking from the input, to give that up, too, until it is closed.
///
/// # Errors
/// The producer cannot be created, or has failed for good; in the latter case everything that was not acknowledged
/// was given up.
pub async fn run(mut setup: Setup) -> Result<Summary, Error> {
    if setup.dead_letters.per_minute > 0 {
        put_ceiling_before(&mut setup);
    }
    if let Some(exactly_once) = setup.exactly_once.take() {
        return exact::Publisher::new(setup, exactly_once).run().await;
    }
    let shared = Arc::new(Shared {
        metrics: setup.metrics.clone(),
        returned: Mutex::default(),
        under_way: AtomicUsize::new(0),
        published: AtomicUsize::new(0),
        changed: Notify::new(),
    });
    let producer = Producer::new(&setup.kafka, Acknowledge(shared.clone()))?;
    let publisher = Publisher {
        failures: Failures::new(setup.metrics.clone()),
        setup,
        producer,
        shared,
        waiting: VecDeque::new(),
        alone: false,
        stall: Stall::default(),
        abandoned: 0,
    };
    publisher.run().await
}

/// What the publisher takes comes past the ceiling on dead letters from now on.
fn put_ceiling_before(setup: &mut Setup) {
    let (output, input) = bounded(1);
    let before = Before {
        dead_letters: setup.dead_letters.clone(),
        kafka: setup.kafka.clone(),
        worker: setup.worker.clone(),
        input: std::mem::replace(&mut setup.input, input),
        output,
        give_up: setup.give_up.clone(),
    };
    // If it panics, the publisher finds its input closed and ends, and with it the worker.
    tokio::spawn(before.run());
}

/// A pause after refusals.
#[derive(Default)]
struct Stall {
    /// Nothing is sent before this time.
    until: Option<Instant>,
    /// Refusals since the last delivery.
    refusals: u32,
    /// Deliveries when the last refusal came.
    published: usize,
}

struct Publisher {
    setup: Setup,
    producer: Producer<Acknowledge>,
    shared: Arc<Shared>,
    failures: Failures,
    /// Taken from the input or refused, to be sent before more is taken.
    waiting: VecDeque<Box<Flight>>,
    /// A record is under way that must be alone.
    alone: bool,
    stall: Stall,
    abandoned: usize,
}

impl Publisher {
    async fn run(mut self) -> Result<Summary, Error> {
        let (give_up, input, shared) = (self.setup.give_up.clone(), self.setup.input.clone(), self.shared.clone());
        let metrics = shared.metrics.clone();
        let mut open = true;
        loop {
            // Read before the returned ones are collected: the last of them is returned before it stops being counted.
            let idle = self.under_way() == 0;
            self.collect_returned();
            if let Some(error) = self.producer.fatal() {
                return Err(self.fail(error).await);
            }
            self.send_waiting(Instant::now());
            if !open && idle && self.waiting.is_empty() && self.under_way() == 0 {
                return Ok(self.end().await);
            }
            let take = open && self.waiting.is_empty() && !self.alone;
            // The producer is full, or the brokers refuse a record.
            let blocked = (!self.waiting.is_empty() || self.alone).then(|| metrics.blocked(Stage::Publish));
            let stalled = self.stall.until.filter(|_| !self.waiting.is_empty());
            // Biased: the deadline first. Then the input: what came back is looked at in every turn anyway.
            tokio::select! {
                biased;
                () = give_up.cancelled() => {
                    drop(blocked);
                    return Ok(self.give_up().await);
                }
                taken = input.recv(), if take => match taken {
                    Ok(finished) => {
                        self.failures.note(&finished.value);
                        self.waiting.push_back(Box::new(Flight::new(finished)));
                    }
                    Err(_) => open = false,
                },
                () = shared.changed.notified() => {}
                () = tokio::time::sleep_until(stalled.unwrap_or_else(Instant::now).into()), if stalled.is_some() => {}
            }
        }
    }

    fn under_way(&self) -> usize {
        self.shared.under_way.load(Ordering::Acquire)
    }

    /// Sends what waits, as far as there is room.
    fn send_waiting(&mut self, now: Instant) {
        if self.stall.until.is_some_and(|until| now < until) {
            return;
        }
        self.stall.until = None;
        while let Some(mut flight) = self.waiting.pop_front() {
            self.alone &= self.under_way() > 0;
            if self.alone || (flight.alone && self.under_way() > 0) {
                self.waiting.push_front(flight);
                return;
            }
            flight.sent = Some(now);
            self.alone = flight.alone;
            let Err((why, flight)) = self.send(flight) else { continue };
            self.alone = false;
            match why {
                NotSent::QueueFull => {
                    self.waiting.push_front(flight);
                    return;
                }
                // librdkafka judges each record by itself.
                NotSent::Refused(NotDelivered { class: Class::TooLarge, reason }) => self.shorten(flight, reason),
                NotSent::Refused(failure) => {
                    self.refuse(flight, &failure);
                    return;
                }
            }
        }
        self.alone &= self.under_way() > 0;
    }

    fn send(&self, mut flight: Box<Flight>) -> Result<(), (NotSent, Box<Flight>)> {
        let rendered = flight.render(&self.setup.kafka, &self.setup.worker);
        // Before the call, since the acknowledgement may come before it returns.
        self.shared.under_way.fetch_add(1, Ordering::AcqRel);
        let sent = self.producer.send(rendered.record(), flight);
        if sent.is_err() {
            self.shared.under_way.fetch_sub(1, Ordering::AcqRel);
        }
        sent
    }

    /// Decides about what the brokers refused.
    fn collect_returned(&mut self) {
        let returned = std::mem::take(&mut *self.shared.returned.lock().unwrap_or_else(PoisonError::into_inner));
        let mut unconfirmed = 0;
        for (mut flight, failure) in returned {
            match failure.class {
                // A broker refuses a whole batch, so perhaps another record of it is too long.
                Class::TooLarge if !flight.alone => {
                    flight.alone = true;
                    self.waiting.push_back(flight);
                }
                Class::TooLarge => self.shorten(flight, failure.reason),
                Class::BadTimestamp if !flight.now => {
                    flight.now = true;
                    self.waiting.push_back(flight);
                }
                Class::Fatal => self.waiting.push_back(flight),
                // At least once: better twice than not at all.
                Class::Unconfirmed => {
                    unconfirmed += 1;
                    self.shared.metrics.publish_unconfirmed();
                    self.waiting.push_back(flight);
                }
                _ => self.refuse(flight, &failure),
            }
        }
        if unconfirmed > 0 {
            tracing::warn!(records = unconfirmed, "no broker has confirmed these records; they are sent once more");
        }
    }

    /// A record is too long: a caption becomes a dead letter, a dead letter becomes a pointer.
    fn shorten(&mut self, flight: Box<Flight>, reason: String) {
        match flight.shorten(&self.setup.kafka, &reason, &self.failures) {
            Ok(flight) => self.waiting.push_back(flight),
            // A person must raise the topic's limit.
            Err(flight) => self.refuse(flight, &NotDelivered { class: Class::TooLarge, reason }),
        }
    }

    /// A record is refused for a reason that a person must remove: it is tried again, and everything else waits.
    fn refuse(&mut self, flight: Box<Flight>, failure: &NotDelivered) {
        let now = Instant::now();
        self.shared.metrics.publish_refused();
        if self.stall.until.is_none_or(|until| until <= now) {
            let published = self.shared.published.load(Ordering::Relaxed);
            self.stall.refusals = if published > self.stall.published { 1 } else { self.stall.refusals + 1 };
            self.stall.published = published;
            let wait = REFUSED.wait(self.stall.refusals, None, now, None, fastrand::f64()).unwrap_or(REFUSED.max);
            self.stall.until = Some(now + wait.max(REFUSED.base / 2));
            let (topic, setting) = record::destination(&flight.finished.value, flight.retry, &self.setup.kafka);
            tracing::error!(
                topic,
                setting,
                reason = failure.reason,
                retry_in = ?wait,
                "the brokers refuse a record; nothing is published until they take it: {}",
                record::advice(failure.class)
            );
        }
        self.waiting.push_back(flight);
    }

    // --- the end

    async fn fail(self, error: Error) -> Error {
        tracing::error!(%error, "the producer has failed; what is not acknowledged is read again by the next worker");
        self.setup.failed.cancel();
        self.give_up().await;
        error
    }

    /// Gives up on everything that is not acknowledged, then on everything that still comes.
    async fn give_up(mut self) -> Summary {
        self.producer.purge();
        let shared = self.shared.clone();
        let purged = async {
            while shared.under_way.load(Ordering::Acquire) > 0 {
                shared.changed.notified().await;
            }
        };
        if tokio::time::timeout(PURGE_TIMEOUT, purged).await.is_err() {
            // They stay with librdkafka and are neither resolved nor lost.
            tracing::warn!(records = self.under_way(), "the producer does not give records back");
        }
        let returned = std::mem::take(&mut *self.shared.returned.lock().unwrap_or_else(PoisonError::into_inner));
        let returned = returned.into_iter().map(|(flight, _)| flight);
        for flight in returned.chain(std::mem::take(&mut self.waiting)) {
            flight.finished.abandon();
            self.abandoned += 1;
        }
        let input = self.setup.input.clone();
        while let Ok(finished) = input.recv().await {
            finished.abandon();
            self.abandoned += 1;
        }
        self.end().await
    }

    async fn end(self) -> Summary {
        let Self { producer, shared, abandoned, .. } = self;
        // It joins a thread. A panic there is logged by the panic hook, and nothing hangs on it any more.
        let _ = tokio::task::spawn_blocking(move || drop(producer)).await;
        Summary { published: shared.published.load(Ordering::Relaxed), abandoned }
    }
}

impl Flight {
    fn new(finished: Finished) -> Self {
        Self { finished, retry: true, pointer: false, now: false, alone: false, sent: None }
    }

    /// The record. Says also whether it goes to a retry topic.
    fn render<'a>(&mut self, kafka: &'a settings::Kafka, worker: &str) -> record::Rendered<'a> {
        let retry = if self.retry { record::render_retry(&self.finished.value, kafka, worker) } else { None };
        self.retry = retry.is_some();
        let mut rendered = retry.unwrap_or_else(|| record::render(&self.finished.value, self.pointer, kafka, worker));
        if self.now {
            rendered.timestamp_ms = None;
        }
        rendered
    }

    /// Counts the record once the brokers have it. Called on the producer's thread, too.
    fn count(&self, metrics: &Metrics) {
        metrics.stage(Stage::Publish, self.sent.map_or_else(Default::default, |sent| sent.elapsed()));
        match &self.finished.value {
            Output::Caption { record, message, device, .. } => {
                metrics.captioned(device, &record.model.id);
                if let Some(produced) = message.timestamp_ms {
                    metrics.end_to_end(Timestamp::now().as_millisecond() - produced);
                }
            }
            Output::Canary { record, .. } => metrics.canary(record.result),
            Output::FailedRow(_, failure) if self.retry => metrics.retried_later(failure.code),
            Output::FailedRow(_, failure) | Output::FailedMessage { failure, .. } => {
                metrics.dead_lettered(failure.code);
            }
        }
    }

    /// What is too long made shorter: a caption becomes a dead letter, a dead letter becomes a pointer, and the canary's record
    /// loses its texts. What was made shorter comes back as an error: key and headers alone are too long for the topic.
    fn shorten(
        mut self: Box<Self>,
        kafka: &settings::Kafka,
        reason: &str,
        failures: &Failures,
    ) -> Result<Box<Self>, Box<Self>> {
        self.alone = false;
        if self.pointer {
            return Err(self);
        }
        if self.retry {
            // A retry topic takes less than the topic of the dead letters.
            self.retry = false;
        } else if !matches!(self.finished.value, Output::Caption { .. }) {
            self.pointer = true;
        } else {
            self.finished = self.finished.map(|output| record::too_large(output, kafka, reason));
            failures.note(&self.finished.value);
        }
        Ok(self)
    }
}
