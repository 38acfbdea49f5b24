//! The link to Kafka: the only module that imports rdkafka.
//!
//! Everything else speaks of [`Message`](crate::message::Message)s, of [`TopicPartition`](crate::offsets::TopicPartition)s
//! and of this module's own types:
//!
//! - [`Consumer`] reads a group's share of the topics and reports what happens as [`Event`]s, rebalances included
//! - [`Producer`] writes records and says of each whether the broker has it
//! - [`Committer`] is what the consumer's thread asks which offsets to commit
//! - [`EmbeddedBroker`] is a Kafka cluster inside this process, for demonstrations and tests
//! - [`Follower`] reads whole topics outside of any group, as long as somebody wants to see more
//! - [`check_access`] says whether a worker has the topics that it needs, and may use them
//! - [`check_topics`], [`write_records`] and [`read_records`] are for commands that do one thing and end

mod access;
mod broker;
mod client;
mod config;
mod consumer;
mod context;
mod error;
mod follow;
mod messages;
mod producer;

pub use access::{Access, Right, check_access};
pub use broker::{EmbeddedBroker, Fault};
pub use client::{
    Brokers, Found, FoundTopic, From, NewRecord, ReadLimits, TopicCheck, check_topics, find_topics, group_offsets,
    read_records, write_records,
};
pub use config::{OWNED_OPTIONS, check_options};
pub use consumer::{Committer, Consumer, Event, PartitionStats, Start, Stats};
pub use error::{Class, Error};
pub use follow::Follower;
pub use producer::{Deliver, NotDelivered, NotSent, Producer, Record};
