//! Messages that found no room: they have no tickets, so they can be forgotten, and no permits, so they must be few.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::MESSAGE_OVERHEAD;
use crate::message::Message;

/// A message that finds no room waits this long before everything is paused: a pause throws away what was prefetched,
/// and most waits are shorter than reading it again.
const PATIENCE: Duration = Duration::from_millis(50);

/// Messages that may wait before everything is paused whatever the time.
const MAX_HELD: usize = 16;

/// Bytes of such messages. The one that passes it is still held, so this and the longest message are the most there is.
const MAX_HELD_BYTES: usize = 1 << 20;

/// The messages, oldest first.
#[derive(Debug, Default)]
pub(super) struct Held {
    messages: VecDeque<Message>,
    bytes: usize,
    /// Since when there is one.
    since: Option<Instant>,
}

fn cost(message: &Message) -> usize {
    message.size() + MESSAGE_OVERHEAD
}

impl Held {
    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Bytes, with the structs around them.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Holds the newest message.
    pub(super) fn push(&mut self, message: Message, now: Instant) {
        self.bytes += cost(&message);
        self.messages.push_back(message);
        self.since.get_or_insert(now);
    }

    /// Takes the oldest message, to try it again.
    pub(super) fn take(&mut self) -> Option<Message> {
        let message = self.messages.pop_front();
        match &message {
            Some(message) => self.bytes -= cost(message),
            None => self.since = None,
        }
        message
    }

    /// Holds on to a message that was taken.
    pub(super) fn put_back(&mut self, message: Message) {
        self.bytes += cost(&message);
        self.messages.push_front(message);
    }

    /// Keeps only some.
    pub(super) fn retain(&mut self, keep: impl Fn(&Message) -> bool) {
        self.messages.retain(keep);
        self.bytes = self.messages.iter().map(cost).sum();
    }

    /// Whether there is one like this.
    pub(super) fn any(&self, is: impl Fn(&Message) -> bool) -> bool {
        self.messages.iter().any(is)
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Whether they have become too many, too long, or have waited for too long.
    pub(super) fn too_much(&self, now: Instant) -> bool {
        let late = self.since.is_some_and(|since| now.saturating_duration_since(since) >= PATIENCE);
        !self.is_empty() && (late || self.messages.len() > MAX_HELD || self.bytes > MAX_HELD_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(bytes: usize) -> Message {
        Message { payload: Some(vec![0; bytes].into()), ..Message::empty("t", 0, 0) }
    }

    #[test]
    fn a_message_of_megabytes_is_too_much_at_once_and_a_few_small_ones_after_a_while() {
        let now = Instant::now();
        let mut held = Held::default();
        held.push(message(10), now);
        held.push(message(10), now + PATIENCE);
        assert!(!held.too_much(now));
        assert!(held.too_much(now + PATIENCE));
        held.clear();
        held.push(message(MAX_HELD_BYTES), now);
        assert!(held.too_much(now));
    }

    #[test]
    fn many_small_messages_are_too_much() {
        let now = Instant::now();
        let mut held = Held::default();
        (0..MAX_HELD).for_each(|_| held.push(message(1), now));
        assert!(!held.too_much(now));
        held.push(message(1), now);
        assert!(held.too_much(now));
    }

    #[test]
    fn bytes_are_those_of_what_is_held() {
        let now = Instant::now();
        let mut held = Held::default();
        for bytes in [1, 20, 300] {
            held.push(message(bytes), now);
        }
        assert_eq!(held.bytes(), 321 + 3 * MESSAGE_OVERHEAD);
        let oldest = held.take().unwrap();
        assert_eq!(held.bytes(), 320 + 2 * MESSAGE_OVERHEAD);
        held.put_back(oldest);
        held.retain(|message| message.size() != 20);
        assert_eq!(held.bytes(), 301 + 2 * MESSAGE_OVERHEAD);
        assert_eq!(std::iter::from_fn(|| held.take()).map(|m| m.size()).collect::<Vec<_>>(), [1, 300]);
        assert_eq!(held.bytes(), 0);
        // Patience begins anew with the next one.
        held.push(message(1), now + PATIENCE);
        assert!(!held.too_much(now + PATIENCE));
    }
}
