//! From arguments to records: references, folders, lists of several forms. Lists are read as they are sent.

use std::error::Error;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;

use async_channel::{Receiver, bounded};
use bytes::Bytes;
use serde_json::{Map, Value};

use super::lines::Lines;
use super::request::{Bad, Builder, Given, Item};
use crate::command::input;

/// Columns that hold the reference where `--column` names none.
pub const COLUMNS: [&str; 3] = ["image", "url", "image_url"];
/// A `.json` file is read as a whole; a longer one should be a `.jsonl` file.
const MAX_JSON_FILE: u64 = 256 << 20;
/// Name of standard input in error texts.
const STDIN: &str = "standard input";

/// Takes an input on, or says that it was the last one wanted.
pub type Emit<'e, M = Item> = dyn FnMut(Result<M, Bad>) -> ControlFlow<()> + 'e;

/// Makes something of what the inputs name: records to send, or rows of a job.
pub trait Build {
    /// What is made.
    type Made;

    /// Most bytes of a line of a list, and the setting that says so.
    fn longest_line(&self) -> (u64, &'static str);

    /// Of a reference.
    fn reference(&self, place: &str, text: &str, given: Given<'_>) -> Result<Self::Made, Bad>;

    /// Of a JSON object, whose list lies in the folder `beside`.
    fn object(&self, place: &str, text: Bytes, beside: Option<&Path>) -> Result<Self::Made, Bad>;

    /// Of a row of a table, whose list lies in the folder `beside`.
    fn record(
        &self,
        place: &str,
        columns: &Columns,
        record: &csv::StringRecord,
        beside: Option<&Path>,
    ) -> Result<Self::Made, Bad>;
}

impl Build for Builder {
    type Made = Item;

    fn longest_line(&self) -> (u64, &'static str) {
        (self.parcel.max_bytes, "kafka.max_message_size")
    }

    fn reference(&self, place: &str, text: &str, given: Given<'_>) -> Result<Item, Bad> {
        Self::reference(self, place, text, given)
    }

    fn object(&self, place: &str, text: Bytes, _: Option<&Path>) -> Result<Item, Bad> {
        self.json(place, text)
    }

    fn record(
        &self,
        place: &str,
        columns: &Columns,
        record: &csv::StringRecord,
        beside: Option<&Path>,
    ) -> Result<Item, Bad> {
        let cell = |at: usize| record.get(at).filter(|text| !text.is_empty());
        let Some(image) = cell(columns.image) else {
            return Err(Bad::new(place, columns.no_image()));
        };
        let others = columns.others().filter_map(|at| Some((columns.names[at].clone(), cell(at)?.into())));
        let given = Given {
            id: columns.id.and_then(cell).map(str::to_owned),
            prompt: columns.prompt.and_then(cell).map(str::to_owned),
            meta: others.collect::<Map<String, Value>>(),
            beside,
        };
        self.reference(place, image, given)
    }
}

/// Reads the inputs of the command line.
pub struct Inputs<B = Builder> {
    pub builder: B,
    /// `--column`.
    pub column: Option<String>,
}

#[derive(Clone, Copy)]
pub enum Form {
    Csv,
    JsonLines,
    Json,
    Text,
}

impl Form {
    /// The form that a file's name tells; `None` for all that is no list.
    pub fn of(argument: &str) -> Option<Self> {
        if argument.contains("://") || argument.starts_with("data:") {
            return None;
        }
        let extension = Path::new(argument).extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "csv" => Some(Self::Csv),
            "jsonl" | "ndjson" => Some(Self::JsonLines),
            "json" => Some(Self::Json),
            "txt" => Some(Self::Text),
            _ => None,
        }
    }
}

/// Records read ahead of who takes them; each may be as long as `kafka.max_message_size`.
const AHEAD: usize = 4;

impl Inputs {
    /// Reads on a thread of its own, since standard input blocks; `Receiver` closes at the end of the inputs.
    pub fn start(self, arguments: Vec<String>) -> io::Result<Receiver<Result<Item, Bad>>> {
        let (sender, receiver) = bounded(AHEAD);
        std::thread::Builder::new().name("inputs".into()).spawn(move || {
            self.read(&arguments, &mut |item| match sender.send_blocking(item) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            })
        })?;
        Ok(receiver)
    }
}

impl<B: Build> Inputs<B> {
    /// Hands every record on, in the order of the arguments, and every input that is none.
    pub fn read(&self, arguments: &[String], emit: &mut Emit<'_, B::Made>) -> ControlFlow<()> {
        arguments.iter().try_for_each(|argument| self.argument(argument, emit))
    }

    /// Hands on what one argument names.
    pub fn argument(&self, argument: &str, emit: &mut Emit<'_, B::Made>) -> ControlFlow<()> {
        let path = Path::new(argument);
        if argument == "-" {
            return self.text(&List { name: STDIN, folder: None }, io::stdin().lock(), emit);
        }
        if path.is_dir() {
            return self.folder(argument, emit);
        }
        let Some(form) = Form::of(argument) else {
            return emit(self.builder.reference(argument, argument, Given::default()));
        };
        let file = match File::open(path) {
            Ok(file) => BufReader::new(file),
            Err(error) => return emit(Err(Bad::unread(argument, format!("cannot be read: {error}")))),
        };
        let list = List { name: argument, folder: path.parent() };
        match form {
            Form::Csv => self.csv(&list, file, emit),
            Form::JsonLines => self.json_lines(&list, file, emit),
            Form::Json => self.json(&list, file, emit),
            Form::Text => self.text(&list, file, emit),
        }
    }

    fn folder(&self, argument: &str, emit: &mut Emit<'_, B::Made>) -> ControlFlow<()> {
        let mut empty = true;
        for image in input::images(vec![argument.to_owned()]) {
            empty = false;
            emit(match image {
                Ok(image) => self.builder.reference(&image, &image, Given::default()),
                Err(error) => Err(Bad::unread(argument, error)),
            })?;
        }
        if empty { emit(Err(Bad::new(argument, "no images in this folder"))) } else { ControlFlow::Continue(()) }
    }

    fn lines<R: BufRead>(&self, reader: R) -> Lines<R> {
        let (limit, setting) = self.builder.longest_line();
        Lines::new(reader, limit, setting)
    }

    /// References, or JSON requests, a line each.
    fn text(&self, list: &List<'_>, reader: impl BufRead, emit: &mut Emit<'_, B::Made>) -> ControlFlow<()> {
        for (number, line) in self.lines(reader) {
            let place = list.place(number);
            emit(match line {
                Err(error) => Err(Bad::of(place, &error, &error)),
                Ok(line) if line.starts_with(['{', '"']) => self.json_line(list, &place, line),
                Ok(line) => self.builder.reference(&place, &line, list.given()),
            })?;
        }
        ControlFlow::Continue(())
    }

    fn json_lines(&self, list: &List<'_>, reader: impl BufRead, emit: &mut Emit<'_, B::Made>) -> ControlFlow<()> {
        for (number, line) in self.lines(reader) {
            let place = list.place(number);
            emit(match line {
                Err(error) => Err(Bad::of(place, &error, &error)),
                Ok(line) => self.json_line(list, &place, line),
            })?;
        }
        ControlFlow::Continue(())
    }

    /// A string is a reference; an object is a request and goes as it is.
    fn json_line(&self, list: &List<'_>, place: &str, line: String) -> Result<B::Made, Bad> {
        if line.starts_with('{') {
            return self.builder.object(place, Bytes::from(line), list.folder);
        }
        match serde_json::from_str(&line) {
            Ok(Value::String(text)) => self.builder.reference(place, &text, list.given()),
            Ok(_) => Err(Bad::new(place, "neither a request (an object) nor a reference (a string)")),
            Err(error) => Err(Bad::new(place, format!("no JSON: {error}"))),
        }
    }

    /// One request, one table, or a list of requests and references.
    fn json(&self, list: &List<'_>, reader: impl BufRead, emit: &mut Emit<'_, B::Made>) -> ControlFlow<()> {
        let mut text = Vec::new();
        if let Err(error) = reader.take(MAX_JSON_FILE + 1).read_to_end(&mut text) {
            return emit(Err(Bad::of(list.name, &error, &error)));
        }
        if text.len() as u64 > MAX_JSON_FILE {
            let why = "too long to be read as a whole; a .jsonl file, with one request a line, has no limit";
            return emit(Err(Bad::new(list.name, why)));
        }
        let first = text.iter().find(|byte| !byte.is_ascii_whitespace());
        if first == Some(&b'{') {
            return emit(self.builder.object(list.name, text.into(), list.folder));
        }
        let values = match serde_json::from_slice(&text) {
            Ok(Value::Array(values)) => values,
            Ok(value) => vec![value],
            Err(error) => return emit(Err(Bad::new(list.name, format!("no JSON: {error}")))),
        };
        drop(text);
        for (index, value) in values.into_iter().enumerate() {
            let place = format!("{}[{index}]", list.name);
            emit(match value {
                Value::String(text) => self.builder.reference(&place, &text, list.given()),
                Value::Object(_) => self.builder.object(&place, value.to_string().into(), list.folder),
                _ => Err(Bad::new(place, "neither a request (an object) nor a reference (a string)")),
            })?;
        }
        ControlFlow::Continue(())
    }

    fn csv(&self, list: &List<'_>, reader: impl Read, emit: &mut Emit<'_, B::Made>) -> ControlFlow<()> {
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(reader);
        let columns = match reader.headers() {
            Ok(header) => self.columns(header).map_err(|why| Bad::new(list.name, why)),
            Err(error) => Err(Bad::of(list.name, csv_cause(&error), &error)),
        };
        let columns = match columns {
            Ok(columns) => columns,
            Err(bad) => return emit(Err(bad)),
        };
        let mut record = csv::StringRecord::new();
        loop {
            let line = reader.position().line();
            match reader.read_record(&mut record) {
                Ok(false) => return ControlFlow::Continue(()),
                Ok(true) => {
                    let place = list.place(record.position().map_or(line, csv::Position::line));
                    emit(self.builder.record(&place, &columns, &record, list.folder))?;
                }
                Err(error) => {
                    let line = error.position().map_or(line, csv::Position::line);
                    emit(Err(Bad::of(list.place(line), csv_cause(&error), csv_error(&error))))?;
                    if error.is_io_error() {
                        return ControlFlow::Continue(());
                    }
                }
            }
        }
    }

    fn columns(&self, header: &csv::StringRecord) -> Result<Columns, String> {
        Columns::of(header.iter().map(str::to_owned).collect(), self.column.as_deref())
    }
}

impl Columns {
    /// Which column of `names` is what; `column` is `--column`.
    pub fn of(names: Vec<String>, column: Option<&str>) -> Result<Self, String> {
        let find = |name: &str| names.iter().position(|column| column == name);
        let all = names.join(", ");
        let image = match (column, names.as_slice()) {
            (Some(name), _) => find(name).ok_or(format!("has no column {name} (--column); it has {all}"))?,
            (None, [_]) => 0,
            (None, _) => COLUMNS.iter().find_map(|name| find(name)).ok_or(format!(
                "none of the columns ({all}) is called {}; say with --column which one holds the image",
                COLUMNS.join(", ")
            ))?,
        };
        let other = |name| find(name).filter(|at| *at != image);
        Ok(Self { image, id: other("id"), prompt: other("prompt"), names })
    }

    /// Why a row without a value in the column of the image is none.
    pub fn no_image(&self) -> String {
        format!("the column {} is empty", self.names[self.image])
    }

    fn others(&self) -> impl Iterator<Item = usize> {
        (0..self.names.len()).filter(|at| *at != self.image && ![self.id, self.prompt].contains(&Some(*at)))
    }
}

/// The error of who reads, which the crate does not give as the source of its own.
fn csv_cause(error: &csv::Error) -> &(dyn Error + 'static) {
    match error.kind() {
        csv::ErrorKind::Io(error) => error,
        _ => error,
    }
}

fn csv_error(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("{len} values for {expected_len} columns")
        }
        csv::ErrorKind::Utf8 { .. } => "not UTF-8".into(),
        _ => error.to_string(),
    }
}

/// A list's name for messages, and the folder it lies in.
struct List<'a> {
    name: &'a str,
    folder: Option<&'a Path>,
}

impl<'a> List<'a> {
    fn place(&self, line: u64) -> String {
        format!("{}:{line}", self.name)
    }

    fn given(&self) -> Given<'a> {
        Given { beside: self.folder, ..Given::default() }
    }
}

/// Which column is what.
pub struct Columns {
    pub names: Vec<String>,
    pub image: usize,
    id: Option<usize>,
    prompt: Option<usize>,
}

#[cfg(test)]
mod tests;
