//! Writes replays, and knows of each whether the brokers have it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::letter::Place;
use crate::command::submit::outbox::refusal;
use crate::kafka::{Deliver, Error, NotDelivered, NotSent, Producer, Record};
use crate::settings::Kafka;

/// Records handed to librdkafka and not acknowledged; its own queue bounds their bytes.
const WINDOW: usize = 4_096;

/// How far behind its pace the writer may catch up.
const CATCH_UP: Duration = Duration::from_millis(100);

/// A record under way.
#[derive(Debug)]
struct Sent {
    place: Place,
    topic: Arc<str>,
}

type Report = (Box<Sent>, Result<(), NotDelivered>);

struct Reports(mpsc::SyncSender<Report>);

impl Deliver for Reports {
    type Tag = Sent;

    fn delivered(&self, tag: Box<Sent>, result: Result<(), NotDelivered>) {
        // There is room for the whole window; and nobody listens when the command has ended.
        let _ = self.0.try_send((tag, result));
    }
}

/// A record that the brokers refused for a reason of its own.
#[derive(Debug)]
pub struct Refused {
    /// The dead letter that it replays.
    pub place: Place,
    /// What became of it, and librdkafka's reason.
    pub reason: String,
}

/// Writes records.
pub struct Writer {
    producer: Producer<Reports>,
    reports: mpsc::Receiver<Report>,
    under_way: usize,
    timeout: Duration,
    written: BTreeMap<Arc<str>, u64>,
    refused: Vec<Refused>,
}

impl Writer {
    /// Creates the producer. The brokers are given up when they acknowledge nothing for `timeout`.
    pub fn new(kafka: &Kafka, timeout: Duration) -> Result<Self, Error> {
        let (sender, reports) = mpsc::sync_channel(WINDOW);
        let producer = Producer::new(kafka, Reports(sender))?;
        Ok(Self { producer, reports, under_way: 0, timeout, written: BTreeMap::new(), refused: Vec::new() })
    }

    /// Records that the brokers have, by topic.
    pub fn written(&self) -> &BTreeMap<Arc<str>, u64> {
        &self.written
    }

    /// Records of which nobody knows whether the brokers have them.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// Takes what was refused since the last time.
    pub fn take_refused(&mut self) -> Vec<Refused> {
        std::mem::take(&mut self.refused)
    }

    /// Hands over the replay of the dead letter at `place`. Blocks while too many are under way.
    ///
    /// # Errors
    /// What makes going on useless: the topic, the permissions, the login, brokers that are away.
    pub fn send(&mut self, place: Place, topic: &Arc<str>, record: Record<'_>) -> anyhow::Result<()> {
        while let Ok(report) = self.reports.try_recv() {
            self.settle(report)?;
        }
        let mut sent = Box::new(Sent { place, topic: topic.clone() });
        loop {
            if self.under_way >= WINDOW {
                self.wait()?;
                continue;
            }
            match self.producer.send(record, sent) {
                Ok(()) => {
                    self.under_way += 1;
                    return Ok(());
                }
                Err((NotSent::QueueFull, back)) if self.under_way > 0 => {
                    sent = back;
                    self.wait()?;
                }
                Err((NotSent::QueueFull, _)) => {
                    self.refused.push(Refused { place, reason: "too long for the producer's queue".into() });
                    return Ok(());
                }
                Err((NotSent::Refused(failure), back)) => return self.not_delivered(*back, failure),
            }
        }
    }

    /// Waits for what is under way.
    ///
    /// # Errors
    /// The same.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        while self.under_way > 0 {
            self.wait()?;
        }
        Ok(())
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        if let Ok(report) = self.reports.recv_timeout(self.timeout) {
            return self.settle(report);
        }
        let reason = self.producer.last_error().map_or_else(String::new, |(_, reason)| format!(" ({reason})"));
        let time = humantime::format_duration(self.timeout);
        Err(anyhow::anyhow!("the brokers acknowledged nothing for {time}{reason}"))
    }

    fn settle(&mut self, (sent, result): Report) -> anyhow::Result<()> {
        self.under_way -= 1;
        match result {
            Ok(()) => {
                *self.written.entry(sent.topic).or_default() += 1;
                Ok(())
            }
            Err(failure) => self.not_delivered(*sent, failure),
        }
    }

    fn not_delivered(&mut self, sent: Sent, failure: NotDelivered) -> anyhow::Result<()> {
        if let Some(fatal) = self.producer.fatal() {
            return Err(fatal.into());
        }
        let Sent { place, topic } = sent;
        self.refused.push(Refused { place, reason: refusal(&topic, &failure)? });
        Ok(())
    }
}

/// When the next record may go, where there is a limit.
#[derive(Debug)]
pub struct Pace {
    interval: Duration,
    next: Instant,
}

impl Pace {
    /// So many a second at most, the first one now; without a limit, any number.
    pub fn new(rate: Option<u32>, now: Instant) -> Self {
        Self { interval: rate.map_or(Duration::ZERO, |rate| Duration::from_secs(1) / rate), next: now }
    }

    /// How long the next record has to wait still.
    pub fn wait(&self, now: Instant) -> Duration {
        self.next.saturating_duration_since(now)
    }

    /// One goes.
    pub fn take(&mut self, now: Instant) {
        // Sleeps are late by a little, which is made up for; a long stall is not.
        self.next = self.next.max(now.checked_sub(CATCH_UP).unwrap_or(now)) + self.interval;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_kept_on_average_and_a_stall_is_not_made_up_for() {
        let begun = Instant::now();
        let mut pace = Pace::new(Some(10), begun);
        let mut now = begun;
        for _ in 0..50 {
            now += pace.wait(now) + Duration::from_millis(3);
            pace.take(now);
        }
        assert!(
            now - begun >= Duration::from_millis(4_900) && now - begun < Duration::from_secs(5),
            "{:?}",
            now - begun
        );
        now += Duration::from_secs(60);
        let at_once = (0..50).take_while(|_| pace.wait(now).is_zero().then(|| pace.take(now)).is_some()).count();
        assert!(at_once <= 2, "{at_once}");
        assert_eq!(Pace::new(None, begun).wait(begun), Duration::ZERO);
    }
}
