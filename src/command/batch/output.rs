//! The output of a job: JSON lines, CSV or Parquet, written beside its name and then moved there.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use parquet::basic::{Compression, LogicalType, Repetition, Type as Physical};
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
use serde_json::Value;

use super::columns::{Column, Kind};
use super::parquet_rows::root;
use super::row::as_text;

/// Rows of a row group; they are in memory until it is written.
const GROUP_ROWS: usize = 20_000;
/// And their bytes, about.
const GROUP_BYTES: usize = 32 << 20;

/// Form of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    JsonLines,
    Csv,
    Parquet,
}

impl Form {
    /// The form that a file's name tells.
    ///
    /// # Errors
    /// None of them.
    pub fn of(file: &Path) -> Result<Self, String> {
        let extension = file.extension().and_then(|end| end.to_str()).map(str::to_ascii_lowercase);
        match extension.as_deref() {
            Some("jsonl" | "ndjson") => Ok(Self::JsonLines),
            Some("csv") => Ok(Self::Csv),
            Some("parquet") => Ok(Self::Parquet),
            _ => Err(format!("--output {}: which form? Name it x.jsonl, x.csv or x.parquet", file.display())),
        }
    }
}

/// Writes a file that is there as a whole, or not at all.
///
/// # Errors
/// It cannot be written.
pub fn write_whole(file: &Path, write: impl FnOnce(File) -> anyhow::Result<File>) -> anyhow::Result<()> {
    let mut name = file.as_os_str().to_owned();
    name.push(".part");
    let part = PathBuf::from(name);
    let written = File::create(&part).map_err(anyhow::Error::from).and_then(write).and_then(|f| Ok(f.sync_all()?));
    written.with_context(|| format!("cannot write {}", part.display()))?;
    std::fs::rename(&part, file).with_context(|| format!("cannot rename {} to {}", part.display(), file.display()))?;
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(File::open(folder)?.sync_all()?)
}

/// Writes rows, each with a value for each of `columns`.
///
/// # Errors
/// A row cannot be read, or the file cannot be written.
pub fn write(
    form: Form,
    file: File,
    columns: &[Column],
    rows: impl Iterator<Item = io::Result<Vec<Value>>>,
) -> anyhow::Result<File> {
    match form {
        Form::JsonLines => json_lines(file, columns, rows),
        Form::Csv => csv(file, columns, rows),
        Form::Parquet => Parquet::new(file, columns)?.write(rows),
    }
}

fn json_lines(
    file: File,
    columns: &[Column],
    rows: impl Iterator<Item = io::Result<Vec<Value>>>,
) -> anyhow::Result<File> {
    let mut out = BufWriter::with_capacity(1 << 18, file);
    let names = columns.iter().map(|column| serde_json::to_string(&column.name)).collect::<Result<Vec<_>, _>>()?;
    for row in rows {
        let mut before = '{';
        for (name, value) in names.iter().zip(row?) {
            write!(out, "{before}{name}:")?;
            serde_json::to_writer(&mut out, &value)?;
            before = ',';
        }
        out.write_all(b"}\n")?;
    }
    Ok(out.into_inner().map_err(io::IntoInnerError::into_error)?)
}

fn csv(file: File, columns: &[Column], rows: impl Iterator<Item = io::Result<Vec<Value>>>) -> anyhow::Result<File> {
    let mut out = csv::Writer::from_writer(file);
    out.write_record(columns.iter().map(|column| column.name.as_str()))?;
    for row in rows {
        let cell = |value: Value| if value.is_null() { String::new() } else { as_text(&value) };
        out.write_record(row?.into_iter().map(cell))?;
    }
    Ok(out.into_inner().map_err(csv::IntoInnerError::into_error)?)
}

/// Values of a column of one row group; `levels` are 1 for a value and 0 for a null.
enum Values {
    Boolean(Vec<bool>),
    Integer(Vec<i64>),
    Number(Vec<f64>),
    Text(Vec<ByteArray>),
}

struct Parquet {
    writer: SerializedFileWriter<File>,
    columns: Vec<(Values, Vec<i16>)>,
    rows: usize,
    bytes: usize,
}

impl Parquet {
    fn new(file: File, columns: &[Column]) -> anyhow::Result<Self> {
        let column = |column: &Column| {
            let (physical, logical) = match column.kind {
                Kind::Boolean => (Physical::BOOLEAN, None),
                Kind::Integer => (Physical::INT64, None),
                Kind::Number => (Physical::DOUBLE, None),
                Kind::Unknown | Kind::Text => (Physical::BYTE_ARRAY, Some(LogicalType::String)),
            };
            Type::primitive_type_builder(&column.name, physical)
                .with_repetition(Repetition::OPTIONAL)
                .with_logical_type(logical)
                .build()
        };
        let schema = root(columns.iter().map(column).collect::<Result<Vec<_>, _>>()?)?;
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_created_by(concat!("blipstream ", env!("CARGO_PKG_VERSION")).to_owned())
            .build();
        let writer = SerializedFileWriter::new(file, schema, Arc::new(properties))?;
        let values = |column: &Column| match column.kind {
            Kind::Boolean => Values::Boolean(Vec::new()),
            Kind::Integer => Values::Integer(Vec::new()),
            Kind::Number => Values::Number(Vec::new()),
            Kind::Unknown | Kind::Text => Values::Text(Vec::new()),
        };
        let columns = columns.iter().map(|column| (values(column), Vec::new())).collect();
        Ok(Self { writer, columns, rows: 0, bytes: 0 })
    }

    fn write(mut self, rows: impl Iterator<Item = io::Result<Vec<Value>>>) -> anyhow::Result<File> {
        for row in rows {
            for ((values, levels), value) in self.columns.iter_mut().zip(row?) {
                levels.push(i16::from(!value.is_null()));
                self.bytes += values.push(value);
            }
            self.rows += 1;
            if self.rows >= GROUP_ROWS || self.bytes >= GROUP_BYTES {
                self.group()?;
            }
        }
        if self.rows > 0 {
            self.group()?;
        }
        Ok(self.writer.into_inner()?)
    }

    fn group(&mut self) -> anyhow::Result<()> {
        let mut group = self.writer.next_row_group()?;
        for (values, levels) in &mut self.columns {
            let Some(mut column) = group.next_column()? else { anyhow::bail!("fewer columns than values") };
            match (column.untyped(), &mut *values) {
                (ColumnWriter::BoolColumnWriter(to), Values::Boolean(values)) => {
                    to.write_batch(values, Some(levels), None)?;
                    values.clear();
                }
                (ColumnWriter::Int64ColumnWriter(to), Values::Integer(values)) => {
                    to.write_batch(values, Some(levels), None)?;
                    values.clear();
                }
                (ColumnWriter::DoubleColumnWriter(to), Values::Number(values)) => {
                    to.write_batch(values, Some(levels), None)?;
                    values.clear();
                }
                (ColumnWriter::ByteArrayColumnWriter(to), Values::Text(values)) => {
                    to.write_batch(values, Some(levels), None)?;
                    values.clear();
                }
                _ => anyhow::bail!("a column has not the type of its schema"),
            }
            levels.clear();
            column.close()?;
        }
        group.close()?;
        (self.rows, self.bytes) = (0, 0);
        Ok(())
    }
}

impl Values {
    /// Adds a value that is not null; returns its bytes, about.
    fn push(&mut self, value: Value) -> usize {
        match (self, value) {
            (_, Value::Null) => 0,
            (Self::Boolean(all), value) => {
                all.push(value.as_bool().unwrap_or_default());
                1
            }
            (Self::Integer(all), value) => {
                all.push(value.as_i64().unwrap_or_default());
                8
            }
            (Self::Number(all), value) => {
                all.push(value.as_f64().unwrap_or_default());
                8
            }
            (Self::Text(all), value) => {
                let text = match value {
                    Value::String(text) => text,
                    other => other.to_string(),
                };
                let bytes = text.len() + size_of::<ByteArray>();
                all.push(text.into_bytes().into());
                bytes
            }
        }
    }
}

#[cfg(test)]
mod tests;
