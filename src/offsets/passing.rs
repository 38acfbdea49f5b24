//! Which message may be handed on: beside others, alone, or not before something is written down.

use super::{Books, Ledger, Partition, Reach, TopicPartition};

/// Whether a message may be handed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// It may.
    Now,
    /// Not before something is committed, or resolved.
    Later,
    /// Never: it was alone in flight when a worker died, which had started so often at its offset.
    Blamed(u32),
}

impl Ledger {
    /// Whether a message may be handed on beside others; what is to be committed before is asked for. Ask only while no
    /// message of the partition is open, or after the first that was told `Now`.
    pub fn pass(&self, partition: &TopicPartition, offset: i64) -> Pass {
        let mut books = self.lock();
        let nobody_alone = !books.says_alone();
        let Some(state) = books.partitions.get_mut(partition) else { return Pass::Later };
        if state.standing.until.is_some() {
            return Pass::Later;
        }
        let (had, end) = (state.standing.had, state.reached(Reach::Resolved).end);
        let settled = state.open == 0 && end.is_none_or(|end| had.is_some_and(|had| had.offset >= end));
        let passes = state.standing.begin(offset, settled);
        drop(books);
        self.ask(passes && nobody_alone)
    }

    /// Whether a message of a suspect span may be handed on, alone.
    pub fn pass_alone(&self, partition: &TopicPartition, offset: i64) -> Pass {
        let mut books = self.lock();
        let in_flight = books.open > 0;
        let another = books.partitions.iter().any(|(other, state)| other != partition && state.standing.says_alone());
        let Some(state) = books.partitions.get_mut(partition) else { return Pass::Later };
        let standing = &mut state.standing;
        match standing.blamed {
            _ if in_flight => return Pass::Later,
            Some(blamed) if blamed == offset => {
                let starts = standing.had.map_or(0, |had| had.note.starts);
                return Pass::Blamed(starts);
            }
            // It is not in the log any more.
            Some(_) => standing.dealt_with(),
            None => {}
        }
        if another {
            // What it says is taken back first: else two messages would seem to be alone.
            return Pass::Later;
        }
        let alone = standing.alone(offset);
        drop(books);
        self.ask(alone)
    }

    fn ask(&self, passes: bool) -> Pass {
        if passes {
            return Pass::Now;
        }
        self.0.wanted.notify_one();
        Pass::Later
    }

    /// Partitions whose messages are handed on one at a time, each with the first offset and the one behind the last.
    pub fn suspects(&self) -> Vec<(TopicPartition, i64, i64)> {
        let books = self.lock();
        let suspect = |(partition, state): (&TopicPartition, &Partition)| {
            let had = state.standing.had.map_or(0, |had| had.offset);
            let from = state.position().map_or(had, |position| position.watermark);
            Some((partition.clone(), from, state.standing.until?))
        };
        books.partitions.iter().filter_map(suspect).collect()
    }

    /// The suspect span of a partition is through.
    pub fn trust(&self, partition: &TopicPartition) {
        if let Some(partition) = self.lock().partitions.get_mut(partition) {
            partition.standing.trust();
        }
    }

    /// Whether a partition waits, after a start that did not end in order, until the few messages in flight are through.
    pub fn is_crowded(&self) -> bool {
        self.lock().partitions.values().any(|state| state.standing.is_crowded())
    }

    /// Whether messages of a partition, beside others, wait for something to be committed.
    pub fn is_waiting(&self, partition: &TopicPartition) -> bool {
        let books = self.lock();
        let waiting = |state: &Partition| state.standing.until.is_some() || state.standing.is_waiting();
        books.says_alone() || books.partitions.get(partition).is_some_and(waiting)
    }
}

impl Books {
    /// Whether the group is told of some message that it is alone.
    fn says_alone(&self) -> bool {
        self.partitions.values().any(|state| state.standing.says_alone())
    }
}

#[cfg(test)]
mod tests;
