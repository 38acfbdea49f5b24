//! Whether this worker is one too many.

use std::time::{Duration, Instant};

use super::Worker;

impl Worker {
    /// Says so when the group has no partition of an input left for this worker.
    pub(super) fn look_for_work(&mut self, joined: bool, now: Instant) {
        let kafka = &self.setup.kafka;
        let has_work = self.partitions.iter().any(|(partition, _)| kafka.retry_topic(&partition.topic).is_none());
        let settling = 2 * self.setup.kafka.revoke_drain;
        if self.spare.is_news(joined && !has_work && self.output.is_some(), settling, now) {
            tracing::warn!(
                "this worker has nothing to do, since the group kafka.group_id has more workers than an input topic has \
                 partitions. It takes over when another one leaves; to use it now, add partitions to the topics"
            );
        }
    }
}

/// Notices that a worker has no work for longer than the group needs to settle. Pure: takes `now`.
#[derive(Debug, Default)]
pub(super) struct Spare {
    since: Option<Instant>,
    told: bool,
}

impl Spare {
    /// Whether it is to be said now that there is nothing to do: once, when that has lasted for `settling`.
    pub(super) fn is_news(&mut self, idle: bool, settling: Duration, now: Instant) -> bool {
        if !idle {
            *self = Self::default();
            return false;
        }
        let since = *self.since.get_or_insert(now);
        let news = !self.told && now.saturating_duration_since(since) >= settling;
        self.told |= news;
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_without_work_is_told_once_and_not_while_the_group_settles() {
        let (mut spare, begun) = (Spare::default(), Instant::now());
        let mut news =
            |idle, seconds| spare.is_news(idle, Duration::from_secs(10), begun + Duration::from_secs(seconds));
        assert!(!news(true, 0) && !news(true, 9));
        assert!(news(true, 10) && !news(true, 11) && !news(true, 60));
        assert!(!news(false, 61) && !news(true, 62) && !news(true, 71));
        assert!(news(true, 72));
    }
}
