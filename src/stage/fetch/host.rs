//! Concurrency: so many fetches at once in all, and so many to one host.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Hands out slots. Cheap to clone; every clone shares the same limits.
#[derive(Debug, Clone)]
pub struct Hosts(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    per_host: usize,
    global: Arc<Semaphore>,
    /// Hosts that somebody uses or waits for; an entry leaves with its last user, so the table stays small.
    table: Mutex<HashMap<String, Entry>>,
}

#[derive(Debug)]
struct Entry {
    slots: Arc<Semaphore>,
    users: usize,
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
    /// At most `concurrency` slots in all and `per_host` for each host; 0 counts as 1.
    pub fn new(concurrency: usize, per_host: usize) -> Self {
        let slots = |count: usize| count.clamp(1, Semaphore::MAX_PERMITS);
        let global = Arc::new(Semaphore::new(slots(concurrency)));
        Self(Arc::new(Shared { per_host: slots(per_host), global, table: Mutex::default() }))
    }

    /// Waits for a slot, first among the host's and then among all: whoever waits for a slow host holds nothing that
    /// the rows of other hosts need.
    pub async fn acquire(&self, host: &str) -> Slot {
        let user = User::enter(self.0.clone(), host);
        let host = granted(user.slots.clone().acquire_owned().await);
        let global = granted(self.0.global.clone().acquire_owned().await);
        Slot { _global: global, _host: host, _user: user }
    }

    /// Hosts in the table.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.lock().len()
    }
}

fn granted(permit: Result<OwnedSemaphorePermit, tokio::sync::AcquireError>) -> OwnedSemaphorePermit {
    // The semaphores are never closed.
    permit.unwrap_or_else(|_| unreachable!("nobody closes the fetch slots"))
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
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
        let new = || Entry { slots: Arc::new(Semaphore::new(shared.per_host)), users: 0 };
        let slots = {
            let mut table = shared.lock();
            let entry = table.entry(host.to_owned()).or_insert_with(new);
            entry.users += 1;
            entry.slots.clone()
        };
        Self { shared, host: host.to_owned(), slots }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut table = self.shared.lock();
        if let Some(entry) = table.get_mut(&self.host) {
            entry.users -= 1;
            if entry.users == 0 {
                table.remove(&self.host);
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
        let hosts = Hosts::new(3, 2);
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
        let hosts = Hosts::new(100, 1);
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
}
