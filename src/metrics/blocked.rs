//! How long stages were blocked.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The time in which at least one worker of a stage waited: however many wait at once, it passes once. A wait counts
/// while it lasts, so that one without end shows, too.
#[derive(Debug, Default)]
pub(super) struct Stopwatch(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    waits: usize,
    /// When the first of the waits under way began.
    since: Option<Instant>,
    /// What has passed before that.
    total: Duration,
}

impl Stopwatch {
    /// The time so far, that of the waits under way included.
    pub(super) fn total(&self) -> Duration {
        let state = self.lock();
        state.total + state.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    pub(super) fn start(&self) -> Blocked<'_> {
        let mut state = self.lock();
        state.waits += 1;
        state.since.get_or_insert_with(Instant::now);
        Blocked(self)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A wait of a stage; it ends when this is dropped, so that a wait that is given up counts as well.
#[derive(Debug)]
#[must_use = "the wait ends when this is dropped"]
pub struct Blocked<'a>(&'a Stopwatch);

impl Drop for Blocked<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.waits -= 1;
        if state.waits == 0
            && let Some(since) = state.since.take()
        {
            state.total += since.elapsed();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;

    const WAIT: Duration = Duration::from_millis(20);

    #[test]
    fn a_wait_counts_while_it_lasts_and_no_longer() {
        let watch = Stopwatch::default();
        assert_eq!(watch.total(), Duration::ZERO);
        let wait = watch.start();
        sleep(WAIT);
        assert!(watch.total() >= WAIT);
        drop(wait);
        let total = watch.total();
        sleep(WAIT);
        assert_eq!(watch.total(), total);
    }

    #[test]
    fn waits_at_the_same_time_count_once() {
        let (watch, begun) = (Stopwatch::default(), Instant::now());
        let first = watch.start();
        let second = watch.start();
        sleep(WAIT);
        drop(first);
        sleep(WAIT);
        drop(second);
        assert!(watch.total() >= 2 * WAIT);
        assert!(watch.total() <= begun.elapsed());
    }
}
