//! What the workers promise, on Apache Kafka itself.

mod delivery;
mod exactly_once;
#[path = "../support/mod.rs"]
mod support;
