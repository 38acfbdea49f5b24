//! How long a device takes for a batch of so many images.

use std::time::Duration;

use serde::Deserialize;

use crate::stage::infer::{Measured, best_of};

/// Measured batch sizes and their times. Between them the time runs straight; below the smallest it stays, beyond the
/// largest it grows by the time that an image takes there.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve(Vec<(usize, Duration)>);

/// Why a curve can't be used.
#[derive(Debug, thiserror::Error)]
pub enum CurveError {
    /// The text is not what `blipstream bench captioner --json` prints.
    #[error("this is not what `blipstream bench captioner --json` prints: {0}")]
    Json(#[from] serde_json::Error),
    /// No batch size, a size of 0, or a time or rate that is none.
    #[error("a curve needs at least one batch size, each of at least 1, and with a time of more than 0")]
    Empty,
}

/// What is read of a report.
#[derive(Deserialize)]
struct Report {
    batches: Vec<Batch>,
}

#[derive(Deserialize)]
struct Batch {
    batch: usize,
    images_per_second: f64,
}

impl Curve {
    /// From batch sizes and their times, in any order; of several times of a size the last counts.
    pub fn new(points: impl IntoIterator<Item = (usize, Duration)>) -> Result<Self, CurveError> {
        let mut sorted = std::collections::BTreeMap::new();
        for (size, time) in points {
            if size == 0 || time.is_zero() {
                return Err(CurveError::Empty);
            }
            sorted.insert(size, time);
        }
        if sorted.is_empty() { Err(CurveError::Empty) } else { Ok(Self(sorted.into_iter().collect())) }
    }

    /// From the report of `blipstream bench captioner --json`.
    pub fn from_report(json: &str) -> Result<Self, CurveError> {
        let report: Report = serde_json::from_str(json)?;
        let point = |Batch { batch, images_per_second }: Batch| {
            let seconds = batch as f64 / images_per_second;
            Ok((batch, Duration::try_from_secs_f64(seconds).map_err(|_| CurveError::Empty)?))
        };
        Self::new(report.batches.into_iter().map(point).collect::<Result<Vec<_>, CurveError>>()?)
    }

    /// How long a batch of so many images takes.
    pub fn time(&self, size: usize) -> Duration {
        let (first, last) = (self.0[0], self.0[self.0.len() - 1]);
        if size <= first.0 {
            return first.1;
        }
        if size >= last.0 {
            return last.1.mul_f64(size as f64 / last.0 as f64);
        }
        let above = self.0.partition_point(|(known, _)| *known < size);
        let ((small, quick), (large, slow)) = (self.0[above - 1], self.0[above]);
        let share = (size - small) as f64 / (large - small) as f64;
        Duration::from_secs_f64(quick.as_secs_f64() * (1.0 - share) + slow.as_secs_f64() * share)
    }

    /// Images a second in batches of a size.
    pub fn rate(&self, size: usize) -> f64 {
        size as f64 / self.time(size).as_secs_f64()
    }

    /// The measured size that a device would be [given](best_of), had it this curve.
    pub fn best(&self, within: Option<Duration>) -> usize {
        let sizes: Vec<_> = self.0.iter().map(|&(size, time)| Measured { size, time }).collect();
        best_of(&sizes, within).map_or(1, |best| best.size)
    }
}
