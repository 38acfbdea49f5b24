//! Requests: four forms, told apart by their shape.

use std::path::PathBuf;

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::{Map, Value};
use url::Url;

use super::Message;
use crate::disposition::{Code, Disposed, Disposition};

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
    /// After this moment the caption is of no use.
    pub deadline: Option<Timestamp>,
    /// Passed through to the record.
    pub meta: Map<String, Value>,
}

/// Parameters a request may set; unknown names are refused, since a typo would change the meaning.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RequestParams {
    /// Most tokens generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<usize>,
    /// Least tokens generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_new_tokens: Option<usize>,
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageRef {
    /// `http://` or `https://`.
    Http(Url),
    /// `file://`; read only below a configured root.
    File(PathBuf),
    /// Base64 text as it stands in the message: bare, or the payload of a `data:` URI. Decoded in the fetch stage,
    /// under an image permit; a slice of the message's payload wherever JSON needed no unescaping.
    Base64(Bytes),
    /// Percent-encoded payload of a `data:` URI without `;base64`.
    Percent(Bytes),
}

/// Why a message, or one row of it, is no request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The message is in none of the four forms.
    #[error("{0}")]
    Message(String),
    /// `params` or `prompt` are wrong.
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
/// # Errors
/// The message as a whole is unreadable; a failed row of a readable message is an `Err` inside the list.
pub fn parse(message: &Message, max_rows: usize) -> Result<Vec<ParsedRow>, ParseError> {
    let _ = (message, max_rows);
    Ok(Vec::new())
}

impl Request {
    /// The request in the native form, as JSON: what stands in the dead letter of one row of several.
    pub fn to_native(&self) -> Bytes {
        Bytes::new()
    }
}
