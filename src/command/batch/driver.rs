//! The rows of a job on their way to captions, by whichever way: how many at a time, tries, stops.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use async_channel::Receiver;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::job::{End, Job, Open};
use super::journal::{Caption, Failed, Positions};
use super::row::Row;
use crate::command::leave_at_once;
use crate::message::Request;
use crate::retry::Backoff;

/// How often is looked for retries that are due, and a word to say.
const PULSE: Duration = Duration::from_millis(200);
/// Requests on their way to who captions, beside those that it has taken; and results on their way back.
const HANDOVER: usize = 4;
/// What a second signal leaves with, as shells have it.
const SIGNALLED: u8 = 130;

/// A transient failure is tried anew after a wait of up to a second, which doubles, up to a minute.
fn backoff(retries: u32) -> Backoff {
    let (base, max) = (Duration::from_secs(1), Duration::from_secs(60));
    Backoff { attempts: retries.saturating_add(1), base, max }
}

/// A row is to be captioned.
#[derive(Debug)]
pub struct Asked {
    /// Number of the try, another one each time.
    pub number: i64,
    /// Number of the row in the job.
    pub row: u64,
    /// Tries of this row in this run, this one included.
    pub tries: u32,
    pub request: Request,
}

/// What came of a try.
#[derive(Debug)]
pub struct Answered {
    /// [`Asked::number`].
    pub number: i64,
    pub result: Result<Caption, Failure>,
    /// Up to where answers are read; what was handed back before this, and this, is all there is before.
    pub read: Positions,
}

/// Why a try failed.
#[derive(Debug)]
pub struct Failure {
    pub failed: Failed,
    /// The request, where it may go better later.
    pub again: Option<Request>,
}

/// The driver's end of the way that requests go and results come.
pub struct Way {
    asked: mpsc::Sender<Asked>,
    answered: mpsc::Receiver<Answered>,
}

impl Way {
    /// A way, and the end of who captions: once no more requests come, the job is over.
    pub fn new() -> (Self, mpsc::Receiver<Asked>, mpsc::Sender<Answered>) {
        let (asked, requests) = mpsc::channel(HANDOVER);
        let (results, answered) = mpsc::channel(HANDOVER);
        (Self { asked, answered }, requests, results)
    }
}

/// The rows that are not done: the first of them, and where the others come from.
pub type Rows = ((u64, Row), Receiver<(u64, Row)>);

/// Sends rows on their way until each has ended, or the job is to stop; at most so many at a time, and not more than the
/// job has room for. `None` where the way broke off before. What is done is recorded and on the disk in any case.
///
/// # Errors
/// The journal cannot be written.
pub async fn drive(
    job: &mut Job,
    way: Way,
    (first, rows): Rows,
    retries: u32,
    most: usize,
) -> anyhow::Result<Option<End>> {
    let mut driver = Driver {
        job,
        backoff: backoff(retries),
        most,
        next: 0,
        open: HashMap::new(),
        held: None,
        later: BTreeMap::new(),
        stop: None,
    };
    driver.job.begin();
    driver.begin(first.0, first.1)?;
    let ended = driver.run(rows, way).await;
    driver.job.sync()?;
    ended
}

struct Driver<'j> {
    job: &'j mut Job,
    backoff: Backoff,
    /// Most rows on their way.
    most: usize,
    /// Number of the next try: the rows' numbers would be the same for every try.
    next: i64,
    /// What is on its way, by the number of its try.
    open: HashMap<i64, Open>,
    /// The next to go.
    held: Option<(Open, Request)>,
    /// Those that are to be tried anew, by when; the number tells equal times apart.
    later: BTreeMap<(Instant, i64), (Open, Request)>,
    /// Why no more rows are taken, if so.
    stop: Option<End>,
}

impl Driver<'_> {
    /// Drops its end of the way when it is over.
    async fn run(&mut self, rows: Receiver<(u64, Row)>, mut way: Way) -> anyhow::Result<Option<End>> {
        let mut signals = [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?];
        let mut pulse = tokio::time::interval(PULSE);
        let mut exhausted = false;
        loop {
            if self.stop.is_none() && self.job.failed_too_often() {
                self.stop = Some(End::TooManyFailures);
            }
            if self.stop.is_some() {
                // They are not recorded, and so are done when the job goes on.
                (self.held, exhausted) = (None, true);
                self.later.clear();
                rows.close();
            } else if self.held.is_none() {
                self.held = self.due(Instant::now());
            }
            if exhausted && self.held.is_none() && self.later.is_empty() && self.open.is_empty() {
                return Ok(Some(self.stop.unwrap_or(End::Complete)));
            }
            let under_way = self.open.len() + self.later.len() + usize::from(self.held.is_some());
            let wants_rows =
                !exhausted && self.held.is_none() && self.open.len() < self.most && self.job.has_room(under_way);
            tokio::select! {
                biased; // a person's wish first, then what is done
                () = any(&mut signals) => self.interrupted(),
                next = way.answered.recv() => match next {
                    Some(next) => self.take(next)?,
                    None => return Ok(None),
                },
                permit = way.asked.reserve(), if self.held.is_some() => {
                    // Who took them says why not any more.
                    let Ok(permit) = permit else { return Ok(None) };
                    if let Some((open, request)) = self.held.take() {
                        permit.send(Asked { number: self.next, row: open.row, tries: open.tries, request });
                        self.open.insert(self.next, open);
                        self.next += 1;
                    }
                }
                row = rows.recv(), if wants_rows => match row {
                    Ok((number, row)) => self.begin(number, row)?,
                    Err(_) => exhausted = true,
                },
                _ = pulse.tick() => self.job.pulse()?,
            }
        }
    }

    fn begin(&mut self, row: u64, Row { place, cells, request }: Row) -> anyhow::Result<()> {
        match request {
            Ok(request) => self.held = Some((Open { row, place, cells, tries: 1 }, *request)),
            Err(problem) => self.job.refuse(row, place, cells, problem)?,
        }
        Ok(())
    }

    /// The row that is to be tried anew now.
    fn due(&mut self, now: Instant) -> Option<(Open, Request)> {
        let first = self.later.first_entry().filter(|first| first.key().0 <= now)?;
        Some(first.remove())
    }

    fn take(&mut self, Answered { number, result, read }: Answered) -> anyhow::Result<()> {
        let Some(mut open) = self.open.remove(&number) else { anyhow::bail!("a result of no row ({number})") };
        match result {
            Ok(caption) => self.job.end(open, Ok(caption))?,
            Err(Failure { failed, again }) => {
                let now = Instant::now();
                let wait = self.backoff.wait(open.tries, None, now, None, fastrand::f64());
                match (wait, again) {
                    (Some(wait), Some(request)) => {
                        open.tries += 1;
                        self.later.insert((now + wait, number), (open, request));
                    }
                    _ => self.job.end(open, Err(failed))?,
                }
            }
        }
        // Not before: what is passed over here is not read again.
        self.job.read(read);
        Ok(())
    }

    fn interrupted(&mut self) {
        if self.stop == Some(End::Interrupted) {
            leave_at_once(SIGNALLED);
        }
        self.stop = Some(End::Interrupted);
        let open = self.open.len();
        self.job.progress.say(&format!("stopping: {open} images are still under way; a second signal ends at once"));
    }
}

async fn any(signals: &mut [Signal; 2]) {
    let [interrupt, terminate] = signals;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
