//! From an output to a record of Kafka.

use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;

use crate::disposition::{Code, Failure, Stage};
use crate::kafka::{Class, Record};
use crate::message::{DeadLetter, Headers, Message, ORIGIN_HEADER, Origin, Row, parse};
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
    pub(super) timestamp_ms: Option<i64>,
}

impl Rendered<'_> {
    pub(super) fn record(&self) -> Record<'_> {
        let Self { topic, key, value, headers, timestamp_ms } = self;
        Record { topic, key: key.as_deref(), value: value.as_deref(), headers, timestamp_ms: *timestamp_ms }
    }
}

/// A caption of an older request has the time of writing: topics delete by the age that records claim (after seven days
/// by default), and a caption with the time of an old request would be deleted as soon as it is written.
const OLDEST_MS: i64 = 24 * 3_600_000;

/// Room for a pointer in the place of a value.
const POINTER_ROOM: usize = 512;

/// The record of an output; a dead letter's value as a pointer, if that is asked for.
pub(super) fn render<'a>(output: &Output, pointer: bool, kafka: &'a Kafka, worker: &str) -> Rendered<'a> {
    let limit = kafka.max_message_size.as_u64() as usize;
    let (message, origin, row_value, failure) = match output {
        Output::Caption { record, message, rejected, .. } => {
            return answer(record, &record.origin, message, topic_of(*rejected, kafka).0);
        }
        Output::Canary { record, message } => {
            let topic = canary_topic(kafka).0;
            if !pointer {
                return answer(record, &record.origin, message, topic);
            }
            let mut short = answer(&record.shortened(), &record.origin, message, topic);
            short.key = None;
            short.headers.retain(|(name, _)| name == ORIGIN_HEADER);
            return short;
        }
        Output::FailedRow(row, failure) => (&row.message, row.origin.clone(), native(row), failure),
        Output::FailedMessage { message, index, native, failure } => {
            (message, message.origin_of(*index), native.clone(), failure)
        }
    };
    let within = |limit| DeadLetter::new(message, &origin, row_value.clone(), failure, worker, limit);
    let mut letter = within(limit);
    if pointer {
        // The topic's own limit is not known, only that the value is too long for it: key and headers are kept.
        let value = letter.value.as_ref().map_or(0, Bytes::len);
        letter = within((letter.size() - value + POINTER_ROOM).min(limit));
    }
    let DeadLetter { key, value, headers } = letter;
    // With the time of writing: a topic that deletes by age must keep it as long as any other, however old the request.
    Rendered { topic: &kafka.dead_letter_topic, key, value, headers, timestamp_ms: None }
}

/// The record of a retry topic for an output that failed for a reason that may pass; `None` for any other output, when
/// the last try was had, when the request's deadline comes first, and when the record is too long.
pub(super) fn render_retry<'a>(output: &Output, kafka: &'a Kafka, worker: &str) -> Option<Rendered<'a>> {
    let Output::FailedRow(row, failure) = output else { return None };
    let retry = kafka.next_retry(&row.message.topic).filter(|_| failure.transient)?;
    let not_before = Timestamp::now().checked_add(retry.delay).ok()?;
    if row.request.deadline.is_some_and(|deadline| deadline <= not_before) {
        return None;
    }
    let limit = kafka.max_message_size.as_u64() as usize;
    let record = DeadLetter::retry(&row.message, &row.origin, native(row), failure, worker, not_before, limit)?;
    let DeadLetter { key, value, headers } = record;
    // The time of writing: a topic deletes by age, and a request that waits for its try must not be old enough.
    Some(Rendered { topic: &retry.topic, key, value, headers, timestamp_ms: None })
}

fn native(row: &Row) -> Option<Bytes> {
    (!row.only).then(|| row.request.to_native())
}

/// A record about an image, with the key and the foreign headers of its message.
fn answer<'a>(record: &impl Serialize, origin: &Origin, message: &Message, topic: &'a str) -> Rendered<'a> {
    // Strings, numbers and a map with string keys: nothing that JSON cannot say.
    let value = serde_json::to_vec(record).unwrap_or_default();
    let foreign = message.headers.iter().filter(|(name, _)| !name.starts_with(OWN_HEADERS));
    let mut headers: Headers = foreign.cloned().collect();
    headers.push((ORIGIN_HEADER.into(), Some(origin.to_string().into())));
    Rendered { topic, key: message.key.clone(), value: Some(value.into()), headers, timestamp_ms: event_time(message) }
}

/// Where a record goes, and the setting that says so.
fn topic_of(rejected: bool, kafka: &Kafka) -> (&str, &'static str) {
    match &kafka.filtered_topic {
        Some(topic) if rejected => (topic, "kafka.filtered_topic"),
        _ => (&kafka.captions_topic, "kafka.captions_topic"),
    }
}

/// Where the canary's records go, and the setting that says so. A worker with a canary has one.
fn canary_topic(kafka: &Kafka) -> (&str, &'static str) {
    (kafka.canary_topic.as_deref().unwrap_or_default(), "kafka.canary_topic")
}

/// A caption has the time of the request that it answers, as in Kafka Streams. Topics refuse times to come.
fn event_time(message: &Message) -> Option<i64> {
    let now = Timestamp::now().as_millisecond();
    message.timestamp_ms.filter(|time| (now - OLDEST_MS..=now).contains(time))
}

/// The code under which an output is dead-lettered; `None` for a caption, and for the canary's.
pub(super) fn code(output: &Output) -> Option<Code> {
    match output {
        Output::Caption { .. } | Output::Canary { .. } => None,
        Output::FailedRow(_, failure) | Output::FailedMessage { failure, .. } => Some(failure.code),
    }
}

/// Topic of an output, and the setting that names it; `retry` where it goes to a retry topic.
pub(super) fn destination<'a>(output: &Output, retry: bool, kafka: &'a Kafka) -> (&'a str, &'static str) {
    match output {
        Output::FailedRow(row, _) if retry => {
            (kafka.next_retry(&row.message.topic).map_or("", |retry| &retry.topic), "kafka.retry_topics")
        }
        Output::Caption { rejected, .. } => topic_of(*rejected, kafka),
        Output::Canary { .. } => canary_topic(kafka),
        Output::FailedRow(..) | Output::FailedMessage { .. } => (&kafka.dead_letter_topic, "kafka.dead_letter_topic"),
    }
}

/// What a caption becomes when its record is too long for its topic. Anything else stays as it is.
pub(super) fn too_large(output: Output, kafka: &Kafka, reason: &str) -> Output {
    let Output::Caption { record, message, rejected, .. } = output else { return output };
    let topic = topic_of(rejected, kafka).0;
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::message::{
        CANARY_SCHEMA, CanaryRecord, CaptionRecord, Generated, ImageInfo, ModelRef, SCHEMA, Timing, Written,
    };

    fn message(headers: &[&str]) -> Message {
        Message {
            key: Some("key".into()),
            payload: Some("{}".into()),
            headers: headers.iter().map(|name| ((*name).to_owned(), Some("x".into()))).collect(),
            ..Message::empty("in", 2, 7)
        }
    }

    fn captioned(message: &Message) -> Output {
        let record = CaptionRecord {
            schema: SCHEMA,
            id: "id".into(),
            index: 0,
            text: "a cat".into(),
            generated: Generated { logprob: Some(f32::NAN), tokens: Some(1), finish: Some("stop") },
            candidates: Vec::new(),
            answers: Vec::new(),
            embeddings: None,
            flags: Vec::new(),
            cached: false,
            model: ModelRef { id: "m".into(), revision: None, dtype: "f32".into() },
            filter: None,
            answerer: None,
            image: ImageInfo::default(),
            timing_ms: Timing::default(),
            origin: message.origin(),
            worker: "w".into(),
            meta: serde_json::Map::new(),
        };
        let (record, message) = (Box::new(record), Arc::new(message.clone()));
        Output::Caption { record, message, device: "cpu".into(), rejected: false }
    }

    fn compared(message: &Message) -> Output {
        let Output::Caption { record, message, .. } = captioned(message) else { unreachable!() };
        let CaptionRecord { id, index, text, generated, model, image, origin, worker, .. } = *record;
        let caption = Written { text: Some(text), generated, model, device_ms: 1.0, error: None };
        let canary = Written { text: Some("a dog".into()), ..caption.clone() };
        let (result, word_distance) = CanaryRecord::compared(&caption, &canary);
        let (schema, shortened) = (CANARY_SCHEMA, false);
        let record = CanaryRecord {
            schema,
            id,
            index,
            result,
            word_distance,
            caption,
            canary,
            image,
            origin,
            worker,
            shortened,
        };
        Output::Canary { record: Box::new(record), message }
    }

    #[test]
    fn a_comparison_that_is_too_long_keeps_nothing_of_any_length_and_is_no_dead_letter() {
        let kafka = Kafka { canary_topic: Some("canary".into()), ..Kafka::default() };
        let output = compared(&message(&["traceparent"]));
        let rendered = |pointer| {
            let rendered = render(&output, pointer, &kafka, "w");
            assert_eq!((rendered.topic, &*rendered.headers.last().unwrap().0), ("canary", ORIGIN_HEADER));
            let record: serde_json::Value = serde_json::from_slice(rendered.value.as_ref().unwrap()).unwrap();
            (rendered.key.is_some(), rendered.headers.len(), record)
        };
        let said = |record: &serde_json::Value| {
            ["/id", "/caption/text", "/canary/text", "/result", "/word_distance", "/shortened"]
                .map(|field| record.pointer(field).cloned().unwrap_or_default())
        };
        let (has_key, headers, whole) = rendered(false);
        assert_eq!((has_key, headers), (true, 2));
        let (different, null) = (json!("different"), json!(null));
        assert_eq!(
            said(&whole),
            [json!("id"), json!("a cat"), json!("a dog"), different.clone(), json!(1), null.clone()]
        );
        let (has_key, headers, short) = rendered(true);
        assert_eq!((has_key, headers), (false, 1));
        assert_eq!(said(&short), [json!("in/2/7"), null.clone(), null, different, json!(1), json!(true)]);
        assert_eq!((code(&output), destination(&output, true, &kafka)), (None, ("canary", "kafka.canary_topic")));
    }

    #[test]
    fn a_replayed_request_does_not_carry_its_old_failure_into_its_caption() {
        let mut replayed = message(&["traceparent", "blipstream-error-code"]);
        replayed.headers.push((ORIGIN_HEADER.into(), Some("first/0/1".into())));
        let kafka = Kafka::default();
        let rendered = render(&captioned(&replayed), false, &kafka, "w");
        let names: Vec<&str> = rendered.headers.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["traceparent", ORIGIN_HEADER]);
        assert_eq!(rendered.headers[1].1.as_deref(), Some(&b"first/0/1"[..]));
        assert_eq!((rendered.topic, rendered.key.as_deref()), ("blipstream.captions", Some(&b"key"[..])));
    }

    #[test]
    fn a_caption_has_the_time_of_its_request_unless_a_topic_would_refuse_or_delete_it() {
        let (kafka, now) = (Kafka::default(), Timestamp::now().as_millisecond());
        let (hour, week) = (3_600_000, 7 * 24 * 3_600_000);
        for (sent, passed) in [
            (Some(now - hour), Some(now - hour)),
            (Some(now - week), None),
            (Some(now + hour), None),
            (Some(-1), None),
            (None, None),
        ] {
            let request = Message { timestamp_ms: sent, ..message(&[]) };
            assert_eq!(render(&captioned(&request), false, &kafka, "w").timestamp_ms, passed);
        }
    }

    #[test]
    fn a_number_that_json_cannot_say_does_not_empty_the_record() {
        let kafka = Kafka::default();
        let rendered = render(&captioned(&message(&[])), false, &kafka, "w");
        let record: serde_json::Value = serde_json::from_slice(&rendered.value.unwrap()).unwrap();
        assert_eq!((record["text"].as_str(), record["logprob"].is_null()), (Some("a cat"), true));
    }

    #[test]
    fn a_caption_that_is_too_long_fails_under_its_own_code_and_keeps_its_message() {
        let output = too_large(captioned(&message(&[])), &Kafka::default(), "1 MB is the limit");
        assert_eq!(code(&output), Some(Code::OutputTooLarge));
        let Output::FailedMessage { message, index, failure, .. } = &output else { panic!("no dead letter") };
        assert_eq!((message.offset, *index, failure.stage), (7, None, Stage::Publish));
        assert_eq!(destination(&output, false, &Kafka::default()).1, "kafka.dead_letter_topic");
    }
}
