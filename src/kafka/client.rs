//! For commands and tests that do one thing and end: look at topics, write some records, read some records.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use rdkafka::Message as _;
use rdkafka::Offset;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::KafkaError;

use super::access::Right;
use super::context::{self, Errors};
use super::error::{Class, Error};
use super::producer::{Deliver, NotDelivered, NotSent, Producer, Record};
use super::{config, messages};
use crate::message::{Headers, Message};
use crate::offsets::TopicPartition;
use crate::settings::Kafka;

/// One step of a longer wait.
const STEP: Duration = Duration::from_millis(50);

#[derive(Debug, Default)]
pub(super) struct PlainSide {
    pub(super) errors: Errors,
}

impl ClientContext for PlainSide {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        context::log("client", level, facility, line);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.errors.record("client", &error, reason);
    }
}

impl ConsumerContext for PlainSide {}

/// The brokers of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Brokers {
    /// `host:port` of each, as they advertise themselves.
    pub addresses: Vec<String>,
    /// The topics that were asked for.
    pub topics: Vec<FoundTopic>,
}

/// A topic that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundTopic {
    /// Its name.
    pub topic: String,
    /// How many partitions it has.
    pub partitions: usize,
}

/// What the brokers say of each topic that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// `host:port` of each broker, as they advertise themselves.
    pub addresses: Vec<String>,
    /// In the order of asking.
    pub topics: Vec<Result<FoundTopic, Error>>,
}

/// A topic that is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicCheck {
    /// Its name.
    pub topic: String,
    /// The setting that names it.
    pub setting: &'static str,
}

impl TopicCheck {
    /// The topics that a worker with these settings needs.
    pub fn of(settings: &Kafka) -> Vec<Self> {
        let inputs = settings.inputs.iter().map(|input| (input.topic.as_str(), "kafka.inputs"));
        let outputs = [
            (settings.captions_topic.as_str(), "kafka.captions_topic"),
            (settings.dead_letter_topic.as_str(), "kafka.dead_letter_topic"),
        ];
        let filtered = settings.filtered_topic.iter().map(|topic| (topic.as_str(), "kafka.filtered_topic"));
        let canary = settings.canary_topic.iter().map(|topic| (topic.as_str(), "kafka.canary_topic"));
        let retries = settings.retry_topics.iter().map(|retry| (retry.topic.as_str(), "kafka.retry_topics"));
        inputs
            .chain(retries)
            .chain(outputs)
            .chain(filtered)
            .chain(canary)
            .map(|(topic, setting)| Self { topic: topic.into(), setting })
            .collect()
    }

    /// What a worker does with the topic.
    pub(super) fn needs(&self) -> &'static [Right] {
        match self.setting {
            "kafka.inputs" => &[Right::Read],
            "kafka.retry_topics" => &[Right::Read, Right::Write],
            _ => &[Right::Write],
        }
    }

    /// The error that a worker may not do one of these.
    pub(super) fn denied(&self, right: Right, settings: &Kafka) -> Error {
        Error::Denied {
            user: settings.sasl_username.clone(),
            right,
            resource: "topic",
            name: self.topic.clone(),
            setting: self.setting,
        }
    }
}

/// Reaches the brokers and looks the topics up, within `timeout`. Blocks.
///
/// # Errors
/// The first thing that is wrong: no broker, a refused login, a topic that does not exist or may not be seen.
pub fn check_topics(settings: &Kafka, topics: &[TopicCheck], timeout: Duration) -> Result<Brokers, Error> {
    let Found { addresses, topics } = find_topics(settings, topics, timeout)?;
    Ok(Brokers { addresses, topics: topics.into_iter().collect::<Result<_, _>>()? })
}

/// The same, with what is known of each topic instead of the first thing that is wrong with one.
///
/// # Errors
/// No broker answers within `timeout`, or the login is refused.
pub fn find_topics(settings: &Kafka, topics: &[TopicCheck], timeout: Duration) -> Result<Found, Error> {
    let client = plain_consumer(settings, &[("topic.metadata.refresh.interval.ms", "-1")])?;
    look_up(&client, settings, topics, timeout)
}

/// The same by a client that is there already.
pub(super) fn look_up(
    client: &BaseConsumer<PlainSide>,
    settings: &Kafka,
    topics: &[TopicCheck],
    timeout: Duration,
) -> Result<Found, Error> {
    let deadline = Instant::now() + timeout;
    let mut all = Found { addresses: Vec::new(), topics: Vec::new() };
    for check in topics {
        // Short at first, since most failures are known at once; longer later, for brokers that are slow.
        let mut patience = STEP;
        let metadata = loop {
            let error = match client.fetch_metadata(Some(&check.topic), patience) {
                Ok(metadata) => break metadata,
                Err(error) => error,
            };
            patience = (2 * patience).min(STEP.max(timeout / 4));
            listen(client);
            if Instant::now() >= deadline {
                return Err(unreachable(settings, client, &error));
            }
            // A refused login is not going to be accepted by trying for longer.
            if matches!(client.context().errors.last(), Some((Class::Authentication, _))) {
                return Err(unreachable(settings, client, &error));
            }
        };
        all.addresses = metadata.brokers().iter().map(|b| format!("{}:{}", b.host(), b.port())).collect();
        all.topics.push(found(settings, check, &metadata));
    }
    Ok(all)
}

/// The reason of a failure is told only to who polls, one event a call.
fn listen(client: &BaseConsumer<PlainSide>) {
    let until = Instant::now() + STEP;
    while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        let _ = client.poll(left);
    }
}

fn found(settings: &Kafka, check: &TopicCheck, metadata: &rdkafka::metadata::Metadata) -> Result<FoundTopic, Error> {
    let unknown = || Error::UnknownTopic { topic: check.topic.clone(), setting: check.setting.into() };
    let topic = metadata.topics().iter().find(|topic| topic.name() == check.topic).ok_or_else(unknown)?;
    if let Some(code) = topic.error() {
        let code = rdkafka::error::RDKafkaErrorCode::from(code);
        return Err(match Class::of(code) {
            Class::NotAuthorised => check.denied(check.needs()[0], settings),
            Class::UnknownTopic => unknown(),
            _ => Error::Other { doing: "looking up a topic", reason: format!("{}: {code}", check.topic) },
        });
    }
    if topic.partitions().is_empty() {
        return Err(unknown());
    }
    Ok(FoundTopic { topic: check.topic.clone(), partitions: topic.partitions().len() })
}

fn unreachable(settings: &Kafka, client: &BaseConsumer<PlainSide>, error: &KafkaError) -> Error {
    let fallback = || error.rdkafka_error_code().map_or_else(|| error.to_string(), |code| code.to_string());
    match client.context().errors.last() {
        Some((Class::Authentication, reason)) => Error::Authentication { reason },
        Some((_, reason)) => Error::Unreachable { servers: settings.bootstrap_servers.clone(), reason },
        None => Error::Unreachable { servers: settings.bootstrap_servers.clone(), reason: fallback() },
    }
}

pub(super) fn plain_consumer(settings: &Kafka, more: &[(&str, &str)]) -> Result<BaseConsumer<PlainSide>, Error> {
    let mut config = config::client(settings)?;
    for (key, value) in more {
        config.set(*key, *value);
    }
    let starting = |error| Error::from_kafka("starting a Kafka client", &error);
    config.create_with_context(PlainSide::default()).map_err(starting)
}

/// What the group `kafka.group_id` has committed for each partition of a topic, in their order. Blocks, for `timeout`
/// at most.
///
/// # Errors
/// The brokers do not answer in time, or the topic does not exist.
pub fn group_offsets(settings: &Kafka, topic: &str, timeout: Duration) -> Result<Vec<Option<i64>>, Error> {
    let checks = [TopicCheck { topic: topic.into(), setting: "the topic's name" }];
    let partitions = check_topics(settings, &checks, timeout)?.topics.first().map_or(0, |t| t.partitions);
    let client = plain_consumer(settings, &[("group.id", &settings.group_id), ("enable.auto.commit", "false")])?;
    let mut list = rdkafka::TopicPartitionList::new();
    list.add_partition_range(topic, 0, partitions as i32 - 1);
    let asking = |error| Error::from_kafka("asking for the committed offsets", &error);
    let deadline = Instant::now() + timeout;
    let list = loop {
        // A group's coordinator is looked for, or moves: the next answer may be another one.
        match client.committed_offsets(list.clone(), timeout) {
            Err(error) if Class::of_error(&error) == Class::Unreachable && Instant::now() < deadline => {
                std::thread::sleep(STEP);
            }
            answer => break answer.map_err(asking)?,
        }
    };
    Ok(list.elements().iter().map(messages::exact_offset).collect())
}

/// How many members the group `kafka.group_id` has now, as far as the brokers tell; 0 where they do not. Blocks, for
/// `timeout` at most.
pub fn group_members(settings: &Kafka, timeout: Duration) -> usize {
    let group = &settings.group_id;
    let found = plain_consumer(settings, &[]).map(|client| client.fetch_group_list(Some(group), timeout));
    match found {
        Ok(Ok(list)) => list.groups().iter().filter(|found| found.name() == group).map(|g| g.members().len()).sum(),
        Ok(Err(error)) => {
            tracing::debug!(%error, group, "the brokers do not say who is in the group");
            0
        }
        Err(_) => 0,
    }
}

/// A record to write.
#[derive(Debug, Clone, Default)]
pub struct NewRecord {
    /// Its key.
    pub key: Option<Vec<u8>>,
    /// Its value; `None` is a tombstone.
    pub value: Option<Vec<u8>>,
    /// Its headers.
    pub headers: Headers,
}

struct Report(mpsc::SyncSender<Result<(), NotDelivered>>);

impl Deliver for Report {
    type Tag = ();

    fn delivered(&self, _: Box<()>, result: Result<(), NotDelivered>) {
        // Nobody listens any more when the writer has given up.
        let _ = self.0.try_send(result);
    }
}

/// How many records are under way at once while writing; the room for their results.
const WRITE_WINDOW: usize = 4_096;

/// Writes records and waits until the brokers have all of them; returns how many. Blocks, for `timeout` at most since
/// the last acknowledged record.
///
/// # Errors
/// The first record that was refused, or the time is up; those before it are written.
pub fn write_records(
    settings: &Kafka,
    topic: &str,
    records: impl IntoIterator<Item = NewRecord>,
    timeout: Duration,
) -> Result<usize, Error> {
    let (report, results) = mpsc::sync_channel(WRITE_WINDOW);
    let producer = Producer::new(settings, Report(report))?;
    let written = write_all(&producer, &results, topic, records, timeout);
    written.map_err(|error| producer.fatal().unwrap_or(error))
}

fn write_all(
    producer: &Producer<Report>,
    results: &mpsc::Receiver<Result<(), NotDelivered>>,
    topic: &str,
    records: impl IntoIterator<Item = NewRecord>,
    timeout: Duration,
) -> Result<usize, Error> {
    let (mut sent, mut done) = (0, 0);
    let settle = |done: &mut usize| match results.recv_timeout(timeout) {
        Ok(Ok(())) => {
            *done += 1;
            Ok(())
        }
        Ok(Err(failure)) => Err(refused(topic, failure)),
        Err(_) => {
            let reason = producer.last_error().map_or_else(|| "no answer in time".into(), |(_, reason)| reason);
            Err(Error::Other { doing: "writing records", reason: format!("{topic}: {reason}") })
        }
    };
    for record in records {
        while sent - done >= WRITE_WINDOW {
            settle(&mut done)?;
        }
        let native = Record {
            topic,
            key: record.key.as_deref(),
            value: record.value.as_deref(),
            headers: &record.headers,
            timestamp_ms: None,
        };
        while let Err((why, _)) = producer.send(native, Box::new(())) {
            match why {
                NotSent::QueueFull => settle(&mut done)?,
                NotSent::Refused(failure) => return Err(refused(topic, failure)),
            }
        }
        sent += 1;
    }
    while done < sent {
        settle(&mut done)?;
    }
    Ok(done)
}

fn refused(topic: &str, failure: NotDelivered) -> Error {
    let reason = format!("{topic}: {}", failure.reason);
    match failure.class {
        Class::UnknownTopic => Error::UnknownTopic { topic: topic.into(), setting: "the topic's name".into() },
        Class::NotAuthorised => Error::NotAuthorised { reason },
        Class::Fatal => Error::Fatal { reason },
        _ => Error::Other { doing: "writing records", reason },
    }
}

/// Where to begin reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// At the first record there is.
    Beginning,
    /// Behind the last record there is now.
    Now,
}

/// When to stop reading.
#[derive(Debug, Clone, Copy)]
pub struct ReadLimits {
    /// Where to begin.
    pub from: From,
    /// In any case after this time.
    pub timeout: Duration,
    /// At the end of every partition.
    pub stop_at_end: bool,
}

/// Reads all partitions of a topic, outside of any group, and hands each record to `take` until that returns `false`.
/// Blocks.
///
/// # Errors
/// The brokers are not reached in time. A `take` that never says `false` is no error: reading ends with the time.
pub fn read_records(
    settings: &Kafka,
    topic: &str,
    limits: ReadLimits,
    mut take: impl FnMut(Message) -> bool,
) -> Result<(), Error> {
    let deadline = Instant::now() + limits.timeout;
    let checks = [TopicCheck { topic: topic.into(), setting: "the topic's name" }];
    let partitions = check_topics(settings, &checks, limits.timeout)?.topics.first().map_or(0, |t| t.partitions);
    // librdkafka wants a group's name to assign partitions, and never joins it.
    let more = [("group.id", "blipstream-reader"), ("enable.auto.commit", "false"), ("enable.partition.eof", "true")];
    let client = plain_consumer(settings, &more)?;
    let reading = |error| Error::from_kafka("reading records", &error);
    let name: std::sync::Arc<str> = topic.into();
    let all: Vec<TopicPartition> =
        (0..partitions as i32).map(|partition| TopicPartition { topic: name.clone(), partition }).collect();
    let mut list = Vec::with_capacity(all.len());
    for partition in &all {
        // "Now" is asked for at once, so that what is written from here on is read.
        let start = match limits.from {
            From::Beginning => Offset::Beginning,
            From::Now => {
                let wait = deadline.saturating_duration_since(Instant::now());
                let (_, end) = client.fetch_watermarks(topic, partition.partition, wait).map_err(reading)?;
                Offset::Offset(end)
            }
        };
        list.push((partition, start));
    }
    client.assign(&messages::list(list)).map_err(reading)?;
    let mut ended = std::collections::BTreeSet::new();
    while Instant::now() < deadline {
        match client.poll(STEP) {
            Some(Ok(message)) => {
                ended.remove(&message.partition());
                if !take(messages::owned(&message, name.clone())) {
                    return Ok(());
                }
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                ended.insert(partition);
                if limits.stop_at_end && ended.len() == all.len() {
                    return Ok(());
                }
            }
            // librdkafka goes on trying by itself.
            Some(Err(error)) => tracing::debug!(%error, topic, "while reading"),
            None => {}
        }
    }
    Ok(())
}
