//! The admission control behind pause and resume: may the worker consume more?

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disposition::names;

names! {
    /// Why consumption waits.
    Reason {
        /// Somebody said pause.
        Operator = "operator",
        /// The message pool is spent, or what is left of it too little for the next message.
        Messages = "messages",
        /// As many messages are in flight as somebody allowed.
        Limit = "limit",
        /// The queue behind the consumer is full: messages come faster than they are read and fetched.
        Queue = "queue",
        /// A partition rests, since its oldest message is not resolved and the newest is far ahead of it.
        Span = "span",
        /// Messages are taken one at a time, to find the one that kills its worker.
        Solo = "solo",
        /// Most fetches of most hosts fail, so the trouble is probably this worker's own surroundings.
        Outage = "outage",
        /// Dead letters come faster than is allowed.
        DeadLetters = "dead_letters",
        /// The worker is draining.
        Drain = "drain",
    }
}

/// What the gate lets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    /// Everything.
    Open,
    /// Messages while fewer than this are in flight.
    Limited(usize),
    /// Nothing.
    Shut,
}

/// The gate. Cheap to clone; every clone is the same gate.
#[derive(Debug, Clone, Default)]
pub struct Gate(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// What shuts the gate.
    reasons: BTreeSet<Reason>,
    /// What others say.
    told: BTreeSet<Reason>,
    limit: Option<usize>,
    /// Limits that the worker sets itself, each for its reason.
    narrowed: BTreeMap<Reason, usize>,
}

impl Gate {
    /// An open gate.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shuts the gate for a reason; it opens when every reason is gone. Returns whether the reason is new.
    pub fn shut(&self, reason: Reason) -> bool {
        self.lock().reasons.insert(reason)
    }

    /// Takes a reason away. Returns whether it was there.
    pub fn clear(&self, reason: Reason) -> bool {
        self.lock().reasons.remove(&reason)
    }

    /// Sets a reason or takes it away. Returns whether that changed anything.
    pub fn set(&self, reason: Reason, shut: bool) -> bool {
        if shut { self.shut(reason) } else { self.clear(reason) }
    }

    /// Notes a reason for which consumption waits, or takes it away, without shutting the gate: what has been consumed
    /// may pass as soon as there is room.
    pub fn tell(&self, reason: Reason, waits: bool) {
        let mut state = self.lock();
        if waits {
            state.told.insert(reason)
        } else {
            state.told.remove(&reason)
        };
    }

    /// Limits the messages in flight, or lifts the limit.
    pub fn limit(&self, in_flight: Option<usize>) {
        self.lock().limit = in_flight;
    }

    /// The limit on messages in flight, if there is one.
    pub fn limit_now(&self) -> Option<usize> {
        self.lock().limit
    }

    /// Limits the messages in flight for a reason, or lifts that limit; the smallest of all limits counts, and 0 shuts
    /// the gate. Consumption waits for this reason as long as the limit is there.
    pub fn narrow(&self, reason: Reason, in_flight: Option<usize>) {
        let mut state = self.lock();
        match in_flight {
            Some(limit) => state.narrowed.insert(reason, limit),
            None => state.narrowed.remove(&reason),
        };
    }

    /// What the gate lets through now.
    pub fn passage(&self) -> Passage {
        let state = self.lock();
        let narrowest = state.narrowed.values().min().copied();
        match narrowest.into_iter().chain(state.limit).min() {
            _ if !state.reasons.is_empty() || narrowest == Some(0) => Passage::Shut,
            Some(limit) => Passage::Limited(limit),
            None => Passage::Open,
        }
    }

    /// Whether one more message may pass while `in_flight` are under way.
    pub fn admits(&self, in_flight: usize) -> bool {
        match self.passage() {
            Passage::Open => true,
            Passage::Limited(limit) => in_flight < limit,
            Passage::Shut => false,
        }
    }

    /// Why consumption waits, be the gate shut or not; empty when it does not.
    pub fn reasons(&self) -> Vec<Reason> {
        let state = self.lock();
        let all = state.reasons.iter().chain(&state.told).chain(state.narrowed.keys());
        all.copied().collect::<BTreeSet<_>>().into_iter().collect()
    }
}

/// Two thresholds, so that a pool at its limit does not pause and resume with every message: pausing discards what
/// librdkafka has prefetched.
#[derive(Debug, Clone, Copy)]
pub struct Hysteresis {
    high: f64,
    low: f64,
    shut: bool,
}

impl Hysteresis {
    /// Shuts at `high`, opens at `low`; shares of a limit, `low` no larger than `high`.
    pub fn new(high: f64, low: f64) -> Self {
        Self { high, low: low.min(high), shut: false }
    }

    /// Whether to be shut at this fill.
    pub fn update(&mut self, fill: f64) -> bool {
        if fill >= self.high {
            self.shut = true;
        } else if fill <= self.low {
            self.shut = false;
        }
        self.shut
    }
}

#[cfg(test)]
mod tests;
