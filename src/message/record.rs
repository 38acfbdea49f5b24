//! The caption record, `blipstream.caption.v1`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use url::Url;

use super::Origin;
use crate::disposition::names;

/// Name and version of the record's form. A version only ever gains fields.
pub const SCHEMA: &str = "blipstream.caption.v1";

/// What is published for a captioned image.
#[derive(Debug, Clone, Serialize)]
pub struct CaptionRecord {
    /// Always [`SCHEMA`].
    pub schema: &'static str,
    /// The request's id, or one derived from the origin.
    pub id: String,
    /// Row inside the message.
    pub index: usize,
    /// The caption.
    pub text: String,
    /// What the model says of it, where it was generated.
    #[serde(flatten)]
    pub generated: Generated,
    /// All captions of the image and the texts that were found with it, where there is more than one or they were judged.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Candidate>,
    /// The answers to the request's questions, in their order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<Answer>,
    /// Where the image and the texts are in the filter's space, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<Embeddings>,
    /// Terms of the configured list that the caption and the answers contain.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<String>,
    /// Whether it was written for an equal picture before, asked for in the same way; present only if so.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub cached: bool,
    /// Who wrote it.
    pub model: ModelRef,
    /// Who judged the candidates and embedded, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<ModelRef>,
    /// Who answered the questions, where there were any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answerer: Option<ModelRef>,
    /// What it describes.
    pub image: ImageInfo,
    /// Where the time went, in milliseconds.
    pub timing_ms: Timing,
    /// Identity of the image.
    pub origin: Origin,
    /// Name of the worker.
    pub worker: String,
    /// Passed through from the request.
    pub meta: Map<String, Value>,
}

/// What a model says of a text that it wrote; all of it is `None` of a text that was found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Generated {
    /// Sum of the log-probabilities of the generated tokens, natural logarithm.
    pub logprob: Option<f32>,
    /// Generated tokens.
    pub tokens: Option<usize>,
    /// `stop` (the model ended the caption) or `length`.
    pub finish: Option<&'static str>,
}

names! {
    /// Where a text comes from.
    TextSource {
        /// The captioner wrote it.
        Generated = "generated",
        /// It came with the request.
        Found = "found",
    }
}

impl Serialize for TextSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// One of several texts of an image.
#[derive(Debug, Clone, Serialize)]
pub struct Candidate {
    /// The text.
    pub text: String,
    /// Where it comes from.
    pub source: TextSource,
    /// What the model says of it, where it was generated.
    #[serde(flatten)]
    pub generated: Generated,
    /// The filter's judgement, where it was asked for.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub judged: Option<Judged>,
}

/// The answer to a question about an image.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Answer {
    /// The question.
    pub question: String,
    /// The answer; `None` to a question that cannot be answered.
    pub text: Option<String>,
    /// What the model says of it.
    #[serde(flatten)]
    pub generated: Generated,
    /// Why it cannot be answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Points of length 1 in one space, so that the sum of the products of two is their cosine.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Embeddings {
    /// Of the image.
    pub image: Vec<f32>,
    /// Of the texts that were found, in their order; `None` of a text that cannot be embedded.
    pub text: Vec<Option<Vec<f32>>>,
    /// Why it cannot, by its place (`text[1]`).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub errors: BTreeMap<String, String>,
}

/// How well a text describes its image.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Judged {
    /// The probability that they match; `None` of a text that cannot be judged.
    pub itm: Option<f32>,
    /// The cosine of the angle between their embeddings.
    pub itc: Option<f32>,
    /// Whether the probability is high enough.
    pub kept: bool,
    /// Why it cannot be judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The model a caption comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelRef {
    /// Hub id, or the name of the folder.
    pub id: String,
    /// Commit of the hub, if known.
    pub revision: Option<String>,
    /// `f32`, `bf16` or `f16`.
    pub dtype: String,
}

/// What is known of the picture.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ImageInfo {
    /// Its address without user-info and query (unless `output.full_url`); `None` for inline data.
    pub url: Option<String>,
    /// SHA-256 of the encoded bytes, hex.
    pub sha256: String,
    /// Width in pixels, as encoded.
    pub width: u32,
    /// Height in pixels, as encoded.
    pub height: u32,
    /// Encoded length.
    pub bytes: usize,
    /// `jpeg`, `png`, `webp`, `gif`, `bmp` or `tiff`.
    pub format: String,
}

/// Where the time went, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Timing {
    /// Fetching, all tries and waits between them.
    pub fetch: f64,
    /// Decoding and resizing.
    pub decode: f64,
    /// Waiting for a device.
    pub queue: f64,
    /// On the device, with its batch.
    pub caption: f64,
    /// From the receipt of the message to the finished caption.
    pub total: f64,
}

impl Timing {
    /// Milliseconds with one decimal: enough for people, short on the wire.
    pub fn ms(duration: Duration) -> f64 {
        (duration.as_secs_f64() * 10_000.0).round() / 10.0
    }
}

/// An address fit for records, logs and dead letters: without user-info and query string, since both carry secrets.
pub fn redact_url(url: &Url) -> String {
    let mut url = url.clone();
    // These fail only for addresses that cannot have user-info in the first place.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.into()
}
