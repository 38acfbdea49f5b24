//! The queue that devices pull from: one for all of them, with a lane for each input topic, and one for who asks directly.
//!
//! A free device takes what is there, up to its best batch size. No timer stands between a full queue and an idle
//! device: waiting for a fuller batch happens only on request, while less than a full one is there and every deadline
//! allows it.

mod lanes;
mod policy;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use self::lanes::Lanes;
pub use self::policy::{Decision, Sight, Take};
use crate::metrics::Flush;

/// The queue. Cheap to clone; every clone is the same queue.
#[derive(Debug)]
pub struct Queue<T>(Arc<Shared<T>>);

impl<T> Clone for Queue<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// What guests may have of a queue.
#[derive(Debug, Clone, Copy)]
pub struct Guests {
    /// Their least share of the places in batches, while they wait; more than 0 and less than 1.
    pub share: f64,
    /// How many of them may wait.
    pub room: usize,
}

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    capacity: usize,
    /// Room of the guests' lane.
    guests: usize,
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
    /// Devices that wait for a fuller batch.
    lingering: usize,
    closed: bool,
    /// No device is left to take anything.
    abandoned: bool,
}

impl<T> Queue<T> {
    /// An empty queue for `capacity` items (at least one) in lanes of these weights. `due` says until when an item is of
    /// use, if not for ever.
    pub fn new(capacity: usize, weights: &[u32], due: fn(&T) -> Option<Instant>) -> Self {
        Self::of(Lanes::new(weights), capacity, 0, due)
    }

    /// The same, with a lane for guests behind the others, who get at least `share` of the places in batches while they wait,
    /// and room of their own: a queue that is full of the stream keeps no guest out.
    pub fn with_guests(
        capacity: usize,
        weights: &[u32],
        Guests { share, room }: Guests,
        due: fn(&T) -> Option<Instant>,
    ) -> Self {
        Self::of(Lanes::new(weights).with_guests(share), capacity, room, due)
    }

    fn of(lanes: Lanes<T>, capacity: usize, guests: usize, due: fn(&T) -> Option<Instant>) -> Self {
        let state = State { lanes, out: 0, lingering: 0, closed: false, abandoned: false };
        Self(Arc::new(Shared {
            state: Mutex::new(state),
            capacity: capacity.max(1),
            guests: guests.max(1),
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
        let room = if state.lanes.is_of_guests(lane) { self.0.guests } else { self.0.capacity };
        while state.lanes.len_beside(lane) >= room && !state.abandoned && !state.closed {
            state = self.0.emptied.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.abandoned || state.closed {
            return Err(item);
        }
        state.lanes.push(lane, item);
        // A device that waits for more would swallow the only signal, while the batch is full for another one.
        let all = state.lingering > 0;
        drop(state);
        if all {
            self.0.filled.notify_all();
        } else {
            self.0.filled.notify_one();
        }
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
        let mut state = self.lock();
        // Since when this device has been waiting for a fuller batch.
        let mut since = None;
        let reason = loop {
            let now = Instant::now();
            let waited = now.saturating_duration_since(*since.get_or_insert(now));
            // Who never lingers need not look through all items.
            let due_in = if take.linger.is_zero() { None } else { self.due_in(&state, now) };
            let (items, capacity) = (state.lanes.len(), self.0.capacity);
            state = match take.decide(&Sight { items, capacity, waited, due_in, closed: state.closed }) {
                Decision::Start(reason) => break reason,
                Decision::Wait(left) => {
                    state.lingering += 1;
                    let waited = self.0.filled.wait_timeout(state, left);
                    let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
                    state.lingering -= 1;
                    state
                }
                Decision::Sleep if state.closed && state.out == 0 => return None,
                Decision::Sleep => {
                    since = None;
                    self.0.filled.wait(state).unwrap_or_else(PoisonError::into_inner)
                }
            };
        };
        Some((self.start(state, take.max), reason))
    }

    /// A batch, if one would be started now: what [`Queue::take`] would wait for is not waited for.
    pub fn try_take(&self, take: Take) -> Option<(Vec<T>, Flush)> {
        let state = self.lock();
        let due_in = self.due_in(&state, Instant::now());
        let (items, capacity, closed) = (state.lanes.len(), self.0.capacity, state.closed);
        match take.decide(&Sight { items, capacity, waited: Duration::ZERO, due_in, closed }) {
            Decision::Start(reason) => Some((self.start(state, take.max), reason)),
            Decision::Wait(_) | Decision::Sleep => None,
        }
    }

    /// Takes a batch out.
    fn start(&self, mut state: MutexGuard<'_, State<T>>, max: usize) -> Vec<T> {
        let max = max.max(1);
        let mut batch = Vec::with_capacity(max.min(state.lanes.len()));
        while batch.len() < max {
            let Some(item) = state.lanes.pop() else { break };
            batch.push(item);
        }
        state.out += 1;
        let more = !state.lanes.is_empty();
        drop(state);
        self.0.emptied.notify_all();
        if more {
            // One signal may have been swallowed by this device's wait for more.
            self.0.filled.notify_one();
        }
        batch
    }

    /// How long it is until the first item that waits is of no use any more; `None` when nothing is due.
    fn due_in(&self, state: &State<T>, now: Instant) -> Option<Duration> {
        let due = state.lanes.iter().filter_map(self.0.due).min()?;
        Some(due.saturating_duration_since(now))
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
