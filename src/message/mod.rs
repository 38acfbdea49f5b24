//! The wire contracts: what comes in, what goes out. `docs/messages.md` describes them for users.

mod canary;
mod dead_letter;
#[cfg(test)]
mod documentation;
mod record;
mod redact;
mod request;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use serde::Serialize;

pub use canary::{CANARY_SCHEMA, CanaryRecord, Comparison, Written};
pub use dead_letter::{
    ATTEMPTS_HEADER, DROPPED_HEADERS_HEADER, DROPPED_KEY_HEADER, DeadLetter, ERROR_CODE_HEADER, ERROR_MESSAGE_HEADER,
    FIRST_FAILED_AT_HEADER, HEADER_OVERHEAD, NOT_BEFORE_HEADER, RECORD_OVERHEAD, STAGE_HEADER, WORKER_HEADER,
    error_text, is_pointer, replay_headers,
};
pub use record::{
    Answer, Candidate, CaptionRecord, Embeddings, Generated, ImageInfo, Judged, ModelRef, SCHEMA, TextSource, Timing,
    redact_url,
};
pub use redact::{redact_text, without_controls};
pub use request::{
    ImageRef, MAX_PROMPT_BYTES, MAX_TEXTS, ObjectRef, ObjectRoot, ParseError, ParsedRow, Request, RequestParams,
    StoreKind, Tasks, parse, parse_object, read_json,
};

/// Header that carries a row's identity through retry, dead letter and replay.
pub const ORIGIN_HEADER: &str = "blipstream-origin";

/// Headers in their order; Kafka allows repeated names and null values.
pub type Headers = Vec<(String, Option<Bytes>)>;

/// A message as it was consumed, owned.
#[derive(Debug, Clone)]
pub struct Message {
    /// Topic it was read from.
    pub topic: Arc<str>,
    /// Partition of that topic.
    pub partition: i32,
    /// Offset in that partition.
    pub offset: i64,
    /// When it was produced, in milliseconds since the epoch, if the broker knows.
    pub timestamp_ms: Option<i64>,
    /// Its key.
    pub key: Option<Bytes>,
    /// Its value; `None` is a tombstone.
    pub payload: Option<Bytes>,
    /// Its headers.
    pub headers: Headers,
    /// When this worker received it.
    pub received: Instant,
}

impl Message {
    /// A message of this place that was received now, with no key, value, headers or timestamp.
    pub fn empty(topic: impl Into<Arc<str>>, partition: i32, offset: i64) -> Self {
        Self {
            topic: topic.into(),
            partition,
            offset,
            timestamp_ms: None,
            key: None,
            payload: None,
            headers: Headers::new(),
            received: Instant::now(),
        }
    }

    /// First value of a header, as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(key, _)| key == name)?;
        std::str::from_utf8(value.as_ref()?).ok()
    }

    /// The identity of the whole message: that of its first consumption, where a header carries one.
    pub fn origin(&self) -> Origin {
        self.header(ORIGIN_HEADER).and_then(|text| text.parse().ok()).unwrap_or_else(|| self.here())
    }

    /// The identity of the message (`None`), or of one row of the several that it has.
    ///
    /// A header that names one row of another message, on a message of several rows, is not believed: two images must
    /// not share an identity.
    pub fn origin_of(&self, index: Option<usize>) -> Origin {
        let origin = self.origin();
        match index {
            None => origin,
            Some(_) if origin.index.is_some() => Origin { index, ..self.here() },
            Some(_) => Origin { index, ..origin },
        }
    }

    /// Before when a record of a retry topic is not to be worked on.
    pub fn not_before(&self) -> Option<jiff::Timestamp> {
        self.header(NOT_BEFORE_HEADER)?.parse().ok()
    }

    /// Where this very message stands.
    fn here(&self) -> Origin {
        Origin { topic: self.topic.clone(), partition: self.partition, offset: self.offset, index: None }
    }

    /// Bytes that count against the message pool: key, value and headers.
    pub fn size(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(k, v)| k.len() + v.as_ref().map_or(0, Bytes::len)).sum();
        self.key.as_ref().map_or(0, Bytes::len) + self.payload.as_ref().map_or(0, Bytes::len) + headers
    }
}

/// Identity of an image: where its request was first consumed, and the row inside that message.
///
/// Written `topic/partition/offset` or, for one row of several, `topic/partition/offset/index`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Origin {
    /// Topic of the first consumption.
    #[serde(serialize_with = "as_str")]
    pub topic: Arc<str>,
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Row inside the message; `None` for the message as a whole.
    #[serde(skip)]
    pub index: Option<usize>,
}

fn as_str<S: serde::Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.topic, self.partition, self.offset)?;
        self.index.map_or(Ok(()), |index| write!(f, "/{index}"))
    }
}

/// The text is not an origin.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not an origin (topic/partition/offset, with /index for one row of several)")]
pub struct NotAnOrigin;

impl FromStr for Origin {
    type Err = NotAnOrigin;

    fn from_str(text: &str) -> Result<Self, NotAnOrigin> {
        // Topic names have no slash, so the text splits from the left.
        let mut parts = text.split('/');
        let topic = parts.next().filter(|t| !t.is_empty()).ok_or(NotAnOrigin)?;
        let partition: i32 = parts.next().and_then(|p| p.parse().ok()).filter(|p| *p >= 0).ok_or(NotAnOrigin)?;
        let offset: i64 = parts.next().and_then(|o| o.parse().ok()).filter(|o| *o >= 0).ok_or(NotAnOrigin)?;
        let index = parts.next().map(str::parse).transpose().map_err(|_| NotAnOrigin)?;
        if parts.next().is_some() {
            return Err(NotAnOrigin);
        }
        Ok(Self { topic: topic.into(), partition, offset, index })
    }
}

/// One image of one message, on its way to a caption.
#[derive(Debug, Clone)]
pub struct Row {
    /// The message it came in.
    pub message: Arc<Message>,
    /// What is asked.
    pub request: Request,
    /// Who it is.
    pub origin: Origin,
    /// Position inside the message, from 0.
    pub index: usize,
    /// Whether the message has only this row: then its dead letter keeps the value as it came.
    pub only: bool,
    /// Time spent so far.
    pub timing: Timing,
}

impl Row {
    /// The request's id, or one made from the origin.
    pub fn id(&self) -> String {
        self.request.id.clone().unwrap_or_else(|| self.origin.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_origin_survives_being_written_and_read(
            topic in "[a-zA-Z0-9._-]{1,60}", partition in 0i32.., offset in 0i64.., index in proptest::option::of(0usize..10_000)
        ) {
            let origin = Origin { topic: topic.as_str().into(), partition, offset, index };
            prop_assert_eq!(origin.to_string().parse::<Origin>(), Ok(origin));
        }

        #[test]
        fn junk_is_no_origin_and_no_panic(text in ".{0,80}") {
            if let Ok(origin) = text.parse::<Origin>() {
                prop_assert!(origin.partition >= 0 && origin.offset >= 0);
            }
        }
    }
}
