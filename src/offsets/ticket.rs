//! The promise that every consumed message carries.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::{Ledger, Lost, Mark, Outcome, TopicPartition};

/// What the tickets of one message share.
#[derive(Debug)]
pub(super) struct Shared {
    ledger: Ledger,
    pub(super) partition: TopicPartition,
    pub(super) epoch: u64,
    pub(super) offset: i64,
    /// Tickets of this message that are not resolved; the last one closes it.
    parts: AtomicUsize,
    /// Tickets of this message that are not ready; the last one makes the message ready.
    unready: AtomicUsize,
    /// Whether a ticket of this message was dropped and reported: once is enough, however many rows it has.
    lost: AtomicBool,
}

/// The promise that a consumed message, or one row of it, ends as something the broker has acknowledged.
///
/// Resolve it exactly once. Dropping it is recorded as [`Lost`].
#[derive(Debug)]
#[must_use = "a ticket that is dropped is a lost message"]
pub struct Ticket {
    message: Arc<Shared>,
    ready: bool,
    done: bool,
}

impl Ticket {
    /// The only ticket of a message so far.
    pub(super) fn new(ledger: Ledger, partition: TopicPartition, epoch: u64, offset: i64) -> Self {
        let message = Shared {
            ledger,
            partition,
            epoch,
            offset,
            parts: AtomicUsize::new(1),
            unready: AtomicUsize::new(1),
            lost: AtomicBool::new(false),
        };
        Self { message: Arc::new(message), ready: false, done: false }
    }

    /// Keeps the promise. The message closes when every row's ticket is resolved.
    pub fn resolve(mut self, _outcome: Outcome) {
        self.done = true;
        // Only siblings can be waited for; the last part closes the message anyway.
        if self.message.parts.load(Ordering::Acquire) > 1 {
            self.ready();
        }
        if self.message.parts.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.message.ledger.lock().close(&self.message);
        }
    }

    /// Says that what this ticket promises is in hand and will be published in a transaction, which commits the offset
    /// with it. Resolve the ticket when the transaction is committed.
    pub fn ready(&mut self) {
        if self.ready {
            return;
        }
        self.ready = true;
        if self.message.unready.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(partition) = self.message.ledger.lock().current(&self.message)
        {
            partition.mark(self.message.offset, Mark::Ready);
        }
    }

    /// Whether the partition is still assigned as it was when the message was consumed. Otherwise another worker has
    /// the message now, and what became of it here must not be published.
    pub fn current(&self) -> bool {
        self.message.ledger.lock().current(&self.message).is_some()
    }

    /// Gives up on the promise on purpose: at the deadline of a drain. The offset stays uncommitted, the message counts
    /// as open, and the next worker reads it again. Unlike a drop, this is not reported as [`Lost`].
    pub fn abandon(mut self) {
        self.done = true;
    }

    /// More tickets of the message are about to be made.
    fn add(&self, more: usize) {
        self.message.parts.fetch_add(more, Ordering::AcqRel);
        if !self.ready {
            self.message.unready.fetch_add(more, Ordering::AcqRel);
        }
    }

    /// Two tickets; the message closes when both are resolved.
    pub fn fork(self) -> [Ticket; 2] {
        self.add(1);
        let second = Ticket { message: self.message.clone(), ready: self.ready, done: false };
        [self, second]
    }

    /// One ticket for each of `rows` rows (at least one); the message closes when all of them are resolved.
    pub fn split(mut self, rows: usize) -> Vec<Ticket> {
        let rows = rows.max(1);
        self.done = true;
        self.add(rows - 1);
        (0..rows).map(|_| Ticket { message: self.message.clone(), ready: self.ready, done: false }).collect()
    }

    /// Partition of the message.
    pub fn partition(&self) -> &TopicPartition {
        &self.message.partition
    }

    /// Offset of the message.
    pub fn offset(&self) -> i64 {
        self.message.offset
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // The part stays open, so that no sibling can close the message and move the watermark past it.
        if !self.done {
            let mut books = self.message.ledger.lock();
            if let Some(partition) = books.current(&self.message)
                && !self.message.lost.swap(true, Ordering::Relaxed)
            {
                partition.standing.lose();
                let lost = Lost { partition: self.message.partition.clone(), offset: self.message.offset };
                books.lost.push_back(lost);
            }
        }
    }
}
