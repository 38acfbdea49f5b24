//! The bounds of what is under way.

use std::time::Duration;

use bytesize::ByteSize;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How much work may be under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Flow {
    /// Messages consumed and not yet resolved.
    pub max_messages: usize,
    /// Bytes of the payloads of those messages (the message pool).
    #[schemars(with = "String")]
    pub max_message_bytes: ByteSize,
    /// Images between the head of the response and the published caption.
    pub max_images: usize,
    /// Bytes of those images: bodies while they are fetched, pixels afterwards (the image pool).
    #[schemars(with = "String")]
    pub max_image_bytes: ByteSize,
    /// At most this many offsets of a partition lie between the committed watermark and the newest consumed:
    /// the bound of the duplicates after a crash, for each partition.
    pub max_span: u64,
    /// Partitions are paused when a pool is this full (share of the limit).
    pub pause_at: f64,
    /// And resumed when it is no fuller than this.
    pub resume_at: f64,
    /// How long a drain may take before what is left is given up (and consumed again by the next worker).
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub drain_timeout: Duration,
    /// At most so many dead letters a minute for reasons that are not the input's; when they come faster, the worker
    /// pauses, and writes the rest in its time. 0 sets no ceiling.
    pub max_dead_letters_per_minute: u32,
    /// A message whose rows are more than this is refused.
    pub max_rows: usize,
}

impl Default for Flow {
    fn default() -> Self {
        Self {
            max_messages: 2_000,
            max_message_bytes: ByteSize::mib(64),
            max_images: 512,
            max_image_bytes: ByteSize::mib(512),
            max_span: 2_000,
            pause_at: 0.8,
            resume_at: 0.4,
            drain_timeout: Duration::from_secs(30),
            max_dead_letters_per_minute: 0,
            max_rows: 1_000,
        }
    }
}
