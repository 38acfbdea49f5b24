//! When a free device starts a batch. Pure, so that simulations run the very code of the queue.

use std::time::Duration;

use crate::metrics::Flush;

/// A device that waits for a fuller batch may be woken late by so much, on a busy machine.
const SLACK: Duration = Duration::from_millis(50);

/// How a device takes a batch.
#[derive(Debug, Clone, Copy)]
pub struct Take {
    /// The most items.
    pub max: usize,
    /// How long to wait for more while there are fewer; 0 takes what is there.
    pub linger: Duration,
    /// How long a batch takes: an item that is due at some moment is not waited with into the last so much before it.
    pub work: Duration,
}

/// What a free device sees.
#[derive(Debug, Clone, Copy)]
pub struct Sight {
    /// Items that wait.
    pub items: usize,
    /// The most that are let in to wait: a device that waited for more would wait for nothing.
    pub capacity: usize,
    /// How long this device has been waiting for a fuller batch.
    pub waited: Duration,
    /// How long it is until the first of the items is of no use any more; `None` is for ever.
    pub due_in: Option<Duration>,
    /// Whether no more will come.
    pub closed: bool,
}

/// What it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// It starts, for this reason.
    Start(Flush),
    /// It waits for more items, so long at most.
    Wait(Duration),
    /// It waits until there is an item.
    Sleep,
}

impl Take {
    /// How long a batch may well take: twice as long as the last one, and some slack. Not known, and taken for too long,
    /// before the first.
    pub fn work_after(last: Option<Duration>) -> Duration {
        last.map_or(Duration::MAX, |last| last * 2 + SLACK)
    }

    /// No timer stands between a full batch and a free device, and without `linger` none at all.
    pub fn decide(&self, sight: &Sight) -> Decision {
        let full = self.max.max(1).min(sight.capacity);
        if sight.items == 0 {
            return Decision::Sleep;
        }
        if sight.items >= full {
            return Decision::Start(Flush::Full);
        }
        if sight.closed {
            return Decision::Start(Flush::Drain);
        }
        if self.linger.is_zero() {
            return Decision::Start(Flush::Idle);
        }
        let left = self.linger.saturating_sub(sight.waited);
        let left = sight.due_in.map_or(left, |due| left.min(due.saturating_sub(self.work)));
        if left.is_zero() { Decision::Start(Flush::Linger) } else { Decision::Wait(left) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn sight(items: usize) -> Sight {
        Sight { items, capacity: 64, waited: Duration::ZERO, due_in: None, closed: false }
    }

    #[test]
    fn a_free_device_waits_only_where_it_is_told_to_and_a_full_batch_never_waits() {
        let take = Take { max: 8, linger: 10 * MS, work: 3 * MS };
        let at_once = Take { linger: Duration::ZERO, ..take };
        assert_eq!(take.decide(&sight(0)), Decision::Sleep);
        assert_eq!(at_once.decide(&sight(1)), Decision::Start(Flush::Idle));
        assert_eq!(take.decide(&sight(1)), Decision::Wait(10 * MS));
        assert_eq!(take.decide(&Sight { waited: 4 * MS, ..sight(1) }), Decision::Wait(6 * MS));
        assert_eq!(take.decide(&Sight { waited: 10 * MS, ..sight(1) }), Decision::Start(Flush::Linger));
        assert_eq!(take.decide(&sight(8)), Decision::Start(Flush::Full));
        assert_eq!(take.decide(&Sight { capacity: 4, ..sight(4) }), Decision::Start(Flush::Full));
        assert_eq!(take.decide(&Sight { closed: true, ..sight(1) }), Decision::Start(Flush::Drain));
    }

    #[test]
    fn an_item_that_is_due_is_not_waited_with_into_the_time_that_its_batch_takes() {
        let take = Take { max: 8, linger: 10 * MS, work: 3 * MS };
        let due = |ms: u32| take.decide(&Sight { due_in: Some(ms * MS), ..sight(1) });
        assert_eq!(due(20), Decision::Wait(10 * MS));
        assert_eq!(due(8), Decision::Wait(5 * MS));
        assert_eq!(due(3), Decision::Start(Flush::Linger));
        assert_eq!(due(0), Decision::Start(Flush::Linger));
    }
}
