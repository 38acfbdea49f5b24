//! What the integration tests share. Each test program uses a part of it.
#![allow(dead_code, missing_docs)]

pub mod alone;
pub mod client;
pub mod flow;
pub mod http;
pub mod images;
pub mod job;
pub mod kafka;
pub mod place;
pub mod promises;
pub mod ran;
#[cfg(unix)]
pub mod s3;
pub mod tls;
