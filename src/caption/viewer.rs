//! The trait of what looks at images beside the captioner, and what was seen of the images of a batch: an image that several
//! models look at through one image encoder is encoded once.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::encoder::Encoder;
use super::engine::{at_home, encode_size, in_parts};
use super::{Ask, Encoded, EncoderId, EngineError, ModelInfo, Pixels, Sight};

/// Looks at images with one model on one device. Its owner is one thread.
pub trait Viewer: Send {
    /// The model and where it runs.
    fn model(&self) -> &ModelInfo;

    /// Encodes images of the model's size; the result is in the order of `images`.
    ///
    /// # Errors
    /// Of the whole call: with [`super::ErrorKind::OutOfMemory`] a smaller one may succeed.
    fn encode(&mut self, images: &[Pixels]) -> Result<Vec<Encoded>, EngineError>;

    /// Names its image encoder, whose sights [`Viewer::remember`] takes; another model may have the same.
    fn encoder(&self) -> EncoderId;

    /// The first half of `encode`, of which any model with this image encoder can make the second.
    ///
    /// # Errors
    /// Of the whole call.
    fn see(&mut self, images: &[Pixels]) -> Result<Vec<Sight>, EngineError>;

    /// The second half of `encode`, for images that its image encoder saw, be it for another model; in their order.
    ///
    /// # Errors
    /// Of the whole call.
    fn remember(&mut self, sights: &[Sight]) -> Result<Vec<Encoded>, EngineError>;
}

/// The image encoder of a model, and what the model is and where it runs.
pub(super) struct Vision {
    pub(super) encoder: Encoder,
    pub(super) device: Device,
    pub(super) info: ModelInfo,
}

/// A model of BLIP's whose texts look at what its image encoder saw. Its weights may be shared.
pub(super) trait Looks: Send + Sync {
    /// Its image encoder.
    fn vision(&self) -> &Vision;

    /// What the texts look at, of so many images with these hidden states, `[images · tokens, width]`.
    fn remember_hidden(&self, hidden: &Tensor, images: usize) -> Result<Vec<Encoded>, EngineError>;

    /// See [`Viewer::encode`].
    fn encode_all(&self, images: &[Pixels]) -> Result<Vec<Encoded>, EngineError> {
        let Vision { encoder, device, info } = self.vision();
        info.check_images(images)?;
        let part = |images: &[Pixels]| self.remember_hidden(&encoder.forward(images)?, images.len());
        at_home(device, || in_parts(images, encode_size(device), part))
    }
}

impl<T: Looks> Viewer for Arc<T> {
    fn model(&self) -> &ModelInfo {
        &self.vision().info
    }

    fn encode(&mut self, images: &[Pixels]) -> Result<Vec<Encoded>, EngineError> {
        self.encode_all(images)
    }

    fn encoder(&self) -> EncoderId {
        self.vision().encoder.id()
    }

    fn see(&mut self, images: &[Pixels]) -> Result<Vec<Sight>, EngineError> {
        let Vision { encoder, device, info } = self.vision();
        info.check_images(images)?;
        at_home(device, || in_parts(images, encode_size(device), |images| Ok(encoder.see(images)?)))
    }

    fn remember(&mut self, sights: &[Sight]) -> Result<Vec<Encoded>, EngineError> {
        let Vision { encoder, device, .. } = self.vision();
        let part = |sights: &[Sight]| self.remember_hidden(&encoder.recall(sights)?, sights.len());
        at_home(device, || in_parts(sights, encode_size(device), part))
    }
}

/// What was seen of the images of a batch and is looked at once more, by their places in it.
pub(super) struct Sights(Vec<Option<(EncoderId, Sight)>>);

impl Sights {
    /// Of so many images, nothing yet.
    pub(super) fn of(images: usize) -> Self {
        Self(vec![None; images])
    }

    /// Keeps what an encoder saw of the image at a place.
    pub(super) fn keep(&mut self, at: usize, by: EncoderId, sight: Sight) {
        self.0[at] = Some((by, sight));
    }

    /// What the encoder saw of the image at a place, if it did.
    fn by(&self, encoder: EncoderId, at: usize) -> Option<Sight> {
        self.0[at].as_ref().filter(|(by, _)| *by == encoder).map(|(_, sight)| sight.clone())
    }

    /// Encodes the images at some places for a model, in the order of the places. What its encoder saw before is not looked
    /// at again, and what it sees now is kept where it is looked at later, too.
    pub(super) fn look(
        &mut self,
        viewer: &mut dyn Viewer,
        items: &[(Pixels, Ask)],
        places: &[usize],
        is_looked_at_later: impl Fn(usize) -> bool,
    ) -> Result<Vec<Encoded>, EngineError> {
        let encoder = viewer.encoder();
        let unseen: Vec<usize> = places.iter().copied().filter(|at| self.by(encoder, *at).is_none()).collect();
        let pixels: Vec<Pixels> = unseen.iter().map(|at| items[*at].0.clone()).collect();
        let mut encoded = Vec::new();
        if unseen.iter().any(|at| is_looked_at_later(*at)) {
            for (at, sight) in unseen.iter().zip(viewer.see(&pixels)?) {
                self.keep(*at, encoder, sight);
            }
        } else if !unseen.is_empty() {
            encoded = viewer.encode(&pixels)?;
        }
        let seen: Vec<Sight> = places.iter().filter_map(|at| self.by(encoder, *at)).collect();
        let mut remembered = if seen.is_empty() { Vec::new() } else { viewer.remember(&seen)? }.into_iter();
        let mut encoded = encoded.into_iter();
        let next = places.iter().map(|at| match self.by(encoder, *at) {
            Some(_) => remembered.next(),
            None => encoded.next(),
        });
        let looked_at = next.collect::<Option<_>>().ok_or_else(|| EngineError::internal("an image was lost"));
        // They are as large as the images' hidden states.
        for at in places.iter().filter(|at| !is_looked_at_later(**at)) {
            self.0[*at].take_if(|(by, _)| *by == encoder);
        }
        looked_at
    }
}
