//! The trait of what answers questions about images.

use std::sync::Arc;

use super::answerer::Answerer;
use super::{Caption, Encoded, EncoderId, EngineError, ModelInfo, Params, Pixels, Sight, Viewer};

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
impl Viewer for Arc<Answerer> {
    fn model(&self) -> &ModelInfo {
        self.info()
    }

    fn encode(&mut self, images: &[Pixels]) -> Result<Vec<Encoded>, EngineError> {
        Answerer::encode(self, images)
    }

    fn encoder(&self) -> EncoderId {
        Answerer::encoder(self)
    }

    fn see(&mut self, images: &[Pixels]) -> Result<Vec<Sight>, EngineError> {
        Answerer::see(self, images)
    }

    fn remember(&mut self, sights: &[Sight]) -> Result<Vec<Encoded>, EngineError> {
        Answerer::remember(self, sights)
    }
}

impl Respondent for Arc<Answerer> {
    fn answer(&mut self, asked: &[(&Encoded, &str, Params)]) -> Result<Vec<Result<Caption, EngineError>>, EngineError> {
        Answerer::answer(self, asked)
    }
}
