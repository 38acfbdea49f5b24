//! Reads the dead letters that are meant, one after the other, to the end that their topic had at the start.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IsTerminal};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::filter::Filter;
use super::letter::{Letter, Place};
use crate::command::collect::dead_letters;
use crate::kafka::{Error, Snapshot};
use crate::message::Message;
use crate::settings::Kafka;

/// One look at the topic; so late may Ctrl-C be noticed.
const STEP: Duration = Duration::from_millis(50);

/// What is looked for.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Only these, if there are any.
    pub places: Vec<Place>,
    /// Only what matches.
    pub filter: Filter,
    /// So many at most.
    pub limit: Option<u64>,
}

/// Reading, from the first dead letter to the last.
pub struct Reading {
    snapshot: Snapshot,
    wanted: Wanted,
    /// Places that were named and not met.
    missing: BTreeSet<Place>,
    found: u64,
    looked_at: u64,
    /// Set to stop early.
    pub stop: Arc<AtomicBool>,
    /// Shows how far it is; moved here.
    pub bar: ProgressBar,
}

impl Reading {
    /// Looks the topic up, within `timeout`.
    ///
    /// # Errors
    /// The brokers are not reached in time, or the topic does not exist or may not be seen.
    pub fn open(kafka: &Kafka, wanted: Wanted, timeout: Duration, bar: ProgressBar) -> Result<Self, Error> {
        let ranges = (!wanted.places.is_empty()).then(|| ranges(&wanted.places));
        let snapshot = Snapshot::open(kafka, &dead_letters(kafka), ranges.as_ref(), timeout)?;
        bar.set_length(snapshot.offsets());
        let missing = wanted.places.iter().copied().collect();
        Ok(Self { snapshot, wanted, missing, found: 0, looked_at: 0, stop: Arc::default(), bar })
    }

    /// The next one that is meant; `None` at the end, or when it is to stop.
    ///
    /// # Errors
    /// Reading cannot go on.
    pub fn next(&mut self) -> Result<Option<(Letter, Message)>, Error> {
        while !self.snapshot.is_over() && !self.is_stopped() && self.wanted.limit.is_none_or(|most| self.found < most) {
            let Some(message) = self.snapshot.next(STEP)? else { continue };
            self.bar.inc(1);
            let place = Place { partition: message.partition, offset: message.offset };
            if !self.wanted.places.is_empty() && !self.missing.contains(&place) {
                continue;
            }
            self.looked_at += 1;
            match Letter::read(&message) {
                Ok(letter) => {
                    self.missing.remove(&place);
                    if self.wanted.filter.matches(&letter) {
                        self.found += 1;
                        return Ok(Some((letter, message)));
                    }
                }
                Err(why) => self.bar.suspend(|| tracing::warn!("{}/{place}: {why}", message.topic)),
            }
        }
        Ok(None)
    }

    /// Whether somebody wished it to stop.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Records that were looked at, those included that are not meant.
    pub fn looked_at(&self) -> u64 {
        self.looked_at
    }

    /// Names the places that were looked for to the end and have no dead letter; whether there are any.
    #[allow(clippy::print_stderr)] // for people, beside the output
    pub fn tell_missing(&self, topic: &str) -> bool {
        if !self.snapshot.is_over() {
            return false;
        }
        for place in &self.missing {
            eprintln!("error: there is no dead letter at {place} of {topic}, or it is there no longer");
        }
        !self.missing.is_empty()
    }
}

/// From the first to the last place of each partition.
fn ranges(places: &[Place]) -> BTreeMap<i32, RangeInclusive<i64>> {
    let mut ranges = BTreeMap::new();
    for &Place { partition, offset } in places {
        let range = ranges.entry(partition).or_insert(offset..=offset);
        *range = offset.min(*range.start())..=offset.max(*range.end());
    }
    ranges
}

/// Progress for people, on standard error; none where the output itself appears on the terminal.
pub fn progress(output_shown: bool) -> ProgressBar {
    if output_shown && io::stdout().is_terminal() || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template = "{spinner} {human_pos} of {human_len} dead letters read, {per_sec}, {elapsed} {msg}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner());
    ProgressBar::new(0).with_style(style)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_in_one_go_for_each_partition() {
        let places = ["0/7", "2/5", "0/3", "0/9"].map(|place| place.parse().unwrap());
        assert_eq!(ranges(&places), BTreeMap::from([(0, 3..=9), (2, 5..=5)]));
    }
}
