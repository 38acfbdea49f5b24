//! A member of the consumer group. One thread owns it and polls it all the time.

use std::cell::RefCell;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rdkafka::bindings::{rd_kafka_commit_queue, rd_kafka_queue_destroy, rd_kafka_queue_get_consumer};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{Message as _, Offset};

use super::context::{ConsumerSide, partition_of};
use super::ends::Question;
use super::error::{Class, Error};
use super::transaction::GroupMetadata;
use super::{config, messages};
use crate::message::Message;
use crate::offsets::{Committed, TopicPartition};
use crate::settings::Kafka;

/// Questions to the brokers that the consumer's thread waits for.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);

/// What a person can do who reads that the broker has fenced a static member.
const TWIN: &str =
    "Another worker has joined under the same kafka.group_instance_id: every worker needs a name of its own";

/// What the consumer's thread asks about commits; it owns the consumer, the answers are another room's.
///
/// The rule it must keep: an offset that is committed is never beyond the first unresolved message.
pub trait Committer: Send {
    /// What to commit now, beyond what the group has.
    fn due(&mut self) -> Vec<(TopicPartition, Committed)>;
    /// Whether a message waits for something that is due.
    fn is_urgent(&self) -> bool;
    /// The result of a commit.
    fn committed(&mut self, offsets: &[(TopicPartition, Committed)], result: &Result<(), Error>);
    /// Whether somebody else is still to commit something of these partitions.
    fn is_elsewhere(&self, partitions: &[TopicPartition]) -> bool;
}

/// Something that happened to the consumer.
#[derive(Debug)]
pub enum Event {
    /// A message.
    Message(Message),
    /// The end of a partition with this number was reached; librdkafka does not say of which topic.
    End(i32),
    /// Partitions are ours once [`Consumer::assign`] is called; the group waits for it.
    Assigned(Vec<TopicPartition>),
    /// Partitions go to others once [`Consumer::unassign`] is called; the group waits for it.
    Revoked {
        /// Which.
        partitions: Vec<TopicPartition>,
        /// Others have them already: nothing may be committed.
        lost: bool,
    },
    /// A commit that did not wait has its result.
    Committed(Vec<(TopicPartition, Committed)>, Result<(), Error>),
    /// Statistics, once a second.
    Stats(Stats),
    /// The last readable offset of partitions, exclusive, as [`Consumer::ask_ends`] asked.
    Ends(Vec<(TopicPartition, i64)>),
    /// An error that librdkafka deals with itself; it was logged.
    Passing(Class),
    /// The offset to read from is not in the log of some partition.
    OffsetOutOfRange,
    /// The consumer can do nothing more.
    Fatal(Error),
}

/// Statistics of the consumer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Brokers that are connected.
    pub brokers_up: usize,
    /// Whether the group has settled with us in it, be it without a partition.
    pub joined: bool,
    /// Bytes of messages fetched and not delivered.
    pub prefetched_bytes: u64,
    /// The partitions that librdkafka knows of.
    pub partitions: Vec<PartitionStats>,
}

/// Statistics of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionStats {
    /// Which.
    pub partition: TopicPartition,
    /// One behind its last readable offset, if known.
    pub log_end: Option<i64>,
    /// Where librdkafka stands at the end of the partition, if it does.
    pub end_seen: Option<i64>,
    /// Messages fetched and not delivered, of all partitions together.
    pub prefetched: u64,
}

/// Where reading begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At the first message there is.
    Beginning,
    /// At an offset.
    At(i64),
}

impl From<Start> for Offset {
    fn from(start: Start) -> Self {
        match start {
            Start::Beginning => Self::Beginning,
            Start::At(offset) => Self::Offset(offset),
        }
    }
}

/// A member of the consumer group `kafka.group_id` that reads `kafka.inputs` and `kafka.retry_topics`.
pub struct Consumer {
    /// For ends of partitions. Stands before the client, so that it goes first.
    question: RefCell<Option<Question>>,
    base: Arc<BaseConsumer<ConsumerSide>>,
    inputs: Vec<String>,
    /// Names that messages share.
    topics: RefCell<Vec<Arc<str>>>,
}

impl Consumer {
    /// Creates the client; it joins its group with [`Consumer::subscribe`].
    pub fn new(settings: &Kafka) -> Result<Self, Error> {
        let starting = |error| Error::from_kafka("starting the consumer", &error);
        let config = config::consumer(settings)?;
        let base: BaseConsumer<ConsumerSide> = config.create_with_context(ConsumerSide::default()).map_err(starting)?;
        let inputs = settings.consumed_topics().map(str::to_owned).collect();
        Ok(Self { base: Arc::new(base), inputs, topics: RefCell::default(), question: RefCell::default() })
    }

    /// Asks for a share of the inputs. From here on the consumer must be polled.
    pub fn subscribe(&self) -> Result<(), Error> {
        let topics: Vec<&str> = self.inputs.iter().map(String::as_str).collect();
        self.base.subscribe(&topics).map_err(|error| Error::from_kafka("starting the consumer", &error))
    }

    /// What a producer of transactions needs to know of the group, for as long as this consumer lives.
    pub fn membership(&self) -> Membership {
        Membership(Arc::downgrade(&self.base))
    }

    /// The next event, or `None` after `timeout`.
    pub fn poll(&self, timeout: Duration) -> Option<Event> {
        // What was written down before came first.
        self.base.context().next().or_else(|| self.ends()).or_else(|| {
            let polled = self.base.poll(timeout);
            polled.map(|result| self.event(result)).or_else(|| self.base.context().next())
        })
    }

    fn event(&self, result: Result<rdkafka::message::BorrowedMessage<'_>, KafkaError>) -> Event {
        let error = match result {
            Ok(message) => return Event::Message(messages::owned(&message, self.topic(message.topic()))),
            Err(KafkaError::PartitionEOF(partition)) => return Event::End(partition),
            Err(error) => error,
        };
        let class = Class::of_error(&error);
        if matches!(error, KafkaError::MessageConsumptionFatal(_)) || class == Class::Fatal {
            return Event::Fatal(self.fatal(&error));
        }
        if class == Class::OffsetOutOfRange { Event::OffsetOutOfRange } else { Event::Passing(class) }
    }

    fn fatal(&self, error: &KafkaError) -> Error {
        match self.base.client().fatal_error() {
            Some((RDKafkaErrorCode::FencedInstanceId, reason)) => Error::Fatal { reason: format!("{reason}. {TWIN}") },
            Some((_, reason)) => Error::Fatal { reason },
            None => Error::Fatal { reason: error.to_string() },
        }
    }

    fn topic(&self, name: &str) -> Arc<str> {
        let mut topics = self.topics.borrow_mut();
        if let Some(topic) = topics.iter().find(|topic| &***topic == name) {
            return topic.clone();
        }
        let topic: Arc<str> = name.into();
        topics.push(topic.clone());
        topic
    }

    /// The newest error that librdkafka reported, if things have not been well again since.
    pub fn last_error(&self) -> Option<(Class, String)> {
        self.base.context().errors.last()
    }

    /// What the group has committed for each partition. Waits for the brokers, two seconds at most.
    pub fn committed(&self, partitions: &[TopicPartition]) -> Result<Vec<(TopicPartition, Option<Committed>)>, Error> {
        committed(&self.base, partitions)
    }

    /// Takes partitions on, each from where it is to be read.
    pub fn assign(&self, partitions: &[(TopicPartition, Start)]) -> Result<(), Error> {
        let list = messages::list(partitions.iter().map(|(partition, start)| (partition, (*start).into())));
        let taking = |error| Error::from_kafka("taking partitions on", &error);
        self.base.incremental_assign(&list).map_err(taking)
    }

    /// Lets partitions go.
    pub fn unassign(&self, partitions: &[TopicPartition]) -> Result<(), Error> {
        let list = messages::list(partitions.iter().map(|partition| (partition, Offset::Invalid)));
        self.base.incremental_unassign(&list).map_err(|error| Error::from_kafka("giving partitions back", &error))
    }

    /// Whether others already have what we thought was ours.
    pub fn assignment_lost(&self) -> bool {
        self.base.assignment_lost()
    }

    /// Stops the delivery of partitions; what was prefetched of them is thrown away and read again later.
    pub fn pause(&self, partitions: &[TopicPartition]) -> Result<(), Error> {
        let list = messages::list(partitions.iter().map(|partition| (partition, Offset::Invalid)));
        self.base.pause(&list).map_err(|error| Error::from_kafka("pausing partitions", &error))
    }

    /// Goes on with the delivery of partitions.
    pub fn resume(&self, partitions: &[TopicPartition]) -> Result<(), Error> {
        let list = messages::list(partitions.iter().map(|partition| (partition, Offset::Invalid)));
        self.base.resume(&list).map_err(|error| Error::from_kafka("resuming partitions", &error))
    }

    /// Reads a partition from `start` on, without waiting.
    pub fn seek(&self, partition: &TopicPartition, start: Start) -> Result<(), Error> {
        let seeking = |error| Error::from_kafka("seeking", &error);
        self.base.seek(&partition.topic, partition.partition, start.into(), Duration::ZERO).map_err(seeking)
    }

    /// Commits exactly these offsets with their notes; the result comes as [`Event::Committed`].
    pub fn commit(&self, offsets: &[(TopicPartition, Committed)]) -> Result<(), Error> {
        let list = messages::offset_list(offsets);
        let client = self.base.client().native_ptr();
        // rdkafka's own asynchronous commit tells nobody its result: librdkafka 2.12 reports it only to a C callback,
        // which rdkafka does not set, or to the queue that is named here.
        // SAFETY: client and list outlive the call, which copies the list; the queue is a counted reference.
        let code = unsafe {
            let queue = rd_kafka_queue_get_consumer(client);
            let code = rd_kafka_commit_queue(client, list.ptr(), queue, None, std::ptr::null_mut());
            rd_kafka_queue_destroy(queue);
            code
        };
        if code == RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
            return Ok(());
        }
        Err(Error::from_kafka("committing offsets", &KafkaError::ConsumerCommit(code.into())))
    }

    /// Commits exactly these offsets with their notes and waits for the broker; at most a session's time-out when it is away, which is why
    /// the end of a worker does not use it.
    pub fn commit_now(&self, offsets: &[(TopicPartition, Committed)]) -> Result<(), Error> {
        if offsets.is_empty() {
            return Ok(());
        }
        match self.base.commit(&messages::offset_list(offsets), CommitMode::Sync) {
            // Nothing to commit is no failure.
            Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => Ok(()),
            Err(error) => Err(Error::from_kafka("committing offsets", &error)),
        }
    }

    /// First and last readable offset of a partition, the latter exclusive. Waits for the broker, two seconds at most.
    pub fn bounds(&self, partition: &TopicPartition) -> Result<(i64, i64), Error> {
        let asking = |error| Error::from_kafka("asking for the bounds of a partition", &error);
        self.base.fetch_watermarks(&partition.topic, partition.partition, QUERY_TIMEOUT).map_err(asking)
    }

    /// Asks for the ends of partitions, unless that is being asked already; the answer comes as [`Event::Ends`]. Of
    /// paused ones the statistics tell the ends only as they were before.
    pub fn ask_ends(&self, partitions: &[TopicPartition]) {
        let mut question = self.question.borrow_mut();
        if question.is_none() && !partitions.is_empty() {
            // SAFETY: the client is valid, and its last use is in `close`, after the question is gone.
            *question = Some(unsafe { Question::ask(self.base.client().native_ptr(), partitions) });
        }
    }

    fn ends(&self) -> Option<Event> {
        let mut question = self.question.borrow_mut();
        let ends = question.as_ref()?.answer()?;
        *question = None;
        Some(Event::Ends(ends))
    }

    /// Leaves the group. Commit before; what is polled for is over.
    pub fn close(self) {
        self.question.take();
        self.base.context().close();
        drop(self.base);
    }
}

/// The group as a producer of transactions sees it, from another thread than the consumer's.
pub struct Membership(Weak<BaseConsumer<ConsumerSide>>);

impl Membership {
    /// Who we are in the group now; `None` when the consumer has ended.
    ///
    /// Take it first and look at the ledger afterwards: partitions leave the ledger before they leave the group, so what
    /// the ledger still has was ours in the generation that was taken, and the brokers refuse that generation from the
    /// moment on when the partitions are another worker's.
    pub fn metadata(&self) -> Option<GroupMetadata> {
        self.0.upgrade()?.group_metadata().map(GroupMetadata)
    }

    /// What the group has committed for each partition; transactions that are under way are waited for. Waits for the
    /// brokers, two seconds at most.
    ///
    /// # Errors
    /// The brokers do not answer in time, or the consumer has ended.
    pub fn committed(&self, partitions: &[TopicPartition]) -> Result<Vec<(TopicPartition, Option<Committed>)>, Error> {
        let ended = || Error::Other { doing: "asking for the committed offsets", reason: "the consumer ended".into() };
        committed(&*self.0.upgrade().ok_or_else(ended)?, partitions)
    }
}

fn committed(
    consumer: &BaseConsumer<ConsumerSide>,
    partitions: &[TopicPartition],
) -> Result<Vec<(TopicPartition, Option<Committed>)>, Error> {
    let asking = |error| Error::from_kafka("asking for the committed offsets", &error);
    let list = messages::list(partitions.iter().map(|partition| (partition, Offset::Invalid)));
    let list = consumer.committed_offsets(list, QUERY_TIMEOUT).map_err(asking)?;
    let elements = list.elements();
    let answer = elements.iter().zip(messages::notes(&list)).map(|(element, note)| {
        element.error().map_err(asking)?;
        let committed = messages::exact_offset(element).map(|offset| Committed { offset, note });
        Ok((partition_of(element.topic(), element.partition()), committed))
    });
    answer.collect()
}

impl std::fmt::Debug for Membership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Membership").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Consumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Consumer").finish_non_exhaustive()
    }
}
