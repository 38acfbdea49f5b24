//! What the consumer's thread knows of its partitions, and what follows from it. Pure: takes `now`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::kafka::{Start, Stats};
use crate::offsets::TopicPartition;

/// How often a message that was turned away is sought again when one behind it comes in its place; after that it must have
/// gone from the log.
const SEEKS: u32 = 5;

/// What becomes of a message that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival {
    /// It is taken.
    Taken,
    /// It is not: its partition is leaving or not ours, or one before it was turned away.
    Left,
    /// It is not: the one at this offset was to come first, so the partition is sought anew.
    Ahead(i64),
    /// It is taken, though the one at this offset never came again.
    Without(i64),
}

/// A message that was turned away, and is in the log therefore.
#[derive(Debug, Clone, Copy)]
struct Awaited {
    offset: i64,
    /// How often one behind it came instead.
    missed: u32,
}

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
    /// Messages from [`State::next`] on were turned away, and are to be sought anew before anything is taken.
    turned_away: bool,
    /// The first of them. librdkafka drops a seek without a word where one of its own threads pauses the partition at the same
    /// moment, as it does in each rebalance, and reads on behind what it has delivered.
    awaited: Option<Awaited>,
    leaving: bool,
    /// Others go first, or something is to be committed before.
    held_back: bool,
    /// When the first message that is not consumed is due; nothing behind it is due sooner.
    due: Option<Instant>,
    /// The message that was deferred last, and until when: it waits once, whatever its header says the next time.
    waited: Option<(i64, Instant)>,
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

    /// A message came, whatever becomes of it.
    fn came(&mut self, now: Instant) {
        self.at_end = false;
        self.alive = now;
        // A pause gets lost like a seek: librdkafka delivers nothing of a partition that it knows to rest.
        self.paused = self.paused.filter(|paused| !paused);
    }

    fn reads_on_at(&self) -> Start {
        self.position.map_or(self.start, Start::At)
    }

    /// The end is reached, unless something is still to come before it: then the partition is stuck, if that lasts.
    fn ended(&mut self, now: Instant) {
        if !self.turned_away && self.awaited.is_none() {
            self.at_end = true;
            self.alive = now;
        }
    }

    fn resting(&self, shut: bool) -> bool {
        shut || self.span_full || self.leaving || self.held_back || self.due.is_some()
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
    /// Where those go on that rested, or that turned messages away.
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
            turned_away: false,
            awaited: None,
            leaving: false,
            held_back: false,
            due: None,
            waited: None,
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

    /// A message came: what becomes of it.
    pub(super) fn received(&mut self, partition: &TopicPartition, offset: i64, now: Instant) -> Arrival {
        let Some(state) = self.0.get_mut(partition) else { return Arrival::Left };
        state.came(now);
        if state.turned_away || state.leaving {
            return Arrival::Left;
        }
        let passed = state.awaited.filter(|awaited| awaited.offset < offset);
        if let Some(Awaited { offset, missed }) = passed
            && missed < SEEKS
        {
            state.awaited = Some(Awaited { offset, missed: missed + 1 });
            state.turned_away = true;
            return Arrival::Ahead(offset);
        }
        state.awaited = state.awaited.filter(|awaited| awaited.offset > offset);
        state.position = Some(state.position.map_or(offset + 1, |position| position.max(offset + 1)));
        passed.map_or(Arrival::Taken, |awaited| Arrival::Without(awaited.offset))
    }

    /// A message that came cannot be taken yet, and nothing behind it: the partition reads on from it later.
    pub(super) fn turn_away(&mut self, partition: &TopicPartition, offset: i64) {
        if let Some(state) = self.0.get_mut(partition) {
            state.position = Some(state.position.map_or(offset, |position| position.min(offset)));
            state.turned_away = true;
            let before = state.awaited.filter(|awaited| awaited.offset <= offset);
            state.awaited = before.or(Some(Awaited { offset, missed: 0 }));
        }
    }

    /// The same until `due`: nothing behind the message is due sooner. `false` where the message has waited already, and
    /// is to be taken.
    pub(super) fn defer(&mut self, partition: &TopicPartition, offset: i64, due: Instant, now: Instant) -> bool {
        let Some(state) = self.0.get_mut(partition) else { return false };
        state.came(now);
        if state.waited.is_some_and(|(waited, until)| waited == offset && now >= until) {
            return false;
        }
        if state.due.is_none() {
            state.due = Some(due);
            state.waited = Some((offset, due));
        }
        self.turn_away(partition, offset);
        true
    }

    /// A partition could not be sought: nothing of it is taken until that has worked.
    pub(super) fn not_sought(&mut self, partition: &TopicPartition) {
        if let Some(state) = self.0.get_mut(partition) {
            state.turned_away = true;
        }
    }

    /// Whether messages of this partition are still taken.
    pub(super) fn takes(&self, partition: &TopicPartition) -> bool {
        self.0.get(partition).is_some_and(|state| !state.leaving)
    }

    /// The end of one of these partitions was reached, and this is its number. Of which topic is not said; where several
    /// topics could be meant, the statistics tell within a second.
    pub(super) fn ended(&mut self, number: i32, of: impl Fn(&TopicPartition) -> bool, now: Instant) {
        let numbered = self.0.iter_mut().filter(|(partition, _)| partition.partition == number);
        let mut meant = numbered.filter(|(partition, state)| !state.at_end && of(partition));
        if let (Some((_, state)), None) = (meant.next(), meant.next()) {
            state.ended(now);
        }
    }

    /// Learns ends and lengths from the statistics.
    pub(super) fn learn(&mut self, stats: &Stats, now: Instant) {
        for known in &stats.partitions {
            let Some(state) = self.0.get_mut(&known.partition) else { continue };
            // Of a partition that rests the statistics tell the end that it had before.
            if state.paused != Some(true) {
                state.log_end = known.log_end.or(state.log_end);
            }
            // Behind the last message there may be markers of transactions, which are never delivered; with nothing
            // prefetched, nothing is on its way either.
            let reached = known.end_seen.is_some_and(|end| match state.position {
                Some(position) => position == end || (position < end && known.prefetched == 0),
                None => known.prefetched == 0,
            });
            if reached && state.paused == Some(false) {
                state.ended(now);
            }
        }
    }

    /// Learns the ends of partitions that rest.
    pub(super) fn learn_ends(&mut self, ends: &[(TopicPartition, i64)]) {
        for (partition, end) in ends {
            if let Some(state) = self.0.get_mut(partition) {
                state.log_end = Some(*end);
            }
        }
    }

    /// Partitions whose delivery is paused.
    pub(super) fn resting(&self) -> Vec<TopicPartition> {
        let resting = self.0.iter().filter(|(_, state)| state.paused == Some(true));
        resting.map(|(partition, _)| partition.clone()).collect()
    }

    /// Looks at how far the newest message of a partition is ahead of its watermark.
    pub(super) fn spanned(&mut self, partition: &TopicPartition, span: u64, max: u64) {
        if let Some(state) = self.0.get_mut(partition) {
            state.span_full = span_full(state.span_full, span, max);
        }
    }

    /// Holds back those of which nothing is to be taken now, and no others.
    pub(super) fn hold_back(&mut self, waits: impl Fn(&TopicPartition) -> bool) {
        for (partition, state) in &mut self.0 {
            state.held_back = waits(partition);
        }
    }

    /// Whether a partition has messages to take, as far as is known: none of one that leaves, or that waits for a time.
    pub(super) fn may_deliver(&self, partition: &TopicPartition) -> bool {
        self.0.get(partition).is_some_and(|state| !state.leaving && state.due.is_none())
    }

    /// Whether the end of a partition was reached.
    pub(super) fn is_at_end(&self, partition: &TopicPartition) -> bool {
        self.0.get(partition).is_some_and(|state| state.at_end)
    }

    /// Whether a partition can take nothing until older messages are resolved.
    pub(super) fn is_span_full(&self, partition: &TopicPartition) -> bool {
        self.0.get(partition).is_some_and(|state| state.span_full)
    }

    /// Whether any of them is such a one.
    pub(super) fn any_span_full(&self) -> bool {
        self.0.values().any(|state| state.span_full)
    }

    /// Which partitions are to be paused or resumed, `shut` being whether all of them rest. The caller does it, and
    /// this remembers it as done.
    pub(super) fn change(&mut self, shut: bool, now: Instant) -> Change {
        let mut change = Change::default();
        for (partition, state) in &mut self.0 {
            state.due = state.due.filter(|due| now < *due);
            let rest = state.resting(shut);
            let told = state.paused == Some(rest);
            let anew = !rest && (state.paused == Some(true) || state.turned_away);
            if told && !anew {
                continue;
            }
            if anew {
                change.seek.push((partition.clone(), state.reads_on_at()));
                state.turned_away = false;
            }
            state.paused = Some(rest);
            state.alive = now;
            // What was prefetched is thrown away by a pause, the sign of the end with it; it is given again.
            state.at_end = false;
            match (told, rest) {
                (true, _) => {}
                (false, true) => change.pause.push(partition.clone()),
                (false, false) => change.resume.push(partition.clone()),
            }
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
mod tests;
