//! One transaction after another: outputs and the offsets that they answer, on a thread that may block.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::failures::Failures;
use super::{Flight, Setup};
use crate::kafka::{
    Class, Deliver, Error, Membership, Next, NotDelivered, NotSent, Producer, TransactionError, unique_transactional_id,
};
use crate::metrics::Metrics;
use crate::offsets::{Committed, Ledger, Prefix, TopicPartition};
use crate::settings::Kafka;

/// The longest wait for one answer of the brokers; the whole step may take `kafka.transaction_timeout`.
const PATIENCE: Duration = Duration::from_secs(5);

/// Wait for room in librdkafka's queue.
const FULL_QUEUE: Duration = Duration::from_millis(100);

/// What one transaction publishes.
#[derive(Default)]
pub(super) struct Batch {
    /// Offsets, each one behind the last message whose outputs are here; or where the group is already, with another
    /// note.
    pub(super) prefixes: Vec<Prefix>,
    pub(super) flights: Vec<Flight>,
    /// A commit of this very batch was asked for, and how that ended is not known.
    in_doubt: bool,
}

/// How a transaction ended.
pub(super) enum Ended {
    Committed(Batch),
    /// Nothing of it is visible, or that is to be found out: the same once more.
    Again(Batch, Trouble),
    /// It cannot be published without a person's help.
    Failed(Batch, Error),
}

/// Why a transaction is tried again.
pub(super) struct Trouble {
    pub(super) class: Class,
    pub(super) reason: String,
    /// The flight that the brokers refused, for the name of its topic.
    pub(super) refused: Option<usize>,
    /// The next try will go another way, so that it need not wait.
    pub(super) mended: bool,
}

enum Stop {
    Again(Trouble),
    Failed(Error),
}

/// Owns the producer of transactions.
pub(super) struct Transactor {
    kafka: Kafka,
    worker: String,
    group: Membership,
    ledger: Ledger,
    metrics: Arc<Metrics>,
    failures: Failures,
    transactional_id: String,
    producer: Option<Producer<Reports>>,
    /// When the transaction was begun that is under way.
    began: Instant,
    reports: Reports,
}

/// What was not delivered, each with its place in the batch. As many as the batch has at most.
#[derive(Clone, Default)]
struct Reports(Arc<Mutex<Vec<(usize, NotDelivered)>>>);

impl Deliver for Reports {
    type Tag = usize;

    fn delivered(&self, index: Box<usize>, result: Result<(), NotDelivered>) {
        if let Err(failure) = result {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push((*index, failure));
        }
    }
}

impl Reports {
    fn take(&self) -> Vec<(usize, NotDelivered)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_empty(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

impl Batch {
    pub(super) fn new(prefixes: Vec<Prefix>, flights: Vec<Flight>) -> Self {
        Self { prefixes, flights, in_doubt: false }
    }

    /// Takes out what belongs to assignments that have ended.
    pub(super) fn without_foreign(&mut self, ledger: &Ledger) -> Vec<Flight> {
        self.prefixes.retain(|prefix| ledger.holds(prefix));
        let (ours, foreign) = std::mem::take(&mut self.flights).into_iter().partition(|f| f.finished.current());
        self.flights = ours;
        foreign
    }

    fn offsets(&self) -> Vec<(TopicPartition, Committed)> {
        self.prefixes.iter().map(|prefix| (prefix.partition.clone(), prefix.end)).collect()
    }
}

impl Transactor {
    pub(super) fn new(setup: &Setup, group: Membership, ledger: Ledger, failures: Failures) -> Self {
        Self {
            kafka: setup.kafka.clone(),
            worker: setup.worker.clone(),
            group,
            ledger,
            metrics: setup.metrics.clone(),
            failures,
            transactional_id: setup.kafka.transactional_id.clone().unwrap_or_else(unique_transactional_id),
            producer: None,
            began: Instant::now(),
            reports: Reports::default(),
        }
    }

    /// Publishes a batch. Blocks, for a few times `kafka.transaction_timeout` at most.
    pub(super) fn run(&mut self, mut batch: Batch) -> Ended {
        let began = Instant::now();
        let result = self.attempt(&mut batch);
        if result.is_ok() {
            self.metrics.transaction(began.elapsed());
        }
        Ended::of(batch, result)
    }

    /// Makes the producer ready, so that what is wrong is known before the first message.
    pub(super) fn prepare(&mut self) -> Ended {
        let result = self.initialise();
        Ended::of(Batch::default(), result)
    }

    fn attempt(&mut self, batch: &mut Batch) -> Result<(), Stop> {
        self.initialise()?;
        if batch.in_doubt && self.is_committed(batch)? {
            return Ok(());
        }
        batch.in_doubt = false;
        self.reports.take();
        self.began = Instant::now();
        self.step(batch, Producer::begin_transaction)?;
        self.send_all(batch)?;
        self.send_offsets(batch)?;
        self.commit(batch)
    }

    /// A producer that is ready to begin a transaction.
    fn initialise(&mut self) -> Result<(), Stop> {
        if self.producer.is_some() {
            return Ok(());
        }
        let id = &self.transactional_id;
        let producer = Producer::transactional(&self.kafka, id, self.reports.clone()).map_err(Stop::Failed)?;
        // Also ends, one way or the other, what an earlier producer of this id left undecided.
        let deadline = Instant::now() + self.kafka.transaction_timeout;
        while let Err(error) = producer.init_transactions(PATIENCE) {
            match error.next {
                Next::Stop => return Err(Stop::Failed(error.stopping(&self.kafka))),
                Next::Again if Instant::now() < deadline => {}
                _ => return Err(Stop::Again(Trouble::of(&error))),
            }
        }
        tracing::info!(transactional_id = id, "ready for transactions");
        self.producer = Some(producer);
        Ok(())
    }

    /// How the last commit ended, as the group's offsets tell: they moved together with the records, or not at all.
    fn is_committed(&self, batch: &Batch) -> Result<bool, Stop> {
        let partitions: Vec<_> = batch.prefixes.iter().map(|prefix| prefix.partition.clone()).collect();
        if partitions.is_empty() {
            return Ok(false);
        }
        let committed = self.group.committed(&partitions).map_err(|error| {
            let reason = format!("whether the last transaction was committed is not known yet: {error}");
            Stop::Again(Trouble { class: Class::Unreachable, reason, refused: None, mended: false })
        })?;
        let committed: BTreeMap<_, _> = committed.into_iter().collect();
        let done = batch.prefixes.iter().all(|prefix| {
            let found = committed.get(&prefix.partition).copied().flatten();
            // Offsets that are the same say nothing where only the note was to change.
            found.is_some_and(|found| found.offset > prefix.end.offset || found == prefix.end)
        });
        tracing::info!(committed = done, "how the undecided transaction ended");
        Ok(done)
    }

    fn send_all(&mut self, batch: &mut Batch) -> Result<(), Stop> {
        // A record that may be too long goes alone: the brokers refuse a whole batch for one of its records.
        let (alone, together): (Vec<usize>, Vec<usize>) =
            (0..batch.flights.len()).partition(|index| batch.flights[*index].alone);
        for index in together {
            self.send(batch, index)?;
        }
        for index in alone {
            self.flush();
            if !self.reports.is_empty() {
                // The transaction has failed; what is sent now would only be turned down.
                return Ok(());
            }
            self.send(batch, index)?;
            self.flush();
        }
        Ok(())
    }

    fn send(&mut self, batch: &mut Batch, index: usize) -> Result<(), Stop> {
        let deadline = Instant::now() + self.kafka.transaction_timeout;
        loop {
            let flight = &mut batch.flights[index];
            flight.sent.get_or_insert_with(Instant::now);
            let rendered = flight.render(&self.kafka, &self.worker);
            let Some(producer) = &self.producer else { return Err(Stop::without_producer()) };
            let Err((why, _)) = producer.send(rendered.record(), Box::new(index)) else { return Ok(()) };
            match why {
                NotSent::QueueFull if Instant::now() < deadline => drop(producer.flush(FULL_QUEUE)),
                NotSent::QueueFull => {
                    return Err(self.abort(batch, Trouble::new(Class::Unreachable, "the brokers take no records")));
                }
                NotSent::Refused(failure) => {
                    // librdkafka judges each record by itself.
                    flight.alone |= failure.class == Class::TooLarge;
                    self.reports.delivered(Box::new(index), Err(failure));
                    return Err(self.abort(batch, Trouble::new(Class::Other, "a record was refused")));
                }
            }
        }
    }

    /// Waits until it is known what became of every record, for as long as the transaction may last.
    fn flush(&self) -> bool {
        self.producer.as_ref().is_some_and(|producer| producer.flush(self.kafka.transaction_timeout))
    }

    fn send_offsets(&mut self, batch: &mut Batch) -> Result<(), Stop> {
        let Some(members) = self.group.split(&batch.offsets()) else {
            return Err(self.abort(batch, Trouble::new(Class::Rebalancing, "the consumer has ended")));
        };
        // After the metadata was taken, see there.
        if !batch.prefixes.iter().all(|prefix| self.ledger.holds(prefix)) {
            let trouble = Trouble::new(Class::Rebalancing, "partitions went to another worker meanwhile");
            return Err(self.abort(batch, trouble));
        }
        for (member, offsets) in members {
            self.step(batch, |producer| producer.send_offsets(&offsets, &member, PATIENCE))?;
        }
        Ok(())
    }

    fn commit(&mut self, batch: &mut Batch) -> Result<(), Stop> {
        // Not left to the commit, which would take for written what no broker has confirmed.
        let settled = self.reports.is_empty() && self.flush();
        if !self.reports.is_empty() {
            return Err(self.abort(batch, Trouble::new(Class::Other, "a record was refused")));
        }
        if !settled {
            return Err(self.abort(batch, Trouble::new(Class::Unreachable, "the brokers do not confirm the records")));
        }
        batch.in_doubt = true;
        self.step(batch, |producer| producer.commit_transaction(PATIENCE))?;
        batch.in_doubt = false;
        Ok(())
    }

    /// Takes a step, again and again while the brokers have not decided, and does what its error asks for.
    fn step(
        &mut self,
        batch: &mut Batch,
        step: impl Fn(&Producer<Reports>) -> Result<(), TransactionError>,
    ) -> Result<(), Stop> {
        let deadline = Instant::now() + self.kafka.transaction_timeout;
        loop {
            let Some(producer) = &self.producer else { return Err(Stop::without_producer()) };
            let Err(error) = step(producer) else { return Ok(()) };
            match error.next {
                Next::Again if Instant::now() < deadline => {
                    tracing::debug!(%error, "a step of a transaction takes long");
                }
                Next::Abort => return Err(self.abort(batch, Trouble::of(&error))),
                _ => return Err(self.replace(batch, &error)),
            }
        }
    }

    /// Aborts, so that nothing of the batch is ever visible, and mends records that were too long.
    fn abort(&mut self, batch: &mut Batch, mut trouble: Trouble) -> Stop {
        self.metrics.transaction_aborted();
        let deadline = Instant::now() + self.kafka.transaction_timeout;
        while let Some(producer) = &self.producer {
            match producer.abort_transaction(PATIENCE) {
                Ok(()) => break,
                Err(error) if error.next == Next::Again && Instant::now() < deadline => {}
                Err(error) => return self.replace(batch, &error),
            }
        }
        self.mend(batch, &mut trouble);
        if trouble.mended {
            // What the brokers refused has used up sequence numbers of this producer: they would refuse what it sends next.
            self.producer = None;
        }
        Stop::Again(trouble)
    }

    /// Looks at what was refused: what is too long is sent alone, and what was alone is shortened.
    fn mend(&self, batch: &mut Batch, trouble: &mut Trouble) {
        let refused: BTreeMap<_, _> = self.reports.take().into_iter().collect();
        let flights = std::mem::take(&mut batch.flights).into_iter().enumerate();
        batch.flights = flights
            .map(|(index, mut flight)| {
                let Some(NotDelivered { class, reason }) = refused.get(&index) else { return flight };
                match class {
                    Class::Purged | Class::TransactionOver => flight,
                    Class::Unconfirmed => {
                        self.metrics.publish_unconfirmed();
                        trouble.mended = true;
                        trouble.reason.clone_from(reason);
                        flight
                    }
                    Class::BadTimestamp if !flight.now => {
                        trouble.mended = true;
                        flight.now = true;
                        flight
                    }
                    Class::TooLarge if !flight.alone => {
                        trouble.mended = true;
                        flight.alone = true;
                        flight
                    }
                    Class::TooLarge => match Box::new(flight).shorten(&self.kafka, reason, &self.failures) {
                        Ok(shorter) => {
                            trouble.mended = true;
                            *shorter
                        }
                        Err(flight) => {
                            trouble.refuse(index, *class, reason);
                            *flight
                        }
                    },
                    _ => {
                        trouble.refuse(index, *class, reason);
                        flight
                    }
                }
            })
            .collect();
    }

    /// Drops the producer. The next one ends what this one left undecided.
    fn replace(&mut self, batch: &mut Batch, error: &TransactionError) -> Stop {
        self.producer = None;
        self.reports.take();
        let mut trouble = Trouble::of(error);
        match error.next {
            Next::Stop => return Stop::Failed(error.stopping(&self.kafka)),
            Next::Fenced => {
                self.metrics.transaction_fenced();
                // The brokers themselves fence who takes longer than the time-out; another producer of this id would
                // fence the next one, too.
                let late = self.began.elapsed() >= self.kafka.transaction_timeout;
                if self.kafka.transactional_id.is_some() && !late {
                    return Stop::Failed(error.stopping(&self.kafka));
                }
                trouble.mended = true;
            }
            _ => {}
        }
        tracing::warn!(%error, undecided = batch.in_doubt, "the producer of transactions is replaced");
        Stop::Again(trouble)
    }
}

impl Stop {
    /// Every step begins with a producer; without one nothing may pass for published.
    fn without_producer() -> Self {
        Self::Again(Trouble::new(Class::Other, "the producer is gone"))
    }
}

impl Ended {
    fn of(batch: Batch, result: Result<(), Stop>) -> Self {
        match result {
            Ok(()) => Self::Committed(batch),
            Err(Stop::Again(trouble)) => Self::Again(batch, trouble),
            Err(Stop::Failed(error)) => Self::Failed(batch, error),
        }
    }

    pub(super) fn into_batch(self) -> Batch {
        match self {
            Self::Committed(batch) | Self::Again(batch, _) | Self::Failed(batch, _) => batch,
        }
    }
}

impl Trouble {
    fn new(class: Class, reason: &str) -> Self {
        Self { class, reason: reason.into(), refused: None, mended: false }
    }

    fn of(error: &TransactionError) -> Self {
        Self { class: error.class, reason: error.to_string(), refused: None, mended: false }
    }

    fn refuse(&mut self, index: usize, class: Class, reason: &str) {
        *self = Self { class, reason: reason.into(), refused: Some(index), mended: false };
    }
}

#[cfg(test)]
mod tests;
