//! The handle of the consumer's thread: what it is told, and what it tells.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::oneshot;
use tokio::time::{Duration, Instant, timeout_at};

use crate::kafka::Error;
use crate::offsets::Ledger;

/// Most time for the last commit and for leaving the group together; what is not done by then is left undone.
pub const CLOSE: Duration = Duration::from_secs(6);

/// What the consumer is doing, for `/status`, `/readyz` and metrics.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ConsumeStatus {
    /// Whether the group has settled with this worker in it, be it without a partition.
    pub joined: bool,
    /// Brokers that are connected.
    pub brokers_up: usize,
    /// The newest error that librdkafka reported, if things have not been well again since.
    pub last_error: Option<String>,
    /// When the partitions were looked at: a tenth of a second ago at most, unless the consumer waits for the brokers.
    pub as_of: Option<Timestamp>,
    /// Partitions that are ours.
    pub partitions: Vec<PartitionStatus>,
    /// Messages taken from each topic, tombstones included.
    pub messages: BTreeMap<String, u64>,
    /// Messages without a value; they ask for nothing.
    pub tombstones: u64,
    /// Messages that came again after a seek, or that come again: of partitions that were leaving, or behind one that was
    /// turned away.
    pub skipped: u64,
    /// Assignments and revocations.
    pub rebalances: u64,
    /// Partitions that were read anew because they were silent.
    pub reseeks: u64,
    /// Commits that failed.
    pub failed_commits: u64,
    /// Bytes of messages that wait for room, outside of the pools; a little more than 1 MiB, or one long message.
    pub held_bytes: usize,
    /// Bytes that librdkafka has read ahead; a second old at most.
    pub prefetched_bytes: u64,
}

/// What a partition is doing.
#[derive(Debug, Clone, Serialize)]
pub struct PartitionStatus {
    /// Topic.
    pub topic: String,
    /// Partition.
    pub partition: i32,
    /// Whether its delivery is paused.
    pub paused: bool,
    /// Whether its end was reached.
    pub at_end: bool,
    /// Messages behind the watermark, resolved or not, if the length of the log is known.
    pub lag: Option<u64>,
    /// Offset that the group has.
    pub committed: Option<i64>,
    /// The first offset that is not resolved, or the one behind the newest: what is committed next.
    pub watermark: Option<i64>,
    /// Offsets from the watermark to the newest consumed; at `flow.max_span` the partition rests.
    pub span: u64,
    /// Messages consumed and not resolved.
    pub open: usize,
    /// Up to this offset, exclusive, messages are taken one at a time: workers keep dying here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_at_a_time_until: Option<i64>,
}

/// How far the end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Messages are taken.
    Running = 0,
    /// No messages are taken; the group is kept.
    Stopping = 1,
    /// The last commit, then out.
    Closing = 2,
}

/// What the thread and its handle share.
#[derive(Debug, Default)]
pub(super) struct Control {
    phase: AtomicU8,
    at_end: AtomicBool,
    status: Mutex<ConsumeStatus>,
}

impl Control {
    pub(super) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Running,
            1 => Phase::Stopping,
            _ => Phase::Closing,
        }
    }

    pub(super) fn advance(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
    }

    pub(super) fn set_at_end(&self, at_end: bool) {
        self.at_end.store(at_end, Ordering::SeqCst);
    }

    pub(super) fn status(&self) -> MutexGuard<'_, ConsumeStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running consumer. Dropping it closes the consumer without waiting for it.
#[derive(Debug)]
pub struct Consume {
    pub(super) control: Arc<Control>,
    pub(super) ledger: Ledger,
    pub(super) failed: oneshot::Receiver<Error>,
    pub(super) ended: oneshot::Receiver<Result<(), Error>>,
    pub(super) left: oneshot::Receiver<()>,
}

/// A view of the consumer that can be passed around.
#[derive(Debug, Clone)]
pub struct ConsumeView {
    control: Arc<Control>,
    ledger: Ledger,
}

impl ConsumeView {
    /// What it is doing.
    pub fn status(&self) -> ConsumeStatus {
        self.control.status().clone()
    }

    /// Whether everything that was there is done: the end of every assigned partition was seen and no message is
    /// open. True for a moment only while others go on writing.
    pub fn caught_up(&self) -> bool {
        // In this order: the thread takes its mark away before it opens a ticket.
        self.control.at_end.load(Ordering::SeqCst) && self.ledger.open_tickets() == 0
    }
}

impl Consume {
    /// A view that can be passed around.
    pub fn view(&self) -> ConsumeView {
        ConsumeView { control: self.control.clone(), ledger: self.ledger.clone() }
    }

    /// Takes no more messages and closes the channel, so that the flow drains. The consumer stays in the group and
    /// goes on committing until [`Consume::close`].
    pub fn stop(&self) {
        self.control.advance(Phase::Stopping);
    }

    /// Waits for an error after which the worker must stop: the consumer behaves as after [`Consume::stop`], and is
    /// still to be closed. Never returns while all is well. Safe to use in `select!`.
    pub async fn failed(&mut self) -> Error {
        if let Ok(error) = (&mut self.failed).await {
            return error;
        }
        // The thread has ended without a failure: there is none to come, unless it panicked.
        match (&mut self.ended).await {
            Ok(Ok(())) => std::future::pending().await,
            Ok(Err(error)) => error,
            Err(_) => Error::Panicked("consumer"),
        }
    }

    /// Commits what is resolved, waits for the broker, leaves the group; takes no longer than [`CLOSE`].
    ///
    /// # Errors
    /// What made the consumer fail before, or why the last commit failed.
    pub async fn close(mut self) -> Result<(), Error> {
        self.control.advance(Phase::Closing);
        if self.ended.is_terminated() {
            // [`Consume::failed`] has taken the end: the thread panicked.
            return Err(Error::Panicked("consumer"));
        }
        let deadline = Instant::now() + CLOSE;
        let Ok(ended) = timeout_at(deadline, &mut self.ended).await else {
            return Err(Error::Other { doing: "committing offsets", reason: "the brokers do not answer".into() });
        };
        if timeout_at(deadline, &mut self.left).await.is_err() {
            tracing::warn!("the brokers do not answer to our leaving; others get the partitions after session_timeout");
        }
        ended.unwrap_or(Err(Error::Panicked("consumer")))
    }
}

impl Drop for Consume {
    fn drop(&mut self) {
        self.control.advance(Phase::Closing);
    }
}
