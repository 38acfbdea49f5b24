//! How far a job is: a bar on a terminal, a line each ten seconds elsewhere.

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressStyle};

/// Time between two lines, where there is no terminal.
const LINES: Duration = Duration::from_secs(10);
/// The total while nobody knows it.
const UNKNOWN: u64 = 0;

/// Rows of the job, once they are counted; counting goes on beside the work.
#[derive(Debug, Clone, Default)]
pub struct Total(Arc<AtomicU64>);

impl Total {
    /// The rows are counted.
    pub fn set(&self, rows: u64) {
        self.0.store(rows, Ordering::Relaxed);
    }

    fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|rows| *rows != UNKNOWN)
    }
}

/// Tells of the job while it runs.
pub struct Progress {
    bar: ProgressBar,
    lines: bool,
    quiet: bool,
    total: Total,
    begun: Instant,
    told: Instant,
    /// Rows that were done when this run began.
    before: u64,
}

impl Progress {
    /// Of a job of which `before` rows are done.
    pub fn new(total: Total, before: u64, quiet: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        let bar = if quiet || !terminal { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        let now = Instant::now();
        Self { bar, lines: !quiet && !terminal, quiet, total, begun: now, told: now, before }
    }

    /// From now on time counts: the model is loaded.
    pub fn begin(&mut self) {
        (self.begun, self.told) = (Instant::now(), Instant::now());
        self.bar.enable_steady_tick(Duration::from_millis(200));
    }

    /// Shows where the job is.
    #[allow(clippy::print_stderr)] // for people, beside the output
    pub fn show(&mut self, done: u64, failed: u64) {
        let state = State { done, failed, before: self.before, total: self.total.get(), elapsed: self.begun.elapsed() };
        if let Some(total) = state.total {
            if self.bar.length() != Some(total.max(done)) {
                self.bar.set_length(total.max(done));
                let style = ProgressStyle::with_template("{spinner} [{bar:30}] {msg}");
                self.bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
            }
            self.bar.set_position(done);
        }
        self.bar.set_message(state.to_string());
        if self.lines && self.told.elapsed() >= LINES {
            self.told = Instant::now();
            eprintln!("{state}");
        }
    }

    /// A word for people who did not ask for quiet, above the bar.
    pub fn tell(&self, text: &str) {
        if !self.quiet {
            self.say(text);
        }
    }

    /// A word for people in any case, above the bar.
    #[allow(clippy::print_stderr)] // for people, beside the output
    pub fn say(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }

    /// Nothing more is shown.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}

/// Where a job is.
struct State {
    done: u64,
    failed: u64,
    before: u64,
    total: Option<u64>,
    elapsed: Duration,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let done = HumanCount(self.done);
        match self.total {
            Some(total) => write!(f, "{done} of {} rows", HumanCount(total.max(self.done)))?,
            None => write!(f, "{done} rows")?,
        }
        write!(f, ", {} failed", HumanCount(self.failed))?;
        let rate = (self.done - self.before.min(self.done)) as f64 / self.elapsed.as_secs_f64().max(1e-3);
        if rate > 0.0 {
            write!(f, ", {rate:.1} images/s")?;
            if let Some(total) = self.total {
                let left = total.saturating_sub(self.done) as f64 / rate;
                write!(f, ", about {:#} left", HumanDuration(Duration::from_secs_f64(left.min(1e9))))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_this_run_and_the_time_left_follows_from_it() {
        let elapsed = Duration::from_secs(10);
        let state = State { done: 1_500, failed: 2, before: 1_000, total: Some(3_000), elapsed };
        assert_eq!(state.to_string(), "1,500 of 3,000 rows, 2 failed, 50.0 images/s, about 30s left");
        let unknown = State { total: None, ..state };
        assert_eq!(unknown.to_string(), "1,500 rows, 2 failed, 50.0 images/s");
        let begun = State { done: 0, before: 0, ..unknown };
        assert_eq!(begun.to_string(), "0 rows, 2 failed");
    }
}
