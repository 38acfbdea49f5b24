//! Captions of pictures that were captioned before, by what the picture is and what was asked: bounded in bytes, the ones
//! that are asked for again kept longest (S3-FIFO, Yang et al. 2023, in `quick_cache`).

use std::sync::Arc;
use std::time::Duration;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::caption::{Caption, Params};
use crate::message::ModelRef;

/// Bytes that an entry takes beside its texts, estimated: two structures, five allocations, its place in the table.
const ENTRY: u64 = 512;

/// What a caption is known by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Asked {
    /// SHA-256 of the encoded picture, hex.
    pub(super) sha256: String,
    pub(super) params: Params,
}

/// A caption and what is known of its picture.
#[derive(Debug)]
pub(super) struct Entry {
    /// Without its tokens' numbers.
    pub(super) caption: Caption,
    pub(super) model: ModelRef,
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
        let Caption { text, more, .. } = &entry.caption;
        let more = more.iter().map(|caption| size_of::<Caption>() + caption.text.len());
        ENTRY + (asked.params.prompt.as_ref().map_or(0, String::len) + text.len() + more.sum::<usize>()) as u64
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
    use crate::caption::Finish;

    fn asked(number: usize) -> Asked {
        Asked { sha256: format!("{number:064x}"), params: Params::default() }
    }

    fn entry(text: &str) -> Entry {
        let (token_ids, more) = (Vec::new(), Vec::new());
        let caption = Caption { text: text.into(), token_ids, logprob: 0.0, tokens: 1, finish: Finish::Stop, more };
        let model = ModelRef { id: "m".into(), revision: None, dtype: "f32".into() };
        Entry { caption, model, width: 1, height: 1, format: "png".into(), cost: Duration::ZERO }
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
        let prompted = Asked { params: Params { prompt: Some("a photo of".into()), ..Params::default() }, ..asked(1) };
        let longer = Asked { params: Params { max_new_tokens: 30, ..Params::default() }, ..asked(1) };
        assert!(known.get(&prompted).is_none() && known.get(&longer).is_none() && known.get(&asked(2)).is_none());
        assert_eq!(known.get(&asked(1)).unwrap().caption.text, "a");
    }
}
