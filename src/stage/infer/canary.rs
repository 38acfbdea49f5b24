//! The canary: a second captioner on a device, which captions a share of the stream's images once more. What it writes is
//! compared with the captions and published beside them; nothing that it does or fails at changes those.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{most_rows, parts};
use crate::caption::{self, Ask, Caption, Engine, ErrorKind, Params, Phases, Pixels};
use crate::message::{CANARY_SCHEMA, CanaryRecord, Generated, ImageInfo, Message, ModelRef, Origin, Timing, Written};
use crate::settings;
use crate::stage::answers::{Writer, generated, named};
use crate::stage::{Finished, Output, Ready, panic_text};
use crate::tracked::Tracked;

/// How long an image may wait until there are enough for a batch.
const GATHER: Duration = Duration::from_secs(2);

/// Whether an image is captioned twice. Its SHA-256 decides, so that all workers, today and tomorrow, choose the same images.
fn is_chosen(sha256: &str, share: f64) -> bool {
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
            text: Some(caption.text.clone()),
            generated: generated(caption),
            model: by.models.model.clone(),
            device_ms: Timing::ms(by.cost),
            error: None,
        };
        Self {
            pixels: ready.pixels.clone(),
            params: params.clone(),
            caption,
            id: row.id(),
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
        let canary = Written { text, generated, model, device_ms: Timing::ms(cost), error };
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
            shortened: false,
        };
        Output::Canary { record: Box::new(record), message: self.message }
    }
}

/// The second captioner of a device, and what is gathered for it: a few images of many batches are one of its own.
pub(super) struct Canary {
    /// `None` once it has panicked.
    engine: Option<Box<dyn Engine>>,
    model: ModelRef,
    /// Rows that it takes at once.
    most: usize,
    /// Each with its lane.
    trials: Vec<(usize, Tracked<Trial>)>,
    /// When the first of them was gathered.
    since: Instant,
}

impl Canary {
    /// One that takes as many rows as fit into `model.max_state`.
    pub(super) fn new(engine: Box<dyn Engine>, model: &settings::Model) -> Self {
        let (named, most) = (named(engine.model()), most_rows(engine.as_ref(), model));
        Self { engine: Some(engine), model: named, most, trials: Vec::new(), since: Instant::now() }
    }

    /// With what is gathered for another one.
    pub(super) fn in_the_place_of(self, other: Self) -> Self {
        Self { trials: other.trials, since: other.since, ..self }
    }

    /// Whether it is to caption an image.
    pub(super) fn chooses(&self, sha256: &str, share: f64) -> bool {
        self.engine.is_some() && is_chosen(sha256, share)
    }

    /// Keeps an image of a lane until there are enough.
    pub(super) fn gather(&mut self, lane: usize, trial: Tracked<Trial>) {
        if self.trials.is_empty() {
            self.since = Instant::now();
        }
        self.trials.push((lane, trial));
    }

    /// Whether something is gathered.
    pub(super) fn has_trials(&self) -> bool {
        !self.trials.is_empty()
    }

    /// Whether it is enough for a batch of so many rows, or has waited for long.
    pub(super) fn is_due(&self, rows: usize) -> bool {
        let gathered = || self.trials.iter().map(|(_, trial)| trial.value.params.rows()).sum::<usize>();
        self.has_trials() && (self.since.elapsed() >= GATHER || gathered() >= rows.min(self.most))
    }

    /// Where the time of its model went since the last call.
    pub(super) fn take_phases(&mut self) -> Option<(String, Phases)> {
        Some((self.model.id.clone(), self.engine.as_mut()?.take_phases()))
    }

    /// Captions what is gathered. What the canary cannot do stands in the records.
    pub(super) fn compare(&mut self, worker: &str) -> Vec<(usize, Finished)> {
        let begun = Instant::now();
        let items = self.trials.iter().map(|(_, trial)| {
            let Trial { pixels, params, .. } = &trial.value;
            (pixels.clone(), Ask::caption(params.clone()))
        });
        let parts = parts(items.collect(), self.most, |(_, ask): &(_, Ask)| ask.rows());
        let told: Vec<_> = parts.iter().flat_map(|part| self.guarded(part)).collect();
        let failed = told.iter().filter_map(|told| told.as_ref().err());
        if let Some(error) = failed.clone().next() {
            let (images, canary) = (failed.count(), &self.model.id);
            tracing::warn!(canary, images, error, "the canary has no captions of some images");
        }
        let cost = begun.elapsed() / u32::try_from(told.len()).unwrap_or(u32::MAX).max(1);
        self.end(told, cost, worker)
    }

    /// Ends what is gathered without a caption.
    pub(super) fn give_up(&mut self, why: &str, worker: &str) -> Vec<(usize, Finished)> {
        let told = self.trials.iter().map(|_| Err(why.to_owned())).collect();
        self.end(told, Duration::ZERO, worker)
    }

    fn end(&mut self, told: Vec<Result<Caption, String>>, cost: Duration, worker: &str) -> Vec<(usize, Finished)> {
        let compared = |((lane, trial), told): ((usize, Tracked<Trial>), _)| {
            (lane, trial.map(|trial| trial.compared(told, self.model.clone(), cost, worker)))
        };
        std::mem::take(&mut self.trials).into_iter().zip(told).map(compared).collect()
    }

    /// A result for each of the images, whatever happens. After a panic the canary is out of use, so that nobody sees it
    /// half-changed.
    fn guarded(&mut self, items: &[(Pixels, Ask)]) -> Vec<Result<Caption, String>> {
        let all = |why: String| items.iter().map(|_| Err(why.clone())).collect();
        let Some(mut engine) = self.engine.take() else { return all("the canary has panicked".into()) };
        let most = &mut self.most;
        match catch_unwind(AssertUnwindSafe(|| (caption(engine.as_mut(), items, most), engine))) {
            Ok((told, engine)) => {
                self.engine = Some(engine);
                told
            }
            Err(panic) => {
                let why = format!("the canary panicked: {}", panic_text(panic.as_ref()));
                let canary = &self.model.id;
                tracing::error!(canary, why, "the canary is out of use until another one takes its place");
                all(why)
            }
        }
    }
}

/// A result for each of the images. What fails as a whole is halved, so that one image spoils no other and a smaller batch may
/// have the memory that a larger one had not; then no larger one is tried again.
fn caption(engine: &mut dyn Engine, items: &[(Pixels, Ask)], most: &mut usize) -> Vec<Result<Caption, String>> {
    match caption::tell(engine, None, None, items) {
        Ok(told) => {
            let caption = |told: caption::Told| told.caption.ok_or_else(|| "no caption was written".to_owned());
            told.into_iter().map(|told| told.map_err(|error| error.to_string()).and_then(caption)).collect()
        }
        Err(error) if items.len() < 2 => items.iter().map(|_| Err(error.to_string())).collect(),
        Err(error) => {
            let half = items.len() / 2;
            // Images of several rows each say nothing of how many of one there is room for.
            if error.kind() == ErrorKind::OutOfMemory && items.iter().all(|(_, ask)| ask.rows() == 1) {
                *most = half.min(*most);
            }
            let (first, second) = items.split_at(half);
            let mut told = caption(engine, first, most);
            told.extend(caption(engine, second, most));
            told
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::{Limit, Pool};
    use crate::caption::fake::{FakeEngine, FakeOptions, fake_words};
    use crate::message::Comparison;
    use crate::offsets::{Ledger, Outcome, TopicPartition};

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

    struct Bench {
        ledger: Ledger,
        partition: TopicPartition,
        messages: Pool,
    }

    impl Bench {
        fn new() -> Self {
            let (ledger, partition) = (Ledger::new(), TopicPartition { topic: "t".into(), partition: 0 });
            ledger.assign(partition.clone());
            Self { ledger, partition, messages: Pool::new(Limit { items: 100, bytes: 100 }) }
        }

        /// Of an image of this colour, which is also its offset and its lane.
        fn trial(&self, colour: u8) -> (usize, Tracked<Trial>) {
            let message = Arc::new(Message::empty("t", 0, colour.into()));
            let pixels = Pixels::new(8, vec![colour; 8 * 8 * 3]).unwrap();
            let model = named(FakeEngine::default().model());
            let text = Some(fake_words(&pixels).join(" "));
            let trial = Trial {
                pixels,
                params: Params::default(),
                caption: Written { text, generated: Generated::default(), model, device_ms: 1.0, error: None },
                id: colour.to_string(),
                index: 0,
                image: ImageInfo::default(),
                origin: message.origin(),
                message,
            };
            let ticket = self.ledger.open(&self.partition, colour.into()).unwrap();
            (colour.into(), Tracked::new(trial, ticket, self.messages.try_acquire(1).unwrap()))
        }

        /// A canary for which so many images are gathered.
        fn canary(&self, options: FakeOptions, images: u8) -> Canary {
            let mut canary = Canary::new(Box::new(FakeEngine::new(options)), &settings::Model::default());
            for colour in 0..images {
                let (lane, trial) = self.trial(colour);
                canary.gather(lane, trial);
            }
            canary
        }
    }

    /// What came of each image: its lane, its id and the comparison.
    fn ends(ended: Vec<(usize, Finished)>) -> Vec<(usize, String, Comparison, Option<String>)> {
        let end = |(lane, finished): (usize, Finished)| {
            let Output::Canary { record, .. } = finished.resolve(Outcome::Published) else { panic!("no comparison") };
            (lane, record.id, record.result, record.canary.error)
        };
        ended.into_iter().map(end).collect()
    }

    fn results(ended: Vec<(usize, Finished)>) -> Vec<Comparison> {
        ends(ended).into_iter().map(|(.., result, _)| result).collect()
    }

    #[test]
    fn images_are_gathered_for_a_batch_but_for_no_longer_than_they_may_wait() {
        let bench = Bench::new();
        let mut canary = bench.canary(FakeOptions::default(), 3);
        assert!(canary.has_trials() && canary.is_due(3) && !canary.is_due(4));
        canary.since = Instant::now().checked_sub(GATHER).unwrap();
        assert!(canary.is_due(4), "they have waited");
        let new = Canary::new(Box::new(FakeEngine::default()), &settings::Model::default());
        let mut canary = new.in_the_place_of(canary);
        assert!(canary.is_due(4), "another model works on what was gathered");
        let ended = ends(canary.compare("w"));
        let expected = (0..3).map(|at| (at, at.to_string(), Comparison::Equal, None));
        assert_eq!(ended, expected.collect::<Vec<_>>());
        assert!(!canary.has_trials() && !canary.is_due(0));
        let (lane, trial) = bench.trial(9);
        canary.gather(lane, trial);
        assert!(!canary.is_due(4), "the next one waits anew");
        assert_eq!(results(canary.give_up("the device failed", "w")), [Comparison::Error]);
        assert_eq!((bench.ledger.open_tickets(), bench.messages.used()), (0, Limit::default()));
    }

    #[test]
    fn what_fails_as_a_whole_is_halved_and_too_large_a_batch_is_not_tried_again() {
        let bench = Bench::new();
        let mut canary = bench.canary(FakeOptions { memory_for: 2, ..FakeOptions::default() }, 8);
        assert_eq!(results(canary.compare("w")), [Comparison::Equal; 8]);
        assert_eq!(canary.most, 2);
        let bench = Bench::new();
        let poisoned = FakeOptions { poison: Some([5; 3]), ..FakeOptions::default() };
        let mut canary = bench.canary(poisoned, 8);
        let failed: Vec<_> = ends(canary.compare("w")).into_iter().filter(|end| end.3.is_some()).collect();
        assert_eq!(failed.len(), 1);
        assert!(failed[0].0 == 5 && failed[0].3.as_ref().unwrap().contains("poisoned"), "{failed:?}");
    }

    #[test]
    fn a_canary_that_panics_loses_nothing_and_is_out_of_use_until_another_comes() {
        let bench = Bench::new();
        let mut canary = bench.canary(FakeOptions { panicking: Some([1; 3]), ..FakeOptions::default() }, 3);
        let chosen = "0".repeat(64);
        assert!(canary.chooses(&chosen, 0.5));
        let ended = ends(canary.compare("w"));
        assert!(ended.len() == 3 && ended.iter().all(|end| end.3.as_ref().unwrap().contains("panic")), "{ended:?}");
        assert!(!canary.chooses(&chosen, 0.5));
        let new = Canary::new(Box::new(FakeEngine::default()), &settings::Model::default());
        let mut canary = new.in_the_place_of(canary);
        assert!(canary.chooses(&chosen, 0.5));
        let (lane, trial) = bench.trial(3);
        canary.gather(lane, trial);
        assert_eq!(results(canary.compare("w")), [Comparison::Equal]);
        assert_eq!((bench.ledger.open_tickets(), bench.ledger.take_lost()), (0, None));
    }
}
