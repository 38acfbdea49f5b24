//! A loaded model: weights, tokenizer and what is known of them. Engines share it.

use candle_core::{DType, Device, Result, Tensor};

use super::config::BlipConfig;
use super::encoder::{Encoder, EncoderId};
use super::error::EngineError;
use super::load::{Built, LoadError};
use super::memory::{Block, ImageMemory, Memory, Sizes};
use super::preprocess::Preprocessor;
use super::weights::Kept;
use super::writer::Writer;
use super::{Ceilings, ModelInfo, Pixels, Work};
use std::sync::Arc;

/// A BLIP captioning model on a device.
pub struct Model {
    pub(super) vision: Encoder,
    pub(super) writer: Writer,
    config: BlipConfig,
    preprocessor: Preprocessor,
    pub(super) device: Device,
    dtype: DType,
    encoder: Kept,
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
    /// Reads `text_decoder`.
    pub(super) fn build(built: Built<'_>) -> std::result::Result<Self, LoadError> {
        let Built { config, preprocessor, tokenizer, scope, vision, encoder, identity } = built;
        let writer = scope.part("text_decoder");
        let writer = Writer::load(&writer, &config.text, Sizes::of(&config), Arc::new(tokenizer))?;
        let info = identity.info(&config, config.parameters() + writer.untied());
        let (device, dtype) = (scope.device().clone(), scope.dtype());
        Ok(Self { vision, writer, config, preprocessor, device, dtype, encoder, info })
    }

    /// The model and where it runs.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Names its image encoder.
    pub fn encoder(&self) -> EncoderId {
        self.vision.id()
    }

    /// What its captions cost at least.
    pub fn work(&self) -> Work {
        self.config.work(!self.writer.kept.are_tensors())
    }

    /// Bytes of one weight of the decoder's linear layers.
    pub fn weight_bytes(&self) -> usize {
        self.writer.kept.bytes().unwrap_or_else(|| self.dtype.size_in_bytes())
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
        for image in self.remember(&hidden)? {
            memory.admit(&Arc::new(image), tokens.len())?;
        }
        let block = Block { width: tokens.len(), starts: vec![0], counts: vec![tokens.len()] };
        let hidden = self.writer.text.forward(tokens, &block, &mut *memory)?;
        Ok(self.writer.text.logits(&hidden)?.to_dtype(DType::F32)?.to_vec2()?)
    }

    pub(super) fn new_memory(&self) -> Box<dyn Memory> {
        self.writer.new_memory(self.config.vision.tokens())
    }

    /// The memory of each image of `hidden`, `[images · tokens, width]`.
    pub(super) fn remember(&self, hidden: &Tensor) -> Result<Vec<ImageMemory>> {
        self.writer.text.remember(hidden, self.config.vision.tokens())
    }

    /// Waits for the device, so that phases can be told apart; nothing on a CPU.
    pub(super) fn wait(&self) -> Result<()> {
        self.device.synchronize()
    }
}
