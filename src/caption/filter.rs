//! The filter of CapFilt: it judges the texts of images, those that were written for them and those that were found with them.

use std::sync::Arc;

use super::matcher::{Match, Matcher};
use super::{Encoded, EngineError, Viewer};

/// Judges images and texts with one model on one device. Its owner is one thread.
pub trait Filter: Viewer {
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
