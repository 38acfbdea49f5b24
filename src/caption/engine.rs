//! The engine: rows of captions in the making, on one model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::generate::{greedy, on_rows};
use super::memory::{Block, ImageMemory, Memory};
use super::model::Model;
use super::search::{Done, Next, Said, Search, Sequence};
use super::{Caption, Encoded, Engine, EngineError, ModelInfo, Params, Phases, Pixels, RowId};

/// Images encoded at a time on a CPU: more only make the activations outgrow the caches.
const HOST_IMAGES: usize = 2;
/// Images encoded at a time on a GPU, where the activations of more would take memory without gaining speed.
const DEVICE_IMAGES: usize = 64;

/// How many images are best encoded at a time.
pub(super) fn encode_size(device: &Device) -> usize {
    if device.is_cpu() { HOST_IMAGES } else { DEVICE_IMAGES }
}

/// Runs work for a CPU on a thread of the pool that its kernels share, so that none of them has to wake one first.
/// Several engines on one CPU share the pool, too: one of them may then wait for a whole call of another.
pub(super) fn at_home<T: Send>(device: &Device, work: impl FnOnce() -> T + Send) -> T {
    if device.is_cpu() { rayon::scope(|_| work()) } else { work() }
}

/// BLIP on candle. Several engines may share one model, each on a thread of its own.
pub struct BlipEngine {
    model: Arc<Model>,
    memory: Box<dyn Memory>,
    /// What each row searches for.
    searches: BTreeMap<RowId, Search>,
    /// The sequences of all rows, in the order of the memory's.
    sequences: Vec<Sequence>,
    /// Images encoded at a time.
    encode_size: usize,
    next_row: u64,
    phases: Phases,
}

impl BlipEngine {
    /// An engine without rows.
    pub fn new(model: Arc<Model>) -> Self {
        let memory = model.new_memory();
        let encode_size = encode_size(&model.device);
        let (searches, sequences) = (BTreeMap::new(), Vec::new());
        Self { model, memory, searches, sequences, encode_size, next_row: 0, phases: Phases::default() }
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
        let logits = self.forward()?;
        let next = self.choose(&logits)?;
        self.phases.tokens += self.sequences.len();
        self.phases.steps += 1;
        self.go_on(next)?;
        let finished = self.finished();
        self.phases.decode += started.elapsed();
        finished
    }

    /// The tokens that each sequence has to feed next: its prompt, or its latest token; short ones are filled up.
    fn next_block(&self) -> (Vec<u32>, Block) {
        let starts: Vec<usize> = self.sequences.iter().map(|one| one.remembered).collect();
        let counts: Vec<usize> = self.sequences.iter().map(|one| one.tokens.len() - one.remembered).collect();
        let width = counts.iter().copied().max().unwrap_or(0);
        let filler = self.model.config.text.pad_token_id;
        let tokens = self.sequences.iter().flat_map(|one| {
            let new = one.tokens[one.remembered..].iter().copied();
            new.chain(std::iter::repeat(filler)).take(width)
        });
        (tokens.collect(), Block { width, starts, counts })
    }

    /// Scores for the token after each sequence's last, `[sequences, vocabulary]`.
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

    /// How all rows go on: sequences that are named as nobody's parent end here.
    fn choose(&mut self, logits: &Tensor) -> candle_core::Result<Vec<Next>> {
        let sequences = &self.sequences;
        let mut by_row: BTreeMap<RowId, Vec<usize>> = BTreeMap::new();
        for (index, sequence) in sequences.iter().enumerate() {
            by_row.entry(sequence.row).or_default().push(index);
        }
        let rows = self.searches.iter_mut().map(|(row, search)| {
            let mut own = by_row.remove(row).unwrap_or_default();
            own.sort_by_key(|index| sequences[*index].rank);
            (search, own)
        });
        let (plain, mut scored): (Vec<_>, Vec<_>) = rows.partition(|(search, _)| search.is_plain());
        let mut next = Vec::with_capacity(sequences.len());
        // First, since the plain choice may bar an end in place.
        if !scored.is_empty() {
            let wanted: Vec<usize> = scored.iter().flat_map(|(_, own)| own).copied().collect();
            let chosen = on_rows(logits, &wanted, |mut scores| {
                let with_scores = scored.iter_mut().map(|(search, own)| {
                    let (first, rest) = scores.split_at(own.len());
                    scores = rest;
                    (search, own, first)
                });
                let with_scores: Vec<_> = with_scores.collect();
                let chosen = with_scores.into_par_iter().map(|(search, own, scores)| {
                    let live: Vec<&Sequence> = own.iter().map(|index| &sequences[*index]).collect();
                    let next = search.advance(&live, &Said::Scores(scores)).into_iter();
                    next.map(|next| Next { parent: own[next.parent], ..next }).collect::<Vec<_>>()
                });
                chosen.collect::<Vec<_>>()
            })?;
            next.extend(chosen.into_iter().flatten());
        }
        if !plain.is_empty() {
            let mut held_back = vec![false; sequences.len()];
            for (search, own) in &plain {
                for &index in own {
                    held_back[index] = search.holds_back_the_end(&sequences[index]);
                }
            }
            let choices = greedy(logits, &held_back, self.model.config.text.sep_token_id, self.model.is_fused())?;
            for (search, own) in plain {
                for index in own {
                    let said = Said::Choice(choices[index]);
                    let went_on = search.advance(&[&sequences[index]], &said).into_iter();
                    next.extend(went_on.map(|next| Next { parent: index, ..next }));
                }
            }
        }
        Ok(next)
    }

    /// Gives each sequence its next token, several copies of it where it goes on in several ways, and forgets those that
    /// go on in none.
    fn go_on(&mut self, next: Vec<Next>) -> candle_core::Result<()> {
        let mut children: Vec<Vec<Next>> = self.sequences.iter().map(|_| Vec::new()).collect();
        for next in next {
            children[next.parent].push(next);
        }
        let (mut forks, mut vacant) = (Vec::new(), Vec::new());
        for (index, children) in children.into_iter().enumerate() {
            let sequence = &mut self.sequences[index];
            let mut children = children.into_iter();
            let first = children.next();
            forks.extend(children.map(|next| {
                let mut fork = sequence.clone();
                fork.go_on(&next);
                (index, fork)
            }));
            match first {
                Some(next) => sequence.go_on(&next),
                None => vacant.push(index),
            }
        }
        for (parent, sequence) in forks {
            let place = vacant.pop().unwrap_or(self.sequences.len());
            self.memory.fork(parent, place)?;
            if place == self.sequences.len() {
                self.sequences.push(sequence);
            } else {
                self.sequences[place] = sequence;
            }
        }
        // Backwards, since the last takes the place of one that leaves.
        for place in vacant.into_iter().rev() {
            self.sequences.swap_remove(place);
            self.memory.swap_remove(place)?;
        }
        Ok(())
    }

    /// The captions of rows of which no sequence goes on.
    fn finished(&mut self) -> Result<Vec<(RowId, Caption)>, EngineError> {
        let live: BTreeSet<RowId> = self.sequences.iter().map(|one| one.row).collect();
        let ended: Vec<RowId> = self.searches.keys().filter(|row| !live.contains(row)).copied().collect();
        let mut finished = Vec::with_capacity(ended.len());
        for row in ended {
            if let Some(search) = self.searches.remove(&row) {
                finished.push((row, self.caption(search)?));
            }
        }
        Ok(finished)
    }

    fn caption(&self, search: Search) -> Result<Caption, EngineError> {
        let prompt = search.prompt();
        let captions = search.captions().into_iter().map(|Done { tokens, logprob, finish }| {
            let text = self.model.tokenizer.decode(&tokens)?;
            let token_ids = tokens[prompt..].to_vec();
            Ok(Caption { text, tokens: token_ids.len(), token_ids, logprob, finish, more: Vec::new() })
        });
        let mut captions = captions.collect::<Result<Vec<_>, EngineError>>()?.into_iter();
        let first = captions.next().ok_or_else(|| EngineError::internal("a search ended without a caption"))?;
        Ok(Caption { more: captions.collect(), ..first })
    }
}

impl Engine for BlipEngine {
    fn model(&self) -> &ModelInfo {
        self.model.info()
    }

    fn encode(&mut self, images: &[Pixels]) -> Result<Vec<Encoded>, EngineError> {
        self.model.info().check_images(images)?;
        let device = self.model.device.clone();
        at_home(&device, || self.encode_parts(images))
    }

    fn admit(&mut self, image: &Encoded, params: &Params) -> Result<RowId, EngineError> {
        let image = image
            .state::<ImageMemory>()
            .ok_or_else(|| EngineError::bad_input("the image was encoded by another kind of engine"))?;
        params.check()?;
        let most = params.max_new_tokens;
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
        let end = self.model.config.text.sep_token_id;
        self.searches.insert(id, Search::new(length, end, params));
        self.sequences.push(Sequence::new(id, prompt));
        Ok(id)
    }

    fn step(&mut self) -> Result<Vec<(RowId, Caption)>, EngineError> {
        if self.sequences.is_empty() {
            return Ok(Vec::new());
        }
        let device = self.model.device.clone();
        at_home(&device, || self.step_rows())
    }

    fn active(&self) -> usize {
        self.searches.len()
    }

    fn state_bytes(&self, rows: usize, tokens: usize) -> usize {
        self.memory.bytes_for(rows, tokens)
    }

    fn clear(&mut self) {
        self.searches.clear();
        self.sequences.clear();
        self.memory.clear();
    }

    fn take_phases(&mut self) -> Phases {
        std::mem::take(&mut self.phases)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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
