//! What the consumer's thread tells of itself.

use jiff::Timestamp;

use super::partitions::State;
use super::{PartitionStatus, Worker};
use crate::message::Message;
use crate::offsets::TopicPartition;

impl Worker {
    /// Counts a message that came, and whether it was taken.
    pub(super) fn count(&self, message: &Message, taken: bool) {
        let mut status = self.signals.control.status();
        if !taken {
            status.skipped += 1;
            return;
        }
        status.tombstones += u64::from(message.payload.is_none());
        match status.messages.get_mut(&*message.topic) {
            Some(count) => *count += 1,
            None => drop(status.messages.insert(message.topic.to_string(), 1)),
        }
    }

    /// Brings the status up to date.
    pub(super) fn publish_status(&mut self) {
        let (ledger, as_of) = (&self.setup.ledger, Timestamp::now());
        let suspects = ledger.suspects();
        let of = |(partition, state): (&TopicPartition, &State)| {
            // First what is committed, which the watermark is never behind: transactions move both meanwhile.
            let committed = ledger.committed_so_far(partition).map(|committed| committed.offset);
            let position = ledger.position(partition);
            PartitionStatus {
                topic: partition.topic.to_string(),
                partition: partition.partition,
                paused: state.paused == Some(true),
                at_end: state.at_end,
                lag: state.lag(position.map(|position| position.watermark)),
                committed,
                watermark: position.map(|position| position.watermark),
                span: position.map_or(0, |position| position.span),
                open: position.map_or(0, |position| position.open),
                one_at_a_time_until: suspects.iter().find(|(of, ..)| of == partition).map(|(_, _, until)| *until),
            }
        };
        let partitions = self.partitions.iter().map(of).collect();
        let mut status = self.signals.control.status();
        (status.as_of, status.partitions) = (Some(as_of), partitions);
        status.held_bytes = self.held.bytes();
        status.last_error = self.setup.consumer.last_error().map(|(_, reason)| reason);
    }
}
