//! The whole flow on the embedded broker: what goes in comes out, whatever happens in between.

mod bad_input;
mod control;
mod delivery;
mod demo_model;
#[path = "../support/mod.rs"]
mod support;
