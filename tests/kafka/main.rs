//! What the workers promise, on Apache Kafka itself.

mod delivery;
#[path = "../support/mod.rs"]
mod support;
