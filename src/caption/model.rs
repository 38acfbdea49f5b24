//! A loaded model: weights, tokenizer and what is known of them. Engines share it.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::config::BlipConfig;
use super::error::EngineError;
use super::load::{Built, LoadError};
use super::memory::{self, Block, ImageMemory, Memory, Sizes};
use super::preprocess::Preprocessor;
use super::text::TextDecoder;
use super::tokenizer::CaptionTokenizer;
use super::vision::VisionEncoder;
use super::weights::Kept;
use super::{Ceilings, ModelInfo, Pixels, Work};
use std::sync::Arc;

/// A BLIP captioning model on a device.
pub struct Model {
    pub(super) vision: VisionEncoder,
    pub(super) text: TextDecoder,
    pub(super) tokenizer: CaptionTokenizer,
    pub(super) config: BlipConfig,
    preprocessor: Preprocessor,
    pub(super) device: Device,
    dtype: DType,
    encoder: Kept,
    decoder: Kept,
    info: ModelInfo,
}

impl ModelInfo {
    pub(super) fn check_images(&self, images: &[Pixels]) -> std::result::Result<(), EngineError> {
        let expected = self.image_size;
        match images.iter().find(|image| image.size() != expected) {
            None => Ok(()),
            Some(image) => {
                let size = image.size();
                Err(EngineError::bad_input(format!("the model takes images of side {expected}, not {size}")))
            }
        }
    }
}

impl Model {
    /// Reads `vision_model` and `text_decoder`.
    pub(super) fn build(built: Built<'_>) -> std::result::Result<Self, LoadError> {
        let Built { config, preprocessor, tokenizer, scope, encoder, identity } = built;
        let images = scope.part("vision_model").keeping(encoder);
        let vision = VisionEncoder::load(&images, &config.vision, &preprocessor.normalize())?;
        let text = TextDecoder::load(&scope.part("text_decoder"), &config)?;
        let untied = if text.is_tied() { 0 } else { config.text.vocab_size * config.text.hidden_size };
        let info = identity.info(&config, config.parameters() + untied as u64);
        let (device, dtype, decoder) = (scope.device().clone(), scope.dtype(), scope.kept());
        Ok(Self { vision, text, tokenizer, config, preprocessor, device, dtype, encoder, decoder, info })
    }

    /// The model and where it runs.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// What its captions cost at least.
    pub fn work(&self) -> Work {
        self.config.work(!self.decoder.are_tensors())
    }

    /// Whether its decoder runs on fused steps.
    pub(super) fn is_fused(&self) -> bool {
        self.decoder.is_fused()
    }

    /// Bytes of one weight of the decoder's linear layers.
    pub fn weight_bytes(&self) -> usize {
        self.decoder.bytes().unwrap_or_else(|| self.dtype.size_in_bytes())
    }

    /// What the device under it can give, measured for a few seconds, on a CPU on all cores.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn ceilings(&self) -> std::result::Result<Ceilings, EngineError> {
        let on_cpu = self.device.is_cpu();
        let measured = if on_cpu {
            Ceilings::measure(self.encoder, self.dtype)
        } else {
            Ceilings::of_gpu(&self.device, self.dtype)
        };
        Ok(measured?)
    }

    /// What makes its pixels of pictures.
    pub fn preprocessor(&self) -> &Preprocessor {
        &self.preprocessor
    }

    /// The encoder's output for each image, `[tokens, width]` row by row. For checks against a reference.
    pub fn hidden_states(&self, images: &[Pixels]) -> std::result::Result<Vec<Vec<f32>>, EngineError> {
        self.info.check_images(images)?;
        let hidden = self.vision.forward(images)?.to_dtype(DType::F32)?;
        let images = hidden.reshape((images.len(), ()))?;
        Ok(images.to_vec2()?)
    }

    /// The scores of the whole vocabulary after each of `tokens`, given all before it. For checks against a reference.
    pub fn logits(&self, image: &Pixels, tokens: &[u32]) -> std::result::Result<Vec<Vec<f32>>, EngineError> {
        let vocabulary = self.config.text.vocab_size;
        if tokens.is_empty() || tokens.len() > self.info.context_length {
            return Err(EngineError::bad_params(format!("{} tokens are no sequence of this model", tokens.len())));
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(EngineError::bad_params(format!("token {token} is outside the vocabulary of {vocabulary}")));
        }
        self.info.check_images(std::slice::from_ref(image))?;
        let hidden = self.vision.forward(std::slice::from_ref(image))?;
        let mut memory = self.new_memory();
        memory.admit(&Arc::new(self.text.remember(&hidden)?), tokens.len())?;
        let block = Block { width: tokens.len(), starts: vec![0], counts: vec![tokens.len()] };
        let hidden = self.text.forward(tokens, &block, &mut *memory)?;
        Ok(self.text.logits(&hidden)?.to_dtype(DType::F32)?.to_vec2()?)
    }

    pub(super) fn new_memory(&self) -> Box<dyn Memory> {
        memory::new(Sizes::of(&self.config), &self.device, self.dtype, self.decoder)
    }

    /// The memory of each image of `hidden`, `[images · tokens, width]`.
    pub(super) fn remember(&self, hidden: &Tensor) -> Result<Vec<ImageMemory>> {
        let tokens = self.config.vision.tokens();
        let images = hidden.dim(0)? / tokens;
        let remember = |image| self.text.remember(&hidden.narrow(0, image * tokens, tokens)?);
        // On a GPU calls are only given to it, one after the other.
        if self.device.is_cpu() {
            (0..images).into_par_iter().map(remember).collect()
        } else {
            (0..images).map(remember).collect()
        }
    }

    /// Waits for the device, so that phases can be told apart; nothing on a CPU.
    pub(super) fn wait(&self) -> Result<()> {
        self.device.synchronize()
    }
}
