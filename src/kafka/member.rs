//! One client in the consumer group, and what it is asked and told. One thread owns it and polls it all the time.

use std::cell::RefCell;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rdkafka::bindings::{rd_kafka_commit_queue, rd_kafka_queue_destroy, rd_kafka_queue_get_consumer};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{Message as _, Offset};

use super::consumer::{Event, MemberId, Start};
use super::context::{ConsumerSide, Errors, partition_of};
use super::ends::Question;
use super::error::{Class, Error};
use super::{config, messages};
use crate::offsets::{Committed, TopicPartition};
use crate::settings::Kafka;

/// Questions to the brokers that the consumer's thread waits for.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);

/// What a person can do who reads that the broker has fenced a static member.
const TWIN: &str =
    "Another worker has joined under the same kafka.group_instance_id: every worker needs a name of its own";

const STARTING: &str = "starting the consumer";

/// What tells a member from the others of the same worker, whatever its topics are.
fn name(settings: &Kafka, id: MemberId) -> String {
    if id < settings.inputs.len() { id.to_string() } else { "retries".to_owned() }
}

/// One client of librdkafka in the group.
pub(super) struct Member {
    /// For ends of partitions. Stands before the client, so that it goes first.
    question: RefCell<Option<Question>>,
    base: Arc<BaseConsumer<ConsumerSide>>,
    /// Names that messages share.
    topics: Vec<Arc<str>>,
}

impl Member {
    /// Creates the client, the one of this number among `of`; it joins its group with [`Member::subscribe`].
    pub(super) fn new(
        settings: &Kafka,
        topics: &[&str],
        (id, of): (MemberId, usize),
        errors: Arc<Errors>,
    ) -> Result<Self, Error> {
        let config = config::consumer(settings, &name(settings, id), of)?;
        let base = config.create_with_context(ConsumerSide::new(id, errors));
        let base: BaseConsumer<ConsumerSide> = base.map_err(|error| Error::from_kafka(STARTING, &error))?;
        let topics = topics.iter().map(|topic| (*topic).into()).collect();
        Ok(Self { base: Arc::new(base), topics, question: RefCell::default() })
    }

    /// Asks for a share of its topics. From here on it must be polled.
    pub(super) fn subscribe(&self) -> Result<(), Error> {
        let topics: Vec<&str> = self.topics.iter().map(|topic| &**topic).collect();
        self.base.subscribe(&topics).map_err(|error| Error::from_kafka(STARTING, &error))
    }

    /// Whether it reads this topic.
    pub(super) fn reads(&self, topic: &str) -> bool {
        self.topics.iter().any(|known| &**known == topic)
    }

    /// The topics that it reads.
    pub(super) fn topics(&self) -> &[Arc<str>] {
        &self.topics
    }

    /// The client, for as long as it lives.
    pub(super) fn client(&self) -> Weak<BaseConsumer<ConsumerSide>> {
        Arc::downgrade(&self.base)
    }

    /// The next event, or `None` after `timeout`.
    pub(super) fn poll(&self, timeout: Duration) -> Option<Event> {
        // What was written down before came first.
        self.base.context().next().or_else(|| self.ends()).or_else(|| {
            let polled = self.base.poll(timeout);
            polled.map(|result| self.event(result)).or_else(|| self.base.context().next())
        })
    }

    fn event(&self, result: Result<rdkafka::message::BorrowedMessage<'_>, KafkaError>) -> Event {
        let error = match result {
            Ok(message) => return Event::Message(messages::owned(&message, self.topic(message.topic()))),
            Err(KafkaError::PartitionEOF(partition)) => return Event::End(self.base.context().member, partition),
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
        self.topics.iter().find(|topic| &***topic == name).map_or_else(|| name.into(), Arc::clone)
    }

    /// What the group has committed for each partition. Waits for the brokers, two seconds at most.
    pub(super) fn committed(
        &self,
        partitions: &[TopicPartition],
    ) -> Result<Vec<(TopicPartition, Option<Committed>)>, Error> {
        committed(&self.base, partitions)
    }

    /// Takes partitions on, each from where it is to be read.
    pub(super) fn assign(&self, partitions: &[(TopicPartition, Start)]) -> Result<(), Error> {
        let list = messages::list(partitions.iter().map(|(partition, start)| (partition, (*start).into())));
        let taking = |error| Error::from_kafka("taking partitions on", &error);
        self.base.incremental_assign(&list).map_err(taking)
    }

    /// Lets partitions go.
    pub(super) fn unassign(&self, partitions: &[TopicPartition]) -> Result<(), Error> {
        let list = messages::list(partitions.iter().map(|partition| (partition, Offset::Invalid)));
        self.base.incremental_unassign(&list).map_err(|error| Error::from_kafka("giving partitions back", &error))
    }

    /// Whether others already have what we thought was ours.
    pub(super) fn assignment_lost(&self) -> bool {
        self.base.assignment_lost()
    }

    /// Stops the delivery of partitions; what was prefetched of them is thrown away and read again later.
    pub(super) fn pause(&self, partitions: &[TopicPartition]) -> Result<(), Error> {
        let list = messages::list(partitions.iter().map(|partition| (partition, Offset::Invalid)));
        self.base.pause(&list).map_err(|error| Error::from_kafka("pausing partitions", &error))
    }

    /// Goes on with the delivery of partitions.
    pub(super) fn resume(&self, partitions: &[TopicPartition]) -> Result<(), Error> {
        let list = messages::list(partitions.iter().map(|partition| (partition, Offset::Invalid)));
        self.base.resume(&list).map_err(|error| Error::from_kafka("resuming partitions", &error))
    }

    /// Reads a partition from `start` on, without waiting.
    pub(super) fn seek(&self, partition: &TopicPartition, start: Start) -> Result<(), Error> {
        let seeking = |error| Error::from_kafka("seeking", &error);
        self.base.seek(&partition.topic, partition.partition, start.into(), Duration::ZERO).map_err(seeking)
    }

    /// Commits exactly these offsets with their notes; the result comes as [`Event::Committed`].
    pub(super) fn commit(&self, offsets: &[(TopicPartition, Committed)]) -> Result<(), Error> {
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
    pub(super) fn commit_now(&self, offsets: &[(TopicPartition, Committed)]) -> Result<(), Error> {
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
    pub(super) fn bounds(&self, partition: &TopicPartition) -> Result<(i64, i64), Error> {
        let asking = |error| Error::from_kafka("asking for the bounds of a partition", &error);
        self.base.fetch_watermarks(&partition.topic, partition.partition, QUERY_TIMEOUT).map_err(asking)
    }

    /// Asks for the ends of partitions, unless that is being asked already; the answer comes as [`Event::Ends`]. Of
    /// paused ones the statistics tell the ends only as they were before.
    pub(super) fn ask_ends(&self, partitions: &[TopicPartition]) {
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
    pub(super) fn close(self) {
        self.question.take();
        self.base.context().close();
        drop(self.base);
    }
}

/// What the group has committed for each partition, whichever of its clients asks. Waits for the brokers, two seconds at
/// most.
pub(super) fn committed(
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

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Member").field("topics", &self.topics).finish_non_exhaustive()
    }
}
