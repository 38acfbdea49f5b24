//! The consumer's life in its group: rebalances, commits, the last commit.

use std::time::{Duration, Instant};

use super::{Worker, partition_of};
use crate::disposition::Stage;
use crate::kafka::{Consumer, Error, Start};
use crate::offsets::{Committed, TopicPartition};

/// Wait between two tries to learn the committed offsets of new partitions.
const RETRY_ASSIGN: Duration = Duration::from_secs(1);

/// Most time for the last commit, of what [`super::CLOSE`] is for all of the end. It is refused while the group is being
/// rearranged, which others may draw out.
const LAST_COMMIT: Duration = Duration::from_secs(5);

/// Wait between two tries of a commit that the end, or a rebalance, waits for.
const RETRY_COMMIT: Duration = Duration::from_millis(50);

/// Wait before a commit that has failed is tried again since a message waits for it.
const RETRY_URGENT: Duration = Duration::from_millis(200);

/// A rebalance that the group waits for.
pub(super) enum Rebalance {
    Assign { partitions: Vec<TopicPartition>, next_try: Instant },
    Revoke(Leave),
}

/// The last commit.
pub(super) struct Closing {
    since: Instant,
    next_try: Instant,
    /// Why it has failed so far.
    failure: Option<Error>,
}

/// Partitions on their way to others.
pub(super) struct Leave {
    partitions: Vec<TopicPartition>,
    /// Others have them already.
    lost: bool,
    next_try: Instant,
    deadline: Instant,
}

impl Worker {
    pub(super) fn begin_revoke(&mut self, partitions: Vec<TopicPartition>, lost: bool, now: Instant) {
        self.signals.control.status().rebalances += 1;
        self.signals.control.set_at_end(false);
        self.partitions.leaving(&partitions);
        if !lost {
            self.setup.ledger.leave(&partitions);
        }
        // Should a partition come back, its first message must be the committed one, not a held one.
        self.held.retain(|message| !partitions.contains(&partition_of(message)));
        let deadline = now + self.setup.kafka.revoke_drain;
        self.rebalance = Some(Rebalance::Revoke(Leave { partitions, lost, next_try: now, deadline }));
    }

    /// Takes the next step of a rebalance; the group waits until it is done.
    pub(super) fn advance_rebalance(&mut self, now: Instant) {
        match self.rebalance.take() {
            None => {}
            Some(Rebalance::Assign { partitions, next_try }) if now < next_try => {
                self.rebalance = Some(Rebalance::Assign { partitions, next_try });
            }
            Some(Rebalance::Assign { partitions, .. }) => self.assign(partitions, now),
            Some(Rebalance::Revoke(leave)) => {
                let again = self.try_revoke(&leave, now);
                self.rebalance = again.map(|next_try| Rebalance::Revoke(Leave { next_try, ..leave }));
            }
        }
    }

    fn assign(&mut self, partitions: Vec<TopicPartition>, now: Instant) {
        let committed = if partitions.is_empty() { Ok(Vec::new()) } else { self.setup.consumer.committed(&partitions) };
        let committed = match committed {
            Ok(committed) => committed,
            Err(error) => {
                tracing::warn!(%error, partitions = partitions.len(), "new partitions wait for the brokers");
                self.rebalance = Some(Rebalance::Assign { partitions, next_try: now + RETRY_ASSIGN });
                return;
            }
        };
        let mut starts = Vec::with_capacity(committed.len());
        for (partition, committed) in committed {
            // librdkafka would treat "no offset yet" as it treats "out of range", which must stop the worker.
            let start = committed.map_or(Start::Beginning, |committed| Start::At(committed.offset));
            tracing::info!(%partition, ?start, "partition assigned");
            self.setup.ledger.assign(partition.clone());
            self.setup.ledger.found(&partition, committed, self.setup.flow.max_span);
            self.partitions.assigned(partition.clone(), start, now);
            starts.push((partition, start));
        }
        self.tell_suspects(&partitions);
        if let Err(error) = self.setup.consumer.assign(&starts) {
            self.fail(error);
        }
        self.review(now);
    }

    /// Lets partitions go once they have drained and are committed, or the time is up. Otherwise returns when to try
    /// again.
    fn try_revoke(&mut self, leave: &Leave, now: Instant) -> Option<Instant> {
        let open: usize = leave.partitions.iter().map(|partition| self.setup.ledger.open_in(partition)).sum();
        let (lost, late) = (leave.lost || self.setup.consumer.assignment_lost(), now >= leave.deadline);
        if lost {
            tracing::warn!(partitions = leave.partitions.len(), "partitions were lost to others; nothing is committed");
        } else {
            let elsewhere = self.setup.committer.is_elsewhere(&leave.partitions);
            if !late && (open > 0 || elsewhere || self.committing.is_some() || now < leave.next_try) {
                return Some(leave.next_try);
            }
            let committed = self.commit_now(|partition| leave.partitions.contains(partition));
            if !late && matches!(committed, Err(Error::Rebalancing { .. })) {
                return Some(now + RETRY_COMMIT);
            }
            // Any other failure is recorded; the partitions go all the same, and are read again from the older offset.
            tracing::info!(partitions = leave.partitions.len(), undrained = open, "partitions revoked");
        }
        // The ledger first: what it still has when a transaction looks was ours in the generation that it names.
        self.forget(&leave.partitions);
        if let Err(error) = self.setup.consumer.unassign(&leave.partitions) {
            self.fail(error);
        }
        None
    }

    pub(super) fn forget(&mut self, partitions: &[TopicPartition]) {
        for partition in partitions {
            self.setup.ledger.revoke(partition);
            self.partitions.removed(partition);
        }
    }

    pub(super) fn commit_if_due(&mut self, now: Instant) {
        let stale = 2 * self.setup.kafka.session_timeout;
        if self.committing.is_some_and(|since| now.saturating_duration_since(since) >= stale) {
            self.committing = None;
        }
        if self.committing.is_some() || self.rebalance.is_some() {
            return;
        }
        if now < self.clock.commit && (now < self.clock.urgent || !self.setup.committer.is_urgent()) {
            return;
        }
        self.clock.commit = now + self.setup.kafka.commit_interval;
        let due = self.setup.committer.due();
        if due.is_empty() {
            return;
        }
        match self.setup.consumer.commit(&due) {
            Ok(()) => self.committing = Some(now),
            Err(error) => self.record_commit(&due, &Err(error)),
        }
    }

    /// Commits what is due of some partitions and waits for it.
    pub(super) fn commit_now(&mut self, of: impl Fn(&TopicPartition) -> bool) -> Result<(), Error> {
        let mut due = self.setup.committer.due();
        due.retain(|(partition, _)| of(partition));
        let began = Instant::now();
        let result = self.setup.consumer.commit_now(&due);
        if result.is_ok() && !due.is_empty() {
            self.setup.metrics.stage(Stage::Commit, began.elapsed());
        }
        self.record_commit(&due, &result);
        result
    }

    pub(super) fn record_commit(&mut self, offsets: &[(TopicPartition, Committed)], result: &Result<(), Error>) {
        if offsets.is_empty() {
            return;
        }
        self.setup.committer.committed(offsets, result);
        if let Err(error) = result {
            self.clock.urgent = Instant::now() + RETRY_URGENT;
            self.signals.control.status().failed_commits += 1;
            if let Some(closing) = &mut self.closing {
                closing.failure = Some(error.clone());
            }
        }
    }

    /// The result of the last commit, or `None` while it is under way or to be tried again: polling brings its answer,
    /// and lets a rebalance come to its end.
    pub(super) fn last_commit(&mut self, now: Instant) -> Option<Result<(), Error>> {
        let closing = self.closing.get_or_insert(Closing { since: now, next_try: now, failure: None });
        let late = now.saturating_duration_since(closing.since) >= LAST_COMMIT;
        if !late && (self.committing.is_some() || self.rebalance.is_some() || now < closing.next_try) {
            return None;
        }
        if self.setup.consumer.assignment_lost() {
            return Some(Ok(()));
        }
        self.setup.ledger.end();
        let due = self.setup.committer.due();
        if due.is_empty() {
            return Some(Ok(()));
        }
        if late {
            let silent = || Error::Other { doing: "committing offsets", reason: "the brokers do not answer".into() };
            return Some(Err(closing.failure.take().unwrap_or_else(silent)));
        }
        closing.next_try = now + RETRY_COMMIT;
        match self.setup.consumer.commit(&due) {
            Ok(()) => self.committing = Some(now),
            Err(error) => self.record_commit(&due, &Err(error)),
        }
        None
    }

    /// Lets go of everything but the membership of the group.
    pub(super) fn end(mut self, committed: Result<(), Error>) -> (Result<(), Error>, Consumer) {
        self.publish_status();
        self.signals.control.set_at_end(false);
        let partitions = self.partitions.names();
        self.forget(&partitions);
        (self.error.map_or(committed, Err), self.setup.consumer)
    }

    /// Names the partition whose offset is out of range, as far as the brokers tell.
    pub(super) fn out_of_range(&self) -> Error {
        for (partition, state) in self.partitions.iter() {
            let Some(offset) = state.next() else { continue };
            if let Ok((low, high)) = self.setup.consumer.bounds(partition)
                && (offset < low || offset > high)
            {
                return Error::OffsetOutOfRange { partition: partition.clone(), offset, low, high };
            }
        }
        let reason = self.setup.consumer.last_error().map_or_else(|| "no partition found".into(), |(_, reason)| reason);
        Error::Other { doing: "reading from an offset that is not in the log", reason }
    }
}
