//! A dead letter as it stands in its topic: what its headers say, and what is left of its request.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::command::collect::answer::Asked;
use crate::message::{
    ATTEMPTS_HEADER, ERROR_CODE_HEADER, ERROR_MESSAGE_HEADER, FIRST_FAILED_AT_HEADER, Message, ORIGIN_HEADER, Origin,
    STAGE_HEADER, WORKER_HEADER, is_pointer,
};

/// Where a dead letter stands in its topic; written `partition/offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub partition: i32,
    pub offset: i64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.partition, self.offset)
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (partition, offset) = text.split_once('/').unwrap_or_default();
        match (partition.parse(), offset.parse()) {
            (Ok(partition), Ok(offset)) if partition >= 0 && offset >= 0 => Ok(Self { partition, offset }),
            _ => Err("a place is partition/offset, as `blipstream dlq ls` prints it: 0/17".into()),
        }
    }
}

/// A dead letter.
#[derive(Debug, Clone, PartialEq)]
pub struct Letter {
    /// Where it stands.
    pub place: Place,
    /// When it was written; if the broker does not know, when it failed first.
    pub time: Option<Timestamp>,
    /// The request's id, or the one derived from its origin.
    pub id: String,
    /// Who the image is.
    pub origin: Origin,
    /// Host of the image's address.
    pub host: Option<String>,
    /// Mostly one of the closed list; a newer worker may know more.
    pub code: String,
    pub stage: String,
    /// In words.
    pub message: String,
    /// Tries made, over all lives.
    pub attempts: Option<u32>,
    pub first_failed_at: Option<Timestamp>,
    /// Who gave up.
    pub worker: String,
    /// Whether the value only stands for one that was over-long.
    pub pointer: bool,
}

impl Letter {
    /// Reads a record of the dead-letter topic.
    ///
    /// # Errors
    /// Why it is no dead letter.
    pub fn read(message: &Message) -> Result<Self, String> {
        let text = |name: &str| message.header(name).unwrap_or_default().to_owned();
        let needed = |name: &str| message.header(name).ok_or(format!("no dead letter: no header {name}"));
        let code = needed(ERROR_CODE_HEADER)?.to_owned();
        let origin: Origin =
            needed(ORIGIN_HEADER)?.parse().map_err(|error| format!("no dead letter: {ORIGIN_HEADER} is {error}"))?;
        let first_failed_at = message.header(FIRST_FAILED_AT_HEADER).and_then(|text| text.parse().ok());
        let written = message.timestamp_ms.and_then(|ms| Timestamp::from_millisecond(ms).ok());
        let Asked { id, host } = Asked::of(message);
        Ok(Self {
            place: Place { partition: message.partition, offset: message.offset },
            time: written.or(first_failed_at),
            id: id.unwrap_or_else(|| origin.to_string()),
            origin,
            host,
            code,
            stage: text(STAGE_HEADER),
            message: text(ERROR_MESSAGE_HEADER),
            attempts: message.header(ATTEMPTS_HEADER).and_then(|text| text.parse().ok()),
            first_failed_at,
            worker: text(WORKER_HEADER),
            pointer: message.payload.as_ref().is_some_and(|value| is_pointer(value)),
        })
    }

    /// The dead letter as an object: the fields of `collect` and more.
    pub fn to_json(&self) -> Value {
        json!({
            "place": self.place.to_string(),
            "time": self.time,
            "id": self.id,
            "index": self.origin.index,
            "origin": self.origin,
            "host": self.host,
            "error": {"code": self.code, "stage": self.stage, "message": self.message},
            "attempts": self.attempts,
            "first_failed_at": self.first_failed_at,
            "worker": self.worker,
            "pointer": self.pointer,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Instant;

    use super::*;
    use crate::disposition::{Code, Failure, Stage};
    use crate::message::DeadLetter;

    /// The dead letter of a request, `offset` being its place and that of the request.
    pub fn dead(value: &str, code: Code, offset: i64, index: Option<usize>) -> Message {
        let request = Message {
            topic: "requests".into(),
            partition: 1,
            offset,
            timestamp_ms: Some(1_790_000_000_000 + offset * 1000),
            key: None,
            payload: Some(value.to_owned().into()),
            headers: Vec::new(),
            received: Instant::now(),
        };
        let origin = Origin { index, ..request.origin() };
        let failure = Failure::with_message(Stage::Fetch, code, "it failed".into());
        let letter = DeadLetter::new(&request, &origin, None, &failure, "worker-1", 1 << 20);
        Message { payload: letter.value, headers: letter.headers, topic: "dlq".into(), ..request }
    }

    #[test]
    fn a_place_is_written_as_it_is_read() {
        assert_eq!("3/17".parse::<Place>().unwrap().to_string(), "3/17");
        for text in ["", "3", "3/", "/3", "-1/3", "3/-1", "3/4/5", "a/b"] {
            assert!(text.parse::<Place>().unwrap_err().contains("partition/offset"), "{text}");
        }
    }

    #[test]
    fn a_dead_letter_tells_its_request_and_its_failure() {
        let value = r#"{"id":"cat","image":"https://user:pw@images.example/cat.jpg?sig=x"}"#;
        let letter = Letter::read(&dead(value, Code::NotFound, 7, Some(2))).unwrap();
        assert_eq!(letter.time.unwrap().to_string(), "2026-09-21T14:13:27Z");
        let line = letter.to_json();
        for (field, expected) in [
            ("place", json!("1/7")),
            ("id", json!("cat")),
            ("index", json!(2)),
            ("origin", json!({"topic": "requests", "partition": 1, "offset": 7})),
            ("host", json!("images.example")),
            ("error", json!({"code": "not_found", "stage": "fetch", "message": "it failed"})),
            ("attempts", json!(1)),
            ("worker", json!("worker-1")),
            ("pointer", json!(false)),
        ] {
            assert_eq!(line[field], expected, "{field}");
        }
        assert!(!line.to_string().contains("sig=") && !line.to_string().contains("pw"));
    }

    #[test]
    fn a_record_without_code_or_origin_is_no_dead_letter() {
        let letter = dead("https://e.com/a.jpg", Code::Dns, 7, None);
        for missing in [ERROR_CODE_HEADER, ORIGIN_HEADER] {
            let headers = letter.headers.iter().filter(|(name, _)| name != missing).cloned().collect();
            let error = Letter::read(&Message { headers, ..letter.clone() }).unwrap_err();
            assert!(error.contains(missing), "{error}");
        }
    }
}
