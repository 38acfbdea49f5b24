//! The idempotent producer: every record comes back exactly once, delivered or not.

use std::sync::Arc;
use std::time::Duration;

use rdkafka::Message as _;
use rdkafka::Statistics;
use rdkafka::bindings::{RD_KAFKA_OFFSET_INVALID, rd_kafka_flush};
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::DeliveryResult;
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, PurgeConfig, ThreadedProducer};
use rdkafka::types::RDKafkaRespErr;

use super::context::{self, Errors};
use super::error::{Class, Error};
use super::{config, messages};
use crate::message::Headers;
use crate::settings::Kafka;

/// Who is told what became of each record. Called on the producer's own thread: it must be quick.
pub trait Deliver: Send + Sync + 'static {
    /// What goes along with a record and comes back.
    type Tag: Send + Sync;
    /// The broker has the record, or will not get it from this call; or that is not known ([`Class::Unconfirmed`]).
    fn delivered(&self, tag: Box<Self::Tag>, result: Result<(), NotDelivered>);
    /// Called before [`Deliver::delivered`] for a record that the broker has, with the place it got: for those who
    /// look for what becomes of it. `offset` is `None` where the broker did not say.
    fn placed(&self, tag: &mut Self::Tag, partition: i32, offset: Option<i64>) {
        let _ = (tag, partition, offset);
    }
}

/// A record that was taken on and did not arrive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotDelivered {
    /// What it means.
    pub class: Class,
    /// librdkafka's words.
    pub reason: String,
}

/// Why a record was not taken on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotSent {
    /// librdkafka's queue is full: wait until a record was delivered.
    QueueFull,
    /// Anything else.
    Refused(NotDelivered),
}

/// What is written.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// To where.
    pub topic: &'a str,
    /// Records of one key go to one partition, the one that Java clients choose; without a key, to any.
    pub key: Option<&'a [u8]>,
    /// The value.
    pub value: Option<&'a [u8]>,
    /// Headers, in their order.
    pub headers: &'a Headers,
    /// Milliseconds since 1970; `None` is the time of sending.
    pub timestamp_ms: Option<i64>,
}

#[derive(Debug)]
pub(crate) struct ProducerSide<D> {
    deliver: D,
    errors: Arc<Errors>,
}

impl<D: Send + Sync> ClientContext for ProducerSide<D> {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        context::log("producer", level, facility, line);
    }

    fn stats(&self, statistics: Statistics) {
        if context::brokers_up(&statistics) > 0 {
            self.errors.clear();
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.errors.record("producer", &error, reason);
    }
}

impl<D: Deliver> ProducerContext for ProducerSide<D> {
    type DeliveryOpaque = Box<D::Tag>;

    fn delivery(&self, result: &DeliveryResult<'_>, mut tag: Box<D::Tag>) {
        if let Ok(record) = result {
            if is_assumed(record.offset()) {
                let reason = "no broker has confirmed the record; it may be there, or not".to_owned();
                return self.deliver.delivered(tag, Err(NotDelivered { class: Class::Unconfirmed, reason }));
            }
            let offset = Some(record.offset()).filter(|offset| *offset >= 0);
            self.deliver.placed(&mut tag, record.partition(), offset);
        }
        let result = result.as_ref().map(|_| ()).map_err(|(error, _)| not_delivered(error));
        self.deliver.delivered(tag, result);
    }
}

/// Whether librdkafka only assumes that a record is written, since a later batch of its partition is: then it has no
/// offset. (A broker that knows the record from an earlier try, but not its place any more, says -1.)
///
/// Brokers promise that by refusing gaps between sequence numbers. But of a producer that they do not know in this
/// partition they take any first number (KAFKA-15591; Kafka 4.5 still does, unless the partition is empty). Where they
/// refuse a producer's first batch, say for missing copies, and take the second one, which was under way already,
/// librdkafka 2.12 reports the first as delivered, and it is lost (confluent-kafka-go's issue 921).
fn is_assumed(offset: i64) -> bool {
    offset == i64::from(RD_KAFKA_OFFSET_INVALID)
}

fn not_delivered(error: &KafkaError) -> NotDelivered {
    let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
    NotDelivered { class: Class::of(code), reason: code.to_string() }
}

/// The producer and its thread. Dropping it takes back what was not delivered; tags come back then, too.
pub struct Producer<D: Deliver> {
    inner: ThreadedProducer<ProducerSide<D>>,
    errors: Arc<Errors>,
}

impl<D: Deliver> Producer<D> {
    /// Creates the client; the brokers are reached later.
    pub fn new(settings: &Kafka, deliver: D) -> Result<Self, Error> {
        Self::create(&config::producer(settings)?, deliver)
    }

    /// Creates a client that sends within transactions only, see [`Producer::init_transactions`].
    pub fn transactional(settings: &Kafka, transactional_id: &str, deliver: D) -> Result<Self, Error> {
        Self::create(&config::transactional_producer(settings, transactional_id)?, deliver)
    }

    fn create(config: &rdkafka::ClientConfig, deliver: D) -> Result<Self, Error> {
        let errors = Arc::new(Errors::default());
        let side = ProducerSide { deliver, errors: errors.clone() };
        let starting = |error| Error::from_kafka("starting the producer", &error);
        Ok(Self { inner: config.create_with_context(side).map_err(starting)?, errors })
    }

    pub(super) fn inner(&self) -> &ThreadedProducer<ProducerSide<D>> {
        &self.inner
    }

    pub(super) fn fatal_reason(&self) -> Option<String> {
        self.inner.client().fatal_error().map(|(_, reason)| reason)
    }

    /// Hands a record over. It is copied; its `tag` comes back to [`Deliver::delivered`], or at once with an error.
    pub fn send(&self, record: Record<'_>, tag: Box<D::Tag>) -> Result<(), (NotSent, Box<D::Tag>)> {
        let mut native = BaseRecord::with_opaque_to(record.topic, tag).headers(messages::to_native(record.headers));
        native.key = record.key;
        native.payload = record.value;
        native.timestamp = record.timestamp_ms;
        self.inner.send::<[u8], [u8]>(native).map_err(|(error, record)| {
            let why = match error.rdkafka_error_code() {
                Some(RDKafkaErrorCode::QueueFull) => NotSent::QueueFull,
                _ => NotSent::Refused(not_delivered(&error)),
            };
            (why, record.delivery_opaque)
        })
    }

    /// The newest error that librdkafka reported, if things have not been well again since.
    pub fn last_error(&self) -> Option<(Class, String)> {
        self.errors.last()
    }

    /// Why the producer can do nothing more, if it cannot.
    pub fn fatal(&self) -> Option<Error> {
        self.inner.client().fatal_error().map(|(code, reason)| match Class::of(code) {
            // Who may write to no topic at all does not even get a producer's number.
            Class::NotAuthorised => Error::NotAuthorised { reason },
            _ => Error::Fatal { reason },
        })
    }

    /// Takes back what is not acknowledged; the tags come back with [`Class::Purged`].
    pub fn purge(&self) {
        self.inner.purge(PurgeConfig::default().queue().inflight());
    }

    /// Waits until every record was delivered or has failed; `false` when that takes longer than `timeout`. Blocks.
    pub fn flush(&self, timeout: Duration) -> bool {
        let timeout = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        // rdkafka's own flush polls beside the polling thread, and sleeps for a tenth of a second where that was quicker.
        // SAFETY: the client is valid.
        let flushed = unsafe { rd_kafka_flush(self.inner.client().native_ptr(), timeout) };
        flushed == RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR
    }
}

impl<D: Deliver> std::fmt::Debug for Producer<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Producer").finish_non_exhaustive()
    }
}
