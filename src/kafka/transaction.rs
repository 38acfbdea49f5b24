//! Transactions: records and the offsets that they answer, visible together or not at all.
//!
//! A transactional [`Producer`] is one whose settings carry a `transactional.id`; the steps of a transaction are its
//! methods here. Each error says what to do next, as [`Next`].

use std::time::{Duration, Instant};

use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::Producer as _;

use super::error::{Class, Error};
use super::messages::offset_list;
use super::producer::{Deliver, NotDelivered, Producer};
use crate::offsets::{Committed, TopicPartition};
use crate::settings::Kafka;

/// What to do after a step of a transaction failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Take the same step again: it is not known yet how it ends.
    Again,
    /// Abort the transaction, and begin another one with the same records.
    Abort,
    /// Drop the producer and initialise another one: this one can do nothing more, and how an unfinished commit ended
    /// is told by the offsets that the group has.
    Replace,
    /// Replace it, unless its `transactional.id` is of the user's choosing: another producer has taken the id over.
    Fenced,
    /// Stop: a person must change a setting or a permission.
    Stop,
}

/// A step of a transaction failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {reason}")]
pub struct TransactionError {
    /// The step.
    pub step: &'static str,
    /// What to do.
    pub next: Next,
    /// librdkafka's words.
    pub reason: String,
    /// What it means.
    pub class: Class,
}

impl<D: Deliver> Producer<D> {
    /// Fetches the producer's identity, and ends whatever transaction an earlier producer of the same
    /// `transactional.id` left behind. Blocks, for `timeout` at most.
    ///
    /// # Errors
    /// [`Next::Again`] while the brokers are away, [`Next::Stop`] for settings that can't work.
    pub fn init_transactions(&self, timeout: Duration) -> Result<(), TransactionError> {
        self.step("initialising transactions", self.inner().init_transactions(timeout))
    }

    /// Begins a transaction; what is sent from here on belongs to it.
    ///
    /// # Errors
    /// The producer is in no state to begin one.
    pub fn begin_transaction(&self) -> Result<(), TransactionError> {
        self.step("beginning a transaction", self.inner().begin_transaction())
    }

    /// Makes offsets of the group, with their notes, part of the transaction. Blocks, for `timeout` at most.
    ///
    /// # Errors
    /// [`Next::Abort`] when the group was rearranged since `group` was taken.
    pub fn send_offsets(
        &self,
        offsets: &[(TopicPartition, Committed)],
        group: &GroupMetadata,
        timeout: Duration,
    ) -> Result<(), TransactionError> {
        let list = offset_list(offsets);
        self.step("adding offsets to a transaction", self.inner().send_offsets_to_transaction(&list, &group.0, timeout))
    }

    /// Waits for every record, and commits. Blocks, for `timeout` at most.
    ///
    /// # Errors
    /// [`Next::Again`] where the time was too short; whether the transaction is committed is open then.
    pub fn commit_transaction(&self, timeout: Duration) -> Result<(), TransactionError> {
        self.step("committing a transaction", self.inner().commit_transaction(timeout))
    }

    /// Takes everything back that was sent since the transaction began. Blocks, for `timeout` at most.
    ///
    /// # Errors
    /// [`Next::Again`] where the time was too short.
    pub fn abort_transaction(&self, timeout: Duration) -> Result<(), TransactionError> {
        self.step("aborting a transaction", self.inner().abort_transaction(timeout))
    }

    fn step(&self, step: &'static str, result: Result<(), KafkaError>) -> Result<(), TransactionError> {
        result.map_err(|error| {
            let (next, class, reason) = judge(&error);
            // The reason of a fatal error is kept by the client; the call that meets it says only that there is one.
            let reason = self.fatal_reason().unwrap_or(reason);
            TransactionError { step, next, reason, class }
        })
    }
}

fn judge(error: &KafkaError) -> (Next, Class, String) {
    let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
    let class = Class::of(code);
    let KafkaError::Transaction(native) = error else {
        // Waiting for the records took too long; the transaction is as it was.
        return (Next::Again, class, error.to_string());
    };
    let next = match code {
        RDKafkaErrorCode::Fenced | RDKafkaErrorCode::ProducerFenced | RDKafkaErrorCode::InvalidProducerEpoch => {
            Next::Fenced
        }
        RDKafkaErrorCode::InvalidTransactionTimeout
        | RDKafkaErrorCode::UnsupportedFeature
        | RDKafkaErrorCode::UnsupportedVersion
        | RDKafkaErrorCode::TransactionalIdAuthorizationFailed
        | RDKafkaErrorCode::ClusterAuthorizationFailed => Next::Stop,
        _ if native.is_fatal() => Next::Replace,
        _ if native.txn_requires_abort() => Next::Abort,
        _ if native.is_retriable() => Next::Again,
        _ => Next::Replace,
    };
    (next, class, native.string())
}

impl TransactionError {
    /// The error to stop with, in words that name the setting.
    pub fn stopping(&self, settings: &Kafka) -> Error {
        let id = settings.transactional_id.as_deref().unwrap_or("blipstream-*");
        let advice = match self.next {
            Next::Fenced => format!(
                "another producer has taken over kafka.transactional_id = {id:?}: every worker needs one of its own, or \
                 none, and then one is made up"
            ),
            _ if self.class == Class::NotAuthorised => {
                // Without kafka.transactional_id every worker makes one up that begins like this.
                let (pattern, name) = match &settings.transactional_id {
                    Some(id) => ("literal", id.as_str()),
                    None => ("prefixed", "blipstream-"),
                };
                let user = settings.sasl_username.as_deref().unwrap_or("NAME");
                format!(
                    "kafka.delivery = \"exactly_once\" needs Write and Describe on the transactional id {id:?} \
                     (kafka.transactional_id). To grant it: kafka-acls --add --allow-principal User:{user} \
                     --operation Write --operation Describe --transactional-id {name} --resource-pattern-type \
                     {pattern}. Clusters older than 3.0 want IdempotentWrite on the cluster, too"
                )
            }
            _ if self.reason.contains("timeout") => format!(
                "kafka.transaction_timeout ({:?}) is over the brokers' transaction.max.timeout.ms",
                settings.transaction_timeout
            ),
            _ => "kafka.delivery = \"exactly_once\" needs brokers with transactions (2.5 or newer); kafka.delivery = \
                  \"at_least_once\" works without"
                .to_owned(),
        };
        Error::Other { doing: self.step, reason: format!("{}. {advice}", self.reason) }
    }
}

struct Unused;

impl Deliver for Unused {
    type Tag = ();

    fn delivered(&self, _: Box<()>, _: Result<(), NotDelivered>) {}
}

/// Tries whether the brokers give transactions to a worker with these settings: they know an identity more afterwards, as
/// after the start of a worker, and nothing is written under it. With `kafka.transactional_id` nothing is tried, since
/// that would stop the worker that has it: `false`. Blocks, for `timeout` at most.
///
/// # Errors
/// What a person has to change first, or no answer in time.
pub fn check_transactions(settings: &Kafka, timeout: Duration) -> Result<bool, Error> {
    if settings.transactional_id.is_some() {
        return Ok(false);
    }
    let producer = Producer::transactional(settings, &unique_transactional_id(), Unused)?;
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match producer.init_transactions(left) {
            Ok(()) => return Ok(true),
            Err(error) if error.next == Next::Stop => return Err(error.stopping(settings)),
            // A coordinator is looked for, or moves.
            Err(error) if error.next == Next::Again && !left.is_zero() => {}
            Err(error) => return Err(Error::Other { doing: error.step, reason: error.reason }),
        }
    }
}

/// Who we are in the consumer group, at one moment: with it the brokers refuse the offsets of a worker that the group
/// has given up meanwhile.
pub struct GroupMetadata(pub(super) rdkafka::consumer::ConsumerGroupMetadata);

impl std::fmt::Debug for GroupMetadata {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GroupMetadata").finish_non_exhaustive()
    }
}

/// A `transactional.id` for this process: unique, since the group's generation fences zombies, not the id.
pub fn unique_transactional_id() -> String {
    let random: u64 = fastrand::u64(..);
    format!("blipstream-{}-{random:016x}", std::process::id())
}
