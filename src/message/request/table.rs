//! The table form of the model card: columns, and one row for each image.

use std::borrow::Cow;

use super::forms::Reader;
use super::json::{Fields, Json};
use super::{ParseError, ParsedRow, native};
use crate::message::redact::quote;

/// Columns that are fields of a request; every other column goes into `meta`.
const COLUMNS: [&str; 8] = ["image", "id", "prompt", "params", "text", "questions", "tasks", "deadline"];

/// Fields of the native form that would be silently without effect beside a table.
const MISPLACED: [&str; 6] = ["prompt", "params", "text", "questions", "tasks", "deadline"];

/// Reads the rows of `input`, the `input_data` of `message`.
pub(super) fn read(reader: &Reader<'_>, message: &Fields<'_>, input: &Json<'_>) -> Result<Vec<ParsedRow>, ParseError> {
    refuse_misplaced(reader, message)?;
    let Json::Object(input) = input else { return Err(expected(reader, "input_data", "an object", input)) };
    let columns = columns(reader, input)?;
    let rows = list(reader, input, "data")?;
    if rows.len() > reader.max_rows {
        let (rows, limit) = (rows.len(), reader.max_rows);
        return Err(error(
            reader,
            &format!("input_data.data: {rows} rows; at most {limit} are allowed in one message"),
        ));
    }
    if input.get("index").is_some() {
        let index = list(reader, input, "index")?.len();
        if index != rows.len() {
            let rows = rows.len();
            return Err(error(reader, &format!("input_data.index: {index} values for {rows} rows of data")));
        }
    }
    let cells = rows.iter().enumerate().map(|(at, row)| cells(reader, columns.len(), at, row));
    let cells = cells.collect::<Result<Vec<_>, _>>()?;
    Ok(cells.into_iter().enumerate().map(|(at, cells)| row(reader, &columns, at, cells)).collect())
}

/// An empty object is what generic clients of the card's form send.
fn refuse_misplaced(reader: &Reader<'_>, message: &Fields<'_>) -> Result<(), ParseError> {
    let empty = |value: &Json<'_>| matches!(value, Json::Object(fields) if fields.0.is_empty());
    match MISPLACED.iter().find(|name| message.get(name).is_some_and(|value| !empty(value))) {
        None => Ok(()),
        Some(name) => {
            let place = reader.place;
            Err(ParseError::Params(format!("{place}{name}: has no effect beside `input_data`; make it a column")))
        }
    }
}

fn columns<'j>(reader: &Reader<'_>, input: &'j Fields<'_>) -> Result<Vec<&'j str>, ParseError> {
    let mut names: Vec<&str> = Vec::new();
    for (at, name) in list(reader, input, "columns")?.iter().enumerate() {
        let place = format!("input_data.columns[{at}]");
        let Json::Text(name) = name else { return Err(expected(reader, &place, "a string", name)) };
        names.push(name);
    }
    let mut sorted = names.clone();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(error(reader, &format!("input_data.columns: {} stands there twice", quote(twice[0]))));
    }
    if !names.contains(&"image") {
        let hint = native::nearest("image", names.iter().copied());
        let hint = hint.map_or_else(String::new, |name| format!("; did you mean it by {name}?"));
        return Err(error(reader, &format!("input_data.columns: the column `image` is missing{hint}")));
    }
    Ok(names)
}

fn cells<'j, 'a>(
    reader: &Reader<'_>,
    columns: usize,
    at: usize,
    row: &'j Json<'a>,
) -> Result<&'j [Json<'a>], ParseError> {
    let place = format!("input_data.data[{at}]");
    let cells = match row {
        Json::List(cells) => cells,
        // A table of one column may be a list of its values, as pandas has it.
        Json::Text(_) if columns == 1 => std::slice::from_ref(row),
        _ => return Err(expected(reader, &place, "a list", row)),
    };
    if cells.len() != columns {
        let found = cells.len();
        return Err(error(reader, &format!("{place}: {found} values for {columns} columns")));
    }
    Ok(cells)
}

fn row(reader: &Reader<'_>, columns: &[&str], at: usize, cells: &[Json<'_>]) -> ParsedRow {
    let (mut fields, mut meta) = (Vec::new(), Vec::new());
    for (&name, cell) in columns.iter().zip(cells).filter(|(_, cell)| **cell != Json::Null) {
        let of = if COLUMNS.contains(&name) { &mut fields } else { &mut meta };
        of.push((Cow::Borrowed(name), cell.clone()));
    }
    if !meta.is_empty() {
        fields.push((Cow::Borrowed("meta"), Json::Object(Fields(meta))));
    }
    let fields = Fields(fields);
    let place = format!("{}input_data.data[{at}].", reader.place);
    native::read(reader.source, &fields, &place)
        .map_err(|error| (error, Some(serde_json::to_vec(&fields).expect("JSON is always JSON").into())))
}

fn list<'j, 'a>(reader: &Reader<'_>, input: &'j Fields<'a>, name: &str) -> Result<&'j [Json<'a>], ParseError> {
    let place = format!("input_data.{name}");
    match input.get(name) {
        Some(Json::List(items)) => Ok(items),
        Some(other) => Err(expected(reader, &place, "a list", other)),
        None => Err(error(reader, &format!("{place}: missing"))),
    }
}

fn expected(reader: &Reader<'_>, place: &str, expected: &str, found: &Json<'_>) -> ParseError {
    error(reader, &format!("{place}: expected {expected}, found {}", found.kind()))
}

fn error(reader: &Reader<'_>, what: &str) -> ParseError {
    ParseError::Message(format!("{}{what}", reader.place))
}
