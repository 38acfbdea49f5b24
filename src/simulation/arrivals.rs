//! When images arrive.

use std::time::Duration;

/// A pattern of arrivals.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// At random moments, independent of each other.
    Poisson,
    /// As before, but only for `on` out of `on` and `off`, at a higher rate.
    Bursts {
        /// How long images arrive.
        on: Duration,
        /// How long none does, after that.
        off: Duration,
    },
    /// All are there at the beginning.
    Backlog,
}

impl Arrivals {
    /// The moments at which `count` images arrive, in order, `rate` a second on average.
    pub fn times(self, rate: f64, count: usize, seed: u64) -> Vec<Duration> {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut seconds = 0.0;
        let mut next = |a_second: f64| {
            // The distance between random moments is distributed exponentially.
            seconds -= (1.0 - random.f64()).ln() / a_second;
            Duration::from_secs_f64(seconds)
        };
        match self {
            Self::Poisson => (0..count).map(|_| next(rate)).collect(),
            Self::Bursts { on, off } => {
                let (on, off) = (on.as_secs_f64(), off.as_secs_f64());
                // In the time of the bursts alone, into which the pauses are put.
                let within = |time: Duration| {
                    let pauses = (time.as_secs_f64() / on).floor();
                    time + Duration::from_secs_f64(pauses * off)
                };
                (0..count).map(|_| within(next(rate * (on + off) / on))).collect()
            }
            Self::Backlog => vec![Duration::ZERO; count],
        }
    }
}
