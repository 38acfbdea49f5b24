//! The canary: a second captioner on a device, which captions a share of the stream's images once more. What it writes is
//! compared with the captions and published beside them; nothing that it does or fails at changes those.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{most_rows, parts};
use crate::caption::{self, Ask, Caption, Engine, Params, Phases, Pixels};
use crate::message::{
    CANARY_SCHEMA, CanaryRecord, Generated, ImageInfo, Message, ModelRef, Origin, Timing, Tried, Written,
};
use crate::settings;
use crate::stage::answers::{Writer, generated, named};
use crate::stage::{Output, Ready};
use crate::tracked::Tracked;

/// Whether an image is captioned twice. Its SHA-256 decides, so that all workers, today and tomorrow, choose the same images.
pub(super) fn is_chosen(sha256: &str, share: f64) -> bool {
    let first = sha256.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok());
    first.is_some_and(|first| f64::from(first) < share * 2f64.powi(32))
}

/// An image that was captioned and is to be captioned once more.
#[derive(Debug)]
pub(super) struct Trial {
    pixels: Pixels,
    params: Params,
    caption: Written,
    id: String,
    index: usize,
    image: ImageInfo,
    origin: Origin,
    message: Arc<Message>,
}

impl Trial {
    /// Of an image that the captioner has captioned.
    pub(super) fn of(ready: &Ready, params: &Params, caption: &Caption, by: Writer<'_>) -> Self {
        let row = &ready.row;
        let caption = Written {
            text: caption.text.clone(),
            generated: generated(caption),
            model: by.models.model.clone(),
            device_ms: Timing::ms(by.cost),
        };
        Self {
            pixels: ready.pixels.clone(),
            params: params.clone(),
            caption,
            id: row.request.id.clone().unwrap_or_else(|| row.origin.to_string()),
            index: row.index,
            image: ready.image.clone(),
            origin: row.origin.clone(),
            message: row.message.clone(),
        }
    }

    fn compared(self, told: Result<Caption, String>, model: ModelRef, cost: Duration, worker: &str) -> Output {
        let (text, generated, error) = match told {
            Ok(caption) => (Some(caption.text.clone()), generated(&caption), None),
            Err(error) => (None, Generated::default(), Some(error)),
        };
        let canary = Tried { text, generated, model, device_ms: Timing::ms(cost), error };
        let (result, word_distance) = CanaryRecord::compared(&self.caption, &canary);
        let record = CanaryRecord {
            schema: CANARY_SCHEMA,
            id: self.id,
            index: self.index,
            result,
            word_distance,
            caption: self.caption,
            canary,
            image: self.image,
            origin: self.origin,
            worker: worker.to_owned(),
        };
        Output::Canary { record: Box::new(record), message: self.message }
    }
}

/// The second captioner of a device.
pub(super) struct Canary {
    engine: Box<dyn Engine>,
    /// Rows that it takes at once.
    most: usize,
}

impl Canary {
    /// One that takes as many rows as fit into `model.max_state`.
    pub(super) fn new(engine: Box<dyn Engine>, model: &settings::Model) -> Self {
        Self { most: most_rows(engine.as_ref(), model), engine }
    }

    /// Name of its model.
    pub(super) fn id(&self) -> &str {
        &self.engine.model().id
    }

    /// Where the time went since the last call.
    pub(super) fn take_phases(&mut self) -> Phases {
        self.engine.take_phases()
    }

    /// Captions images once more. What the canary cannot do stands in their records.
    pub(super) fn compare(&mut self, trials: Vec<Tracked<Trial>>, worker: &str) -> Vec<Tracked<Output>> {
        let (count, begun) = (u32::try_from(trials.len()).unwrap_or(u32::MAX), Instant::now());
        let items = trials.iter().map(|trial| (trial.value.pixels.clone(), Ask::caption(trial.value.params.clone())));
        let parts = parts(items.collect(), self.most, |(_, ask): &(_, Ask)| ask.rows());
        let told: Vec<_> = parts.iter().flat_map(|part| self.caption(part)).collect();
        let cost = begun.elapsed() / count.max(1);
        let model = named(self.engine.model());
        let compared =
            |(trial, told): (Tracked<Trial>, _)| trial.map(|trial| trial.compared(told, model.clone(), cost, worker));
        trials.into_iter().zip(told).map(compared).collect()
    }

    /// A result for each of the images. What fails as a whole is halved, so that one image spoils no other and a smaller batch
    /// may have the memory that a larger one had not.
    fn caption(&mut self, items: &[(Pixels, Ask)]) -> Vec<Result<Caption, String>> {
        match caption::tell(self.engine.as_mut(), None, None, items) {
            Ok(told) => {
                let caption = |told: caption::Told| told.caption.ok_or_else(|| "no caption was written".to_owned());
                told.into_iter().map(|told| told.map_err(|error| error.to_string()).and_then(caption)).collect()
            }
            Err(error) if items.len() < 2 => {
                tracing::warn!(canary = self.id(), %error, "the canary failed on an image; its caption is published");
                items.iter().map(|_| Err(error.to_string())).collect()
            }
            Err(_) => {
                let (first, second) = items.split_at(items.len() / 2);
                let mut told = self.caption(first);
                told.extend(self.caption(second));
                told
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_canary_has_its_share_of_the_images_whoever_chooses() {
        let sha = |first: u32| format!("{first:08x}{}", "0".repeat(56));
        for (first, share, chosen) in [
            (0, 0.0, false),
            (0, 0.001, true),
            (0x3fff_ffff, 0.25, true),
            (0x4000_0000, 0.25, false),
            (u32::MAX, 0.999, false),
            (u32::MAX, 1.0, true),
        ] {
            assert_eq!(is_chosen(&sha(first), share), chosen, "{first:x} of {share}");
        }
        assert!(!is_chosen("", 1.0));
    }
}
