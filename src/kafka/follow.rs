//! Reads whole topics outside of any group, for commands that watch results come in.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::{Message as _, Offset};

use super::client::{self, From, PlainSide, TopicCheck};
use super::error::{Class, Error};
use super::messages;
use crate::message::Message;
use crate::offsets::TopicPartition;
use crate::settings::Kafka;

/// Reads all partitions of some topics and goes on reading. It joins no group and commits nothing.
pub struct Follower {
    client: BaseConsumer<PlainSide>,
    names: BTreeMap<String, Arc<str>>,
    begins: Vec<(TopicPartition, i64)>,
}

impl Follower {
    /// Looks the topics up and begins to read, within `timeout`. Blocks. With [`From::Now`] all that is written after
    /// this call has returned is read.
    ///
    /// # Errors
    /// The brokers are not reached in time, or a topic does not exist or may not be seen.
    pub fn open(settings: &Kafka, topics: &[TopicCheck], from: From, timeout: Duration) -> Result<Self, Error> {
        let deadline = Instant::now() + timeout;
        let found = client::check_topics(settings, topics, timeout)?.topics;
        // librdkafka wants a group's name to assign partitions, and never joins it. A record that is gone is no reason
        // to skip those that are left.
        let more = [
            ("group.id", "blipstream-reader"),
            ("enable.auto.commit", "false"),
            ("enable.partition.eof", "true"),
            ("auto.offset.reset", "earliest"),
        ];
        let client = client::plain_consumer(settings, &more)?;
        let reading = |error| Error::from_kafka("reading records", &error);
        let mut names = BTreeMap::new();
        let mut all = Vec::new();
        for topic in found {
            let name: Arc<str> = topic.topic.as_str().into();
            names.insert(topic.topic, name.clone());
            let partitions = 0..topic.partitions as i32;
            all.extend(partitions.map(|partition| TopicPartition { topic: name.clone(), partition }));
        }
        let (mut list, mut begins) = (Vec::with_capacity(all.len()), Vec::new());
        for partition in &all {
            let start = match from {
                From::Beginning => Offset::Beginning,
                From::Now => {
                    let wait = deadline.saturating_duration_since(Instant::now());
                    let ends = client.fetch_watermarks(&partition.topic, partition.partition, wait);
                    let end = ends.map_err(reading)?.1;
                    begins.push((partition.clone(), end));
                    Offset::Offset(end)
                }
            };
            list.push((partition, start));
        }
        client.assign(&messages::list(list)).map_err(reading)?;
        Ok(Self { client, names, begins })
    }

    /// With [`From::Now`]: the offset of each partition that it begins to read at.
    pub fn begins(&self) -> &[(TopicPartition, i64)] {
        &self.begins
    }

    /// The next record, if one comes within `wait`. Blocks. Brokers that are away for a while are waited for.
    ///
    /// # Errors
    /// Reading cannot go on: the login is refused, or the topic may not be read or is gone.
    pub fn next(&self, wait: Duration) -> Result<Option<Message>, Error> {
        let error = match self.client.poll(wait) {
            None | Some(Err(KafkaError::PartitionEOF(_))) => return Ok(None),
            Some(Ok(message)) => {
                let topic = self.names.get(message.topic()).cloned().unwrap_or_else(|| message.topic().into());
                return Ok(Some(messages::owned(&message, topic)));
            }
            Some(Err(error)) => error,
        };
        if Class::of_error(&error).ends_reading() {
            return Err(Error::from_kafka("reading records", &error));
        }
        // librdkafka goes on trying by itself.
        tracing::debug!(%error, "while reading");
        Ok(None)
    }
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower").finish_non_exhaustive()
    }
}
