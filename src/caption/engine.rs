//! The engine: images encoded, and rows of captions in the making, on one model.

use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;

use super::memory::ImageMemory;
use super::model::Model;
use super::rows::Rows;
use super::{Caption, Encoded, EncoderId, Engine, EngineError, ModelInfo, Params, Phases, Pixels, RowId, Sight};

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

/// Works on images, or on what was seen of them, so many at a time; the results are in their order.
pub(super) fn in_parts<T, U: Clone>(
    images: &[T],
    at_a_time: usize,
    part: impl FnMut(&[T]) -> Result<Vec<U>, EngineError>,
) -> Result<Vec<U>, EngineError> {
    Ok(images.chunks(at_a_time).map(part).collect::<Result<Vec<_>, _>>()?.concat())
}

/// BLIP on candle. Several engines may share one model, each on a thread of its own.
pub struct BlipEngine {
    model: Arc<Model>,
    rows: Rows,
    /// Images encoded at a time.
    encode_size: usize,
    phases: Phases,
}

impl BlipEngine {
    /// An engine without rows.
    pub fn new(model: Arc<Model>) -> Self {
        let rows = Rows::new(model.new_memory());
        let encode_size = encode_size(&model.device);
        Self { model, rows, encode_size, phases: Phases::default() }
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

    /// Encodes images that are encoded at a time.
    fn see_part(&mut self, images: &[Pixels]) -> Result<Vec<Sight>, EngineError> {
        let started = Instant::now();
        let sights = self.model.vision.see(images)?;
        self.model.wait()?;
        self.phases.encode += started.elapsed();
        self.phases.images += images.len();
        Ok(sights)
    }

    fn remember_part(&mut self, sights: &[Sight]) -> Result<Vec<Encoded>, EngineError> {
        let started = Instant::now();
        let memories = self.model.remember(&self.model.vision.recall(sights)?)?;
        self.model.wait()?;
        self.phases.cross_kv += started.elapsed();
        let encoded = memories.into_iter().map(|memory| {
            let bytes = memory.bytes();
            Encoded::new(memory, bytes)
        });
        Ok(encoded.collect())
    }

    fn step_rows(&mut self) -> Result<Vec<(RowId, Caption)>, EngineError> {
        let started = Instant::now();
        self.phases.tokens += self.rows.sequences();
        self.phases.steps += 1;
        let finished = self.rows.step(&self.model.writer);
        self.phases.decode += started.elapsed();
        finished
    }
}

impl Engine for BlipEngine {
    fn model(&self) -> &ModelInfo {
        self.model.info()
    }

    fn encoder(&self) -> EncoderId {
        self.model.vision.id()
    }

    fn see(&mut self, images: &[Pixels]) -> Result<Vec<Sight>, EngineError> {
        self.model.info().check_images(images)?;
        let (device, size) = (self.model.device.clone(), self.encode_size);
        at_home(&device, || in_parts(images, size, |images| self.see_part(images)))
    }

    fn remember(&mut self, sights: &[Sight]) -> Result<Vec<Encoded>, EngineError> {
        let (device, size) = (self.model.device.clone(), self.encode_size);
        at_home(&device, || in_parts(sights, size, |sights| self.remember_part(sights)))
    }

    /// What was seen of some images is forgotten before the next ones are looked at.
    fn encode(&mut self, images: &[Pixels]) -> Result<Vec<Encoded>, EngineError> {
        self.model.info().check_images(images)?;
        let (device, size) = (self.model.device.clone(), self.encode_size);
        at_home(&device, || {
            in_parts(images, size, |images| {
                let sights = self.see_part(images)?;
                self.remember_part(&sights)
            })
        })
    }

    fn admit(&mut self, image: &Encoded, params: &Params) -> Result<RowId, EngineError> {
        let image = image
            .state::<ImageMemory>()
            .ok_or_else(|| EngineError::bad_input("the image was encoded by another kind of engine"))?;
        self.rows.admit(&self.model.writer, &image, params)
    }

    fn step(&mut self) -> Result<Vec<(RowId, Caption)>, EngineError> {
        if self.rows.active() == 0 {
            return Ok(Vec::new());
        }
        let device = self.model.device.clone();
        at_home(&device, || self.step_rows())
    }

    fn active(&self) -> usize {
        self.rows.active()
    }

    fn state_bytes(&self, rows: usize, tokens: usize) -> usize {
        self.rows.bytes_for(rows, tokens)
    }

    fn clear(&mut self) {
        self.rows.clear();
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
