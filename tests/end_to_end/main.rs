//! The whole flow on the embedded broker: what goes in comes out, whatever happens in between.

mod bad_input;
mod control;
mod delivery;
#[path = "../support/mod.rs"]
mod support;
