//! The filter: what it keeps and what it rejects.

use prometheus::{HistogramVec, IntCounterVec};

use super::Metrics;
use super::registrar::Registrar;
use crate::message::TextSource;

/// Values of the label `kept`.
const KEPT: [&str; 2] = ["true", "false"];
/// The threshold is usually a half, and most probabilities are near 0 or 1.
const PROBABILITIES: &[f64] = &[0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0];

/// Its families.
#[derive(Debug)]
pub(super) struct FilterMetrics {
    candidates: IntCounterVec,
    probability: HistogramVec,
}

impl FilterMetrics {
    /// Registers them; all series are there from the start.
    pub(super) fn new(r: &mut Registrar) -> Self {
        let metrics = Self {
            candidates: r.counters(
                "filter_candidates_total",
                &["source", "kept"],
                "Captions and found texts that the filter judged.",
            ),
            probability: r.histograms(
                "filter_match_probability",
                &["source"],
                PROBABILITIES,
                "Probability that a caption or a found text matches its image.",
            ),
        };
        for source in TextSource::ALL {
            metrics.probability.with_label_values(&[source.as_str()]);
            for kept in KEPT {
                metrics.candidates.with_label_values(&[source.as_str(), kept]);
            }
        }
        metrics
    }
}

impl Metrics {
    /// A text was judged; `probability` is that of its matching the image, `None` of one without words.
    pub fn judged(&self, source: TextSource, probability: Option<f32>, kept: bool) {
        let FilterMetrics { candidates, probability: histogram } = &self.filter;
        candidates.with_label_values(&[source.as_str(), KEPT[usize::from(!kept)]]).inc();
        if let Some(probability) = probability {
            histogram.with_label_values(&[source.as_str()]).observe(f64::from(probability));
        }
    }
}
