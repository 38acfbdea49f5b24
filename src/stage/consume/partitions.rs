//! What the consumer's thread knows of its partitions, and what follows from it. Pure: takes `now`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::kafka::{Start, Stats};
use crate::offsets::TopicPartition;

/// A partition that is ours.
#[derive(Debug)]
pub(super) struct State {
    start: Start,
    /// One behind the newest message received.
    position: Option<i64>,
    /// What librdkafka was told; unknown right after the assignment, since an older pause may still hold.
    pub(super) paused: Option<bool>,
    pub(super) at_end: bool,
    span_full: bool,
    leaving: bool,
    /// When the first message that is not consumed is due; nothing behind it is due sooner.
    due: Option<Instant>,
    /// When something last showed that the partition is alive, or that it has no reason to be.
    alive: Instant,
    /// One behind the last readable offset, as far as is known.
    log_end: Option<i64>,
}

impl State {
    /// Messages in the log behind `watermark`, or behind where reading began.
    pub(super) fn lag(&self, watermark: Option<i64>) -> Option<u64> {
        let from = match (watermark, self.start) {
            (Some(watermark), _) => watermark,
            (None, Start::At(offset)) => offset,
            // Nothing was read yet, and where the log begins is not known.
            (None, Start::Beginning) => 0,
        };
        self.log_end.map(|end| (end - from).max(0) as u64)
    }

    /// Where the next message is expected, if that is a number.
    pub(super) fn next(&self) -> Option<i64> {
        match self.reads_on_at() {
            Start::At(offset) => Some(offset),
            Start::Beginning => None,
        }
    }

    fn reads_on_at(&self) -> Start {
        self.position.map_or(self.start, Start::At)
    }

    fn resting(&self, shut: bool) -> bool {
        shut || self.span_full || self.leaving || self.due.is_some()
    }
}

/// All partitions that are ours.
#[derive(Debug, Default)]
pub(super) struct Partitions(BTreeMap<TopicPartition, State>);

/// What to tell librdkafka so that it does what is wanted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) pause: Vec<TopicPartition>,
    pub(super) resume: Vec<TopicPartition>,
    /// Where the resumed ones that rested go on.
    pub(super) seek: Vec<(TopicPartition, Start)>,
}

/// Whether a partition may go no further until older messages are resolved: from `max` offsets on, and then until
/// they are fewer than half.
fn span_full(was: bool, span: u64, max: u64) -> bool {
    let max = max.max(1);
    if was { span * 2 >= max } else { span >= max }
}

impl Partitions {
    pub(super) fn assigned(&mut self, partition: TopicPartition, start: Start, now: Instant) {
        let state = State {
            start,
            position: None,
            paused: None,
            at_end: false,
            span_full: false,
            leaving: false,
            due: None,
            alive: now,
            log_end: None,
        };
        self.0.insert(partition, state);
    }

    pub(super) fn removed(&mut self, partition: &TopicPartition) {
        self.0.remove(partition);
    }

    /// These are about to go to others: nothing more of them is taken.
    pub(super) fn leaving(&mut self, partitions: &[TopicPartition]) {
        for partition in partitions {
            if let Some(state) = self.0.get_mut(partition) {
                state.leaving = true;
            }
        }
    }

    /// A message came. Whether it is to be taken: it is not when the partition is leaving or not ours.
    pub(super) fn received(&mut self, partition: &TopicPartition, offset: i64, now: Instant) -> bool {
        let Some(state) = self.0.get_mut(partition) else { return false };
        state.at_end = false;
        state.alive = now;
        if state.due.is_some() {
            // Read ahead of the pause; it is read again.
            return false;
        }
        state.position = Some(state.position.map_or(offset + 1, |position| position.max(offset + 1)));
        !state.leaving
    }

    /// The next message of a partition is not to be worked on before `due`: the partition rests, and reads on at that
    /// message then.
    pub(super) fn defer(&mut self, partition: &TopicPartition, due: Instant) {
        if let Some(state) = self.0.get_mut(partition) {
            state.due.get_or_insert(due);
        }
    }

    /// Whether messages of this partition are still taken.
    pub(super) fn takes(&self, partition: &TopicPartition) -> bool {
        self.0.get(partition).is_some_and(|state| !state.leaving)
    }

    /// The end of a partition of this number was reached. Of which topic is not said; where several topics could be
    /// meant, the statistics tell within a second.
    pub(super) fn ended(&mut self, number: i32, now: Instant) {
        let mut meant = self.0.iter_mut().filter(|(partition, state)| partition.partition == number && !state.at_end);
        if let (Some((_, state)), None) = (meant.next(), meant.next()) {
            state.at_end = true;
            state.alive = now;
        }
    }

    /// Learns ends and lengths from the statistics.
    pub(super) fn learn(&mut self, stats: &Stats, now: Instant) {
        for known in &stats.partitions {
            let Some(state) = self.0.get_mut(&known.partition) else { continue };
            state.log_end = known.log_end.or(state.log_end);
            // Behind the last message there may be markers of transactions, which are never delivered; with nothing
            // prefetched, nothing is on its way either.
            let reached = known.end_seen.is_some_and(|end| match state.position {
                Some(position) => position == end || (position < end && known.prefetched == 0),
                None => known.prefetched == 0,
            });
            if reached && state.paused == Some(false) {
                state.at_end = true;
                state.alive = now;
            }
        }
    }

    /// Looks at how far the newest message of a partition is ahead of its watermark.
    pub(super) fn spanned(&mut self, partition: &TopicPartition, span: u64, max: u64) {
        if let Some(state) = self.0.get_mut(partition) {
            state.span_full = span_full(state.span_full, span, max);
        }
    }

    /// Which partitions are to be paused or resumed, `shut` being whether all of them rest. The caller does it, and
    /// this remembers it as done.
    pub(super) fn change(&mut self, shut: bool, now: Instant) -> Change {
        let mut change = Change::default();
        for (partition, state) in &mut self.0 {
            state.due = state.due.filter(|due| now < *due);
            let rest = state.resting(shut);
            if state.paused == Some(rest) {
                continue;
            }
            if state.paused == Some(true) {
                change.seek.push((partition.clone(), state.reads_on_at()));
            }
            state.paused = Some(rest);
            state.alive = now;
            // What was prefetched is thrown away by a pause, the sign of the end with it; it is given again.
            state.at_end = false;
            if rest { change.pause.push(partition.clone()) } else { change.resume.push(partition.clone()) }
        }
        change
    }

    /// Partitions that should deliver and have not for `after`, each with where to read on. Asking counts as a sign of
    /// life, so that a partition is named once in that time.
    pub(super) fn stuck(&mut self, after: Duration, now: Instant) -> Vec<(TopicPartition, Start)> {
        let mut stuck = Vec::new();
        for (partition, state) in &mut self.0 {
            let silent = now.saturating_duration_since(state.alive) >= after;
            if silent && state.paused == Some(false) && !state.at_end {
                state.alive = now;
                stuck.push((partition.clone(), state.reads_on_at()));
            }
        }
        stuck
    }

    /// Whether the end of every partition was reached, and there is one.
    pub(super) fn all_at_end(&self) -> bool {
        !self.0.is_empty() && self.0.values().all(|state| state.at_end)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&TopicPartition, &State)> {
        self.0.iter()
    }

    pub(super) fn names(&self) -> Vec<TopicPartition> {
        self.0.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kafka::PartitionStats;

    fn partition(topic: &str, number: i32) -> TopicPartition {
        TopicPartition { topic: topic.into(), partition: number }
    }

    fn two_topics(now: Instant) -> Partitions {
        let mut partitions = Partitions::default();
        for name in ["a", "b"] {
            partitions.assigned(partition(name, 0), Start::Beginning, now);
        }
        partitions.change(false, now);
        partitions
    }

    fn stats(topic: &str, end_seen: Option<i64>, prefetched: u64) -> Stats {
        let one = PartitionStats { partition: partition(topic, 0), log_end: end_seen, end_seen, prefetched };
        Stats { partitions: vec![one], ..Stats::default() }
    }

    #[test]
    fn a_new_partition_is_told_its_state_even_when_it_should_simply_run() {
        let now = Instant::now();
        let mut partitions = Partitions::default();
        partitions.assigned(partition("a", 0), Start::At(3), now);
        assert_eq!(partitions.change(false, now).resume, [partition("a", 0)]);
        assert_eq!(partitions.change(false, now), Change::default());
    }

    #[test]
    fn a_partition_assigned_while_everything_rests_is_paused() {
        let now = Instant::now();
        let mut partitions = Partitions::default();
        partitions.assigned(partition("a", 0), Start::At(3), now);
        assert_eq!(partitions.change(true, now).pause, [partition("a", 0)]);
    }

    #[test]
    fn a_full_span_rests_only_its_own_partition_until_it_is_under_half() {
        let now = Instant::now();
        let mut partitions = two_topics(now);
        partitions.spanned(&partition("a", 0), 10, 10);
        assert_eq!(partitions.change(false, now).pause, [partition("a", 0)]);
        partitions.spanned(&partition("a", 0), 5, 10);
        assert_eq!(partitions.change(false, now), Change::default());
        partitions.spanned(&partition("a", 0), 4, 10);
        assert_eq!(partitions.change(false, now).resume, [partition("a", 0)]);
    }

    #[test]
    fn a_resumed_partition_reads_on_behind_the_last_message_that_came() {
        let now = Instant::now();
        let mut partitions = two_topics(now);
        partitions.received(&partition("a", 0), 6, now);
        partitions.change(true, now);
        let seek = [(partition("a", 0), Start::At(7)), (partition("b", 0), Start::Beginning)];
        assert_eq!(partitions.change(false, now).seek, seek);
    }

    #[test]
    fn two_reasons_to_rest_do_not_fight() {
        let now = Instant::now();
        let mut partitions = two_topics(now);
        partitions.spanned(&partition("a", 0), 10, 10);
        partitions.change(true, now);
        // The pools have room again, the span has not.
        assert_eq!(partitions.change(false, now).resume, [partition("b", 0)]);
        // The span is short again while the pools are spent.
        partitions.change(true, now);
        partitions.spanned(&partition("a", 0), 0, 10);
        assert_eq!(partitions.change(true, now), Change::default());
        assert_eq!(partitions.change(false, now).resume.len(), 2);
    }

    #[test]
    fn an_end_is_believed_at_once_only_when_one_topic_can_be_meant() {
        let now = Instant::now();
        let mut partitions = two_topics(now);
        partitions.ended(0, now);
        assert!(partitions.iter().all(|(_, state)| !state.at_end));
        partitions.learn(&stats("a", Some(0), 0), now);
        partitions.ended(0, now);
        assert!(partitions.all_at_end());
        assert!(partitions.received(&partition("b", 0), 0, now));
        assert!(!partitions.all_at_end());
    }

    #[test]
    fn statistics_show_an_end_behind_transaction_markers_and_not_before_prefetched_messages() {
        let now = Instant::now();
        let mut partitions = Partitions::default();
        partitions.assigned(partition("a", 0), Start::Beginning, now);
        partitions.change(false, now);
        partitions.received(&partition("a", 0), 7, now);
        partitions.learn(&stats("a", Some(10), 2), now);
        assert!(!partitions.all_at_end());
        partitions.learn(&stats("a", Some(10), 0), now);
        assert!(partitions.all_at_end());
    }

    #[test]
    fn old_statistics_do_not_end_a_partition_that_went_on() {
        let now = Instant::now();
        let mut partitions = Partitions::default();
        partitions.assigned(partition("a", 0), Start::Beginning, now);
        partitions.change(false, now);
        partitions.received(&partition("a", 0), 12, now);
        partitions.learn(&stats("a", Some(10), 0), now);
        assert!(!partitions.all_at_end());
    }

    #[test]
    fn only_a_silent_partition_that_should_deliver_is_stuck_and_is_named_once() {
        let (now, after) = (Instant::now(), Duration::from_secs(30));
        let later = now + after;
        let mut partitions = two_topics(now);
        partitions.received(&partition("a", 0), 41, now);
        partitions.spanned(&partition("b", 0), 9, 1);
        partitions.change(false, now);
        assert_eq!(partitions.stuck(after, now + after / 2), []);
        assert_eq!(partitions.stuck(after, later), [(partition("a", 0), Start::At(42))]);
        assert_eq!(partitions.stuck(after, later), []);
        partitions.learn(&stats("a", Some(42), 0), later);
        assert_eq!(partitions.stuck(after, later + after), []);
    }

    #[test]
    fn messages_of_a_leaving_or_foreign_partition_are_not_taken() {
        let now = Instant::now();
        let mut partitions = two_topics(now);
        partitions.leaving(&[partition("a", 0)]);
        assert!(!partitions.received(&partition("a", 0), 1, now));
        assert!(!partitions.received(&partition("c", 0), 1, now));
        assert!(partitions.received(&partition("b", 0), 1, now));
        assert_eq!(partitions.change(false, now).pause, [partition("a", 0)]);
    }

    #[test]
    fn a_message_that_is_not_due_rests_its_partition_and_is_read_again_when_it_is() {
        let now = Instant::now();
        let (before, due) = (now + Duration::from_secs(9), now + Duration::from_secs(10));
        let mut partitions = two_topics(now);
        assert!(partitions.received(&partition("a", 0), 4, now));
        partitions.defer(&partition("a", 0), due);
        assert!(!partitions.received(&partition("a", 0), 6, now), "read ahead of the pause");
        assert_eq!(partitions.change(false, now).pause, [partition("a", 0)]);
        assert_eq!(partitions.change(false, before), Change::default());
        assert_eq!(partitions.stuck(Duration::from_secs(5), before).len(), 1, "only b");
        let change = partitions.change(false, due);
        assert_eq!((change.resume, change.seek), (vec![partition("a", 0)], vec![(partition("a", 0), Start::At(5))]));
        assert!(partitions.received(&partition("a", 0), 5, due));
    }

    proptest! {
        #[test]
        fn what_librdkafka_was_told_is_always_what_is_wanted(
            steps in proptest::collection::vec((0u8..6, 0i32..3, 0u64..12, any::<bool>()), 0..100)
        ) {
            let now = Instant::now();
            let mut partitions = Partitions::default();
            let mut told = BTreeMap::new();
            for (step, number, span, shut) in steps {
                let name = partition("t", number);
                match step {
                    0 => { told.remove(&name); partitions.assigned(name, Start::Beginning, now) }
                    1 => { told.remove(&name); partitions.removed(&name) }
                    2 => partitions.leaving(&[name]),
                    _ => partitions.spanned(&name, span, 10),
                }
                let change = partitions.change(shut, now);
                for name in change.pause {
                    prop_assert_ne!(told.insert(name, true), Some(true), "paused twice");
                }
                for name in change.resume {
                    prop_assert_ne!(told.insert(name, false), Some(false), "resumed twice");
                }
                for (name, state) in partitions.iter() {
                    prop_assert_eq!(told.get(name), Some(&state.resting(shut)));
                }
            }
        }
    }
}
