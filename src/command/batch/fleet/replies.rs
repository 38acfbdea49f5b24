//! What workers say of the job's rows, read from the topics of answers.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::Deserialize;

use super::keys::{Keys, Sent};
use crate::command::batch::index::Done;
use crate::command::batch::journal::{Caption, Failed, Positions, several};
use crate::command::collect::answer::{Answer, Captioned, Refusal};
use crate::command::collect::dead_letters;
use crate::disposition::Code;
use crate::kafka::{Error, Snapshot, TopicCheck};
use crate::message::{Message, TextSource};
use crate::settings::Kafka;

/// How long one look at a topic takes at most.
const STEP: Duration = Duration::from_millis(50);

/// The topics that answers come in. A job asks for no filter, so nothing of it is in `kafka.filtered_topic`.
pub fn topics(kafka: &Kafka) -> [TopicCheck; 2] {
    [TopicCheck { topic: kafka.captions_topic.clone(), setting: "kafka.captions_topic" }, dead_letters(kafka)]
}

/// An answer to one of the job's requests.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    pub sent: Sent,
    pub result: Result<Caption, Refused>,
}

/// What a dead letter says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub failed: Failed,
    /// Whether the same request may have a caption later.
    pub may_pass: bool,
}

/// What is kept of a caption record. A version only gains fields, so others are passed over.
#[derive(Deserialize)]
struct Record {
    #[serde(flatten)]
    caption: Caption,
    #[serde(default)]
    candidates: Vec<Candidate>,
}

#[derive(Deserialize)]
struct Candidate {
    text: String,
    source: String,
}

impl Reply {
    /// Reads a record of one of [`topics`]; `None` where it answers nothing of this job.
    pub fn of(message: &Message, keys: &Keys, kafka: &Kafka) -> Option<Self> {
        let sent = keys.read(message.key.as_deref()?)?;
        let read = Answer::of(message, &kafka.dead_letter_topic).and_then(|answer| match answer.outcome {
            Ok(captioned) => caption(&captioned).map(Ok),
            Err(refusal) => Ok(Err(refused(refusal))),
        });
        match read {
            Ok(result) => Some(Self { sent, result }),
            Err(why) => {
                tracing::warn!("{}/{}/{}: {why}", message.topic, message.partition, message.offset);
                None
            }
        }
    }

    /// Whether it says what became of `sent`: a caption of any try does, a failure only of that one or a later one.
    pub fn settles(&self, sent: Sent) -> bool {
        self.sent.row == sent.row && (self.result.is_ok() || self.sent >= sent)
    }
}

fn caption(captioned: &Captioned) -> Result<Caption, String> {
    let record = serde_json::from_slice(&captioned.record).map_err(|error| format!("no caption record: {error}"))?;
    let Record { mut caption, candidates } = record;
    let generated = candidates.into_iter().filter(|one| one.source == TextSource::Generated.as_str());
    caption.texts = several(generated.map(|one| one.text));
    Ok(caption)
}

fn refused(Refusal { code, message, .. }: Refusal) -> Refused {
    let may_pass = Code::ALL.iter().any(|known| known.as_str() == code && known.may_pass());
    Refused { failed: Failed { code, message }, may_pass }
}

/// The answers that nobody has taken since topics were `read` up to there, for rows that are not `done`: of each row the
/// caption, or else the newest failure of this round. Blocks.
///
/// There are about as many as `--mini-batch-size`, since so many requests were under way at most; and where failed rows are
/// open again, as many as were answered too late.
///
/// # Errors
/// The brokers do not answer within `patience`, or do not permit to read.
pub fn missed(
    kafka: &Kafka,
    keys: &Keys,
    read: &Positions,
    done: &Done,
    patience: Duration,
) -> Result<HashMap<u64, Reply>, Error> {
    let mut found: HashMap<u64, Reply> = HashMap::new();
    for topic in topics(kafka) {
        let Some(partitions) = read.get(&topic.topic) else { continue };
        let range =
            |(partition, offset): (&i32, &i64)| -> (i32, RangeInclusive<i64>) { (*partition, *offset..=i64::MAX) };
        let ranges = partitions.iter().map(range).collect();
        let mut snapshot = Snapshot::open(kafka, &topic, Some(&ranges), patience)?;
        while !snapshot.is_over() {
            let Some(message) = snapshot.next(STEP)? else { continue };
            let Some(reply) = Reply::of(&message, keys, kafka) else { continue };
            let row = reply.sent.row;
            let is_news = found.get(&row).is_none_or(|known| known.result.is_err() && reply.sent >= known.sent);
            if is_news && reply.settles(keys.sent(row, 1)) && !done.has(row) {
                found.insert(row, reply);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;

    use super::*;
    use crate::disposition::{Failure, Stage};
    use crate::message::DeadLetter;

    fn keys() -> Keys {
        Keys::new("ab", 1)
    }

    fn message(topic: &str, key: &str, value: &str) -> Message {
        let bytes = |text: &str| Some(Bytes::copy_from_slice(text.as_bytes()));
        Message { key: bytes(key), payload: bytes(value), ..Message::empty(topic, 0, 7) }
    }

    fn captioned(key: &str, more: serde_json::Value) -> Option<Reply> {
        let mut record = json!({
            "schema": "blipstream.caption.v1", "id": key, "index": 0, "text": "a dog", "logprob": -7.25, "tokens": 3,
            "finish": "stop", "model": {"id": "m"}, "timing_ms": {"fetch": 1.5}, "meta": {}, "worker": "w",
            "image": {"url": null, "sha256": "9f", "width": 4, "height": 3, "bytes": 99, "format": "png"},
            "origin": {"topic": "requests", "partition": 0, "offset": 5},
        });
        record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let kafka = Kafka::default();
        Reply::of(&message(&kafka.captions_topic, key, &record.to_string()), &keys(), &kafka)
    }

    fn dead(key: &str, code: Code, most: usize) -> Reply {
        let kafka = Kafka::default();
        let value = format!(r#"{{"id":"{key}","image":"{}"}}"#, "A".repeat(8_000));
        let request = message("requests", key, &value);
        let failure = Failure::with_message(Stage::Fetch, code, "why".into());
        let letter = DeadLetter::new(&request, &request.origin(), None, &failure, "w", most);
        let letter = Message {
            topic: kafka.dead_letter_topic.as_str().into(),
            payload: letter.value,
            headers: letter.headers,
            ..request
        };
        Reply::of(&letter, &keys(), &kafka).unwrap()
    }

    #[test]
    fn a_caption_has_what_a_row_keeps_of_it() {
        let reply = captioned("batch-ab-3-1-1", json!({})).unwrap();
        let caption = reply.result.unwrap();
        assert_eq!(reply.sent, keys().sent(3, 1));
        assert_eq!((caption.text.as_str(), caption.logprob, caption.tokens), ("a dog", Some(-7.25), Some(3)));
        assert_eq!((caption.finish.as_deref(), caption.texts.len()), (Some("stop"), 0));
        assert_eq!((caption.image.width, caption.image.bytes, caption.image.format.as_str()), (4, 99, "png"));
        let one = |text: &str, source: &str| json!({"text": text, "source": source, "logprob": null});
        let candidates = json!({"candidates": [one("a", "generated"), one("b", "generated"), one("c", "found")]});
        assert_eq!(captioned("batch-ab-3-1-1", candidates).unwrap().result.unwrap().texts, ["a", "b"]);
    }

    #[test]
    fn a_dead_letter_is_known_by_its_key_even_where_its_value_had_no_room() {
        for most in [1 << 20, 2_000] {
            let reply = dead("batch-ab-3-1-2", Code::NotFound, most);
            let refused = reply.result.unwrap_err();
            assert_eq!((reply.sent, refused.failed.code.as_str()), (keys().sent(3, 2), "not_found"));
            assert_eq!((refused.failed.message.as_str(), refused.may_pass), ("why", false));
        }
        assert!(dead("batch-ab-3-1-2", Code::Http5xx, 1 << 20).result.unwrap_err().may_pass);
    }

    #[test]
    fn a_caption_of_any_try_settles_a_row_and_a_failure_none_that_came_later() {
        let sent = keys().sent(3, 2);
        for (key, failure, caption) in
            [("batch-ab-3-1-2", true, true), ("batch-ab-3-1-1", false, true), ("batch-ab-3-0-9", false, true)]
        {
            assert_eq!(dead(key, Code::Dns, 1 << 20).settles(sent), failure, "{key}");
            assert_eq!(captioned(key, json!({})).unwrap().settles(sent), caption, "{key}");
        }
        assert!(!captioned("batch-ab-4-1-2", json!({})).unwrap().settles(sent), "of another row");
    }

    #[test]
    fn what_is_not_this_jobs_or_no_answer_at_all_is_passed_over() {
        assert_eq!(captioned("batch-cd-3-1-1", json!({})), None);
        assert_eq!(captioned("photo-4711", json!({})), None);
        assert_eq!(captioned("batch-ab-3-1-1", json!({"text": 7})), None);
        let kafka = Kafka::default();
        let keyless = Message { key: None, ..message(&kafka.captions_topic, "", "{}") };
        assert_eq!(Reply::of(&keyless, &keys(), &kafka), None);
    }
}
