//! Publish: captions and dead letters to Kafka. A ticket is resolved when the broker has acknowledged its record.
//!
//! Nothing is dropped. A record that cannot be delivered stalls the stage: nothing more is taken from the input, which
//! is bounded, so that the whole flow waits. A record that is too long becomes a dead letter, and a dead letter that is
//! too long becomes a pointer.

mod record;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_channel::Receiver;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Finished, Output};
use crate::disposition::Code;
use crate::kafka::{Class, Deliver, Error, NotDelivered, NotSent, Producer};
use crate::offsets::Outcome;
use crate::retry::Backoff;
use crate::settings;

/// Wait between two tries of a record that the brokers refuse for a reason that a person must remove.
const REFUSED: Backoff = Backoff { attempts: u32::MAX, base: Duration::from_millis(500), max: Duration::from_secs(30) };

/// Most time for the producer to give back what it has, once that was given up.
const PURGE_TIMEOUT: Duration = Duration::from_secs(5);

/// What happens to records, for metrics. Called on the producer's thread and on the stage's: it must be quick.
pub trait Observer: Send + Sync {
    /// The broker has the record of `output`; `code` is set for dead letters. `took` is the time since it was sent.
    fn delivered(&self, output: &Output, code: Option<Code>, took: Duration);
    /// A record was refused and is tried again; the stage waits.
    fn refused(&self, class: Class);
    /// A caption was too long and becomes a dead letter.
    fn too_large(&self);
}

impl Observer for () {
    fn delivered(&self, _: &Output, _: Option<Code>, _: Duration) {}
    fn refused(&self, _: Class) {}
    fn too_large(&self) {}
}

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
    /// Who counts.
    pub observer: Arc<dyn Observer>,
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
    /// As a pointer, since the broker refused it whole.
    pointer: bool,
    /// With the time of sending, since the topic refuses the request's.
    now: bool,
    /// To be sent while nothing else is under way, so that a refusal is about this record and not about its batch.
    alone: bool,
    sent: Instant,
}

/// What the producer's thread and the stage share.
struct Shared {
    observer: Arc<dyn Observer>,
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
                let output = &flight.finished.value;
                shared.observer.delivered(output, record::code(output), flight.sent.elapsed());
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
pub async fn run(setup: Setup) -> Result<Summary, Error> {
    let shared = Arc::new(Shared {
        observer: setup.observer.clone(),
        returned: Mutex::default(),
        under_way: AtomicUsize::new(0),
        published: AtomicUsize::new(0),
        changed: Notify::new(),
    });
    let producer = Producer::new(&setup.kafka, Acknowledge(shared.clone()))?;
    let publisher = Publisher {
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
            let stalled = self.stall.until.filter(|_| !self.waiting.is_empty());
            // Biased: the deadline first. Then the input: what came back is looked at in every turn anyway.
            tokio::select! {
                biased;
                () = give_up.cancelled() => return Ok(self.give_up().await),
                taken = input.recv(), if take => match taken {
                    Ok(finished) => self.waiting.push_back(Box::new(Flight::new(finished))),
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
            flight.sent = now;
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

    fn send(&self, flight: Box<Flight>) -> Result<(), (NotSent, Box<Flight>)> {
        let mut rendered =
            record::render(&flight.finished.value, flight.pointer, &self.setup.kafka, &self.setup.worker);
        if flight.now {
            rendered.timestamp_ms = None;
        }
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
                _ => self.refuse(flight, &failure),
            }
        }
    }

    /// A record is too long: a caption becomes a dead letter, a dead letter becomes a pointer.
    fn shorten(&mut self, mut flight: Box<Flight>, reason: String) {
        flight.alone = false;
        if flight.pointer {
            // Key and headers alone are too long for the topic; a person must raise its limit.
            self.refuse(flight, &NotDelivered { class: Class::TooLarge, reason });
            return;
        }
        if record::code(&flight.finished.value).is_some() {
            flight.pointer = true;
        } else {
            self.shared.observer.too_large();
            let topic = &self.setup.kafka.captions_topic;
            flight.finished = flight.finished.map(|output| record::too_large(output, topic, &reason));
        }
        self.waiting.push_back(flight);
    }

    /// A record is refused for a reason that a person must remove: it is tried again, and everything else waits.
    fn refuse(&mut self, flight: Box<Flight>, failure: &NotDelivered) {
        let now = Instant::now();
        self.shared.observer.refused(failure.class);
        if self.stall.until.is_none_or(|until| until <= now) {
            let published = self.shared.published.load(Ordering::Relaxed);
            self.stall.refusals = if published > self.stall.published { 1 } else { self.stall.refusals + 1 };
            self.stall.published = published;
            let wait = REFUSED.wait(self.stall.refusals, None, now, None, fastrand::f64()).unwrap_or(REFUSED.max);
            self.stall.until = Some(now + wait.max(REFUSED.base / 2));
            let (topic, setting) = record::destination(&flight.finished.value, &self.setup.kafka);
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
        Self { finished, pointer: false, now: false, alone: false, sent: Instant::now() }
    }
}
