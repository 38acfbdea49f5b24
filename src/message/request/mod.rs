//! Requests: four forms, told apart by their shape ([`forms`]).

mod forms;
mod json;
mod native;
mod object;
mod reference;
mod table;
mod tasks;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::path::PathBuf;

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::{Map, Value};
use url::Url;

use self::json::{Fields, Json};
use super::Message;
use crate::disposition::{Code, Disposed, Disposition};

#[cfg(test)]
pub(super) use native::PARAMS;
pub use object::{ObjectRef, ObjectRoot, StoreKind};
pub use tasks::{MAX_PROMPT_BYTES, MAX_TEXTS, Tasks};

/// What one image asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The sender's id; without one, the origin serves.
    pub id: Option<String>,
    /// Where the image is.
    pub image: ImageRef,
    /// Text that the caption begins with.
    pub prompt: Option<String>,
    /// Parameters of this request.
    pub params: RequestParams,
    /// Texts that were found with the image.
    pub texts: Vec<String>,
    /// Questions about the image.
    pub questions: Vec<String>,
    /// What is to be done.
    pub tasks: Tasks,
    /// After this moment the caption is of no use.
    pub deadline: Option<Timestamp>,
    /// Passed through to the record.
    pub meta: Map<String, Value>,
}

/// Parameters a request may set, by the names of the reference implementation (`GenerationConfig` in transformers);
/// unknown names are refused, since a typo would change the meaning.
#[derive(Debug, Clone, Default, PartialEq, serde::Deserialize, serde::Serialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RequestParams {
    /// Most tokens generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<usize>,
    /// Least tokens generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_new_tokens: Option<usize>,
    /// Makes tokens that are there already less likely (above 1) or more (below).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f64>,
    /// How many captions are searched at a time; 1 takes the likeliest token each time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_beams: Option<usize>,
    /// With beams: above 0 longer captions win more often.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length_penalty: Option<f64>,
    /// Whether tokens are drawn by their probabilities.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub do_sample: Option<bool>,
    /// Of drawn tokens: below 1 the likely ones become likelier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Of how many of the likeliest tokens is drawn; 0 is no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// How probable the tokens that are drawn from are together; 1 is no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Equal seeds draw equal captions; without one, equal pictures do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// How many captions are made of the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_return_sequences: Option<usize>,
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageRef {
    /// `http://` or `https://`.
    Http(Url),
    /// `file://`; read only below a configured root.
    File(PathBuf),
    /// `s3://`, `gs://` or `az://`; read only below a configured root.
    Object(ObjectRef),
    /// Base64 text as it stands in the message: bare, or the payload of a `data:` URI. Standard or URL-safe alphabet,
    /// padding optional, no line breaks. Decoded in the fetch stage, under an image permit; a slice of the message's
    /// payload wherever neither JSON escapes nor line breaks made a copy necessary.
    Base64(Bytes),
    /// Percent-encoded payload of a `data:` URI without `;base64`.
    Percent(Bytes),
}

/// Why a message, or one row of it, is no request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The message is over `kafka.max_message_size`; it was not looked at.
    #[error(
        "the message has {size} bytes with its key and headers; at most {limit} are taken (kafka.max_message_size). \
         Send the address of a large image instead of its bytes"
    )]
    TooLarge {
        /// Its length.
        size: usize,
        /// What is allowed.
        limit: usize,
    },
    /// The message is in none of the four forms.
    #[error("{0}")]
    Message(String),
    /// `params`, `prompt`, `tasks` or what they take are wrong.
    #[error("{0}")]
    Params(String),
    /// The image reference is unreadable or of an unknown scheme.
    #[error("{0}")]
    Reference(String),
}

impl Disposed for ParseError {
    fn disposition(&self) -> Disposition {
        Disposition::Permanent
    }

    fn code(&self) -> Code {
        match self {
            Self::TooLarge { .. } => Code::TooLarge,
            Self::Message(_) => Code::BadMessage,
            Self::Params(_) => Code::BadParams,
            Self::Reference(_) => Code::BadReference,
        }
    }
}

/// One row: a request, or why it is none together with the row's native form for its dead letter, if it has one.
pub type ParsedRow = Result<Request, (ParseError, Option<Bytes>)>;

/// Reads a message as one of the four forms. `max_rows` bounds the fan-out of the table form.
///
/// A single request that is wrong is an `Err` of the whole; an empty table is an empty list. A message without a
/// payload, which the consumer skips, is one that cannot be read.
///
/// # Errors
/// The message as a whole is unreadable; a failed row of a readable table is an `Err` inside the list.
pub fn parse(message: &Message, max_rows: usize) -> Result<Vec<ParsedRow>, ParseError> {
    let source = message.payload.clone().unwrap_or_default();
    let reader = forms::Reader { source: &source, place: "", max_rows, events: true };
    Ok(match reader.read()?.or_id(event_id(message)) {
        forms::Form::Single(request) => vec![Ok(*request)],
        forms::Form::Table(rows) => rows,
    })
}

/// Reads the JSON of a stranger, with no more values than a message may have.
///
/// # Errors
/// It is none, or has too many.
pub fn read_json(text: &[u8]) -> Result<Value, ParseError> {
    let not = |error: &dyn std::fmt::Display| ParseError::Message(format!("not valid JSON: {error}"));
    let text = std::str::from_utf8(text).map_err(|error| not(&error))?;
    Ok(Json::read(text).map_err(|error| not(&error))?.to_value())
}

/// Reads a request in the native form whose JSON was read already. An inline image is a slice of its text.
///
/// # Errors
/// It is none.
pub fn parse_object(mut object: Map<String, Value>) -> Result<Request, ParseError> {
    let source = match object.get_mut("image") {
        Some(Value::String(text)) => Bytes::from(std::mem::take(text)),
        _ => Bytes::new(),
    };
    let mut fields = Fields::of(&object);
    if let Some(image) = std::str::from_utf8(&source).ok().filter(|text| !text.is_empty()) {
        // Of a repeated name the last one counts.
        fields.0.push((Cow::Borrowed("image"), Json::Text(Cow::Borrowed(image))));
    }
    native::read(&source, &fields, "")
}

/// The id of a CloudEvent in binary mode. A replayed row of a table keeps the headers of its message, but its id was
/// never that of the event.
fn event_id(message: &Message) -> Option<&str> {
    let is_event = message.header("ce_specversion").is_some() && message.origin().index.is_none();
    message.header("ce_id").filter(|_| is_event)
}

impl RequestParams {
    /// Reads parameters whose JSON was read already; `name` is what they are called, for errors.
    ///
    /// # Errors
    /// One of them is unknown or no good.
    pub fn read(given: &Map<String, Value>, name: &str) -> Result<Self, ParseError> {
        native::params_of(&Fields::of(given), name)
    }
}

impl Request {
    /// A request for a plain caption of an image.
    pub fn of(image: ImageRef) -> Self {
        Self {
            id: None,
            image,
            prompt: None,
            params: RequestParams::default(),
            texts: Vec::new(),
            questions: Vec::new(),
            tasks: Tasks::default(),
            deadline: None,
            meta: Map::new(),
        }
    }
}
