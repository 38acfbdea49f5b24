//! The error of a running engine: opaque, with a public kind that says whom it concerns.

use std::error::Error;
use std::fmt;

/// Whom an [`EngineError`] concerns, and so what a caller can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The parameters of one row: an over-long prompt, no room for a token.
    BadParams,
    /// The image of one row: wrong size, or encoded by another engine.
    BadInput,
    /// A model that one row needs is not loaded.
    Unavailable,
    /// The device has no memory for a batch of this size; a smaller one may fit.
    OutOfMemory,
    /// The engine or its device failed.
    Internal,
}

/// An error of a running engine.
#[derive(Debug)]
pub struct EngineError {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl EngineError {
    /// An error of a kind, with a message for people.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn bad_params(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::BadParams, message)
    }

    pub(crate) fn bad_input(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::BadInput, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// Whom it concerns.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether it blames one row, so that the rest of the batch is sound.
    pub fn is_of_one_row(&self) -> bool {
        matches!(self.kind, ErrorKind::BadParams | ErrorKind::BadInput | ErrorKind::Unavailable)
    }
}

impl fmt::Display for EngineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for EngineError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn Error + 'static))
    }
}

impl From<candle_core::Error> for EngineError {
    fn from(error: candle_core::Error) -> Self {
        let text = error.to_string();
        // The CUDA driver's error reaches us as text only.
        let out_of_memory = text.contains("OUT_OF_MEMORY") || text.contains("out of memory");
        let (kind, message) = if out_of_memory {
            (ErrorKind::OutOfMemory, "the device is out of memory")
        } else {
            (ErrorKind::Internal, "the model failed to run")
        };
        Self { kind, message: message.into(), source: Some(Box::new(error)) }
    }
}
