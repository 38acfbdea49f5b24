//! The job under way: what ended is recorded, and whether the job may go on.

use std::collections::HashSet;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use async_channel::{Receiver, bounded};

use super::cells::Cells;
use super::index::Done;
use super::journal::{Caption, Ended, Failed, Journal, Positions, merge};
use super::progress::Progress;
use super::row::{Problem, Row};
use super::sources::Sources;
use crate::command::submit::request::{Bad, Parcel};
use crate::disposition::Code;

/// Rows read ahead; each may hold an image.
const AHEAD: usize = 4;
/// What is recorded is on the disk after so long, however few rows it is.
const SYNC: Duration = Duration::from_secs(5);
/// Most columns of all inputs together: objects with ever new fields are no table.
const MOST_COLUMNS: usize = 2_000;

/// How a run over the rows ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Every row ended.
    Complete,
    /// By a signal.
    Interrupted,
    /// More rows failed than allowed.
    TooManyFailures,
}

/// A row on its way.
#[derive(Debug)]
pub struct Open {
    /// Its number in the job.
    pub row: u64,
    /// Where it stands in the inputs.
    pub place: String,
    /// Its columns.
    pub cells: Cells,
    /// Tries begun.
    pub tries: u32,
}

/// The job.
pub struct Job {
    /// What is done.
    pub journal: Journal,
    /// Tells of it.
    pub progress: Progress,
    /// `--mini-batch-size`: most rows that are under way, or not on the disk.
    pub window: u64,
    /// `--error-threshold`; `None` for any number.
    pub threshold: Option<u64>,
    begun: Instant,
    synced: Instant,
    /// Up to where answers are read, beyond what is noted of it.
    read: Positions,
}

impl Job {
    pub fn new(journal: Journal, progress: Progress, window: u64, threshold: Option<u64>) -> Self {
        let now = Instant::now();
        Self { journal, progress, window, threshold, begun: now, synced: now, read: Positions::new() }
    }

    /// From now on time counts: the model is loaded.
    pub fn begin(&mut self) {
        self.begun = Instant::now();
        self.progress.begin();
    }

    /// Whether one more row may be under way beside so many.
    pub fn has_room(&self, under_way: usize) -> bool {
        (under_way as u64) + self.journal.unsynced() < self.window
    }

    /// A row ended.
    pub fn end(&mut self, open: Open, result: Result<Caption, Failed>) -> anyhow::Result<()> {
        let (caption, error) = match result {
            Ok(caption) => (Some(caption), None),
            Err(error) => (None, Some(error)),
        };
        let Open { row, place, cells, tries } = open;
        let second = self.journal.earlier() + self.begun.elapsed().as_secs_f64();
        let second = (second * 1e3).round() / 1e3;
        let ended = Ended { row, place, second, tries: tries.max(1), cells, caption, error };
        self.journal.record(&ended).context("cannot write the journal")?;
        if self.journal.unsynced() >= (self.window / 2).max(1) {
            self.sync()?;
        }
        Ok(())
    }

    /// A row that cannot be tried.
    pub fn refuse(&mut self, row: u64, place: String, cells: Cells, problem: Problem) -> anyhow::Result<()> {
        let Problem { code, message } = problem;
        let failed = Failed { code: code.as_str().into(), message };
        self.end(Open { row, place, cells, tries: 1 }, Err(failed))
    }

    /// What has to be done now and then.
    pub fn pulse(&mut self) -> anyhow::Result<()> {
        if self.journal.unsynced() > 0 && self.synced.elapsed() >= SYNC {
            self.sync()?;
        }
        let index = self.journal.index();
        self.progress.show(index.done(), index.failed());
        Ok(())
    }

    /// Answers are read up to here, and what came of them is recorded.
    pub fn read(&mut self, read: Positions) {
        merge(&mut self.read, read);
    }

    /// Puts on the disk what is recorded.
    pub fn sync(&mut self) -> anyhow::Result<()> {
        self.synced = Instant::now();
        let read = std::mem::take(&mut self.read);
        let noted = if read.is_empty() { Ok(()) } else { self.journal.note_read(read) };
        noted.and_then(|()| self.journal.sync()).context("cannot write the journal")
    }

    /// Whether more rows failed than allowed.
    pub fn failed_too_often(&self) -> bool {
        self.threshold.is_some_and(|most| self.journal.index().failed() > most)
    }
}

/// Rows with their numbers in the job.
pub type Numbered = Receiver<(u64, Row)>;

/// Reads the rows that are not done on a thread of its own, which returns how many rows there are in all, or what the system
/// could not read; the receiver closes behind the last one.
///
/// What could not be read is no row: the next time rows may stand there, and all behind would have other numbers.
///
/// With `parcel`, local files are read, too.
pub fn read_rows(
    sources: Arc<Sources>,
    done: Done,
    parcel: Option<Parcel>,
) -> io::Result<(Numbered, JoinHandle<Result<u64, Bad>>)> {
    let (sender, receiver) = bounded(AHEAD);
    let reader = std::thread::Builder::new().name("inputs".into()).spawn(move || {
        let mut columns = HashSet::new();
        let (mut rows, mut unread) = (0, None);
        // It breaks off where nobody wants more.
        let _ = sources.read(&mut |row| {
            let row = match row {
                Err(bad) if bad.unread => {
                    unread = Some(bad);
                    return ControlFlow::Break(());
                }
                row => row.unwrap_or_else(Row::from),
            };
            let number = rows;
            rows += 1;
            let row = limit_columns(row, &mut columns);
            if done.has(number) {
                return ControlFlow::Continue(());
            }
            let row = match parcel {
                Some(parcel) => row.packed(parcel),
                None => row,
            };
            match sender.send_blocking((number, row)) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        });
        unread.map_or(Ok(rows), Err)
    })?;
    Ok((receiver, reader))
}

/// Refuses a row that would be the one column too many.
fn limit_columns(mut row: Row, columns: &mut HashSet<String>) -> Row {
    for (name, _) in &row.cells.0 {
        if columns.contains(name) {
            continue;
        }
        if columns.len() == MOST_COLUMNS {
            let why = format!("the field {name}: the inputs have more than {MOST_COLUMNS} columns together");
            row.request = Err(Problem::new(Code::BadMessage, why));
            row.cells = Cells::default();
            break;
        }
        columns.insert(name.clone());
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::batch::row::Rows;
    use crate::message::RequestParams;

    #[test]
    fn an_input_that_cannot_be_read_ends_the_rows_and_gives_its_number_to_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let inputs = ["a.txt", "b.txt", "c.txt"].map(|name| folder.path().join(name).display().to_string());
        for input in &inputs {
            std::fs::write(input, "http://h.example/a.png\nno reference\n").unwrap();
        }
        let rows = Rows { column: None, params: RequestParams::default(), max_body: 1000 };
        let sources = Arc::new(Sources::new(&inputs, rows).unwrap());
        std::fs::remove_file(&inputs[1]).unwrap();
        let (rows, reader) = read_rows(sources, Done::default(), None).unwrap();
        let read: Vec<_> =
            std::iter::from_fn(|| rows.recv_blocking().ok()).map(|(number, row)| (number, row.place)).collect();
        assert_eq!(read, [(0, format!("{}:1", inputs[0])), (1, format!("{}:2", inputs[0]))]);
        let unread = reader.join().unwrap().unwrap_err();
        assert!(unread.place == inputs[1] && unread.why.contains("cannot be read"), "{unread}");
    }
}
