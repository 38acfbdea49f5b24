//! Parquet tables, a few rows at a time. The image's column holds a path, an address, base64, the bytes of the image, or, as
//! data sets of the hub have it, a group of `bytes` and `path`.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::{ConvertedType, LogicalType, Type as Physical};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as Record};
use parquet::schema::types::{Type, TypePtr};
use serde_json::{Number, Value};

use super::cells::Cells;
use super::row::{Image, Row, Rows};
use super::sources::Emit;
use crate::command::submit::request::Bad;

/// Rows that are decoded at a time: each may hold an image.
const ROWS_AT_A_TIME: usize = 16;

/// A table, and where its images are.
struct Table {
    reader: SerializedFileReader<File>,
    /// The columns that are read: the image's, and those that can be passed through.
    schema: Type,
    image: usize,
}

/// Whether the table can be read, and has a column of images.
///
/// # Errors
/// Why not.
pub fn check(argument: &str, rows: &Rows) -> Result<(), String> {
    Table::open(argument, rows).map(|_| ())
}

/// How many rows it has.
pub fn count(argument: &str) -> Option<u64> {
    let reader = SerializedFileReader::new(File::open(argument).ok()?).ok()?;
    u64::try_from(reader.metadata().file_metadata().num_rows()).ok()
}

/// Hands on every row.
pub fn read(argument: &str, rows: &Rows, emit: &mut Emit<'_>) -> ControlFlow<()> {
    let Table { reader, schema, image } = match Table::open(argument, rows) {
        Ok(table) => table,
        // It could be read when the job began.
        Err(why) => return emit(Err(Bad::unread(argument, why))),
    };
    let records = RowIter::from_file_into(Box::new(reader)).project(Some(schema));
    let records = match records {
        Ok(records) => records.with_batch_size(ROWS_AT_A_TIME),
        Err(error) => return emit(Err(Bad::of(argument, &error, &error))),
    };
    let beside = Path::new(argument).parent();
    for (number, record) in records.enumerate() {
        let place = format!("{argument}[{number}]");
        match record {
            Ok(record) => emit(Ok(row(&place, record, image, rows, beside)))?,
            Err(error) => {
                let why = format!("cannot be read on from here, and the rows behind are missing: {error}");
                return emit(Err(Bad::of(place, &error, why)));
            }
        }
    }
    ControlFlow::Continue(())
}

impl Table {
    fn open(argument: &str, rows: &Rows) -> Result<Self, String> {
        let text = |error: ParquetError| format!("no Parquet table: {error}");
        let file = File::open(argument).map_err(|error| format!("cannot be read: {error}"))?;
        let reader = SerializedFileReader::new(file).map_err(text)?;
        let root = reader.metadata().file_metadata().schema();
        let fields = root.get_fields();
        let at = rows.image_column(fields.iter().map(|field| field.name()))?;
        let (mut kept, mut image) = (Vec::new(), 0);
        for (index, field) in fields.iter().enumerate() {
            if index == at {
                image = kept.len();
            } else if has_bytes(field) {
                continue;
            }
            kept.push(field.clone());
        }
        let schema = Type::group_type_builder(root.name()).with_fields(kept).build().map_err(text)?;
        Ok(Self { reader, schema, image })
    }
}

/// Whether a column holds bytes that are no text: images are not passed through.
fn has_bytes(field: &TypePtr) -> bool {
    if field.is_group() {
        return field.get_fields().iter().any(has_bytes);
    }
    let info = field.get_basic_info();
    let is_text = matches!(
        info.logical_type_ref(),
        Some(
            LogicalType::String
                | LogicalType::Json
                | LogicalType::Enum
                | LogicalType::Uuid
                | LogicalType::Decimal { .. }
        )
    ) || matches!(
        info.converted_type(),
        ConvertedType::UTF8 | ConvertedType::JSON | ConvertedType::ENUM | ConvertedType::DECIMAL
    );
    matches!(field.get_physical_type(), Physical::BYTE_ARRAY | Physical::FIXED_LEN_BYTE_ARRAY) && !is_text
}

fn row(place: &str, record: Record, at: usize, rows: &Rows, beside: Option<&Path>) -> Row {
    let mut image = Image::None;
    let take = |(index, (name, field)): (usize, (String, Field))| {
        if index != at {
            return (name, value(field));
        }
        let (found, shown) = image_of(field);
        image = found;
        (name, shown)
    };
    let cells = Cells(record.into_columns().into_iter().enumerate().map(take).collect());
    rows.row(place, cells, at, image, beside)
}

/// The image, and what is shown of it.
fn image_of(field: Field) -> (Image, Value) {
    match field {
        Field::Str(text) => (Image::Text(text.clone()), text.into()),
        Field::Bytes(bytes) => {
            let bytes = Bytes::copy_from_slice(bytes.data());
            match std::str::from_utf8(&bytes) {
                // Some writers do not say which of their columns are text; no image is.
                Ok(text) => (Image::Text(text.to_owned()), text.into()),
                Err(_) => (Image::Bytes(bytes), Value::Null),
            }
        }
        Field::Group(group) => {
            let (mut bytes, mut path) = (None, None);
            for (name, field) in group.into_columns() {
                match (name.as_str(), field) {
                    ("bytes", Field::Bytes(data)) => bytes = Some(Bytes::copy_from_slice(data.data())),
                    ("path", Field::Str(text)) => path = Some(text),
                    _ => {}
                }
            }
            let shown = path.clone().map_or(Value::Null, Value::String);
            match (bytes, path) {
                (Some(bytes), _) => (Image::Bytes(bytes), shown),
                (None, Some(path)) => (Image::Text(path), shown),
                (None, None) => (Image::None, shown),
            }
        }
        Field::Null => (Image::None, Value::Null),
        other => (Image::Text(other.to_string()), value(other)),
    }
}

/// As JSON. What JSON has no word for (times, decimals) becomes text, a number that is none becomes null.
fn value(field: Field) -> Value {
    match field {
        Field::Null | Field::Bytes(_) => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) => value.into(),
        Field::Long(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        Field::Float16(value) => float(value.to_f64()),
        Field::Float(value) => float(shortest(value)),
        Field::Double(value) => float(value),
        Field::Str(text) => text.into(),
        Field::Group(group) => {
            Value::Object(group.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect())
        }
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        Field::MapInternal(map) => {
            let entry = |(key, field): &(Field, Field)| {
                let key = match key {
                    Field::Str(text) => text.clone(),
                    other => other.to_string(),
                };
                (key, value(field.clone()))
            };
            Value::Object(map.entries().iter().map(entry).collect())
        }
        other @ (Field::Decimal(_)
        | Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_)) => other.to_string().into(),
    }
}

fn float(value: f64) -> Value {
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

/// The number that an f32 is written as: 0.1 and not 0.10000000149.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| value.into())
}

/// A schema's root of these columns.
pub fn root(columns: Vec<Type>) -> Result<TypePtr, ParquetError> {
    let columns = columns.into_iter().map(Arc::new).collect();
    Type::group_type_builder("row").with_fields(columns).build().map(Arc::new)
}

#[cfg(test)]
mod tests;
