//! BLIP's judge of images and texts (`BlipForImageTextRetrieval` of transformers): matching, where a text is read in the sight
//! of an image, and contrast, where both are points of one space.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{D, DType, Device, Result, Tensor};

use super::bert::{Attention, Bert};
use super::compute::Linear;
use super::config::BlipConfig;
use super::engine::{at_home, encode_size};
use super::load::{Built, LoadError};
use super::memory::{self, Block, ImageMemory, Memory, Sizes};
use super::preprocess::Preprocessor;
use super::tokenizer::CaptionTokenizer;
use super::vision::VisionEncoder;
use super::weights::Kept;
use super::{Encoded, EngineError, ModelInfo, Pixels};

/// Tokens of texts that are read at a time: enough for the products, few enough for the caches of a CPU.
const TOKENS: usize = 512;

/// A model that judges pairs of images and texts, on a device. Cheap to share.
pub struct Matcher {
    vision: VisionEncoder,
    bert: Bert,
    words: Tensor,
    /// Two scores, of "does not match" and of "matches".
    head: Linear,
    image_projection: Linear,
    text_projection: Linear,
    tokenizer: CaptionTokenizer,
    config: BlipConfig,
    preprocessor: Preprocessor,
    device: Device,
    info: ModelInfo,
    dtype: DType,
    kept: Kept,
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

impl Matcher {
    /// Reads `vision_model`, `text_encoder`, `itm_head`, `vision_proj` and `text_proj`.
    pub(super) fn build(built: Built<'_>) -> std::result::Result<Self, LoadError> {
        let Built { config, preprocessor, tokenizer, scope, encoder, identity } = built;
        let (text, vision) = (&config.text, &config.vision);
        let (width, shared) = (text.hidden_size, config.shared_width);
        let reader = scope.part("text_encoder");
        let words = reader.tensor("embeddings.word_embeddings.weight", &[text.vocab_size, width])?;
        let images = scope.part("vision_model").keeping(encoder);
        let info = identity.info(&config, config.matcher_parameters());
        Ok(Self {
            vision: VisionEncoder::load(&images, vision, &preprocessor.normalize())?,
            bert: Bert::load(&reader, &config)?,
            words,
            head: Linear::load(&scope.part("itm_head"), width, 2)?,
            image_projection: Linear::load(&scope.part("vision_proj"), vision.hidden_size, shared)?,
            text_projection: Linear::load(&scope.part("text_proj"), width, shared)?,
            tokenizer,
            preprocessor,
            device: scope.device().clone(),
            info,
            dtype: scope.dtype(),
            kept: scope.kept(),
            config,
        })
    }

    /// The model and where it runs.
    pub fn info(&self) -> &ModelInfo {
        &self.info
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
        self.info.check_images(images)?;
        at_home(&self.device, || self.encode_parts(images))
    }

    fn encode_parts(&self, images: &[Pixels]) -> std::result::Result<Vec<Encoded>, EngineError> {
        let (tokens, width) = (self.config.vision.tokens(), self.config.vision.hidden_size);
        let mut encoded = Vec::with_capacity(images.len());
        for images in images.chunks(encode_size(&self.device)) {
            let hidden = self.vision.forward(images)?;
            let class = hidden.reshape((images.len(), tokens, width))?.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
            let embeddings = normalised(&self.image_projection.forward(&class)?)?;
            for (index, embedding) in embeddings.into_iter().enumerate() {
                let memory = Arc::new(self.bert.remember(&hidden.narrow(0, index * tokens, tokens)?)?);
                let bytes = memory.bytes() + embedding.len() * size_of::<f32>();
                encoded.push(Encoded::new(Seen { memory, embedding }, bytes));
            }
        }
        Ok(encoded)
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
        at_home(&self.device, || self.embed(texts))
    }

    fn embed(
        &self,
        texts: &[&str],
    ) -> std::result::Result<Vec<std::result::Result<Vec<f32>, EngineError>>, EngineError> {
        let mut results: Vec<_> = texts.iter().map(|_| Err(EngineError::internal("a text was lost"))).collect();
        let read = |(at, text): (usize, &&str)| (at, self.tokens(text));
        for part in parts(texts.iter().enumerate().map(read), &mut results) {
            let first = self.read(&part.tokens, part.texts(), None)?;
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
        at_home(&self.device, || self.judge_seen(pairs, &images))
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
        let read = |(at, (_, text)): (usize, &(&Encoded, &str))| (at, self.tokens(text));
        for part in parts(pairs.iter().enumerate().map(read), &mut results) {
            let own: Vec<&Seen> = part.places.iter().map(|at| &*images[*at]).collect();
            let first = self.read(&part.tokens, part.texts(), Some(&own))?;
            let logits = self.head.forward(&first)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            for (at, logits) in part.places.iter().zip(logits) {
                let Ok(text) = &embeddings[different[pairs[*at].1]] else { continue };
                let itc = images[*at].embedding.iter().zip(text).map(|(a, b)| a * b).sum();
                results[*at] = Match::new([logits[0], logits[1]], itc);
            }
        }
        Ok(results)
    }

    /// The last hidden states of the first token of texts of one length, `[texts, width]`, read in the sight of their images
    /// or of none.
    fn read(&self, tokens: &[u32], texts: usize, images: Option<&[&Seen]>) -> Result<Tensor> {
        let length = tokens.len() / texts;
        let words = self.words.index_select(&Tensor::new(tokens, &self.device)?, 0)?;
        let positions = (0..tokens.len()).map(|at| at % length);
        let hidden = match images {
            None => self.bert.forward(&words, positions, Attention::Whole(texts))?,
            Some(images) => {
                let mut memory = memory::new(Sizes::of(&self.config), &self.device, self.dtype, self.kept);
                look(&mut *memory, images, length)?;
                self.bert.forward(&words, positions, Attention::WholeAndImage(texts, &mut *memory))?
            }
        };
        hidden.reshape((texts, length, ()))?.narrow(1, 0, 1)?.squeeze(1)?.contiguous()
    }

    /// `[CLS]`, the text and `[SEP]`, as the reference's processor has it.
    fn tokens(&self, text: &str) -> std::result::Result<Vec<u32>, EngineError> {
        let words = self.tokenizer.encode(text)?;
        let limit = self.info.context_length;
        if !text.contains(char::is_alphanumeric) {
            return Err(EngineError::bad_params("the text has no words"));
        }
        if words.len() + 2 > limit {
            return Err(EngineError::bad_params(format!(
                "the text has {} tokens; the model can see {} beside the two that mark its ends",
                words.len(),
                limit - 2
            )));
        }
        if words.iter().any(|&token| token as usize >= self.config.text.vocab_size) {
            return Err(EngineError::bad_params("the text has a token that the model does not know"));
        }
        let begin = self.tokenizer.special("[CLS]").unwrap_or(self.config.text.bos_token_id);
        let end = self.tokenizer.special("[SEP]").unwrap_or(self.config.text.sep_token_id);
        Ok([begin].into_iter().chain(words).chain([end]).collect())
    }
}

/// Announces texts of one length, each with its image; equal images that follow each other are shared.
fn look(memory: &mut dyn Memory, images: &[&Seen], length: usize) -> Result<()> {
    for (row, image) in images.iter().enumerate() {
        match row.checked_sub(1) {
            Some(before) if Arc::ptr_eq(&images[before].memory, &image.memory) => memory.fork(before, row)?,
            _ => memory.admit(&image.memory, length)?,
        }
    }
    memory.begin(&Block { width: length, starts: vec![0; images.len()], counts: vec![length; images.len()] })
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

/// Texts of one length that are read together.
struct Part {
    /// Where they stand among all.
    places: Vec<usize>,
    /// One after the other.
    tokens: Vec<u32>,
}

impl Part {
    fn texts(&self) -> usize {
        self.places.len()
    }
}

/// Parts of texts of one length: nothing is filled up, and no text depends on what it is read with. A text that cannot be
/// read is an error in `results`.
fn parts<T>(
    texts: impl Iterator<Item = (usize, std::result::Result<Vec<u32>, EngineError>)>,
    results: &mut [std::result::Result<T, EngineError>],
) -> Vec<Part> {
    let mut by_length: BTreeMap<usize, Vec<Part>> = BTreeMap::new();
    for (at, tokens) in texts {
        let tokens = match tokens {
            Ok(tokens) => tokens,
            Err(error) => {
                results[at] = Err(error);
                continue;
            }
        };
        let length = tokens.len();
        let parts = by_length.entry(length).or_default();
        match parts.last_mut() {
            Some(part) if part.tokens.len() + length <= TOKENS => {
                part.places.push(at);
                part.tokens.extend(tokens);
            }
            _ => parts.push(Part { places: vec![at], tokens }),
        }
    }
    by_length.into_values().flatten().collect()
}
