//! What waits for a device.

use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::stage::Ready;
use crate::tracked::Tracked;

/// A row that waits for a device, and since when.
#[derive(Debug)]
pub struct Queued {
    /// The row.
    pub ready: Tracked<Ready>,
    /// When it was queued.
    pub since: Instant,
    /// Its lane, so that it can be put back.
    pub lane: usize,
    /// When its request's deadline passes.
    pub due: Option<Instant>,
}

impl Queued {
    /// A row that begins to wait now.
    pub fn new(ready: Tracked<Ready>, lane: usize) -> Self {
        let since = Instant::now();
        let due = ready.value.row.request.deadline.and_then(|deadline| moment(deadline, Timestamp::now(), since));
        Self { ready, since, lane, due }
    }
}

/// A time of day as a moment of this process, `now` and `instant` being the same moment; `None` where it is too far
/// away to be one.
fn moment(time: Timestamp, now: Timestamp, instant: Instant) -> Option<Instant> {
    // What has passed is due now.
    let left = Duration::try_from(time.duration_since(now)).unwrap_or_default();
    instant.checked_add(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_a_moment_of_this_process() {
        let (now, instant) = (Timestamp::now(), Instant::now());
        let in_a_second = now + jiff::SignedDuration::from_secs(1);
        assert_eq!(moment(in_a_second, now, instant), Some(instant + Duration::from_secs(1)));
        assert_eq!(moment(now, in_a_second, instant), Some(instant), "what has passed is due now");
    }
}
