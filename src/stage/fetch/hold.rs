//! Holds messages while an outage is on, and tries them again: one at a time as probes, then all of them.
//!
//! What is an outage is decided in [`super::outage`]. Here the gate is shut for it, rows wait for their turn, and one
//! driver hands the turns out.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

use super::FetchError;
use super::outage::{Evidence, LONGEST_WAIT, Outage, Recovery};
use crate::disposition::Disposed;
use crate::gate::{Gate, Reason};
use crate::offsets::Ledger;

/// After an outage so many messages are tried again at once, then twice as many, and so on, a step each
/// [`RELEASE_EVERY`]: hosts that have just come back are not met by all of them.
const FIRST_RELEASE: usize = 4;
const RELEASE_EVERY: Duration = Duration::from_millis(200);

/// New messages that are let in with each probe after the first, unless one of a host without a failure is there: what is
/// held may all be of hosts that are broken for good, and only others can tell that.
const NEWCOMERS: usize = 4;

/// What the stage steers and reads when an outage is on.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Shut while the outage is on and until all that was held is under way.
    pub gate: Gate,
    /// Tells what is in flight.
    pub ledger: Ledger,
    /// Cancelled when the worker drains: what is held is given up then, and read again by the next worker.
    pub draining: CancellationToken,
}

/// The messages that are held.
#[derive(Debug)]
pub(super) struct Hold {
    state: Mutex<State>,
    /// Told when the driver has something to look at.
    changed: Notify,
    around: Surroundings,
}

#[derive(Debug)]
struct State {
    outage: Outage,
    /// Fetches so far.
    fetches: u64,
    held: VecDeque<Held>,
    /// Hosts that were probed in this outage, and when last.
    probed: HashMap<Arc<str>, Instant>,
    /// The next step of the release, after an outage.
    release: Option<Release>,
    /// Until when newcomers are let in.
    newcomers: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    host: Arc<str>,
    go: oneshot::Sender<Option<Probe>>,
}

#[derive(Debug)]
struct Release {
    next: Instant,
    count: usize,
}

/// Leave for one try while an outage is on. Dropped without a result, it has told nothing.
#[derive(Debug)]
pub(super) struct Probe {
    hold: Arc<Hold>,
    host: Arc<str>,
    told: bool,
    /// Whether the row goes its usual way if this fails, to make room for others.
    last: bool,
}

/// What becomes of a row after a try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// As if there were no hold.
    AsEver,
    /// It is held and tried again, be its tries spent or not.
    Hold,
    /// It fails with what it met, to make room for others.
    LetGo,
}

/// One row's fetch, as the hold sees it.
pub(super) struct Watch<'a> {
    hold: &'a Arc<Hold>,
    host: Arc<str>,
    fetch: u64,
    /// Whether its message is still ours to answer.
    current: &'a (dyn Fn() -> bool + Sync),
}

impl Hold {
    pub(super) fn new(outage: Outage, around: Surroundings) -> Arc<Self> {
        let state =
            State { outage, fetches: 0, held: VecDeque::new(), probed: HashMap::new(), release: None, newcomers: None };
        Arc::new(Self { state: Mutex::new(state), changed: Notify::new(), around })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is changed by code that cannot panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches a fetch from `host` whose message counts as long as `current` says so.
    pub(super) fn watch<'a>(self: &'a Arc<Self>, host: &str, current: &'a (dyn Fn() -> bool + Sync)) -> Watch<'a> {
        let mut state = self.lock();
        state.fetches += 1;
        Watch { hold: self, host: host.into(), fetch: state.fetches, current }
    }

    /// Hands out turns, for ever.
    pub(super) async fn drive(self: &Arc<Self>) {
        let draining = self.around.draining.clone();
        loop {
            let (turn, wake) = self.step(Instant::now());
            if let Some((held, probe)) = turn {
                // A row that has gone gives its probe back, which drops it.
                let _ = held.go.send(Some(probe));
                continue;
            }
            let wait = async {
                match wake {
                    Some(wake) => tokio::time::sleep_until(wake.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.changed.notified() => {}
                () = wait => {}
                () = draining.cancelled(), if !draining.is_cancelled() => {}
            }
        }
    }

    /// What is to be done now, and when to look again.
    fn step(self: &Arc<Self>, now: Instant) -> (Option<(Held, Probe)>, Option<Instant>) {
        let mut state = self.lock();
        state.held.retain(|held| !held.go.is_closed());
        if self.around.draining.is_cancelled() {
            state.give_up();
            return (None, None);
        }
        if state.outage.is_on() {
            return self.probe(&mut state, now);
        }
        (None, self.release(&mut state, now))
    }

    fn probe(self: &Arc<Self>, state: &mut State, now: Instant) -> (Option<(Held, Probe)>, Option<Instant>) {
        if state.newcomers.is_some_and(|until| until <= now) {
            state.newcomers = None;
            self.around.gate.narrow(Reason::Outage, Some(0));
        }
        if state.outage.due().is_none_or(|due| due > now) {
            return (None, state.outage.due().into_iter().chain(state.newcomers).min());
        }
        // Hosts that were not probed yet come first, and of these the ones of which no failure is known.
        let rank = |held: &Held| (state.probed.get(&held.host).copied(), state.outage.has_failed(&held.host));
        let next = (0..state.held.len()).min_by_key(|index| rank(&state.held[*index]));
        let wait = state.outage.wait();
        let unknown = next.is_some_and(|index| rank(&state.held[index]) == (None, false));
        // Without one that is held, newcomers are the only probes there can be.
        if !unknown && (state.outage.probes() > 0 || next.is_none()) {
            self.around.gate.narrow(Reason::Outage, Some(self.around.ledger.open_tickets() + NEWCOMERS));
            state.newcomers = Some(now + wait.unwrap_or(LONGEST_WAIT) / 2);
        }
        let Some(held) = next.and_then(|index| state.held.remove(index)) else {
            state.outage.no_probe(now);
            return (None, state.outage.due().into_iter().chain(state.newcomers).min());
        };
        // Whatever else keeps newcomers out would keep them out for ever, if all that is held is of hosts that are gone.
        let by_choice = [Reason::Outage, Reason::Operator, Reason::Drain];
        let full = self.around.gate.reasons().iter().any(|reason| !by_choice.contains(reason));
        let last = full && state.probed.contains_key(&held.host) && wait == Some(LONGEST_WAIT);
        state.probed.insert(held.host.clone(), now);
        state.outage.probe();
        let probe = Probe { hold: self.clone(), host: held.host.clone(), told: false, last };
        (Some((held, probe)), None)
    }

    /// The next step of the release.
    fn release(&self, state: &mut State, now: Instant) -> Option<Instant> {
        let release = state.release.as_mut()?;
        if release.next <= now {
            let count = release.count.min(state.held.len());
            *release = Release { next: now + RELEASE_EVERY, count: release.count.saturating_mul(2) };
            for held in state.held.drain(..count) {
                // One that has gone needs no turn.
                let _ = held.go.send(None);
            }
        }
        let next = release.next;
        if !state.held.is_empty() {
            return Some(next);
        }
        state.release = None;
        self.around.gate.narrow(Reason::Outage, None);
        None
    }

    fn begin(&self, state: &mut State, evidence: &Evidence) {
        (state.release, state.newcomers) = (None, None);
        state.probed.clear();
        self.around.gate.narrow(Reason::Outage, Some(0));
        self.changed.notify_one();
        let Evidence { failed, fetches, hosts_failing, hosts, code } = *evidence;
        tracing::warn!(
            failed,
            fetches,
            hosts_failing,
            hosts,
            mostly = code.as_str(),
            "most fetches of most hosts fail, so the trouble is probably near this worker: consumption pauses, and what \
             is in hand is held and tried again. Look at the name servers, the network, a firewall or proxy and the \
             clock of this machine; see outage in docs/runbook.md"
        );
    }

    fn probed(&self, host: &Arc<str>, good: Option<bool>, now: Instant) {
        let mut state = self.lock();
        let recovery = state.outage.probed(host, good, now);
        if let Some(Recovery { lasted, probes }) = recovery {
            state.newcomers = None;
            state.release = Some(Release { next: now, count: FIRST_RELEASE });
            self.around.gate.narrow(Reason::Outage, Some(0));
            tracing::info!(
                ?lasted,
                probes,
                held = state.held.len(),
                "image hosts answer again: the outage is over; what was held is tried again, then consumption goes on"
            );
        } else if good == Some(false) && state.outage.wait() == Some(LONGEST_WAIT) {
            let held = state.held.len() + 1;
            tracing::warn!(held, next_probe_in = ?LONGEST_WAIT, "the outage goes on: another probe failed");
        }
        self.changed.notify_one();
    }
}

impl State {
    /// A drain does not wait for the end of an outage. After one, what is held can still be finished.
    fn give_up(&mut self) {
        if !self.outage.is_on() {
            for held in self.held.drain(..) {
                let _ = held.go.send(None);
            }
        } else if !self.held.is_empty() {
            let held = self.held.len();
            tracing::warn!(
                held,
                "draining during an outage: what is held is given up, and the next worker reads it again"
            );
            self.held.clear();
        }
    }
}

impl Watch<'_> {
    /// Waits for its turn: at once, unless an outage is on. A probe where it still is.
    ///
    /// # Errors
    /// [`FetchError::Halted`]: the worker drains, or the message went to another worker.
    pub(super) async fn turn(&self) -> Result<Option<Probe>, FetchError> {
        let turn = {
            let mut state = self.hold.lock();
            if !state.outage.is_on() {
                return Ok(None);
            }
            if self.hold.around.draining.is_cancelled() {
                return Err(FetchError::Halted);
            }
            let (go, turn) = oneshot::channel();
            state.held.push_back(Held { host: self.host.clone(), go });
            turn
        };
        self.hold.changed.notify_one();
        let turn = turn.await.map_err(|_| FetchError::Halted)?;
        if (self.current)() { Ok(turn) } else { Err(FetchError::Halted) }
    }

    /// Notes that its try begins; `false` where it has to wait for another turn.
    pub(super) fn may_begin(&self) -> bool {
        let mut state = self.hold.lock();
        state.outage.begun(self.fetch, &self.host, Instant::now());
        !state.outage.is_on()
    }

    /// Notes how its try ended, and at which host, where that is another one than the try began with.
    pub(super) fn ended<T>(&self, probe: Option<Probe>, at: Option<&str>, result: &Result<T, FetchError>) -> After {
        let code = result.as_ref().err().map(Disposed::code);
        let ours = code.filter(|code| code.may_be_ours());
        let asked = !result.as_ref().is_err_and(FetchError::came_unasked);
        let now = Instant::now();
        if let Some(mut probe) = probe {
            probe.told = true;
            self.hold.probed(&self.host, asked.then_some(ours.is_none()), now);
            return match ours {
                None => After::AsEver,
                Some(_) if probe.last => After::LetGo,
                Some(_) => After::Hold,
            };
        }
        if !asked {
            return After::AsEver;
        }
        let mut state = self.hold.lock();
        let elsewhere = at.filter(|at| **at != *self.host).map(Arc::from);
        if let Some(evidence) = state.outage.ended(self.fetch, elsewhere.as_ref().unwrap_or(&self.host), ours, now) {
            self.hold.begin(&mut state, &evidence);
        }
        if ours.is_some() && state.outage.is_on() { After::Hold } else { After::AsEver }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if !self.told {
            self.hold.probed(&self.host, None, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests;
