//! From an output to a record of Kafka.

use bytes::Bytes;

use crate::disposition::{Code, Failure, Stage};
use crate::kafka::{Class, Record};
use crate::message::{CaptionRecord, DeadLetter, Headers, Message, ORIGIN_HEADER, Origin, Row, parse};
use crate::settings::Kafka;
use crate::stage::Output;

/// Headers of ours: those that came in tell of an earlier life of the request, and are not passed on with a caption.
const OWN_HEADERS: &str = "blipstream-";

/// A record, owned.
#[derive(Debug)]
pub(super) struct Rendered<'a> {
    topic: &'a str,
    key: Option<Bytes>,
    value: Option<Bytes>,
    headers: Headers,
}

impl Rendered<'_> {
    pub(super) fn record(&self) -> Record<'_> {
        Record { topic: self.topic, key: self.key.as_deref(), value: self.value.as_deref(), headers: &self.headers }
    }
}

/// The record of an output; a dead letter's value as a pointer, if that is asked for.
pub(super) fn render<'a>(output: &Output, pointer: bool, kafka: &'a Kafka, worker: &str) -> Rendered<'a> {
    let limit = if pointer { 0 } else { kafka.max_message_size.as_u64() as usize };
    let (message, origin, row_value, failure) = match output {
        Output::Caption(record, message) => return caption(record, message, kafka),
        Output::FailedRow(row, failure) => (&row.message, row.origin.clone(), native(row), failure),
        Output::FailedMessage { message, index, native, failure } => {
            let origin = message.origin();
            let origin = Origin { index: index.or(origin.index), ..origin };
            (message, origin, native.clone(), failure)
        }
    };
    let DeadLetter { key, value, headers } = DeadLetter::new(message, &origin, row_value, failure, worker, limit);
    Rendered { topic: &kafka.dead_letter_topic, key, value, headers }
}

fn native(row: &Row) -> Option<Bytes> {
    (!row.only).then(|| row.request.to_native())
}

fn caption<'a>(record: &CaptionRecord, message: &Message, kafka: &'a Kafka) -> Rendered<'a> {
    // Strings, numbers and a map with string keys: nothing that JSON cannot say.
    let value = serde_json::to_vec(record).unwrap_or_default();
    let foreign = message.headers.iter().filter(|(name, _)| !name.starts_with(OWN_HEADERS));
    let mut headers: Headers = foreign.cloned().collect();
    headers.push((ORIGIN_HEADER.into(), Some(record.origin.to_string().into())));
    Rendered { topic: &kafka.captions_topic, key: message.key.clone(), value: Some(value.into()), headers }
}

/// The code under which an output is dead-lettered; `None` for a caption.
pub(super) fn code(output: &Output) -> Option<Code> {
    match output {
        Output::Caption(..) => None,
        Output::FailedRow(_, failure) | Output::FailedMessage { failure, .. } => Some(failure.code),
    }
}

/// Topic of an output, and the setting that names it.
pub(super) fn destination<'a>(output: &Output, kafka: &'a Kafka) -> (&'a str, &'static str) {
    match output {
        Output::Caption(..) => (&kafka.captions_topic, "kafka.captions_topic"),
        Output::FailedRow(..) | Output::FailedMessage { .. } => (&kafka.dead_letter_topic, "kafka.dead_letter_topic"),
    }
}

/// What a caption becomes when its record is too long for its topic. Anything else stays as it is.
pub(super) fn too_large(output: Output, topic: &str, reason: &str) -> Output {
    let Output::Caption(record, message) = output else { return output };
    let text = format!("the caption record is too long for the topic {topic}: {reason}");
    let failure = Failure::with_message(Stage::Publish, Code::OutputTooLarge, text);
    Output::FailedMessage { index: record.origin.index, native: row_of(&message, record.index), message, failure }
}

/// One row of several in its native form; `None` where the message has only this row.
fn row_of(message: &Message, index: usize) -> Option<Bytes> {
    // It was parsed before, under the configured limit.
    let rows = parse(message, usize::MAX).ok().filter(|rows| rows.len() > 1)?;
    rows.into_iter().nth(index)?.ok().map(|request| request.to_native())
}

/// What a person can do about a refused record.
pub(super) fn advice(class: Class) -> &'static str {
    match class {
        Class::UnknownTopic => "create the topic, or change the setting",
        Class::NotAuthorised => "give the user Write on the topic",
        Class::Authentication => "check kafka.sasl_* and kafka.ssl_*",
        Class::TooLarge => "raise max.message.bytes of the topic, since key and headers alone are over it",
        _ => "see the brokers' logs",
    }
}
