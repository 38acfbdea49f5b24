//! The table of `docs/faults.md`: one line a run, replaced when the run is repeated.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blipstream::settings::Delivery;

use crate::rows::{ROWS, Row};
use crate::run::Outcome;

/// Where the lines begin.
const HEAD: &str = "| fault | delivery | seed | ids | lost | duplicates | recovery | memory | felt by | on |\n\
                    |---|---|---:|---:|---:|---:|---:|---:|---|---|\n";

/// What names a run: its place in the table, too.
pub type Key = (usize, &'static str, u64);

/// The table, as it is on disk.
pub struct Record {
    file: PathBuf,
    /// What stands before the table.
    text: String,
    lines: BTreeMap<Key, String>,
}

/// The name of a mode.
pub fn mode_name(mode: Delivery) -> &'static str {
    match mode {
        Delivery::AtLeastOnce => "at least once",
        Delivery::ExactlyOnce => "exactly once",
    }
}

impl Record {
    /// Reads the table.
    pub fn open(file: &Path) -> Self {
        let page = std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let (text, table) = page.split_once(HEAD).expect("the page has the table");
        let lines = table.lines().filter_map(|line| Some((key(line)?, line.to_owned()))).collect();
        Self { file: file.to_owned(), text: text.to_owned(), lines }
    }

    /// Forgets all runs.
    pub fn clear(&mut self) {
        self.lines.clear();
    }

    /// Whether a run has passed.
    pub fn has(&self, key: &Key) -> bool {
        self.lines.contains_key(key)
    }

    /// Writes the line of a run that has passed, or takes the one away of a run that has not.
    pub fn set(&mut self, key: Key, outcome: &Outcome) {
        if outcome.problems.is_empty() {
            self.lines.insert(key, line(&key, outcome));
        } else {
            self.lines.remove(&key);
        }
        let lines: Vec<_> = self.lines.values().map(String::as_str).chain([""]).collect();
        std::fs::write(&self.file, format!("{}{HEAD}{}", self.text, lines.join("\n"))).unwrap();
    }
}

fn line(&(row, mode, seed): &Key, outcome: &Outcome) -> String {
    let recovery = outcome.recovery.map_or("none".into(), |recovery| format!("{:.1} s", recovery.as_secs_f64()));
    format!(
        "| {} | {mode} | {seed} | {} | {} | {} | {recovery} | {} MiB | {} | {}, {} |",
        ROWS[row].what,
        outcome.ids,
        outcome.lost,
        outcome.duplicates,
        outcome.memory >> 20,
        outcome.evidence,
        jiff::Zoned::now().date(),
        env!("CARGO_PKG_VERSION"),
    )
}

fn key(line: &str) -> Option<Key> {
    let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
    let row = ROWS.iter().position(|row: &Row| row.what == cells[0])?;
    let modes = [Delivery::AtLeastOnce, Delivery::ExactlyOnce].map(mode_name);
    let mode = modes.into_iter().find(|mode| cells.get(1) == Some(mode))?;
    Some((row, mode, cells.get(2)?.parse().ok()?))
}
