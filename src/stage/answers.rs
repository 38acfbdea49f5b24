//! What a row asks of the models, and the record that answers it: from a device, or from memory where the same was asked of
//! the same picture before.

mod candidates;
mod known;
mod params;
mod replies;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use self::known::{Asked, Entry, Known};
pub use self::params::check_params;
use super::Output;
use crate::caption::{Ask, Caption, Finish, ModelInfo, Params, Told};
use crate::message::{
    Candidate, CaptionRecord, Generated, ImageInfo, Judged, ModelRef, Request, Row, SCHEMA, Tasks, Timing,
};
use crate::metrics::Metrics;
use crate::settings::{self, Settings};

/// The device of captions that no device wrote.
const MEMORY: &str = "cache";

/// What all answers of a worker have in common.
#[derive(Debug)]
pub struct Answers {
    /// Defaults and limits of a request's parameters.
    model: settings::Model,
    /// Those of its answers.
    answering: settings::Model,
    /// What the filter keeps.
    threshold: f64,
    /// The most texts of a request.
    texts_limit: usize,
    /// The most questions of a request.
    questions_limit: usize,
    /// What is loaded.
    beside: Beside,
    /// Name of this worker in records.
    worker: String,
    /// Terms that set `flags` on a record, in lower case.
    flag_terms: Vec<String>,
    /// `None` where nothing is remembered.
    known: Option<Known>,
    /// The models whose answers may be remembered, once they are others than at the start.
    models: RwLock<Option<Models>>,
    metrics: Arc<Metrics>,
}

/// Why a request cannot be asked of the models.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// Its parameters are over the fleet's limits or make no sense.
    #[error("{0}")]
    Params(String),
    /// The worker has no model for one of its tasks.
    #[error("the task `{task}` needs a model that {does}, and this fleet has none ({setting})")]
    NoModel {
        /// The task.
        task: &'static str,
        /// What the model would do.
        does: &'static str,
        /// The setting that names it.
        setting: &'static str,
    },
}

/// Which models stand beside the captioner.
#[derive(Debug, Clone, Copy)]
pub struct Beside {
    /// One that judges texts.
    pub filter: bool,
    /// One that answers questions.
    pub answerer: bool,
}

/// The models of a device, as records name them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Models {
    /// The captioner.
    pub model: ModelRef,
    /// The judge of texts beside it.
    pub filter: Option<ModelRef>,
    /// The model that answers questions.
    pub answerer: Option<ModelRef>,
}

impl Models {
    /// Of what is known of them.
    pub fn of(model: &ModelInfo, filter: Option<&ModelInfo>, answerer: Option<&ModelInfo>) -> Self {
        Self { model: named(model), filter: filter.map(named), answerer: answerer.map(named) }
    }
}

/// A model as records name it.
pub(super) fn named(info: &ModelInfo) -> ModelRef {
    ModelRef { id: info.id.clone(), revision: info.revision.clone(), dtype: info.dtype.clone() }
}

/// Who wrote a caption.
#[derive(Debug, Clone, Copy)]
pub struct Writer<'a> {
    /// The models.
    pub models: &'a Arc<Models>,
    /// The device.
    pub device: &'a str,
    /// Its time for this caption.
    pub cost: Duration,
}

impl Answers {
    /// The answers of a worker that has these models.
    pub fn new(
        settings: &Settings,
        beside: Beside,
        worker: String,
        flag_terms: Vec<String>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let room = settings.model.caption_cache.as_u64();
        let known = (room > 0).then(|| Known::new(room));
        let settings::Filter { threshold, texts_limit, .. } = settings.filter;
        let (model, answering) = (settings.model.clone(), settings.answerer.generation(&settings.model));
        Self {
            model,
            answering,
            threshold,
            texts_limit,
            questions_limit: settings.answerer.questions_limit,
            beside,
            worker,
            flag_terms,
            known,
            models: RwLock::default(),
            metrics,
        }
    }

    /// From now on, what other models have answered counts as forgotten. A device may still be at work with the old ones.
    pub fn come_from(&self, models: Models) {
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
        let Tasks { caption, filter, answer, embed } = request.tasks;
        let Beside { filter: judge, answerer } = self.beside;
        for (lacks, task, does, setting) in [
            (filter && !judge, "filter", "judges texts", "filter.source"),
            (embed && !judge, "embed", "embeds images and texts", "filter.source"),
            (answer && !answerer, "answer", "answers questions", "answerer.source"),
        ] {
            if lacks {
                return Err(AskError::NoModel { task, does, setting });
            }
        }
        for (name, them, count, limit, setting) in [
            ("text", "texts", request.texts.len(), self.texts_limit, "filter.texts_limit"),
            ("questions", "questions", request.questions.len(), self.questions_limit, "answerer.questions_limit"),
        ] {
            if count > limit {
                let text = format!("{name}: {count} {them}; this fleet allows {limit} ({setting})");
                return Err(AskError::Params(text));
            }
        }
        let params = || params::of_captions(&self.model, request, sha256);
        let answering = || params::of_answers(&self.answering, request, sha256);
        Ok(Ask {
            caption: caption.then(params).transpose().map_err(AskError::Params)?,
            texts: request.texts.clone(),
            filter,
            embed,
            questions: request.questions.clone(),
            answering: answer.then(answering).transpose().map_err(AskError::Params)?.unwrap_or_else(Params::default),
        })
    }

    /// The answer to a row that a device has worked on; it is remembered.
    pub fn written(&self, row: Row, image: ImageInfo, ask: Ask, told: Told, by: Writer<'_>) -> Output {
        let told = Arc::new(told);
        if let Some(known) = &self.known {
            let asked = Asked { sha256: image.sha256.clone(), ask };
            let ImageInfo { width, height, ref format, .. } = image;
            let (told, models) = (told.clone(), by.models.clone());
            let entry = Entry { told, models, width, height, format: format.clone(), cost: by.cost };
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
        let of_these = |entry: &Arc<Entry>| models.as_ref().is_none_or(|models| *models == *entry.models);
        let found = known.get(&Asked { sha256: sha256.to_owned(), ask }).filter(of_these);
        self.metrics.caption_looked_up(found.as_ref().map(|entry| entry.cost));
        found.map(|entry| Recalled { answers: self.clone(), entry })
    }

    fn answer(&self, mut row: Row, image: ImageInfo, told: &Told, by: Writer<'_>, cached: bool) -> Output {
        row.timing.total = Timing::ms(row.message.received.elapsed());
        let models = by.models;
        let judged = row.request.tasks.filter;
        let mut candidates = candidates::of(told, &row.request.texts, judged.then_some(self.threshold));
        for Candidate { source, judged, .. } in &candidates {
            if let Some(Judged { itm, kept, .. }) = judged {
                self.metrics.judged(*source, *itm, *kept);
            }
        }
        let answers = replies::of(told, &row.request.questions);
        for answer in &answers {
            self.metrics.answered(answer.error.is_none());
        }
        let best = candidates::best(&candidates).map(|best| (best.text.clone(), best.generated));
        let (text, generated) = best.or_else(|| replies::first(&answers)).unwrap_or_default();
        let rejected = judged && !candidates.iter().any(|one| one.judged.as_ref().is_some_and(|judged| judged.kept));
        if candidates.len() == 1 && !judged {
            candidates.clear();
        }
        let record = CaptionRecord {
            schema: SCHEMA,
            id: row.id(),
            index: row.index,
            flags: flags(
                std::iter::once(&*text).chain(answers.iter().filter_map(|answer| answer.text.as_deref())),
                &self.flag_terms,
            ),
            text,
            generated,
            candidates,
            cached,
            model: models.model.clone(),
            filter: models.filter.clone().filter(|_| judged || told.embeddings.is_some()),
            answerer: models.answerer.clone().filter(|_| !answers.is_empty()),
            answers,
            embeddings: told.embeddings.as_ref().map(replies::embeddings),
            image,
            timing_ms: row.timing,
            origin: row.origin,
            worker: self.worker.clone(),
            meta: row.request.meta,
        };
        Output::Caption { record: Box::new(record), message: row.message, device: by.device.to_owned(), rejected }
    }
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
        let Entry { told, models, width, height, format, .. } = &*self.entry;
        (image.width, image.height) = (*width, *height);
        image.format.clone_from(format);
        let by = Writer { models, device: MEMORY, cost: Duration::ZERO };
        self.answers.answer(row, image, told, by, true)
    }
}

/// What a model says of a text that it wrote.
pub(super) fn generated(caption: &Caption) -> Generated {
    let finish = match caption.finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    };
    Generated { logprob: Some(caption.logprob), tokens: Some(caption.tokens), finish: Some(finish) }
}

/// The configured terms that stand in one of the texts as whole words.
fn flags<'a>(texts: impl Iterator<Item = &'a str>, terms: &[String]) -> Vec<String> {
    if terms.is_empty() {
        return Vec::new();
    }
    let words = |text: &str| {
        let words = text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty());
        words.map(str::to_lowercase).collect::<Vec<_>>()
    };
    let texts: Vec<Vec<String>> = texts.map(words).collect();
    let found = |term: &&String| {
        let term = words(term);
        !term.is_empty() && texts.iter().any(|text| text.windows(term.len()).any(|window| window == term))
    };
    terms.iter().filter(found).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_flags_whole_words_only_whatever_the_case() {
        let terms = ["cat".to_owned(), "hot dog".to_owned(), "…".to_owned()];
        let of = |texts: &[&'static str]| flags(texts.iter().copied(), &terms);
        assert_eq!(of(&["a Cat and a hot dog"]), ["cat", "hot dog"]);
        assert_eq!(of(&["a hot", "dog", "cat"]), ["cat"], "in one of several texts");
        assert!(of(&["a category of hot pavements and a dog"]).is_empty());
    }
}
