//! Leaves a host alone that fails again and again: its messages go to the retry topics at once, instead of holding places
//! and a partition while each waits for the same time-out. A circuit breaker a host (Nygard, "Release It!").
//!
//! A breaker opens after so many failed tries in a row, or when the host asks for a longer wait than a message waits in
//! process. After a while tries go on: the first that succeeds makes the host as good as any, the first that fails leaves it
//! alone for twice as long.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::disposition::Code;
use crate::settings::LONGEST_BREAK;

/// Hosts that failed are forgotten after this time without a try, once there are many of them.
const FORGOTTEN: Duration = Duration::from_secs(30 * 60);
const MANY: usize = 4096;

/// The breakers of all hosts.
#[derive(Debug)]
pub(super) struct Breakers {
    /// Failed tries in a row that open one.
    failures: u32,
    /// How long it is open at first.
    wait: Duration,
    hosts: Mutex<HashMap<String, Host>>,
}

/// A host that failed and has not succeeded since.
#[derive(Debug)]
struct Host {
    failures: u32,
    touched: Instant,
    last: Code,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    until: Instant,
    /// How long it is open this time.
    wait: Duration,
}

/// Why a host is not asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LeftAlone {
    /// For so long yet.
    pub(super) left: Duration,
    /// How it failed last.
    pub(super) last: Code,
}

impl Breakers {
    pub(super) fn new(failures: u32, wait: Duration) -> Self {
        Self { failures: failures.max(1), wait: wait.min(LONGEST_BREAK), hosts: Mutex::default() }
    }

    /// Whether a host may be asked now. After the wait all may: what one of them learns holds for those that still wait for
    /// their turn, and nothing is refused at the very moment at which the host may be back.
    pub(super) fn may_try(&self, host: &str, now: Instant) -> Result<(), LeftAlone> {
        let hosts = self.lock();
        let Some(Host { open: Some(open), last, .. }) = hosts.get(host) else { return Ok(()) };
        let left = open.until.saturating_duration_since(now);
        if left.is_zero() { Ok(()) } else { Err(LeftAlone { left, last: *last }) }
    }

    /// A try succeeded, or failed in a way that a sound host may.
    pub(super) fn succeeded(&self, host: &str) {
        self.lock().remove(host);
    }

    /// A try failed for a reason that may pass; `asked` is the wait that the host wants. Tells whether it is left alone now.
    pub(super) fn failed(&self, host: &str, code: Code, asked: Option<Duration>, now: Instant) -> bool {
        let mut hosts = self.lock();
        if hosts.len() >= MANY {
            hosts.retain(|_, host| now.saturating_duration_since(host.touched) < FORGOTTEN);
        }
        let new = || Host { failures: 0, touched: now, last: code, open: None };
        let host = hosts.entry(host.to_owned()).or_insert_with(new);
        host.failures = host.failures.saturating_add(1);
        (host.touched, host.last) = (now, code);
        let (until, wait) = match &host.open {
            // Tries that were under way when it opened say nothing new, unless it is to be left alone for longer.
            Some(open) if open.until > now => (open.until, open.wait),
            Some(open) => {
                let wait = open.wait.saturating_mul(2).min(LONGEST_BREAK);
                (now + wait, wait)
            }
            None if host.failures >= self.failures || asked.is_some() => (now + self.wait, self.wait),
            None => return false,
        };
        let asked = now + asked.unwrap_or_default().min(LONGEST_BREAK);
        host.open = Some(Open { until: until.max(asked), wait });
        true
    }

    /// How many hosts are left alone.
    pub(super) fn open(&self, now: Instant) -> usize {
        let open = |host: &&Host| host.open.as_ref().is_some_and(|open| open.until > now);
        self.lock().values().filter(open).count()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Host>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A host that failed so often that it is left alone for ten seconds from `now` on.
    fn opened(now: Instant) -> Breakers {
        let breakers = Breakers::new(3, SECOND * 10);
        let failed: Vec<_> = (0..3).map(|_| breakers.failed("a", Code::Timeout, None, now)).collect();
        assert_eq!(failed, [false, false, true]);
        breakers
    }

    #[test]
    fn a_host_is_left_alone_after_failures_in_a_row_and_others_are_not() {
        let now = Instant::now();
        let breakers = opened(now);
        let left = breakers.may_try("a", now + SECOND).unwrap_err();
        assert_eq!(left, LeftAlone { left: SECOND * 9, last: Code::Timeout });
        assert_eq!(breakers.may_try("b", now), Ok(()));
        assert_eq!((breakers.open(now), breakers.open(now + SECOND * 10)), (1, 0));

        let breakers = Breakers::new(3, SECOND);
        for _ in 0..10 {
            assert!(!breakers.failed("a", Code::Connect, None, now));
            assert!(!breakers.failed("a", Code::Connect, None, now));
            breakers.succeeded("a");
        }
    }

    #[test]
    fn after_the_wait_the_first_result_counts_for_all() {
        let now = Instant::now();
        let later = now + SECOND * 10;
        let breakers = opened(now);
        assert_eq!((breakers.may_try("a", later), breakers.may_try("a", later)), (Ok(()), Ok(())));
        assert!(breakers.failed("a", Code::Connect, None, later));
        assert_eq!(breakers.may_try("a", later).unwrap_err().left, SECOND * 20);
        breakers.succeeded("a");
        assert_eq!((breakers.may_try("a", later), breakers.open(later)), (Ok(()), 0));
        assert!(!breakers.failed("a", Code::Timeout, None, later), "it begins anew");
    }

    #[test]
    fn a_host_that_is_not_back_is_left_alone_for_longer_up_to_a_limit() {
        let mut now = Instant::now();
        let breakers = opened(now);
        let mut waits = Vec::new();
        for _ in 0..8 {
            let left = breakers.may_try("a", now).unwrap_err().left;
            waits.push(left.as_secs());
            now += left;
            breakers.may_try("a", now).unwrap();
            assert!(breakers.failed("a", Code::Connect, None, now));
        }
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 600, 600]);
    }

    #[test]
    fn tries_under_way_when_it_opens_make_nothing_longer() {
        let now = Instant::now();
        let breakers = opened(now);
        for _ in 0..50 {
            assert!(breakers.failed("a", Code::Timeout, None, now + SECOND));
        }
        assert_eq!(breakers.may_try("a", now + SECOND).unwrap_err().left, SECOND * 9);
    }

    #[test]
    fn a_wait_that_the_host_asks_for_is_kept_at_once_up_to_a_limit() {
        let now = Instant::now();
        let breakers = Breakers::new(10, SECOND);
        assert!(breakers.failed("a", Code::Http429, Some(SECOND * 90), now));
        assert_eq!(breakers.may_try("a", now).unwrap_err(), LeftAlone { left: SECOND * 90, last: Code::Http429 });
        assert!(breakers.failed("b", Code::Http5xx, Some(SECOND * 86_400), now));
        assert_eq!(breakers.may_try("b", now).unwrap_err().left, LONGEST_BREAK);
    }
}
