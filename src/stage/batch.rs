//! The queue that devices pull from: one for all of them, with a lane for each input topic.
//!
//! A free device takes what is there, up to its best batch size. No timer stands between a full queue and an idle
//! device: waiting for a fuller batch happens only on request, while less than a full one is there and every deadline
//! allows it.

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

    /// All items, in no particular order.
    fn iter(&self) -> impl Iterator<Item = &T> {
        self.lanes.iter().flat_map(|lane| &lane.items)
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
    /// How long a batch takes: an item that is due at some moment is not waited with into the last so much before it.
    pub work: Duration,
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
    /// Until when an item is of use; `None` is for ever.
    due: fn(&T) -> Option<Instant>,
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
    /// An empty queue for `capacity` items (at least one) in lanes of these weights. `due` says until when an item is of
    /// use, if not for ever.
    pub fn new(capacity: usize, weights: &[u32], due: fn(&T) -> Option<Instant>) -> Self {
        let weights = if weights.is_empty() { &[1][..] } else { weights };
        let state = State { lanes: Lanes::new(weights), out: 0, closed: false, abandoned: false };
        Self(Arc::new(Shared {
            state: Mutex::new(state),
            capacity: capacity.max(1),
            due,
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
        // No more than this ever waits: a device that waited for more would wait for nothing.
        let full = max.min(self.0.capacity);
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
            while state.lanes.len() < full && !state.closed {
                let until = self.latest_start(&state, take.work).map_or(until, |latest| until.min(latest));
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    reason = Flush::Linger;
                    break;
                }
                state = self.0.filled.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        if state.lanes.len() >= full {
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

    /// When a batch must start so that everything that waits is done in time; `None` when nothing is due.
    fn latest_start(&self, state: &State<T>, work: Duration) -> Option<Instant> {
        let due = state.lanes.iter().filter_map(self.0.due).min()?;
        Some(due.checked_sub(work).unwrap_or_else(Instant::now))
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
mod tests;
