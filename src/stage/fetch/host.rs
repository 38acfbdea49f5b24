//! Concurrency and rate: so many fetches at once in all, so many to one host, and so many a second to one host.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};

/// Hosts that nobody uses are kept while their rate has to be remembered; so many of them are looked through at a time.
const MANY: usize = 1024;

/// Requests that a host has not been sent for so long may come at once.
const BURST: Duration = Duration::from_secs(1);

/// Longest time between two requests that a rate can mean, in seconds.
const LONGEST_INTERVAL: f64 = 3600.0;

/// Hands out slots. Cheap to clone; every clone shares the same limits.
#[derive(Debug, Clone)]
pub struct Hosts(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    per_host: usize,
    /// Between two requests to one host on average; 0 without a limit.
    interval: Duration,
    global: Arc<Semaphore>,
    table: Mutex<Table>,
}

/// Hosts that somebody uses or waits for, or whose rate has to be remembered; so it stays small.
#[derive(Debug, Default)]
struct Table {
    entries: HashMap<String, Entry>,
    /// Looked through when it has so many entries.
    full: usize,
}

#[derive(Debug)]
struct Entry {
    slots: Arc<Semaphore>,
    users: usize,
    /// When its next request is due, if they came evenly (the generic cell rate algorithm, ITU-T I.371).
    due: Instant,
}

impl Entry {
    /// Whether nobody would miss it: a new one would have as many turns behind it.
    fn is_done(&self, now: Instant) -> bool {
        self.users == 0 && self.due.checked_add(BURST).is_some_and(|full| full <= now)
    }

    /// Takes a turn, or says when the next one is. Nobody has it until then: whoever gives up waiting takes nothing along.
    fn turn(&mut self, interval: Duration, now: Instant) -> Result<(), Instant> {
        // A host that was left in peace has a second's worth of turns behind it.
        let earliest = now.checked_sub(BURST.saturating_sub(interval)).unwrap_or(now);
        let due = self.due.max(earliest);
        if due > now {
            return Err(due);
        }
        self.due = due + interval;
        Ok(())
    }
}

/// Leave for one fetch from one host; given back when dropped.
#[derive(Debug)]
#[must_use = "a slot that is dropped is given back"]
pub struct Slot {
    _global: OwnedSemaphorePermit,
    _host: OwnedSemaphorePermit,
    _user: User,
}

impl Hosts {
    /// At most `concurrency` slots in all and `per_host` for each host; 0 counts as 1. Each host has `rate` turns a second; a
    /// rate of 0 sets no limit.
    pub fn new(concurrency: usize, per_host: usize, rate: f64) -> Self {
        let interval = if rate > 0.0 { (1.0 / rate).min(LONGEST_INTERVAL) } else { 0.0 };
        let interval = Duration::from_secs_f64(interval);
        let slots = |count: usize| count.clamp(1, Semaphore::MAX_PERMITS);
        let global = Arc::new(Semaphore::new(slots(concurrency)));
        Self(Arc::new(Shared { per_host: slots(per_host), interval, global, table: Mutex::default() }))
    }

    /// Waits for a slot and a turn, first among the host's and then among all: whoever waits for a slow host holds nothing
    /// that the rows of other hosts need.
    pub async fn acquire(&self, host: &str) -> Slot {
        let user = User::enter(self.0.clone(), host);
        let host = granted(user.slots.clone().acquire_owned().await);
        while let Err(next) = user.turn() {
            sleep_until(next).await;
        }
        let global = granted(self.0.global.clone().acquire_owned().await);
        Slot { _global: global, _host: host, _user: user }
    }

    /// Hosts in the table.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.lock().entries.len()
    }
}

fn granted(permit: Result<OwnedSemaphorePermit, tokio::sync::AcquireError>) -> OwnedSemaphorePermit {
    // The semaphores are never closed.
    permit.unwrap_or_else(|_| unreachable!("nobody closes the fetch slots"))
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        // The table is changed by code that cannot panic half-way.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a host in the table.
#[derive(Debug)]
struct User {
    shared: Arc<Shared>,
    host: String,
    slots: Arc<Semaphore>,
}

impl User {
    fn enter(shared: Arc<Shared>, host: &str) -> Self {
        let now = Instant::now();
        let new = || Entry {
            slots: Arc::new(Semaphore::new(shared.per_host)),
            users: 0,
            due: now.checked_sub(BURST).unwrap_or(now),
        };
        let slots = {
            let mut table = shared.lock();
            if table.entries.len() > table.full.max(MANY) {
                table.entries.retain(|_, entry| !entry.is_done(now));
                table.full = table.entries.len() * 2;
            }
            let entry = table.entries.entry(host.to_owned()).or_insert_with(new);
            entry.users += 1;
            entry.slots.clone()
        };
        Self { shared, host: host.to_owned(), slots }
    }

    /// Takes a turn, where the host's rate is limited, or says when to ask again.
    fn turn(&self) -> Result<(), Instant> {
        let interval = self.shared.interval;
        if interval.is_zero() || self.host == super::FILES {
            return Ok(());
        }
        self.shared.lock().entries.get_mut(&self.host).map_or(Ok(()), |entry| entry.turn(interval, Instant::now()))
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut table = self.shared.lock();
        if let Some(entry) = table.entries.get_mut(&self.host) {
            entry.users -= 1;
            if entry.is_done(Instant::now()) {
                table.entries.remove(&self.host);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn a_full_host_keeps_nothing_from_the_others() {
        let hosts = Hosts::new(3, 2, 0.0);
        let a: Vec<Slot> = (0..2).map(|_| hosts.acquire("a").now_or_never().unwrap()).collect();
        assert!(hosts.acquire("a").now_or_never().is_none(), "a third slot of one host");
        let b = hosts.acquire("b").now_or_never().expect("the last slot of all");
        assert!(hosts.acquire("c").now_or_never().is_none(), "a fourth slot of all");
        drop(a);
        let _c = hosts.acquire("c").now_or_never().expect("room again");
        drop(b);
    }

    #[test]
    fn the_table_forgets_hosts_that_nobody_uses() {
        let hosts = Hosts::new(100, 1, 0.0);
        for host in 0..50 {
            drop(hosts.acquire(&host.to_string()).now_or_never().unwrap());
        }
        assert_eq!(hosts.len(), 0);
        let slot = hosts.acquire("a").now_or_never().unwrap();
        let mut waiting = Box::pin(hosts.acquire("a"));
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(slot);
        assert_eq!(hosts.len(), 1, "somebody still waits for it");
        drop(waiting);
        assert_eq!(hosts.len(), 0, "who gave up waiting leaves too");
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_gets_a_seconds_worth_at_once_and_then_its_rate_and_others_do_not_wait() {
        let hosts = Hosts::new(100, 100, 10.0);
        let begun = Instant::now();
        let mut seen = Vec::new();
        for _ in 0..15 {
            drop(hosts.acquire("a").await);
            seen.push(begun.elapsed().as_millis());
        }
        assert!(seen[..10].iter().all(|&ms| ms == 0), "{seen:?}");
        // The clock of these tests ticks in milliseconds.
        for (at, expected) in seen[10..].iter().zip([100, 200, 300, 400, 500]) {
            assert!((expected..=expected + 2).contains(at), "{seen:?}");
        }
        // Those that give up waiting cost the others nothing.
        for _ in 0..50 {
            assert!(hosts.acquire("a").now_or_never().is_none());
        }
        let before = begun.elapsed().as_millis();
        drop(hosts.acquire("a").await);
        assert!(begun.elapsed().as_millis() - before <= 102);
        assert!(hosts.acquire("b").now_or_never().is_some());
        assert!(hosts.acquire(super::super::FILES).now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_remembered_as_long_as_it_matters_and_no_longer() {
        let hosts = Hosts::new(100, 1, 1.0);
        for host in 0..=MANY {
            drop(hosts.acquire(&host.to_string()).await);
        }
        assert_eq!(hosts.len(), MANY + 1);
        tokio::time::sleep(BURST * 2).await;
        drop(hosts.acquire("a").await);
        assert_eq!(hosts.len(), 1);
    }
}
