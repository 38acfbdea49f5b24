//! Is it them, or is it us? Tells the failures of image hosts from an outage of the worker's own surroundings. Pure:
//! takes `now`.
//!
//! **The rule.** An outage begins when, among the latest fetches (none older than the window),
//! - at least [`HOSTS`] hosts fail, which is: more than half of the host's fetches failed,
//! - these are more than half of all hosts that were asked, and
//! - more than half of all fetches failed.
//!
//! "Failed" is a code that may be ours ([`Code::may_be_ours`]); any other answer, a 404 too, shows that the network
//! works. So no single host can begin an outage, however many of its fetches fail, nor can five among many good ones:
//! the first condition wants several hosts, the second counts each host once. Of a host's failures only the latest few
//! count in the third, so that four hosts can never be the majority of the fetches that are looked at: a failure speaks for
//! its host alone. All successes count, since each shows that we reach somebody.
//!
//! **What counts** is each fetch once, with the outcome of its latest try. Not every try: a failing fetch has several,
//! and would outweigh the good ones. Not only the last of them: by then the first messages would be lost to the
//! outage. A fetch whose first try is under way counts as one that did not fail: names that do not resolve fail at
//! once, and good answers take a while.
//!
//! **How it ends.** While the outage is on, held messages are tried again one at a time, with a wait between them that
//! doubles from [`FIRST_WAIT`] to [`LONGEST_WAIT`]. It is over when of the latest [`PROBES`] of these probes at least
//! two succeeded, and those to different hosts, or as half of all. For one window after that, the hosts that
//! answered are the proof that our surroundings are sound: unless one of them fails, no outage begins, so that a set of
//! hosts that are broken for good has its failures published and does not pause the worker again and again.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::disposition::Code;

/// Fewest failing hosts that make an outage.
pub const HOSTS: usize = 5;
/// Wait before the first probe, and after one that succeeded.
pub const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Longest wait between two probes.
pub const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Probes that decide about the end.
pub const PROBES: usize = 8;

/// Fetches that are looked at for each that may be under way: of three, at most one is not decided, and the two others
/// can be the majority that the rule asks for.
const LATEST_PER_SLOT: usize = 3;
/// And not fewer than this.
const FEWEST_LATEST: usize = 96;

/// What one fetch says of its host.
#[derive(Debug, Clone)]
struct Vote {
    fetch: u64,
    host: Arc<str>,
    /// Why its latest try failed; `None` where it did not, or where the first is under way.
    failed: Option<Code>,
    at: Instant,
}

/// What an outage was told by, for a person.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evidence {
    /// Fetches that failed.
    pub failed: usize,
    /// Of so many.
    pub fetches: usize,
    /// Hosts most of whose fetches failed.
    pub hosts_failing: usize,
    /// Of so many.
    pub hosts: usize,
    /// The commonest reason.
    pub code: Code,
}

/// How an outage ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recovery {
    /// How long it lasted.
    pub lasted: Duration,
    /// Probes made.
    pub probes: usize,
}

/// An outage that is on.
#[derive(Debug)]
struct Trouble {
    since: Instant,
    wait: Duration,
    /// When the next probe is due; `None` while one is under way.
    next: Option<Instant>,
    made: usize,
    /// Hosts that failed.
    failed: HashSet<Arc<str>>,
    /// The latest ones, and whether they succeeded.
    probes: VecDeque<(Arc<str>, bool)>,
}

/// Hosts that answered at the end of an outage.
#[derive(Debug)]
struct Proof {
    hosts: HashSet<Arc<str>>,
    until: Instant,
}

/// Watches the fetches of a worker.
#[derive(Debug)]
pub struct Outage {
    window: Duration,
    /// So many fetches are looked at.
    latest: usize,
    /// And no more failures of one host.
    failures_of_a_host: usize,
    votes: VecDeque<Vote>,
    trouble: Option<Trouble>,
    proof: Option<Proof>,
}

impl Outage {
    /// Looks back over `window`, at the latest fetches of a worker that makes up to `concurrency` at once.
    pub fn new(window: Duration, concurrency: usize) -> Self {
        let latest = concurrency.saturating_mul(LATEST_PER_SLOT).max(FEWEST_LATEST);
        let failures_of_a_host = latest / (2 * (HOSTS - 1));
        Self { window, latest, failures_of_a_host, votes: VecDeque::new(), trouble: None, proof: None }
    }

    /// Whether an outage is on.
    pub fn is_on(&self) -> bool {
        self.trouble.is_some()
    }

    /// A try of a fetch begins. `fetch` tells it from the others.
    pub fn begun(&mut self, fetch: u64, host: &Arc<str>, now: Instant) {
        if self.trouble.is_none() && !self.votes.iter().any(|vote| vote.fetch == fetch) {
            self.push(Vote { fetch, host: host.clone(), failed: None, at: now });
        }
    }

    /// A try of a fetch has ended: `failed` with a code that may be ours, or not. Tells when that begins an outage.
    /// While one is on, only its probes count.
    pub fn ended(&mut self, fetch: u64, host: &Arc<str>, failed: Option<Code>, now: Instant) -> Option<Evidence> {
        if let Some(trouble) = &mut self.trouble {
            trouble.failed.extend(failed.map(|_| host.clone()));
            return None;
        }
        if let Some(place) = self.votes.iter().rposition(|vote| vote.fetch == fetch) {
            self.votes.remove(place);
        }
        self.push(Vote { fetch, host: host.clone(), failed, at: now });
        let evidence = failed.and_then(|_| self.evidence(now))?;
        let failed = self.votes.drain(..).filter(|vote| vote.failed.is_some()).map(|vote| vote.host).collect();
        let next = Some(now + FIRST_WAIT);
        self.trouble = Some(Trouble { since: now, wait: FIRST_WAIT, next, made: 0, failed, probes: VecDeque::new() });
        Some(evidence)
    }

    fn push(&mut self, vote: Vote) {
        if vote.failed.is_some() {
            let same = |other: &Vote| other.failed.is_some() && other.host == vote.host;
            if self.votes.iter().filter(|other| same(other)).count() >= self.failures_of_a_host
                && let Some(oldest) = self.votes.iter().position(same)
            {
                self.votes.remove(oldest);
            }
        }
        if self.votes.len() >= self.latest {
            self.votes.pop_front();
        }
        self.votes.push_back(vote);
    }

    fn evidence(&mut self, now: Instant) -> Option<Evidence> {
        let window = self.window;
        self.votes.retain(|vote| now.saturating_duration_since(vote.at) <= window);
        let fetches = self.votes.len();
        let failed = self.votes.iter().filter(|vote| vote.failed.is_some()).count();
        if failed * 2 <= fetches {
            return None;
        }
        let mut hosts: HashMap<&Arc<str>, (usize, usize)> = HashMap::new();
        let mut codes: HashMap<Code, usize> = HashMap::new();
        for vote in &self.votes {
            let (failed, all) = hosts.entry(&vote.host).or_default();
            *failed += usize::from(vote.failed.is_some());
            *all += 1;
            if let Some(code) = vote.failed {
                *codes.entry(code).or_default() += 1;
            }
        }
        let fails = |host: &Arc<str>| hosts.get(host).is_some_and(|(failed, all)| failed * 2 > *all);
        let hosts_failing = hosts.keys().filter(|host| fails(host)).count();
        let proven = |proof: &Proof| now < proof.until && !proof.hosts.iter().any(fails);
        let begins =
            hosts_failing >= HOSTS && hosts_failing * 2 > hosts.len() && !self.proof.as_ref().is_some_and(proven);
        let code = codes.into_iter().max_by_key(|(code, count)| (*count, *code))?.0;
        begins.then_some(Evidence { failed, fetches, hosts_failing, hosts: hosts.len(), code })
    }

    /// When the next probe is due; `None` while there is no outage, or a probe is under way.
    pub fn due(&self) -> Option<Instant> {
        self.trouble.as_ref()?.next
    }

    /// Whether a host has failed in this outage or at its beginning.
    pub fn has_failed(&self, host: &Arc<str>) -> bool {
        self.trouble.as_ref().is_some_and(|trouble| trouble.failed.contains(host))
    }

    /// Probes that told something.
    pub fn probes(&self) -> usize {
        self.trouble.as_ref().map_or(0, |trouble| trouble.made)
    }

    /// How long is waited between two probes, at the moment.
    pub fn wait(&self) -> Option<Duration> {
        self.trouble.as_ref().map(|trouble| trouble.wait)
    }

    /// A probe begins.
    pub fn probe(&mut self) {
        if let Some(trouble) = &mut self.trouble {
            trouble.next = None;
        }
    }

    /// There was nothing to probe with.
    pub fn no_probe(&mut self, now: Instant) {
        if let Some(trouble) = &mut self.trouble {
            trouble.put_off(now);
        }
    }

    /// A probe has ended; `good` is `None` where it told nothing, since its message is gone: its deadline passed, or another
    /// worker has it. Then another one follows at once. Tells when that ends the outage.
    pub fn probed(&mut self, host: &Arc<str>, good: Option<bool>, now: Instant) -> Option<Recovery> {
        let trouble = self.trouble.as_mut()?;
        let Some(good) = good else {
            trouble.next = Some(now);
            return None;
        };
        trouble.made += 1;
        trouble.probes.push_back((host.clone(), good));
        if trouble.probes.len() > PROBES {
            trouble.probes.pop_front();
        }
        if good {
            trouble.wait = FIRST_WAIT;
            trouble.next = Some(now + FIRST_WAIT);
        } else {
            trouble.put_off(now);
        }
        let answered = trouble.probes.iter().filter(|(_, good)| *good);
        let (count, hosts) = (answered.clone().count(), answered.map(|(host, _)| host.clone()).collect::<HashSet<_>>());
        if count < 2 || (hosts.len() < 2 && count * 2 < trouble.probes.len()) {
            return None;
        }
        let recovery = Recovery { lasted: now.saturating_duration_since(trouble.since), probes: trouble.made };
        self.trouble = None;
        self.proof = Some(Proof { hosts, until: now + self.window });
        Some(recovery)
    }
}

impl Trouble {
    fn put_off(&mut self, now: Instant) {
        self.wait = self.wait.saturating_mul(2).min(LONGEST_WAIT);
        self.next = Some(now + self.wait);
    }
}

#[cfg(test)]
mod tests;
