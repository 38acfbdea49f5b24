//! The rows of a job through a flow in this process.

use std::time::Duration;

use anyhow::Context;
use async_channel::{Receiver, Sender};
use tokio::sync::mpsc;

use super::driver::{Answered, Asked, Failure, Rows, Way, drive};
use super::job::{End, Job};
use super::journal::{Caption, Failed, Picture, Positions, several};
use crate::command::local;
use crate::message::{CaptionRecord, Row, TextSource};
use crate::offsets::Outcome;
use crate::pipeline::{Control, Core, Parts};
use crate::settings::Settings;
use crate::stage::infer::DeviceFailure;
use crate::stage::{Finished, Output};
use crate::tracked::Tracked;

/// How often is looked for lost rows.
const PULSE: Duration = Duration::from_millis(200);
/// Batches that wait for each device, the one under way included, beside what is fetched: enough to keep it busy, and few
/// enough to be waited for when the job is stopped.
const AHEAD_OF_DEVICES: usize = 3;

/// Runs rows through the flow until each has ended, or the job is to stop.
///
/// # Errors
/// The flow broke down, or the journal cannot be written. What is done is recorded.
pub fn run(settings: &Settings, parts: Parts, rows: Rows, job: &mut Job, retries: u32) -> anyhow::Result<End> {
    let batches: usize = parts.engines.iter().map(|loaded| loaded.batch_size).sum();
    let local::Flow { runtime, control, core } = local::Flow::start(settings, parts)?;
    let Core { rows: into, finished, failures, device_failures, fetching, endpoint: _ } = core;
    // Nothing fails before the flow but what is recorded at once.
    drop(failures);
    let (way, requests, results) = Way::new();
    let most = settings.fetch.concurrency + AHEAD_OF_DEVICES * batches;
    runtime.spawn(feed(requests, into, control.clone()));
    let answering = runtime.spawn(answer(finished, device_failures, control, results));
    let ended = runtime.block_on(async {
        if let Some(end) = drive(job, way, rows, retries, most).await? {
            fetching.await.context("the fetch stage panicked")?;
            return Ok(end);
        }
        answering.await.context("what takes the results panicked")??;
        anyhow::bail!("the flow ended with images under way")
    });
    // A device that hangs must not keep the process from saying so.
    runtime.shutdown_background();
    ended
}

/// Takes requests into the flow as fast as its budget allows.
async fn feed(mut requests: mpsc::Receiver<Asked>, rows: Sender<Tracked<Row>>, control: Control) {
    while let Some(Asked { number, request, .. }) = requests.recv().await {
        let permit = control.budget().messages.acquire(local::size(&request)).await;
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

/// Hands back what comes out of the flow.
///
/// # Errors
/// Why the flow ended before its rows did.
async fn answer(
    finished: Receiver<Finished>,
    device_failures: Receiver<DeviceFailure>,
    control: Control,
    results: mpsc::Sender<Answered>,
) -> anyhow::Result<()> {
    let mut pulse = tokio::time::interval(PULSE);
    loop {
        tokio::select! {
            biased; // what is finished is handed back before anything is given up
            next = finished.recv() => {
                let Ok(next) = next else { break };
                if results.send(answered(next)).await.is_err() {
                    return Ok(());
                }
            }
            Ok(failure) = device_failures.recv() => local::heed(failure, &control)?,
            _ = pulse.tick() => if let Some(lost) = control.ledger().take_lost() {
                anyhow::bail!("{lost}");
            },
        }
    }
    match device_failures.recv().await {
        Ok(failure) => Err(failure).context("not every image was captioned"),
        Err(_) => Ok(()),
    }
}

fn answered(finished: Finished) -> Answered {
    let number = finished.offset();
    let (failure, again) = match finished.resolve(Outcome::Published) {
        Output::Caption { record, .. } => {
            return Answered { number, result: Ok(caption(*record)), read: Positions::new() };
        }
        Output::Canary { .. } => unreachable!("a canary without a stream"),
        Output::FailedMessage { failure, .. } => (failure, None),
        Output::FailedRow(row, failure) => {
            let again = failure.transient.then_some(row.request);
            (failure, again)
        }
    };
    let failed = Failed { code: failure.code.as_str().into(), message: failure.message };
    Answered { number, result: Err(Failure { failed, again }), read: Positions::new() }
}

/// What is kept of a record.
fn caption(record: CaptionRecord) -> Caption {
    let generated = record.candidates.into_iter().filter(|one| one.source == TextSource::Generated);
    let image = record.image;
    Caption {
        text: record.text,
        logprob: record.generated.logprob,
        tokens: record.generated.tokens.map(|tokens| tokens as u64),
        finish: record.generated.finish.map(str::to_owned),
        texts: several(generated.map(|one| one.text)),
        image: Picture {
            sha256: image.sha256,
            width: image.width.into(),
            height: image.height.into(),
            bytes: image.bytes as u64,
            format: image.format,
        },
    }
}
