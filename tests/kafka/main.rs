//! What the workers promise, on Apache Kafka itself.

mod bad_input;
mod balance;
mod batch;
mod cluster;
mod delivery;
mod exactly_once;
mod interop;
mod quarantine;
mod rebalance;
mod security;
#[path = "../support/mod.rs"]
mod support;
