//! What the memory of captions counts.

use std::time::Duration;

use prometheus::{Counter, IntCounterVec, IntGauge};

use super::Metrics;
use super::registrar::{Registrar, opts};

/// Results of a look-up.
const RESULTS: [&str; 2] = ["hit", "miss"];

/// Its families.
#[derive(Debug)]
pub(super) struct CacheMetrics {
    lookups: IntCounterVec,
    saved: Counter,
    bytes: IntGauge,
}

impl CacheMetrics {
    /// Registers them; all series are there from the start.
    pub(super) fn new(r: &mut Registrar) -> Self {
        let metrics = Self {
            lookups: r.counters(
                "caption_cache_lookups_total",
                &["result"],
                "Images looked for among captions known already.",
            ),
            saved: r.add(Counter::with_opts(opts(
                "caption_cache_saved_seconds_total",
                "Time of devices that captions known already have saved.",
            ))),
            bytes: r.gauge("caption_cache_bytes", "Memory of captions known already."),
        };
        for result in RESULTS {
            metrics.lookups.with_label_values(&[result]);
        }
        metrics
    }
}

impl Metrics {
    /// A caption was looked for; `saved` is the time of a device that it took when it was written, where it was found.
    pub fn caption_looked_up(&self, saved: Option<Duration>) {
        let result = RESULTS[usize::from(saved.is_none())];
        self.caption_cache.lookups.with_label_values(&[result]).inc();
        self.caption_cache.saved.inc_by(saved.unwrap_or_default().as_secs_f64());
    }

    /// The captions that are remembered take so many bytes.
    pub fn captions_remembered(&self, bytes: u64) {
        self.caption_cache.bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}
