//! What an error means for its message: retried, dead-lettered, or ours.
//!
//! Every stage has one error enum, and each variant says here, where it is defined, what becomes of the message
//! and under which [`Code`] of the closed list it is dead-lettered.

mod advice;
mod blame;

use std::time::Duration;

use jiff::Timestamp;

/// Most bytes of an error message in a dead letter's header.
pub const MAX_MESSAGE_BYTES: usize = 1024;

/// What becomes of a message that met an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Worth another try, not before `retry_after` where the other side named a time.
    Transient {
        /// Wait that the other side asked for.
        retry_after: Option<Duration>,
    },
    /// Will fail again: a dead letter at once.
    Permanent,
    /// The fault is not the message's: split the batch, or stop the worker with a clear message.
    Ours,
}

/// An error that knows its disposition.
pub trait Disposed: std::error::Error {
    /// What becomes of the message.
    fn disposition(&self) -> Disposition;
    /// The code it is dead-lettered under.
    fn code(&self) -> Code;
}

macro_rules! names {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$vmeta])* $variant),+ }

        impl $name {
            /// Every value, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name in records, headers and metric labels.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}
pub(crate) use names;

names! {
    /// Why a message was dead-lettered: the closed list of the contract.
    Code {
        /// The message is in none of the four forms.
        BadMessage = "bad_message",
        /// What is asked (`params`, `prompt`, `tasks`, `text`, `questions`) is wrong or out of range.
        BadParams = "bad_params",
        /// The image reference is unreadable, or of an unknown scheme.
        BadReference = "bad_reference",
        /// The address is not public and no configured network opens it.
        BlockedAddress = "blocked_address",
        /// The host name does not resolve.
        Dns = "dns",
        /// No connection, or it broke; a store that does not accept the worker.
        Connect = "connect",
        /// The TLS handshake failed.
        Tls = "tls",
        /// A time limit passed.
        Timeout = "timeout",
        /// 404 or 410, or no such file.
        NotFound = "not_found",
        /// 401, 403, 451, or a file or an object that may not be read.
        AccessDenied = "access_denied",
        /// Any other 4xx.
        Http4xx = "http_4xx",
        /// 429.
        Http429 = "http_429",
        /// 5xx.
        Http5xx = "http_5xx",
        /// The host opted out of machine use.
        RobotsOptout = "robots_optout",
        /// The body, or the message itself, is over the limit.
        TooLarge = "too_large",
        /// The picture has more pixels than the limit.
        TooManyPixels = "too_many_pixels",
        /// Not an image, or not in a supported format.
        UnsupportedMedia = "unsupported_media",
        /// The image is broken.
        Decode = "decode",
        /// The request's deadline passed.
        Deadline = "deadline",
        /// No loaded model serves the request.
        ModelUnavailable = "model_unavailable",
        /// The model failed on this image alone.
        Inference = "inference",
        /// The caption record is over the topic's limit.
        OutputTooLarge = "output_too_large",
        /// The message killed its worker before.
        Quarantined = "quarantined",
    }
}

names! {
    /// A stage of the flow, as metrics and dead letters name it.
    Stage {
        /// Reading from Kafka.
        Consume = "consume",
        /// From bytes to requests.
        Parse = "parse",
        /// From a reference to bytes.
        Fetch = "fetch",
        /// From bytes to pixels.
        Decode = "decode",
        /// Waiting for a device.
        Batch = "batch",
        /// From pixels to a caption.
        Infer = "infer",
        /// To Kafka, until acknowledged.
        Publish = "publish",
        /// Committing offsets.
        Commit = "commit",
    }
}

/// Why one row ended as a dead letter: what its headers will say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Where it failed.
    pub stage: Stage,
    /// Why.
    pub code: Code,
    /// What a person needs to know; no credentials, at most [`MAX_MESSAGE_BYTES`].
    pub message: String,
    /// Tries made, the first included.
    pub attempts: u32,
    /// When it failed first.
    pub first_failed_at: Timestamp,
    /// Whether it may go better later, so that the row is worth a retry topic.
    pub transient: bool,
}

impl Failure {
    /// The failure that `error` means for its row, after one try.
    pub fn new(stage: Stage, error: &impl Disposed) -> Self {
        let transient = matches!(error.disposition(), Disposition::Transient { .. });
        Self { transient, ..Self::with_message(stage, error.code(), error.to_string()) }
    }

    /// A failure with a message of its own.
    pub fn with_message(stage: Stage, code: Code, mut message: String) -> Self {
        if message.len() > MAX_MESSAGE_BYTES {
            let cut = (0..=MAX_MESSAGE_BYTES - 3).rev().find(|&i| message.is_char_boundary(i)).unwrap_or(0);
            message.truncate(cut);
            message.push('…');
        }
        Self { stage, code, message, attempts: 1, first_failed_at: Timestamp::now(), transient: false }
    }

    /// The same failure after `attempts` tries, the first at `first_failed_at`.
    #[must_use]
    pub fn after(mut self, attempts: u32, first_failed_at: Timestamp) -> Self {
        self.attempts = attempts;
        self.first_failed_at = first_failed_at;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_message_is_cut_at_a_character_and_never_over_the_limit() {
        for text in ["a".repeat(5000), "ü".repeat(5000), "字".repeat(5000)] {
            let failure = Failure::with_message(Stage::Fetch, Code::Dns, text);
            assert!(failure.message.len() <= MAX_MESSAGE_BYTES);
            assert!(failure.message.ends_with('…'));
        }
        assert_eq!(Failure::with_message(Stage::Fetch, Code::Dns, "short".into()).message, "short");
    }

    #[test]
    fn every_code_says_what_it_means_and_what_to_do() {
        for code in Code::ALL {
            assert!(!code.meaning().ends_with('.'), "{code}");
            assert!(code.advice().ends_with('.') && code.advice().len() > 20, "{code}");
        }
    }

    #[test]
    fn codes_are_unique_snake_case_names() {
        let names: std::collections::BTreeSet<_> = Code::ALL.iter().map(|c| c.as_str()).collect();
        assert_eq!(names.len(), Code::ALL.len());
        assert!(names.iter().all(|n| n.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')));
    }
}
