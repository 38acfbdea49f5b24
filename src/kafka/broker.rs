//! A Kafka cluster inside this process: librdkafka's mock cluster.
//!
//! It speaks the real protocol over loopback TCP, with consumer groups, commits and idempotent producers. Its limits:
//! nothing is durable; a partition silently loses its oldest records past 5 MiB or 100,000 of them; there is no admin
//! interface, and transactions are accepted but mean nothing.

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::bindings::{rd_kafka_handle_mock_cluster, rd_kafka_mock_group_initial_rebalance_delay_ms};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, DefaultProducerContext, Producer as _};
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

use super::Error;

/// Bytes of one partition that users of the embedded broker stay under, so that nothing is lost: it trims the head of
/// a partition past 5 MiB, without a word.
pub const EMBEDDED_PARTITION_BYTES: usize = 4 << 20;

/// How long a new group waits for more members.
const JOIN_TOGETHER_MS: i32 = 250;

/// A broker can make requests fail; each of these is answered once, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The broker refuses a record as too large.
    ProduceTooLarge,
    /// The broker does not permit the write.
    ProduceNotAuthorised,
    /// The broker refuses a record for now, since too few copies could be made.
    ProduceTooFewCopies,
    /// The connection breaks while a record is written.
    ProduceDisconnect,
    /// The broker refuses a commit, since the group is being rearranged.
    CommitRebalancing,
    /// The broker says that the offset is out of range.
    FetchOutOfRange,
}

impl Fault {
    fn native(self) -> (RDKafkaApiKey, RDKafkaRespErr) {
        use RDKafkaApiKey as Key;
        use RDKafkaRespErr as Code;
        match self {
            Self::ProduceTooLarge => (Key::Produce, Code::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE),
            Self::ProduceNotAuthorised => (Key::Produce, Code::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED),
            Self::ProduceTooFewCopies => (Key::Produce, Code::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS),
            Self::ProduceDisconnect => (Key::Produce, Code::RD_KAFKA_RESP_ERR__TRANSPORT),
            Self::CommitRebalancing => (Key::OffsetCommit, Code::RD_KAFKA_RESP_ERR_REBALANCE_IN_PROGRESS),
            Self::FetchOutOfRange => (Key::Fetch, Code::RD_KAFKA_RESP_ERR_OFFSET_OUT_OF_RANGE),
        }
    }
}

/// The cluster. It ends when this is dropped.
pub struct EmbeddedBroker {
    /// Owns the cluster; it has no other use.
    host: BaseProducer,
}

impl EmbeddedBroker {
    /// Starts `brokers` brokers on free loopback ports, with these topics and their partition counts.
    pub fn start(brokers: usize, topics: &[(&str, i32)]) -> Result<Self, Error> {
        let starting = |error| Error::from_kafka("starting the embedded broker", &error);
        let mut config = ClientConfig::new();
        config.set("test.mock.num.brokers", brokers.max(1).to_string());
        let host: BaseProducer = config.create().map_err(starting)?;
        let broker = Self { host };
        // SAFETY: the client owns a mock cluster for as long as it lives, and both calls are thread-safe.
        unsafe {
            let cluster = rd_kafka_handle_mock_cluster(broker.host.client().native_ptr());
            // The default of 3 s serves large groups that start together; here it would only be waited for. The members of one
            // worker must come in together: whoever comes later waits until a session's time-out less a second is over.
            rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, JOIN_TOGETHER_MS);
        }
        for (topic, partitions) in topics {
            broker.cluster()?.create_topic(topic, *partitions, 1).map_err(starting)?;
        }
        Ok(broker)
    }

    fn cluster(&self) -> Result<MockCluster<'_, DefaultProducerContext>, Error> {
        let missing = || Error::Other { doing: "using the embedded broker", reason: "there is none".into() };
        self.host.client().mock_cluster().ok_or_else(missing)
    }

    /// What to put into `kafka.bootstrap_servers`; other processes of this machine can use it, too.
    pub fn bootstrap_servers(&self) -> Result<String, Error> {
        Ok(self.cluster()?.bootstrap_servers())
    }

    /// Disconnects everybody and lets nobody in.
    pub fn down(&self) -> Result<(), Error> {
        self.cluster()?.broker_down(-1).map_err(|error| Error::from_kafka("stopping the embedded broker", &error))
    }

    /// Ends [`EmbeddedBroker::down`].
    pub fn up(&self) -> Result<(), Error> {
        self.cluster()?.broker_up(-1).map_err(|error| Error::from_kafka("starting the embedded broker", &error))
    }

    /// Makes the next requests fail, one for each fault.
    pub fn fail(&self, faults: &[Fault]) -> Result<(), Error> {
        for fault in faults {
            let (key, code) = fault.native();
            self.cluster()?.request_errors(key, &[code]);
        }
        Ok(())
    }

    /// Delays every answer, as a distant broker would.
    pub fn round_trip_time(&self, delay: Duration) -> Result<(), Error> {
        let setting = |error| Error::from_kafka("slowing the embedded broker down", &error);
        self.cluster()?.broker_round_trip_time(-1, delay).map_err(setting)
    }
}

impl std::fmt::Debug for EmbeddedBroker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedBroker").finish_non_exhaustive()
    }
}
