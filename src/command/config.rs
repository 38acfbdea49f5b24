//! `blipstream config`: what the settings are, where each comes from, and the schema of the file.

use std::io::{self, Write};

use serde_json::{Map, json};

use crate::config::{ConfigErrors, ConfigOptions, Entry, Origin, schema};

/// Prints the effective configuration and where each value comes from.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct ConfigArgs {
    /// What to print; the effective values without one
    #[command(subcommand)]
    pub action: Option<ConfigAction>,

    /// Where the configuration comes from.
    #[command(flatten)]
    pub options: ConfigOptions,

    /// Print JSON: for each key its value (null if it is not set) and its origin
    #[arg(long)]
    pub json: bool,
}

/// What `blipstream config` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::Subcommand)]
pub enum ConfigAction {
    /// Prints the JSON Schema of the configuration file
    Schema,
}

/// Why nothing, or not all, was printed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigCommandError {
    /// The configuration is wrong: exit code 2.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// The output broke: exit code 1.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// Runs the command.
pub fn run(args: &ConfigArgs, out: &mut dyn Write) -> Result<(), ConfigCommandError> {
    if args.action == Some(ConfigAction::Schema) {
        return Ok(writeln!(out, "{:#}", schema())?);
    }
    let loaded = args.options.load()?;
    let print = if args.json { print_json } else { print_text };
    Ok(print(&loaded.entries(), out)?)
}

/// Sections as in the file, values aligned, each with its origin as a comment: the output is itself a valid file,
/// except for hidden secrets.
pub fn print_text(entries: &[Entry], out: &mut dyn Write) -> io::Result<()> {
    let lines: Vec<(&Entry, String)> = entries.iter().map(|entry| (entry, assignment(entry))).collect();
    // A long list should not push every comment out of the window.
    let width = lines.iter().map(|(_, line)| line.chars().count()).filter(|&width| width <= 60).max().unwrap_or(0);
    let mut section = "";
    for (entry, line) in &lines {
        if entry.section != section {
            let gap = if section.is_empty() { "" } else { "\n" };
            writeln!(out, "{gap}[{}]", entry.section)?;
            section = &entry.section;
        }
        writeln!(out, "{line:width$}  # {}", entry.origin)?;
    }
    Ok(())
}

fn assignment(entry: &Entry) -> String {
    let name = entry.path.strip_prefix(&entry.section).and_then(|rest| rest.strip_prefix('.')).unwrap_or(&entry.path);
    // An entry of a map: its own name may have dots.
    let name = match name.split_once('.') {
        Some((map, entry)) => format!("{map}.{}", quoted(entry)),
        None => name.to_owned(),
    };
    match &entry.value {
        Some(value) => format!("{name} = {value}"),
        None => format!("# {name} is not set"),
    }
}

/// A key between quotation marks, with the escapes of TOML (1.0, strings).
fn quoted(key: &str) -> String {
    let escaped: String = key
        .chars()
        .map(|letter| match letter {
            '"' | '\\' => format!("\\{letter}"),
            letter if letter.is_control() => format!("\\u{:04X}", u32::from(letter)),
            letter => letter.to_string(),
        })
        .collect();
    format!("\"{escaped}\"")
}

/// `{"section.key": {"value": …, "origin": {…}}}`.
pub fn print_json(entries: &[Entry], out: &mut dyn Write) -> io::Result<()> {
    let describe = |origin: &Origin| match origin {
        Origin::Default => json!({"kind": "default"}),
        Origin::File { path, line } => json!({"kind": "file", "path": path, "line": line}),
        Origin::Environment(name) => json!({"kind": "environment", "name": name}),
        Origin::Flag => json!({"kind": "flag", "name": "--set"}),
    };
    let object: Map<_, _> = entries
        .iter()
        .map(|entry| (entry.path.clone(), json!({"value": entry.value, "origin": describe(&entry.origin)})))
        .collect();
    writeln!(out, "{:#}", serde_json::Value::Object(object))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_of_options_are_printed_so_that_they_read_back() {
        for name in ["a.b", "a b", "\"", "\\", "\u{7f}", "\0", "\n", "\u{85}", "\u{200b}", "ü", "'", ""] {
            let table: toml::Table = toml::from_str(&format!("{} = 1", quoted(name))).unwrap();
            assert!(table.contains_key(name), "{name:?} reads back as {table:?}");
        }
    }
}
