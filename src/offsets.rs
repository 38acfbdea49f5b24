//! Tickets and the ledger: which offsets of each partition are resolved, and up to where they may be committed.
//!
//! Work finishes out of order and offsets are sparse. The watermark of a partition is the first offset that was
//! seen and is not resolved; only what lies before it is ever committed.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A partition of a topic.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicPartition {
    /// Topic.
    pub topic: Arc<str>,
    /// Partition.
    pub partition: i32,
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.partition)
    }
}

/// How a ticket ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The broker has acknowledged everything the message led to: captions and dead letters.
    Published,
    /// The message asked for nothing (a tombstone); there is nothing to publish.
    Skipped,
    /// The message belongs to an earlier assignment: another worker has it now, and nothing was published here.
    Discarded,
}

/// A ticket that was dropped without an outcome: a bug, named with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// Partition of the message.
    pub partition: TopicPartition,
    /// Its offset, which will never be committed past.
    pub offset: i64,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the message at {}/{} was dropped without a caption or a dead letter; its offset will not be \
             committed, and the next worker reads it again. This is a bug in blipstream",
            self.partition, self.offset
        )
    }
}

/// Where a partition stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The offset to commit: the first one seen and not resolved, or the one behind the newest resolved.
    pub watermark: i64,
    /// The first offset seen that is neither resolved nor ready, or the one behind the newest: what a transaction may
    /// commit together with the outputs of the messages before it.
    pub ready: i64,
    /// Offsets between the watermark and the newest consumed one, both included.
    pub span: u64,
    /// Messages seen and not resolved.
    pub open: usize,
}

/// What a transaction may commit of a partition: everything before `end`, as long as the assignment lasts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefix {
    /// The partition.
    pub partition: TopicPartition,
    /// Which of its assignments.
    pub epoch: u64,
    /// The offset to commit, see [`Position::ready`].
    pub end: i64,
}

/// The ledger of all partitions this worker owns. Cheap to clone; every clone is the same ledger.
#[derive(Debug, Clone, Default)]
pub struct Ledger(Arc<Mutex<Books>>);

#[derive(Debug, Default)]
struct Books {
    epoch: u64,
    partitions: BTreeMap<TopicPartition, Partition>,
    lost: VecDeque<Lost>,
    /// Messages under way, those of earlier assignments included.
    open: usize,
}

/// How far a message has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// Under way.
    Open,
    /// Its outputs are in hand, and not published yet.
    Ready,
    Resolved,
}

#[derive(Debug)]
struct Partition {
    epoch: u64,
    /// Seen offsets from the watermark on, in order. The front one is never resolved.
    seen: VecDeque<(i64, Mark)>,
    /// How many of `seen`, from the front on, are not open: where the first open one stands.
    ready: usize,
    /// One behind the newest offset seen; the watermark when nothing is open.
    next: Option<i64>,
    /// Offset that the group has, with exactly-once delivery: as found, then as transactions of ours have committed it.
    transacted: Option<i64>,
    /// Unresolved ones among `seen`.
    open: usize,
}

impl Ledger {
    /// An empty ledger.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        // The books are changed by code that cannot panic half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a new assignment of a partition; tickets of an earlier one no longer count.
    pub fn assign(&self, partition: TopicPartition) {
        let mut books = self.lock();
        books.epoch += 1;
        let epoch = books.epoch;
        books.partitions.insert(
            partition,
            Partition { epoch, seen: VecDeque::new(), ready: 0, next: None, transacted: None, open: 0 },
        );
    }

    /// Ends the assignment of a partition.
    pub fn revoke(&self, partition: &TopicPartition) {
        self.lock().partitions.remove(partition);
    }

    /// A ticket for a consumed message, or `None` where it must not be worked on: the partition is not ours, or the
    /// offset was seen already (a seek delivers messages again).
    pub fn open(&self, partition: &TopicPartition, offset: i64) -> Option<Ticket> {
        let mut books = self.lock();
        let entry = books.partitions.get_mut(partition)?;
        if entry.next.is_some_and(|next| offset < next) {
            return None;
        }
        entry.seen.push_back((offset, Mark::Open));
        entry.next = Some(offset + 1);
        entry.open += 1;
        let epoch = entry.epoch;
        books.open += 1;
        let message = Shared {
            ledger: self.clone(),
            partition: partition.clone(),
            epoch,
            offset,
            parts: AtomicUsize::new(1),
            unready: AtomicUsize::new(1),
            lost: AtomicBool::new(false),
        };
        Some(Ticket { message: Arc::new(message), ready: false, done: false })
    }

    /// Where a partition stands; `None` before its first message and after its revocation.
    pub fn position(&self, partition: &TopicPartition) -> Option<Position> {
        self.lock().partitions.get(partition).and_then(Partition::position)
    }

    /// Where every owned partition stands.
    pub fn positions(&self) -> Vec<(TopicPartition, Position)> {
        let books = self.lock();
        books.partitions.iter().filter_map(|(tp, p)| Some((tp.clone(), p.position()?))).collect()
    }

    /// What a transaction may commit, of every partition where that is more than the last one did.
    pub fn prefixes(&self) -> Vec<Prefix> {
        let books = self.lock();
        let prefix = |(partition, state): (&TopicPartition, &Partition)| {
            let end = state.position()?.ready;
            let more = state.transacted.is_none_or(|transacted| end > transacted);
            more.then(|| Prefix { partition: partition.clone(), epoch: state.epoch, end })
        };
        books.partitions.iter().filter_map(prefix).collect()
    }

    /// Whether the assignment of a prefix still lasts.
    pub fn holds(&self, prefix: &Prefix) -> bool {
        self.lock().partitions.get(&prefix.partition).is_some_and(|partition| partition.epoch == prefix.epoch)
    }

    /// A transaction has committed this.
    pub fn transacted(&self, prefix: &Prefix) {
        let mut books = self.lock();
        if let Some(partition) = books.partitions.get_mut(&prefix.partition).filter(|p| p.epoch == prefix.epoch) {
            partition.transacted = Some(prefix.end);
        }
    }

    /// What the group had committed when the partition was assigned, where transactions go on from it.
    pub fn found(&self, partition: &TopicPartition, offset: Option<i64>) {
        if let Some(partition) = self.lock().partitions.get_mut(partition) {
            partition.transacted = offset;
        }
    }

    /// The offset that transactions have committed last, or that was found before the first one.
    pub fn transacted_so_far(&self, partition: &TopicPartition) -> Option<i64> {
        self.lock().partitions.get(partition)?.transacted
    }

    /// Partitions that are assigned.
    pub fn assigned(&self) -> Vec<TopicPartition> {
        self.lock().partitions.keys().cloned().collect()
    }

    /// Tickets under way, those of earlier assignments included.
    pub fn open_tickets(&self) -> usize {
        self.lock().open
    }

    /// Tickets under way in one partition.
    pub fn open_in(&self, partition: &TopicPartition) -> usize {
        self.position(partition).map_or(0, |position| position.open)
    }

    /// The next ticket that was dropped, if one was.
    pub fn take_lost(&self) -> Option<Lost> {
        self.lock().lost.pop_front()
    }
}

impl Books {
    /// The assignment a message belongs to, unless it has ended: then another worker has the message now, and
    /// whatever became of it here does not count.
    fn current(&mut self, message: &Shared) -> Option<&mut Partition> {
        self.partitions.get_mut(&message.partition).filter(|p| p.epoch == message.epoch)
    }

    fn close(&mut self, message: &Shared) {
        self.open -= 1;
        if let Some(partition) = self.current(message) {
            partition.mark(message.offset, Mark::Resolved);
        }
    }
}

impl Partition {
    fn mark(&mut self, offset: i64, mark: Mark) {
        let Ok(at) = self.seen.binary_search_by_key(&offset, |(o, _)| *o) else { return };
        self.seen[at].1 = mark;
        self.open -= usize::from(mark == Mark::Resolved);
        while self.seen.get(self.ready).is_some_and(|(_, mark)| *mark != Mark::Open) {
            self.ready += 1;
        }
        while self.seen.front().is_some_and(|(_, mark)| *mark == Mark::Resolved) {
            self.seen.pop_front();
            self.ready -= 1;
        }
    }

    fn position(&self) -> Option<Position> {
        let next = self.next?;
        let watermark = self.seen.front().map_or(next, |(offset, _)| *offset);
        let ready = self.seen.get(self.ready).map_or(next, |(offset, _)| *offset);
        Some(Position { watermark, ready, span: (next - watermark) as u64, open: self.open })
    }
}

#[derive(Debug)]
struct Shared {
    ledger: Ledger,
    partition: TopicPartition,
    epoch: u64,
    offset: i64,
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

    /// One ticket for each of `rows` rows (at least one); the message closes when all of them are resolved.
    pub fn split(mut self, rows: usize) -> Vec<Ticket> {
        let rows = rows.max(1);
        self.done = true;
        self.message.parts.fetch_add(rows - 1, Ordering::AcqRel);
        if !self.ready {
            self.message.unready.fetch_add(rows - 1, Ordering::AcqRel);
        }
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
            if books.current(&self.message).is_some() && !self.message.lost.swap(true, Ordering::Relaxed) {
                let lost = Lost { partition: self.message.partition.clone(), offset: self.message.offset };
                books.lost.push_back(lost);
            }
        }
    }
}

#[cfg(test)]
mod tests;
