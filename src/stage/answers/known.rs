//! Captions of pictures that were captioned before, by what the picture is and what was asked: bounded in bytes, the ones
//! that are asked for again kept longest (S3-FIFO, Yang et al. 2023, in `quick_cache`).

use std::sync::Arc;
use std::time::Duration;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::Models;
use crate::caption::{Ask, Caption, Match, Told};

/// Bytes that an entry takes beside its texts, estimated: two structures, five allocations, its place in the table.
const ENTRY: u64 = 512;

/// What a caption is known by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Asked {
    /// SHA-256 of the encoded picture, hex.
    pub(super) sha256: String,
    pub(super) ask: Ask,
}

/// A caption and what is known of its picture.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) told: Arc<Told>,
    pub(super) models: Arc<Models>,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) format: String,
    /// Time of a device that it took.
    pub(super) cost: Duration,
}

#[derive(Debug, Clone)]
struct Bytes;

impl Weighter<Asked, Arc<Entry>> for Bytes {
    fn weight(&self, asked: &Asked, entry: &Arc<Entry>) -> u64 {
        let answers = entry.told.answers.iter().filter_map(|answer| answer.as_ref().ok());
        let captions = entry.told.caption.iter().chain(answers).flat_map(Caption::all);
        let captions = captions.map(|one| size_of::<Caption>() + one.text.len() + size_of_val(&one.token_ids[..]));
        let judgements = (entry.told.generated.len() + entry.told.found.len()) * size_of::<Match>();
        let points = entry.told.embeddings.iter().flat_map(|embeddings| {
            let texts = embeddings.texts.iter().filter_map(|text| text.as_ref().ok());
            texts.chain([&embeddings.image]).map(|point| size_of_val(&**point))
        });
        let prompt = asked.ask.caption.as_ref().and_then(|params| params.prompt.as_ref()).map_or(0, String::len);
        let texts = asked.ask.texts.iter().chain(&asked.ask.questions);
        let texts: usize = texts.map(|text| size_of::<String>() + text.len()).sum();
        ENTRY + (captions.sum::<usize>() + points.sum::<usize>() + judgements + prompt + texts) as u64
    }
}

/// The captions of one model.
#[derive(Debug)]
pub(super) struct Known(Cache<Asked, Arc<Entry>, Bytes>);

impl Known {
    /// Room for about so many bytes.
    pub(super) fn new(bytes: u64) -> Self {
        let entries = usize::try_from(bytes / ENTRY).unwrap_or(usize::MAX);
        Self(Cache::with_weighter(entries, bytes, Bytes))
    }

    pub(super) fn get(&self, asked: &Asked) -> Option<Arc<Entry>> {
        self.0.get(asked)
    }

    pub(super) fn insert(&self, asked: Asked, entry: Entry) {
        self.0.insert(asked, Arc::new(entry));
    }

    /// Bytes of what is remembered.
    pub(super) fn bytes(&self) -> u64 {
        self.0.weight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::{Finish, Params};
    use crate::message::ModelRef;

    fn asked(number: usize) -> Asked {
        Asked { sha256: format!("{number:064x}"), ask: Ask::caption(Params::default()) }
    }

    fn entry(text: &str) -> Entry {
        let (token_ids, more) = (Vec::new(), Vec::new());
        let caption = Caption { text: text.into(), token_ids, logprob: 0.0, tokens: 1, finish: Finish::Stop, more };
        let model = ModelRef { id: "m".into(), revision: None, dtype: "f32".into() };
        let models = Arc::new(Models { model, filter: None, answerer: None });
        let told = Arc::new(Told { caption: Some(caption), ..Told::default() });
        Entry { told, models, width: 1, height: 1, format: "png".into(), cost: Duration::ZERO }
    }

    #[test]
    fn what_is_remembered_never_takes_more_than_its_room() {
        let known = Known::new(1 << 16);
        for number in 0..10_000 {
            known.insert(asked(number), entry(&"word ".repeat(number % 50)));
            assert!(known.bytes() <= 1 << 16, "{}", known.bytes());
        }
        assert!(known.bytes() > 1 << 15);
        assert!((0..10_000).filter(|number| known.get(&asked(*number)).is_some()).count() > 50);
    }

    #[test]
    fn other_parameters_are_another_question() {
        let known = Known::new(1 << 16);
        known.insert(asked(1), entry("a"));
        let other = |ask: Ask| Asked { ask, ..asked(1) };
        let prompted = Params { prompt: Some("a photo of".into()), ..Params::default() };
        let longer = Params { max_new_tokens: 30, ..Params::default() };
        let judged = Ask { filter: true, ..asked(1).ask };
        let questioned = Ask { questions: vec!["what".into()], ..asked(1).ask };
        let briefly = Ask { answering: Params { max_new_tokens: 1, ..Params::default() }, ..questioned.clone() };
        known.insert(other(briefly), entry("b"));
        let embedded = Ask { embed: true, ..asked(1).ask };
        let others = [Ask::caption(prompted), Ask::caption(longer), judged, questioned, embedded].map(other);
        assert!(others.iter().chain(&[asked(2)]).all(|other| known.get(other).is_none()));
        let told = &known.get(&asked(1)).unwrap().told;
        assert_eq!(told.caption.as_ref().unwrap().text, "a");
    }
}
