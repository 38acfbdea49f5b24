//! The canary's record, `blipstream.canary.v1`.

use serde::{Serialize, Serializer};

use super::{Generated, ImageInfo, ModelRef, Origin};
use crate::disposition::names;

/// Name and version of the record's form. A version only ever gains fields.
pub const CANARY_SCHEMA: &str = "blipstream.canary.v1";

names! {
    /// How the canary's caption compares.
    Comparison {
        /// Its text is the same.
        Equal = "equal",
        /// Its text is another.
        Different = "different",
        /// It wrote none.
        Error = "error",
    }
}

impl Serialize for Comparison {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// What is published for an image that the canary captioned, too.
#[derive(Debug, Clone, Serialize)]
pub struct CanaryRecord {
    /// Always [`CANARY_SCHEMA`].
    pub schema: &'static str,
    /// That of the caption record.
    pub id: String,
    /// That of the caption record.
    pub index: usize,
    /// How the two compare.
    pub result: Comparison,
    /// Words that have to be changed, taken out or put in to make one of the other; `None` where the canary wrote nothing.
    pub word_distance: Option<usize>,
    /// What the captioner wrote.
    pub caption: Written,
    /// The canary's own.
    pub canary: Written,
    /// What they describe.
    pub image: ImageInfo,
    /// Identity of the image.
    pub origin: Origin,
    /// Name of the worker.
    pub worker: String,
    /// Whether its topic took no longer record: then `id` is the origin, and texts and address are left out. Present only if so.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub shortened: bool,
}

/// A caption, or why there is none, and who wrote it; the first one, where several were asked for.
#[derive(Debug, Clone, Serialize)]
pub struct Written {
    /// The caption; `None` where there is an error.
    pub text: Option<String>,
    /// What the model says of it.
    #[serde(flatten)]
    pub generated: Generated,
    /// The model.
    pub model: ModelRef,
    /// The image's part of the time that its batch took on the device, in milliseconds.
    pub device_ms: f64,
    /// Why there is no caption; of the canary alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl CanaryRecord {
    /// The two compared.
    pub fn compared(caption: &Written, canary: &Written) -> (Comparison, Option<usize>) {
        let (Some(caption), Some(canary)) = (&caption.text, &canary.text) else { return (Comparison::Error, None) };
        let result = if caption == canary { Comparison::Equal } else { Comparison::Different };
        (result, Some(word_distance(caption, canary)))
    }

    /// For a topic that takes no longer records: without what may be of any length.
    #[must_use]
    pub fn shortened(&self) -> Self {
        let mut short = self.clone();
        short.shortened = true;
        short.id = short.origin.to_string();
        short.caption.text = None;
        short.canary.text = None;
        short.image.url = None;
        short
    }
}

/// The edit distance of two texts in words.
fn word_distance(a: &str, b: &str) -> usize {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    strsim::generic_levenshtein(&words(a), &words(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_are_as_far_apart_as_there_are_words_to_change() {
        assert_eq!(word_distance("a red circle on white", "a red circle on white"), 0);
        assert_eq!(word_distance("a red circle on white", "a blue circle on white"), 1);
        assert_eq!(word_distance("a red circle", "two red circles on white"), 4);
        assert_eq!(word_distance("", "a cat"), 2);
    }
}
