//! Questions that were asked, and what became of them.

use prometheus::IntCounterVec;

use super::Metrics;
use super::registrar::Registrar;

/// What became of a question.
const RESULTS: [&str; 2] = ["answered", "refused"];

/// Its family.
#[derive(Debug)]
pub(super) struct AnswerMetrics {
    answers: IntCounterVec,
}

impl AnswerMetrics {
    /// Registers it; all series are there from the start.
    pub(super) fn new(r: &mut Registrar) -> Self {
        let answers = r.counters("answers_total", &["result"], "Questions about images, answered or refused.");
        for result in RESULTS {
            answers.with_label_values(&[result]);
        }
        Self { answers }
    }
}

impl Metrics {
    /// A question was answered, or could not be: it has no words, or too many.
    pub fn answered(&self, well: bool) {
        self.answers.answers.with_label_values(&[RESULTS[usize::from(!well)]]).inc();
    }
}
