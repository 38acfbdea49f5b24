//! Exactly-once: outputs are held in memory and published in transactions, together with the offsets they answer.
//!
//! The ledger says up to where the outputs of a partition are in hand; that prefix goes into the next transaction. What
//! a transaction could not publish is sent again from memory, without captioning anything twice. Readers with
//! `isolation.level=read_committed` see each result once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::failures::Failures;
use super::transactor::{Batch, Ended, Transactor, Trouble};
use super::{ExactlyOnce, Flight, REFUSED, Setup, Summary, record};
use crate::disposition::Stage;
use crate::kafka::{Class, Error};
use crate::offsets::{Ledger, Outcome, Prefix, Reach, TopicPartition};

/// A transaction takes long when it takes longer than so many times its time-out: its steps have one each.
const OVERDUE: u32 = 4;

/// Outputs of one partition, by the offset of their message.
type Held = BTreeMap<i64, Vec<Flight>>;

pub(super) struct Publisher {
    setup: Setup,
    ledger: Ledger,
    failures: Failures,
    held: BTreeMap<TopicPartition, Held>,
    /// Outputs that came since a transaction was begun.
    fresh: usize,
    /// What the last transaction could not publish.
    again: Option<Batch>,
    /// `None` while a transaction is under way.
    transactor: Option<Transactor>,
    /// When the next transaction is due.
    next: Instant,
    /// When the transaction that is under way takes longer than all of its time-outs.
    overdue: Instant,
    refusals: u32,
    summary: Summary,
}

type Running = JoinHandle<(Transactor, Ended)>;

impl Publisher {
    pub(super) fn new(setup: Setup, ExactlyOnce { group, ledger }: ExactlyOnce) -> Self {
        let failures = Failures::new(setup.metrics.clone());
        Self {
            transactor: Some(Transactor::new(&setup, group, ledger.clone(), failures.clone())),
            ledger,
            failures,
            held: BTreeMap::new(),
            fresh: 0,
            again: None,
            next: Instant::now(),
            overdue: Instant::now(),
            refusals: 0,
            summary: Summary::default(),
            setup,
        }
    }

    pub(super) async fn run(mut self) -> Result<Summary, Error> {
        let (give_up, input) = (self.setup.give_up.clone(), self.setup.input.clone());
        let metrics = self.setup.metrics.clone();
        let mut open = true;
        let mut running = self.start(Transactor::prepare);
        loop {
            if running.is_none() {
                let now = Instant::now();
                if !open {
                    self.ledger.end();
                }
                // What is to be repeated keeps to its time; only new work may hurry.
                let hurry = self.again.is_none() && (!open || self.is_full() || self.ledger.is_urgent(Reach::Ready));
                let due = now >= self.next || hurry;
                let batch = if due { self.form() } else { None };
                if let Some(batch) = batch {
                    self.ledger.transacting(&batch.prefixes);
                    running = self.start(|transactor| transactor.run(batch));
                } else if !open && self.again.is_none() {
                    // Behind what is left here stands a message that was given up.
                    return Ok(self.end());
                } else if due {
                    self.next = now + self.setup.kafka.transaction_interval;
                }
            }
            let blocked = (self.refusals > 0).then(|| metrics.blocked(Stage::Publish));
            // Biased: the deadline first, then the end of a transaction, which makes room.
            tokio::select! {
                biased;
                () = give_up.cancelled() => {
                    drop(blocked);
                    self.finish(running).await;
                    return Ok(self.give_up().await);
                }
                ended = joined(&mut running), if running.is_some() => {
                    running = None;
                    drop(blocked);
                    if let Err(error) = self.settle(ended) {
                        tracing::error!(%error, "what is not published is read again by the next worker");
                        self.setup.failed.cancel();
                        self.give_up().await;
                        return Err(error);
                    }
                }
                taken = input.recv(), if open => match taken {
                    Ok(finished) => self.hold(Flight::new(finished)),
                    Err(_) => open = false,
                },
                () = self.ledger.urgent() => {}
                () = tokio::time::sleep_until(self.next.into()), if running.is_none() => {}
                () = tokio::time::sleep_until(self.overdue.into()), if running.is_some() => self.tell_overdue(),
            }
        }
    }

    fn start(&mut self, work: impl FnOnce(&mut Transactor) -> Ended + Send + 'static) -> Option<Running> {
        let mut transactor = self.transactor.take()?;
        self.overdue = Instant::now() + self.longest();
        Some(tokio::task::spawn_blocking(move || {
            let ended = work(&mut transactor);
            (transactor, ended)
        }))
    }

    /// What the steps of a transaction may take together.
    fn longest(&self) -> Duration {
        self.setup.kafka.transaction_timeout * OVERDUE
    }

    fn tell_overdue(&mut self) {
        self.overdue += self.longest();
        tracing::error!(
            transaction_timeout = ?self.setup.kafka.transaction_timeout,
            "a transaction takes several times kafka.transaction_timeout, and nothing is published meanwhile: look whether \
             the brokers are well. If they are, restart this worker: nothing is lost by that"
        );
    }

    fn hold(&mut self, mut flight: Flight) {
        self.failures.note(&flight.finished.value);
        let (partition, offset) = (flight.finished.partition().clone(), flight.finished.offset());
        flight.finished.ready();
        // What the image needed is not needed while its caption waits.
        flight.finished.release_image();
        self.held.entry(partition).or_default().entry(offset).or_default().push(flight);
        self.fresh += 1;
    }

    fn is_full(&self) -> bool {
        self.fresh >= self.setup.kafka.transaction_records
    }

    /// What the next transaction publishes, if there is anything.
    fn form(&mut self) -> Option<Batch> {
        if let Some(mut batch) = self.again.take() {
            discard(batch.without_foreign(&self.ledger));
            if !batch.prefixes.is_empty() {
                return Some(batch);
            }
        }
        self.fresh = 0;
        let prefixes = self.ledger.due(Reach::Ready);
        let flights = prefixes.iter().flat_map(|prefix| take(&mut self.held, prefix)).collect();
        let mut batch = Batch::new(prefixes, flights);
        discard(batch.without_foreign(&self.ledger));
        self.discard_foreign();
        (!batch.prefixes.is_empty()).then_some(batch)
    }

    /// Outputs of assignments that have ended are another worker's now.
    fn discard_foreign(&mut self) {
        for held in self.held.values_mut() {
            for flights in held.values_mut() {
                discard(flights.extract_if(.., |flight| !flight.finished.current()).collect());
            }
            held.retain(|_, flights| !flights.is_empty());
        }
        self.held.retain(|_, held| !held.is_empty());
    }

    fn settle(&mut self, (transactor, ended): (Transactor, Ended)) -> Result<(), Error> {
        self.transactor = Some(transactor);
        let now = Instant::now();
        self.next = now + self.setup.kafka.transaction_interval;
        match ended {
            Ended::Committed(batch) => {
                self.refusals = 0;
                self.resolve(batch);
            }
            Ended::Again(batch, trouble) => {
                self.wait(&batch, &trouble, now);
                self.again = Some(batch);
            }
            Ended::Failed(batch, error) => {
                self.again = Some(batch);
                return Err(error);
            }
        }
        Ok(())
    }

    fn resolve(&mut self, batch: Batch) {
        for flight in batch.flights {
            self.summary.published += 1;
            flight.count(&self.setup.metrics);
            flight.finished.resolve(Outcome::Published);
        }
        // Behind the watermarks, so that nobody sees offsets committed that seem to be open.
        for prefix in &batch.prefixes {
            self.ledger.transacted(prefix);
        }
    }

    /// Sets the time of the next try, and says why there is one.
    fn wait(&mut self, batch: &Batch, trouble: &Trouble, now: Instant) {
        let Trouble { class, reason, refused, mended } = trouble;
        if *mended || *class == Class::Rebalancing {
            tracing::info!(reason, records = batch.flights.len(), "a transaction was aborted and is tried again");
            // A group needs a moment to settle.
            self.next = if *mended { now } else { now + REFUSED.base / 2 };
            return;
        }
        self.refusals += 1;
        self.setup.metrics.publish_refused();
        let wait = REFUSED.wait(self.refusals, None, now, None, fastrand::f64()).unwrap_or(REFUSED.max);
        self.next = now + wait.max(REFUSED.base / 2);
        let flight = refused.and_then(|index| batch.flights.get(index));
        let (topic, setting) = flight
            .map_or(("", ""), |flight| record::destination(&flight.finished.value, flight.retry, &self.setup.kafka));
        tracing::error!(
            topic,
            setting,
            reason,
            retry_in = ?wait,
            "a transaction failed and is tried again from memory; nothing is published meanwhile: {}",
            advice(*class)
        );
    }

    // --- the end

    /// Waits for the transaction that is under way: its end decides what the next worker reads. Then takes back that this
    /// worker did not end in order.
    async fn finish(&mut self, mut running: Option<Running>) {
        let deadline = tokio::time::Instant::now() + super::PURGE_TIMEOUT;
        if running.is_some() {
            let Ok(ended) = tokio::time::timeout_at(deadline, joined(&mut running)).await else {
                tracing::warn!(
                    "the brokers do not say how the last transaction ended; the next worker reads what it did not commit"
                );
                return abandon_later(running);
            };
            // An error is told by what is given up next.
            let _ = self.settle(ended);
        }
        if self.again.is_some() {
            // What may not be decided yet must not be overtaken.
            return;
        }
        self.ledger.end();
        let notes = Batch::new(self.ledger.amended(), Vec::new());
        if notes.prefixes.is_empty() {
            return;
        }
        let mut running = self.start(|transactor| transactor.run(notes));
        let ended = tokio::time::timeout_at(deadline, joined(&mut running)).await;
        if !matches!(ended, Ok((_, Ended::Committed(_)))) {
            tracing::warn!("the next worker takes this one's end for a crash");
        }
    }

    /// Gives up on everything that is not published, then on everything that still comes.
    async fn give_up(mut self) -> Summary {
        let input = self.setup.input.clone();
        self.abandon_held();
        while let Ok(finished) = input.recv().await {
            finished.abandon();
            self.summary.abandoned += 1;
        }
        self.end()
    }

    fn abandon_held(&mut self) {
        self.discard_foreign();
        let held = std::mem::take(&mut self.held).into_values().flat_map(BTreeMap::into_values).flatten();
        let mut again = self.again.take().unwrap_or_default();
        discard(again.without_foreign(&self.ledger));
        for flight in held.chain(again.flights) {
            flight.finished.abandon();
            self.summary.abandoned += 1;
        }
    }

    fn end(mut self) -> Summary {
        self.abandon_held();
        self.summary
    }
}

/// The end of the transaction that is under way.
///
/// # Panics
/// When its thread panicked: then nobody knows what is published, and the worker must end.
async fn joined(running: &mut Option<Running>) -> (Transactor, Ended) {
    let Some(running) = running else { return std::future::pending().await };
    match running.await {
        Ok(ended) => ended,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Leaves a transaction to itself that does not end.
fn abandon_later(mut running: Option<Running>) {
    tokio::spawn(async move {
        let (_, ended) = joined(&mut running).await;
        ended.into_batch().flights.into_iter().for_each(|flight| drop(flight.finished.abandon()));
    });
}

/// The outputs that a prefix covers.
fn take(held: &mut BTreeMap<TopicPartition, Held>, prefix: &Prefix) -> Vec<Flight> {
    let Some(all) = held.get_mut(&prefix.partition) else { return Vec::new() };
    let behind = all.split_off(&prefix.end.offset);
    std::mem::replace(all, behind).into_values().flatten().collect()
}

fn discard(flights: Vec<Flight>) {
    if !flights.is_empty() {
        tracing::debug!(records = flights.len(), "results of partitions that went to other workers are discarded");
    }
    for flight in flights {
        flight.finished.resolve(Outcome::Discarded);
    }
}

fn advice(class: Class) -> &'static str {
    match class {
        Class::Unreachable | Class::Other => "it goes on by itself once the brokers answer",
        _ => record::advice(class),
    }
}
