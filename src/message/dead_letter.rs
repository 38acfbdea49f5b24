//! Dead letters: the message as it came, and headers that say what happened to it.

use std::fmt::Write as _;

use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::redact::without_controls;
use super::{Headers, Message, ORIGIN_HEADER, Origin, redact_text};
use crate::disposition::{Failure, MAX_MESSAGE_BYTES};

/// Why, from the closed list.
pub const ERROR_CODE_HEADER: &str = "blipstream-error-code";
/// Why, in words: at most [`MAX_MESSAGE_BYTES`], no credentials, no control characters.
pub const ERROR_MESSAGE_HEADER: &str = "blipstream-error-message";
/// The stage that failed.
pub const STAGE_HEADER: &str = "blipstream-stage";
/// Tries made, those of earlier lives included.
pub const ATTEMPTS_HEADER: &str = "blipstream-attempts";
/// When it failed first, in its first life; RFC 3339.
pub const FIRST_FAILED_AT_HEADER: &str = "blipstream-first-failed-at";
/// The worker that gave up on it.
pub const WORKER_HEADER: &str = "blipstream-worker";
/// A record of a retry topic is not to be worked on before this time; RFC 3339.
pub const NOT_BEFORE_HEADER: &str = "blipstream-not-before";
/// How many headers were left out of an over-long record.
pub const DROPPED_HEADERS_HEADER: &str = "blipstream-dropped-headers";
/// Length of the key that was left out of an over-long record.
pub const DROPPED_KEY_HEADER: &str = "blipstream-dropped-key";

/// Headers that a dead letter or a record of a retry topic sets, and takes away from the message as it came.
pub(super) const OURS: [&str; 10] = [
    ORIGIN_HEADER,
    ERROR_CODE_HEADER,
    ERROR_MESSAGE_HEADER,
    STAGE_HEADER,
    ATTEMPTS_HEADER,
    FIRST_FAILED_AT_HEADER,
    WORKER_HEADER,
    DROPPED_HEADERS_HEADER,
    DROPPED_KEY_HEADER,
    NOT_BEFORE_HEADER,
];

/// Headers of ours that a replay keeps: who the image is, and what its earlier lives were.
const KEPT_BY_REPLAY: [&str; 3] = [ORIGIN_HEADER, ATTEMPTS_HEADER, FIRST_FAILED_AT_HEADER];

/// What a pointer begins with.
const POINTER: &[u8] = br#"{"blipstream_pointer":"#;

/// Bytes that a record takes on the wire beside its key, value and headers: the head of a batch of one (61), and
/// lengths, time and offset of the record (at most 41), rounded up. Source: the Kafka protocol, record batch v2.
pub const RECORD_OVERHEAD: usize = 128;

/// Bytes that a header takes beside its name and value: two variable-length numbers.
pub const HEADER_OVERHEAD: usize = 10;

/// A record of the dead-letter topic.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// Key as it came.
    pub key: Option<Bytes>,
    /// Value as it came; for one row of several, that row in the native form; for an over-long one, a pointer.
    pub value: Option<Bytes>,
    /// Headers as they came, then `blipstream-*`.
    pub headers: Headers,
}

impl DeadLetter {
    /// The dead letter of a whole message (`row_value` is `None`) or of one row of several (its native form).
    ///
    /// Headers of ours that the message already had are replaced. A message that was dead-lettered before keeps the
    /// time of its first failure, and its attempts are added up over its lives.
    ///
    /// A record that would be longer than `max_bytes` keeps key and headers, and its value becomes a pointer:
    /// `{"blipstream_pointer":{"length":…,"sha256":"…"},"origin":{…},"index":…}`, with the length and SHA-256 of the
    /// value it stands for, and the row of several as `index`. Where key and headers alone are over-long, the headers
    /// that came are left out, the last ones first, and [`DROPPED_HEADERS_HEADER`] says how many; at the very last the
    /// key, and [`DROPPED_KEY_HEADER`] says how long it was. Our own headers take less than 2 KiB beside the worker's
    /// name, so a `max_bytes` of 4 KiB or more is kept.
    pub fn new(
        message: &Message,
        origin: &Origin,
        row_value: Option<Bytes>,
        failure: &Failure,
        worker: &str,
        max_bytes: usize,
    ) -> Self {
        let kept = message.headers.iter().filter(|(name, _)| !OURS.contains(&name.as_str())).cloned().collect();
        let value = row_value.or_else(|| message.payload.clone());
        let letter = Self { key: message.key.clone(), value, headers: kept };
        letter.within(max_bytes, origin, our_headers(message, origin, failure, worker))
    }

    /// The record of a retry topic: the same as a dead letter, never shortened, and not to be worked on before
    /// `not_before`. `None` where it would be longer than `max_bytes`: then it has to be a dead letter.
    pub fn retry(
        message: &Message,
        origin: &Origin,
        row_value: Option<Bytes>,
        failure: &Failure,
        worker: &str,
        not_before: Timestamp,
        max_bytes: usize,
    ) -> Option<Self> {
        let mut record = Self::new(message, origin, row_value, failure, worker, usize::MAX);
        record.headers.push(header(NOT_BEFORE_HEADER, &not_before.to_string()));
        (record.size() <= max_bytes).then_some(record)
    }

    /// Leaves out what it must, then adds our headers.
    fn within(mut self, max_bytes: usize, origin: &Origin, mut ours: Headers) -> Self {
        let over = |letter: &Self, ours: &Headers| letter.size() + headers_size(ours) > max_bytes;
        if over(&self, &ours)
            && let Some(value) = &self.value
        {
            let pointer = pointer(value, origin);
            // A value shorter than its pointer is not what makes the record too long.
            self.value = Some(if pointer.len() < value.len() { pointer } else { value.clone() });
        }
        if over(&self, &ours) {
            ours.push(header(DROPPED_HEADERS_HEADER, "0"));
            let mut dropped = 0;
            while over(&self, &ours) && self.headers.pop().is_some() {
                dropped += 1;
                ours.pop();
                ours.push(header(DROPPED_HEADERS_HEADER, &dropped.to_string()));
            }
        }
        if over(&self, &ours)
            && let Some(key) = self.key.take()
        {
            ours.push(header(DROPPED_KEY_HEADER, &key.len().to_string()));
        }
        self.headers.extend(ours);
        self
    }

    /// Bytes of the record on the wire, uncompressed, in a batch of its own; an upper bound.
    pub fn size(&self) -> usize {
        let length = |bytes: &Option<Bytes>| bytes.as_ref().map_or(0, Bytes::len);
        RECORD_OVERHEAD + length(&self.key) + length(&self.value) + headers_size(&self.headers)
    }
}

fn headers_size(headers: &Headers) -> usize {
    headers.iter().map(|(name, value)| HEADER_OVERHEAD + name.len() + value.as_ref().map_or(0, Bytes::len)).sum()
}

fn header(name: &str, value: &str) -> (String, Option<Bytes>) {
    (name.to_owned(), Some(Bytes::copy_from_slice(value.as_bytes())))
}

fn our_headers(message: &Message, origin: &Origin, failure: &Failure, worker: &str) -> Headers {
    let earlier = message.header(FIRST_FAILED_AT_HEADER).and_then(|text| text.parse::<Timestamp>().ok());
    let first = earlier.map_or(failure.first_failed_at, |earlier| earlier.min(failure.first_failed_at));
    let before: u32 = message.header(ATTEMPTS_HEADER).and_then(|text| text.parse().ok()).unwrap_or(0);
    vec![
        header(ORIGIN_HEADER, &origin.to_string()),
        header(ERROR_CODE_HEADER, failure.code.as_str()),
        header(ERROR_MESSAGE_HEADER, &error_text(&failure.message)),
        header(STAGE_HEADER, failure.stage.as_str()),
        header(ATTEMPTS_HEADER, &before.saturating_add(failure.attempts).to_string()),
        header(FIRST_FAILED_AT_HEADER, &first.to_string()),
        header(WORKER_HEADER, worker),
    ]
}

/// An error text fit for a header, or a log, that many eyes will see.
pub fn error_text(message: &str) -> String {
    let mut text = without_controls(&redact_text(message));
    if text.len() > MAX_MESSAGE_BYTES {
        let most = MAX_MESSAGE_BYTES - '…'.len_utf8();
        text.truncate((0..=most).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0));
        text.push('…');
    }
    text
}

/// Headers under which a dead letter goes back to the requests: those that came with the message, its origin, the time
/// of its first failure and the tries made so far. A worker that fails on it again adds its own tries to them.
pub fn replay_headers(letter: &Message) -> Headers {
    let stays = |name: &str| KEPT_BY_REPLAY.contains(&name) || !OURS.contains(&name);
    letter.headers.iter().filter(|(name, _)| stays(name)).cloned().collect()
}

/// Whether a dead letter's value only stands for one that was too long for it.
pub fn is_pointer(value: &[u8]) -> bool {
    value.starts_with(POINTER)
}

#[derive(Serialize)]
struct PointerValue<'o> {
    blipstream_pointer: Target,
    origin: &'o Origin,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
}

#[derive(Serialize)]
struct Target {
    length: usize,
    sha256: String,
}

/// What stands in place of an over-long value.
fn pointer(value: &Bytes, origin: &Origin) -> Bytes {
    let mut sha256 = String::with_capacity(64);
    for byte in Sha256::digest(value) {
        let _ = write!(sha256, "{byte:02x}");
    }
    let target = Target { length: value.len(), sha256 };
    let pointer = PointerValue { blipstream_pointer: target, origin, index: origin.index };
    serde_json::to_vec(&pointer).expect("strings and numbers are always JSON").into()
}

#[cfg(test)]
mod tests;
