//! One message at a time: how the message that kills its worker is found.
//!
//! The ledger counts the starts at an offset that did not end in order. Where they are too many, the messages behind it
//! are handed on alone, and the offset says so before each: whoever dies then names the message. Alone means in the
//! whole worker, so the other partitions wait; that is simple, and soon over.

use std::sync::Arc;
use std::time::Instant;

use async_channel::TrySendError;

use super::{MESSAGE_OVERHEAD, Worker, partition_of};
use crate::disposition::{Code, Failure, Stage};
use crate::gate::Reason;
use crate::message::Message;
use crate::offsets::{Pass, TopicPartition};
use crate::stage::Output;
use crate::tracked::Tracked;

/// What becomes of a message that there is room for.
pub(super) enum Admission {
    /// It is handed on.
    Now,
    /// It is held until it may be.
    Later,
    /// It is forgotten and read again: others go first.
    Elsewhere,
    /// It is a dead letter, after so many starts.
    Blamed(u32),
}

impl Worker {
    /// Whether a message may be handed on now.
    pub(super) fn admission(&mut self, partition: &TopicPartition, offset: i64) -> Admission {
        let ledger = &self.setup.ledger;
        if self.solo.as_ref() != Some(partition) {
            return match (&self.solo, ledger.pass(partition, offset)) {
                (None, Pass::Now) => Admission::Now,
                _ => Admission::Elsewhere,
            };
        }
        match ledger.pass_alone(partition, offset) {
            Pass::Now => Admission::Now,
            Pass::Later => Admission::Later,
            Pass::Blamed(starts) => Admission::Blamed(starts),
        }
    }

    /// Makes a dead letter of a message, without looking into it. Gives it back when there is no room.
    pub(super) fn quarantine(&mut self, message: Message, starts: u32) -> Option<Message> {
        let partition = partition_of(&message);
        let failures = self.failures.clone()?;
        let Some(permit) = self.setup.messages.try_acquire(message.size() + MESSAGE_OVERHEAD) else {
            return Some(message);
        };
        let ticket = self.setup.ledger.open(&partition, message.offset);
        self.count(&message, ticket.is_some());
        let ticket = ticket?;
        let origin = message.origin();
        tracing::error!(
            %partition,
            offset = message.offset,
            %origin,
            "a worker died while this message alone was in flight: it goes to the dead letters as `quarantined`, unread"
        );
        let text = format!(
            "a worker died, or lost its group, while this message alone was in flight, after {starts} starts at its \
             offset; it was not tried again"
        );
        let failure = Failure::with_message(Stage::Consume, Code::Quarantined, text);
        let failure = Failure { attempts: starts.max(1), ..failure };
        let output = Output::FailedMessage { message: Arc::new(message), index: None, native: None, failure };
        let sent = match failures.try_send(Tracked::new(output, ticket, permit)) {
            Ok(()) => Ok(()),
            // Nothing else is in flight, so there is room at once.
            Err(TrySendError::Full(finished)) => failures.send_blocking(finished).map_err(|refused| refused.0),
            Err(TrySendError::Closed(finished)) => Err(finished),
        };
        self.look_at_span(&partition);
        if let Err(refused) = sent {
            refused.abandon();
            self.fail_behind();
        }
        None
    }

    /// Looks which partitions are suspect, which of them is to be read alone, and who waits for it.
    pub(super) fn look_at_suspects(&mut self) {
        let suspects = self.setup.ledger.suspects();
        let mut solo = None;
        for (partition, from, until) in suspects {
            if self.is_through(&partition, from, until) {
                tracing::info!(%partition, until, "the suspect messages are through; the worker goes on as usual");
                self.setup.ledger.trust(&partition);
            } else if solo.is_none() && self.partitions.may_deliver(&partition) {
                solo = Some(partition);
            }
        }
        self.solo = solo;
        self.setup.gate.tell(Reason::Solo, self.solo.is_some());
        let (solo, ledger) = (self.solo.as_ref(), &self.setup.ledger);
        self.partitions.hold_back(|partition| match solo {
            Some(alone) => alone != partition,
            None => ledger.is_waiting(partition),
        });
    }

    /// Whether everything is resolved that can have been in flight at a death.
    fn is_through(&self, partition: &TopicPartition, from: i64, until: i64) -> bool {
        if from >= until {
            return true;
        }
        // What comes later was not there.
        self.partitions.is_at_end(partition)
            && self.setup.ledger.open_in(partition) == 0
            && !self.held.any(|message| partition_of(message) == *partition)
    }

    /// Says once what a suspect span is, and what it means.
    pub(super) fn tell_suspects(&self, partitions: &[TopicPartition]) {
        let suspects = self.setup.ledger.suspects();
        for (partition, from, until) in suspects.into_iter().filter(|(partition, ..)| partitions.contains(partition)) {
            let starts = self.setup.ledger.committed_so_far(&partition).map_or(0, |found| found.note.starts);
            tracing::warn!(
                %partition,
                from,
                until,
                starts,
                "workers keep dying on these offsets, or losing their group: the messages are taken one at a time, and no \
                 other message of this worker meanwhile, until the span is through. A message that was alone when a worker \
                 died goes to the dead letters as `quarantined`; see \"Workers keep dying\" in docs/runbook.md"
            );
        }
    }

    /// Looks again, and pauses or resumes what follows from it.
    pub(super) fn review(&mut self, now: Instant) {
        self.look_at_suspects();
        self.apply_pauses(now);
    }
}
