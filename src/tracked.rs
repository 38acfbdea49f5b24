//! A value that travels with its ticket and its permits, so that no stage can forget either.

use std::sync::Arc;

use crate::budget::Permit;
use crate::offsets::{Outcome, Ticket, TopicPartition};

/// A value on its way through the flow.
///
/// It can be changed by [`Tracked::map`], and ends with [`Tracked::resolve`]: dropping it drops the ticket, which the
/// ledger reports as a lost message.
#[derive(Debug)]
#[must_use = "dropping a tracked value loses its message"]
pub struct Tracked<T> {
    /// The value.
    pub value: T,
    tag: Tag,
}

/// What travels along.
#[derive(Debug)]
pub struct Tag {
    ticket: Ticket,
    /// Shared by the rows of a message: given back when the last one ends.
    message: Arc<Permit>,
    image: Option<Permit>,
}

impl<T> Tracked<T> {
    /// A consumed message with its ticket and its permit of the message pool.
    pub fn new(value: T, ticket: Ticket, permit: Permit) -> Self {
        Self { value, tag: Tag { ticket, message: Arc::new(permit), image: None } }
    }

    /// Puts a tag on a value.
    pub fn join(value: T, tag: Tag) -> Self {
        Self { value, tag }
    }

    /// The value and its tag apart, for work that consumes the value.
    pub fn part(self) -> (T, Tag) {
        (self.value, self.tag)
    }

    /// Changes the value.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Tracked<U> {
        Tracked { value: change(self.value), tag: self.tag }
    }

    /// One tracked value for each of `values`; the message is resolved when all of them are. An empty list gives the
    /// tag back.
    pub fn split<U>(self, values: Vec<U>) -> Result<Vec<Tracked<U>>, Tag> {
        if values.is_empty() {
            return Err(self.tag);
        }
        let Tag { ticket, message, image } = self.tag;
        debug_assert!(image.is_none(), "a message is split before its images are fetched");
        let tags = ticket.split(values.len()).into_iter();
        let tags = tags.map(|ticket| Tag { ticket, message: message.clone(), image: None });
        Ok(values.into_iter().zip(tags).map(|(value, tag)| Tracked { value, tag }).collect())
    }

    /// A second value beside this one, which takes the image permit along; the message is resolved when both are.
    pub fn fork<U>(self, beside: U) -> (Self, Tracked<U>) {
        let Tag { ticket, message, image } = self.tag;
        let [ticket, second] = ticket.fork();
        let (tag, other) =
            (Tag { ticket, message: message.clone(), image: None }, Tag { ticket: second, message, image });
        (Self { value: self.value, tag }, Tracked { value: beside, tag: other })
    }

    /// Puts a permit of the image pool on the value.
    pub fn with_image(mut self, permit: Permit) -> Self {
        self.tag.image = Some(permit);
        self
    }

    /// Gives back all but `bytes` of the image permit.
    pub fn shrink_image(&mut self, bytes: usize) {
        if let Some(permit) = &mut self.tag.image {
            permit.shrink(bytes);
        }
    }

    /// Gives the image permit back.
    pub fn release_image(&mut self) {
        self.tag.image = None;
    }

    /// Partition of the message.
    pub fn partition(&self) -> &TopicPartition {
        self.tag.ticket.partition()
    }

    /// Offset of the message.
    pub fn offset(&self) -> i64 {
        self.tag.ticket.offset()
    }

    /// Says that the value is what its ticket promised, see [`Ticket::ready`].
    pub fn ready(&mut self) {
        self.tag.ticket.ready();
    }

    /// Whether the value still counts, see [`Ticket::current`].
    pub fn current(&self) -> bool {
        self.tag.ticket.current()
    }

    /// Gives up on the value at the deadline of a drain: its message is read again by the next worker.
    pub fn abandon(self) -> T {
        self.tag.abandon();
        self.value
    }

    /// Ends the value's way.
    pub fn resolve(self, outcome: Outcome) -> T {
        self.tag.resolve(outcome);
        self.value
    }
}

impl Tag {
    /// Gives up on the ticket, see [`Ticket::abandon`], and gives the permits back.
    pub fn abandon(self) {
        self.ticket.abandon();
    }

    /// Resolves the ticket and gives the permits back.
    pub fn resolve(self, outcome: Outcome) {
        self.ticket.resolve(outcome);
    }
}

#[cfg(test)]
mod tests;
