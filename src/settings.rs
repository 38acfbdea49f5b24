//! The settings of every room, as plain structs with their defaults: the one place where a default is written.
//!
//! [`crate::config`] fills them from files, environment and flags; the rest of the program only reads them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
    /// How batches are formed.
    pub batch: Batch,
    /// What a caption record contains.
    pub output: Output,
    /// The HTTP port for health, metrics and control.
    pub admin: Admin,
    /// Logging.
    pub log: Log,
}

/// The broker, the topics and the consumer group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Kafka {
    /// Comma-separated `host:port` list of brokers.
    pub bootstrap_servers: String,
    /// Consumer group of the fleet; workers of one group share the partitions.
    pub group_id: String,
    /// Topics to read requests from, each with the weight of its lane in the batcher.
    pub inputs: Vec<Input>,
    /// Topic for caption records.
    pub captions_topic: String,
    /// Topic for dead letters.
    pub dead_letter_topic: String,
    /// Prefetch of the consumer, over all partitions; counted in the memory of the worker.
    #[schemars(with = "String")]
    pub prefetch: ByteSize,
    /// Largest message consumed or produced. The broker's `message.max.bytes` should be no smaller.
    #[schemars(with = "String")]
    pub max_message_size: ByteSize,
    /// The group gives a worker's partitions to others when it was not heard of for this long.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub session_timeout: Duration,
    /// The longest a consumer may go without polling; the consumer thread polls all the time.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub max_poll_interval: Duration,
    /// How often resolved offsets are committed.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub commit_interval: Duration,
    /// How long revoked partitions may drain before they are given up.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub revoke_drain: Duration,
    /// A partition that is neither paused nor at its end and delivers nothing for this long is sought anew.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub stuck_after: Duration,
    /// What is promised: `at_least_once` or `exactly_once`.
    pub delivery: Delivery,
    /// With `exactly_once`: the producer's identity. Every worker needs one of its own; by default one is made up.
    pub transactional_id: Option<String>,
    /// With `exactly_once`: the brokers abort a transaction that takes longer.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub transaction_timeout: Duration,
    /// With `exactly_once`: how often finished captions become visible.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub transaction_interval: Duration,
    /// With `exactly_once`: so many finished captions become visible at once, however short the interval has been.
    pub transaction_records: usize,
    /// Static membership: a worker that comes back under this name within `session_timeout` gets its partitions back
    /// without a rebalance. Every worker needs a name of its own.
    pub group_instance_id: Option<String>,
    /// How long a record may wait before it is sent with others.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub linger: Duration,
    /// Compression of produced records: `none`, `gzip`, `snappy`, `lz4` or `zstd`.
    pub compression: Compression,
    /// `plaintext`, `ssl`, `sasl_plaintext` or `sasl_ssl`.
    pub security_protocol: SecurityProtocol,
    /// SASL mechanism: `PLAIN`, `SCRAM-SHA-256` or `SCRAM-SHA-512`.
    pub sasl_mechanism: Option<String>,
    /// SASL user name.
    pub sasl_username: Option<String>,
    /// SASL password; `sasl_password_file` is better.
    pub sasl_password: Option<String>,
    /// File that holds the SASL password.
    pub sasl_password_file: Option<PathBuf>,
    /// File of the certificate authority that signed the brokers' certificates.
    pub ssl_ca_file: Option<PathBuf>,
    /// Client certificate (PEM).
    pub ssl_certificate_file: Option<PathBuf>,
    /// Key of the client certificate (PEM).
    pub ssl_key_file: Option<PathBuf>,
    /// Free options for librdkafka (both consumer and producer). Keys that blipstream owns are refused.
    pub options: BTreeMap<String, String>,
}

/// What is promised of every consumed image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    /// It has a result, or several after a crash.
    AtLeastOnce,
    /// Readers with `isolation.level=read_committed` see exactly one result.
    ExactlyOnce,
}

/// A topic that requests are read from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// Name of the topic.
    pub topic: String,
    /// Share of its lane while several topics have a backlog; 1 is the default.
    #[serde(default = "one")]
    pub weight: u32,
}

fn one() -> u32 {
    1
}

/// Compression of produced records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Compression {
    None,
    Gzip,
    Snappy,
    Lz4,
    Zstd,
}

impl Compression {
    /// The name librdkafka knows it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Snappy => "snappy",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// Security of the link to the brokers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum SecurityProtocol {
    Plaintext,
    Ssl,
    SaslPlaintext,
    SaslSsl,
}

impl SecurityProtocol {
    /// The name librdkafka knows it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plaintext => "plaintext",
            Self::Ssl => "ssl",
            Self::SaslPlaintext => "sasl_plaintext",
            Self::SaslSsl => "sasl_ssl",
        }
    }
}

impl Default for Kafka {
    fn default() -> Self {
        Self {
            bootstrap_servers: "localhost:9092".into(),
            group_id: "blipstream".into(),
            inputs: vec![Input { topic: "blipstream.requests".into(), weight: 1 }],
            captions_topic: "blipstream.captions".into(),
            dead_letter_topic: "blipstream.dlq".into(),
            prefetch: ByteSize::mib(16),
            max_message_size: ByteSize::mib(12),
            session_timeout: Duration::from_secs(45),
            max_poll_interval: Duration::from_secs(300),
            commit_interval: Duration::from_secs(1),
            revoke_drain: Duration::from_secs(5),
            stuck_after: Duration::from_secs(30),
            delivery: Delivery::AtLeastOnce,
            transactional_id: None,
            transaction_timeout: Duration::from_secs(15),
            transaction_interval: Duration::from_millis(500),
            transaction_records: 500,
            group_instance_id: None,
            linger: Duration::from_millis(5),
            compression: Compression::Lz4,
            security_protocol: SecurityProtocol::Plaintext,
            sasl_mechanism: None,
            sasl_username: None,
            sasl_password: None,
            sasl_password_file: None,
            ssl_ca_file: None,
            ssl_certificate_file: None,
            ssl_key_file: None,
            options: BTreeMap::new(),
        }
    }
}

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
            max_rows: 1_000,
        }
    }
}

/// How images are fetched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Fetch {
    /// Fetches under way at once.
    pub concurrency: usize,
    /// Fetches under way at once to one host.
    pub per_host: usize,
    /// Time limit for the connection.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub connect_timeout: Duration,
    /// Time limit between two reads.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub read_timeout: Duration,
    /// Time limit for one try, from the connection to the last byte.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub total_timeout: Duration,
    /// Largest body.
    #[schemars(with = "String")]
    pub max_body: ByteSize,
    /// Redirects followed.
    pub max_redirects: usize,
    /// Tries in all for a transient error.
    pub attempts: u32,
    /// Upper bound of the first wait between tries; it doubles from there (full jitter).
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub backoff: Duration,
    /// Upper bound of any wait between tries.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub max_backoff: Duration,
    /// Networks that may be reached although they are not public, e.g. `["10.1.0.0/16"]`.
    #[schemars(with = "Vec<String>")]
    pub allow_networks: Vec<IpNet>,
    /// Folders below which `file://` references may be read; none by default.
    pub file_roots: Vec<PathBuf>,
    /// The User-Agent sent to image hosts.
    pub user_agent: String,
}

impl Default for Fetch {
    fn default() -> Self {
        Self {
            concurrency: 64,
            per_host: 16,
            connect_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(10),
            total_timeout: Duration::from_secs(30),
            max_body: ByteSize::mib(20),
            max_redirects: 5,
            attempts: 4,
            backoff: Duration::from_millis(250),
            max_backoff: Duration::from_secs(5),
            allow_networks: Vec::new(),
            file_roots: Vec::new(),
            user_agent: concat!("blipstream/", env!("CARGO_PKG_VERSION")).into(),
        }
    }
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
}

impl Default for Decode {
    fn default() -> Self {
        Self { threads: 0, max_pixels: 64_000_000, max_side: 16_384, max_memory: ByteSize::mib(512) }
    }
}

/// Which model captions them, and on what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// A local folder in the published layout, a hub id (`org/name` or `org/name@revision`), or `demo`.
    pub source: String,
    /// `auto`, or a list like `["cpu"]`, `["cuda:0", "cuda:1"]`; `auto` takes the first GPU, or else the CPU.
    pub devices: Vec<String>,
    /// Copies of the model on each device; more than one is of use on a CPU only in tests.
    pub replicas: usize,
    /// `auto`, `f32`, `bf16` or `f16`.
    pub dtype: String,
    /// Address of the hub, when it is not the public one.
    pub hub_endpoint: Option<String>,
    /// File that holds the hub's token.
    pub hub_token_file: Option<PathBuf>,
    /// Text that captions begin with, unless a request has its own `prompt`.
    pub prompt: Option<String>,
    /// Most tokens generated, unless a request says otherwise.
    pub max_new_tokens: usize,
    /// Least tokens generated, unless a request says otherwise.
    pub min_new_tokens: usize,
    /// The most that a request may ask for.
    pub max_new_tokens_limit: usize,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            source: "Salesforce/blip-image-captioning-base".into(),
            devices: vec!["auto".into()],
            replicas: 1,
            dtype: "auto".into(),
            hub_endpoint: None,
            hub_token_file: None,
            prompt: None,
            max_new_tokens: 20,
            min_new_tokens: 0,
            max_new_tokens_limit: 200,
        }
    }
}

/// How batches are formed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Batch {
    /// Images a device takes at once; 0 means: found at warm-up.
    pub max_size: usize,
    /// How long a free device may wait for a fuller batch. 0 never waits.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub linger: Duration,
    /// Images that wait for a device.
    pub queue: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self { max_size: 0, linger: Duration::ZERO, queue: 128 }
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
