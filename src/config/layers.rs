//! The layers over the defaults: files, environment, flags. Each replaces what lies below, key by key.

use std::ffi::OsString;
use std::path::Path;

use serde::Deserialize;
use toml::Spanned;
use toml::Value;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Origin};
use super::keys::{self, Keys, Kind, PREFIX};
use super::{Given, GivenMap, value};
use crate::settings::owned_option;

/// Collects what is given, the last one winning, and what is wrong with it.
pub(super) struct Layers<'a> {
    keys: &'a Keys,
    pub(super) given: GivenMap,
    errors: &'a mut Vec<ConfigError>,
}

impl<'a> Layers<'a> {
    pub(super) fn new(keys: &'a Keys, errors: &'a mut Vec<ConfigError>) -> Self {
        Self { keys, given: GivenMap::new(), errors }
    }

    fn fail(&mut self, key: &str, origin: &Origin, message: impl Into<String>) {
        self.errors.push(ConfigError::new(key, origin.clone(), message));
    }

    /// A TOML file.
    pub(super) fn file(&mut self, path: &Path) {
        let at = |line| Origin::File { path: path.to_owned(), line };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => return self.fail("", &at(None), format!("cannot read this configuration file: {error}")),
        };
        let line = |offset: usize| text.get(..offset).map(|before| before.matches('\n').count() + 1);
        let (document, errors) = DeTable::parse_recoverable(&text);
        for error in &errors {
            self.fail("", &at(error.span().and_then(|span| line(span.start))), error.message());
        }
        if !errors.is_empty() {
            return;
        }
        for (section, value) in document.into_inner() {
            let name = section.get_ref();
            let origin = at(line(section.span().start));
            if matches!(value.get_ref(), DeValue::Table(table) if !table.is_empty() || self.keys.is_section(name)) {
                self.section(name, value, |offset| at(line(offset)));
            } else if self.keys.is_section(name) {
                self.fail(name, &origin, format!("is a section: write [{name}]"));
            } else {
                self.unknown(name, &origin);
            }
        }
    }

    fn section(&mut self, section: &str, value: Spanned<DeValue<'_>>, at: impl Fn(usize) -> Origin) {
        let DeValue::Table(table) = value.into_inner() else { return };
        for (name, value) in table {
            let path = format!("{section}.{}", name.get_ref());
            let origin = at(name.span().start);
            match Value::deserialize(toml::de::ValueDeserializer::from(value)) {
                Ok(value) => self.give(&path, value, &origin),
                Err(error) => self.fail(&path, &origin, error.message()),
            }
        }
    }

    /// `BLIPSTREAM_SECTION__KEY`.
    pub(super) fn environment(&mut self, variables: impl IntoIterator<Item = (OsString, OsString)>) {
        let named = variables.into_iter().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        let mut ours: Vec<(String, OsString)> = named.filter(|(name, _)| name.starts_with(PREFIX)).collect();
        // The order of an environment is an accident; errors and ties should not be.
        ours.sort();
        for (name, text) in ours {
            self.variable(&name, text);
        }
    }

    fn variable(&mut self, name: &str, text: OsString) {
        let origin = Origin::Environment(name.to_owned());
        let rest = name.strip_prefix(PREFIX).unwrap_or(name).to_lowercase();
        let Some((section, rest)) = rest.split_once("__") else {
            // Kubernetes adds variables of its own for a service named blipstream (BLIPSTREAM_PORT, …): only what
            // would be a key but for an underscore is taken for a mistake.
            let meant = self.keys.all().iter().find(|key| key.path.replace('.', "_") == rest);
            if let Some((path, variable)) = meant.map(|key| (key.path.clone(), key.variable())) {
                self.fail(&path, &origin, format!("section and key are joined by two underscores: {variable}"));
            }
            return;
        };
        // An entry of a map: librdkafka's names have dots where a variable has underscores.
        let path = match rest.split_once("__") {
            Some((name, entry)) => format!("{section}.{name}.{}", entry.replace('_', ".")),
            None => format!("{section}.{rest}"),
        };
        let Ok(text) = text.into_string() else {
            return self.fail(&path, &origin, "the value is not UTF-8");
        };
        // An empty variable is how `${NAME:-}` of a compose file or a manifest says "not set".
        if !text.is_empty() {
            self.text(&path, &text, &origin);
        }
    }

    /// `section.key=value`.
    pub(super) fn assignment(&mut self, assignment: &str) {
        match assignment.split_once('=') {
            Some((path, text)) => self.text(path.trim(), text, &Origin::Flag),
            // The text is not repeated: it may be a secret whose key was forgotten.
            None => self.fail("", &Origin::Flag, "write --set section.key=value"),
        }
    }

    fn text(&mut self, path: &str, text: &str, origin: &Origin) {
        match self.keys.find(path) {
            Some(key) if key.kind == Kind::Map && key.path != path => {
                self.give(path, Value::String(text.to_owned()), origin);
            }
            Some(key) => self.give(path, value::from_text(key, text), origin),
            None => self.unknown(path, origin),
        }
    }

    fn give(&mut self, path: &str, value: Value, origin: &Origin) {
        let Some(key) = self.keys.find(path) else { return self.unknown(path, origin) };
        let mut found = Vec::new();
        if key.kind == Kind::Map && (key.path != path || value.is_table()) {
            value::entries(path, value, &mut found);
        } else {
            found.push((path.to_owned(), value::expand(key, value)));
        }
        let map = key.path.clone();
        for (path, value) in found {
            let name = path.strip_prefix(&map).and_then(|rest| rest.strip_prefix('.'));
            if let Some(message) = name.and_then(owned_option) {
                self.fail(&path, origin, message);
            } else {
                self.given.insert(path, Given { value, origin: origin.clone() });
            }
        }
    }

    fn unknown(&mut self, path: &str, origin: &Origin) {
        let hint = self.keys.nearest(path).map(|key| match origin {
            Origin::Environment(_) => keys::variable(&key.path),
            _ => key.path.clone(),
        });
        let message = match hint {
            Some(hint) => format!("there is no such key; did you mean {hint}?"),
            None => "there is no such key; `blipstream config` lists all of them".to_owned(),
        };
        self.fail(path, origin, message);
    }
}
