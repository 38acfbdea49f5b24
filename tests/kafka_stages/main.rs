//! Consume, commit and publish against the embedded broker: the real protocol over loopback.

mod bench;
mod consume;
mod group;
mod publish;
mod solo;
#[path = "../support/mod.rs"]
mod support;
