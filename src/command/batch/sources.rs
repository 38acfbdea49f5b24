//! The inputs of a job: what they are, whether they can be read, how many rows they have, and the rows.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;

use super::row::{Row, Rows};
use super::{parquet_rows, tar_rows};
use crate::command::submit::inputs::{Build, Columns, Form, Inputs};
use crate::command::submit::lines::Lines;
use crate::command::submit::request::Bad;
use crate::command::{Usage, input};
use crate::message::ImageRef;

/// What an argument is.
#[derive(Clone, Copy)]
enum Kind {
    Folder,
    List(Form),
    Parquet,
    Tar,
    /// An image: a file or an address.
    Image,
}

/// Takes on a row, or what is none, or says that it was the last one wanted.
pub type Emit<'e> = dyn FnMut(Result<Row, Bad>) -> ControlFlow<()> + 'e;

/// The inputs of the command line.
pub struct Sources {
    arguments: Vec<(String, Kind)>,
    lists: Inputs<Rows>,
}

impl Sources {
    /// Looks at the inputs: whether they are there, and have a column of images.
    ///
    /// # Errors
    /// What is wrong with one of them.
    pub fn new(arguments: &[String], rows: Rows) -> Result<Self, Usage> {
        let column = rows.column.clone();
        let mut sources = Self { arguments: Vec::new(), lists: Inputs { builder: rows, column } };
        for argument in arguments {
            let kind = kind(argument).map_err(|why| Usage(format!("{argument}: {why}")))?;
            sources.check(argument, kind).map_err(|why| Usage(format!("{argument}: {why}")))?;
            sources.arguments.push((argument.clone(), kind));
        }
        Ok(sources)
    }

    fn rows(&self) -> &Rows {
        &self.lists.builder
    }

    fn check(&self, argument: &str, kind: Kind) -> Result<(), String> {
        let open = || File::open(argument).map(BufReader::new).map_err(|error| format!("cannot be read: {error}"));
        match kind {
            Kind::Folder => match input::images(vec![argument.to_owned()]).next() {
                Some(Ok(_)) => Ok(()),
                Some(Err(error)) => Err(error.to_string()),
                None => Err("no images in this folder".into()),
            },
            Kind::List(Form::Csv) => {
                let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(open()?);
                let header = reader.headers().map_err(|error| error.to_string())?;
                let names: Vec<String> = header.iter().map(str::to_owned).collect();
                if let Some(twice) = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name)) {
                    return Err(format!("has two columns {}", twice.1));
                }
                Columns::of(names, self.rows().column.as_deref()).map(|_| ())
            }
            Kind::List(Form::JsonLines) => {
                // One object tells what the others should have; those that do not are rows that failed.
                let (limit, setting) = self.rows().longest_line();
                let first = Lines::new(open()?, limit, setting).find_map(|(_, line)| line.ok());
                let cells = first.and_then(|line| serde_json::from_str::<super::cells::Cells>(&line).ok());
                let Some(cells) = cells.filter(|cells| cells.get("input_data").is_none()) else { return Ok(()) };
                self.rows().image_column(cells.0.iter().map(|(name, _)| name.as_str())).map(|_| ())
            }
            Kind::List(_) => open().map(|_| ()),
            Kind::Parquet => parquet_rows::check(argument, self.rows()),
            Kind::Tar => tar_rows::check(open()?),
            Kind::Image => Ok(()),
        }
    }

    /// How many rows there are, as far as that can be told quickly.
    pub fn count(&self) -> Option<u64> {
        let lines = |argument: &str| {
            let file = File::open(argument).ok()?;
            file.metadata().is_ok_and(|metadata| metadata.is_file()).then(|| count_lines(file).ok())?
        };
        let count = |(argument, kind): &(String, Kind)| match kind {
            Kind::Folder => Some(input::images(vec![argument.clone()]).count() as u64),
            Kind::List(Form::Csv) => lines(argument).map(|lines| lines.saturating_sub(1)),
            Kind::List(Form::JsonLines | Form::Text) => lines(argument),
            Kind::List(Form::Json) | Kind::Tar => None,
            Kind::Parquet => parquet_rows::count(argument),
            Kind::Image => Some(1),
        };
        self.arguments.iter().map(count).sum()
    }

    /// Hands every row on, in the order of the inputs.
    pub fn read(&self, emit: &mut Emit<'_>) -> ControlFlow<()> {
        for (argument, kind) in &self.arguments {
            match kind {
                Kind::Parquet => parquet_rows::read(argument, self.rows(), emit)?,
                Kind::Tar => tar_rows::read(argument, self.rows(), emit)?,
                _ => self.lists.argument(argument, &mut |made| match made {
                    Ok(rows) => rows.into_iter().map(Ok).try_for_each(&mut *emit),
                    Err(bad) => emit(Err(bad)),
                })?,
            }
        }
        ControlFlow::Continue(())
    }
}

fn kind(argument: &str) -> Result<Kind, String> {
    let path = Path::new(argument);
    if argument == "-" {
        return Err("standard input cannot be read again after a stop; write it to a file".into());
    }
    if path.is_dir() {
        return Ok(Kind::Folder);
    }
    if let Some(form) = Form::of(argument) {
        return Ok(Kind::List(form));
    }
    let extension = path.extension().and_then(|end| end.to_str()).map(str::to_ascii_lowercase);
    let is_address = argument.contains("://") || argument.starts_with("data:");
    match extension.as_deref() {
        Some("parquet" | "parq" | "pq") if !is_address => Ok(Kind::Parquet),
        Some("tar") if !is_address => Ok(Kind::Tar),
        _ if !is_address && input::is_image(path) && !path.is_file() => Err("no such file".into()),
        _ if !is_address && path.exists() && !input::is_image(path) => Err(
            "what is this? Known are folders, images, and lists by their extension: .csv, .jsonl, .ndjson, .json, .txt, \
             .parquet, .tar"
            .into()),
        _ => match input::reference(argument) {
            Ok(ImageRef::Base64(_)) | Err(_) => Err("neither a file nor an address".into()),
            Ok(_) => Ok(Kind::Image),
        },
    }
}

/// Lines that say something, nearly: a value with a line break in it counts twice, a comment once.
fn count_lines(mut file: impl Read) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 18];
    let (mut lines, mut last) = (0, b'\n');
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(lines + u64::from(last != b'\n')),
            Ok(read) => {
                lines += buffer[..read].split(|byte| *byte == b'\n').count() as u64 - 1;
                last = buffer[read - 1];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
