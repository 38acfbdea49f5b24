//! The body of a request, which has to come with some speed: room for all of it is held from its first byte on.

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures::StreamExt;
use tokio::time::{Instant, timeout_at};

/// How long a body may take in any case.
const HEAD_START: Duration = Duration::from_secs(5);
/// Slowest average rate after that, in bytes a second.
const SLOWEST: f64 = 16.0 * 1024.0;

/// Why a body was not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unread {
    #[error("the body is too long")]
    TooLong,
    #[error("the body came too slowly: not within endpoint.timeout, or with less than 16 KiB a second after 5 s")]
    TooSlow,
    #[error("the body broke off")]
    BrokeOff,
}

/// Reads a body of at most `most` bytes, of which `announced` are said to come.
pub(super) async fn read(
    body: Body,
    most: usize,
    announced: Option<usize>,
    timeout: Duration,
) -> Result<Bytes, Unread> {
    let begun = Instant::now();
    let mut pieces = body.into_data_stream();
    let mut read = Vec::with_capacity(announced.unwrap_or_default().min(most));
    loop {
        let pace = HEAD_START + Duration::from_secs_f64(read.len() as f64 / SLOWEST);
        match timeout_at(begun + pace.min(timeout), pieces.next()).await {
            Err(_) => return Err(Unread::TooSlow),
            Ok(Some(Err(_))) => return Err(Unread::BrokeOff),
            Ok(Some(Ok(piece))) if piece.len() > most - read.len() => return Err(Unread::TooLong),
            Ok(Some(Ok(piece))) => read.extend_from_slice(&piece),
            Ok(None) => {
                // The room for more is given back.
                read.shrink_to_fit();
                return Ok(read.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(30);

    /// A body of pieces of so many bytes, each after a second, and whether it ends.
    fn pieces(count: usize, bytes: usize, ends: bool) -> Body {
        let pieces = stream::iter(0..count).then(move |_| async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok::<_, std::io::Error>(vec![b'x'; bytes])
        });
        let rest = if ends { stream::empty().left_stream() } else { stream::pending().right_stream() };
        Body::from_stream(pieces.chain(rest))
    }

    #[tokio::test(start_paused = true)]
    async fn who_announces_a_body_and_sends_nothing_holds_its_room_for_a_moment_only() {
        let begun = Instant::now();
        assert_eq!(read(pieces(0, 0, false), 1 << 24, Some(1 << 24), TIMEOUT).await, Err(Unread::TooSlow));
        assert_eq!(begun.elapsed().as_secs(), 5);
        // Whoever sends a little stays a little longer.
        let begun = Instant::now();
        assert_eq!(read(pieces(100, 1 << 10, true), 1 << 24, None, TIMEOUT).await, Err(Unread::TooSlow));
        assert_eq!(begun.elapsed().as_secs(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_comes_at_some_pace_is_read_until_the_time_limit() {
        let body = read(pieces(20, 20 << 10, true), 1 << 24, None, TIMEOUT).await.unwrap();
        assert_eq!(body.len(), 20 * (20 << 10));
        let begun = Instant::now();
        assert_eq!(read(pieces(100, 20 << 10, true), 1 << 24, None, TIMEOUT).await, Err(Unread::TooSlow));
        assert_eq!(begun.elapsed().as_secs(), 30);
        assert_eq!(read(pieces(3, 400, true), 1000, None, TIMEOUT).await, Err(Unread::TooLong));
    }
}
