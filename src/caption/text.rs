//! The decoder of captions and answers: a causal language model (`BlipTextLMHeadModel` of transformers).

use candle_core::{Result, Tensor};

use super::bert::{Attention, Bert};
use super::compute::{LayerNorm, Linear};
use super::config::TextConfig;
use super::load::LoadError;
use super::memory::{Block, ImageMemory, Memory, Sizes};
use super::weights::Scope;

/// The decoder.
pub(super) struct TextDecoder {
    bert: Bert,
    words: Words,
    head: Head,
}

/// The embedding of the words, `[vocabulary, width]`.
enum Words {
    Table(Tensor),
    /// The head's weight, of which there is no other copy.
    Head,
}

struct Head {
    dense: Linear,
    norm: LayerNorm,
    words: Linear,
    /// Whether its weight is the embedding of the words.
    tied: bool,
}

impl TextDecoder {
    /// Reads `bert` and `cls`.
    pub(super) fn load(scope: &Scope<'_>, config: &TextConfig, sizes: Sizes) -> std::result::Result<Self, LoadError> {
        let (words, head) = Head::load(scope, config)?;
        Ok(Self { bert: Bert::load(&scope.part("bert"), config, sizes)?, words, head })
    }

    /// Whether the head's weight is the embedding of the words.
    pub(super) fn is_tied(&self) -> bool {
        self.head.tied
    }

    /// See [`Bert::remember`].
    pub(super) fn remember(&self, hidden: &Tensor, each: usize) -> Result<Vec<ImageMemory>> {
        self.bert.remember(hidden, each)
    }

    /// The hidden states `[rows · width, hidden]` of a block of tokens, which `memory` remembers from then on.
    pub(super) fn forward(&self, tokens: &[u32], block: &Block, memory: &mut dyn Memory) -> Result<Tensor> {
        memory.begin(block)?;
        let words = match &self.words {
            Words::Table(words) => words.index_select(&Tensor::new(tokens, words.device())?, 0)?,
            Words::Head => self.head.words.outputs(tokens)?,
        };
        let positions = block.starts.iter().flat_map(|start| (0..block.width).map(move |offset| start + offset));
        self.bert.forward(&words, positions, Attention::Causal(memory))
    }

    /// Scores of the whole vocabulary, `[rows, vocabulary]`, for hidden states `[rows, hidden]`.
    pub(super) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let x = self.head.norm.forward(&self.head.dense.forward_gelu(hidden)?)?;
        self.head.words.forward(&x)
    }
}

impl Head {
    /// Also returns the embedding of the words, which is the head's weight where a model ties them.
    ///
    /// As in the reference, a file that has only one of the two serves both; so does one that has both and equal.
    fn load(scope: &Scope<'_>, config: &TextConfig) -> std::result::Result<(Words, Self), LoadError> {
        const WORDS: &str = "bert.embeddings.word_embeddings.weight";
        const DECODER: &str = "cls.predictions.decoder.weight";
        let (width, vocabulary) = (config.hidden_size, config.vocab_size);
        let shape = [vocabulary, width];
        let fail = |error: candle_core::Error| scope.error(DECODER, &error);
        let (words, decoder, tied) = match (scope.contains(WORDS), scope.contains(DECODER)) {
            (false, true) => {
                let shared = scope.tensor(DECODER, &shape)?;
                (shared.clone(), shared, true)
            }
            (_, false) => {
                let shared = scope.tensor(WORDS, &shape)?;
                (shared.clone(), shared, true)
            }
            (true, true) => {
                let (words, decoder) = (scope.tensor(WORDS, &shape)?, scope.tensor(DECODER, &shape)?);
                if equal(&words, &decoder).map_err(fail)? {
                    (words.clone(), words, true)
                } else {
                    (words, decoder, false)
                }
            }
        };
        let predictions = scope.part("cls.predictions");
        let bias = if predictions.contains("decoder.bias") { "decoder.bias" } else { "bias" };
        let transform = predictions.part("transform");
        let head = Self {
            dense: Linear::load(&transform.part("dense"), width, width)?,
            norm: LayerNorm::load(&transform.part("LayerNorm"), width, config.layer_norm_eps)?,
            words: Linear::new(&decoder, &predictions.tensor(bias, &[vocabulary])?, scope.kept()).map_err(fail)?,
            tied,
        };
        Ok((if tied { Words::Head } else { Words::Table(words) }, head))
    }
}

fn equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(a.ne(b)?.flatten_all()?.max(0)?.to_scalar::<u8>()? == 0)
}
