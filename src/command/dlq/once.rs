//! Which origins were met before. Pure.

use std::collections::HashSet;
use std::sync::Arc;

use crate::message::Origin;

/// Most origins that are remembered: about 50 MB.
const MAX_ORIGINS: usize = 1_000_000;

/// Remembers origins: one that failed, was replayed and failed again has two dead letters, and each further replay of
/// everything would double them.
#[derive(Debug, Default)]
pub struct Once {
    topics: Vec<Arc<str>>,
    /// Number of the topic, partition, offset, row.
    met: HashSet<(u32, i32, i64, u32)>,
    full: bool,
}

impl Once {
    /// Whether it is met for the first time. When there are too many to remember, every further one is taken for new.
    pub fn is_first(&mut self, origin: &Origin) -> bool {
        let topic = self.topics.iter().position(|topic| *topic == origin.topic).unwrap_or_else(|| {
            self.topics.push(origin.topic.clone());
            self.topics.len() - 1
        });
        let row = origin.index.map_or(u32::MAX, |index| index as u32);
        let key = (topic as u32, origin.partition, origin.offset, row);
        if self.met.len() < MAX_ORIGINS {
            return self.met.insert(key);
        }
        let is_first = !self.met.contains(&key);
        if is_first && !self.full {
            self.full = true;
            tracing::warn!(
                "more than {MAX_ORIGINS} origins: from here on, a second dead letter of one may be replayed, too; \
                 portions (--since, --until) would avoid that"
            );
        }
        is_first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_origin_is_first_once() {
        let mut once = Once::default();
        let all = ["a/0/1", "a/0/2", "a/1/1", "b/0/1", "a/0/1/0", "a/0/1/1"].map(|text| text.parse().unwrap());
        assert!(all.iter().all(|origin| once.is_first(origin)));
        assert!(!all.iter().any(|origin| once.is_first(origin)));
    }
}
