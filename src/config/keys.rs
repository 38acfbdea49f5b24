//! The known keys, read off the schema of [`Settings`].

use std::fmt;
use std::marker::PhantomData;

use bytesize::ByteSize;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value as Json;
use toml::Value;

use crate::settings::Settings;

/// Beginning of the environment variables that set keys.
pub const PREFIX: &str = "BLIPSTREAM_";

/// How alike a suggestion has to be, from 0 to 1. Below it, a suggestion would be a guess.
const ALIKE: f64 = 0.6;

/// What a value looks like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Text, and what is written as text: durations, sizes, addresses, paths, names of a choice.
    Text,
    /// A number.
    Number,
    /// `true` or `false`.
    Switch,
    /// A list. An element that is a plain text stands for a table with this one key, where there is one.
    List(Option<String>),
    /// Free names with a text each.
    Map,
}

/// A key of the configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    /// `section.name`.
    pub path: String,
    /// The section.
    pub section: String,
    /// The name in it.
    pub name: String,
    /// What its value looks like.
    pub kind: Kind,
    /// What it is for.
    pub help: String,
    /// The compiled-in value; `None` for a key that is not set by default.
    pub default: Option<Value>,
    /// Whether its value is never shown: so it is for every key `x` beside an `x_file`.
    pub secret: bool,
}

impl Key {
    /// The environment variable that sets it.
    pub fn variable(&self) -> String {
        variable(&self.path)
    }
}

pub(super) fn variable(path: &str) -> String {
    format!("{PREFIX}{}", path.replacen('.', "__", 1).replace('.', "_").to_uppercase())
}

pub(super) fn file_key(path: &str) -> String {
    format!("{path}_file")
}

/// The JSON Schema of a configuration file.
pub fn schema() -> Json {
    schemars::schema_for!(Settings).to_value()
}

/// All known keys.
#[derive(Debug, Clone)]
pub struct Keys(Vec<Key>);

impl Default for Keys {
    fn default() -> Self {
        Self::new()
    }
}

impl Keys {
    /// Reads the keys off the schema, in the order of the sections.
    pub fn new() -> Self {
        let schema = schema();
        let mut keys = Vec::new();
        for (section, defaults) in defaults() {
            let shapes = &resolve(&schema, &schema["properties"][&section])["properties"];
            for (name, default) in &defaults {
                let shape = &shapes[name];
                keys.push(Key {
                    path: format!("{section}.{name}"),
                    section: section.clone(),
                    name: name.clone(),
                    kind: kind(&schema, shape),
                    help: shape["description"].as_str().unwrap_or_default().to_owned(),
                    default: default.as_ref().map(tidy),
                    secret: shapes.get(file_key(name)).is_some(),
                });
            }
        }
        Self(keys)
    }

    /// Every key.
    pub fn all(&self) -> &[Key] {
        &self.0
    }

    /// The key that `path` names, or whose entry it names.
    pub fn find(&self, path: &str) -> Option<&Key> {
        self.0.iter().find(|key| match path.strip_prefix(&key.path) {
            Some("") => true,
            Some(rest) => key.kind == Kind::Map && rest.starts_with('.'),
            None => false,
        })
    }

    /// Whether the value of `path` must not be shown.
    pub fn is_secret(&self, path: &str) -> bool {
        let secret_option = |name: &str| ["password", "secret", "token", ".pem"].iter().any(|part| name.contains(part));
        self.find(path).is_some_and(|key| key.secret || (key.path != path && secret_option(path)))
    }

    /// Whether there is such a section.
    pub fn is_section(&self, name: &str) -> bool {
        self.0.iter().any(|key| key.section == name)
    }

    /// The key that was probably meant: the same name in another section, or the one written most alike.
    pub fn nearest(&self, path: &str) -> Option<&Key> {
        let name = path.rsplit('.').next().unwrap_or(path);
        let score = |key: &Key| {
            let whole = strsim::normalized_damerau_levenshtein(&key.path, path);
            let misplaced = strsim::normalized_damerau_levenshtein(&key.name, name) - 0.01;
            whole.max(misplaced)
        };
        // Of equals the first: the sections of the flow stand before those beside it.
        let scored = self.0.iter().rev().map(|key| (score(key), key)).filter(|(score, _)| *score >= ALIKE);
        scored.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, key)| key)
    }
}

/// The keys of a section with their defaults.
type Defaults = Vec<(String, Option<Value>)>;

/// Sections and keys in the order of the structs, which a schema does not keep, each with its default.
fn defaults() -> Vec<(String, Defaults)> {
    let text = serde_json::to_string(&Settings::default());
    // The settings are a structure of plain values: it has a JSON form, and that reads back.
    let sections: Result<InOrder<InOrder<Option<Value>>>, _> = text.and_then(|text| serde_json::from_str(&text));
    sections.map(|sections| sections.0.into_iter().map(|(name, keys)| (name, keys.0)).collect()).unwrap_or_default()
}

/// An object whose names keep their order.
struct InOrder<V>(Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for InOrder<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for Names<V> {
            type Value = InOrder<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut found = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    found.push(entry);
                }
                Ok(InOrder(found))
            }
        }

        deserializer.deserialize_map(Names(PhantomData))
    }
}

/// A size as a person writes it: `16MiB` for the `16.0 MiB` of its type.
fn tidy(value: &Value) -> Value {
    match value.as_str() {
        Some(text) if text.parse::<ByteSize>().is_ok() => Value::String(text.replace(".0 ", "")),
        _ => value.clone(),
    }
}

fn resolve<'a>(root: &'a Json, shape: &'a Json) -> &'a Json {
    let pointer = shape["$ref"].as_str().and_then(|reference| reference.strip_prefix('#'));
    pointer.and_then(|pointer| root.pointer(pointer)).unwrap_or(shape)
}

fn kind(root: &Json, shape: &Json) -> Kind {
    let shape = resolve(root, shape);
    // An optional value has the types `[…, "null"]`.
    let types = shape["type"].as_array().and_then(|types| types.first()).unwrap_or(&shape["type"]);
    match types.as_str() {
        Some("integer" | "number") => Kind::Number,
        Some("boolean") => Kind::Switch,
        Some("array") => {
            let required = resolve(root, &shape["items"])["required"].as_array();
            let only = required.filter(|required| required.len() == 1).and_then(|required| required[0].as_str());
            Kind::List(only.map(str::to_owned))
        }
        Some("object") => Kind::Map,
        _ => Kind::Text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_every_key_of_the_settings_and_its_kind() {
        let keys = Keys::new();
        let kind = |path: &str| keys.find(path).map(|key| key.kind.clone());
        assert_eq!(kind("flow.max_rows"), Some(Kind::Number));
        assert_eq!(kind("flow.pause_at"), Some(Kind::Number));
        assert_eq!(kind("output.full_url"), Some(Kind::Switch));
        assert_eq!(kind("batch.linger"), Some(Kind::Text));
        assert_eq!(kind("log.format"), Some(Kind::Text));
        assert_eq!(kind("kafka.sasl_password"), Some(Kind::Text));
        assert_eq!(kind("kafka.inputs"), Some(Kind::List(Some("topic".into()))));
        assert_eq!(kind("fetch.file_roots"), Some(Kind::List(None)));
        assert_eq!(kind("kafka.options"), Some(Kind::Map));
        assert_eq!(kind("kafka.options.fetch.wait.max.ms"), Some(Kind::Map));
        assert_eq!(kind("kafka"), None);
        assert_eq!(kind("flow.max_rows.more"), None);
        let sections: Vec<&str> = {
            let mut sections: Vec<&str> = keys.all().iter().map(|key| key.section.as_str()).collect();
            sections.dedup();
            sections
        };
        assert_eq!(
            sections,
            [
                "kafka", "flow", "fetch", "decode", "model", "filter", "answerer", "canary", "batch", "output",
                "endpoint", "admin", "log"
            ]
        );
        assert!(keys.all().iter().all(|key| !key.help.is_empty()));
        let schema = schema();
        let properties = |shape: &Json| resolve(&schema, shape)["properties"].as_object().cloned().unwrap_or_default();
        let in_schema: usize = properties(&schema).values().map(|section| properties(section).len()).sum();
        assert_eq!(keys.all().len(), in_schema, "a key of the schema is not known");
    }

    #[test]
    fn secrets_are_the_keys_that_a_file_can_hold() {
        let keys = Keys::new();
        let secrets: Vec<&str> = keys.all().iter().filter(|key| key.secret).map(|key| key.path.as_str()).collect();
        assert_eq!(secrets, ["kafka.sasl_password", "endpoint.token", "admin.token"]);
        assert!(keys.is_secret("kafka.options.ssl.key.password"));
        assert!(!keys.is_secret("kafka.options.fetch.wait.max.ms"));
    }

    #[test]
    fn suggests_what_was_probably_meant_and_nothing_wild() {
        let keys = Keys::new();
        let nearest = |path: &str| keys.nearest(path).map(|key| key.path.as_str());
        assert_eq!(nearest("kafka.bootstrap_server"), Some("kafka.bootstrap_servers"));
        assert_eq!(nearest("kafak.group_id"), Some("kafka.group_id"));
        assert_eq!(nearest("flow.max_body"), Some("fetch.max_body"));
        assert_eq!(nearest("max_rows"), Some("flow.max_rows"));
        assert_eq!(nearest("weather.sunshine"), None);
    }
}
