//! command

pub mod config;
