//! What the memory of captions counts.

use std::time::Duration;

use super::Metrics;

/// Results of a look-up.
pub(super) const RESULTS: [&str; 2] = ["hit", "miss"];

impl Metrics {
    /// A caption was looked for; `saved` is the time of a device that it took when it was written, where it was found.
    pub fn caption_looked_up(&self, saved: Option<Duration>) {
        let result = RESULTS[usize::from(saved.is_none())];
        self.caption_cache_lookups.with_label_values(&[result]).inc();
        self.caption_cache_saved.inc_by(saved.unwrap_or_default().as_secs_f64());
    }

    /// The captions that are remembered take so many bytes.
    pub fn captions_remembered(&self, bytes: u64) {
        self.caption_cache_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}
