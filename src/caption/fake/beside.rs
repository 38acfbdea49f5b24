//! What stands beside a fake captioner: a filter and an answerer.

use super::{
    Caption, Encoded, EncoderId, EngineError, Filter, Finish, Match, ModelInfo, Params, Pixels, Respondent, RowId,
    Sight, Viewer, hash_of,
};
use super::{FakeEngine, FakeRow, embedding, last_word, remember, see};

/// A model without a model that looks at images as a [`FakeEngine`] does.
pub struct FakeViewer<const ANSWERS: bool> {
    model: ModelInfo,
    encoder: EncoderId,
    encode_calls: usize,
    images: usize,
}

/// A filter without a model: a text matches an image if it has the hash of its pixels among its words, as the caption of a
/// [`FakeEngine`] has; and the embeddings of both are equal if it is the last of them.
pub type FakeFilter = FakeViewer<false>;

/// An answerer without a model: the answer is the last word of the question and the hash of the pixels, as many of these two
/// words as there may be tokens.
pub type FakeAnswerer = FakeViewer<true>;

impl<const ANSWERS: bool> FakeViewer<ANSWERS> {
    /// One whose model has another name.
    pub fn called(id: &str) -> Self {
        let other = Self::default();
        Self { model: ModelInfo { id: id.into(), ..other.model.clone() }, ..other }
    }

    /// With the image encoder of another model.
    pub fn with(encoder: EncoderId) -> Self {
        Self { encoder, ..Self::default() }
    }

    /// How many images it looked at itself.
    pub fn images(&self) -> usize {
        self.images
    }

    /// How often `encode` was called.
    pub fn encode_calls(&self) -> usize {
        self.encode_calls
    }
}

impl<const ANSWERS: bool> Default for FakeViewer<ANSWERS> {
    fn default() -> Self {
        let id = if ANSWERS { "fake answerer" } else { "fake filter" };
        let model = ModelInfo { id: id.into(), ..FakeEngine::default().model };
        Self { model, encoder: EncoderId::new(), encode_calls: 0, images: 0 }
    }
}

impl<const ANSWERS: bool> Viewer for FakeViewer<ANSWERS> {
    fn model(&self) -> &ModelInfo {
        &self.model
    }

    fn encode(&mut self, images: &[Pixels]) -> Result<Vec<Encoded>, EngineError> {
        self.encode_calls += 1;
        let seen = self.see(images)?;
        self.remember(&seen)
    }

    fn encoder(&self) -> EncoderId {
        self.encoder
    }

    fn see(&mut self, images: &[Pixels]) -> Result<Vec<Sight>, EngineError> {
        self.images += images.len();
        Ok(see(images, self.encoder))
    }

    fn remember(&mut self, sights: &[Sight]) -> Result<Vec<Encoded>, EngineError> {
        remember(sights, self.encoder)
    }
}

impl Filter for FakeFilter {
    fn judge(&mut self, pairs: &[(&Encoded, &str)]) -> Result<Vec<Result<Match, EngineError>>, EngineError> {
        let judge = |(image, text): &(&Encoded, &str)| {
            last_word(text)?;
            let hash = hash_of(image)?;
            let matches = text.split_whitespace().any(|word| word == hash);
            let logit = if matches { 2.0 } else { -2.0 };
            Ok(Match { itm: 1.0 / (1.0 + f32::exp(-2.0 * logit)), logits: [-logit, logit], itc: logit / 4.0 })
        };
        Ok(pairs.iter().map(judge).collect())
    }

    fn image_embedding(&self, image: &Encoded) -> Result<Vec<f32>, EngineError> {
        Ok(embedding(&hash_of(image)?))
    }

    fn text_embeddings(&mut self, texts: &[&str]) -> Result<Vec<Result<Vec<f32>, EngineError>>, EngineError> {
        Ok(texts.iter().map(|text| last_word(text).map(embedding)).collect())
    }
}

impl Respondent for FakeAnswerer {
    fn answer(&mut self, asked: &[(&Encoded, &str, Params)]) -> Result<Vec<Result<Caption, EngineError>>, EngineError> {
        let answer = |(image, question, params): &(&Encoded, &str, Params)| {
            params.check()?;
            let row = FakeRow {
                id: RowId(0),
                prompt: None,
                words: vec![last_word(question)?.to_owned(), hash_of(image)?],
                generated: params.max_new_tokens.min(3),
                max_new_tokens: params.max_new_tokens,
                min_new_tokens: 0,
                captions: 1,
            };
            Ok(row.caption(if row.generated < 3 { Finish::Length } else { Finish::Stop }))
        };
        Ok(asked.iter().map(answer).collect())
    }
}
