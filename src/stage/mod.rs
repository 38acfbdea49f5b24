//! The stages of the flow, one file each, and what flows between them.
//!
//! No stage imports another: [`crate::pipeline`] wires them. Each takes a receiver of its input and senders of its
//! outputs, ends when its input is closed and empty, and drops its senders then: that is how the flow drains.

mod answers;
pub mod batch;
pub mod commit;
pub mod consume;
pub mod decode;
pub mod fetch;
pub mod infer;
pub mod parse;
pub mod publish;

use std::any::Any;
use std::sync::Arc;

pub use answers::{Answers, AskError, Beside, Models, Recalled, Writer, check_params};

use async_channel::{SendError, Sender, TrySendError};
use bytes::Bytes;

use crate::caption::Pixels;
use crate::disposition::{Failure, Stage};
use crate::message::{CanaryRecord, CaptionRecord, ImageInfo, Message, Row};
use crate::metrics::Metrics;
use crate::tracked::Tracked;

/// A row whose image was fetched.
#[derive(Debug)]
pub struct Fetched {
    /// The row.
    pub row: Row,
    /// The encoded image.
    pub body: Bytes,
}

/// A row that waits for a device.
#[derive(Debug)]
pub struct Ready {
    /// The row.
    pub row: Row,
    /// Its pixels, at the model's size.
    pub pixels: Pixels,
    /// What is known of the picture.
    pub image: ImageInfo,
}

/// The end of a row, or of a message that never became rows.
#[derive(Debug)]
pub enum Output {
    /// A caption.
    Caption {
        /// The record. Boxed, since it is much larger than the rest.
        record: Box<CaptionRecord>,
        /// The message it answers, for its key, headers and timestamp.
        message: Arc<Message>,
        /// The device that wrote it, or `cache`.
        device: String,
        /// Whether the filter kept none of the texts.
        rejected: bool,
    },
    /// What a second captioner wrote of an image beside the caption, which is an output of its own.
    Canary {
        /// The record.
        record: Box<CanaryRecord>,
        /// The message of both.
        message: Arc<Message>,
    },
    /// One row failed.
    FailedRow(Box<Row>, Failure),
    /// The message as a whole failed, or one row of it that has no request.
    FailedMessage {
        /// The message.
        message: Arc<Message>,
        /// Row inside the message, if it is one row of several.
        index: Option<usize>,
        /// That row in the native form, where it has one.
        native: Option<Bytes>,
        /// Why.
        failure: Failure,
    },
}

/// What the publisher receives.
pub type Finished = Tracked<Output>;

/// Sends to the next stage; while its queue is full, `stage` counts as blocked.
async fn send<T>(to: &Sender<T>, value: T, stage: Stage, metrics: &Metrics) -> Result<(), SendError<T>> {
    match to.try_send(value) {
        Ok(()) => Ok(()),
        Err(TrySendError::Closed(value)) => Err(SendError(value)),
        Err(TrySendError::Full(value)) => {
            let _blocked = metrics.blocked(stage);
            to.send(value).await
        }
    }
}

/// The same for a stage on threads of its own.
fn send_blocking<T>(to: &Sender<T>, value: T, stage: Stage, metrics: &Metrics) -> Result<(), SendError<T>> {
    match to.try_send(value) {
        Ok(()) => Ok(()),
        Err(TrySendError::Closed(value)) => Err(SendError(value)),
        Err(TrySendError::Full(value)) => {
            let _blocked = metrics.blocked(stage);
            to.send_blocking(value)
        }
    }
}

/// A failed row, on its way to the dead letters.
pub fn failed(row: Tracked<Row>, failure: Failure) -> Finished {
    row.map(|row| Output::FailedRow(Box::new(row), failure))
}

/// What a panic said.
fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("it panicked").to_owned()
}
