//! What a row asks of the models, and the record that answers it: from a device, or from memory where the same was asked of
//! the same picture before.

mod candidates;
mod known;
mod params;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use self::known::{Asked, Entry, Known};
pub use self::params::check_params;
use super::Output;
use crate::caption::{Ask, ModelInfo, Told};
use crate::message::{Candidate, CaptionRecord, ImageInfo, Judged, ModelRef, Request, Row, SCHEMA, Tasks, Timing};
use crate::metrics::Metrics;
use crate::settings::{self, Settings};

/// The device of captions that no device wrote.
const MEMORY: &str = "cache";

/// What all answers of a worker have in common.
#[derive(Debug)]
pub struct Answers {
    /// Defaults and limits of a request's parameters.
    model: settings::Model,
    /// What the filter keeps.
    threshold: f64,
    /// The most texts of a request.
    texts_limit: usize,
    /// Whether a filter is loaded.
    has_filter: bool,
    /// Name of this worker in records.
    worker: String,
    /// Terms that set `flags` on a record, in lower case.
    flag_terms: Vec<String>,
    /// `None` where nothing is remembered.
    known: Option<Known>,
    /// The models whose answers may be remembered, once they are others than at the start.
    models: RwLock<Option<(ModelRef, Option<ModelRef>)>>,
    metrics: Arc<Metrics>,
}

/// Why a request cannot be asked of the models.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// Its parameters are over the fleet's limits or make no sense.
    #[error("{0}")]
    Params(String),
    /// The worker has no model for one of its tasks.
    #[error("the task `filter` needs a model that judges texts, and this fleet has none (filter.source)")]
    NoFilter,
}

/// Who wrote a caption.
#[derive(Debug, Clone, Copy)]
pub struct Writer<'a> {
    /// The model.
    pub model: &'a ModelRef,
    /// The filter beside it.
    pub filter: Option<&'a ModelRef>,
    /// The device.
    pub device: &'a str,
    /// Its time for this caption.
    pub cost: Duration,
}

impl Answers {
    /// The answers of a worker that has a filter or none.
    pub fn new(
        settings: &Settings,
        has_filter: bool,
        worker: String,
        flag_terms: Vec<String>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let room = settings.model.caption_cache.as_u64();
        let known = (room > 0).then(|| Known::new(room));
        let settings::Filter { threshold, texts_limit, .. } = settings.filter;
        Self {
            model: settings.model.clone(),
            threshold,
            texts_limit,
            has_filter,
            worker,
            flag_terms,
            known,
            models: RwLock::default(),
            metrics,
        }
    }

    /// From now on, what other models have answered counts as forgotten. A device may still be at work with the old ones.
    pub fn come_from(&self, model: &ModelInfo, filter: Option<&ModelInfo>) {
        let models = (model_ref(model), filter.map(model_ref));
        *self.models.write().unwrap_or_else(PoisonError::into_inner) = Some(models);
    }

    /// Name of this worker in records.
    pub fn worker(&self) -> &str {
        &self.worker
    }

    /// What a request asks of the models for the picture of this SHA-256, with the defaults of this fleet.
    ///
    /// # Errors
    /// Its parameters are over the fleet's limits or make no sense, or a model is missing.
    pub fn ask(&self, request: &Request, sha256: &str) -> Result<Ask, AskError> {
        let Tasks { caption, filter } = request.tasks;
        if filter && !self.has_filter {
            return Err(AskError::NoFilter);
        }
        let (texts, limit) = (request.texts.len(), self.texts_limit);
        if texts > limit {
            let text = format!("text: {texts} texts; this fleet allows {limit} (filter.texts_limit)");
            return Err(AskError::Params(text));
        }
        let params = || params::params(&self.model, request, sha256).map_err(AskError::Params);
        Ok(Ask { caption: caption.then(params).transpose()?, texts: request.texts.clone(), filter })
    }

    /// The answer to a row that a device has worked on; it is remembered.
    pub fn written(&self, row: Row, image: ImageInfo, ask: Ask, told: Told, by: Writer<'_>) -> Output {
        let told = Arc::new(told);
        if let Some(known) = &self.known {
            let asked = Asked { sha256: image.sha256.clone(), ask };
            let ImageInfo { width, height, ref format, .. } = image;
            let told = told.clone();
            let (model, filter) = (by.model.clone(), by.filter.cloned());
            let entry = Entry { told, model, filter, width, height, format: format.clone(), cost: by.cost };
            known.insert(asked, entry);
            self.metrics.captions_remembered(known.bytes());
        }
        self.answer(row, image, &told, by, false)
    }

    /// The answer to a request for a picture of this SHA-256, if it was worked on before.
    pub fn known(self: &Arc<Self>, request: &Request, sha256: &str) -> Option<Recalled> {
        let known = self.known.as_ref()?;
        // What is wrong with them is told where they are used.
        let ask = self.ask(request, sha256).ok()?;
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let of_these = |entry: &Arc<Entry>| {
            models.as_ref().is_none_or(|(model, filter)| entry.model == *model && entry.filter == *filter)
        };
        let found = known.get(&Asked { sha256: sha256.to_owned(), ask }).filter(of_these);
        self.metrics.caption_looked_up(found.as_ref().map(|entry| entry.cost));
        found.map(|entry| Recalled { answers: self.clone(), entry })
    }

    fn answer(&self, mut row: Row, image: ImageInfo, told: &Told, by: Writer<'_>, cached: bool) -> Output {
        row.timing.total = Timing::ms(row.message.received.elapsed());
        let judged = row.request.tasks.filter;
        let mut candidates = candidates::of(told, &row.request.texts, judged.then_some(self.threshold));
        for Candidate { source, judged, .. } in &candidates {
            if let Some(Judged { itm, kept, .. }) = judged {
                self.metrics.judged(*source, *itm, *kept);
            }
        }
        let best = candidates::best(&candidates);
        let (text, generated) = best.map(|best| (best.text.clone(), best.generated)).unwrap_or_default();
        let rejected = judged && !candidates.iter().any(|one| one.judged.as_ref().is_some_and(|judged| judged.kept));
        if candidates.len() == 1 && !judged {
            candidates.clear();
        }
        let record = CaptionRecord {
            schema: SCHEMA,
            id: row.request.id.unwrap_or_else(|| row.origin.to_string()),
            index: row.index,
            flags: flags(&text, &self.flag_terms),
            text,
            generated,
            candidates,
            cached,
            model: by.model.clone(),
            filter: by.filter.cloned().filter(|_| judged),
            image,
            timing_ms: row.timing,
            origin: row.origin,
            worker: self.worker.clone(),
            meta: row.request.meta,
        };
        Output::Caption { record: Box::new(record), message: row.message, device: by.device.to_owned(), rejected }
    }
}

/// What records say of a model.
pub(super) fn model_ref(info: &ModelInfo) -> ModelRef {
    ModelRef { id: info.id.clone(), revision: info.revision.clone(), dtype: info.dtype.clone() }
}

/// A caption from memory.
#[derive(Debug)]
pub struct Recalled {
    answers: Arc<Answers>,
    entry: Arc<Entry>,
}

impl Recalled {
    /// The answer to a row whose caption it is; `image` gets what only a decoder would know.
    pub fn answer(self, row: Row, mut image: ImageInfo) -> Output {
        let Entry { told, model, filter, width, height, format, .. } = &*self.entry;
        (image.width, image.height) = (*width, *height);
        image.format.clone_from(format);
        let by = Writer { model, filter: filter.as_ref(), device: MEMORY, cost: Duration::ZERO };
        self.answers.answer(row, image, told, by, true)
    }
}

/// The configured terms that stand in a caption as whole words.
fn flags(text: &str, terms: &[String]) -> Vec<String> {
    if terms.is_empty() {
        return Vec::new();
    }
    let words = |text: &str| {
        let words = text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty());
        words.map(str::to_lowercase).collect::<Vec<_>>()
    };
    let text = words(text);
    let found = |term: &&String| {
        let term = words(term);
        !term.is_empty() && text.windows(term.len()).any(|window| window == term)
    };
    terms.iter().filter(found).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_flags_whole_words_only_whatever_the_case() {
        let terms = ["cat".to_owned(), "hot dog".to_owned(), "…".to_owned()];
        assert_eq!(flags("a Cat and a hot dog", &terms), ["cat", "hot dog"]);
        assert!(flags("a category of hot pavements and a dog", &terms).is_empty());
    }
}
