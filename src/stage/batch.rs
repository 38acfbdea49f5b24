//! The queue that devices pull from: one for all of them, with a lane for each input topic.
//!
//! A free device takes what is there, up to its best batch size. No timer stands between a full queue and an idle
//! device: waiting for a fuller batch happens only on request, and only while less than a full one is there.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::metrics::Flush;

/// Items of several lanes, taken in proportion to the lanes' weights, oldest first within a lane. Pure.
///
/// Smooth weighted round-robin (as nginx balances upstreams): before each pick every lane that has items earns its
/// weight, the richest lane gives an item and pays the sum. A backlog in one lane thus never starves another.
#[derive(Debug)]
pub struct Lanes<T> {
    lanes: Vec<Lane<T>>,
    len: usize,
}

#[derive(Debug)]
struct Lane<T> {
    weight: i64,
    credit: i64,
    items: VecDeque<T>,
}

impl<T> Lanes<T> {
    /// Empty lanes of these weights; a weight of 0 counts as 1.
    pub fn new(weights: &[u32]) -> Self {
        let lane = |weight: &u32| Lane { weight: i64::from((*weight).max(1)), credit: 0, items: VecDeque::new() };
        Self { lanes: weights.iter().map(lane).collect(), len: 0 }
    }

    /// Items in all lanes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether all lanes are empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts an item at the end of a lane; an unknown lane is the last one.
    pub fn push(&mut self, lane: usize, item: T) {
        let lane = lane.min(self.lanes.len() - 1);
        self.lanes[lane].items.push_back(item);
        self.len += 1;
    }

    /// Puts an item back at the front of a lane.
    pub fn put_back(&mut self, lane: usize, item: T) {
        let lane = lane.min(self.lanes.len() - 1);
        self.lanes[lane].items.push_front(item);
        self.len += 1;
    }

    /// The item whose turn it is.
    pub fn pop(&mut self) -> Option<T> {
        let mut total = 0;
        let mut richest: Option<usize> = None;
        for index in 0..self.lanes.len() {
            let lane = &mut self.lanes[index];
            if lane.items.is_empty() {
                // An idle lane saves nothing up, or it would flood the devices when it wakes.
                lane.credit = 0;
                continue;
            }
            lane.credit += lane.weight;
            total += lane.weight;
            if richest.is_none_or(|best| self.lanes[index].credit > self.lanes[best].credit) {
                richest = Some(index);
            }
        }
        let lane = &mut self.lanes[richest?];
        lane.credit -= total;
        self.len -= 1;
        lane.items.pop_front()
    }
}

/// How a device takes a batch.
#[derive(Debug, Clone, Copy)]
pub struct Take {
    /// The most items.
    pub max: usize,
    /// How long to wait for more while there are fewer; 0 takes what is there.
    pub linger: Duration,
}

/// The queue. Cheap to clone; every clone is the same queue.
#[derive(Debug)]
pub struct Queue<T>(Arc<Shared<T>>);

impl<T> Clone for Queue<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    capacity: usize,
    /// Signals items to devices.
    filled: Condvar,
    /// Signals room to decoders.
    emptied: Condvar,
}

#[derive(Debug)]
struct State<T> {
    lanes: Lanes<T>,
    /// Batches that devices are at work on, and may yet put back.
    out: usize,
    closed: bool,
    /// No device is left to take anything.
    abandoned: bool,
}

impl<T> Queue<T> {
    /// An empty queue for `capacity` items (at least one) in lanes of these weights.
    pub fn new(capacity: usize, weights: &[u32]) -> Self {
        let weights = if weights.is_empty() { &[1][..] } else { weights };
        let state = State { lanes: Lanes::new(weights), out: 0, closed: false, abandoned: false };
        Self(Arc::new(Shared {
            state: Mutex::new(state),
            capacity: capacity.max(1),
            filled: Condvar::new(),
            emptied: Condvar::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts an item at the end of its lane, waiting for room. An item comes back when no device will take it.
    pub fn push(&self, lane: usize, item: T) -> Result<(), T> {
        let mut state = self.lock();
        while state.lanes.len() >= self.0.capacity && !state.abandoned && !state.closed {
            state = self.0.emptied.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.abandoned || state.closed {
            return Err(item);
        }
        state.lanes.push(lane, item);
        drop(state);
        self.0.filled.notify_one();
        Ok(())
    }

    /// Puts the items of an unfinished batch back at the front. They may be more than the capacity: they were
    /// admitted before.
    pub fn put_back(&self, items: Vec<(usize, T)>) {
        let mut state = self.lock();
        for (lane, item) in items.into_iter().rev() {
            state.lanes.put_back(lane, item);
        }
        drop(state);
        self.0.filled.notify_all();
    }

    /// A device is done with its batch: finished, or put back what was left. Every batch taken is to be followed by it.
    pub fn done(&self) {
        self.lock().out -= 1;
        self.0.filled.notify_all();
    }

    /// Waits for a batch. `None` when the queue is closed and empty, and no other device can put anything back.
    pub fn take(&self, take: Take) -> Option<(Vec<T>, Flush)> {
        let max = take.max.max(1);
        let mut state = self.lock();
        while state.lanes.is_empty() {
            if state.closed && state.out == 0 {
                return None;
            }
            state = self.0.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let mut reason = Flush::Idle;
        if !take.linger.is_zero() {
            let until = Instant::now() + take.linger;
            while state.lanes.len() < max && !state.closed {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    reason = Flush::Linger;
                    break;
                }
                state = self.0.filled.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        if state.lanes.len() >= max {
            reason = Flush::Full;
        } else if state.closed {
            reason = Flush::Drain;
        }
        let mut batch = Vec::with_capacity(max.min(state.lanes.len()));
        while batch.len() < max {
            let Some(item) = state.lanes.pop() else { break };
            batch.push(item);
        }
        state.out += usize::from(!batch.is_empty());
        let more = !state.lanes.is_empty();
        drop(state);
        self.0.emptied.notify_all();
        if more {
            // One signal may have been swallowed by this device's wait for more.
            self.0.filled.notify_one();
        }
        // While this device lingered another one may have taken everything.
        if batch.is_empty() { self.take(take) } else { Some((batch, reason)) }
    }

    /// Items that wait.
    pub fn len(&self) -> usize {
        self.lock().lanes.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// No more items will come; devices finish what is there.
    pub fn close(&self) {
        self.lock().closed = true;
        self.0.filled.notify_all();
        self.0.emptied.notify_all();
    }

    /// No device is left: pushing fails from now on, and what waits is handed back.
    pub fn abandon(&self) -> Vec<T> {
        let mut state = self.lock();
        state.abandoned = true;
        let left = std::iter::from_fn(|| state.lanes.pop()).collect();
        drop(state);
        self.0.emptied.notify_all();
        left
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    const NOW: Take = Take { max: 4, linger: Duration::ZERO };

    proptest! {
        #[test]
        fn lanes_lose_nothing_and_keep_the_order_within_a_lane(
            weights in proptest::collection::vec(0u32..5, 1..4),
            pushes in proptest::collection::vec(0usize..4, 0..200),
        ) {
            let mut lanes = Lanes::new(&weights);
            for (order, lane) in pushes.iter().enumerate() {
                lanes.push(*lane, ((*lane).min(weights.len() - 1), order));
            }
            let popped: Vec<_> = std::iter::from_fn(|| lanes.pop()).collect();
            prop_assert_eq!(popped.len(), pushes.len());
            for lane in 0..weights.len() {
                let orders: Vec<_> = popped.iter().filter(|(l, _)| *l == lane).map(|(_, o)| *o).collect();
                prop_assert!(orders.is_sorted());
            }
        }

        #[test]
        fn lanes_share_in_proportion_to_their_weights(a in 1u32..8, b in 1u32..8) {
            let mut lanes = Lanes::new(&[a, b]);
            for _ in 0..100 {
                lanes.push(0, 0usize);
                lanes.push(1, 1usize);
            }
            let rounds = 6;
            let picks: Vec<_> = (0..(a + b) * rounds).filter_map(|_| lanes.pop()).collect();
            prop_assert_eq!(picks.iter().filter(|l| **l == 0).count() as u32, a * rounds);
        }
    }

    #[test]
    fn a_backlog_does_not_starve_the_other_lane() {
        let mut lanes = Lanes::new(&[1, 1]);
        (0..1000).for_each(|i| lanes.push(0, i));
        lanes.push(1, 5000);
        assert!((0..2).filter_map(|_| lanes.pop()).any(|item| item == 5000));
    }

    #[test]
    fn a_free_device_takes_what_is_there_at_once() {
        let queue = Queue::new(10, &[1]);
        queue.push(0, 'a').unwrap();
        assert_eq!(queue.take(NOW), Some((vec!['a'], Flush::Idle)));
    }

    #[test]
    fn a_batch_is_never_larger_than_asked_for() {
        let queue = Queue::new(10, &[1]);
        (0..6).for_each(|i| queue.push(0, i).unwrap());
        assert_eq!(queue.take(NOW), Some((vec![0, 1, 2, 3], Flush::Full)));
        assert_eq!(queue.take(NOW), Some((vec![4, 5], Flush::Idle)));
    }

    #[test]
    fn lingering_ends_when_the_batch_is_full() {
        let queue = Queue::new(10, &[1]);
        queue.push(0, 0).unwrap();
        let device = {
            let queue = queue.clone();
            thread::spawn(move || queue.take(Take { max: 4, linger: Duration::from_secs(60) }))
        };
        (1..4).for_each(|i| queue.push(0, i).unwrap());
        assert_eq!(device.join().unwrap(), Some((vec![0, 1, 2, 3], Flush::Full)));
    }

    #[test]
    fn lingering_ends_with_its_time() {
        let queue = Queue::new(10, &[1]);
        queue.push(0, 'a').unwrap();
        assert_eq!(queue.take(Take { max: 4, linger: Duration::from_millis(5) }), Some((vec!['a'], Flush::Linger)));
    }

    #[test]
    fn closing_ends_lingering_and_drains_what_is_there() {
        let queue = Queue::new(10, &[1]);
        queue.push(0, 'a').unwrap();
        queue.close();
        assert_eq!(queue.take(Take { max: 4, linger: Duration::from_secs(60) }), Some((vec!['a'], Flush::Drain)));
        queue.done();
        assert_eq!(queue.take(NOW), None);
        assert_eq!(queue.push(0, 'b'), Err('b'));
    }

    #[test]
    fn pushing_waits_for_room() {
        let queue = Queue::new(2, &[1]);
        queue.push(0, 0).unwrap();
        queue.push(0, 1).unwrap();
        let pusher = {
            let queue = queue.clone();
            thread::spawn(move || (2..40).try_for_each(|i| queue.push(0, i)))
        };
        let mut seen = Vec::new();
        while seen.len() < 40 {
            let (batch, _) = queue.take(NOW).unwrap();
            assert!(batch.len() <= 2, "the queue held more than its capacity");
            seen.extend(batch);
        }
        pusher.join().unwrap().unwrap();
        assert!(seen.is_sorted());
    }

    #[test]
    fn several_devices_share_the_queue_and_none_of_its_items_is_lost_or_taken_twice() {
        let queue = Queue::new(8, &[1, 3]);
        let devices: Vec<_> = [1, 3, 4]
            .map(|max| {
                let queue = queue.clone();
                thread::spawn(move || {
                    let mut seen = Vec::new();
                    while let Some((batch, _)) = queue.take(Take { max, linger: Duration::from_micros(50) }) {
                        seen.extend(batch);
                        queue.done();
                    }
                    seen
                })
            })
            .into();
        (0..2000).for_each(|i| queue.push(i % 2, i).unwrap());
        queue.close();
        let mut all: Vec<_> = devices.into_iter().flat_map(|d| d.join().unwrap()).collect();
        all.sort_unstable();
        assert_eq!(all, (0..2000).collect::<Vec<_>>());
    }

    #[test]
    fn a_batch_that_is_put_back_is_the_next_one() {
        let queue = Queue::new(4, &[1]);
        (0..4).for_each(|i| queue.push(0, i).unwrap());
        let (batch, _) = queue.take(NOW).unwrap();
        queue.push(0, 9).unwrap();
        queue.put_back(batch.into_iter().map(|i| (0, i)).collect());
        assert_eq!(queue.take(NOW).unwrap().0, vec![0, 1, 2, 3]);
    }

    #[test]
    fn a_device_waits_at_the_end_for_what_another_one_may_put_back() {
        let queue = Queue::new(4, &[1]);
        queue.push(0, 'a').unwrap();
        let (batch, _) = queue.take(NOW).unwrap();
        queue.close();
        let other = {
            let queue = queue.clone();
            thread::spawn(move || queue.take(NOW))
        };
        queue.put_back(batch.into_iter().map(|item| (0, item)).collect());
        queue.done();
        assert_eq!(other.join().unwrap(), Some((vec!['a'], Flush::Drain)));
    }

    #[test]
    fn an_abandoned_queue_hands_back_what_waits_and_refuses_more() {
        let queue = Queue::new(4, &[1]);
        queue.push(0, 1).unwrap();
        assert_eq!(queue.abandon(), vec![1]);
        assert_eq!(queue.push(0, 2), Err(2));
    }
}
