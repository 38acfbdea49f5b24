//! The trait of what answers questions about images.

use std::sync::Arc;

use super::answerer::Answerer;
use super::{Caption, Encoded, EngineError, Params, Viewer};

/// Answers questions about images with one model on one device. Its owner is one thread.
pub trait Respondent: Viewer {
    /// Answers questions about images, in their order; a caption's text is the answer. A question's own error (no words, too
    /// long, unsound parameters) stands in its place. An image is best followed by all questions about it.
    ///
    /// # Errors
    /// Of the whole call.
    fn answer(&mut self, asked: &[(&Encoded, &str, Params)]) -> Result<Vec<Result<Caption, EngineError>>, EngineError>;
}

/// BLIP's own, whose weights may be shared.
impl Respondent for Arc<Answerer> {
    fn answer(&mut self, asked: &[(&Encoded, &str, Params)]) -> Result<Vec<Result<Caption, EngineError>>, EngineError> {
        Answerer::answer(self, asked)
    }
}
