//! What a row asks of the model, and the record that answers it: from a device, or from memory where the same picture was
//! captioned with the same parameters before.

mod known;
mod params;

use std::sync::Arc;
use std::time::Duration;

use self::known::{Asked, Entry, Known};
use super::Output;
use crate::caption::{Caption, Finish, Params};
use crate::message::{Candidate, CaptionRecord, ImageInfo, ModelRef, Request, Row, SCHEMA, Timing};
use crate::metrics::Metrics;
use crate::settings;

/// The device of captions that no device wrote.
const MEMORY: &str = "cache";

/// What all answers of a worker have in common.
#[derive(Debug)]
pub struct Answers {
    /// Defaults and limits of a request's parameters.
    model: settings::Model,
    /// Name of this worker in records.
    worker: String,
    /// Terms that set `flags` on a record, in lower case.
    flag_terms: Vec<String>,
    /// `None` where nothing is remembered.
    known: Option<Known>,
    metrics: Arc<Metrics>,
}

/// Who wrote a caption.
#[derive(Debug, Clone, Copy)]
pub struct Writer<'a> {
    /// The model.
    pub model: &'a ModelRef,
    /// The device.
    pub device: &'a str,
    /// Its time for this caption.
    pub cost: Duration,
}

impl Answers {
    /// The answers of one model.
    pub fn new(model: &settings::Model, worker: String, flag_terms: Vec<String>, metrics: Arc<Metrics>) -> Self {
        let room = model.caption_cache.as_u64();
        let known = (room > 0).then(|| Known::new(room));
        Self { model: model.clone(), worker, flag_terms, known, metrics }
    }

    /// Name of this worker in records.
    pub fn worker(&self) -> &str {
        &self.worker
    }

    /// The parameters of a request for the picture of this SHA-256, with the defaults of this fleet.
    ///
    /// # Errors
    /// They are over its limits or make no sense, in words for people.
    pub fn params(&self, request: &Request, sha256: &str) -> Result<Params, String> {
        params::params(&self.model, request, sha256)
    }

    /// The answer to a row that a device has captioned; it is remembered.
    pub fn written(&self, row: Row, image: ImageInfo, params: Params, caption: Caption, by: Writer<'_>) -> Output {
        if let Some(known) = &self.known {
            let asked = Asked { sha256: image.sha256.clone(), params };
            let caption = without_tokens(&caption);
            let ImageInfo { width, height, ref format, .. } = image;
            let entry =
                Entry { caption, model: by.model.clone(), width, height, format: format.clone(), cost: by.cost };
            known.insert(asked, entry);
            self.metrics.captions_remembered(known.bytes());
        }
        self.answer(row, image, caption, by, false)
    }

    /// The answer to a request for a picture of this SHA-256, if it was captioned before.
    pub fn known(self: &Arc<Self>, request: &Request, sha256: &str) -> Option<Recalled> {
        let known = self.known.as_ref()?;
        // What is wrong with them is told where they are used.
        let params = self.params(request, sha256).ok()?;
        let found = known.get(&Asked { sha256: sha256.to_owned(), params });
        self.metrics.caption_looked_up(found.as_ref().map(|entry| entry.cost));
        found.map(|entry| Recalled { answers: self.clone(), entry })
    }

    fn answer(&self, mut row: Row, image: ImageInfo, caption: Caption, by: Writer<'_>, cached: bool) -> Output {
        row.timing.total = Timing::ms(row.message.received.elapsed());
        let candidates = if caption.more.is_empty() {
            Vec::new()
        } else {
            [&caption].into_iter().chain(&caption.more).map(candidate).collect()
        };
        let record = CaptionRecord {
            schema: SCHEMA,
            id: row.request.id.unwrap_or_else(|| row.origin.to_string()),
            index: row.index,
            flags: flags(&caption.text, &self.flag_terms),
            text: caption.text,
            logprob: caption.logprob,
            tokens: caption.tokens,
            finish: finish(caption.finish),
            candidates,
            cached,
            model: by.model.clone(),
            image,
            timing_ms: row.timing,
            origin: row.origin,
            worker: self.worker.clone(),
            meta: row.request.meta,
        };
        Output::Caption { record: Box::new(record), message: row.message, device: by.device.to_owned() }
    }
}

/// A caption without the numbers of its tokens, which no record has.
fn without_tokens(caption: &Caption) -> Caption {
    let Caption { ref text, logprob, tokens, finish, ref more, .. } = *caption;
    let more = more.iter().map(without_tokens).collect();
    Caption { text: text.clone(), token_ids: Vec::new(), logprob, tokens, finish, more }
}

fn candidate(caption: &Caption) -> Candidate {
    let Caption { ref text, logprob, tokens, .. } = *caption;
    Candidate { text: text.clone(), logprob, tokens, finish: finish(caption.finish) }
}

fn finish(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
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
        let Entry { caption, model, width, height, format, .. } = &*self.entry;
        (image.width, image.height) = (*width, *height);
        image.format.clone_from(format);
        let by = Writer { model, device: MEMORY, cost: Duration::ZERO };
        self.answers.answer(row, image, caption.clone(), by, true)
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
