//! Models that are exchanged while the flow runs, and the canary.

use prometheus::IntCounterVec;

use super::Metrics;
use super::registrar::Registrar;
use crate::message::Comparison;

/// Their families.
#[derive(Debug)]
pub(super) struct ModelMetrics {
    exchanges: IntCounterVec,
    canary: IntCounterVec,
}

impl ModelMetrics {
    /// Registers them; every series is there from the start.
    pub(super) fn new(r: &mut Registrar) -> Self {
        let help = "Orders to exchange models (POST /admin/models): done, or refused.";
        let exchanges = r.counters("model_exchanges_total", &["result"], help);
        let help = "Images that the canary captioned, too: its text was equal, different, or missing (error).";
        let metrics = Self { exchanges, canary: r.counters("canary_total", &["result"], help) };
        for done in [true, false] {
            metrics.exchanges.with_label_values(&[result(done)]);
        }
        for result in Comparison::ALL {
            metrics.canary.with_label_values(&[result.as_str()]);
        }
        metrics
    }
}

fn result(done: bool) -> &'static str {
    if done { "done" } else { "refused" }
}

impl Metrics {
    /// An order to exchange models was carried out, or refused.
    pub fn models_exchanged(&self, done: bool) {
        self.models.exchanges.with_label_values(&[result(done)]).inc();
    }

    /// The canary's record of an image was published.
    pub fn canary(&self, result: Comparison) {
        self.models.canary.with_label_values(&[result.as_str()]).inc();
    }
}
