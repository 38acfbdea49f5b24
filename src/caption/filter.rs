//! The filter of CapFilt: it judges the texts of images, those that were written for them and those that were found with them.

use std::sync::Arc;

use super::matcher::{Match, Matcher};
use super::{Encoded, EncoderId, EngineError, ModelInfo, Pixels, Sight};

/// Judges images and texts with one model on one device. Its owner is one thread.
pub trait Filter: Send {
    /// The model and where it runs.
    fn model(&self) -> &ModelInfo;

    /// Encodes images of the model's size; the result is in the order of `images`.
    ///
    /// # Errors
    /// Of the whole call: with [`super::ErrorKind::OutOfMemory`] a smaller one may succeed.
    fn encode(&mut self, images: &[Pixels]) -> Result<Vec<Encoded>, EngineError>;

    /// Names its image encoder, whose sights [`Filter::remember`] takes; another model may have the same.
    fn encoder(&self) -> EncoderId;

    /// The second half of `encode`, for images that its image encoder saw, be it for another model; in their order.
    ///
    /// # Errors
    /// Of the whole call.
    fn remember(&mut self, sights: &[Sight]) -> Result<Vec<Encoded>, EngineError>;

    /// Judges pairs, in their order. A pair's own error (a text without words, or one that is too long) is of kind
    /// [`super::ErrorKind::BadParams`] and stands in its place.
    ///
    /// # Errors
    /// Of the whole call.
    fn judge(&mut self, pairs: &[(&Encoded, &str)]) -> Result<Vec<Result<Match, EngineError>>, EngineError>;

    /// The embedding of an encoded image, of length 1: its product with a text's is their cosine.
    ///
    /// # Errors
    /// It was encoded by another kind of model.
    fn image_embedding(&self, image: &Encoded) -> Result<Vec<f32>, EngineError>;

    /// The embeddings of texts, of length 1 and in the space of the images', in the order of the texts. A text's own error, as
    /// in [`Filter::judge`], stands in its place.
    ///
    /// # Errors
    /// Of the whole call.
    fn text_embeddings(&mut self, texts: &[&str]) -> Result<Vec<Result<Vec<f32>, EngineError>>, EngineError>;
}

/// BLIP's own, whose weights may be shared.
impl Filter for Arc<Matcher> {
    fn model(&self) -> &ModelInfo {
        self.info()
    }

    fn encode(&mut self, images: &[Pixels]) -> Result<Vec<Encoded>, EngineError> {
        Matcher::encode(self, images)
    }

    fn encoder(&self) -> EncoderId {
        Matcher::encoder(self)
    }

    fn remember(&mut self, sights: &[Sight]) -> Result<Vec<Encoded>, EngineError> {
        Matcher::remember(self, sights)
    }

    fn judge(&mut self, pairs: &[(&Encoded, &str)]) -> Result<Vec<Result<Match, EngineError>>, EngineError> {
        Matcher::judge(self, pairs)
    }

    fn image_embedding(&self, image: &Encoded) -> Result<Vec<f32>, EngineError> {
        Matcher::image_embedding(self, image)
    }

    fn text_embeddings(&mut self, texts: &[&str]) -> Result<Vec<Result<Vec<f32>, EngineError>>, EngineError> {
        Matcher::text_embeddings(self, texts)
    }
}
