//! What is committed: the watermark of each partition, once it has advanced.
//!
//! The consumer's thread owns the connection and asks [`Watermarks`] at every interval, when partitions are revoked,
//! and at the end.

use std::collections::BTreeMap;

use crate::kafka::{Committer, Error};
use crate::offsets::{Ledger, Position, TopicPartition};

/// Commits the watermarks of a ledger.
#[derive(Debug)]
pub struct Watermarks {
    ledger: Ledger,
    /// What the group has, for every partition that is ours.
    committed: BTreeMap<TopicPartition, Option<i64>>,
}

impl Watermarks {
    /// Commits what `ledger` says.
    pub fn new(ledger: Ledger) -> Self {
        Self { ledger, committed: BTreeMap::new() }
    }
}

/// The watermarks that are beyond what the group has. Exact offsets: the next worker begins there.
///
/// A partition that the group has nothing for is committed, too; one that is not in `committed` is not ours.
fn advanced(
    positions: Vec<(TopicPartition, Position)>,
    committed: &BTreeMap<TopicPartition, Option<i64>>,
) -> Vec<(TopicPartition, i64)> {
    let beyond = |partition: &TopicPartition, watermark: i64| {
        committed.get(partition).is_some_and(|known| known.is_none_or(|known| watermark > known))
    };
    let watermarks = positions.into_iter().map(|(partition, position)| (partition, position.watermark));
    watermarks.filter(|(partition, watermark)| beyond(partition, *watermark)).collect()
}

impl Committer for Watermarks {
    fn due(&mut self) -> Vec<(TopicPartition, i64)> {
        advanced(self.ledger.positions(), &self.committed)
    }

    fn committed(&mut self, offsets: &[(TopicPartition, i64)], result: &Result<(), Error>) {
        // What failed is not remembered as committed, so the next interval tries again.
        match result {
            Ok(()) => {}
            Err(error @ Error::Rebalancing { .. }) => return tracing::debug!(%error, "offsets are committed later"),
            Err(error) => {
                tracing::warn!(%error, partitions = offsets.len(), "offsets were not committed; trying again");
                return;
            }
        }
        for (partition, offset) in offsets {
            if let Some(known) = self.committed.get_mut(partition) {
                *known = Some(known.map_or(*offset, |known| known.max(*offset)));
            }
        }
    }

    fn assigned(&mut self, partition: &TopicPartition, offset: Option<i64>) {
        self.committed.insert(partition.clone(), offset);
    }

    fn revoked(&mut self, partition: &TopicPartition) {
        self.committed.remove(partition);
    }

    fn known(&self, partition: &TopicPartition) -> Option<i64> {
        self.committed.get(partition).copied().flatten()
    }
}

/// Commits nothing: with exactly-once delivery, offsets are committed by the transactions that publish their outputs,
/// and the ledger keeps them.
#[derive(Debug)]
pub struct InTransactions(pub Ledger);

impl Committer for InTransactions {
    fn due(&mut self) -> Vec<(TopicPartition, i64)> {
        Vec::new()
    }

    fn committed(&mut self, _: &[(TopicPartition, i64)], _: &Result<(), Error>) {}

    fn assigned(&mut self, partition: &TopicPartition, offset: Option<i64>) {
        self.0.found(partition, offset);
    }

    fn revoked(&mut self, _: &TopicPartition) {}

    fn known(&self, partition: &TopicPartition) -> Option<i64> {
        self.0.transacted_so_far(partition)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::offsets::{Outcome, Ticket};

    fn partition(number: i32) -> TopicPartition {
        TopicPartition { topic: "t".into(), partition: number }
    }

    fn failed() -> Result<(), Error> {
        Err(Error::Other { doing: "committing offsets", reason: "broker away".into() })
    }

    #[test]
    fn commits_only_what_advanced_and_only_once() {
        let ledger = Ledger::new();
        let mut watermarks = Watermarks::new(ledger.clone());
        ledger.assign(partition(0));
        watermarks.assigned(&partition(0), Some(5));
        assert_eq!(watermarks.due(), []);
        let (first, second) = (ledger.open(&partition(0), 5).unwrap(), ledger.open(&partition(0), 6).unwrap());
        assert_eq!(watermarks.due(), []);
        second.resolve(Outcome::Published);
        assert_eq!(watermarks.due(), []);
        first.resolve(Outcome::Published);
        let due = watermarks.due();
        assert_eq!(due, [(partition(0), 7)]);
        watermarks.committed(&due, &failed());
        assert_eq!(watermarks.due(), due);
        watermarks.committed(&due, &Ok(()));
        assert_eq!(watermarks.due(), []);
    }

    #[test]
    fn commits_nothing_of_a_partition_that_is_not_ours() {
        let ledger = Ledger::new();
        let mut watermarks = Watermarks::new(ledger.clone());
        ledger.assign(partition(0));
        watermarks.assigned(&partition(0), None);
        ledger.open(&partition(0), 0).unwrap().resolve(Outcome::Skipped);
        watermarks.revoked(&partition(0));
        assert_eq!(watermarks.due(), []);
        watermarks.committed(&[(partition(0), 1)], &Ok(()));
        assert!(watermarks.committed.is_empty());
    }

    #[test]
    fn an_abandoned_message_is_neither_committed_nor_reported_as_lost() {
        let ledger = Ledger::new();
        let mut watermarks = Watermarks::new(ledger.clone());
        ledger.assign(partition(0));
        watermarks.assigned(&partition(0), Some(0));
        ledger.open(&partition(0), 0).unwrap().abandon();
        ledger.open(&partition(0), 1).unwrap().resolve(Outcome::Published);
        assert_eq!(watermarks.due(), []);
        assert_eq!((ledger.take_lost(), ledger.open_tickets()), (None, 1));
    }

    proptest! {
        #[test]
        fn a_commit_never_passes_an_unresolved_message(
            steps in proptest::collection::vec((0u8..4, any::<proptest::sample::Index>(), 1i64..4), 1..200)
        ) {
            let ledger = Ledger::new();
            let mut watermarks = Watermarks::new(ledger.clone());
            ledger.assign(partition(0));
            watermarks.assigned(&partition(0), None);
            let (mut open, mut next, mut last) = (Vec::<Ticket>::new(), 0, 0);
            for (step, which, gap) in steps {
                match step {
                    0 | 1 => {
                        // Offsets have gaps, as in a compacted topic.
                        open.extend(ledger.open(&partition(0), next));
                        next += gap;
                    }
                    2 if !open.is_empty() => {
                        let at = which.index(open.len());
                        open.swap_remove(at).resolve(Outcome::Published);
                    }
                    _ => {
                        let due = watermarks.due();
                        for (_, offset) in &due {
                            let first_open = open.iter().map(Ticket::offset).min();
                            prop_assert!(first_open.is_none_or(|first| *offset <= first));
                            prop_assert!(*offset >= last);
                            last = *offset;
                        }
                        let result = if gap == 1 { failed() } else { Ok(()) };
                        watermarks.committed(&due, &result);
                    }
                }
            }
            open.into_iter().for_each(Ticket::abandon);
        }
    }
}
