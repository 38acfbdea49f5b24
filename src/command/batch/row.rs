//! Rows of a job: what an input names, the columns that came with it, and what is asked.

use std::io;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::Value;

use super::cells::Cells;
use crate::command::submit::inputs::{Build, COLUMNS, Columns};
use crate::command::submit::request::{Bad, Given, NotPacked, Parcel, find};
use crate::disposition::Code;
use crate::message::{ImageRef, MAX_PROMPT_BYTES, ParseError, Request, RequestParams};

/// A reference that cannot be read is shown up to this length.
const LONGEST_REFERENCE: usize = 8 << 10;

/// One image of the job.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Where it stands: an argument, `photos.csv:17`, `shard.tar/000017`.
    pub place: String,
    /// Its columns, in the order of the input; never the image itself.
    pub cells: Cells,
    /// What is asked, or why that cannot be.
    pub request: Result<Box<Request>, Problem>,
}

/// Why a row has no caption.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub code: Code,
    pub message: String,
}

impl Problem {
    pub fn new(code: Code, message: impl ToString) -> Self {
        Self { code, message: message.to_string() }
    }
}

impl From<&NotPacked> for Code {
    /// As the fetch stage calls it, where it reads files itself.
    fn from(error: &NotPacked) -> Self {
        match error {
            NotPacked::Unreadable(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Self::NotFound,
                io::ErrorKind::PermissionDenied => Self::AccessDenied,
                // A disk that fails is to a file what a broken connection is to a URL.
                _ => Self::Connect,
            },
            NotPacked::Folder => Self::AccessDenied,
            NotPacked::Empty => Self::UnsupportedMedia,
            NotPacked::TooLong { .. } => Self::TooLarge,
        }
    }
}

impl Row {
    /// The same with the bytes of the image in place of its path, if it has one, for workers that do not see the file.
    pub fn packed(mut self, parcel: Parcel) -> Self {
        if let Ok(request) = &mut self.request
            && let ImageRef::File(path) = &request.image
        {
            match parcel.inline(path) {
                Ok(image) => request.image = ImageRef::Base64(image),
                Err(error) => {
                    let message = format!("{}: {error}", path.display());
                    self.request = Err(Problem { code: Code::from(&error), message });
                }
            }
        }
        self
    }
}

impl From<Bad> for Row {
    /// A place that cannot be read is a row that failed.
    fn from(bad: Bad) -> Self {
        Self { place: bad.place, cells: Cells::default(), request: Err(Problem::new(Code::BadMessage, bad.why)) }
    }
}

/// What an image column holds.
pub enum Image {
    /// A path, an address, or base64.
    Text(String),
    /// The encoded image.
    Bytes(Bytes),
    /// Nothing.
    None,
}

/// Makes rows, as the command line asks for them.
#[derive(Debug, Clone)]
pub struct Rows {
    /// `--column`.
    pub column: Option<String>,
    /// `--max-new-tokens` and the other flags of generation.
    pub params: RequestParams,
    /// `fetch.max_body`: an image that is longer is not taken.
    pub max_body: u64,
}

impl Rows {
    /// Name of the image's column among those of a JSON object.
    ///
    /// # Errors
    /// It has none.
    pub fn image_column<'n>(&self, names: impl Iterator<Item = &'n str>) -> Result<usize, String> {
        Columns::of(names.map(str::to_owned).collect(), self.column.as_deref()).map(|columns| columns.image)
    }

    /// The row whose image stands in the cell `at`.
    pub fn row(&self, place: &str, mut cells: Cells, at: usize, image: Image, beside: Option<&Path>) -> Row {
        // Bytes may have a name, text is the reference itself.
        let named = matches!(image, Image::Bytes(_));
        let image = self.image(&cells.0[at].0, image, beside);
        let cell = &mut cells.0[at].1;
        match &image {
            Ok(ImageRef::Base64(_) | ImageRef::Percent(_)) if cell.is_string() && !named => *cell = Value::Null,
            // Base64 with a slip in it, most likely.
            Err(_) if cell.as_str().is_some_and(|text| text.len() > LONGEST_REFERENCE) => *cell = Value::Null,
            _ => {}
        }
        let request = image.and_then(|image| self.request(place, image, &cells, at));
        Row { place: place.to_owned(), cells, request: request.map(Box::new) }
    }

    fn image(&self, column: &str, image: Image, beside: Option<&Path>) -> Result<ImageRef, Problem> {
        match image {
            Image::Text(text) if !text.trim().is_empty() => {
                let (image, _) = find(text.trim(), beside).map_err(|error| match error {
                    ParseError::Reference(why) => Problem::new(Code::BadReference, why),
                    other => Problem::new(Code::BadMessage, other),
                })?;
                Ok(image)
            }
            Image::Bytes(bytes) if bytes.len() as u64 > self.max_body => {
                Err(Problem::new(Code::TooLarge, format!("{} bytes, more than fetch.max_body", bytes.len())))
            }
            Image::Bytes(bytes) if !bytes.is_empty() => Ok(ImageRef::Base64(STANDARD.encode(bytes).into())),
            _ => Err(Problem::new(Code::BadReference, format!("the column {column} is empty"))),
        }
    }

    fn request(&self, place: &str, image: ImageRef, cells: &Cells, at: usize) -> Result<Request, Problem> {
        let mut request = Request::of(image);
        request.id = Some(place.to_owned());
        request.params.clone_from(&self.params);
        for (name, value) in cells.0.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, cell)| cell) {
            match (name.as_str(), value) {
                ("prompt", Value::String(prompt)) if prompt.len() > MAX_PROMPT_BYTES => {
                    let why = format!("the prompt is longer than {MAX_PROMPT_BYTES} bytes");
                    return Err(Problem::new(Code::BadParams, why));
                }
                ("prompt", Value::String(prompt)) => request.prompt = Some(prompt.clone()),
                ("params", Value::Object(_)) => {
                    let params = serde_json::from_value(value.clone());
                    request.params =
                        params.map_err(|error| Problem::new(Code::BadParams, format!("params: {error}")))?;
                }
                _ => {}
            }
        }
        Ok(request)
    }

    /// The row of a JSON object: its fields are the columns.
    fn fields(&self, place: &str, cells: Cells, beside: Option<&Path>) -> Row {
        let at = match self.image_column(cells.0.iter().map(|(name, _)| name.as_str())) {
            Ok(at) => at,
            Err(why) => {
                let request = Err(Problem::new(Code::BadMessage, why));
                return Row { place: place.to_owned(), cells, request };
            }
        };
        let image = match &mut cells.0[at].1.clone() {
            Value::String(text) => Image::Text(std::mem::take(text)),
            Value::Null => Image::None,
            _ => {
                let why = format!("{}: expected a string that names an image", cells.0[at].0);
                let request = Err(Problem::new(Code::BadReference, why));
                return Row { place: place.to_owned(), cells, request };
            }
        };
        self.row(place, cells, at, image, beside)
    }

    /// The rows of the model card's table form.
    fn table(&self, place: &str, table: &Value, beside: Option<&Path>) -> Result<Vec<Row>, Bad> {
        let list = |name: &str| {
            let list = table.get(name).and_then(Value::as_array);
            list.ok_or_else(|| Bad::new(place, format!("input_data.{name}: expected a list")))
        };
        let names = list("columns")?.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
        let names = names.ok_or_else(|| Bad::new(place, "input_data.columns: expected strings"))?;
        if let Some((_, twice)) = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name)) {
            return Err(Bad::new(place, format!("input_data.columns: {twice} stands there twice")));
        }
        let row = |(index, data): (usize, &Value)| {
            let place = format!("{place}[{index}]");
            let values = match data {
                // The values of the only column may stand in a list by themselves.
                Value::String(_) if names.len() == 1 => Some(std::slice::from_ref(data)),
                data => data.as_array().map(Vec::as_slice),
            };
            match values.filter(|values| values.len() == names.len()) {
                Some(values) => {
                    let cells = Cells(names.iter().cloned().zip(values.iter().cloned()).collect());
                    self.fields(&place, cells, beside)
                }
                None => Bad::new(place, format!("expected a list of {} values", names.len())).into(),
            }
        };
        Ok(list("data")?.iter().enumerate().map(row).collect())
    }
}

impl Build for Rows {
    type Made = Vec<Row>;

    fn longest_line(&self) -> (u64, &'static str) {
        // An image as base64, and its columns.
        (self.max_body / 3 * 4 + (1 << 20), "fetch.max_body, as base64, and 1 MiB")
    }

    fn reference(&self, place: &str, text: &str, given: Given<'_>) -> Result<Vec<Row>, Bad> {
        let cells = Cells(vec![(COLUMNS[0].to_owned(), text.into())]);
        Ok(vec![self.row(place, cells, 0, Image::Text(text.to_owned()), given.beside)])
    }

    fn object(&self, place: &str, text: Bytes, beside: Option<&Path>) -> Result<Vec<Row>, Bad> {
        let cells: Cells =
            serde_json::from_slice(&text).map_err(|error| Bad::new(place, format!("no JSON: {error}")))?;
        drop(text);
        match cells.0.iter().find(|(name, _)| name == "input_data") {
            Some((_, table)) => self.table(place, table, beside),
            None => Ok(vec![self.fields(place, cells, beside)]),
        }
    }

    fn record(
        &self,
        place: &str,
        columns: &Columns,
        record: &csv::StringRecord,
        beside: Option<&Path>,
    ) -> Result<Vec<Row>, Bad> {
        let value = |text: &str| if text.is_empty() { Value::Null } else { text.into() };
        let cells = columns.names.iter().cloned().zip(record.iter().map(value)).collect();
        let image = record.get(columns.image).unwrap_or_default().to_owned();
        Ok(vec![self.row(place, Cells(cells), columns.image, Image::Text(image), beside)])
    }
}

/// A value for people: what is no text as JSON.
pub fn as_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;
