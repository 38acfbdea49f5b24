//! BLIP's judge of images and texts (`BlipForImageTextRetrieval` of transformers): matching, where a text is read in the sight
//! of an image, and contrast, where both are points of one space.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor};

use super::compute::Linear;
use super::config::BlipConfig;
use super::engine::at_home;
use super::load::{Built, LoadError};
use super::memory::ImageMemory;
use super::preprocess::Preprocessor;
use super::reader::{Part, Reader, parts};
use super::viewer::{Looks, Vision};
use super::{Encoded, EngineError, ModelInfo, Pixels};

/// A model that judges pairs of images and texts, on a device. Cheap to share.
pub struct Matcher {
    vision: Vision,
    reader: Reader,
    /// Two scores, of "does not match" and of "matches".
    head: Linear,
    image_projection: Linear,
    text_projection: Linear,
    config: BlipConfig,
    preprocessor: Preprocessor,
}

/// How well a text describes an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Match {
    /// The probability that they match, by the model that reads the text in the sight of the image.
    pub itm: f32,
    /// The scores that it comes from: of no match, and of a match.
    pub logits: [f32; 2],
    /// The cosine of the angle between their embeddings, from -1 to 1.
    pub itc: f32,
}

/// An encoded image: what texts look at, and its embedding.
struct Seen {
    memory: Arc<ImageMemory>,
    embedding: Vec<f32>,
}

impl Looks for Matcher {
    fn vision(&self) -> &Vision {
        &self.vision
    }

    fn remember_hidden(&self, hidden: &Tensor, images: usize) -> std::result::Result<Vec<Encoded>, EngineError> {
        let (tokens, width) = (self.config.vision.tokens(), self.config.vision.hidden_size);
        let class = hidden.reshape((images, tokens, width))?.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
        let embeddings = normalised(&self.image_projection.forward(&class)?)?;
        let both = self.reader.remember(hidden, tokens)?.into_iter().zip(embeddings);
        let encoded = both.map(|(memory, embedding)| {
            let bytes = memory.bytes() + embedding.len() * size_of::<f32>();
            Encoded::new(Seen { memory: Arc::new(memory), embedding }, bytes)
        });
        Ok(encoded.collect())
    }
}

impl Matcher {
    /// Reads `text_encoder`, `itm_head`, `vision_proj` and `text_proj`.
    pub(super) fn build(built: Built<'_>) -> std::result::Result<Self, LoadError> {
        let Built { config, preprocessor, tokenizer, scope, vision, identity, .. } = built;
        let (width, shared) = (config.text.hidden_size, config.shared_width);
        let reader = Reader::load(&scope.part("text_encoder"), &config, Arc::new(tokenizer))?;
        let info = identity.info(&config, config.matcher_parameters());
        Ok(Self {
            vision: Vision { encoder: vision, device: scope.device().clone(), info },
            reader,
            head: Linear::load(&scope.part("itm_head"), width, 2)?,
            image_projection: Linear::load(&scope.part("vision_proj"), config.vision.hidden_size, shared)?,
            text_projection: Linear::load(&scope.part("text_proj"), width, shared)?,
            preprocessor,
            config,
        })
    }

    /// The model and where it runs.
    pub fn info(&self) -> &ModelInfo {
        &self.vision.info
    }

    /// What makes its pixels of pictures.
    pub fn preprocessor(&self) -> &Preprocessor {
        &self.preprocessor
    }

    /// How many numbers an embedding has.
    pub fn embedding_size(&self) -> usize {
        self.config.shared_width
    }

    /// Encodes images of the model's size; the result is in the order of `images`.
    ///
    /// # Errors
    /// An image has another size, or the device fails.
    pub fn encode(&self, images: &[Pixels]) -> std::result::Result<Vec<Encoded>, EngineError> {
        self.encode_all(images)
    }

    /// The embedding of an encoded image, of length 1.
    ///
    /// # Errors
    /// It was encoded by another model.
    pub fn image_embedding(&self, image: &Encoded) -> std::result::Result<Vec<f32>, EngineError> {
        Ok(seen(image)?.embedding.clone())
    }

    /// The embeddings of texts, of length 1, in the order of the texts; each text's own errors (no words, too long) in its
    /// place.
    ///
    /// # Errors
    /// The device fails.
    pub fn text_embeddings(
        &self,
        texts: &[&str],
    ) -> std::result::Result<Vec<std::result::Result<Vec<f32>, EngineError>>, EngineError> {
        at_home(&self.vision.device, || self.embed(texts))
    }

    fn embed(
        &self,
        texts: &[&str],
    ) -> std::result::Result<Vec<std::result::Result<Vec<f32>, EngineError>>, EngineError> {
        let mut results: Vec<_> = texts.iter().map(|_| Err(EngineError::internal("a text was lost"))).collect();
        let read = |(at, text): (usize, &&str)| (at, self.reader.tokens(text));
        for part in parts(texts.iter().enumerate().map(read), &mut results) {
            let first = first_of(&part, &self.reader.read(&part, None)?)?;
            let embeddings = normalised(&self.text_projection.forward(&first)?)?;
            for (at, embedding) in part.places.iter().zip(embeddings) {
                results[*at] = Ok(embedding);
            }
        }
        Ok(results)
    }

    /// Judges pairs, in their order; each pair's own errors (a text without words, or one that is too long) in its place.
    ///
    /// # Errors
    /// An image was encoded by another model, or the device fails.
    pub fn judge(
        &self,
        pairs: &[(&Encoded, &str)],
    ) -> std::result::Result<Vec<std::result::Result<Match, EngineError>>, EngineError> {
        let images = pairs.iter().map(|(image, _)| seen(image)).collect::<std::result::Result<Vec<_>, _>>()?;
        at_home(&self.vision.device, || self.judge_seen(pairs, &images))
    }

    fn judge_seen(
        &self,
        pairs: &[(&Encoded, &str)],
        images: &[Arc<Seen>],
    ) -> std::result::Result<Vec<std::result::Result<Match, EngineError>>, EngineError> {
        // A text is embedded once, however many images it is judged with.
        let mut different: BTreeMap<&str, usize> = BTreeMap::new();
        for (_, text) in pairs {
            let next = different.len();
            different.entry(text).or_insert(next);
        }
        let mut texts = vec![""; different.len()];
        for (text, at) in &different {
            texts[*at] = text;
        }
        let embeddings = self.embed(&texts)?;
        let mut results: Vec<_> = pairs.iter().map(|_| Err(EngineError::internal("a pair was lost"))).collect();
        let read = |(at, (_, text)): (usize, &(&Encoded, &str))| (at, self.reader.tokens(text));
        for part in parts(pairs.iter().enumerate().map(read), &mut results) {
            let own: Vec<_> = part.places.iter().map(|at| &images[*at].memory).collect();
            let first = first_of(&part, &self.reader.read(&part, Some(&own))?)?;
            let logits = self.head.forward(&first)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            for (at, logits) in part.places.iter().zip(logits) {
                let Ok(text) = &embeddings[different[pairs[*at].1]] else { continue };
                let itc = images[*at].embedding.iter().zip(text).map(|(a, b)| a * b).sum();
                results[*at] = Match::new([logits[0], logits[1]], itc);
            }
        }
        Ok(results)
    }
}

/// The last hidden states of the first token of each text, `[texts, width]`.
fn first_of(part: &Part, hidden: &Tensor) -> Result<Tensor> {
    hidden.reshape((part.texts(), part.length(), ()))?.narrow(1, 0, 1)?.squeeze(1)?.contiguous()
}

fn seen(image: &Encoded) -> std::result::Result<Arc<Seen>, EngineError> {
    image.state().ok_or_else(|| EngineError::bad_input("the image was encoded by another kind of model"))
}

/// Rows of length 1.
fn normalised(rows: &Tensor) -> Result<Vec<Vec<f32>>> {
    let rows = rows.to_dtype(DType::F32)?;
    let lengths = rows.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    rows.broadcast_div(&lengths)?.to_vec2()
}

impl Match {
    fn new(logits: [f32; 2], itc: f32) -> std::result::Result<Self, EngineError> {
        let itm = 1.0 / (1.0 + (logits[0] - logits[1]).exp());
        if !(itm.is_finite() && itc.is_finite()) {
            return Err(EngineError::internal("the model's scores are not numbers: a weight or a precision is unfit"));
        }
        Ok(Self { itm, logits, itc })
    }
}
