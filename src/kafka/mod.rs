//! The link to Kafka: the only module that imports rdkafka.
//!
//! Everything else speaks of [`Message`](crate::message::Message)s, of [`TopicPartition`](crate::offsets::TopicPartition)s
//! and of this module's own types:
//!
//! - [`Consumer`] reads a group's share of the topics and reports what happens as [`Event`]s, rebalances included
//! - [`Producer`] writes records and says of each whether the broker has it, in transactions where that is asked for
//! - [`Committer`] is what the consumer's thread asks which offsets to commit
//! - [`EmbeddedBroker`] is a Kafka cluster inside this process, for demonstrations and tests
//! - [`Follower`] reads whole topics outside of any group, as long as somebody wants to see more
//! - [`Snapshot`] reads what one topic holds now, and ends there
//! - [`check_access`] says whether a worker has the topics that it needs, and may use them
//! - [`check_topics`], [`write_records`] and [`read_records`] are for commands that do one thing and end

mod access;
mod broker;
mod client;
mod config;
mod consumer;
mod context;
mod ends;
mod error;
mod follow;
mod member;
mod messages;
mod native;
mod producer;
mod snapshot;
mod transaction;

pub use access::{Access, Right, check_access};
pub use broker::{EMBEDDED_PARTITION_BYTES, EmbeddedBroker, Fault};
pub use client::{
    Brokers, Found, FoundTopic, From, NewRecord, ReadLimits, TopicCheck, check_topics, find_topics, group_members,
    group_offsets, read_records, write_records,
};
pub use config::{producer_queue_bytes, read_ahead_bytes};
pub use consumer::{Committer, Consumer, Event, MemberId, Membership, OfMember, PartitionStats, Start, Stats};
pub use error::{Class, Error};
pub use follow::Follower;
pub use producer::{Deliver, NotDelivered, NotSent, Producer, Record};
pub use snapshot::Snapshot;
pub use transaction::{GroupMetadata, Next, TransactionError, check_transactions, unique_transactional_id};
