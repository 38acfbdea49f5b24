//! What the brokers let us do, asked before anything is consumed or written: a missing right is told at once, and not
//! by the first message that needs it.

use std::ffi::CString;
use std::fmt;
use std::time::{Duration, Instant};

use rdkafka::bindings::{
    rd_kafka_AclOperation_t, rd_kafka_AdminOptions_destroy, rd_kafka_AdminOptions_new,
    rd_kafka_AdminOptions_set_include_authorized_operations, rd_kafka_AdminOptions_set_request_timeout,
    rd_kafka_AdminOptions_t, rd_kafka_ConsumerGroupDescription_authorized_operations,
    rd_kafka_ConsumerGroupDescription_error, rd_kafka_DescribeConsumerGroups,
    rd_kafka_DescribeConsumerGroups_result_groups, rd_kafka_DescribeTopics, rd_kafka_DescribeTopics_result_topics,
    rd_kafka_TopicCollection_destroy, rd_kafka_TopicCollection_of_topic_names,
    rd_kafka_TopicDescription_authorized_operations, rd_kafka_admin_op_t, rd_kafka_error_code, rd_kafka_error_destroy,
    rd_kafka_event_DescribeConsumerGroups_result, rd_kafka_event_DescribeTopics_result, rd_kafka_event_destroy,
    rd_kafka_event_error, rd_kafka_event_t, rd_kafka_queue_destroy, rd_kafka_queue_new, rd_kafka_queue_poll,
    rd_kafka_queue_t, rd_kafka_t,
};
use rdkafka::consumer::Consumer as _;
use rdkafka::error::RDKafkaErrorCode;

use super::client::{self, Found, TopicCheck};
use super::error::{Class, Error};
use crate::settings::Kafka;

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
    /// Whether the consumer group may be joined.
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
    let client = client::plain_consumer(settings, &[("topic.metadata.refresh.interval.ms", "-1")])?;
    let deadline = Instant::now() + timeout;
    let checks = TopicCheck::of(settings);
    let mut found = client::look_up(&client, settings, &checks, timeout)?;
    // The answers come from brokers that have answered just now.
    let left = || deadline.saturating_duration_since(Instant::now()).clamp(Duration::from_secs(1), timeout);
    let ask = Ask { client: client.client().native_ptr() };
    let rights = ask.group(&settings.group_id, left());
    // A broker that does not say it of a group, as the embedded one, would let us wait for what it says of a topic.
    if rights != Rights::UNKNOWN {
        for (check, found) in checks.iter().zip(&mut found.topics) {
            if found.is_ok() && ask.topic(&check.topic, left()).lacks(check.needs()) {
                *found = Err(check.denied(settings));
            }
        }
    }
    let group = match rights {
        rights if rights.lacks(Right::Read) => Err(Error::Denied {
            user: settings.sasl_username.clone(),
            right: Right::Read,
            resource: "group",
            name: settings.group_id.clone(),
            setting: "kafka.group_id",
        }),
        _ => Ok(()),
    };
    Ok(Access { found, group })
}

/// The rights that the brokers name; `None` where they do not say.
#[derive(Debug, PartialEq, Eq)]
struct Rights(Option<Vec<Right>>);

impl Rights {
    const UNKNOWN: Self = Self(None);
    const NONE: Self = Self(Some(Vec::new()));

    fn lacks(&self, right: Right) -> bool {
        self.0.as_ref().is_some_and(|rights| !rights.contains(&right))
    }

    fn of(operations: &[rd_kafka_AclOperation_t]) -> Self {
        use rd_kafka_AclOperation_t as Operation;
        // Whoever may see a topic or a group has at least the right to do so; nothing at all means: not said.
        if operations.is_empty() {
            return Self::UNKNOWN;
        }
        let right = |operation: &Operation| match operation {
            Operation::RD_KAFKA_ACL_OPERATION_READ => Some(Right::Read),
            Operation::RD_KAFKA_ACL_OPERATION_WRITE => Some(Right::Write),
            _ => None,
        };
        Self(Some(operations.iter().filter_map(right).collect()))
    }
}

/// Asks with a client of librdkafka, which must outlive it. rdkafka has no calls for these questions.
struct Ask {
    client: *mut rd_kafka_t,
}

/// Something of librdkafka's, and how it is freed.
struct Owned<T>(*mut T, unsafe extern "C" fn(*mut T));

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: it came from librdkafka, is freed by its own function, and nothing refers to it any more.
            unsafe { (self.1)(self.0) }
        }
    }
}

impl Ask {
    fn topic(&self, topic: &str, timeout: Duration) -> Rights {
        let Ok(name) = CString::new(topic) else { return Rights::UNKNOWN };
        let kind = rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS;
        let answer = self.ask(kind, timeout, |options, queue| {
            let mut names = [name.as_ptr()];
            // SAFETY: the array outlives the call, which copies it.
            let topics = unsafe { rd_kafka_TopicCollection_of_topic_names(names.as_mut_ptr(), names.len()) };
            let topics = Owned(topics, rd_kafka_TopicCollection_destroy);
            // SAFETY: all are valid, and copied or counted by the call.
            unsafe { rd_kafka_DescribeTopics(self.client, topics.0, options, queue) }
        });
        let Some(answer) = answer else { return Rights::UNKNOWN };
        // SAFETY: the answer owns everything that is read here and lives until the end; lengths are librdkafka's.
        unsafe {
            let result = rd_kafka_event_DescribeTopics_result(answer.0);
            let mut count = 0;
            let topics = rd_kafka_DescribeTopics_result_topics(result, &raw mut count);
            if count == 0 || topics.is_null() {
                return Rights::UNKNOWN;
            }
            let operations = rd_kafka_TopicDescription_authorized_operations(*topics, &raw mut count);
            Rights::of(slice(operations, count))
        }
    }

    fn group(&self, group: &str, timeout: Duration) -> Rights {
        let Ok(name) = CString::new(group) else { return Rights::UNKNOWN };
        let kind = rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBECONSUMERGROUPS;
        let answer = self.ask(kind, timeout, |options, queue| {
            let mut names = [name.as_ptr()];
            // SAFETY: all are valid, and copied or counted by the call.
            unsafe { rd_kafka_DescribeConsumerGroups(self.client, names.as_mut_ptr(), names.len(), options, queue) }
        });
        let Some(answer) = answer else { return Rights::UNKNOWN };
        // SAFETY: as above.
        unsafe {
            let result = rd_kafka_event_DescribeConsumerGroups_result(answer.0);
            let mut count = 0;
            let groups = rd_kafka_DescribeConsumerGroups_result_groups(result, &raw mut count);
            if count == 0 || groups.is_null() {
                return Rights::UNKNOWN;
            }
            let error = rd_kafka_error_code(rd_kafka_ConsumerGroupDescription_error(*groups));
            if Class::of(RDKafkaErrorCode::from(error)) == Class::NotAuthorised {
                return Rights::NONE;
            }
            let operations = rd_kafka_ConsumerGroupDescription_authorized_operations(*groups, &raw mut count);
            Rights::of(slice(operations, count))
        }
    }

    /// Asks and waits; `None` where no answer comes, or one that says only that it cannot be told.
    fn ask(
        &self,
        kind: rd_kafka_admin_op_t,
        timeout: Duration,
        send: impl FnOnce(*const rd_kafka_AdminOptions_t, *mut rd_kafka_queue_t),
    ) -> Option<Owned<rd_kafka_event_t>> {
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
            return None;
        }
        // SAFETY: the event is valid.
        let code = RDKafkaErrorCode::from(unsafe { rd_kafka_event_error(event.0) });
        if code != RDKafkaErrorCode::NoError {
            tracing::debug!(%code, ?kind, "the brokers do not say what is permitted");
            return None;
        }
        Some(event)
    }
}

/// # Safety
/// `start` is null, or points at `length` values that live as long as what is returned.
unsafe fn slice<'a, T>(start: *const T, length: usize) -> &'a [T] {
    if start.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(start, length) }
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
        assert!(Rights::NONE.lacks(Right::Read));
    }
}
