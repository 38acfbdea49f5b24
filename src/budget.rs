//! Permits for items and bytes in flight. Whoever makes bytes takes a permit first; permits only shrink.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// A pool of items and bytes, handed out in the order of asking.
///
/// An ask that is larger than the whole pool is admitted once the pool is empty, alone, so that nothing waits for
/// ever. Limits can be changed while the pool is in use; lowering them takes nothing back.
#[derive(Debug, Clone)]
pub struct Pool(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    limit: Limit,
    used: Limit,
    waiting: VecDeque<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    bytes: usize,
    grant: oneshot::Sender<Permit>,
}

/// A number of items and of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limit {
    /// Items.
    pub items: usize,
    /// Bytes.
    pub bytes: usize,
}

impl State {
    fn fits(&self, bytes: usize) -> bool {
        let items_fit = self.used.items < self.limit.items.max(1);
        let bytes_fit = self.used.bytes.saturating_add(bytes) <= self.limit.bytes;
        items_fit && (bytes_fit || self.used.items == 0)
    }

    fn take(&mut self, bytes: usize) {
        self.used.items += 1;
        self.used.bytes += bytes;
    }
}

impl Pool {
    /// An empty pool.
    pub fn new(limit: Limit) -> Self {
        Self(Arc::new(Mutex::new(State { limit, used: Limit::default(), waiting: VecDeque::new() })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; the numbers stay true even if one did.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for one item of `bytes` bytes, behind everyone who asked before.
    pub async fn acquire(&self, bytes: usize) -> Permit {
        let granted = {
            let mut state = self.lock();
            if state.waiting.is_empty() && state.fits(bytes) {
                state.take(bytes);
                return Permit { pool: self.clone(), bytes };
            }
            let (grant, granted) = oneshot::channel();
            state.waiting.push_back(Waiter { bytes, grant });
            granted
        };
        let mut place = Place { pool: self, taken: false };
        match granted.await {
            Ok(permit) => {
                place.taken = true;
                permit
            }
            // A waiter leaves the queue only with a grant, and `self` keeps the queue alive.
            Err(_) => unreachable!("the pool dropped a waiter"),
        }
    }

    /// One item of `bytes` bytes, if it fits now and nobody waits for room.
    pub fn try_acquire(&self, bytes: usize) -> Option<Permit> {
        let mut state = self.lock();
        if !state.waiting.is_empty() || !state.fits(bytes) {
            return None;
        }
        state.take(bytes);
        Some(Permit { pool: self.clone(), bytes })
    }

    /// What is handed out.
    pub fn used(&self) -> Limit {
        self.lock().used
    }

    /// What may be handed out.
    pub fn limit(&self) -> Limit {
        self.lock().limit
    }

    /// How full the pool is: the larger of its items' and its bytes' share; over 1 with an over-large item.
    pub fn fill(&self) -> f64 {
        let state = self.lock();
        let share = |used: usize, limit: usize| used as f64 / limit.max(1) as f64;
        share(state.used.items, state.limit.items).max(share(state.used.bytes, state.limit.bytes))
    }

    /// Changes the limits; who waits and fits now is served at once.
    pub fn set_limit(&self, limit: Limit) {
        self.lock().limit = limit;
        self.serve();
    }

    /// Grants what fits, oldest first: a small ask never overtakes a large one, or the large one would starve.
    fn serve(&self) {
        loop {
            let mut state = self.lock();
            let Some(first) = state.waiting.front() else { return };
            if !first.grant.is_closed() && !state.fits(first.bytes) {
                return;
            }
            let Some(waiter) = state.waiting.pop_front() else { return };
            if waiter.grant.is_closed() {
                continue;
            }
            state.take(waiter.bytes);
            drop(state);
            // A waiter that gave up in this moment gets its permit back to us, and dropping it serves the next.
            let _ = waiter.grant.send(Permit { pool: self.clone(), bytes: waiter.bytes });
        }
    }
}

/// A place in the queue. Leaving it without a permit frees those behind it, who would else wait for the next return
/// although their ask fits.
struct Place<'p> {
    pool: &'p Pool,
    taken: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if !self.taken {
            self.pool.lock().waiting.retain(|waiter| !waiter.grant.is_closed());
            self.pool.serve();
        }
    }
}

/// Leave for one item and its bytes; given back when dropped.
#[derive(Debug)]
#[must_use = "a permit that is dropped is given back"]
pub struct Permit {
    pool: Pool,
    bytes: usize,
}

impl Permit {
    /// Bytes it covers.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Gives back all but `bytes`. A larger number changes nothing: permits only shrink.
    pub fn shrink(&mut self, bytes: usize) {
        if bytes < self.bytes {
            self.pool.lock().used.bytes -= self.bytes - bytes;
            self.bytes = bytes;
            self.pool.serve();
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        {
            let mut state = self.pool.lock();
            state.used.items -= 1;
            state.used.bytes -= self.bytes;
        }
        self.pool.serve();
    }
}

#[cfg(test)]
mod tests;
