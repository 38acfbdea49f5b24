//! From text and TOML to the form that the settings are read from.

use toml::Value;

use super::keys::{Key, Keys, Kind};

/// A value given as text, by a variable or a flag: TOML where the key is no text and it parses, the text otherwise.
pub(super) fn from_text(key: &Key, text: &str) -> Value {
    let parsed = || ValueText(text).parse();
    let value = match key.kind {
        Kind::Text => None,
        // `a,b` is no TOML, but `1,2` and `a` might be: only brackets say that a list is meant.
        Kind::List(_) => parsed().filter(Value::is_array),
        Kind::Map => parsed().filter(Value::is_table),
        Kind::Number | Kind::Switch => parsed(),
    };
    value.unwrap_or_else(|| Value::String(text.to_owned()))
}

struct ValueText<'a>(&'a str);

impl ValueText<'_> {
    fn parse(&self) -> Option<Value> {
        let deserializer = toml::de::ValueDeserializer::parse(self.0.trim()).ok()?;
        serde::Deserialize::deserialize(deserializer).ok()
    }
}

/// Allows the short forms: `a,b` for a list, a text for a table with one required key.
pub(super) fn expand(key: &Key, value: Value) -> Value {
    let Kind::List(only) = &key.kind else { return value };
    let elements = match value {
        Value::String(text) => {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            parts.map(|part| Value::String(part.to_owned())).collect()
        }
        Value::Array(elements) => elements,
        other => return other,
    };
    let table = |element: Value| match (only, element) {
        (Some(name), Value::String(text)) => Value::Table([(name.clone(), Value::String(text))].into_iter().collect()),
        (_, element) => element,
    };
    Value::Array(elements.into_iter().map(table).collect())
}

/// The entries of a map as paths with a text each. Names with dots may be quoted or not.
pub(super) fn entries(path: &str, value: Value, found: &mut Vec<(String, Value)>) {
    match value {
        Value::Table(table) => {
            for (name, value) in table {
                entries(&format!("{path}.{name}"), value, found);
            }
        }
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) => {
            found.push((path.to_owned(), Value::String(value.to_string())));
        }
        other => found.push((path.to_owned(), other)),
    }
}

/// Puts a value where its key stands in a document.
pub(super) fn insert(document: &mut toml::Table, keys: &Keys, path: &str, value: Value) {
    let Some(key) = keys.find(path) else { return };
    let section = document.entry(key.section.clone()).or_insert_with(|| Value::Table(toml::Table::new()));
    let Value::Table(section) = section else { return };
    let entry = path.strip_prefix(&key.path).and_then(|rest| rest.strip_prefix('.'));
    let Some(entry) = entry else {
        section.insert(key.name.clone(), value);
        return;
    };
    let map = section.entry(key.name.clone()).or_insert_with(|| Value::Table(toml::Table::new()));
    if let Value::Table(map) = map {
        map.insert(entry.to_owned(), value);
    }
}

/// The error in a person's words.
pub(super) fn explain(error: &toml::de::Error, value: &Value) -> String {
    let message = error.message();
    match value {
        _ if message.contains("parsable string") => format!("{value} is no size; write it like \"64MiB\" or \"500kB\""),
        _ if message.contains("a duration") => format!("{value} is no duration; write it like \"250ms\" or \"5s\""),
        _ => message.trim().to_owned(),
    }
}
