//! The native form: one request as a JSON object. Rows of a table are brought into this form and read here, too.

use std::borrow::Cow;

use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value};

use super::json::{Fields, Json};
use super::tasks::{self, MAX_PROMPT_BYTES, Tasks};
use super::{ParseError, Request, RequestParams, reference};
use crate::message::redact::quote;

/// Names that `params` may have.
pub(in crate::message) const PARAMS: [&str; 11] = [
    "max_new_tokens",
    "min_new_tokens",
    "repetition_penalty",
    "num_beams",
    "length_penalty",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "num_return_sequences",
];

/// How alike two names must be (Jaro-Winkler, 0 to 1) for one to be taken as a slip for the other.
const ALIKE: f64 = 0.85;

/// Reads a request. `place` is where the object stands, for errors: empty, or ends with a dot.
pub(super) fn read(source: &Bytes, fields: &Fields<'_>, place: &str) -> Result<Request, ParseError> {
    let image = match fields.get("image") {
        Some(Json::Text(text)) => reference::read(source, text, place)?,
        Some(other) => return Err(wrong(place, "image", "a string", other, ParseError::Message)),
        None => return Err(ParseError::Message(format!("{place}image: missing"))),
    };
    let meta = match fields.get("meta") {
        Some(Json::Object(meta)) => meta.to_map(),
        Some(other) => return Err(wrong(place, "meta", "an object", other, ParseError::Message)),
        None => Map::new(),
    };
    let tasks = tasks::tasks(fields, place)?;
    let (texts, questions) = (tasks::texts(fields, place, tasks)?, tasks::questions(fields, place, tasks)?);
    let (prompt, params) = (prompt(fields, place)?, params(fields, place)?);
    tasks::check_effect(place, tasks, prompt.as_deref(), &params)?;
    Ok(Request {
        id: string(fields, place, "id", ParseError::Message)?.map(str::to_owned),
        image,
        prompt,
        params,
        texts,
        questions,
        tasks,
        deadline: deadline(fields, place)?,
        meta,
    })
}

fn prompt(fields: &Fields<'_>, place: &str) -> Result<Option<String>, ParseError> {
    let prompt = string(fields, place, "prompt", ParseError::Params)?;
    match prompt {
        Some(prompt) if prompt.len() > MAX_PROMPT_BYTES => {
            let length = prompt.len();
            Err(ParseError::Params(format!("{place}prompt: {length} bytes; at most {MAX_PROMPT_BYTES} are allowed")))
        }
        prompt => Ok(prompt.map(str::to_owned)),
    }
}

fn deadline(fields: &Fields<'_>, place: &str) -> Result<Option<Timestamp>, ParseError> {
    let Some(text) = string(fields, place, "deadline", ParseError::Message)? else { return Ok(None) };
    text.parse().map(Some).map_err(|_| {
        let text = quote(text);
        ParseError::Message(format!("{place}deadline: {text} is no RFC 3339 time (2026-01-31T12:00:00Z)"))
    })
}

fn params(fields: &Fields<'_>, place: &str) -> Result<RequestParams, ParseError> {
    let given = match fields.get("params") {
        Some(Json::Object(given)) => given,
        Some(other) => return Err(wrong(place, "params", "an object", other, ParseError::Params)),
        None => return Ok(RequestParams::default()),
    };
    params_of(given, &format!("{place}params"))
}

/// Reads the parameters that stand at `place`.
pub(super) fn params_of(given: &Fields<'_>, place: &str) -> Result<RequestParams, ParseError> {
    if let Some((name, _)) = given.0.iter().find(|(name, _)| !PARAMS.contains(&&**name)) {
        let hint = nearest(name, PARAMS.into_iter()).map_or_else(String::new, |name| format!("; did you mean {name}?"));
        let (name, known) = (quote(name), PARAMS.join(", "));
        return Err(ParseError::Params(format!("{place}: unknown name {name}{hint} Known are {known}")));
    }
    Ok(RequestParams {
        max_new_tokens: count(given, place, "max_new_tokens")?,
        min_new_tokens: count(given, place, "min_new_tokens")?,
        repetition_penalty: number(given, place, "repetition_penalty")?,
        num_beams: count(given, place, "num_beams")?,
        length_penalty: number(given, place, "length_penalty")?,
        do_sample: flag(given, place, "do_sample")?,
        temperature: number(given, place, "temperature")?,
        top_k: count(given, place, "top_k")?,
        top_p: number(given, place, "top_p")?,
        seed: count(given, place, "seed")?,
        num_return_sequences: count(given, place, "num_return_sequences")?,
    })
}

fn count<T: TryFrom<u64>>(params: &Fields<'_>, place: &str, name: &str) -> Result<Option<T>, ParseError> {
    param(params, place, name, "a whole number from 0 on", |value| match value {
        Json::Number(number) => number.as_u64().and_then(|number| number.try_into().ok()),
        _ => None,
    })
}

fn number(params: &Fields<'_>, place: &str, name: &str) -> Result<Option<f64>, ParseError> {
    param(params, place, name, "a number", |value| match value {
        Json::Number(number) => number.as_f64(),
        _ => None,
    })
}

fn flag(params: &Fields<'_>, place: &str, name: &str) -> Result<Option<bool>, ParseError> {
    param(params, place, name, "true or false", |value| match value {
        Json::Bool(flag) => Some(*flag),
        _ => None,
    })
}

/// A parameter of some kind, `None` where it is not there.
fn param<T>(
    params: &Fields<'_>,
    place: &str,
    name: &str,
    expected: &str,
    read: impl FnOnce(&Json<'_>) -> Option<T>,
) -> Result<Option<T>, ParseError> {
    let Some(value) = params.get(name) else { return Ok(None) };
    read(value).map(Some).ok_or_else(|| {
        let found = match value {
            Json::Number(number) => number.to_string(),
            other => other.kind().to_owned(),
        };
        ParseError::Params(format!("{place}.{name}: expected {expected}, found {found}"))
    })
}

fn string<'f>(
    fields: &'f Fields<'_>,
    place: &str,
    name: &str,
    error: fn(String) -> ParseError,
) -> Result<Option<&'f str>, ParseError> {
    match fields.get(name) {
        None => Ok(None),
        Some(Json::Text(text)) => Ok(Some(text)),
        Some(other) => Err(wrong(place, name, "a string", other, error)),
    }
}

pub(super) fn wrong(
    place: &str,
    name: &str,
    expected: &str,
    found: &Json<'_>,
    error: fn(String) -> ParseError,
) -> ParseError {
    error(format!("{place}{name}: expected {expected}, found {}", found.kind()))
}

/// The one of `names` that is most like `name`, in backticks, if any is much like it.
pub(super) fn nearest<'n>(name: &str, names: impl Iterator<Item = &'n str>) -> Option<String> {
    // Long names are no slips, and comparing takes the product of the lengths.
    let close = |other: &str| if name.len().max(other.len()) > 64 { 0.0 } else { strsim::jaro_winkler(name, other) };
    let (best, _) =
        names.map(|other| (other, close(other))).filter(|(_, how)| *how >= ALIKE).max_by(|a, b| a.1.total_cmp(&b.1))?;
    Some(quote(best))
}

/// A request as it is written.
#[derive(Serialize)]
struct Native<'r> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'r str>,
    image: Cow<'r, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<&'r str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    params: Option<&'r RequestParams>,
    #[serde(rename = "text", skip_serializing_if = "<[_]>::is_empty")]
    texts: &'r [String],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    questions: &'r [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    tasks: Option<Vec<&'static str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deadline: Option<Timestamp>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    meta: &'r Map<String, Value>,
}

impl Request {
    /// The request in the native form, as JSON: what stands in the dead letter of one row of several. Reads back as
    /// the same request; an image of a `data:` URI loses its media type, which is not used.
    pub fn to_native(&self) -> Bytes {
        let native = Native {
            id: self.id.as_deref(),
            image: self.image.to_text(),
            prompt: self.prompt.as_deref(),
            params: (self.params != RequestParams::default()).then_some(&self.params),
            texts: &self.texts,
            questions: &self.questions,
            tasks: (self.tasks != Tasks::default()).then(|| self.tasks.names()),
            deadline: self.deadline,
            meta: &self.meta,
        };
        serde_json::to_vec(&native).expect("strings and numbers are always JSON").into()
    }
}
