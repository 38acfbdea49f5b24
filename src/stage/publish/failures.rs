//! Failed rows, counted and logged when the publisher takes them: also while their dead letters cannot be written.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::disposition::Code;
use crate::message::error_text;
use crate::metrics::Metrics;
use crate::stage::Output;

/// Lines of one code in each [`WINDOW`]; a broken image host must not fill the log.
const LINES: u32 = 3;
const WINDOW: Duration = Duration::from_secs(1);

/// Counts and logs failures, whether they go to a retry topic or are dead letters. Cheap to clone; every clone shares the same quotas.
#[derive(Clone)]
pub(super) struct Failures(Arc<Inner>);

struct Inner {
    metrics: Arc<Metrics>,
    quotas: Mutex<BTreeMap<Code, Quota>>,
}

impl Failures {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self(Arc::new(Inner { metrics, quotas: Mutex::default() }))
    }

    /// Notes an output, once, if it is a failure.
    pub(super) fn note(&self, output: &Output) {
        let (origin, failure) = match output {
            Output::Caption { .. } | Output::Canary { .. } => return,
            Output::FailedRow(row, failure) => (row.origin.clone(), failure),
            Output::FailedMessage { message, index, failure, .. } => (message.origin_of(*index), failure),
        };
        self.0.metrics.failed(failure.stage, failure.code);
        let admitted = self.0.quotas().entry(failure.code).or_default().admit(Instant::now());
        if let Some(left_out) = admitted {
            let (code, stage, reason) = (failure.code.as_str(), failure.stage.as_str(), error_text(&failure.message));
            let left_out = (left_out > 0).then_some(left_out);
            tracing::info!(%origin, code, stage, reason, left_out, "an image failed");
        }
    }
}

impl Inner {
    fn quotas(&self) -> MutexGuard<'_, BTreeMap<Code, Quota>> {
        self.quotas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for (code, quota) in &*self.quotas() {
            if quota.left_out > 0 {
                tracing::info!(code = code.as_str(), left_out = quota.left_out, "more images failed");
            }
        }
    }
}

/// At most [`LINES`] in a window that begins with its first line. Pure.
#[derive(Debug, Default)]
struct Quota {
    since: Option<Instant>,
    written: u32,
    left_out: u64,
}

impl Quota {
    /// Whether a line may be written; if so, how many were left out since the last one.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            (self.since, self.written) = (Some(now), 0);
        }
        if self.written == LINES {
            self.left_out += 1;
            return None;
        }
        self.written += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_failures_is_a_few_lines_that_say_how_many_were_left_out() {
        let (mut quota, start) = (Quota::default(), Instant::now());
        let mut lines = Vec::new();
        for failure in 0..2500 {
            // One a millisecond.
            lines.extend(quota.admit(start + Duration::from_millis(failure)));
        }
        assert_eq!(lines, [0, 0, 0, 997, 0, 0, 997, 0, 0]);
        assert_eq!(quota.left_out, 497);
        assert_eq!(quota.admit(start + Duration::from_secs(60)), Some(497));
    }
}
