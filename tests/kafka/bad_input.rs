//! Brokers and topics that are not as a worker needs them: each is told by the name of its setting, at the start where it
//! can be known then.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use blipstream::caption::fake::FakeOptions;
use blipstream::kafka::{NewRecord, check_access};
use blipstream::settings::{Delivery, Kafka, RetryTopic, Settings};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::mocking::MockCluster;
use rdkafka::types::RDKafkaApiKey;
use serde_json::json;

use crate::security::run;
use crate::support::client::{PATIENCE, eventually};
use crate::support::flow::{Answers, CAPTIONS, DEAD_LETTERS, Flow, REQUESTS, request, settings};
use crate::support::kafka::{Cluster, Options};
use crate::support::promises::{assert_no_duplicate, inline};

/// Runs the check and a worker, which end with an error that has all of these words.
fn assert_refused(settings: &Settings, words: &[&str]) {
    for command in ["check", "worker"] {
        let (code, said) = run(command, settings);
        assert_eq!(code, Some(1), "{command}: {said}");
        for word in words {
            assert!(said.contains(word), "{command} does not say {word}: {said}");
        }
    }
}

/// Puts a topic where a setting names one.
type Change = fn(&mut Kafka, String);

#[tokio::test(flavor = "multi_thread")]
async fn every_topic_that_does_not_exist_is_told_by_its_setting() {
    let Some(flow) = Flow::on_kafka(1).await else { return };
    let kafka = || flow.settings.kafka.clone();
    check_access(&kafka(), PATIENCE).unwrap().granted().unwrap();
    let missing = || "missing".to_owned();
    let cases: [(&str, Change); 6] = [
        ("kafka.inputs", |kafka, topic| kafka.inputs[0].topic = topic),
        ("kafka.captions_topic", |kafka, topic| kafka.captions_topic = topic),
        ("kafka.filtered_topic", |kafka, topic| kafka.filtered_topic = Some(topic)),
        ("kafka.canary_topic", |kafka, topic| kafka.canary_topic = Some(topic)),
        ("kafka.dead_letter_topic", |kafka, topic| kafka.dead_letter_topic = topic),
        ("kafka.retry_topics", |kafka, topic| {
            kafka.retry_topics = vec![RetryTopic { topic, delay: Duration::from_secs(1) }];
        }),
    ];
    for (setting, change) in cases {
        let mut kafka = kafka();
        change(&mut kafka, missing());
        let error = check_access(&kafka, PATIENCE).unwrap().granted().unwrap_err().to_string();
        assert_eq!(error, format!("the topic `missing` does not exist; create it, or change {setting}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_gets_no_partition_says_so_and_the_check_foresees_it() {
    let Some(mut flow) = Flow::on_kafka(1).await else { return };
    flow.settings.kafka.revoke_drain = Duration::from_millis(250);
    let foreseen = format!("the group {} (kafka.group_id) has 1 workers", flow.settings.kafka.group_id);
    let (code, said) = run("check", &flow.settings);
    assert!(code == Some(0) && !said.contains("stays idle"), "{said}");
    let first = flow.worker(FakeOptions::default());
    eventually("the first works", || first.control.readiness().ready).await;
    let (code, said) = run("check", &flow.settings);
    assert!(code == Some(0) && said.contains(&foreseen) && said.contains("kafka.inputs"), "{said}");
    let second = flow.process();
    let told = || second.log().iter().any(|line| line.to_string().contains("this worker has nothing to do"));
    eventually("the second has nothing to do", told).await;
    // Nothing is wrong with it: it takes over.
    assert!(first.stop().await.clean());
    flow.write([NewRecord {
        value: Some(json!({"id": 1, "image": inline(1)}).to_string().into()),
        ..Default::default()
    }]);
    flow.until_answered(1);
    assert_eq!(second.terminate(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_time_out_over_the_brokers_limit_is_told_at_the_start() {
    let limit = ("transaction.max.timeout.ms".to_owned(), "2000".to_owned());
    let Some(cluster) = Cluster::start(&Options { properties: vec![limit], ..Options::default() }) else { return };
    let topics = [REQUESTS, CAPTIONS, DEAD_LETTERS];
    cluster.create_topics(&topics, 1).await;
    let mut settings = settings(cluster.bootstrap().to_owned(), "fleet".into(), topics.map(str::to_owned));
    settings.kafka.delivery = Delivery::ExactlyOnce;
    assert_refused(&settings, &["kafka.transaction_timeout (15s)", "transaction.max.timeout.ms"]);
    settings.kafka.transaction_timeout = Duration::from_secs(2);
    let (code, said) = run("check", &settings);
    assert!(code == Some(0) && said.contains("the brokers permit it"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn brokers_without_transactions_are_told_at_the_start() {
    // librdkafka's broker, made to say that it is of a time before transactions (KIP-98).
    let brokers = MockCluster::new(1).unwrap();
    let topics = [REQUESTS, CAPTIONS, DEAD_LETTERS];
    for topic in topics {
        brokers.create_topic(topic, 1, 1).unwrap();
    }
    for key in [RDKafkaApiKey::InitProducerId, RDKafkaApiKey::AddPartitionsToTxn, RDKafkaApiKey::EndTxn] {
        brokers.apiversion(key, None, None).unwrap();
    }
    let mut settings = settings(brokers.bootstrap_servers(), "fleet".into(), topics.map(str::to_owned));
    settings.kafka.delivery = Delivery::ExactlyOnce;
    assert_refused(&settings, &["kafka.delivery", "brokers with transactions", "at_least_once"]);
}

/// A topic of captions that takes no more than this many bytes at once.
const LIMIT: &str = "2000";

/// Requests whose captions are too long are dead letters; all others have their captions, once each.
async fn assert_only_what_is_too_long_fails(delivery: Delivery) {
    const COUNT: usize = 120;
    let Some(flow) = Flow::on_kafka(2).await else { return };
    let mut flow = flow.delivering(delivery);
    // The topics judge what is compressed.
    flow.settings.kafka.compression = blipstream::settings::Compression::None;
    let kafka = &flow.settings.kafka;
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", &kafka.bootstrap_servers).create().unwrap();
    let limit = AlterConfig::new(ResourceSpecifier::Topic(&kafka.captions_topic)).set("max.message.bytes", LIMIT);
    for altered in admin.alter_configs(&[limit], &AdminOptions::new()).await.unwrap() {
        altered.unwrap();
    }
    let is_long = |n: usize| n % 40 == 10;
    flow.write((0..COUNT).map(|n| {
        let note = if is_long(n) { "x".repeat(3000) } else { String::new() };
        let value = json!({"id": n.to_string(), "image": inline(n), "meta": {"note": note}}).to_string();
        NewRecord { key: Some(n.to_string().into()), value: Some(value.into()), ..NewRecord::default() }
    }));
    let worker = flow.worker(FakeOptions::default());
    flow.until_answered(COUNT);
    eventually("all is committed", || flow.committed().into_iter().flatten().sum::<i64>() == COUNT as i64).await;
    assert!(worker.stop().await.clean());

    let answers = Answers::read(&flow);
    assert_eq!(answers.count(), COUNT);
    assert_no_duplicate(&answers);
    let mut captioned: Vec<usize> = answers.captioned_ids().into_iter().map(|id| id.parse().unwrap()).collect();
    captioned.sort_unstable();
    assert_eq!(captioned, (0..COUNT).filter(|n| !is_long(*n)).collect::<Vec<_>>());
    let topic = &flow.settings.kafka.captions_topic;
    for letter in answers.dead_letters.values().flatten() {
        assert_eq!(letter.header("blipstream-error-code"), Some("output_too_large"));
        let why = letter.header("blipstream-error-message").unwrap();
        assert!(why.contains(topic.as_str()), "{why}");
        let request: serde_json::Value = serde_json::from_slice(letter.payload.as_deref().unwrap()).unwrap();
        assert_eq!(request["meta"]["note"].as_str().map(str::len), Some(3000), "the request is kept whole");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caption_that_its_topic_does_not_take_is_a_dead_letter_and_all_others_are_published_once() {
    assert_only_what_is_too_long_fails(Delivery::AtLeastOnce).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caption_that_its_topic_does_not_take_costs_nothing_else_of_its_transaction() {
    assert_only_what_is_too_long_fails(Delivery::ExactlyOnce).await;
}

/// Length of what stands before the records of a batch on disk, in bytes.
const BATCH_HEADER: usize = 61;

/// Overwrites the records of the batch with this number in a file of a log; returns where, and what was there.
fn damage(log: &Path, batch: usize) -> (u64, Vec<u8>) {
    let bytes = std::fs::read(log).unwrap();
    // Offset and length stand at its beginning, and are not counted in the length.
    let end = |at: usize| at + 12 + u32::from_be_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
    let at = (0..batch).fold(0, |at, _| end(at));
    let records = &bytes[at + BATCH_HEADER..end(at)];
    let place = (at + BATCH_HEADER) as u64;
    write_at(log, place, &vec![0xff; records.len()]);
    (place, records.to_vec())
}

fn write_at(log: &Path, place: u64, bytes: &[u8]) {
    std::fs::OpenOptions::new().write(true).open(log).unwrap().write_all_at(bytes, place).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_damaged_on_disk_stops_the_worker_before_it_and_is_read_when_it_is_mended() {
    let Some(cluster) = Cluster::start(&Options::default()) else { return };
    // librdkafka looks at sums only if it is told to; what cannot be unpacked shows without.
    for (check_sums, word) in [("false", "Decompression"), ("true", "CRC32C")] {
        let mut flow = Flow::on(cluster.bootstrap(), 1).await;
        let (log, place) = (cluster.segment(flow.requests(), 0), format!("{}/0", flow.requests()));
        flow.settings.kafka.options.insert("check.crcs".into(), check_sums.into());
        for n in 0..3 {
            flow.write([request(n, inline(n))]);
        }
        let (at, records) = damage(&log, 1);
        let worker = flow.worker(FakeOptions::default());
        let ended = tokio::time::timeout(PATIENCE, worker.task).await.expect("it ends by itself").unwrap();
        let error = format!("{:#}", ended.expect_err("it says why"));
        for said in [word, &format!("It is of {place}."), "docs/runbook.md"] {
            assert!(error.contains(said), "it does not say {said}: {error}");
        }
        assert_eq!(flow.committed(), [Some(1)]);
        assert_eq!(Answers::read(&flow).captioned_ids().len(), 1);
        write_at(&log, at, &records);
        let next = flow.worker(FakeOptions::default());
        assert_eq!(flow.until_answered(3).captioned_ids().len(), 3);
        assert!(next.stop().await.clean());
    }
}
