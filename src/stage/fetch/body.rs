//! A body on its way in: room before the bytes, and every piece counted and timed.

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;

use super::FetchError;
use super::clock::Clock;
use super::http::Means;
use super::intake::Buffer;
use crate::budget::Permit;
use crate::metrics::Metrics;

/// A body whose head has come.
pub(super) struct Incoming {
    /// Its length in bytes, where it was announced.
    pub(super) length: Option<usize>,
    pub(super) pieces: BoxStream<'static, Result<Bytes, FetchError>>,
}

/// What came of reading a body.
pub(super) enum Body {
    Whole(Bytes, Permit),
    /// It had to wait for room, which it has now, and then it broke: the sender may have given up on a reader that did not
    /// read, which is not its fault. It is worth asking for once more.
    Broken(Permit, FetchError),
}

impl Incoming {
    /// Reads it, into `room` if there is some that it fits into.
    pub(super) async fn read(
        self,
        clock: &mut Clock,
        room: Option<Permit>,
        means: &Means<'_>,
    ) -> Result<Body, FetchError> {
        let intake = means.intake;
        match self.length {
            Some(0) => return Err(FetchError::Empty),
            Some(length) if length > intake.max_body => return Err(FetchError::TooLarge { limit: intake.max_body }),
            _ => {}
        }
        // What is too small goes back first: who waits for room holds none.
        let room = room.filter(|permit| permit.bytes() >= intake.needed(self.length));
        let (permit, waited) = match room.or_else(|| intake.try_reserve(self.length)) {
            Some(permit) => (permit, false),
            // Outside the clock: that the worker is busy is not the host's fault.
            None => (intake.reserve(self.length).await, true),
        };
        let buffer = intake.buffer(self.length);
        match self.read_pieces(clock, buffer, means.metrics).await {
            Ok(buffer) => intake.settle(buffer, permit).map(|(body, permit)| Body::Whole(body, permit)),
            Err(error @ (FetchError::Connect(_) | FetchError::Timeout { .. })) if waited => {
                Ok(Body::Broken(permit, error))
            }
            Err(error) => Err(error),
        }
    }

    async fn read_pieces(
        mut self,
        clock: &mut Clock,
        mut buffer: Buffer,
        metrics: &Metrics,
    ) -> Result<Buffer, FetchError> {
        let mut pace = clock.pace();
        while let Some(piece) = clock.bound(clock.read(), self.pieces.next()).await? {
            let piece = piece?;
            metrics.fetched_bytes(piece.len());
            clock.keeps_pace(&mut pace, piece.len())?;
            buffer.push(&piece)?;
        }
        Ok(buffer)
    }
}
