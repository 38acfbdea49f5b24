//! What librdkafka tells a client: logs, errors, statistics, rebalances, results of commits.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::util::Timeout;
use rdkafka::{Statistics, TopicPartitionList};

use super::consumer::{Event, MemberId, PartitionStats, Stats};
use super::error::{Class, Error, login_advice};
use super::messages;
use crate::offsets::{Committed, TopicPartition};

/// An error that lasts is logged again after this time; in between it is only counted as the newest one.
const REMIND: Duration = Duration::from_secs(30);

/// Errors of one client since things were well; the brokers' reasons are told only here.
#[derive(Debug, Default)]
pub(crate) struct Errors(Mutex<Reported>);

#[derive(Debug, Default)]
struct Reported {
    last: Option<(Class, String)>,
    /// When each class was logged.
    logged: Vec<(Class, Instant)>,
}

impl Reported {
    /// Whether an error of this class is to be logged now.
    fn is_news(&mut self, class: Class, now: Instant) -> bool {
        let known = self.logged.iter_mut().find(|(known, _)| *known == class);
        let Some((_, since)) = known else {
            self.logged.push((class, now));
            return true;
        };
        let due = now.saturating_duration_since(*since) >= REMIND;
        if due {
            *since = now;
        }
        due
    }
}

impl Errors {
    /// The newest error and its class.
    pub(crate) fn last(&self) -> Option<(Class, String)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).last.clone()
    }

    /// Writes an error down, and logs it unless its like was logged a short while ago.
    pub(crate) fn record(&self, client: &str, error: &KafkaError, reason: &str) {
        let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
        if code == RDKafkaErrorCode::PartitionEOF {
            return;
        }
        let class = Class::reported(code, reason);
        let mut reported = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // It only sums up what was said of each broker before, and says less.
        let sum = code == RDKafkaErrorCode::AllBrokersDown && reported.last.is_some();
        if sum || !reported.is_news(class, Instant::now()) {
            tracing::debug!(client, %code, reason, "kafka error, again");
        } else {
            tracing::warn!(client, %code, reason, advice = advice(class, reason), "kafka error");
        }
        if !sum {
            reported.last = Some((class, reason.to_owned()));
        }
    }

    /// Forgets the error, once things work again.
    pub(crate) fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Reported::default();
    }
}

/// What a person can do about an error of this class.
fn advice(class: Class, reason: &str) -> &'static str {
    match class {
        _ if reason.contains("receive.message.max.bytes") => {
            "a message or a batch is longer than the consumer takes: raise kafka.max_message_size"
        }
        Class::Unreachable => "librdkafka goes on trying; check kafka.bootstrap_servers and the brokers if it lasts",
        Class::Authentication => login_advice(reason),
        Class::NotAuthorised => {
            "the user needs Read on kafka.inputs, kafka.retry_topics and on the group kafka.group_id, and Write on \
             kafka.retry_topics, kafka.captions_topic, kafka.filtered_topic, kafka.canary_topic and \
             kafka.dead_letter_topic; `blipstream check` says what is missing"
        }
        Class::UnknownTopic => {
            "create the topic, or change kafka.inputs, kafka.retry_topics, kafka.captions_topic, kafka.filtered_topic, \
             kafka.canary_topic, kafka.dead_letter_topic"
        }
        Class::TooLarge => "raise kafka.max_message_size, and max.message.bytes of the topic",
        Class::OffsetOutOfRange => "messages were deleted before they were read; move the group's offsets",
        Class::Rebalancing => "the group is being rearranged",
        Class::Fatal => "the worker stops; start it anew",
        Class::BadTimestamp | Class::Purged | Class::Unconfirmed | Class::TransactionOver | Class::Other => "",
    }
}

/// librdkafka's log lines, in ours.
pub(crate) fn log(client: &str, level: RDKafkaLogLevel, facility: &str, line: &str) {
    match level {
        // An option of the other kind of client; `kafka.options` goes to both on purpose.
        _ if facility == "CONFWARN" => tracing::debug!(client, facility, "{line}"),
        // What it says is reported as an error, too, where it is not repeated without end.
        _ if facility == "FAIL" => tracing::debug!(client, facility, "{line}"),
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error => {
            tracing::warn!(client, facility, "{line}");
        }
        RDKafkaLogLevel::Warning | RDKafkaLogLevel::Notice => tracing::info!(client, facility, "{line}"),
        RDKafkaLogLevel::Info | RDKafkaLogLevel::Debug => tracing::debug!(client, facility, "{line}"),
    }
}

/// Brokers whose connection is up.
pub(crate) fn brokers_up(statistics: &Statistics) -> usize {
    statistics.brokers.values().filter(|broker| broker.nodeid >= 0 && broker.state == "UP").count()
}

/// The consumer's side. Its callbacks only write down; [`super::Consumer::poll`] hands the events on.
#[derive(Debug)]
pub(crate) struct ConsumerSide {
    /// Whose client this is.
    pub(crate) member: MemberId,
    /// Of all members: what is wrong with the brokers is said once.
    errors: Arc<Errors>,
    events: Mutex<VecDeque<Event>>,
    closing: AtomicBool,
}

impl ConsumerSide {
    pub(crate) fn new(member: MemberId, errors: Arc<Errors>) -> Self {
        Self { member, errors, events: Mutex::default(), closing: AtomicBool::default() }
    }

    fn push(&self, event: Event) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push_back(event);
    }

    /// The oldest event that was not handed on.
    pub(crate) fn next(&self) -> Option<Event> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// From now on revoked partitions are let go at once: nobody polls for events any more.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }
}

impl ClientContext for ConsumerSide {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        log("consumer", level, facility, line);
    }

    fn stats(&self, statistics: Statistics) {
        self.push(Event::Stats(self.member, summary(&statistics)));
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.errors.record("consumer", &error, reason);
        if is_unreadable(&error, reason) {
            self.push(Event::Unreadable(self.member, reason.to_owned()));
        }
    }
}

/// Whether the error is of a batch whose sum is wrong (with the option `check.crcs`), whose form is unknown, or which cannot be
/// unpacked. What librdkafka 2.12 does then is nothing to rely on: it stands before the batch for ever, or goes on somewhere
/// behind its beginning (`rdkafka_msgset_reader.c`). The code alone does not tell: a connection over which something else than
/// Kafka speaks, or an answer that is too long, is a bad message, too.
fn is_unreadable(error: &KafkaError, reason: &str) -> bool {
    use RDKafkaErrorCode::{BadCompression, BadMessage, NotImplemented};
    let code = matches!(error.rdkafka_error_code(), Some(BadMessage | NotImplemented | BadCompression));
    code && ["failed CRC32", "MagicByte", "Decompression"].iter().any(|sign| reason.contains(sign))
}

impl ConsumerContext for ConsumerSide {
    /// Only writes the rebalance down: librdkafka waits with it until `assign` or `unassign` is called, which happens
    /// outside of the callback, so that events are served while revoked partitions drain.
    fn rebalance(&self, consumer: &BaseConsumer<Self>, kind: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let assigned = kind == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        if self.closing.load(Ordering::Acquire) {
            let done = if assigned { consumer.incremental_assign(list) } else { consumer.incremental_unassign(list) };
            if let Err(error) = done {
                tracing::debug!(%error, "while leaving the consumer group");
            }
            return;
        }
        let partitions = partitions(list);
        self.push(if assigned {
            Event::Assigned(self.member, partitions)
        } else {
            Event::Revoked { member: self.member, partitions, lost: consumer.assignment_lost() }
        });
    }

    fn commit_callback(&self, result: KafkaResult<()>, offsets: &TopicPartitionList) {
        let elements = offsets.elements();
        let failed = elements.iter().find_map(|element| element.error().err());
        let result = match (result, failed) {
            (Ok(()), None) => Ok(()),
            (Err(error), _) | (Ok(()), Some(error)) => Err(Error::from_kafka("committing offsets", &error)),
        };
        let offsets = elements.iter().zip(messages::notes(offsets)).filter_map(|(element, note)| {
            let offset = messages::exact_offset(element)?;
            Some((partition_of(element.topic(), element.partition()), Committed { offset, note }))
        });
        self.push(Event::Committed(self.member, offsets.collect(), result));
    }

    fn main_queue_min_poll_interval(&self) -> Timeout {
        Timeout::After(Duration::from_millis(100))
    }
}

pub(crate) fn partition_of(topic: &str, partition: i32) -> TopicPartition {
    TopicPartition { topic: topic.into(), partition }
}

pub(crate) fn partitions(list: &TopicPartitionList) -> Vec<TopicPartition> {
    list.elements().iter().map(|element| partition_of(element.topic(), element.partition())).collect()
}

fn summary(statistics: &Statistics) -> Stats {
    let group = statistics.cgrp.as_ref();
    // The queues of all partitions lead into one, and each tells the size of that one.
    let queues = statistics.topics.values().flat_map(|topic| topic.partitions.values());
    let prefetched_bytes = queues.map(|partition| partition.fetchq_size).max().unwrap_or(0);
    let topics = statistics.topics.values();
    let partitions = topics.flat_map(|topic| {
        let name: Arc<str> = topic.topic.as_str().into();
        // -1 is librdkafka's own bookkeeping, no partition.
        topic.partitions.values().filter(|p| p.partition >= 0).map(move |p| PartitionStats {
            partition: TopicPartition { topic: name.clone(), partition: p.partition },
            log_end: [p.ls_offset, p.hi_offset].into_iter().find(|offset| *offset >= 0),
            end_seen: (p.eof_offset >= 0 && p.eof_offset == p.next_offset).then_some(p.eof_offset),
            prefetched: p.fetchq_cnt.max(0) as u64,
        })
    });
    Stats {
        brokers_up: brokers_up(statistics),
        joined: group.is_some_and(|group| group.state == "up" && group.join_state == "steady"),
        prefetched_bytes,
        partitions: partitions.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_lasts_is_told_again_now_and_then() {
        let (mut reported, begun) = (Reported::default(), Instant::now());
        let mut told = |class, seconds| reported.is_news(class, begun + Duration::from_secs(seconds));
        assert!(told(Class::Authentication, 0));
        assert!(told(Class::Unreachable, 0), "another one is news");
        assert!(!told(Class::Authentication, 1) && !told(Class::Authentication, 29));
        assert!(told(Class::Authentication, 31) && !told(Class::Authentication, 32));
    }

    #[test]
    fn that_all_brokers_are_down_does_not_hide_why() {
        let errors = Errors::default();
        let say = |code, reason| errors.record("test", &KafkaError::Global(code), reason);
        say(RDKafkaErrorCode::SSL, "certificate verify failed");
        say(RDKafkaErrorCode::AllBrokersDown, "1/1 brokers are down");
        assert_eq!(errors.last(), Some((Class::Authentication, "certificate verify failed".to_owned())));
        errors.clear();
        say(RDKafkaErrorCode::AllBrokersDown, "1/1 brokers are down");
        assert_eq!(errors.last().map(|(class, _)| class), Some(Class::Unreachable));
    }

    #[test]
    fn a_batch_that_cannot_be_read_is_told_before_anything_behind_it_and_a_bad_connection_is_not_one() {
        use RDKafkaErrorCode::{BadCompression, BadMessage, BrokerTransportFailure, NotImplemented};
        let side = ConsumerSide::new(3, Arc::default());
        let unreadable = [
            (BadMessage, "MessageSet at offset 7 (92 bytes) failed CRC32C check (original 0x1 != calculated 0x2)"),
            (BadMessage, "Message at offset 7 (92 bytes) failed CRC32 check (original 0x1 != calculated 0x2)"),
            (NotImplemented, "Unsupported Message(Set) MagicByte 9 at offset 7"),
            (
                BadCompression,
                "Decompression (codec 0x3) of message at 7 of 92 bytes failed: Local: Invalid compressed data",
            ),
        ];
        for (code, reason) in unreadable {
            side.error(KafkaError::Global(code), reason);
            let event = side.next();
            assert!(matches!(&event, Some(Event::Unreadable(3, told)) if told == reason), "{event:?}");
        }
        let passing = [
            (BadMessage, "Invalid response size 1213486160 (0..100001024): increase receive.message.max.bytes"),
            (BrokerTransportFailure, "Disconnected: it said MagicByte"),
        ];
        for (code, reason) in passing {
            side.error(KafkaError::Global(code), reason);
            assert!(side.next().is_none(), "{reason}");
        }
    }
}
