//! The link to Kafka.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
    /// Topic for the records of images of which the filter keeps no text; they go with the others where there is none.
    pub filtered_topic: Option<String>,
    /// Topic for what the canary writes; needed where `canary.source` names one.
    pub canary_topic: Option<String>,
    /// Topic for dead letters.
    pub dead_letter_topic: String,
    /// Topics for what failed for a reason that may pass, from the first to the last; each comes back after its delay.
    /// What fails again after the last one is a dead letter. None: a dead letter at once.
    pub retry_topics: Vec<RetryTopic>,
    /// Prefetch of the consumer, over all partitions, in equal parts for each input and for the retry topics; counted in
    /// the memory of the worker.
    #[schemars(with = "String")]
    pub prefetch: ByteSize,
    /// Largest message consumed or produced, with key and headers; a longer one that comes in is a dead letter
    /// (`too_large`). The broker's `message.max.bytes` should be no smaller.
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

/// A topic whose messages come back after a delay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RetryTopic {
    /// Name of the topic.
    pub topic: String,
    /// How long a message waits in it; the same for all, so that none waits behind one that is due later.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub delay: Duration,
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

impl Kafka {
    /// Every topic that is read: the inputs, then the retry topics.
    pub fn consumed_topics(&self) -> impl Iterator<Item = &str> {
        let inputs = self.inputs.iter().map(|input| input.topic.as_str());
        inputs.chain(self.retry_topics.iter().map(|retry| retry.topic.as_str()))
    }

    /// The topics of each member that a worker is in its group: every input by itself, and the retry topics together. Each
    /// of these is shared out among the workers by itself.
    pub fn subscriptions(&self) -> Vec<Vec<&str>> {
        let retries: Vec<_> = self.retry_topics.iter().map(|retry| retry.topic.as_str()).collect();
        let inputs = self.inputs.iter().map(|input| vec![input.topic.as_str()]);
        inputs.chain((!retries.is_empty()).then_some(retries)).collect()
    }

    /// Where a message that came from `topic` waits for its next try; `None` when it has had its last.
    pub fn next_retry(&self, topic: &str) -> Option<&RetryTopic> {
        let had = self.retry_topics.iter().position(|retry| retry.topic == topic).map_or(0, |at| at + 1);
        self.retry_topics.get(had)
    }

    /// The retry topic of this name.
    pub fn retry_topic(&self, topic: &str) -> Option<&RetryTopic> {
        self.retry_topics.iter().find(|retry| retry.topic == topic)
    }
}

impl Default for Kafka {
    fn default() -> Self {
        Self {
            bootstrap_servers: "localhost:9092".into(),
            group_id: "blipstream".into(),
            inputs: vec![Input { topic: "blipstream.requests".into(), weight: 1 }],
            captions_topic: "blipstream.captions".into(),
            filtered_topic: None,
            canary_topic: None,
            dead_letter_topic: "blipstream.dlq".into(),
            retry_topics: [("blipstream.retry.10s", 10), ("blipstream.retry.1m", 60), ("blipstream.retry.10m", 600)]
                .map(|(topic, delay)| RetryTopic { topic: topic.into(), delay: Duration::from_secs(delay) })
                .into(),
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
