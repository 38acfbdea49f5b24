//! The whole flow on the embedded broker: what goes in comes out, whatever happens in between.

#![allow(clippy::print_stderr, clippy::print_stdout)] // what a test tells a person

mod answering;
mod bad_input;
mod batch;
mod canary;
mod control;
mod delivery;
mod demo_model;
mod embedding;
mod filtering;
mod models;
mod outage;
mod retry;
mod same_picture;
#[path = "../support/mod.rs"]
mod support;
