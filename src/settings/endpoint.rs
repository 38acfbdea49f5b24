//! The endpoint that answers directly.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The HTTP endpoint that captions while its clients wait: `POST /score` and the Open Inference Protocol.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Endpoint {
    /// Address that a worker listens on beside its stream; without one it does not. `blipstream serve` listens on
    /// 127.0.0.1:8080 then. Port 0 takes a free one. Anything but loopback needs a token, or `anonymous`.
    #[schemars(with = "Option<String>")]
    pub listen: Option<SocketAddr>,
    /// Token of all routes but those for health and the document (`Authorization: Bearer …`); `token_file` is better.
    pub token: Option<String>,
    /// File that holds the token.
    pub token_file: Option<PathBuf>,
    /// Whether anybody who reaches the address may use it without a token.
    pub anonymous: bool,
    /// The endpoint's share of the devices while it has rows, and of the budget, the fetches and the decoders; the stream has
    /// the rest. More than 0 and less than 1.
    pub share: f64,
    /// The most rows of a request.
    pub max_rows: usize,
    /// Rows under way; a request for which there is no room is told to come again (429).
    pub max_in_flight: usize,
    /// Longest body of a request. So much of the endpoint's part of `flow.max_message_bytes` is held while one comes whose
    /// length is not announced.
    #[schemars(with = "String")]
    pub max_body: ByteSize,
    /// How long a row may take; after that its answer is an error of code `deadline`.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub timeout: Duration,
}

impl Default for Endpoint {
    fn default() -> Self {
        Self {
            listen: None,
            token: None,
            token_file: None,
            anonymous: false,
            share: 0.25,
            max_rows: 128,
            max_in_flight: 512,
            max_body: ByteSize::mib(8),
            timeout: Duration::from_secs(30),
        }
    }
}
