//! Tickets and the ledger: which offsets of each partition are resolved, and up to where they may be committed.
//!
//! Work finishes out of order and offsets are sparse. The watermark of a partition is the first offset that was
//! seen and is not resolved; only what lies before it is ever committed. Beside each offset stands a [`Note`], from which
//! the next worker learns whether this one died; `standing` has the rules, and `passing` says which message may be
//! handed on.

mod note;
mod passing;
mod standing;
mod ticket;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use self::standing::{Reached, Standing};
use self::ticket::Shared;

pub use note::{Committed, Note, SUSPECT_AFTER};
pub use passing::Pass;
pub use ticket::Ticket;

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

/// Up to where messages must have come so that their offsets may be committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Resolved: their outputs are published.
    Resolved,
    /// Ready: their outputs are published in the transaction that commits the offset.
    Ready,
}

/// What may be committed of a partition: everything before an offset, as long as the assignment lasts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefix {
    /// The partition.
    pub partition: TopicPartition,
    /// Which of its assignments.
    pub epoch: u64,
    /// The offset to commit, see [`Position`], and the note beside it.
    pub end: Committed,
}

/// The ledger of all partitions this worker owns. Cheap to clone; every clone is the same ledger.
#[derive(Debug, Clone, Default)]
pub struct Ledger(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    books: Mutex<Books>,
    /// Told when something is to be committed that a message waits for.
    wanted: Notify,
}

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
    /// What the group has.
    standing: Standing,
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
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a new assignment of a partition; tickets of an earlier one no longer count.
    pub fn assign(&self, partition: TopicPartition) {
        let mut books = self.lock();
        books.epoch += 1;
        let epoch = books.epoch;
        books.partitions.insert(
            partition,
            Partition { epoch, seen: VecDeque::new(), ready: 0, next: None, standing: Standing::default(), open: 0 },
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
        drop(books);
        Some(Ticket::new(self.clone(), partition.clone(), epoch, offset))
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

    /// What is to be committed, of every partition where that is more than the group has, or said with another note.
    pub fn due(&self, reach: Reach) -> Vec<Prefix> {
        self.lock().prefixes(|partition| partition.standing.due(partition.reached(reach)))
    }

    /// The notes beside the offsets that the group has, as they must be now; of what has become ready since, nothing.
    pub fn amended(&self) -> Vec<Prefix> {
        self.lock().prefixes(|partition| partition.standing.amended(partition.open == 0))
    }

    /// Whether a message waits for something to be committed.
    pub fn is_urgent(&self, reach: Reach) -> bool {
        self.is_urgent_of(reach, |_| true)
    }

    /// The same of some partitions.
    pub fn is_urgent_of(&self, reach: Reach, of: impl Fn(&TopicPartition) -> bool) -> bool {
        let held = &self.lock().partitions;
        held.iter().any(|(name, held)| held.standing.is_urgent(held.reached(reach)) && of(name))
    }

    /// Returns when a message has begun to wait for something to be committed. For one waiter.
    pub async fn urgent(&self) {
        self.0.wanted.notified().await;
    }

    /// Whether the assignment of a prefix still lasts.
    pub fn holds(&self, prefix: &Prefix) -> bool {
        self.lock().partitions.get(&prefix.partition).is_some_and(|partition| partition.epoch == prefix.epoch)
    }

    /// A transaction is to commit this, now or when it is tried again.
    pub fn transacting(&self, prefixes: &[Prefix]) {
        let mut books = self.lock();
        for prefix in prefixes {
            if let Some(partition) = books.partitions.get_mut(&prefix.partition).filter(|p| p.epoch == prefix.epoch) {
                partition.standing.transacting();
            }
        }
    }

    /// Whether a transaction may still commit something of these partitions.
    pub fn is_under_way(&self, partitions: &[TopicPartition]) -> bool {
        let held = &self.lock().partitions;
        partitions.iter().filter_map(|partition| held.get(partition)).any(|held| held.standing.is_under_way())
    }

    /// A transaction has committed this.
    pub fn transacted(&self, prefix: &Prefix) {
        let mut books = self.lock();
        if let Some(partition) = books.partitions.get_mut(&prefix.partition).filter(|p| p.epoch == prefix.epoch) {
            partition.standing.committed(prefix.end);
        }
    }

    /// The consumer has committed this. What lies beyond everything that was seen or asked for in this assignment is the late
    /// answer to a commit of an earlier one, and says nothing of this one.
    pub fn committed(&self, partition: &TopicPartition, committed: Committed) {
        if let Some(partition) = self.lock().partitions.get_mut(partition)
            && partition.next.max(partition.standing.furthest()).is_some_and(|end| committed.offset <= end)
        {
            partition.standing.committed(committed);
        }
    }

    /// What the group had when the partition was assigned. At most `max_span` offsets behind it are ever in flight.
    pub fn found(&self, partition: &TopicPartition, committed: Option<Committed>, max_span: u64) {
        if let Some(partition) = self.lock().partitions.get_mut(partition) {
            partition.standing = Standing::found(committed, max_span);
        }
    }

    /// What the group has: as found, and as committed since.
    pub fn committed_so_far(&self, partition: &TopicPartition) -> Option<Committed> {
        self.lock().partitions.get(partition)?.standing.had
    }

    /// Partitions go to other workers, in order: nothing more of them is taken.
    pub fn leave(&self, partitions: &[TopicPartition]) {
        let mut books = self.lock();
        for partition in partitions {
            if let Some(partition) = books.partitions.get_mut(partition) {
                partition.standing.leave();
            }
        }
    }

    /// The worker ends, in order: nothing more is taken.
    pub fn end(&self) {
        self.lock().partitions.values_mut().for_each(|partition| partition.standing.end());
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
    fn prefixes(&self, end: impl Fn(&Partition) -> Option<Committed>) -> Vec<Prefix> {
        let prefix = |(partition, state): (&TopicPartition, &Partition)| {
            Some(Prefix { partition: partition.clone(), epoch: state.epoch, end: end(state)? })
        };
        self.partitions.iter().filter_map(prefix).collect()
    }

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

    fn reached(&self, reach: Reach) -> Reached {
        let position = self.position();
        let end = position.map(|position| match reach {
            Reach::Resolved => position.watermark,
            Reach::Ready => position.ready,
        });
        Reached { end, idle: end == self.next }
    }

    fn position(&self) -> Option<Position> {
        let next = self.next?;
        let watermark = self.seen.front().map_or(next, |(offset, _)| *offset);
        let ready = self.seen.get(self.ready).map_or(next, |(offset, _)| *offset);
        Some(Position { watermark, ready, span: (next - watermark) as u64, open: self.open })
    }
}

#[cfg(test)]
mod tests;
