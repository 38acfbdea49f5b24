//! What the workers promise, on Apache Kafka itself.

mod cluster;
mod delivery;
mod security;
#[path = "../support/mod.rs"]
mod support;
