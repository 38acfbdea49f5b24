//! How long a try may take.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::FetchError;
use crate::settings;

/// A body's rate is judged once it has taken so long: short waits of a good host are no drip.
const GRACE: Duration = Duration::from_secs(5);

/// How long each part of one try may take, and how far it may lead.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) connect: Duration,
    pub(super) read: Duration,
    pub(super) total: Duration,
    /// Slowest average of a body, in bytes a second.
    pub(super) rate: u64,
    pub(super) redirects: usize,
}

impl Limits {
    pub(super) fn of(settings: &settings::Fetch) -> Self {
        Self {
            connect: settings.connect_timeout,
            read: settings.read_timeout,
            total: settings.total_timeout,
            rate: settings.min_rate.as_u64(),
            redirects: settings.max_redirects,
        }
    }
}

/// The time a try has left. It runs only while the host is waited for.
pub(super) struct Clock {
    limits: Limits,
    left: Duration,
}

impl Clock {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, left: limits.total }
    }

    /// Begins anew, for another try.
    pub(super) fn restart(&mut self) {
        self.left = self.limits.total;
    }

    /// Bound of the wait for a head: a connection, then one read.
    pub(super) fn head(&self) -> (Duration, &'static str) {
        (self.limits.connect.saturating_add(self.limits.read), "fetch.connect_timeout and fetch.read_timeout")
    }

    pub(super) fn read(&self) -> (Duration, &'static str) {
        (self.limits.read, "fetch.read_timeout")
    }

    pub(super) async fn bound<T>(
        &mut self,
        (idle, setting): (Duration, &'static str),
        work: impl Future<Output = T>,
    ) -> Result<T, FetchError> {
        let started = Instant::now();
        let result = timeout(idle.min(self.left), work).await;
        let late = if idle <= self.left {
            FetchError::Timeout { setting, limit: idle }
        } else {
            FetchError::Timeout { setting: "fetch.total_timeout", limit: self.limits.total }
        };
        self.left = self.left.saturating_sub(started.elapsed());
        result.map_err(|_| late)
    }

    /// Begins a body.
    pub(super) fn pace(&self) -> Pace {
        Pace { begun: self.left, bytes: 0 }
    }

    /// Whether a body comes quickly enough, with a piece of so many bytes more.
    pub(super) fn keeps_pace(&self, pace: &mut Pace, bytes: usize) -> Result<(), FetchError> {
        pace.bytes += bytes as u64;
        let taken = pace.begun.saturating_sub(self.left);
        let due = taken.as_secs_f64() * self.limits.rate as f64;
        if taken > GRACE && (pace.bytes as f64) < due {
            return Err(FetchError::TooSlow { limit: self.limits.rate });
        }
        Ok(())
    }
}

/// How a body comes.
pub(super) struct Pace {
    /// What was left of the time.
    begun: Duration,
    bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(rate: u64) -> Clock {
        let second = Duration::from_secs(1);
        Clock::new(Limits { connect: second, read: second * 10, total: second * 60, rate, redirects: 0 })
    }

    /// So many seconds of a body that comes at `rate`, a piece a second.
    async fn came(rate: usize, seconds: usize, clock: &mut Clock) -> Result<(), FetchError> {
        let mut pace = clock.pace();
        for _ in 0..seconds {
            clock.bound(clock.read(), tokio::time::sleep(Duration::from_secs(1))).await?;
            clock.keeps_pace(&mut pace, rate)?;
        }
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_drips_is_given_up_and_a_slow_one_is_not() {
        assert_eq!(came(99, 20, &mut clock(100)).await, Err(FetchError::TooSlow { limit: 100 }));
        came(100, 20, &mut clock(100)).await.unwrap();
        came(1, 20, &mut clock(0)).await.unwrap();
        // A short drip is judged by nothing but the other limits.
        came(1, 5, &mut clock(100)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_try_ends_with_its_time_and_names_the_limit() {
        let mut clock = clock(0);
        let late = clock.bound(clock.read(), tokio::time::sleep(Duration::from_secs(11))).await.unwrap_err();
        assert!(late.to_string().contains("fetch.read_timeout"), "{late}");
        came(1, 50, &mut clock).await.unwrap();
        let late = came(1, 1, &mut clock).await.unwrap_err();
        assert!(late.to_string().contains("fetch.total_timeout"), "{late}");
    }
}
