//! A folder that jobs of `blipstream batch` work in.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::images::png;
use super::ran::Ran;

/// Far beyond what any job here needs, so that one that hangs fails its test.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A folder that a job works in.
pub struct Place {
    pub folder: TempDir,
}

impl Place {
    pub fn new() -> Self {
        Self { folder: TempDir::new().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, data: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// A list of so many pictures, each another one.
    pub fn list(&self, name: &str, count: u32) {
        let mut list = "number,image\n".to_owned();
        for number in 0..count {
            self.write(&format!("images/{number}.png"), png(16 + number / 256, 16, (number % 256) as u8));
            writeln!(list, "{number},images/{number}.png").unwrap();
        }
        self.write(name, list);
    }

    pub fn batch(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blipstream"));
        command.arg("batch").args(arguments).current_dir(self.folder.path()).env_clear();
        if !["--model", "--kafka"].iter().any(|flag| arguments.contains(flag)) {
            command.args(["--model", "demo"]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Ran {
        finish(self.batch(arguments).spawn().unwrap())
    }

    /// The rows of an output of JSON lines.
    pub fn rows(&self, name: &str) -> Vec<Value> {
        self.read(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Results in the journal.
    pub fn recorded(&self, output: &str) -> usize {
        let Ok(file) = File::open(self.path(&format!("{output}.journal.jsonl"))) else { return 0 };
        BufReader::new(file).lines().filter(|line| line.as_ref().unwrap().starts_with("{\"row\":")).count()
    }

    pub fn until_recorded(&self, output: &str, rows: usize) {
        let begun = Instant::now();
        while self.recorded(output) < rows {
            assert!(begun.elapsed() < LIMIT, "{} of {rows} rows", self.recorded(output));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Waits for the end of a command.
pub fn finish(child: Child) -> Ran {
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    Ran::of(receiver.recv_timeout(LIMIT).expect("the command hangs").unwrap())
}

/// Sends a signal, e.g. `-TERM`.
pub fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}
