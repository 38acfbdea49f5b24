//! The consumer's life in its group: rebalances, commits, the last commit.

use std::time::{Duration, Instant};

use super::{Worker, partition_of};
use crate::disposition::Stage;
use crate::kafka::{Consumer, Error, MemberId, Start};
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

/// What one member is in the middle of.
pub(super) struct Membership {
    pub(super) rebalance: Option<Rebalance>,
    /// Whether it was ever told its share, be that nothing.
    assigned: bool,
    /// Since when a commit waits for its result.
    pub(super) committing: Option<Instant>,
    /// When the next commit is due.
    next_commit: Instant,
}

impl Membership {
    pub(super) fn new(next_commit: Instant) -> Self {
        Self { rebalance: None, assigned: false, committing: None, next_commit }
    }

    /// Whether what it reads is what it is to read.
    pub(super) fn has_its_share(&self) -> bool {
        self.assigned && self.rebalance.is_none()
    }

    /// Whether neither a rebalance nor a commit is under way.
    fn is_settled(&self) -> bool {
        self.rebalance.is_none() && self.committing.is_none()
    }
}

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

/// Which of these partitions, each with the offset that is read next, an error may be about that names an offset alone. Even
/// one that is read from there need not be the one: a batch begins before the offset that is read next, where that lies
/// within it, and behind it, where others are missing.
fn place_of<'a>(read: impl Iterator<Item = (&'a TopicPartition, Option<i64>)>) -> String {
    let read: Vec<_> = read.collect();
    if let [(partition, _)] = &*read {
        return partition.to_string();
    }
    let place = |(partition, next): &(&TopicPartition, Option<i64>)| match next {
        Some(next) => format!("{partition}, next {next}"),
        None => format!("{partition}, next its first"),
    };
    format!("one of these partitions: {}", read.iter().map(place).collect::<Vec<_>>().join("; "))
}

impl Worker {
    pub(super) fn begin_revoke(&mut self, member: MemberId, partitions: Vec<TopicPartition>, lost: bool, now: Instant) {
        self.signals.control.status().rebalances += 1;
        self.signals.control.set_at_end(false);
        self.partitions.leaving(&partitions);
        if !lost {
            self.setup.ledger.leave(&partitions);
        }
        // Should a partition come back, its first message must be the committed one, not a held one.
        self.held.retain(|message| !partitions.contains(&partition_of(message)));
        let deadline = now + self.setup.kafka.revoke_drain;
        self.members[member].rebalance = Some(Rebalance::Revoke(Leave { partitions, lost, next_try: now, deadline }));
    }

    /// Takes the next step of each rebalance; the group waits until it is done.
    pub(super) fn advance_rebalances(&mut self, now: Instant) {
        for member in 0..self.members.len() {
            match self.members[member].rebalance.take() {
                None => {}
                Some(Rebalance::Assign { partitions, next_try }) if now < next_try => {
                    self.members[member].rebalance = Some(Rebalance::Assign { partitions, next_try });
                }
                Some(Rebalance::Assign { partitions, .. }) => self.assign(member, partitions, now),
                Some(Rebalance::Revoke(leave)) => {
                    let again = self.try_revoke(member, &leave, now);
                    let again = again.map(|next_try| Rebalance::Revoke(Leave { next_try, ..leave }));
                    self.members[member].rebalance = again;
                }
            }
        }
    }

    fn assign(&mut self, member: MemberId, partitions: Vec<TopicPartition>, now: Instant) {
        let committed =
            if partitions.is_empty() { Ok(Vec::new()) } else { self.setup.consumer.committed(member, &partitions) };
        let committed = match committed {
            Ok(committed) => committed,
            Err(error) => {
                tracing::warn!(%error, partitions = partitions.len(), "new partitions wait for the brokers");
                // Asking has taken its time, and others have theirs until the next try.
                let next_try = Instant::now() + RETRY_ASSIGN;
                self.members[member].rebalance = Some(Rebalance::Assign { partitions, next_try });
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
        self.members[member].assigned = true;
        if let Err(error) = self.setup.consumer.assign(member, &starts) {
            self.fail(error);
        }
        self.review(now);
    }

    /// Lets partitions go once they have drained and are committed, or the time is up. Otherwise returns when to try
    /// again.
    fn try_revoke(&mut self, member: MemberId, leave: &Leave, now: Instant) -> Option<Instant> {
        let open: usize = leave.partitions.iter().map(|partition| self.setup.ledger.open_in(partition)).sum();
        let (lost, late) = (leave.lost || self.setup.consumer.assignment_lost(member), now >= leave.deadline);
        if lost {
            tracing::warn!(partitions = leave.partitions.len(), "partitions were lost to others; nothing is committed");
        } else {
            let elsewhere = self.setup.committer.is_elsewhere(&leave.partitions);
            let committing = self.members[member].committing.is_some();
            if !late && (open > 0 || elsewhere || committing || now < leave.next_try) {
                return Some(leave.next_try);
            }
            let committed = self.commit_now(member, &leave.partitions);
            if !late && matches!(committed, Err(Error::Rebalancing { .. })) {
                return Some(now + RETRY_COMMIT);
            }
            // Any other failure is recorded; the partitions go all the same, and are read again from the older offset.
            tracing::info!(partitions = leave.partitions.len(), undrained = open, "partitions revoked");
        }
        // The ledger first: what it still has when a transaction looks was ours in the generation that it names.
        self.forget(&leave.partitions);
        if let Err(error) = self.setup.consumer.unassign(member, &leave.partitions) {
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
        for member in 0..self.members.len() {
            let state = &mut self.members[member];
            if state.committing.is_some_and(|since| now.saturating_duration_since(since) >= stale) {
                state.committing = None;
            }
            if state.is_settled() && (now >= state.next_commit || self.is_urgent(member, now)) {
                self.members[member].next_commit = now + self.setup.kafka.commit_interval;
                let due = self.due_of(member);
                self.commit(member, &due, now);
            }
        }
    }

    fn is_urgent(&self, member: MemberId, now: Instant) -> bool {
        let Self { setup, clock, .. } = self;
        now >= clock.urgent && setup.committer.is_urgent(&|partition| setup.consumer.member_of(partition) == member)
    }

    /// What is due of the partitions of a member.
    fn due_of(&mut self, member: MemberId) -> Vec<(TopicPartition, Committed)> {
        let mut due = self.setup.committer.due();
        due.retain(|(partition, _)| self.setup.consumer.member_of(partition) == member);
        due
    }

    /// Commits without waiting for the result.
    fn commit(&mut self, member: MemberId, due: &[(TopicPartition, Committed)], now: Instant) {
        if due.is_empty() {
            return;
        }
        match self.setup.consumer.commit(member, due) {
            Ok(()) => self.members[member].committing = Some(now),
            Err(error) => self.record_commit(due, &Err(error)),
        }
    }

    /// Commits what is due of some partitions of a member, and waits for it.
    fn commit_now(&mut self, member: MemberId, of: &[TopicPartition]) -> Result<(), Error> {
        let mut due = self.setup.committer.due();
        due.retain(|(partition, _)| of.contains(partition));
        let began = Instant::now();
        let result = self.setup.consumer.commit_now(member, &due);
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
        if !late && now < closing.next_try {
            return None;
        }
        closing.next_try = now + RETRY_COMMIT;
        self.setup.ledger.end();
        let mut open = false;
        for member in 0..self.members.len() {
            if self.setup.consumer.assignment_lost(member) {
                continue;
            }
            let due = self.due_of(member);
            open |= !due.is_empty();
            // One that gives partitions back commits for itself, and holds up no other.
            if !late && self.members[member].is_settled() {
                self.commit(member, &due, now);
            }
        }
        match (open, late) {
            (false, _) => Some(Ok(())),
            (true, false) => None,
            (true, true) => {
                let silent =
                    || Error::Other { doing: "committing offsets", reason: "the brokers do not answer".into() };
                let failure = self.closing.as_mut().and_then(|closing| closing.failure.take());
                Some(Err(failure.unwrap_or_else(silent)))
            }
        }
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

    /// What to do about a batch that cannot be read, for a reason that tells its offset.
    pub(super) fn unreadable(&self, member: MemberId, reason: &str) -> Error {
        let read = self.partitions.iter().filter(|(partition, _)| self.setup.consumer.member_of(partition) == member);
        let place = place_of(read.map(|(partition, state)| (partition, state.next())));
        let reason = format!(
            "{reason}. It is of {place}. Nothing behind it is read, and nothing of it is committed. Mend the log of the brokers, \
             or give the batch up, as docs/runbook.md tells under \"A batch of messages that cannot be read\""
        );
        Error::Other { doing: "reading a batch of messages", reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_batch_that_cannot_be_read_every_partition_is_named_that_it_may_be_of() {
        let partition = |number| TopicPartition { topic: "in".into(), partition: number };
        let (first, second) = (partition(0), partition(1));
        assert_eq!(place_of([(&first, Some(41))].into_iter()), "in/0");
        let read = [(&first, Some(41)), (&second, None)];
        assert_eq!(place_of(read.into_iter()), "one of these partitions: in/0, next 41; in/1, next its first");
    }
}
