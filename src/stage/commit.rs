//! What is committed: the watermark of each partition, once it has advanced, and the note beside it.
//!
//! The consumer's thread owns the connection and asks [`Watermarks`] at every interval, when a message waits for a note,
//! when partitions are revoked, and at the end. What the group has is written down in the ledger.

use crate::kafka::{Committer, Error};
use crate::offsets::{Committed, Ledger, Prefix, Reach, TopicPartition};

/// Commits the watermarks of a ledger. Exact offsets: the next worker begins there.
#[derive(Debug)]
pub struct Watermarks(pub Ledger);

impl Committer for Watermarks {
    fn due(&mut self) -> Vec<(TopicPartition, Committed)> {
        let due = self.0.due(Reach::Resolved).into_iter();
        due.map(|Prefix { partition, end, .. }| (partition, end)).collect()
    }

    fn is_urgent(&self, of: &dyn Fn(&TopicPartition) -> bool) -> bool {
        self.0.is_urgent_of(Reach::Resolved, of)
    }

    fn committed(&mut self, offsets: &[(TopicPartition, Committed)], result: &Result<(), Error>) {
        // What failed is not remembered as committed, so the next interval tries again.
        match result {
            Ok(()) => {}
            Err(error @ Error::Rebalancing { .. }) => return tracing::debug!(%error, "offsets are committed later"),
            Err(error) => {
                tracing::warn!(%error, partitions = offsets.len(), "offsets were not committed; trying again");
                return;
            }
        }
        for (partition, committed) in offsets {
            self.0.committed(partition, *committed);
        }
    }

    fn is_elsewhere(&self, _: &[TopicPartition]) -> bool {
        false
    }
}

/// Commits nothing: with exactly-once delivery, offsets and notes are committed by the transactions that publish the
/// outputs. A commit of the consumer could reach the brokers late, and take the offset of a later transaction back.
#[derive(Debug)]
pub struct InTransactions(pub Ledger);

impl Committer for InTransactions {
    fn due(&mut self) -> Vec<(TopicPartition, Committed)> {
        Vec::new()
    }

    fn is_urgent(&self, _: &dyn Fn(&TopicPartition) -> bool) -> bool {
        false
    }

    fn committed(&mut self, _: &[(TopicPartition, Committed)], _: &Result<(), Error>) {}

    fn is_elsewhere(&self, partitions: &[TopicPartition]) -> bool {
        // Of what is under way nothing may be due any more, and it would be written down behind our back: a start that
        // nobody takes back counts as a death.
        self.0.is_under_way(partitions)
            || self.0.due(Reach::Ready).iter().any(|prefix| partitions.contains(&prefix.partition))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::offsets::{Note, Outcome, Pass, Ticket};

    fn partition(number: i32) -> TopicPartition {
        TopicPartition { topic: "t".into(), partition: number }
    }

    fn failed() -> Result<(), Error> {
        Err(Error::Other { doing: "committing offsets", reason: "broker away".into() })
    }

    #[test]
    fn commits_only_what_advanced_and_only_once() {
        let ledger = Ledger::new();
        let mut watermarks = Watermarks(ledger.clone());
        ledger.assign(partition(0));
        ledger.found(&partition(0), Some(5.into()), 100);
        assert_eq!(watermarks.due(), []);
        let (first, second) = (ledger.open(&partition(0), 5).unwrap(), ledger.open(&partition(0), 6).unwrap());
        assert_eq!(watermarks.due(), []);
        second.resolve(Outcome::Published);
        assert_eq!(watermarks.due(), []);
        first.resolve(Outcome::Published);
        let due = watermarks.due();
        assert_eq!(due, [(partition(0), 7.into())]);
        watermarks.committed(&due, &failed());
        assert_eq!(watermarks.due(), due);
        watermarks.committed(&due, &Ok(()));
        assert_eq!(watermarks.due(), []);
    }

    #[test]
    fn a_partition_does_not_go_while_a_transaction_may_write_of_it_and_a_start_in_vain_is_taken_back() {
        let (ledger, partitions) = (Ledger::new(), [partition(0)]);
        let committer = InTransactions(ledger.clone());
        ledger.assign(partition(0));
        ledger.found(&partition(0), None, 100);
        assert_eq!(ledger.pass(&partition(0), 0), Pass::Later);
        let start = ledger.due(Reach::Ready);
        assert_eq!(start[0].end.note.starts, 1);
        ledger.transacting(&start);
        ledger.leave(&partitions);
        assert!(committer.is_elsewhere(&partitions), "the start is on its way");
        ledger.transacted(&start[0]);
        let taken_back = ledger.due(Reach::Ready);
        assert_eq!((taken_back[0].end.offset, taken_back[0].end.note.starts), (0, 0));
        assert!(committer.is_elsewhere(&partitions), "it is to be taken back");
        ledger.transacting(&taken_back);
        ledger.transacted(&taken_back[0]);
        assert!(!committer.is_elsewhere(&partitions));
    }

    #[test]
    fn a_start_whose_commit_was_under_way_when_the_partition_left_is_taken_back() {
        let ledger = Ledger::new();
        let mut watermarks = Watermarks(ledger.clone());
        ledger.assign(partition(0));
        let died = Committed { offset: 7, note: Note { starts: 1, ..Note::default() } };
        ledger.found(&partition(0), Some(died), 100);
        assert_eq!(ledger.pass(&partition(0), 7), Pass::Later);
        let start = watermarks.due();
        assert_eq!(start[0].1.note.starts, 2);
        ledger.leave(&[partition(0)]);
        watermarks.committed(&start, &Ok(()));
        assert_eq!(watermarks.due(), [(partition(0), died)], "the death that was found still counts");
    }

    /// The first message of a partition, of which the group has nothing, or an offset with a gap behind it.
    const FIRST: [(Option<i64>, i64); 3] = [(None, 0), (None, 5), (Some(41), 42)];

    #[test]
    fn a_start_in_a_new_group_or_behind_a_gap_is_taken_back_like_any_other() {
        let go: [fn(&Ledger); 2] = [|ledger| ledger.leave(&[partition(0)]), Ledger::end];
        for ((committed, first), go) in FIRST.into_iter().flat_map(|first| go.map(|go| (first, go))) {
            let ledger = Ledger::new();
            let mut watermarks = Watermarks(ledger.clone());
            ledger.assign(partition(0));
            ledger.found(&partition(0), committed.map(Committed::from), 100);
            assert_eq!(ledger.pass(&partition(0), first), Pass::Later);
            let start = watermarks.due();
            assert_eq!((start[0].1.offset, start[0].1.note.starts), (first, 1));
            go(&ledger);
            watermarks.committed(&start, &Ok(()));
            assert_eq!(ledger.committed_so_far(&partition(0)), Some(start[0].1), "the answer is of this assignment");
            assert_eq!(watermarks.due(), [(partition(0), first.into())], "nothing was handed on");
        }
    }

    #[test]
    fn commits_nothing_of_a_partition_that_is_not_ours() {
        let ledger = Ledger::new();
        let mut watermarks = Watermarks(ledger.clone());
        ledger.assign(partition(0));
        ledger.open(&partition(0), 0).unwrap().resolve(Outcome::Skipped);
        ledger.revoke(&partition(0));
        assert_eq!(watermarks.due(), []);
        watermarks.committed(&[(partition(0), 1.into())], &Ok(()));
        assert_eq!(ledger.committed_so_far(&partition(0)), None);
    }

    #[test]
    fn an_abandoned_message_is_neither_committed_nor_reported_as_lost() {
        let ledger = Ledger::new();
        let mut watermarks = Watermarks(ledger.clone());
        ledger.assign(partition(0));
        ledger.found(&partition(0), Some(0.into()), 100);
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
            let mut watermarks = Watermarks(ledger.clone());
            ledger.assign(partition(0));
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
                        for (_, Committed { offset, .. }) in &due {
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
