//! Where partitions end, asked without waiting.
//!
//! librdkafka learns the end of a partition from what it fetches of it, and fetches nothing of one that is paused: its
//! statistics go on telling the end as it was then.

use std::ffi::CStr;

use rdkafka::Offset;
use rdkafka::bindings::{
    rd_kafka_AdminOptions_destroy, rd_kafka_AdminOptions_new, rd_kafka_AdminOptions_set_isolation_level,
    rd_kafka_AdminOptions_set_request_timeout, rd_kafka_IsolationLevel_t, rd_kafka_ListOffsets,
    rd_kafka_ListOffsets_result_infos, rd_kafka_ListOffsetsResultInfo_topic_partition, rd_kafka_admin_op_t,
    rd_kafka_error_destroy, rd_kafka_event_ListOffsets_result, rd_kafka_event_destroy, rd_kafka_event_error,
    rd_kafka_queue_destroy, rd_kafka_queue_new, rd_kafka_queue_poll, rd_kafka_queue_t, rd_kafka_t,
};
use rdkafka::types::RDKafkaRespErr;

use super::context::partition_of;
use super::messages;
use super::native::{Owned, slice};
use crate::offsets::TopicPartition;

/// Time for the answer; after that one may ask again.
const TIMEOUT_MS: i32 = 5_000;

/// A question that is under way. It must be gone before its client is.
pub(super) struct Question(Owned<rd_kafka_queue_t>);

// SAFETY: librdkafka's queues may be used and freed on any thread.
unsafe impl Send for Question {}

impl Question {
    /// Asks for the last readable offset of each partition, exclusive.
    ///
    /// # Safety
    /// The client is valid, and outlives the question.
    pub(super) unsafe fn ask(client: *mut rd_kafka_t, partitions: &[TopicPartition]) -> Self {
        let list = messages::list(partitions.iter().map(|partition| (partition, Offset::End)));
        let kind = rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_LISTOFFSETS;
        let committed = rd_kafka_IsolationLevel_t::RD_KAFKA_ISOLATION_LEVEL_READ_COMMITTED;
        // SAFETY: the client is valid by the caller's promise; list and options are copied by the call, and the queue is
        // a counted reference. A refused option leaves the default, and its error is freed.
        unsafe {
            let options = Owned(rd_kafka_AdminOptions_new(client, kind), rd_kafka_AdminOptions_destroy);
            rd_kafka_AdminOptions_set_request_timeout(options.0, TIMEOUT_MS, std::ptr::null_mut(), 0);
            let refused = rd_kafka_AdminOptions_set_isolation_level(options.0, committed);
            drop(Owned(refused, rd_kafka_error_destroy));
            let queue = Owned(rd_kafka_queue_new(client), rd_kafka_queue_destroy);
            rd_kafka_ListOffsets(client, list.ptr(), options.0, queue.0);
            Self(queue)
        }
    }

    /// The answer once it is there, of the partitions that the brokers know the end of: none, if they did not answer.
    pub(super) fn answer(&self) -> Option<Vec<(TopicPartition, i64)>> {
        // SAFETY: the queue is ours; the event is owned by who polled it.
        let event = Owned(unsafe { rd_kafka_queue_poll(self.0.0, 0) }, rd_kafka_event_destroy);
        if event.0.is_null() {
            return None;
        }
        // SAFETY: the event owns everything that is read here and lives until the end; the count is librdkafka's.
        unsafe {
            if rd_kafka_event_error(event.0) != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
                return Some(Vec::new());
            }
            let result = rd_kafka_event_ListOffsets_result(event.0);
            let mut count = 0;
            let infos = rd_kafka_ListOffsets_result_infos(result, &raw mut count);
            let ends = slice(infos, count).iter().filter_map(|info| {
                let found = rd_kafka_ListOffsetsResultInfo_topic_partition(*info).as_ref()?;
                let known = found.err == RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR && found.offset >= 0;
                let topic = known.then(|| CStr::from_ptr(found.topic).to_string_lossy())?;
                Some((partition_of(&topic, found.partition), found.offset))
            });
            Some(ends.collect())
        }
    }
}
