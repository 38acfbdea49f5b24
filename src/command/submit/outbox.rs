//! Records on their way to the brokers, and what became of each.

use anyhow::Context;
use async_channel::{Receiver, Sender};

use crate::kafka::{Class, Deliver, Error, NotDelivered, NotSent, Producer, Record};
use crate::message::Headers;
use crate::settings::Kafka;

/// Records handed to librdkafka and not acknowledged; its own queue bounds their bytes.
const WINDOW: usize = 4_096;

/// Partition and offset of a record; no offset where the broker did not say.
pub type Place = (i32, Option<i64>);

/// What goes along with a record.
struct Tagged<T> {
    tag: T,
    place: Option<Place>,
}

type Report<T> = (Box<Tagged<T>>, Result<(), NotDelivered>);

struct Reports<T>(Sender<Report<T>>);

impl<T: Send + Sync + 'static> Deliver for Reports<T> {
    type Tag = Tagged<T>;

    fn delivered(&self, tag: Box<Tagged<T>>, result: Result<(), NotDelivered>) {
        // There is room for the whole window; and nobody listens when the command has ended.
        let _ = self.0.try_send((tag, result));
    }

    fn placed(&self, tag: &mut Tagged<T>, partition: i32, offset: Option<i64>) {
        tag.place = Some((partition, offset));
    }
}

/// What became of a record that was to be handed over; what does not go comes back.
pub enum Handed<T> {
    /// It is under way: a report follows.
    Taken,
    /// It has to wait for a report of another one.
    Full(T),
    /// It will never go.
    Refused(T, NotTaken),
}

/// Why the brokers do not have a record, while others may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotTaken {
    /// Whether it is too long for them.
    pub too_long: bool,
    /// In words.
    pub why: String,
}

/// Records for one topic.
pub struct Outbox<T: Send + Sync + 'static> {
    topic: String,
    producer: Producer<Reports<T>>,
    reports: Receiver<Report<T>>,
    under_way: usize,
}

impl<T: Send + Sync + 'static> Outbox<T> {
    /// Creates the producer; nothing is sent yet.
    pub fn new(kafka: &Kafka, topic: &str) -> Result<Self, Error> {
        let (sender, reports) = async_channel::bounded(WINDOW);
        Ok(Self { topic: topic.into(), producer: Producer::new(kafka, Reports(sender))?, reports, under_way: 0 })
    }

    /// Hands a record over.
    ///
    /// # Errors
    /// What makes going on useless: the topic, the permissions, the login.
    pub fn send(&mut self, key: Option<&[u8]>, value: &[u8], tag: T) -> anyhow::Result<Handed<T>> {
        let headers = Headers::new();
        let record = Record { topic: &self.topic, key, value: Some(value), headers: &headers, timestamp_ms: None };
        match self.producer.send(record, Box::new(Tagged { tag, place: None })) {
            Ok(()) => {
                self.under_way += 1;
                Ok(Handed::Taken)
            }
            // Something under way will make room.
            Err((NotSent::QueueFull, back)) if self.under_way > 0 => Ok(Handed::Full(back.tag)),
            Err((NotSent::QueueFull, back)) => {
                let why = "too long for the producer's queue".into();
                Ok(Handed::Refused(back.tag, NotTaken { too_long: true, why }))
            }
            Err((NotSent::Refused(failure), back)) => Ok(Handed::Refused(back.tag, self.judge(failure)?)),
        }
    }

    /// What became of one that is under way: where it stands now, or why it does not. Nothing is lost where this is not
    /// waited for to its end.
    ///
    /// # Errors
    /// As in [`Outbox::send`].
    pub async fn report(&mut self) -> anyhow::Result<(T, Result<Option<Place>, NotTaken>)> {
        let (tagged, result) = self.reports.recv().await.context("the producer ended unexpectedly")?;
        self.under_way -= 1;
        let Tagged { tag, place } = *tagged;
        Ok(match result {
            Ok(()) => (tag, Ok(place)),
            Err(failure) => (tag, Err(self.judge(failure)?)),
        })
    }

    fn judge(&self, failure: NotDelivered) -> anyhow::Result<NotTaken> {
        if let Some(fatal) = self.producer.fatal() {
            return Err(fatal.into());
        }
        let why = refusal(&self.topic, &failure)?;
        Ok(NotTaken { too_long: failure.class == Class::TooLarge, why })
    }

    /// Records handed over without a report.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// Whether one more may be under way.
    pub fn has_room(&self) -> bool {
        self.under_way < WINDOW
    }

    /// That the brokers have acknowledged nothing for `time`, and why, for people.
    pub fn explain_silence(&self, time: std::time::Duration) -> String {
        let time = humantime::format_duration(time);
        let reason = self.producer.last_error().map_or_else(String::new, |(_, reason)| format!(" ({reason})"));
        format!("the brokers acknowledged nothing for {time}{reason}; {} records are open", self.under_way)
    }
}

/// What became of a record that is not in this topic for a reason of its own.
///
/// # Errors
/// The reason holds for all records.
pub fn refusal(topic: &str, failure: &NotDelivered) -> anyhow::Result<String> {
    let reason = format!("{topic}: {}", failure.reason);
    match failure.class {
        Class::UnknownTopic => {
            let setting = "--topic or kafka.inputs".into();
            Err(Error::UnknownTopic { topic: topic.to_owned(), setting }.into())
        }
        Class::NotAuthorised => Err(anyhow::anyhow!("the brokers do not permit to write: {reason}")),
        Class::Authentication => Err(Error::Authentication { reason }.into()),
        Class::Unconfirmed => Ok(format!("not confirmed by the brokers: {reason}")),
        _ => Ok(format!("not taken by the brokers: {reason}")),
    }
}
