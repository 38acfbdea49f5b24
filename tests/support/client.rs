//! What every test with a broker needs: settings for haste, patience, all records of a topic.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use blipstream::kafka::{EMBEDDED_PARTITION_BYTES, From, ReadLimits, read_records};
use blipstream::message::Message;
use blipstream::settings::{self, Input};

/// No test waits longer than this for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The topics of a test: requests, captions, dead letters.
pub type Topics = [String; 3];

/// Settings under which a member of the group waits for nothing longer than it must.
pub fn hasty(servers: String, group: String, [requests, captions, dead_letters]: Topics) -> settings::Kafka {
    let options = [
        ("heartbeat.interval.ms", "100"),
        ("fetch.wait.max.ms", "10"),
        ("fetch.error.backoff.ms", "10"),
        ("reconnect.backoff.ms", "10"),
        ("reconnect.backoff.max.ms", "100"),
        ("retry.backoff.ms", "10"),
        ("retry.backoff.max.ms", "100"),
    ];
    settings::Kafka {
        bootstrap_servers: servers,
        group_id: group,
        inputs: vec![Input { topic: requests, weight: 1 }],
        captions_topic: captions,
        dead_letter_topic: dead_letters,
        // Most tests want the end of a failure, not its tries.
        retry_topics: Vec::new(),
        session_timeout: Duration::from_secs(6),
        commit_interval: Duration::from_millis(20),
        linger: Duration::from_millis(1),
        options: options.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        ..settings::Kafka::default()
    }
}

/// Every record of a topic that is there now.
pub fn read_all(kafka: &settings::Kafka, topic: &str) -> Vec<Message> {
    let mut messages = Vec::new();
    let limits = ReadLimits { from: From::Beginning, timeout: PATIENCE, stop_at_end: true };
    read_records(kafka, topic, limits, |message| {
        messages.push(message);
        true
    })
    .unwrap();
    messages
}

/// The embedded broker loses the head of a long partition without a word: a test that comes near to it proves nothing.
pub fn assert_nothing_was_trimmed(topic: &str, messages: &[Message]) {
    let mut partitions: BTreeMap<i32, (i64, usize)> = BTreeMap::new();
    for message in messages {
        let (first, bytes) = partitions.entry(message.partition).or_insert((message.offset, 0));
        *first = (*first).min(message.offset);
        // The one message of megabytes repeats a few bytes, and is stored compressed.
        *bytes += if message.size() > 1 << 20 { 0 } else { message.size() };
    }
    for (partition, (first, bytes)) in partitions {
        assert_eq!(first, 0, "{topic}/{partition} has lost its head");
        assert!(bytes < EMBEDDED_PARTITION_BYTES, "{topic}/{partition} has {bytes} bytes, too near to what is trimmed");
    }
}

/// Waits until something holds.
pub async fn eventually(what: &str, holds: impl FnMut() -> bool) {
    within(PATIENCE, what, holds).await;
}

/// Waits so long until something holds.
pub async fn within(patience: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
