//! The settings of every room, as plain structs with their defaults: the one place where a default is written. The long
//! sections have files of their own.
//!
//! [`crate::config`] fills them from files, environment and flags; the rest of the program only reads them.

mod answerer;
mod canary;
mod endpoint;
mod fetch;
mod filter;
mod flow;
mod kafka;
mod model;
mod options;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use answerer::Answerer;
pub use canary::Canary;
pub use endpoint::Endpoint;
pub use fetch::{Fetch, LONGEST_BREAK, STORE_OPTIONS, is_web_address};
pub use filter::Filter;
pub use flow::Flow;
pub use kafka::{Compression, Delivery, Input, Kafka, RetryTopic, SecurityProtocol};
pub use model::Model;
pub use options::{OWNED_OPTIONS, owned_option};

/// Everything a worker can be told. Each field is a section of the configuration file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The broker, the topics and the consumer group.
    pub kafka: Kafka,
    /// How much work may be under way.
    pub flow: Flow,
    /// How images are fetched.
    pub fetch: Fetch,
    /// How images are decoded.
    pub decode: Decode,
    /// Which model captions them, and on what.
    pub model: Model,
    /// Which model judges captions and texts that were found, and what is kept.
    pub filter: Filter,
    /// Which model answers questions about images, and how.
    pub answerer: Answerer,
    /// Which model captions some of the images once more, for comparison.
    pub canary: Canary,
    /// How batches are formed.
    pub batch: Batch,
    /// What a caption record contains.
    pub output: Output,
    /// The HTTP endpoint that answers directly.
    pub endpoint: Endpoint,
    /// The HTTP port for health, metrics and control.
    pub admin: Admin,
    /// Logging.
    pub log: Log,
}

/// How images are decoded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Decode {
    /// Decoding threads; 0 means one for each core.
    pub threads: usize,
    /// Most pixels (width × height) of an image.
    pub max_pixels: u64,
    /// Largest width or height.
    pub max_side: u32,
    /// Most memory that one decoder may allocate.
    #[schemars(with = "String")]
    pub max_memory: ByteSize,
    /// JPEGs are decoded at a half, a quarter or an eighth of their size while both sides stay at least this many times
    /// the model's, by libjpeg-turbo where it is installed; 0 decodes them whole.
    pub jpeg_reducing_gap: f64,
    /// Whether pictures are turned as their EXIF says. The model's own processor does not, and neither does the default.
    pub exif_orientation: bool,
}

impl Default for Decode {
    fn default() -> Self {
        Self {
            threads: 0,
            max_pixels: 64_000_000,
            max_side: 16_384,
            max_memory: ByteSize::mib(512),
            jpeg_reducing_gap: 0.0,
            exif_orientation: false,
        }
    }
}

/// How batches are formed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Batch {
    /// Images a device takes at once; 0 means: found at warm-up.
    pub max_size: usize,
    /// Where the size is found at warm-up: how long an image may take, from pixels to a caption of `max_new_tokens`, while
    /// the devices keep up. `linger` and two batches fit into it, the one under way and the image's own. 0 sets no bound.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub latency_goal: Duration,
    /// How long a free device may wait for a fuller batch. 0 never waits.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub linger: Duration,
    /// Images that wait for a device; at least a batch for each device, whatever is set.
    pub queue: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self { max_size: 0, latency_goal: Duration::ZERO, linger: Duration::ZERO, queue: 128 }
    }
}

/// What a caption record contains.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Output {
    /// Keep user-info and query strings in `image.url`. Logs and dead letters never show them.
    pub full_url: bool,
    /// File of terms, one a line; a caption that contains one gets them in its `flags`. Nothing is dropped.
    pub flag_terms_file: Option<PathBuf>,
    /// Name of this worker in records; the host name and process id by default.
    pub worker: Option<String>,
}

/// The HTTP port for health, metrics and control.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Admin {
    /// Address to listen on. Port 0 takes a free one. Anything but loopback needs a token for the mutating routes.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// Token of the mutating routes (`Authorization: Bearer …`); `token_file` is better.
    pub token: Option<String>,
    /// File that holds the token.
    pub token_file: Option<PathBuf>,
}

impl Default for Admin {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9464)), token: None, token_file: None }
    }
}

/// Logging.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Filter in the syntax of `tracing`, e.g. `info` or `blipstream=debug`.
    pub filter: String,
    /// `auto` (human on a terminal, JSON otherwise), `human` or `json`.
    pub format: LogFormat,
}

/// Form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum LogFormat {
    Auto,
    Human,
    Json,
}

impl Default for Log {
    fn default() -> Self {
        Self { filter: "info".into(), format: LogFormat::Auto }
    }
}
