//! The half of a model that writes: a decoder, and what its tokens mean.

use std::sync::Arc;

use candle_core::{DType, Device};

use super::config::TextConfig;
use super::load::LoadError;
use super::memory::{self, Memory, Sizes};
use super::text::TextDecoder;
use super::tokenizer::CaptionTokenizer;
use super::weights::{Kept, Scope};

/// A decoder of one model.
pub(super) struct Writer {
    pub(super) text: TextDecoder,
    pub(super) tokenizer: Arc<CaptionTokenizer>,
    pub(super) config: TextConfig,
    pub(super) kept: Kept,
    sizes: Sizes,
    device: Device,
    dtype: DType,
}

impl Writer {
    /// Reads `bert` and `cls`; `sizes` are those of what it looks at, too.
    pub(super) fn load(
        scope: &Scope<'_>,
        config: &TextConfig,
        sizes: Sizes,
        tokenizer: Arc<CaptionTokenizer>,
    ) -> Result<Self, LoadError> {
        Ok(Self {
            text: TextDecoder::load(scope, config, sizes)?,
            tokenizer,
            config: config.clone(),
            kept: scope.kept(),
            sizes,
            device: scope.device().clone(),
            dtype: scope.dtype(),
        })
    }

    /// Parameters of the embedding of the words beside the head's weight, where it is not the same.
    pub(super) fn untied(&self) -> u64 {
        if self.text.is_tied() { 0 } else { (self.config.vocab_size * self.config.hidden_size) as u64 }
    }

    /// A memory for rows that look at `seen` tokens each.
    pub(super) fn new_memory(&self, seen: usize) -> Box<dyn Memory> {
        let sizes = Sizes { image_tokens: seen, ..self.sizes };
        memory::new(sizes, &self.device, self.dtype, self.kept)
    }
}
