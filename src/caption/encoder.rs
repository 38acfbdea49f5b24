//! Image encoders, which several models may share: where two models have equal ones, one is kept, and an image that both
//! look at is encoded once.

use std::any::Any;
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use candle_core::{Result, Tensor};
use safetensors::View;
use sha2::{Digest, Sha256};

use super::config::VisionConfig;
use super::load::LoadError;
use super::preprocess::Normalize;
use super::vision::VisionEncoder;
use super::weights::Scope;
use super::{EngineError, Pixels};

/// Names a loaded image encoder: what one of that name saw, every model that has it can look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EncoderId(u64);

impl EncoderId {
    /// A name that no other has in this process.
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl Default for EncoderId {
    fn default() -> Self {
        Self::new()
    }
}

/// What an image encoder saw of one image: its hidden states. Cheap to clone; images that were seen together share one
/// allocation, which is freed with the last of them.
#[derive(Clone)]
pub struct Sight(Arc<dyn Any + Send + Sync>);

impl Sight {
    /// Wraps an engine's own state.
    pub fn new(state: impl Any + Send + Sync) -> Self {
        Self(Arc::new(state))
    }

    /// The engine's own state, where `T` is its type.
    pub fn state<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        Arc::clone(&self.0).downcast().ok()
    }
}

/// One image of several that were encoded together.
struct Seen {
    encoder: EncoderId,
    /// Of all of them, `[images · tokens, width]`.
    hidden: Tensor,
    images: usize,
    /// Which of them it is.
    at: usize,
}

/// A model's image encoder.
#[derive(Clone)]
pub(super) struct Encoder {
    vision: Arc<VisionEncoder>,
    id: EncoderId,
}

impl Encoder {
    pub(super) fn id(&self) -> EncoderId {
        self.id
    }

    /// Images of the model's size to hidden states, `[images · tokens, width]`.
    pub(super) fn forward(&self, images: &[Pixels]) -> Result<Tensor> {
        self.vision.forward(images)
    }

    /// Encodes images together.
    pub(super) fn see(&self, images: &[Pixels]) -> Result<Vec<Sight>> {
        let hidden = self.forward(images)?;
        let seen = |at| Seen { encoder: self.id, hidden: hidden.clone(), images: images.len(), at };
        Ok((0..images.len()).map(|at| Sight::new(seen(at))).collect())
    }

    /// The hidden states of images that were seen, `[images · tokens, width]`, in their order.
    ///
    /// # Errors
    /// One was seen by another encoder, or the device fails.
    pub(super) fn recall(&self, sights: &[Sight]) -> std::result::Result<Tensor, EngineError> {
        let own = |sight: &Sight| sight.state::<Seen>().filter(|seen| seen.encoder == self.id);
        let seen: Option<Vec<_>> = sights.iter().map(own).collect();
        let seen = seen.ok_or_else(|| EngineError::bad_input("the image was seen by another image encoder"))?;
        let together = |(at, other): (usize, &Arc<Seen>)| other.at == at && other.hidden.id() == seen[0].hidden.id();
        if seen.first().is_some_and(|first| first.images == seen.len()) && seen.iter().enumerate().all(together) {
            return Ok(seen[0].hidden.clone());
        }
        let rows = seen.iter().map(|seen| {
            let tokens = seen.hidden.dim(0)? / seen.images;
            seen.hidden.narrow(0, seen.at * tokens, tokens)
        });
        let rows = rows.collect::<Result<Vec<_>>>()?;
        // A copy also of a single one: what follows may count on a tensor that begins with its storage.
        Ok(Tensor::cat(&rows, 0)?.force_contiguous()?)
    }
}

/// The image encoders of loaded models. Models that are loaded with one of these share those that are equal: of the same
/// weights, sizes, normalisation, device, precision and kernels.
#[derive(Default)]
pub struct Encoders(Vec<(Key, EncoderId, Weak<VisionEncoder>)>);

/// What makes two encoders equal.
#[derive(PartialEq)]
struct Key {
    config: VisionConfig,
    normalize: Normalize,
    /// Device, precision, kernels.
    place: [String; 3],
    /// SHA-256 of the weights as they were loaded, with their names and shapes.
    weights: [u8; 32],
}

impl Encoders {
    /// Reads an encoder, or finds that it is one of these. The weights are read either way: only they tell.
    pub(super) fn load(
        &mut self,
        scope: &Scope<'_>,
        config: &VisionConfig,
        normalize: Normalize,
        place: [String; 3],
    ) -> std::result::Result<Encoder, LoadError> {
        let digest = RefCell::new(Sha256::new());
        let vision = VisionEncoder::load(&scope.digested(&digest), config, &normalize)?;
        let weights = digest.into_inner().finalize().into();
        let key = Key { config: config.clone(), normalize, place, weights };
        self.0.retain(|(_, _, encoder)| encoder.strong_count() > 0);
        let mut known = self.0.iter().filter(|(other, ..)| *other == key);
        if let Some(known) = known.find_map(|(_, id, encoder)| Some((*id, encoder.upgrade()?))) {
            return Ok(Encoder { id: known.0, vision: known.1 });
        }
        let encoder = Encoder { id: EncoderId::new(), vision: Arc::new(vision) };
        self.0.push((key, encoder.id, Arc::downgrade(&encoder.vision)));
        Ok(encoder)
    }
}

/// Reads an encoder that no other model shares.
pub(super) fn load_alone(
    scope: &Scope<'_>,
    config: &VisionConfig,
    normalize: &Normalize,
) -> std::result::Result<Encoder, LoadError> {
    let vision = Arc::new(VisionEncoder::load(scope, config, normalize)?);
    Ok(Encoder { id: EncoderId::new(), vision })
}

/// Adds a tensor to what is known of the weights.
pub(super) fn digest(to: &RefCell<Sha256>, name: &str, tensor: &Tensor) {
    let mut to = to.borrow_mut();
    to.update(name);
    to.update([0]);
    for size in tensor.dims() {
        to.update(size.to_le_bytes());
    }
    to.update(View::data(tensor));
}
