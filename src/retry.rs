//! When to try again: exponential backoff with full jitter, bounded by tries and by a deadline. Pure: takes `now`.

use std::time::{Duration, Instant};

/// How often and how fast to try again.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// Tries in all, the first included.
    pub attempts: u32,
    /// Upper bound of the first wait; it doubles from there.
    pub base: Duration,
    /// Upper bound of any wait.
    pub max: Duration,
}

impl Backoff {
    /// How long to wait after `made` tries, or `None` to give up: the tries are spent, or the wait would pass
    /// `deadline`.
    ///
    /// The wait is uniform between 0 and min(max, base × 2^(made−1)) ("full jitter", Brooker 2015), drawn from
    /// `random` in [0, 1). A wait that the other side asked for is a lower bound, and is itself bounded by `max`, so
    /// that no host can park a message for an hour.
    pub fn wait(
        &self,
        made: u32,
        asked: Option<Duration>,
        now: Instant,
        deadline: Option<Instant>,
        random: f64,
    ) -> Option<Duration> {
        if made >= self.attempts {
            return None;
        }
        let ceiling = self.base.saturating_mul(1u32.checked_shl(made.saturating_sub(1)).unwrap_or(u32::MAX));
        let drawn = ceiling.min(self.max).mul_f64(random.clamp(0.0, 1.0));
        let wait = drawn.max(asked.unwrap_or_default()).min(self.max);
        let late = deadline.is_some_and(|deadline| now.checked_add(wait).is_none_or(|then| then >= deadline));
        (!late).then_some(wait)
    }
}

#[cfg(test)]
mod tests;
