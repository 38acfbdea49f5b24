//! Reads what a topic holds now, outside of any group, and ends there.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::{Message as _, Offset, TopicPartitionList};

use super::client::{self, PlainSide, TopicCheck};
use super::error::{Class, Error};
use super::messages;
use crate::message::Message;
use crate::offsets::TopicPartition;
use crate::settings::Kafka;

/// KiB that librdkafka reads ahead: whoever prints or writes what is read may be slow.
const READ_AHEAD_KIB: &str = "16384";

/// The records of a topic that were there when it was opened, one after the other. It joins no group and commits
/// nothing, and what is written meanwhile is not read.
pub struct Snapshot {
    client: BaseConsumer<PlainSide>,
    name: Arc<str>,
    /// Partitions that are not read to their end, and the offset behind it.
    left: BTreeMap<i32, i64>,
    offsets: u64,
    patience: Duration,
    idle: Duration,
}

impl Snapshot {
    /// Looks the topic's ends up and begins to read, within `patience`. With `only`, nothing but these offsets of each
    /// partition that is named; what of them does not exist is passed over. Blocks.
    ///
    /// # Errors
    /// The brokers are not reached in time, or the topic does not exist or may not be seen.
    pub fn open(
        settings: &Kafka,
        topic: &TopicCheck,
        only: Option<&BTreeMap<i32, RangeInclusive<i64>>>,
        patience: Duration,
    ) -> Result<Self, Error> {
        let deadline = Instant::now() + patience;
        let found = client::check_topics(settings, std::slice::from_ref(topic), patience)?.topics;
        let partitions = found.first().map_or(0, |topic| topic.partitions as i32);
        // librdkafka wants a group's name to assign partitions, and never joins it. A record that is gone is no reason
        // to skip those that are left.
        let more = [
            ("group.id", "blipstream-reader"),
            ("enable.auto.commit", "false"),
            ("enable.partition.eof", "true"),
            ("auto.offset.reset", "earliest"),
            ("queued.max.messages.kbytes", READ_AHEAD_KIB),
        ];
        let client = client::plain_consumer(settings, &more)?;
        let name: Arc<str> = topic.topic.as_str().into();
        let (mut list, mut left, mut offsets) = (Vec::new(), BTreeMap::new(), 0);
        for partition in 0..partitions {
            let wanted = match only.map(|places| places.get(&partition)) {
                None => 0..=i64::MAX,
                Some(Some(range)) => range.clone(),
                Some(None) => continue,
            };
            let wait = deadline.saturating_duration_since(Instant::now());
            let ends = client.fetch_watermarks(&name, partition, wait);
            let (low, high) = ends.map_err(|error| Error::from_kafka("looking up the ends of a topic", &error))?;
            let (first, end) = (low.max(*wanted.start()), high.min(wanted.end().saturating_add(1)));
            if first < end {
                list.push((TopicPartition { topic: name.clone(), partition }, Offset::Offset(first)));
                left.insert(partition, end);
                offsets += end.abs_diff(first);
            }
        }
        let list = messages::list(list.iter().map(|(partition, offset)| (partition, *offset)));
        client.assign(&list).map_err(|error| Error::from_kafka("reading records", &error))?;
        Ok(Self { client, name, left, offsets, patience, idle: Duration::ZERO })
    }

    /// Offsets from the first to the last that are read; there may be fewer records.
    pub fn offsets(&self) -> u64 {
        self.offsets
    }

    /// Whether everything was read.
    pub fn is_over(&self) -> bool {
        self.left.is_empty()
    }

    /// The next record, if one comes within `wait`. Blocks.
    ///
    /// # Errors
    /// Reading cannot go on: the login is refused, the topic may not be read or is gone, or nothing has come for as
    /// long as the patience given at the start.
    pub fn next(&mut self, wait: Duration) -> Result<Option<Message>, Error> {
        if self.is_over() {
            return Ok(None);
        }
        let begun = Instant::now();
        match self.client.poll(wait) {
            Some(Ok(message)) => {
                let (partition, offset) = (message.partition(), message.offset());
                // Read ahead, behind the end of its partition.
                let Some(&end) = self.left.get(&partition) else { return Ok(None) };
                let message = (offset < end).then(|| messages::owned(&message, self.name.clone()));
                self.idle = Duration::ZERO;
                if offset + 1 >= end {
                    self.finish(partition);
                }
                return Ok(message);
            }
            // Offsets before the end may be without records: of transactions, or compacted away.
            Some(Err(KafkaError::PartitionEOF(partition))) => self.finish(partition),
            Some(Err(error)) => {
                if Class::of_error(&error).ends_reading() {
                    return Err(Error::from_kafka("reading records", &error));
                }
                // librdkafka goes on trying by itself.
                tracing::debug!(%error, "while reading");
            }
            None => {}
        }
        self.idle += begun.elapsed();
        if self.idle >= self.patience && !self.is_over() {
            let why =
                self.client.context().errors.last().map_or_else(String::new, |(_, reason)| format!(" ({reason})"));
            let reason = format!("{}: nothing came for {:?}{why}, and not all was read", self.name, self.patience);
            return Err(Error::Other { doing: "reading records", reason });
        }
        Ok(None)
    }

    fn finish(&mut self, partition: i32) {
        self.left.remove(&partition);
        self.idle = Duration::ZERO;
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.name, partition);
        // Only spares the brokers some work: what is behind the end is not handed on anyway.
        if let Err(error) = self.client.pause(&list) {
            tracing::debug!(%error, partition, "cannot pause");
        }
    }
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot").field("left", &self.left).finish_non_exhaustive()
    }
}
