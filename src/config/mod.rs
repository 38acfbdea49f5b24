//! Configuration: defaults < files < environment < `--set`, to validated [`Settings`] and the origin of each value.
//!
//! Nothing here keeps a list of keys: they, their kinds and their help come from the schema of [`Settings`]. Every
//! problem is collected, so that a person mends a configuration in one go. `config/blipstream.toml` is for users.
//!
//! Why not the crate `config`: it merges values and hands them to serde, which stops at the first error. Here each value
//! keeps its origin (file and line, variable, flag) for `blipstream config` and for error texts, and all errors are told
//! at once.

mod error;
mod keys;
mod layers;
mod paths;
mod validate;
mod value;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;
use toml::Value;

use crate::settings::Settings;

pub use error::{ConfigError, ConfigErrors, Origin};
pub use keys::{Key, Keys, Kind, PREFIX, schema};

/// What stands in the place of a secret.
pub const HIDDEN: &str = "***";

/// Where the configuration comes from: flattened into every command that reads it.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ConfigOptions {
    /// Configuration file (TOML). May be given several times: later files win, key by key
    #[arg(long = "config", value_name = "FILE", env = "BLIPSTREAM_CONFIG")]
    pub files: Vec<PathBuf>,

    /// Sets one key, over files and environment, e.g. `--set fetch.concurrency=32`. May be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
}

impl ConfigOptions {
    /// Reads the files, the process's environment and the flags.
    pub fn load(&self) -> Result<Loaded, ConfigErrors> {
        self.load_with(std::env::vars_os())
    }

    /// The same with an environment of the caller's; variables that do not begin with [`PREFIX`] are ignored.
    pub fn load_with(
        &self,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Loaded, ConfigErrors> {
        let keys = Keys::new();
        let mut errors = Vec::new();
        let mut layers = layers::Layers::new(&keys, &mut errors);
        for file in &self.files {
            layers.file(file);
        }
        layers.environment(environment);
        for assignment in &self.set {
            layers.assignment(assignment);
        }
        let mut given = layers.given;
        read_secret_files(&keys, &mut given, &mut errors);
        let settings = to_settings(&keys, &given, &mut errors);
        // Where a value could not be read, its default stands in; judging that one would only confuse.
        let file_unread = |error: &ConfigError| error.key.is_empty() && matches!(error.origin, Origin::File { .. });
        if !errors.iter().any(file_unread) {
            let unread: BTreeSet<String> = errors.iter().map(|error| error.key.clone()).collect();
            let problems = validate::settings(&settings).into_iter().chain(paths::settings(&settings));
            let judged = problems.filter(|problem| !problem.keys.iter().any(|key| unread.contains(key)));
            errors.extend(judged.map(|problem| problem.into_error(&given)));
        }
        if errors.is_empty() { Ok(Loaded { settings, given, keys }) } else { Err(ConfigErrors::new(errors)) }
    }
}

/// A value that somebody gave, and where.
#[derive(Debug, Clone)]
pub(crate) struct Given {
    value: Value,
    origin: Origin,
}

/// By the path of the key; an entry of a map has a path of its own (`kafka.options.fetch.wait.max.ms`).
type GivenMap = BTreeMap<String, Given>;

/// `x_file` is the file that `x` is read from; its trailing line end is no part of the secret.
fn read_secret_files(keys: &Keys, given: &mut GivenMap, errors: &mut Vec<ConfigError>) {
    for key in keys.all().iter().filter(|key| key.secret) {
        let file_key = keys::file_key(&key.path);
        let Some(Given { value: Value::String(path), origin }) = given.get(&file_key).cloned() else { continue };
        let mut fail = |message: String| errors.push(ConfigError::new(&file_key, origin.clone(), message));
        if let Some(other) = given.get(&key.path) {
            fail(format!("{} is set too ({}); keep one of the two", key.path, other.origin));
            continue;
        }
        match std::fs::read_to_string(&path) {
            Err(error) => fail(format!("cannot read {path}: {error}")),
            Ok(text) if text.trim().is_empty() => fail(format!("{path} is empty; it should hold the secret")),
            Ok(text) => {
                let value = Value::String(text.trim_end_matches(['\n', '\r']).to_owned());
                given.insert(key.path.clone(), Given { value, origin: Origin::File { path: path.into(), line: None } });
            }
        }
    }
}

/// Reads every value by itself, so that each error names its key and all of them are found.
fn to_settings(keys: &Keys, given: &GivenMap, errors: &mut Vec<ConfigError>) -> Settings {
    let mut good = toml::Table::new();
    for (path, Given { value, origin }) in given {
        let mut one = toml::Table::new();
        value::insert(&mut one, keys, path, value.clone());
        match Settings::deserialize(Value::Table(one)) {
            Ok(_) => value::insert(&mut good, keys, path, value.clone()),
            Err(error) => {
                let message =
                    if keys.is_secret(path) { "must be a text".into() } else { value::explain(&error, value) };
                errors.push(ConfigError::new(path, origin.clone(), message));
            }
        }
    }
    // Each value was accepted alone, and no section relates two values in its form.
    Settings::deserialize(Value::Table(good)).unwrap_or_else(|error| {
        errors.push(ConfigError::new("", Origin::Default, error.message().to_owned()));
        Settings::default()
    })
}

/// Validated settings, and where each value comes from.
#[derive(Clone)]
pub struct Loaded {
    /// The settings.
    pub settings: Settings,
    given: GivenMap,
    keys: Keys,
}

/// One effective value, fit for printing.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Path of the key.
    pub path: String,
    /// Section of the key.
    pub section: String,
    /// The value; [`HIDDEN`] for a secret, `None` for an optional key that is not set.
    pub value: Option<Value>,
    /// Where it comes from.
    pub origin: Origin,
}

impl Loaded {
    /// Where the value of a key comes from.
    pub fn origin(&self, path: &str) -> &Origin {
        self.given.get(path).map_or(&Origin::Default, |given| &given.origin)
    }

    /// Every effective value in the order of the sections; an entry of a map is a line of its own.
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        for key in self.keys.all() {
            let inner = format!("{}.", key.path);
            let members = self.given.range(inner.clone()..).take_while(|(path, _)| path.starts_with(&inner));
            let before = entries.len();
            entries.extend(members.map(|(path, given)| self.entry(key, path, Some(given))));
            if entries.len() == before {
                entries.push(self.entry(key, &key.path, self.given.get(&key.path)));
            }
        }
        entries
    }

    fn entry(&self, key: &Key, path: &str, given: Option<&Given>) -> Entry {
        let value = given.map(|given| &given.value).or(key.default.as_ref());
        let shown = |value: &Value| if self.keys.is_secret(path) { HIDDEN.into() } else { value.clone() };
        let origin = given.map_or(Origin::Default, |given| given.origin.clone());
        Entry { path: path.to_owned(), section: key.section.clone(), value: value.map(shown), origin }
    }

    /// What is allowed but probably not meant, in a sentence each; for the log.
    pub fn warnings(&self) -> Vec<String> {
        validate::warnings(&self.settings)
    }
}

impl fmt::Debug for Loaded {
    // By hand, since the settings hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let values = self.entries().into_iter().map(|entry| (entry.path, (entry.value, entry.origin)));
        f.debug_map().entries(values).finish()
    }
}
