//! What is done of a job, in a file beside its output: the identity of the job, and a line for each row that ended.
//!
//! Lines are only ever added. The last line of a row is its result; a torn last line, which a crash leaves, is dropped.
//! Whoever writes holds the lock of the file.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::cells::Cells;
use super::identity::Identity;
use super::index::{Index, State};

/// The end of a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// Number of the row in the job, from 0.
    pub row: u64,
    /// Where it stands in the inputs.
    pub place: String,
    /// When it ended: seconds of work on the job, over all runs.
    pub second: f64,
    /// Tries made.
    pub tries: u32,
    /// The columns of the input.
    pub cells: Cells,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption: Option<Caption>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<Failed>,
}

/// A caption, and what it describes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Caption {
    pub text: String,
    pub logprob: Option<f32>,
    pub tokens: Option<u64>,
    pub finish: Option<String>,
    /// All captions, where more than one was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub texts: Vec<String>,
    pub image: Picture,
}

/// What [`Caption::texts`] is of the captions that were generated.
pub fn several(generated: impl Iterator<Item = String>) -> Vec<String> {
    let texts: Vec<String> = generated.collect();
    if texts.len() > 1 { texts } else { Vec::new() }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Picture {
    pub sha256: String,
    pub width: u64,
    pub height: u64,
    pub bytes: u64,
    pub format: String,
}

/// Why there is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    pub code: String,
    pub message: String,
}

/// Up to where topics are read: for each partition the offset of the next record.
pub type Positions = BTreeMap<String, BTreeMap<i32, i64>>;

/// What happened to the job as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mark {
    /// All rows ended, and the output was written.
    Finished,
    /// All rows ended, and no output was asked for.
    Summarised,
    /// More rows failed than allowed.
    Stopped,
    /// The failed rows are open again.
    Retry,
}

/// A line, as far as it is needed to go on.
#[derive(Deserialize)]
struct Head {
    row: Option<u64>,
    #[serde(default)]
    second: f64,
    error: Option<IgnoredAny>,
    mark: Option<Mark>,
    read: Option<Positions>,
}

/// Why a journal cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("another process works on this job: {} is locked", .0.display())]
    Locked(PathBuf),
    #[error(
        "{} is the journal of another job ({}). Name another --output, or begin anew with --restart, which gives up its \
         results", .0.display(), .1.join("; ")
    )]
    OtherJob(PathBuf, Vec<String>),
    #[error(
        "line {line} of the journal {} is damaged ({why}), and others follow; --restart begins anew", file.display()
    )]
    Damaged { file: PathBuf, line: u64, why: String },
    #[error("{}", .0.display())]
    Io(PathBuf, #[source] io::Error),
}

/// The open journal of a job.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    length: u64,
    unsynced: u64,
    index: Index,
    mark: Option<Mark>,
    id: String,
    /// How often failed rows were opened again.
    round: u32,
    read: Positions,
    /// Seconds of work in earlier runs.
    earlier: f64,
    /// When the last row ended, on the same clock.
    latest: f64,
}

impl Journal {
    /// Where the journal of an output lies.
    pub fn path_of(output: &Path) -> PathBuf {
        let mut name = output.as_os_str().to_owned();
        name.push(".journal.jsonl");
        name.into()
    }

    /// Opens the journal of a job, or begins one; `restart` gives up what an earlier one has.
    ///
    /// # Errors
    /// It is locked, of another job, damaged, or cannot be read or written.
    pub fn open(path: &Path, identity: &Identity, restart: bool) -> Result<Self, JournalError> {
        let failed = |error| JournalError::Io(path.to_owned(), error);
        let file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::Locked(path.to_owned())),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let mut journal = Self {
            path: path.to_owned(),
            file,
            length: 0,
            unsynced: 0,
            index: Index::default(),
            mark: None,
            id: format!("{:016x}", fastrand::u64(..)),
            round: 0,
            read: Positions::new(),
            earlier: 0.0,
            latest: 0.0,
        };
        if !restart {
            journal.read(identity)?;
            journal.earlier = journal.latest;
        }
        // A torn line, or all of what is given up.
        journal.file.set_len(journal.length).map_err(|error| journal.failed(error))?;
        if journal.length == 0 {
            let begin = Begin { id: journal.id.clone(), job: identity };
            journal.write(&begin).and_then(|()| journal.sync()).map_err(|e| journal.failed(e))?;
            let folder = journal.path.parent().filter(|folder| !folder.as_os_str().is_empty());
            File::open(folder.unwrap_or(Path::new("."))).and_then(|f| f.sync_all()).map_err(|e| journal.failed(e))?;
        }
        Ok(journal)
    }

    fn failed(&self, error: io::Error) -> JournalError {
        JournalError::Io(self.path.clone(), error)
    }

    fn read(&mut self, identity: &Identity) -> Result<(), JournalError> {
        let failed = |error| JournalError::Io(self.path.clone(), error);
        let mut reader = BufReader::with_capacity(1 << 20, &self.file);
        let mut line = Vec::new();
        let mut damaged = None;
        for number in 1.. {
            line.clear();
            reader.read_until(b'\n', &mut line).map_err(failed)?;
            if line.last() != Some(&b'\n') {
                break;
            }
            if let Some((line, why)) = damaged {
                return Err(JournalError::Damaged { file: self.path.clone(), line, why });
            }
            if number == 1 {
                match serde_json::from_slice::<Begun>(&line) {
                    Ok(begun) => {
                        let differences = identity.differences(&begun.job);
                        if !differences.is_empty() {
                            return Err(JournalError::OtherJob(self.path.clone(), differences));
                        }
                        self.id = begun.id;
                    }
                    Err(error) => {
                        return Err(JournalError::Damaged { file: self.path.clone(), line: 1, why: error.to_string() });
                    }
                }
            } else {
                match serde_json::from_slice::<Head>(&line) {
                    Ok(Head { row: Some(row), second, error, .. }) => {
                        let state = if error.is_some() { State::Failed } else { State::Captioned };
                        self.index.set(row, self.length, state);
                        self.latest = self.latest.max(second);
                        self.mark = self.mark.filter(|mark| *mark == Mark::Retry);
                    }
                    Ok(Head { read: Some(read), .. }) => merge(&mut self.read, read),
                    Ok(Head { mark, .. }) => {
                        if mark == Some(Mark::Retry) {
                            self.index.reopen_failed();
                            self.round += 1;
                        }
                        self.mark = mark;
                    }
                    // What a crash of the machine left of the last line.
                    Err(error) => {
                        damaged = Some((number, error.to_string()));
                        continue;
                    }
                }
            }
            self.length += line.len() as u64;
        }
        Ok(())
    }

    fn write(&mut self, line: &impl Serialize) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        if let Err(error) = self.file.write_all(&bytes) {
            // A piece of a line may stand at the end, but not before others.
            self.file.set_len(self.length)?;
            return Err(error);
        }
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Notes the end of a row. The system has it when this returns, the disk after the next [`Self::sync`].
    pub fn record(&mut self, ended: &Ended) -> io::Result<()> {
        let at = self.length;
        self.write(ended)?;
        self.unsynced += 1;
        let state = if ended.error.is_some() { State::Failed } else { State::Captioned };
        self.index.set(ended.row, at, state);
        self.latest = self.latest.max(ended.second);
        self.mark = self.mark.filter(|mark| *mark == Mark::Retry);
        Ok(())
    }

    /// Sees to it that a crash of the machine loses nothing that was recorded.
    pub fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        self.unsynced = 0;
        Ok(())
    }

    /// Notes what happened to the job as a whole, on the disk.
    pub fn mark(&mut self, mark: Mark) -> io::Result<()> {
        #[derive(Serialize)]
        struct Marked {
            mark: Mark,
        }
        self.write(&Marked { mark })?;
        self.sync()?;
        if mark == Mark::Retry {
            self.index.reopen_failed();
            self.round += 1;
        }
        self.mark = Some(mark);
        Ok(())
    }

    /// Notes up to where topics are read. Whatever came of what was read before has to be recorded before.
    pub fn note_read(&mut self, read: Positions) -> io::Result<()> {
        #[derive(Serialize)]
        struct Noted<'r> {
            read: &'r Positions,
        }
        self.write(&Noted { read: &read })?;
        merge(&mut self.read, read);
        Ok(())
    }

    /// Up to where topics were read, as it was noted last; nothing for a job that never read any.
    pub fn was_read(&self) -> &Positions {
        &self.read
    }

    /// Tells this job from all others, those with the same inputs among them.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How often failed rows were opened again.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// Opens the failed rows again, unless a retry is under way already. Returns how many rows are open for a retry.
    pub fn retry_failed(&mut self) -> io::Result<u64> {
        if self.mark != Some(Mark::Retry) && self.index.failed() > 0 {
            self.mark(Mark::Retry)?;
        }
        Ok(self.index.reopened())
    }

    /// Rows recorded since the last [`Self::sync`].
    pub fn unsynced(&self) -> u64 {
        self.unsynced
    }

    /// What is known of every row.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Whether all rows ended.
    pub fn is_finished(&self) -> bool {
        matches!(self.mark, Some(Mark::Finished | Mark::Summarised))
    }

    /// Whether the output was written since; one that is there may be an earlier job's otherwise.
    pub fn is_written(&self) -> bool {
        self.mark == Some(Mark::Finished)
    }

    /// Seconds of work in earlier runs.
    pub fn earlier(&self) -> f64 {
        self.earlier
    }

    /// Seconds of work until the last row ended, over all runs.
    pub fn seconds(&self) -> f64 {
        self.latest
    }

    /// The result of every row, in their order.
    pub fn results(&self) -> io::Result<impl Iterator<Item = io::Result<Ended>>> {
        // A handle of its own, since positions are shared by clones.
        let mut reader = BufReader::with_capacity(1 << 18, File::open(&self.path)?);
        let (mut at, mut line) = (0i64, Vec::new());
        Ok(self.index.offsets().map(move |offset| {
            reader.seek_relative(offset as i64 - at)?;
            line.clear();
            let read = reader.read_until(b'\n', &mut line)?;
            at = offset as i64 + read as i64;
            Ok(serde_json::from_slice(&line)?)
        }))
    }
}

#[derive(Serialize)]
struct Begin<'a> {
    id: String,
    job: &'a Identity,
}

#[derive(Deserialize)]
struct Begun {
    id: String,
    job: Identity,
}

/// Moves on those positions that `newer` has.
pub fn merge(read: &mut Positions, newer: Positions) {
    for (topic, partitions) in newer {
        read.entry(topic).or_default().extend(partitions);
    }
}

#[cfg(test)]
mod tests;
