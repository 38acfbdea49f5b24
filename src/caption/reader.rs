//! The half of a model that reads: BERT over whole texts, in the sight of images or of none.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::bert::{Attention, Bert};
use super::config::BlipConfig;
use super::error::EngineError;
use super::load::LoadError;
use super::memory::{self, Block, ImageMemory, Memory, Sizes};
use super::tokenizer::CaptionTokenizer;
use super::weights::{Kept, Scope};

/// Tokens of texts that are read at a time: enough for the products, few enough for the caches of a CPU.
const TOKENS: usize = 512;

/// A text encoder of one model.
pub(super) struct Reader {
    bert: Bert,
    words: Tensor,
    tokenizer: Arc<CaptionTokenizer>,
    sizes: Sizes,
    /// Rows of the embedding of the words.
    vocabulary: usize,
    /// Longest text, in tokens.
    limit: usize,
    /// What marks a text's beginning and end.
    marks: [u32; 2],
    device: Device,
    dtype: DType,
    kept: Kept,
}

impl Reader {
    /// Reads `embeddings` and `encoder`.
    pub(super) fn load(
        scope: &Scope<'_>,
        config: &BlipConfig,
        tokenizer: Arc<CaptionTokenizer>,
    ) -> std::result::Result<Self, LoadError> {
        let (text, sizes) = (&config.text, Sizes::of(config));
        let mark = |token: &str, other: u32| tokenizer.special(token).unwrap_or(other);
        Ok(Self {
            bert: Bert::load(scope, text, sizes)?,
            words: scope.tensor("embeddings.word_embeddings.weight", &[text.vocab_size, text.hidden_size])?,
            sizes,
            vocabulary: text.vocab_size,
            limit: text.max_position_embeddings,
            marks: [mark("[CLS]", text.bos_token_id), mark("[SEP]", text.sep_token_id)],
            tokenizer,
            device: scope.device().clone(),
            dtype: scope.dtype(),
            kept: scope.kept(),
        })
    }

    /// See [`Bert::remember`].
    pub(super) fn remember(&self, hidden: &Tensor, each: usize) -> Result<Vec<ImageMemory>> {
        self.bert.remember(hidden, each)
    }

    /// `[CLS]`, the text and `[SEP]`, as the reference's processor has it.
    ///
    /// # Errors
    /// The text has no words, or too many, or one that the model does not know.
    pub(super) fn tokens(&self, text: &str) -> std::result::Result<Vec<u32>, EngineError> {
        let words = self.tokenizer.encode(text)?;
        let limit = self.limit;
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
        if words.iter().any(|&token| token as usize >= self.vocabulary) {
            return Err(EngineError::bad_params("the text has a token that the model does not know"));
        }
        let [begin, end] = self.marks;
        Ok([begin].into_iter().chain(words).chain([end]).collect())
    }

    /// The last hidden states of texts of one length, `[texts · length, width]`, read in the sight of their images or of none.
    pub(super) fn read(&self, part: &Part, images: Option<&[&Arc<ImageMemory>]>) -> Result<Tensor> {
        let (texts, length) = (part.texts(), part.length());
        let words = self.words.index_select(&Tensor::new(&*part.tokens, &self.device)?, 0)?;
        let positions = (0..part.tokens.len()).map(|at| at % length);
        match images {
            None => self.bert.forward(&words, positions, Attention::Whole(texts)),
            Some(images) => {
                let mut memory = memory::new(self.sizes, &self.device, self.dtype, self.kept);
                look(&mut *memory, images, length)?;
                self.bert.forward(&words, positions, Attention::WholeAndImage(texts, &mut *memory))
            }
        }
    }
}

/// Announces texts of one length, each with its image; equal images that follow each other are shared.
fn look(memory: &mut dyn Memory, images: &[&Arc<ImageMemory>], length: usize) -> Result<()> {
    for (row, image) in images.iter().enumerate() {
        match row.checked_sub(1) {
            Some(before) if Arc::ptr_eq(images[before], image) => memory.fork(before, row)?,
            _ => memory.admit(image, length)?,
        }
    }
    memory.begin(&Block { width: length, starts: vec![0; images.len()], counts: vec![length; images.len()] })
}

/// Texts of one length that are read together; at least one.
pub(super) struct Part {
    /// Where they stand among all.
    pub(super) places: Vec<usize>,
    /// One after the other.
    tokens: Vec<u32>,
}

impl Part {
    pub(super) fn texts(&self) -> usize {
        self.places.len()
    }

    /// Tokens of each.
    pub(super) fn length(&self) -> usize {
        self.tokens.len() / self.texts()
    }
}

/// Parts of texts of one length, the shortest first: nothing is filled up, and no text depends on what it is read with. A
/// text that cannot be read is an error in `results`.
pub(super) fn parts<T>(
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
