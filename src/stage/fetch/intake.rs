//! Room for bodies: a permit before the bytes, and a buffer that never outgrows its limit.

use std::sync::Arc;

use bytes::Bytes;

use super::FetchError;
use crate::budget::{Permit, Pool};
use crate::disposition::Stage;
use crate::metrics::Metrics;

/// First size of a buffer whose final length is unknown.
const FIRST_CAPACITY: usize = 64 * 1024;

/// The image pool, and how much one image may take of it.
#[derive(Debug, Clone)]
pub struct Intake {
    /// The image pool.
    pub pool: Pool,
    /// Bytes of an image's pixels at the model's size. The permit is never smaller, so that decoding only shrinks it.
    pub pixel_bytes: usize,
    /// Longest body, in bytes.
    pub max_body: usize,
    /// Counts how long the pool was waited for.
    pub metrics: Arc<Metrics>,
}

impl Intake {
    /// Room that a body of `length` bytes needs, or of any length that is allowed.
    pub fn needed(&self, length: Option<usize>) -> usize {
        length.unwrap_or(self.max_body).max(self.pixel_bytes)
    }

    /// Waits for room for a body.
    pub async fn reserve(&self, length: Option<usize>) -> Permit {
        let bytes = self.needed(length);
        if let Some(permit) = self.pool.try_acquire(bytes) {
            return permit;
        }
        let _blocked = self.metrics.blocked(Stage::Fetch);
        self.pool.acquire(bytes).await
    }

    /// Room for a body, if there is some now.
    pub fn try_reserve(&self, length: Option<usize>) -> Option<Permit> {
        self.pool.try_acquire(self.needed(length))
    }

    /// Room for a body of this length, if there is some now: `room` where that is enough, which else goes back.
    pub fn fitting(&self, length: usize, room: Option<Permit>) -> Option<Permit> {
        let needed = self.needed(Some(length));
        let Some(mut permit) = room.filter(|permit| permit.bytes() >= needed) else {
            return self.try_reserve(Some(length));
        };
        permit.shrink(needed);
        Some(permit)
    }

    /// An empty buffer; `expected` is the length that was announced.
    pub fn buffer(&self, expected: Option<usize>) -> Buffer {
        let capacity = expected.unwrap_or(FIRST_CAPACITY).min(self.max_body);
        Buffer { data: Vec::with_capacity(capacity), limit: self.max_body }
    }

    /// The full body, its permit shrunk to what it turned out to need.
    pub fn settle(&self, buffer: Buffer, mut permit: Permit) -> Result<(Bytes, Permit), FetchError> {
        let mut data = buffer.data;
        if data.is_empty() {
            return Err(FetchError::Empty);
        }
        data.shrink_to_fit();
        permit.shrink(data.len().max(self.pixel_bytes));
        Ok((data.into(), permit))
    }
}

/// Collects a body up to a limit. Its capacity never exceeds the limit either.
#[derive(Debug)]
pub struct Buffer {
    data: Vec<u8>,
    limit: usize,
}

impl Buffer {
    /// Adds a piece, or refuses the body as too large.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), FetchError> {
        let length = self.data.len().saturating_add(piece.len());
        if length > self.limit {
            return Err(FetchError::TooLarge { limit: self.limit });
        }
        if length > self.data.capacity() {
            let target = self.data.capacity().saturating_mul(2).clamp(length, self.limit);
            self.data.reserve_exact(target - self.data.len());
        }
        self.data.extend_from_slice(piece);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Limit;
    use proptest::prelude::*;

    fn intake(pixel_bytes: usize, max_body: usize) -> Intake {
        let pool = Pool::new(Limit { items: 4, bytes: 1 << 20 });
        Intake { pool, pixel_bytes, max_body, metrics: Arc::default() }
    }

    #[tokio::test]
    async fn a_permit_covers_the_body_first_and_the_pixels_at_least() {
        let intake = intake(300, 1000);
        assert_eq!(intake.reserve(Some(10)).await.bytes(), 300);
        assert_eq!(intake.reserve(Some(700)).await.bytes(), 700);
        let permit = intake.reserve(None).await;
        assert_eq!(permit.bytes(), 1000);
        let mut buffer = intake.buffer(None);
        buffer.push(&[1; 400]).unwrap();
        let (body, permit) = intake.settle(buffer, permit).unwrap();
        assert_eq!((body.len(), permit.bytes(), intake.pool.used().bytes), (400, 400, 400));
    }

    #[tokio::test]
    async fn an_empty_body_gives_its_permit_back() {
        let intake = intake(300, 1000);
        let permit = intake.reserve(None).await;
        assert_eq!(intake.settle(intake.buffer(None), permit).unwrap_err(), FetchError::Empty);
        assert_eq!(intake.pool.used(), Limit::default());
    }

    proptest! {
        #[test]
        fn a_buffer_keeps_every_byte_and_never_outgrows_its_limit(
            pieces in proptest::collection::vec(0usize..400, 0..20), limit in 1usize..2000, expected: Option<u16>
        ) {
            let intake = intake(0, limit);
            let mut buffer = intake.buffer(expected.map(usize::from));
            let mut sent = Vec::new();
            for (number, length) in pieces.into_iter().enumerate() {
                let piece = vec![number as u8; length];
                let fits = sent.len() + length <= limit;
                prop_assert_eq!(buffer.push(&piece).is_ok(), fits);
                prop_assert!(buffer.data.capacity() <= limit);
                if fits {
                    sent.extend(piece);
                }
                prop_assert_eq!(&buffer.data, &sent);
            }
        }
    }
}
