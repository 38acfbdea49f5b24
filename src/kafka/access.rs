//! What the brokers let us do, asked before anything is consumed or written: a missing right is told at once, and not
//! by the first message that needs it.

use std::ffi::CString;
use std::fmt;
use std::time::{Duration, Instant};

use rdkafka::TopicPartitionList;
use rdkafka::bindings::{
    rd_kafka_AclOperation_t, rd_kafka_AdminOptions_destroy, rd_kafka_AdminOptions_new,
    rd_kafka_AdminOptions_set_include_authorized_operations, rd_kafka_AdminOptions_set_request_timeout,
    rd_kafka_AdminOptions_t, rd_kafka_DescribeTopics, rd_kafka_DescribeTopics_result_topics,
    rd_kafka_TopicCollection_destroy, rd_kafka_TopicCollection_of_topic_names,
    rd_kafka_TopicDescription_authorized_operations, rd_kafka_admin_op_t, rd_kafka_error_destroy,
    rd_kafka_event_DescribeTopics_result, rd_kafka_event_destroy, rd_kafka_event_error, rd_kafka_event_t,
    rd_kafka_queue_destroy, rd_kafka_queue_new, rd_kafka_queue_poll, rd_kafka_queue_t, rd_kafka_t,
};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::RDKafkaErrorCode;

use super::client::{self, Found, PlainSide, TopicCheck};
use super::error::{Class, Error};
use super::native::{Owned, slice};
use crate::settings::Kafka;

/// Brokers that have answered before have this time for every further question.
const LEAST: Duration = Duration::from_secs(1);

/// Wait for what a client tells beside an answer.
const BESIDE: Duration = Duration::from_millis(100);

/// What access lists call an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// Of a topic, and of a group.
    Read,
    /// Of a topic.
    Write,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "Read",
            Self::Write => "Write",
        })
    }
}

/// What a worker with some settings finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// The brokers and topics; a topic that may not be used as a worker uses it is an error.
    pub found: Found,
    /// Whether the consumer group may be joined, as far as the brokers could be asked.
    pub group: Result<(), Error>,
}

impl Access {
    /// The first thing that is wrong.
    pub fn granted(self) -> Result<(), Error> {
        self.found.topics.into_iter().try_for_each(|found| found.map(|_| ()))?;
        self.group
    }
}

/// Reaches the brokers, and looks whether a worker with these settings has the topics that it needs and may use them
/// and its group. Blocks, for some `timeout` at most. What brokers without access lists do not say counts as granted.
///
/// # Errors
/// No broker answers within `timeout`, or the login is refused.
pub fn check_access(settings: &Kafka, timeout: Duration) -> Result<Access, Error> {
    let more = [("topic.metadata.refresh.interval.ms", "-1"), ("group.id", &settings.group_id)];
    let client = client::plain_consumer(settings, &more)?;
    let deadline = Instant::now() + timeout;
    let checks = TopicCheck::of(settings);
    let mut found = client::look_up(&client, settings, &checks, timeout)?;
    // The answers come from brokers that have answered just now.
    let left = || deadline.saturating_duration_since(Instant::now()).max(LEAST.min(timeout));
    let ask = Ask { client: client.client().native_ptr() };
    if says_rights(&client, &settings.group_id, LEAST.min(timeout)) {
        for (check, found) in checks.iter().zip(&mut found.topics).filter(|(_, found)| found.is_ok()) {
            match ask.topic(&check.topic, left()) {
                Ok(rights) => {
                    if let Some(right) = check.needs().iter().find(|right| rights.lacks(**right)) {
                        *found = Err(check.denied(*right, settings));
                    }
                }
                // Nobody has said no: should a right be missing, the first record tells.
                Err(code) => tracing::debug!(%code, topic = check.topic, "the brokers do not say what is permitted"),
            }
        }
    }
    let group = loop {
        match group(&client, settings, left().min(LEAST)) {
            // The coordinator of a new group, or after a failure, takes its time; so would joining.
            Err(code) if Class::of(code) == Class::Unreachable && Instant::now() < deadline => {}
            answer => break answer,
        }
    };
    let group = group.map_err(|code| {
        if Class::of(code) == Class::NotAuthorised {
            return Error::Denied {
                user: settings.sasl_username.clone(),
                right: Right::Read,
                resource: "group",
                name: settings.group_id.clone(),
                setting: "kafka.group_id",
            };
        }
        let reason = format!("{}: {code}", settings.group_id);
        Error::Other { doing: "asking the Kafka brokers for the group kafka.group_id", reason }
    });
    Ok(Access { found, group })
}

/// Whether the brokers can be asked for rights. The embedded one would let us wait for each answer; it does not list
/// groups either, and says so at once.
fn says_rights(client: &BaseConsumer<PlainSide>, group: &str, timeout: Duration) -> bool {
    let answer = client.fetch_group_list(Some(group), timeout);
    answer.err().and_then(|error| error.rdkafka_error_code()) != Some(RDKafkaErrorCode::UnsupportedFeature)
}

/// Asks for the group's offsets, as a member does before it reads. The brokers' description of a group would say more,
/// but librdkafka (2.12) ends the process when a connection breaks while it asks a coordinator for one.
fn group(client: &BaseConsumer<PlainSide>, settings: &Kafka, timeout: Duration) -> Result<(), RDKafkaErrorCode> {
    let Some(input) = settings.inputs.first() else { return Ok(()) };
    let mut list = TopicPartitionList::new();
    list.add_partition(&input.topic, 0);
    let Err(error) = client.committed_offsets(list, timeout) else { return Ok(()) };
    // Who may not even look for the coordinator waits for it in vain; the reason is told beside, and to who polls.
    let told = client.poll(BESIDE).and_then(Result::err).map(|error| Class::of_error(&error));
    let reported = client.context().errors.last().map(|(class, _)| class);
    if [told, reported].contains(&Some(Class::NotAuthorised)) {
        return Err(RDKafkaErrorCode::GroupAuthorizationFailed);
    }
    Err(error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown))
}

/// What the brokers say of our rights.
#[derive(Debug, PartialEq, Eq)]
enum Rights {
    /// We have these.
    Named(Vec<Right>),
    /// Nothing.
    Unsaid,
}

impl Rights {
    fn lacks(&self, right: Right) -> bool {
        matches!(self, Self::Named(rights) if !rights.contains(&right))
    }

    fn of(operations: &[rd_kafka_AclOperation_t]) -> Self {
        use rd_kafka_AclOperation_t as Operation;
        // Whoever may see a topic or a group has at least the right to do so; nothing at all means: not said.
        if operations.is_empty() {
            return Self::Unsaid;
        }
        let right = |operation: &Operation| match operation {
            Operation::RD_KAFKA_ACL_OPERATION_READ => Some(Right::Read),
            Operation::RD_KAFKA_ACL_OPERATION_WRITE => Some(Right::Write),
            _ => None,
        };
        Self::Named(operations.iter().filter_map(right).collect())
    }
}

/// Asks with a client of librdkafka, which must outlive it. rdkafka has no calls for these questions.
struct Ask {
    client: *mut rd_kafka_t,
}

impl Ask {
    fn topic(&self, topic: &str, timeout: Duration) -> Result<Rights, RDKafkaErrorCode> {
        let Ok(name) = CString::new(topic) else { return Ok(Rights::Unsaid) };
        let kind = rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS;
        let answer = self.ask(kind, timeout, |options, queue| {
            let mut names = [name.as_ptr()];
            // SAFETY: the array outlives the call, which copies it.
            let topics = unsafe { rd_kafka_TopicCollection_of_topic_names(names.as_mut_ptr(), names.len()) };
            let topics = Owned(topics, rd_kafka_TopicCollection_destroy);
            // SAFETY: all are valid, and copied or counted by the call.
            unsafe { rd_kafka_DescribeTopics(self.client, topics.0, options, queue) }
        });
        let Some(answer) = answer? else { return Ok(Rights::Unsaid) };
        // SAFETY: the answer owns everything that is read here and lives until the end; lengths are librdkafka's.
        unsafe {
            let result = rd_kafka_event_DescribeTopics_result(answer.0);
            let mut count = 0;
            let topics = rd_kafka_DescribeTopics_result_topics(result, &raw mut count);
            if count == 0 || topics.is_null() {
                return Ok(Rights::Unsaid);
            }
            let operations = rd_kafka_TopicDescription_authorized_operations(*topics, &raw mut count);
            Ok(Rights::of(slice(operations, count)))
        }
    }

    /// Asks and waits; `None` from a broker that does not know the question.
    fn ask(
        &self,
        kind: rd_kafka_admin_op_t,
        timeout: Duration,
        send: impl FnOnce(*const rd_kafka_AdminOptions_t, *mut rd_kafka_queue_t),
    ) -> Result<Option<Owned<rd_kafka_event_t>>, RDKafkaErrorCode> {
        let timeout = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: the client is valid. A refused option leaves the default, and its error is freed.
        let (options, queue) = unsafe {
            let options = Owned(rd_kafka_AdminOptions_new(self.client, kind), rd_kafka_AdminOptions_destroy);
            rd_kafka_AdminOptions_set_request_timeout(options.0, timeout, std::ptr::null_mut(), 0);
            let refused = rd_kafka_AdminOptions_set_include_authorized_operations(options.0, 1);
            drop(Owned(refused, rd_kafka_error_destroy));
            (options, Owned(rd_kafka_queue_new(self.client), rd_kafka_queue_destroy))
        };
        send(options.0, queue.0);
        // SAFETY: the queue is ours; the event is owned by who polled it.
        let event = Owned(unsafe { rd_kafka_queue_poll(queue.0, timeout) }, rd_kafka_event_destroy);
        if event.0.is_null() {
            return Err(RDKafkaErrorCode::OperationTimedOut);
        }
        // SAFETY: the event is valid.
        match unsafe { rd_kafka_event_error(event.0) }.into() {
            RDKafkaErrorCode::NoError => Ok(Some(event)),
            RDKafkaErrorCode::UnsupportedFeature => Ok(None),
            code => Err(code),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kafka::EmbeddedBroker;

    #[test]
    fn a_broker_that_does_not_say_what_is_permitted_permits() {
        let mut settings = Kafka::default();
        let outputs = [settings.captions_topic.as_str(), settings.dead_letter_topic.as_str()];
        let topics: Vec<_> = settings.consumed_topics().chain(outputs).map(|topic| (topic, 1)).collect();
        let broker = EmbeddedBroker::start(1, &topics).unwrap();
        settings.bootstrap_servers = broker.bootstrap_servers().unwrap();
        let begun = Instant::now();
        check_access(&settings, Duration::from_secs(20)).unwrap().granted().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(10), "it waits for what cannot be told");
    }

    #[test]
    fn rights_that_are_not_named_are_missing() {
        use rd_kafka_AclOperation_t as Operation;
        let rights = Rights::of(&[Operation::RD_KAFKA_ACL_OPERATION_DESCRIBE, Operation::RD_KAFKA_ACL_OPERATION_READ]);
        assert_eq!((rights.lacks(Right::Read), rights.lacks(Right::Write)), (false, true));
        assert!(!Rights::of(&[]).lacks(Right::Write), "nothing at all means that it was not said");
        assert!(Rights::Named(Vec::new()).lacks(Right::Read));
    }
}
