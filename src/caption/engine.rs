//! The engine: rows of captions in the making, on one model.

use std::sync::Arc;
use std::time::Instant;

use candle_core::Tensor;

use super::generate::{Choice, greedy};
use super::memory::{Block, ImageMemory, Memory};
use super::model::Model;
use super::{Caption, Encoded, Engine, EngineError, Finish, ModelInfo, Params, Phases, Pixels, RowId};

/// Images encoded at a time on a CPU: more only make the activations outgrow the caches.
const HOST_IMAGES: usize = 2;
/// Images encoded at a time on a GPU, where the activations of more would take memory without gaining speed.
const DEVICE_IMAGES: usize = 64;

/// BLIP on candle. Several engines may share one model, each on a thread of its own.
pub struct BlipEngine {
    model: Arc<Model>,
    memory: Box<dyn Memory>,
    /// In the order of the memory's rows.
    rows: Vec<Row>,
    /// Images encoded at a time.
    encode_size: usize,
    next_row: u64,
    phases: Phases,
}

struct Row {
    id: RowId,
    /// The prompt's tokens, `[DEC]` first.
    prompt: Vec<u32>,
    generated: Vec<u32>,
    /// How many tokens the memory has.
    remembered: usize,
    logprob: f32,
    max_new_tokens: usize,
    min_new_tokens: usize,
}

impl BlipEngine {
    /// An engine without rows.
    pub fn new(model: Arc<Model>) -> Self {
        let memory = model.new_memory();
        let encode_size = if model.device.is_cpu() { HOST_IMAGES } else { DEVICE_IMAGES };
        Self { model, memory, rows: Vec::new(), encode_size, next_row: 0, phases: Phases::default() }
    }

    /// Encodes `images` at a time, one at least, instead of what is best for most machines.
    #[must_use]
    pub fn with_encode_size(mut self, images: usize) -> Self {
        self.encode_size = images.max(1);
        self
    }

    /// How many images it encodes at a time.
    pub fn encode_size(&self) -> usize {
        self.encode_size
    }

    fn prompt(&self, params: &Params) -> Result<Vec<u32>, EngineError> {
        let mut tokens = vec![self.model.config.text.bos_token_id];
        if let Some(prompt) = &params.prompt {
            tokens.extend(self.model.tokenizer.encode(prompt)?);
        }
        let vocabulary = self.model.config.text.vocab_size;
        if tokens.iter().any(|&token| token as usize >= vocabulary) {
            return Err(EngineError::bad_params("the prompt has a token that the model does not know"));
        }
        Ok(tokens)
    }

    /// Runs work for a CPU on a thread of the pool that its kernels share, so that none of them has to wake one first.
    /// Several engines on one CPU share the pool, too: one of them may then wait for a whole call of another.
    fn at_home<T: Send>(&mut self, work: impl FnOnce(&mut Self) -> T + Send) -> T {
        if self.model.device.is_cpu() { rayon::scope(|_| work(self)) } else { work(self) }
    }

    fn encode_parts(&mut self, images: &[Pixels]) -> Result<Vec<Encoded>, EngineError> {
        let mut encoded = Vec::with_capacity(images.len());
        for images in images.chunks(self.encode_size) {
            let started = Instant::now();
            let hidden = self.model.vision.forward(images)?;
            self.model.wait()?;
            self.phases.encode += started.elapsed();
            let started = Instant::now();
            let memories = self.model.remember(&hidden)?;
            self.model.wait()?;
            self.phases.cross_kv += started.elapsed();
            self.phases.images += images.len();
            encoded.extend(memories.into_iter().map(|memory| {
                let bytes = memory.bytes();
                Encoded::new(memory, bytes)
            }));
        }
        Ok(encoded)
    }

    fn step_rows(&mut self) -> Result<Vec<(RowId, Caption)>, EngineError> {
        let started = Instant::now();
        let end = self.model.config.text.sep_token_id;
        let logits = self.forward()?;
        let held_back: Vec<bool> = self.rows.iter().map(Row::holds_back_the_end).collect();
        let choices = greedy(&logits, &held_back, end, self.model.is_fused())?;
        for (row, choice) in self.rows.iter_mut().zip(choices) {
            row.take(choice);
        }
        self.phases.tokens += self.rows.len();
        self.phases.steps += 1;
        let finished = self.finished(end);
        self.phases.decode += started.elapsed();
        finished
    }

    /// The tokens that each row has to feed next: its prompt, or its latest token; short rows are filled up.
    fn next_block(&self) -> (Vec<u32>, Block) {
        let starts: Vec<usize> = self.rows.iter().map(|row| row.remembered).collect();
        let counts: Vec<usize> = self.rows.iter().map(|row| row.length() - row.remembered).collect();
        let width = counts.iter().copied().max().unwrap_or(0);
        let filler = self.model.config.text.pad_token_id;
        let tokens = self.rows.iter().flat_map(|row| {
            let new = row.tokens().skip(row.remembered);
            new.chain(std::iter::repeat(filler)).take(width)
        });
        (tokens.collect(), Block { width, starts, counts })
    }

    /// Scores for the token after each row's last, `[rows, vocabulary]`.
    fn forward(&mut self) -> candle_core::Result<Tensor> {
        let (tokens, block) = self.next_block();
        let hidden = self.model.text.forward(&tokens, &block, &mut *self.memory)?;
        let last = if block.width == 1 {
            hidden
        } else {
            let last = block.counts.iter().enumerate().map(|(row, count)| (row * block.width + count - 1) as u32);
            hidden.index_select(&Tensor::from_iter(last, hidden.device())?, 0)?
        };
        self.model.text.logits(&last)
    }

    fn finished(&mut self, end: u32) -> Result<Vec<(RowId, Caption)>, EngineError> {
        let mut finished = Vec::new();
        // Backwards, since the last row takes the place of one that leaves.
        for index in (0..self.rows.len()).rev() {
            if let Some(finish) = self.rows[index].finish(end) {
                let row = self.rows.swap_remove(index);
                self.memory.swap_remove(index)?;
                finished.push((row.id, self.caption(row, finish)?));
            }
        }
        finished.reverse();
        Ok(finished)
    }

    fn caption(&self, row: Row, finish: Finish) -> Result<Caption, EngineError> {
        let text = self.model.tokenizer.decode(&row.tokens().collect::<Vec<_>>())?;
        Ok(Caption { text, tokens: row.generated.len(), token_ids: row.generated, logprob: row.logprob, finish })
    }
}

impl Row {
    fn length(&self) -> usize {
        self.prompt.len() + self.generated.len()
    }

    fn tokens(&self) -> impl Iterator<Item = u32> {
        self.prompt.iter().chain(&self.generated).copied()
    }

    fn holds_back_the_end(&self) -> bool {
        self.generated.len() < self.min_new_tokens
    }

    fn take(&mut self, choice: Choice) {
        self.remembered = self.length();
        self.generated.push(choice.token);
        self.logprob += choice.logprob;
    }

    fn finish(&self, end: u32) -> Option<Finish> {
        if self.generated.last() == Some(&end) {
            Some(Finish::Stop)
        } else if self.generated.len() >= self.max_new_tokens {
            Some(Finish::Length)
        } else {
            None
        }
    }
}

impl Engine for BlipEngine {
    fn model(&self) -> &ModelInfo {
        self.model.info()
    }

    fn encode(&mut self, images: &[Pixels]) -> Result<Vec<Encoded>, EngineError> {
        self.model.check_images(images)?;
        self.at_home(|engine| engine.encode_parts(images))
    }

    fn admit(&mut self, image: &Encoded, params: &Params) -> Result<RowId, EngineError> {
        let image = image
            .state::<ImageMemory>()
            .ok_or_else(|| EngineError::bad_input("the image was encoded by another kind of engine"))?;
        let (most, least) = (params.max_new_tokens, params.min_new_tokens);
        if most == 0 || least > most {
            return Err(EngineError::bad_params(format!(
                "max_new_tokens is {most} and min_new_tokens {least}: at least one token, and no more than the most"
            )));
        }
        let prompt = self.prompt(params)?;
        let (length, limit) = (prompt.len(), self.model.info().context_length);
        if length.saturating_add(most) > limit {
            return Err(EngineError::bad_params(format!(
                "a prompt of {length} tokens and max_new_tokens of {most} are more than the {limit} tokens that the \
                 model can see"
            )));
        }
        // The last token of a caption is never fed back.
        self.memory.admit(&image, length + most - 1)?;
        let id = RowId(self.next_row);
        self.next_row += 1;
        self.rows.push(Row {
            id,
            prompt,
            generated: Vec::with_capacity(most),
            remembered: 0,
            logprob: 0.0,
            max_new_tokens: most,
            min_new_tokens: least,
        });
        Ok(id)
    }

    fn step(&mut self) -> Result<Vec<(RowId, Caption)>, EngineError> {
        if self.rows.is_empty() {
            return Ok(Vec::new());
        }
        self.at_home(Self::step_rows)
    }

    fn active(&self) -> usize {
        self.rows.len()
    }

    fn state_bytes(&self, rows: usize, tokens: usize) -> usize {
        self.memory.bytes_for(rows, tokens)
    }

    fn clear(&mut self) {
        self.rows.clear();
        self.memory.clear();
    }

    fn take_phases(&mut self) -> Phases {
        std::mem::take(&mut self.phases)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::Device;

    use super::*;
    use crate::caption::{Backend, DeviceSpec, DtypeSpec, LoadOptions, ModelSource, load_model};

    /// Rows of all ages, with and without prompts, one joining at every other step.
    fn captions(engine: &mut BlipEngine, images: &[Pixels]) -> Vec<(RowId, Caption)> {
        let encoded = engine.encode(images).unwrap();
        let prompts = [None, Some("a photo of"), Some("it is not, the man")];
        let mut waiting = encoded.iter().zip(prompts.iter().cycle());
        let mut captions = Vec::new();
        for step in 0.. {
            if step % 2 == 0
                && let Some((image, prompt)) = waiting.next()
            {
                engine.admit(image, &Params { prompt: prompt.map(Into::into), ..Params::default() }).unwrap();
            }
            captions.extend(engine.step().unwrap());
            if engine.active() == 0 && captions.len() == images.len() {
                break;
            }
        }
        captions.sort_by_key(|(row, _)| *row);
        captions
    }

    #[test]
    fn the_kernels_of_the_host_and_those_of_devices_caption_alike() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reference");
        for name in ["proportions", "widths", "depths"] {
            let directory = fixtures.join(name);
            let tensors = candle_core::safetensors::load(directory.join("expected.safetensors"), &Device::Cpu).unwrap();
            let bytes: Vec<Vec<u8>> = tensors["images"].flatten_from(1).unwrap().to_vec2().unwrap();
            let size = tensors["images"].dim(1).unwrap();
            let images: Vec<_> = bytes.into_iter().map(|bytes| Pixels::new(size, bytes).unwrap()).collect();
            let source = ModelSource::Dir(directory);
            let options = LoadOptions { device: DeviceSpec::Cpu, dtype: DtypeSpec::F32, ..LoadOptions::new(source) };
            let model = load_model(&options).unwrap();
            let mut host = BlipEngine::new(Arc::clone(&model));
            let encoded: usize = host.encode(&images).unwrap().iter().map(Encoded::bytes).sum();
            assert_eq!(host.state_bytes(images.len(), 0), encoded, "{name}");
            let on_host = captions(&mut host, &images);
            for backend in [Backend::Candle, Backend::Fused] {
                let options = LoadOptions { backend, ..options.clone() };
                let mut device = BlipEngine::new(load_model(&options).unwrap());
                let on_device = captions(&mut device, &images);
                assert_eq!(on_host.len(), images.len());
                for ((_, a), (_, b)) in on_host.iter().zip(&on_device) {
                    assert_eq!((&a.token_ids, &a.text), (&b.token_ids, &b.text), "{name} on {backend}");
                    assert!((a.logprob - b.logprob).abs() < 1e-3);
                }
            }
        }
    }
}
