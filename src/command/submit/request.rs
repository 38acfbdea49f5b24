//! From a reference, a row of a list or a JSON request to the record that is sent.

use std::error::Error;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use bytesize::ByteSize;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value};

use crate::command::input;
use crate::message::{self, ImageRef, Message, ParseError, RECORD_OVERHEAD, Request, RequestParams};

/// A record to send.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Where it comes from, in words: an argument, or `file:line`.
    pub place: String,
    /// The record's key.
    pub key: Option<Vec<u8>>,
    /// The record's value.
    pub value: Bytes,
    /// Images in it, and so answers to it.
    pub rows: usize,
}

/// An input that cannot be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {why}")]
pub struct Bad {
    /// Where it comes from, as in [`Item::place`].
    pub place: String,
    /// What is wrong and what to do.
    pub why: String,
    /// Whether the system could not read it, so that another time something else may stand there.
    pub unread: bool,
}

impl Bad {
    pub fn new(place: impl Into<String>, why: impl ToString) -> Self {
        Self { place: place.into(), why: why.to_string(), unread: false }
    }

    /// What the system could not read.
    pub fn unread(place: impl Into<String>, why: impl ToString) -> Self {
        Self { unread: true, ..Self::new(place, why) }
    }

    /// Of an error of who reads, which may be one of the system or of what was read.
    pub fn of(place: impl Into<String>, error: &(dyn Error + 'static), why: impl ToString) -> Self {
        let causes = std::iter::successors(Some(error), |&error| error.source());
        let mut errors = causes.filter_map(|cause| cause.downcast_ref::<io::Error>());
        Self { unread: errors.any(|error| error.raw_os_error().is_some()), ..Self::new(place, why) }
    }
}

/// What is known of an image beside its reference.
#[derive(Debug, Default)]
pub struct Given<'a> {
    /// The sender's id.
    pub id: Option<String>,
    /// Text that the caption begins with.
    pub prompt: Option<String>,
    /// Goes into `meta`, over what the command line gave.
    pub meta: Map<String, Value>,
    /// Folder that a relative path may be meant from, after the current one.
    pub beside: Option<&'a Path>,
}

/// Makes records, as the command line asks for them.
#[derive(Debug, Clone)]
pub struct Builder {
    /// `--prompt`.
    pub prompt: Option<String>,
    /// `--max-new-tokens` and the other flags of generation.
    pub params: RequestParams,
    /// Whether captions and found texts are judged.
    pub filter: bool,
    /// Column of lists that holds a text that was found with the image.
    pub text_column: Option<String>,
    /// `--meta`.
    pub meta: Map<String, Value>,
    /// `--deadline`, counted from the moment a request is made.
    pub deadline: Option<Duration>,
    /// Whether records have the id as their key.
    pub keyed: bool,
    /// Whether local files are sent as addresses.
    pub as_file_url: bool,
    /// What fits into a record.
    pub parcel: Parcel,
    /// `flow.max_rows`.
    pub max_rows: usize,
}

impl Builder {
    /// A request for the image that `text` names.
    pub fn reference(&self, place: &str, text: &str, given: Given<'_>) -> Result<Item, Bad> {
        let bad = |why: &dyn ToString| Bad::new(place, why.to_string());
        let text = text.trim();
        let (image, is_local) = find(text, given.beside).map_err(|error| bad(&error))?;
        let image = match image {
            ImageRef::File(path) if is_local && !self.as_file_url => {
                ImageRef::Base64(self.parcel.inline(&path).map_err(|error| bad(&error))?)
            }
            ImageRef::File(path) if is_local && !path.is_file() => return Err(bad(&"no such file")),
            image => image,
        };
        let mut request = Request::of(image);
        // Inline bytes have no name: without an id, nobody could tell whose caption it is.
        request.id = given.id.or_else(|| is_local.then(|| text.to_owned()));
        request.prompt = given.prompt.or_else(|| self.prompt.clone());
        request.params.clone_from(&self.params);
        request.deadline = self.deadline.map(from_now).transpose().map_err(|why| bad(&why))?;
        request.tasks.filter = self.filter;
        request.meta.clone_from(&self.meta);
        request.meta.extend(given.meta);
        if let Some(text) = self.text_column.as_ref().and_then(|column| request.meta.remove(column)) {
            request.texts.extend(text.as_str().filter(|text| !text.trim().is_empty()).map(str::to_owned));
        }
        self.item(place, request.id.as_deref(), request.to_native(), 1)
    }

    /// A request that is there as JSON already, in any of the forms that workers read; sent as it is.
    pub fn json(&self, place: &str, text: Bytes) -> Result<Item, Bad> {
        let text = if self.filter { with_filter(text) } else { text };
        let rows = message::parse(&unsent(text.clone()), self.max_rows).map_err(|error| Bad::new(place, error))?;
        if rows.is_empty() {
            return Err(Bad::new(place, "a table without rows"));
        }
        let id = match rows.as_slice() {
            [Ok(only)] => only.id.as_deref(),
            _ => None,
        };
        self.item(place, id, text, rows.len())
    }

    fn item(&self, place: &str, id: Option<&str>, value: Bytes, rows: usize) -> Result<Item, Bad> {
        let key = id.filter(|_| self.keyed).map(|id| id.as_bytes().to_vec());
        self.parcel.check(key.as_deref(), &value).map_err(|error| Bad::new(place, error))?;
        Ok(Item { place: place.to_owned(), key, value, rows })
    }
}

/// What fits into a record.
#[derive(Debug, Clone, Copy)]
pub struct Parcel {
    /// `kafka.max_message_size`.
    pub max_bytes: u64,
}

/// Why an image cannot go in a record.
#[derive(Debug, thiserror::Error)]
pub enum NotPacked {
    /// The file cannot be read.
    #[error(transparent)]
    Unreadable(#[from] std::io::Error),
    /// The path names a folder.
    #[error("a folder cannot be in a list; give it as an argument")]
    Folder,
    /// There is nothing in the file.
    #[error("an empty file")]
    Empty,
    /// The record would be over the limit.
    #[error(
        "{}{how}, and kafka.max_message_size is {}. Send an address instead: the image's URL, or --as-file-url if \
         the workers can read the file (fetch.file_roots); or raise kafka.max_message_size here and at the \
         workers, and max.message.bytes of the topic",
        ByteSize::b(*size),
        ByteSize::b(*most)
    )]
    TooLong {
        /// Bytes that it would have.
        size: u64,
        /// Of what.
        how: &'static str,
        /// The limit.
        most: u64,
    },
}

impl Parcel {
    /// The file as base64.
    pub fn inline(self, path: &Path) -> Result<Bytes, NotPacked> {
        let file = std::fs::File::open(path)?;
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(NotPacked::Folder);
        }
        let encoded = |length: u64| length.div_ceil(3) * 4;
        // What grows meanwhile is not read without end.
        let most = self.max_bytes / 4 * 3 + 3;
        let mut bytes = Vec::new();
        let length = metadata.len().max(file.take(most).read_to_end(&mut bytes)? as u64);
        if length == 0 {
            return Err(NotPacked::Empty);
        }
        self.limit(encoded(length), " as base64")?;
        Ok(STANDARD.encode(bytes).into())
    }

    /// Whether a record is short enough.
    pub fn check(self, key: Option<&[u8]>, value: &[u8]) -> Result<(), NotPacked> {
        self.limit((RECORD_OVERHEAD + value.len() + key.map_or(0, <[u8]>::len)) as u64, "")
    }

    fn limit(self, size: u64, how: &'static str) -> Result<(), NotPacked> {
        let most = self.max_bytes;
        if size > most { Err(NotPacked::TooLong { size, how, most }) } else { Ok(()) }
    }
}

/// A request in the native form that names no tasks, with those of the filter; anything else as it is.
fn with_filter(text: Bytes) -> Bytes {
    match serde_json::from_slice::<Map<String, Value>>(&text) {
        Ok(mut request) if request.contains_key("image") && !request.contains_key("tasks") => {
            request.insert("tasks".into(), serde_json::json!(["caption", "filter"]));
            Value::Object(request).to_string().into()
        }
        _ => text,
    }
}

/// What a text refers to, and whether it names a local file by its path, not by its address.
pub fn find(text: &str, beside: Option<&Path>) -> Result<(ImageRef, bool), ParseError> {
    let path = Path::new(text);
    let near = beside.filter(|_| path.is_relative() && !path.exists()).map(|folder| folder.join(path));
    if let Some(near) = near.filter(|near| near.is_file()) {
        return Ok((ImageRef::File(std::path::absolute(&near).unwrap_or(near)), true));
    }
    let is_address = text.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("file:"));
    let image = input::reference(text)?;
    let is_local = matches!(image, ImageRef::File(_)) && !is_address;
    Ok((image, is_local))
}

fn from_now(after: Duration) -> Result<Timestamp, String> {
    let after = SignedDuration::try_from(after).map_err(|error| format!("--deadline: {error}"))?;
    Timestamp::now().checked_add(after).map_err(|error| format!("--deadline: {error}"))
}

/// A message as a worker would get it.
fn unsent(payload: Bytes) -> Message {
    Message { payload: Some(payload), ..Message::empty("", 0, 0) }
}
