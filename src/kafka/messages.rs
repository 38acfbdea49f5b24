//! Between librdkafka's messages and ours.

use std::ffi::CStr;
use std::ptr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use rdkafka::bindings::{rd_kafka_header_get_all, rd_kafka_message_headers};
use rdkafka::message::{BorrowedMessage, Header, OwnedHeaders};
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{Message as _, Offset, TopicPartitionList};

use crate::message::{Headers, Message};
use crate::offsets::{Committed, Note, TopicPartition};

/// An owned copy, so that librdkafka's buffers are freed at once.
pub(crate) fn owned(message: &BorrowedMessage<'_>, topic: Arc<str>) -> Message {
    Message {
        topic,
        partition: message.partition(),
        offset: message.offset(),
        timestamp_ms: message.timestamp().to_millis(),
        key: message.key().map(Bytes::copy_from_slice),
        payload: message.payload().map(Bytes::copy_from_slice),
        headers: headers(message),
        received: Instant::now(),
    }
}

/// The headers of a message. rdkafka's own reader panics at a name that is not UTF-8, and names are a stranger's
/// bytes; here such a name keeps its readable part.
fn headers(message: &BorrowedMessage<'_>) -> Headers {
    let mut native = ptr::null_mut();
    // SAFETY: the message lives as long as `message`; on success `native` is owned by it.
    let found = unsafe { rd_kafka_message_headers(message.ptr(), &raw mut native) };
    if found != rdkafka::types::RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR || native.is_null() {
        return Headers::new();
    }
    let mut headers = Headers::new();
    loop {
        let (mut name, mut value, mut length) = (ptr::null(), ptr::null(), 0);
        // SAFETY: `native` is valid while `message` is; an index past the end is answered with an error.
        let found =
            unsafe { rd_kafka_header_get_all(native, headers.len(), &raw mut name, &raw mut value, &raw mut length) };
        if found != rdkafka::types::RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
            return headers;
        }
        // SAFETY: librdkafka ends names with a zero byte, and keeps them as long as the message.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        let value = (!value.is_null()).then(|| {
            // SAFETY: `value` points at `length` bytes that live as long as the message.
            Bytes::copy_from_slice(unsafe { std::slice::from_raw_parts(value.cast::<u8>(), length) })
        });
        headers.push((name, value));
    }
}

/// Headers as librdkafka takes them.
pub(crate) fn to_native(headers: &Headers) -> OwnedHeaders {
    let empty = OwnedHeaders::new_with_capacity(headers.len());
    headers.iter().fold(empty, |list, (key, value)| list.insert(Header { key, value: value.as_deref() }))
}

/// The offset of an element, if it is a number and no logical one.
pub(crate) fn exact_offset(element: &TopicPartitionListElem<'_>) -> Option<i64> {
    match element.offset() {
        Offset::Offset(offset) => Some(offset),
        _ => None,
    }
}

/// A list of partitions, each with the offset that goes with it.
pub(crate) fn list<'a>(partitions: impl IntoIterator<Item = (&'a TopicPartition, Offset)>) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    for (partition, offset) in partitions {
        // Offsets here are logical or not negative, the only two kinds that librdkafka can express.
        let _ = list.add_partition(&partition.topic, partition.partition).set_offset(offset);
    }
    list
}

/// The same with offsets that are committed, and their notes.
pub(crate) fn offset_list(offsets: &[(TopicPartition, Committed)]) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    for (partition, Committed { offset, note }) in offsets {
        let mut element = list.add_partition(&partition.topic, partition.partition);
        let _ = element.set_offset(Offset::Offset(*offset));
        let metadata = note.render();
        if !metadata.is_empty() {
            element.set_metadata(metadata);
        }
    }
    list
}

/// The notes of a list, in its order. rdkafka's own reader panics at metadata that is not UTF-8, and that is a
/// stranger's bytes.
pub(crate) fn notes(list: &TopicPartitionList) -> Vec<Note> {
    let note = |index: usize| {
        // SAFETY: the list is valid while it is borrowed, and `index` is one of its elements.
        let element = unsafe { &*(*list.ptr()).elems.add(index) };
        if element.metadata.is_null() {
            return Note::default();
        }
        // SAFETY: `metadata` points at `metadata_size` bytes that belong to the list.
        Note::parse(unsafe { std::slice::from_raw_parts(element.metadata.cast::<u8>(), element.metadata_size) })
    };
    (0..list.count()).map(note).collect()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rdkafka::bindings::rd_kafka_producev;
    use rdkafka::bindings::rd_kafka_vtype_t::{
        RD_KAFKA_VTYPE_END, RD_KAFKA_VTYPE_HEADER, RD_KAFKA_VTYPE_TOPIC, RD_KAFKA_VTYPE_VALUE,
    };
    use rdkafka::consumer::{BaseConsumer, Consumer as _};
    use rdkafka::producer::{BaseProducer, Producer as _};
    use rdkafka::types::RDKafkaRespErr;

    use super::*;
    use crate::kafka::EmbeddedBroker;

    #[test]
    fn notes_come_back_from_a_list_whatever_else_stands_there() {
        let partition = |number| TopicPartition { topic: "t".into(), partition: number };
        let note = Note { starts: 2, alone: true, until: Some(9) };
        let committed = [(partition(0), Committed { offset: 7, note }), (partition(1), Committed::from(8))];
        let list = offset_list(&committed);
        assert_eq!(notes(&list), [note, Note::default()]);
        let foreign = b"\xff\xfe";
        let mut element = list.find_partition("t", 1).unwrap();
        element.set_metadata("{}");
        // SAFETY: the element has two bytes of metadata, which are written over.
        unsafe {
            let raw = &*(*list.ptr()).elems.add(1);
            ptr::copy_nonoverlapping(foreign.as_ptr(), raw.metadata.cast::<u8>(), foreign.len());
        }
        assert_eq!(notes(&list), [note, Note::default()]);
    }

    #[test]
    fn a_header_name_that_is_not_utf_8_does_not_stop_the_worker() {
        let broker = EmbeddedBroker::start(1, &[("t", 1)]).unwrap();
        let mut config = rdkafka::ClientConfig::new();
        config.set("bootstrap.servers", broker.bootstrap_servers().unwrap()).set("group.id", "g");
        let producer: BaseProducer = config.create().unwrap();
        let (name, value) = (c"na\xffme", b"v");
        // SAFETY: the list of arguments is in the form that librdkafka documents, and everything outlives the call.
        let sent = unsafe {
            rd_kafka_producev(
                producer.client().native_ptr(),
                RD_KAFKA_VTYPE_TOPIC,
                c"t".as_ptr(),
                RD_KAFKA_VTYPE_VALUE,
                value.as_ptr(),
                value.len(),
                RD_KAFKA_VTYPE_HEADER,
                name.as_ptr(),
                value.as_ptr(),
                value.len(),
                RD_KAFKA_VTYPE_END,
            )
        };
        assert_eq!(sent, RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR);
        producer.flush(Duration::from_secs(20)).unwrap();
        let consumer: BaseConsumer = config.create().unwrap();
        let partition = TopicPartition { topic: "t".into(), partition: 0 };
        consumer.assign(&list([(&partition, Offset::Beginning)])).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let message = loop {
            assert!(Instant::now() < deadline, "no message in time");
            if let Some(Ok(message)) = consumer.poll(Duration::from_millis(50)) {
                break owned(&message, "t".into());
            }
        };
        assert_eq!(message.headers, [("na\u{fffd}me".to_owned(), Some(Bytes::from_static(b"v")))]);
    }
}
