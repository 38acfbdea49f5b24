//! The rows of a job through a flow in this process.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use anyhow::Context;
use async_channel::{Receiver, Sender};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::job::{End, Job, Open};
use super::journal::{Caption, Failed, Picture};
use super::row::Row;
use crate::command::{leave_at_once, local};
use crate::message::{CaptionRecord, ImageRef, Request, TextSource};
use crate::offsets::Outcome;
use crate::pipeline::{Control, Core, Parts};
use crate::retry::Backoff;
use crate::settings::Settings;
use crate::stage::{Finished, Output};
use crate::tracked::Tracked;

/// How often is looked for lost rows, retries that are due, and a word to say.
const PULSE: Duration = Duration::from_millis(200);
/// Requests on their way into the flow, beside those that it has taken.
const HANDOVER: usize = 4;
/// Batches that wait for each device, the one under way included, beside what is fetched: enough to keep it busy, and few
/// enough to be waited for when the job is stopped.
const AHEAD_OF_DEVICES: usize = 3;
/// What a second signal leaves with, as shells have it.
const SIGNALLED: u8 = 130;

/// A transient failure is tried anew after a wait of up to a second, which doubles, up to a minute.
fn backoff(retries: u32) -> Backoff {
    let (base, max) = (Duration::from_secs(1), Duration::from_secs(60));
    Backoff { attempts: retries.saturating_add(1), base, max }
}

/// Runs rows through the flow until each has ended, or the job is to stop.
///
/// # Errors
/// The flow broke down, or the journal cannot be written. What is done is recorded.
pub fn run(
    settings: &Settings,
    parts: Parts,
    (first, rows): ((u64, Row), Receiver<(u64, Row)>),
    job: &mut Job,
    retries: u32,
) -> anyhow::Result<End> {
    let batches: usize = parts.engines.iter().map(|loaded| loaded.batch_size).sum();
    let local::Flow { runtime, control, core } = local::Flow::start(settings, parts)?;
    let Core { rows: into, finished, failures, device_failures, fetching, endpoint: _ } = core;
    // Nothing fails before the flow but what is recorded at once.
    drop(failures);
    let (asked, requests) = mpsc::channel(HANDOVER);
    let most = settings.fetch.concurrency + AHEAD_OF_DEVICES * batches;
    runtime.spawn(feed(requests, into, control.clone()));
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
    let ended = runtime.block_on(async {
        let ended = driver.run(rows, asked, &finished, &device_failures, &control).await;
        driver.job.sync()?;
        let end = ended?;
        fetching.await.context("the fetch stage panicked")?;
        anyhow::Ok(end)
    });
    // A device that hangs must not keep the process from saying so.
    runtime.shutdown_background();
    ended
}

/// Takes requests into the flow as fast as its budget allows.
async fn feed(
    mut requests: mpsc::Receiver<(i64, Request)>,
    rows: Sender<Tracked<crate::message::Row>>,
    control: Control,
) {
    while let Some((number, request)) = requests.recv().await {
        let permit = control.budget().messages.acquire(size(&request)).await;
        let Some(ticket) = control.ledger().open(&local::arguments(), number) else {
            tracing::error!(number, "a row was numbered twice");
            return;
        };
        let row = Tracked::new(local::row(request, number), ticket, permit);
        if let Err(refused) = rows.send(row).await {
            refused.into_inner().abandon();
            return;
        }
    }
}

/// What a request takes of the memory for messages, in bytes.
fn size(request: &Request) -> usize {
    let inline = match &request.image {
        ImageRef::Base64(text) | ImageRef::Percent(text) => text.len(),
        ImageRef::Http(_) | ImageRef::File(_) | ImageRef::Object(_) => 0,
    };
    inline + request.id.as_ref().map_or(0, String::len)
}

struct Driver<'j> {
    job: &'j mut Job,
    backoff: Backoff,
    /// Most rows in the flow.
    most: usize,
    /// Number of the next try: the rows' numbers would be the same for every try.
    next: i64,
    /// What is in the flow, by the number of its try.
    open: HashMap<i64, Open>,
    /// The next to go in.
    held: Option<(Open, Request)>,
    /// Those that are to be tried anew, by when; the number tells equal times apart.
    later: BTreeMap<(Instant, i64), (Open, Request)>,
    /// Why no more rows are taken, if so.
    stop: Option<End>,
}

impl Driver<'_> {
    /// Drops what leads into the flow at its end, so that the flow ends, too.
    async fn run(
        &mut self,
        rows: Receiver<(u64, Row)>,
        asked: mpsc::Sender<(i64, Request)>,
        finished: &Receiver<Finished>,
        device_failures: &Receiver<crate::stage::infer::DeviceFailure>,
        control: &Control,
    ) -> anyhow::Result<End> {
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
                return Ok(self.stop.unwrap_or(End::Complete));
            }
            let under_way = self.open.len() + self.later.len() + usize::from(self.held.is_some());
            let wants_rows =
                !exhausted && self.held.is_none() && self.open.len() < self.most && self.job.has_room(under_way);
            tokio::select! {
                biased; // a person's wish first, then what is done
                () = any(&mut signals) => self.interrupted(),
                next = finished.recv() => match next {
                    Ok(next) => self.take(next)?,
                    Err(_) => return Err(self.broken_off(device_failures).await),
                },
                Ok(failure) = device_failures.recv() => local::heed(failure, control)?,
                permit = asked.reserve(), if self.held.is_some() => {
                    let permit = permit.context("the flow takes no more images")?;
                    if let Some((open, request)) = self.held.take() {
                        permit.send((self.next, request));
                        self.open.insert(self.next, open);
                        self.next += 1;
                    }
                }
                row = rows.recv(), if wants_rows => match row {
                    Ok((number, row)) => self.begin(number, row)?,
                    Err(_) => exhausted = true,
                },
                _ = pulse.tick() => {
                    if let Some(lost) = control.ledger().take_lost() {
                        anyhow::bail!("{lost}");
                    }
                    self.job.pulse()?;
                }
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

    fn take(&mut self, finished: Finished) -> anyhow::Result<()> {
        let number = finished.offset();
        let output = finished.resolve(Outcome::Published);
        let mut open = self.open.remove(&number).with_context(|| format!("a result of no row ({number})"))?;
        let failure = match output {
            Output::Caption { record, .. } => return self.job.end(open, Ok(caption(*record))),
            Output::FailedMessage { failure, .. } => failure,
            Output::FailedRow(row, failure) => {
                let now = Instant::now();
                let wait = self.backoff.wait(open.tries, None, now, None, fastrand::f64());
                match wait.filter(|_| failure.transient) {
                    Some(wait) => {
                        open.tries += 1;
                        self.later.insert((now + wait, number), (open, row.request));
                        return Ok(());
                    }
                    None => failure,
                }
            }
        };
        self.job.end(open, Err(Failed { code: failure.code.as_str().into(), message: failure.message }))
    }

    fn interrupted(&mut self) {
        if self.stop == Some(End::Interrupted) {
            leave_at_once(SIGNALLED);
        }
        self.stop = Some(End::Interrupted);
        let open = self.open.len();
        self.job.progress.say(&format!("stopping: {open} images are still under way; a second signal ends at once"));
    }

    /// Why the flow ended before its rows did.
    async fn broken_off(&self, device_failures: &Receiver<crate::stage::infer::DeviceFailure>) -> anyhow::Error {
        match device_failures.recv().await {
            Ok(failure) => anyhow::Error::from(failure).context("not every image was captioned"),
            Err(_) => anyhow::anyhow!("the flow ended with {} images under way", self.open.len()),
        }
    }
}

async fn any(signals: &mut [Signal; 2]) {
    let [interrupt, terminate] = signals;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// What is kept of a record.
fn caption(record: CaptionRecord) -> Caption {
    let generated = record.candidates.into_iter().filter(|one| one.source == TextSource::Generated);
    let texts: Vec<String> = generated.map(|one| one.text).collect();
    let image = record.image;
    Caption {
        text: record.text,
        logprob: record.generated.logprob,
        tokens: record.generated.tokens.map(|tokens| tokens as u64),
        finish: record.generated.finish.map(str::to_owned),
        texts: if texts.len() > 1 { texts } else { Vec::new() },
        image: Picture {
            sha256: image.sha256,
            width: image.width.into(),
            height: image.height.into(),
            bytes: image.bytes as u64,
            format: image.format,
        },
    }
}
