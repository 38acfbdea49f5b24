//! At least once: nothing is lost, whoever dies or leaves, and what belongs to a request comes back with it.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blipstream::caption::fake::FakeOptions;
use blipstream::kafka::NewRecord;
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use serde_json::{Value, json};

use crate::support::client::eventually;
use crate::support::flow::{Flow, request, settings};
use crate::support::images::{Answer, ImageServer, png};
use crate::support::kafka::{Cluster, Options};
use crate::support::promises::{
    assert_a_kill_loses_nothing, assert_a_worker_that_leaves_leaves_no_duplicate, assert_all_captioned, inline,
};

#[tokio::test(flavor = "multi_thread")]
async fn every_healthy_request_ends_as_a_caption_and_every_bad_one_as_a_dead_letter() {
    let Some(flow) = Flow::on_kafka(6).await else { return };
    let images = ImageServer::start().await;
    let images = images.with("/good.png", Answer::Body(png(30, 20, 5))).with("/missing", Answer::status(404));
    let bad = |n: usize, image: String, code: &'static str| (request(n, image), Err(code));
    let cases: Vec<(NewRecord, Result<(), &str>)> = (0..240)
        .map(|n| match n % 12 {
            0 => bad(n, images.url("/missing").to_string(), "not_found"),
            1 => bad(n, "ftp://example.com/a.jpg".into(), "bad_reference"),
            2 => bad(n, "http://10.1.2.3/a.jpg".into(), "blocked_address"),
            3 => bad(n, STANDARD.encode("this is no image at all, though it is long enough"), "unsupported_media"),
            4 => {
                let value = Some(b"{".to_vec());
                (NewRecord { value, ..request(n, "") }, Err("bad_message"))
            }
            5 => (request(n, images.url("/good.png")), Ok(())),
            _ => (request(n, inline(n)), Ok(())),
        })
        .collect();
    flow.write(cases.iter().map(|(record, _)| record.clone()));
    let worker = flow.worker(FakeOptions::default());
    let answers = flow.until_answered(cases.len());
    eventually("all is committed", || flow.committed().into_iter().flatten().sum::<i64>() == 240).await;
    assert!(worker.stop().await.clean());

    assert_eq!(answers.count(), cases.len(), "nothing comes twice where nothing fails");
    let captioned = answers.captioned_ids();
    let letters = answers.dead_letters.values().flatten();
    let letters: Vec<_> = letters.map(|m| (m.key.as_deref().unwrap(), m.header("blipstream-error-code"))).collect();
    for (n, (record, outcome)) in cases.iter().enumerate() {
        let key = record.key.as_deref().unwrap();
        match outcome {
            Ok(()) => assert!(captioned.contains(n.to_string().as_str()), "{n} has no caption"),
            Err(code) => assert!(letters.contains(&(key, Some(*code))), "{n} has no dead letter {code}: {letters:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_in_the_middle_and_restarted_loses_nothing() {
    const COUNT: usize = 600;
    let Some(mut flow) = Flow::on_kafka(3).await else { return };
    flow.settings.flow.max_span = 50;
    let second = assert_a_kill_loses_nothing(&flow, 3, COUNT).await;
    assert_eq!(second.terminate(), Some(0));
    assert_eq!(flow.committed().into_iter().flatten().sum::<i64>(), COUNT as i64);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_share_the_partitions_and_one_leaves() {
    let Some(flow) = Flow::on_kafka(4).await else { return };
    assert_a_worker_that_leaves_leaves_no_duplicate(&flow, 2000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_starts_before_its_brokers_waits_for_them() {
    let Some(cluster) = Cluster::start(&Options::default()) else { return };
    let topics = ["requests", "captions", "dlq"];
    cluster.create_topics(&topics, 1).await;
    let settings = settings(cluster.bootstrap().to_owned(), "fleet".into(), topics.map(str::to_owned));
    let flow = Flow { broker: None, settings };
    cluster.kill(1);
    let worker = flow.process();
    tokio::time::sleep(Duration::from_secs(2)).await;
    cluster.restart(1);
    flow.write((0..10).map(|n| request(n, inline(n))));
    assert_all_captioned(&flow.until_answered(10), 10);
    assert_eq!(worker.terminate(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_headers_timestamps_and_traceparent_pass_through() {
    const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let Some(flow) = Flow::on_kafka(3).await else { return };
    let producer: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", &flow.settings.kafka.bootstrap_servers).create().unwrap();
    let headers = || {
        let text = |key, value| Header { key, value: Some(value) };
        let headers = OwnedHeaders::new().insert(text("traceparent", TRACE)).insert(text("twice", "1"));
        headers.insert(text("twice", "2")).insert(Header::<&[u8]> { key: "none", value: None })
    };
    // A key that is no text; a time that has passed, and one that is to come.
    let begun = jiff::Timestamp::now().as_millisecond();
    let (past, future) = (begun - 3_600_123, begun + 1_800_000);
    for (id, image, time) in
        [("good", inline(1), past), ("bad", "ftp://a/b".into(), past), ("early", inline(2), future)]
    {
        let value = json!({"id": id, "image": image}).to_string();
        let record = BaseRecord::to(flow.requests()).payload(&value).key(&[0xFF_u8, 0, 7][..]).headers(headers());
        producer.send(record.timestamp(time)).unwrap();
    }
    producer.flush(Duration::from_secs(20)).unwrap();
    let worker = flow.worker(FakeOptions::default());
    flow.until_answered(3);
    assert!(worker.stop().await.clean());

    let captions = flow.read(&flow.settings.kafka.captions_topic);
    let letters = flow.read(&flow.settings.kafka.dead_letter_topic);
    assert_eq!((captions.len(), letters.len()), (2, 1));
    for message in captions.iter().chain(&letters) {
        assert_eq!(message.key.as_deref(), Some(&[0xFF, 0, 7][..]));
        // One key, one partition, and the one that Java clients choose.
        assert_eq!(message.partition, captions[0].partition);
        let theirs = message.headers.iter().filter(|(name, _)| !name.starts_with("blipstream-"));
        let theirs: Vec<_> = theirs.map(|(name, value)| (name.as_str(), value.as_deref())).collect();
        let expected =
            [("traceparent", Some(TRACE.as_bytes())), ("twice", Some(b"1")), ("twice", Some(b"2")), ("none", None)];
        assert_eq!(theirs, expected);
    }
    for message in &captions {
        let record: Value = serde_json::from_slice(message.payload.as_deref().unwrap()).unwrap();
        let time = message.timestamp_ms.unwrap();
        match record["id"].as_str() {
            Some("good") => assert_eq!(time, past),
            // A time to come is not passed on.
            _ => assert!((begun..future).contains(&time), "{time}"),
        }
    }
    // Topics delete by age: a dead letter is as old as itself.
    assert!((begun..future).contains(&letters[0].timestamp_ms.unwrap()));
}
