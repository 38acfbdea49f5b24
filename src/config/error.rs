//! What is wrong with a configuration, all of it.

use std::fmt;
use std::path::PathBuf;

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Compiled in.
    Default,
    /// A configuration file, or the file that holds a secret.
    File {
        /// Its path, as it was given.
        path: PathBuf,
        /// Line in it, from 1.
        line: Option<usize>,
    },
    /// An environment variable.
    Environment(String),
    /// `--set`.
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line: None } => write!(f, "{}", path.display()),
            Self::File { path, line: Some(line) } => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) => f.write_str(name),
            Self::Flag => f.write_str("--set"),
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// Path of the key; empty where a file as a whole is unreadable.
    pub key: String,
    /// Where the value comes from.
    pub origin: Origin,
    /// What is wrong and what to do; never the value of a secret.
    pub message: String,
}

impl ConfigError {
    pub(super) fn new(key: &str, origin: Origin, message: impl Into<String>) -> Self {
        Self { key: key.to_owned(), origin, message: message.into() }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.key.as_str(), &self.origin) {
            ("", origin) => write!(f, "{origin}: {}", self.message),
            (key, origin) => write!(f, "{key} ({origin}): {}", self.message),
        }
    }
}

/// Everything that is wrong with a configuration; never empty. A program that meets it ends with exit code 2.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.text())]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    pub(super) fn new(errors: Vec<ConfigError>) -> Self {
        debug_assert!(!errors.is_empty(), "an error without a reason");
        Self(errors)
    }

    /// The errors: first what could not be read or is unknown, by layer; then wrong values; then contradictions.
    pub fn all(&self) -> &[ConfigError] {
        &self.0
    }

    fn text(&self) -> String {
        let count = self.0.len();
        let mut text = format!("the configuration has {count} {}:", if count == 1 { "error" } else { "errors" });
        for error in &self.0 {
            text.push_str("\n  ");
            // A message of several lines stays under its own bullet.
            text.push_str(&error.to_string().replace('\n', "\n    "));
        }
        text
    }
}
