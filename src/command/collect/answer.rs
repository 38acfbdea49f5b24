//! What workers answer: caption records and dead letters, as this side of the topics reads them.

use std::borrow::Cow;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use url::Url;

/// A stranger's text for a line of a terminal: control characters would end the line, or worse.
pub use crate::message::without_controls as one_line;
use crate::message::{self, ERROR_CODE_HEADER, ERROR_MESSAGE_HEADER, Message, Origin, Request, STAGE_HEADER};

/// An answer to one image, or to a whole message that failed.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The request's id, or the one derived from its origin.
    pub id: String,
    /// Row inside the message; `None` for a dead letter of the message as a whole.
    pub index: Option<usize>,
    /// Where the request stands in Kafka; without an index.
    pub origin: Origin,
    /// The caption, or why there is none.
    pub outcome: Result<Captioned, Refusal>,
}

/// A caption.
#[derive(Debug, Clone, PartialEq)]
pub struct Captioned {
    /// The caption's text.
    pub text: String,
    /// The record as it came.
    pub record: Bytes,
}

/// What the headers of a dead letter say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// One of the closed list.
    pub code: String,
    /// The stage that failed.
    pub stage: String,
    /// In words.
    pub message: String,
}

/// The part of a caption record that is needed here. A version only gains fields, so others are passed over.
#[derive(Deserialize)]
struct Head {
    id: String,
    #[serde(default)]
    index: usize,
    text: String,
    origin: HeadOrigin,
}

#[derive(Deserialize)]
struct HeadOrigin {
    topic: String,
    partition: i32,
    offset: i64,
}

impl Answer {
    /// Reads a record of one of the topics of answers, of which `dead_letters` is one.
    ///
    /// # Errors
    /// Why it is no answer.
    pub fn of(message: &Message, dead_letters: &str) -> Result<Self, String> {
        if *message.topic == *dead_letters { Self::of_dead_letter(message) } else { Self::of_caption(message) }
    }

    /// Reads a record of the captions topic.
    ///
    /// # Errors
    /// Why it is no caption record.
    fn of_caption(message: &Message) -> Result<Self, String> {
        let record = message.payload.clone().ok_or("a record without a value")?;
        let head: Head = serde_json::from_slice(&record).map_err(|error| format!("no caption record: {error}"))?;
        let HeadOrigin { topic, partition, offset } = head.origin;
        let origin = Origin { topic: topic.into(), partition, offset, index: None };
        Ok(Self { id: head.id, index: Some(head.index), origin, outcome: Ok(Captioned { text: head.text, record }) })
    }

    /// Reads a record of the dead-letter topic.
    ///
    /// # Errors
    /// Why it is no dead letter.
    fn of_dead_letter(message: &Message) -> Result<Self, String> {
        let text = |name: &str| message.header(name).unwrap_or_default().to_owned();
        let code = message.header(ERROR_CODE_HEADER).ok_or(format!("no dead letter: no header {ERROR_CODE_HEADER}"))?;
        let origin = message.origin();
        let refusal = Refusal { code: code.to_owned(), stage: text(STAGE_HEADER), message: text(ERROR_MESSAGE_HEADER) };
        let id = Asked::of(message).id.unwrap_or_else(|| origin.to_string());
        let index = origin.index;
        Ok(Self { id, index, origin: Origin { index: None, ..origin }, outcome: Err(refusal) })
    }

    /// The answer as one line of JSON: the caption record as it came, or what the dead letter says.
    pub fn to_line(&self) -> Vec<u8> {
        match &self.outcome {
            // A line break can only stand between the parts of a JSON text, where a space means the same.
            Ok(captioned) => {
                let space = |byte: &u8| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte };
                captioned.record.iter().map(space).collect()
            }
            Err(Refusal { code, stage, message }) => {
                let error = json!({"code": code, "stage": stage, "message": message});
                let line = json!({"id": self.id, "index": self.index, "origin": self.origin, "error": error});
                line.to_string().into_bytes()
            }
        }
    }
}

/// What a dead letter still tells of its request. What could not be parsed may have an id and an address all the same.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The id that the sender gave.
    pub id: Option<String>,
    /// Host of the image's address, as workers call it.
    pub host: Option<String>,
}

impl Asked {
    /// Reads the value of a dead letter.
    pub fn of(message: &Message) -> Self {
        let rows = message::parse(message, 1).ok();
        if let Some(Ok(Request { id, image, .. })) = rows.and_then(|rows| rows.into_iter().next()) {
            let host = image.host().map(Cow::into_owned);
            return Self { id, host };
        }
        let Some(payload) = &message.payload else { return Self::default() };
        let host = |text: &str| Url::parse(text.trim()).ok()?.host_str().map(str::to_owned);
        let Ok(value) = serde_json::from_slice::<Value>(payload) else {
            return Self { id: None, host: std::str::from_utf8(payload).ok().and_then(host) };
        };
        let text = |name: &str| value.get(name).and_then(Value::as_str);
        Self { id: text("id").map(str::to_owned), host: text("image").or(value.as_str()).and_then(host) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disposition::{Code, Failure, Stage};
    use crate::message::DeadLetter;

    fn message(value: &str) -> Message {
        Message { payload: Some(Bytes::copy_from_slice(value.as_bytes())), ..Message::empty("requests", 1, 7) }
    }

    fn dead(request: &str, index: Option<usize>) -> Answer {
        let request = message(request);
        let origin = Origin { index, ..request.origin() };
        let failure = Failure::with_message(Stage::Fetch, Code::NotFound, "404 of the host".into());
        let letter = DeadLetter::new(&request, &origin, None, &failure, "worker-1", 1 << 20);
        let record = Message { payload: letter.value, headers: letter.headers, offset: 99, ..request };
        Answer::of_dead_letter(&record).unwrap()
    }

    #[test]
    fn a_caption_record_is_read_and_written_as_it_came() {
        let text = "{\"id\":\"a\",\"index\":2,\"text\":\"a dog\",\n \"origin\":{\"topic\":\"requests\",\"partition\":1,\"offset\":7},\"new\":1}";
        let answer = Answer::of_caption(&message(text)).unwrap();
        assert_eq!(
            (answer.id.as_str(), answer.index, answer.origin.to_string().as_str()),
            ("a", Some(2), "requests/1/7")
        );
        assert_eq!(answer.to_line(), text.replace('\n', " ").into_bytes());
    }

    #[test]
    fn a_dead_letter_names_its_request_and_why_it_failed() {
        let answer = dead(r#"{"id":"cat","image":"https://example.com/cat.jpg"}"#, None);
        let line: serde_json::Value = serde_json::from_slice(&answer.to_line()).unwrap();
        assert_eq!(line["id"], "cat");
        assert_eq!(line["origin"], json!({"topic": "requests", "partition": 1, "offset": 7}));
        assert_eq!(line["index"], serde_json::Value::Null);
        assert_eq!(line["error"], json!({"code": "not_found", "stage": "fetch", "message": "404 of the host"}));
    }

    #[test]
    fn a_dead_letter_without_an_id_has_the_id_that_a_caption_would_have() {
        assert_eq!(dead("https://example.com/cat.jpg", None).id, "requests/1/7");
        let row = dead(r#"{"image":"https://example.com/cat.jpg"}"#, Some(3));
        assert_eq!((row.id.as_str(), row.index), ("requests/1/7/3", Some(3)));
        assert_eq!(dead(r#"{"id":"broken","image":7}"#, None).id, "broken");
    }

    #[test]
    fn the_host_is_that_of_the_image_even_where_the_request_is_wrong() {
        for (value, host) in [
            (r#"{"image":"https://user@Images.Example:8443/a.jpg?k=v"}"#, Some("images.example")),
            ("http://[::1]/a.jpg", Some("[::1]")),
            (r#"{"image":"ftp://images.example/a.jpg"}"#, Some("images.example")),
            (r#"{"image":"https://images.example/a.jpg","params":{"typo":1}}"#, Some("images.example")),
            ("file:///a.jpg", None),
            ("aGVsbG8gd29ybGQ=", None),
            (r#"{"blipstream_pointer":{"length":1,"sha256":""}}"#, None),
            ("\u{0}", None),
        ] {
            assert_eq!(Asked::of(&message(value)).host.as_deref(), host, "{value}");
        }
    }

    #[test]
    fn foreign_records_are_refused_with_a_reason() {
        assert!(Answer::of_caption(&message("hello")).unwrap_err().contains("no caption record"));
        assert!(Answer::of_dead_letter(&message("hello")).unwrap_err().contains(ERROR_CODE_HEADER));
    }
}
