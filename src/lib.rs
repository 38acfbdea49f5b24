//! blipstream: image references in from Kafka, BLIP captions out.
//!
//! ```text
//!  Kafka ──► consume ──► parse ──► fetch ──► decode ──► batch ──► infer ──► publish ──► Kafka
//!               ▲                                      (shared    (one thread   │
//!               │                                       queue)     a device)    │
//!             commit ◄───────────── tickets, resolved once each ◄───────────────┘
//! ```
//!
//! Every consumed message carries a [`offsets::Ticket`]; it is resolved by an acknowledged caption or dead letter,
//! and only the contiguous prefix of resolved offsets is committed. [`pipeline`] is the only module that knows the
//! order of the stages. The modules below stand in floor order: each imports only what stands above it.

// floor 0: no I/O, imports nothing of ours
pub mod budget;
pub mod disposition;
pub mod message;
pub mod metrics;
pub mod offsets;
pub mod settings;

// floor 1: tools; siblings here do not import each other
pub mod config;
pub mod gate;
pub mod kafka;
pub mod retry;
pub mod tracked;
pub mod web;

// the captioner: imports nothing above it
pub mod caption;

// floor 2: stages; no stage imports another stage
pub mod stage;

// floor 3
pub mod pipeline;
pub mod simulation;

// floor 4
pub mod admin;
pub mod command;
pub mod endpoint;
