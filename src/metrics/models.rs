//! Models that are exchanged while the flow runs.

use prometheus::IntCounterVec;

use super::Metrics;
use super::registrar::Registrar;

/// Their family.
#[derive(Debug)]
pub(super) struct ModelMetrics {
    exchanges: IntCounterVec,
}

impl ModelMetrics {
    /// Registers it; both series are there from the start.
    pub(super) fn new(r: &mut Registrar) -> Self {
        let help = "Orders to exchange models (POST /admin/models): done, or refused.";
        let metrics = Self { exchanges: r.counters("model_exchanges_total", &["result"], help) };
        for done in [true, false] {
            metrics.exchanges.with_label_values(&[result(done)]);
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
}
