//! From bytes to requests: one message becomes one row, or several, or a failure.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Instant;

use async_channel::{Receiver, Sender};
use jiff::Timestamp;

use super::{Finished, Output, send};
use crate::disposition::{Code, Failure, Stage};
use crate::message::{Message, ParseError, ParsedRow, Request, Row, Timing, parse};
use crate::metrics::Metrics;
use crate::offsets::Outcome;
use crate::tracked::Tracked;

/// Messages longer than this are parsed on a thread of the blocking pool, so that a message of megabytes, which takes
/// tens of milliseconds, does not hold up the fetches of others. Below it the costliest ones, lists of nothing but
/// digits and tables of a thousand addresses, take two or three milliseconds; handing work over takes some 20 µs.
const LARGE_MESSAGE: usize = 64 * 1024;

/// The stage. Several may run on clones of the same channels; each message is taken by one.
#[derive(Debug, Clone)]
pub struct Parse {
    /// Messages with their tickets; they have a payload.
    pub input: Receiver<Tracked<Message>>,
    /// Rows to fetch.
    pub rows: Sender<Tracked<Row>>,
    /// Rows and messages that failed.
    pub finished: Sender<Finished>,
    /// Longest message, in bytes with its key and headers.
    pub max_bytes: usize,
    /// Most rows of one message.
    pub max_rows: usize,
    /// Counts how long each message took, and apart from that how long the next stages were waited for.
    pub metrics: Arc<Metrics>,
}

/// What a row of a message is.
// Lives for as long as it takes to be sent on: boxing would cost more than the moves.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
enum Parted {
    Row(Row),
    Failed(Output),
}

impl Parse {
    /// Runs until the input is closed and empty, or the next stage is gone.
    pub async fn run(self) {
        while let Ok(message) = self.input.recv().await {
            if !self.take(message).await {
                // The tickets that are dropped with the input are reported by the ledger.
                tracing::error!("parsing ends, since the stage behind it has ended first");
                return;
            }
        }
    }

    /// Whether there is somebody to take what became of the message.
    async fn take(&self, message: Tracked<Message>) -> bool {
        let began = Instant::now();
        let message = message.map(Arc::new);
        let (size, limit) = (message.value.size(), self.max_bytes);
        let parsed = if size > limit {
            Err(ParseError::TooLarge { size, limit })
        } else {
            parse_aside(message.value.clone(), self.max_rows).await
        };
        let parted = part(&message.value, parsed, Timestamp::now());
        self.metrics.stage(Stage::Parse, began.elapsed());
        let parts = match message.split(parted) {
            Ok(parts) => parts,
            Err(tag) => {
                tag.resolve(Outcome::Skipped);
                return true;
            }
        };
        for part in parts {
            let (value, tag) = part.part();
            let sent = match value {
                Parted::Row(row) => self.send(&self.rows, Tracked::join(row, tag)).await,
                Parted::Failed(output) => self.send(&self.finished, Tracked::join(output, tag)).await,
            };
            if !sent {
                return false;
            }
        }
        true
    }

    async fn send<T>(&self, to: &Sender<T>, value: T) -> bool {
        send(to, value, Stage::Parse, &self.metrics).await.is_ok()
    }
}

/// Parses, large messages aside.
async fn parse_aside(message: Arc<Message>, max_rows: usize) -> Result<Vec<ParsedRow>, ParseError> {
    if message.size() <= LARGE_MESSAGE {
        return parse(&message, max_rows);
    }
    let aside = message.clone();
    match tokio::task::spawn_blocking(move || parse(&aside, max_rows)).await {
        Ok(parsed) => parsed,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // The runtime is ending and takes no more work aside.
            Err(_) => parse(&message, max_rows),
        },
    }
}

/// Makes rows of what was parsed: gives each its identity, and fails those that are too late.
fn part(message: &Arc<Message>, parsed: Result<Vec<ParsedRow>, ParseError>, now: Timestamp) -> Vec<Parted> {
    let whole = |error: ParseError| {
        let failure = Failure::new(Stage::Parse, &error);
        Parted::Failed(Output::FailedMessage { message: message.clone(), index: None, native: None, failure })
    };
    let parsed = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return vec![whole(error)],
    };
    let only = parsed.len() == 1;
    let one = |(position, row): (usize, ParsedRow)| match row {
        Ok(request) => in_time(row_of(message, request, position, only), now),
        Err((error, _)) if only => whole(error),
        Err((error, native)) => {
            let failure = Failure::new(Stage::Parse, &error);
            Parted::Failed(Output::FailedMessage { message: message.clone(), index: Some(position), native, failure })
        }
    };
    parsed.into_iter().enumerate().map(one).collect()
}

fn row_of(message: &Arc<Message>, request: Request, position: usize, only: bool) -> Row {
    let origin = message.origin_of((!only).then_some(position));
    // A replayed row keeps the position that it had in its first message.
    let index = origin.index.unwrap_or(position);
    Row { message: message.clone(), request, origin, index, only, timing: Timing::default() }
}

fn in_time(row: Row, now: Timestamp) -> Parted {
    match row.request.deadline {
        Some(deadline) if deadline <= now => {
            let text = format!("the deadline {deadline} had passed before the image was fetched");
            let failure = Failure::with_message(Stage::Parse, Code::Deadline, text);
            Parted::Failed(Output::FailedRow(Box::new(row), failure))
        }
        _ => Parted::Row(row),
    }
}

#[cfg(test)]
mod tests;
