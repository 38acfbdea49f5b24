//! What `/status` and `/readyz` answer.

use serde::Serialize;

use crate::caption::ModelInfo;
use crate::stage::consume::ConsumeStatus;

/// One part of readiness.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Component {
    /// Whether it is ready.
    pub ready: bool,
    /// What it is, or why it is not ready.
    pub detail: String,
}

/// Whether the worker can do its job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// All of the below.
    pub ready: bool,
    /// The model is loaded on at least one device.
    pub model: Component,
    /// A broker was reached; `None` where there is no stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub broker: Option<Component>,
    /// The consumer has joined its group; an empty assignment counts. `None` where there is no stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<Component>,
}

/// `/status`: what is in flight and why it waits.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// State of the worker.
    pub state: &'static str,
    /// Why it drains.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draining_because: Option<String>,
    /// Version of the program.
    pub version: &'static str,
    /// Seconds since the start.
    pub uptime_s: f64,
    /// Why consumption is held; empty when it is not.
    pub held_by: Vec<&'static str>,
    /// The model.
    pub model: Option<ModelInfo>,
    /// The devices.
    pub devices: Vec<DeviceStatus>,
    /// Messages consumed and not resolved.
    pub messages_in_flight: usize,
    /// The pools.
    pub pools: Vec<PoolStatus>,
    /// Messages that wait to be parsed, and rows that wait for each stage behind that.
    pub queues: Vec<QueueStatus>,
    /// The consumer, once it runs.
    pub consumer: Option<ConsumeStatus>,
    /// Counts since the start.
    pub totals: Totals,
}

/// One device.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceStatus {
    /// Name.
    pub name: String,
    /// The kernels it runs on.
    pub backend: String,
    /// Whether it is at work.
    pub alive: bool,
    /// Images it takes at once.
    pub batch_size: usize,
    /// The most that it may take, since the memory of a batch is bounded (`model.max_state`).
    pub max_batch_size: usize,
    /// Seconds at work since the start.
    pub busy_s: f64,
}

/// One pool.
#[derive(Debug, Clone, Serialize)]
pub struct PoolStatus {
    /// Name.
    pub name: &'static str,
    /// Items in use.
    pub items: usize,
    /// Of this many.
    pub items_limit: usize,
    /// Bytes in use.
    pub bytes: usize,
    /// Of this many.
    pub bytes_limit: usize,
}

/// One queue.
#[derive(Debug, Clone, Serialize)]
pub struct QueueStatus {
    /// The stage that its rows wait for.
    pub stage: &'static str,
    /// How many.
    pub items: usize,
}

/// Counts since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Messages consumed.
    pub consumed: u64,
    /// Captions acknowledged.
    pub captions: u64,
    /// Dead letters acknowledged.
    pub dead_letters: u64,
}
