//! The columns of an output: those of the inputs, then what came of the image; what they are called, and their types. Pure.

use serde_json::Value;

use super::journal::{Caption, Ended};

/// Put before a name of ours that a column of the inputs has.
const PREFIX: &str = "blipstream_";

/// Type of a column in a table that has types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only nulls so far.
    Unknown,
    Boolean,
    Integer,
    Number,
    /// Also for values of several types, and for lists and objects, which become JSON.
    Text,
}

impl Kind {
    fn of(value: &Value) -> Self {
        match value {
            Value::Null => Self::Unknown,
            Value::Bool(_) => Self::Boolean,
            Value::Number(number) if number.is_i64() => Self::Integer,
            Value::Number(_) => Self::Number,
            _ => Self::Text,
        }
    }

    /// The type that has room for both.
    fn with(self, other: Self) -> Self {
        match (self, other) {
            (Self::Unknown, kind) | (kind, Self::Unknown) => kind,
            (a, b) if a == b => a,
            (Self::Integer, Self::Number) | (Self::Number, Self::Integer) => Self::Number,
            _ => Self::Text,
        }
    }
}

/// A column of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    pub name: String,
    pub kind: Kind,
}

/// What came of an image, in the order of the columns.
const OURS: [(&str, Kind); 13] = [
    ("place", Kind::Text),
    ("text", Kind::Text),
    ("logprob", Kind::Number),
    ("tokens", Kind::Integer),
    ("finish", Kind::Text),
    ("error_code", Kind::Text),
    ("error_message", Kind::Text),
    ("image_sha256", Kind::Text),
    ("image_width", Kind::Integer),
    ("image_height", Kind::Integer),
    ("image_bytes", Kind::Integer),
    ("image_format", Kind::Text),
    ("texts", Kind::Text),
];

/// The columns of all rows that were looked at.
#[derive(Debug, Clone, Default)]
pub struct Columns {
    inputs: Vec<Column>,
    /// Whether an image has several captions: else there is no column `texts`.
    several: bool,
}

impl Columns {
    /// Makes room for a row.
    pub fn add(&mut self, row: &Ended) {
        for (at, (name, value)) in row.cells.0.iter().enumerate() {
            let kind = Kind::of(value);
            // Mostly all rows have the same columns in the same order.
            let found = match self.inputs.get(at) {
                Some(column) if column.name == *name => Some(at),
                _ => self.inputs.iter().position(|column| column.name == *name),
            };
            match found {
                Some(at) => self.inputs[at].kind = self.inputs[at].kind.with(kind),
                None => self.inputs.push(Column { name: name.clone(), kind }),
            }
        }
        self.several |= row.caption.as_ref().is_some_and(|caption| !caption.texts.is_empty());
    }

    /// All columns of the output: those of the inputs in the order in which they came up, then ours.
    pub fn all(&self) -> Vec<Column> {
        let mut all = self.inputs.clone();
        for (name, kind) in OURS.iter().filter(|(name, _)| self.several || *name != "texts") {
            let mut name = (*name).to_owned();
            while all.iter().any(|column| column.name == name) {
                name.insert_str(0, PREFIX);
            }
            all.push(Column { name, kind: *kind });
        }
        all
    }

    /// The values of a row, one for each of [`Self::all`].
    pub fn values(&self, row: Ended) -> Vec<Value> {
        let Ended { place, cells, caption, error, .. } = row;
        let mut cells: Vec<_> = cells.0.into_iter().map(Some).collect();
        let mut values: Vec<Value> = Vec::with_capacity(self.inputs.len() + OURS.len());
        for (at, column) in self.inputs.iter().enumerate() {
            let is_it = |cell: &Option<(String, Value)>| cell.as_ref().is_some_and(|(name, _)| *name == column.name);
            let at = if cells.get(at).is_some_and(is_it) { Some(at) } else { cells.iter().position(is_it) };
            values.push(at.and_then(|at| cells[at].take()).map_or(Value::Null, |(_, value)| value));
        }
        let captioned = caption.is_some();
        let Caption { text, logprob, tokens, finish, texts, image } = caption.unwrap_or_default();
        let given = |value: Value| if captioned { value } else { Value::Null };
        let (code, message) = error.map_or((Value::Null, Value::Null), |e| (e.code.into(), e.message.into()));
        values.extend([
            place.into(),
            given(text.into()),
            // As the f32 that it is.
            logprob.map_or(Value::Null, |logprob| logprob.to_string().parse::<f64>().map_or(Value::Null, Value::from)),
            tokens.into(),
            finish.into(),
            code,
            message,
            given(image.sha256.into()),
            given(image.width.into()),
            given(image.height.into()),
            given(image.bytes.into()),
            given(image.format.into()),
        ]);
        if self.several {
            values.push(if texts.is_empty() { Value::Null } else { texts.into() });
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::cells::Cells;
    use super::*;

    fn row(cells: Value) -> Ended {
        let cells: Cells = serde_json::from_value(cells).unwrap();
        Ended { row: 0, place: "p".into(), second: 0.0, tries: 1, cells, caption: None, error: None }
    }

    fn named(columns: &Columns) -> Vec<(String, Kind)> {
        columns.all().into_iter().map(|column| (column.name, column.kind)).collect()
    }

    #[test]
    fn a_column_of_the_inputs_keeps_its_name_and_ours_gets_a_prefix() {
        let mut columns = Columns::default();
        columns.add(&row(json!({"image": "a", "text": "found", "blipstream_text": 1})));
        let names: Vec<_> = named(&columns).into_iter().map(|(name, _)| name).collect();
        assert!(names.contains(&"blipstream_blipstream_text".to_owned()), "{names:?}");
        assert_eq!(names.iter().filter(|name| *name == "text").count(), 1);
        let values = columns.values(row(json!({"text": "found"})));
        assert_eq!(values.len(), names.len());
    }

    #[test]
    fn types_widen_as_far_as_the_values_need() {
        let mut columns = Columns::default();
        for cells in [
            json!({"a": 1, "b": null, "c": true, "d": 1}),
            json!({"a": 1.5, "b": null, "c": "yes", "d": null, "e": [1]}),
            json!({"a": null, "c": false, "d": u64::MAX}),
        ] {
            columns.add(&row(cells));
        }
        let kinds: Vec<_> = named(&columns).into_iter().take(5).map(|(_, kind)| kind).collect();
        assert_eq!(kinds, [Kind::Number, Kind::Unknown, Kind::Text, Kind::Number, Kind::Text]);
    }

    #[test]
    fn rows_with_other_columns_in_another_order_fill_their_own() {
        let mut columns = Columns::default();
        columns.add(&row(json!({"a": 1, "b": 2})));
        let other: Cells = serde_json::from_str(r#"{"b": 3, "c": 4}"#).unwrap();
        let other = Ended { cells: other, ..row(json!({})) };
        columns.add(&other);
        assert_eq!(columns.values(other)[..3], [Value::Null, 3.into(), 4.into()]);
    }
}
