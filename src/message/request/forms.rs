//! The four forms of a message, told apart by their shape.
//!
//! In the order in which they are tried:
//!
//! 1. A value that begins with `{` is a JSON object:
//!    a. with `specversion` and `data` or `data_base64`: a CloudEvent in structured mode, whose data is read anew;
//!    b. with `input_data`: the table form; with `image`: the native form; both, or neither, is an error.
//! 2. A value that begins with `"` is a JSON string: an image reference.
//! 3. A value that begins with `[`, or is a JSON number, `true`, `false` or `null`, is an error.
//! 4. Anything else is an image reference as it stands.
//!
//! A CloudEvent in binary mode is told by its header `ce_specversion`; its value is one of the above.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_PAD_INDIFFERENT;
use bytes::Bytes;

use super::json::{Fields, Json};
use super::{ParseError, ParsedRow, Request, native, reference, table};

/// What a value holds.
pub(super) enum Form {
    /// One request.
    Single(Box<Request>),
    /// The rows of a table, each for itself.
    Table(Vec<ParsedRow>),
}

impl Form {
    /// The same, with the id of its event for a single request that has none; rows of a table keep theirs.
    pub(super) fn or_id(mut self, id: Option<&str>) -> Self {
        if let Self::Single(request) = &mut self
            && request.id.is_none()
        {
            request.id = id.map(str::to_owned);
        }
        self
    }
}

/// A text on its way to its form.
pub(super) struct Reader<'r> {
    /// What the text is a part of: inline images become slices of it.
    pub(super) source: &'r Bytes,
    /// Where in the message the text stands, for errors: empty, or ends with a dot.
    pub(super) place: &'r str,
    /// Most rows of a table.
    pub(super) max_rows: usize,
    /// Whether the text may be an event; the data of an event may not.
    pub(super) events: bool,
}

impl Reader<'_> {
    /// Reads the whole source.
    pub(super) fn read(&self) -> Result<Form, ParseError> {
        let text = std::str::from_utf8(self.source).map_err(|error| {
            let at = error.valid_up_to();
            self.error(format!(
                "neither JSON nor an image reference: not UTF-8 from byte {at} on; send image bytes as base64"
            ))
        })?;
        // Some senders put a byte order mark first.
        let text = text.trim_start_matches('\u{feff}').trim();
        match text.bytes().next() {
            None => Err(self.error("empty; expected a request in JSON or an image reference".into())),
            Some(b'{' | b'"' | b'[') => {
                let json = Json::read(text).map_err(|error| self.error(format!("not valid JSON: {error}")))?;
                self.json(&json)
            }
            Some(_) if is_json_scalar(text) => Err(self.error(format!("expected a request, found `{text}`"))),
            Some(_) => self.reference(text),
        }
    }

    fn json(&self, json: &Json<'_>) -> Result<Form, ParseError> {
        match json {
            Json::Object(fields) => self.object(fields),
            Json::Text(text) => self.reference(text),
            other => Err(self.error(format!("expected an object or an image reference, found {}", other.kind()))),
        }
    }

    fn object(&self, fields: &Fields<'_>) -> Result<Form, ParseError> {
        let is_event = fields.get("specversion").is_some();
        let has_data = fields.get("data").or(fields.get("data_base64")).is_some();
        if is_event && has_data {
            return self.event(fields);
        }
        match (fields.get("input_data"), fields.get("image")) {
            (Some(_), Some(_)) => {
                Err(self.error("has both `image` and `input_data`; which of them is meant is not clear".into()))
            }
            (Some(input), None) => table::read(self, fields, input).map(Form::Table),
            (None, Some(_)) => {
                native::read(self.source, fields, self.place).map(|request| Form::Single(Box::new(request)))
            }
            (None, None) if is_event => {
                Err(self.error("the event has neither `data` nor `data_base64`; one of them holds the request".into()))
            }
            (None, None) => Err(self.error(missing_image(fields))),
        }
    }

    fn event(&self, event: &Fields<'_>) -> Result<Form, ParseError> {
        if !self.events {
            return Err(self.error("an event inside an event; the data must be a request".into()));
        }
        let id = match event.get("id") {
            Some(Json::Text(id)) => Some(&**id),
            Some(other) => return Err(self.error(format!("id: expected a string, found {}", other.kind()))),
            None => None,
        };
        let place = format!("{}data.", self.place);
        let form = match (event.get("data"), event.get("data_base64")) {
            (Some(_), Some(_)) => {
                return Err(self.error("has both `data` and `data_base64`; an event has one of them".into()));
            }
            (Some(data), _) => Reader { place: &place, events: false, ..*self }.json(data)?,
            (None, Some(Json::Text(data))) => {
                let decoded = STANDARD_PAD_INDIFFERENT.decode(&**data);
                let decoded = decoded.map_err(|error| self.error(format!("data_base64: not base64: {error}")))?;
                let place = format!("{}data_base64.", self.place);
                Reader { source: &decoded.into(), place: &place, events: false, ..*self }.read()?
            }
            (None, other) => {
                let found = other.map_or("nothing", Json::kind);
                return Err(self.error(format!("data_base64: expected a string, found {found}")));
            }
        };
        Ok(form.or_id(id))
    }

    fn reference(&self, text: &str) -> Result<Form, ParseError> {
        let image = reference::read(self.source, text, self.place)?;
        Ok(Form::Single(Box::new(Request::of(image))))
    }

    /// An error about the text as a whole, or about the place in it that `what` begins with.
    pub(super) fn error(&self, what: String) -> ParseError {
        let place = match self.place.strip_suffix('.') {
            Some(place) => Cow::Owned(format!("{place}: ")),
            None => Cow::Borrowed(""),
        };
        ParseError::Message(format!("{place}{what}"))
    }
}

/// A number or a word of JSON: surely a slip, although eight digits would also be base64.
fn is_json_scalar(text: &str) -> bool {
    text.len() <= 32 && (matches!(text, "null" | "true" | "false") || text.parse::<f64>().is_ok())
}

fn missing_image(fields: &Fields<'_>) -> String {
    let names = fields.0.iter().map(|(name, _)| &**name);
    let hint = native::nearest("image", names).map_or_else(String::new, |name| format!("; did you mean it by {name}?"));
    format!("missing `image` (or `input_data` for the table form){hint}")
}
