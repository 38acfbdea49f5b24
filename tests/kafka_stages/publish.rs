//! Captions and dead letters, and brokers that refuse them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::bench::{
    Bench, CANARY, CAPTIONS, DEAD, IN, Member, PATIENCE, Publishing, caption, comparison, eventually, failure,
    numbered, quiet,
};
use blipstream::budget::Limit;
use blipstream::disposition::{Code, Stage};
use blipstream::kafka::{Fault, NewRecord};
use blipstream::message::Message;
use blipstream::metrics::Metrics;
use blipstream::stage::Output;
use blipstream::stage::publish::Summary;
use bytesize::ByteSize;

#[tokio::test(flavor = "multi_thread")]
async fn every_message_becomes_one_acknowledged_caption_and_is_committed() {
    let bench = Bench::new(3);
    bench.write_numbers(0..200);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    for _ in 0..200 {
        let message = member.next().await;
        let output = caption(&message.value);
        publishing.send(message.map(|_| output)).await;
    }
    eventually("caught up", || member.consume.view().caught_up()).await;
    assert_eq!(publishing.end().await, Summary { published: 200, abandoned: 0 });
    member.close().await.unwrap();
    assert_eq!(bench.committed().into_iter().map(Option::unwrap_or_default).sum::<i64>(), 200);
    let texts: BTreeSet<String> = bench.read(CAPTIONS).iter().map(text).collect();
    assert_eq!(texts, (0..200).map(|number| format!("a caption of {number}")).collect());
    assert_eq!(bench.read(CAPTIONS).len(), 200);
}

/// One record was delivered, the dead letter of a caption that was too long.
fn assert_too_large(metrics: &Metrics) {
    assert_eq!((metrics.captions_so_far(), metrics.dead_letters_so_far()), (0, 1));
    let code = Code::OutputTooLarge;
    assert!(metrics.render().contains(&format!("blipstream_dead_lettered_total{{code=\"{code}\"}} 1")));
    assert!(metrics.render().contains(&format!("blipstream_failures_total{{code=\"{code}\",stage=\"publish\"}} 1")));
}

fn text(message: &Message) -> String {
    let record: serde_json::Value = serde_json::from_slice(message.payload.as_ref().unwrap()).unwrap();
    record["text"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn brokers_that_are_away_stall_the_publisher_within_its_bounds_and_lose_nothing() {
    let bench = Bench::new(1);
    bench.write_numbers(0..100);
    let limit = Limit { items: 30, bytes: 64 << 20 };
    let member = Member::start(&bench, limit, 10);
    let publishing = Publishing::start(&bench);
    bench.broker.fail(&[Fault::ProduceDisconnect]).unwrap();
    for _ in 0..5 {
        let message = member.next().await;
        let output = caption(&message.value);
        publishing.send(message.map(|_| output)).await;
    }
    eventually("the first are out", || publishing.delivered() == 5).await;
    bench.broker.down().unwrap();
    let (output, input) = (member.output.clone(), publishing.input.clone());
    let feeding = tokio::spawn(async move {
        for _ in 5..100 {
            let message = output.recv().await.unwrap();
            let caption = caption(&message.value);
            input.send(message.map(|_| caption)).await.unwrap();
        }
    });
    quiet().await;
    assert_eq!(publishing.delivered(), 5);
    assert!(member.messages.used().items <= limit.items);
    assert!(!feeding.is_finished());
    bench.broker.up().unwrap();
    tokio::time::timeout(PATIENCE, feeding).await.expect("recovery in time").unwrap();
    assert_eq!(publishing.end().await, Summary { published: 100, abandoned: 0 });
    assert_eq!(bench.read(CAPTIONS).len(), 100);
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(100)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_passes_for_written_since_a_later_one_is_written_is_sent_once_more() {
    let mut bench = Bench::new(1);
    // One record a request, and the second one answered long before the first is tried again.
    for (key, value) in [("batch.num.messages", "1"), ("retry.backoff.ms", "2000"), ("retry.backoff.max.ms", "2000")] {
        bench.kafka.options.insert(key.into(), value.into());
    }
    bench.write_numbers(0..3);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    let message = member.next().await;
    let output = failure(&message.value);
    publishing.send(message.map(|_| output)).await;
    eventually("the producer is ready", || publishing.delivered() == 1).await;
    // The first to this partition is refused while the second is under way, and the broker does not mind the gap.
    bench.broker.round_trip_time(Duration::from_millis(500)).unwrap();
    bench.broker.fail(&[Fault::ProduceTooFewCopies]).unwrap();
    for message in member.take(2).await {
        let output = caption(&message.value);
        publishing.send(message.map(|_| output)).await;
    }
    let metrics = publishing.metrics.clone();
    assert_eq!(publishing.end().await, Summary { published: 3, abandoned: 0 });
    bench.broker.round_trip_time(Duration::ZERO).unwrap();
    assert!(metrics.render().contains("blipstream_publish_unconfirmed_total 1"), "{}", metrics.render());
    assert!(metrics.render().contains("blipstream_publish_refusals_total 0"));
    let texts: BTreeSet<String> = bench.read(CAPTIONS).iter().map(text).collect();
    assert_eq!(texts, ["a caption of 1", "a caption of 2"].map(str::to_owned).into());
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(3)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_is_counted_once_and_also_while_its_dead_letter_cannot_be_written() {
    let bench = Bench::new(1);
    bench.write_numbers(0..1);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    let message = member.next().await;
    bench.broker.down().unwrap();
    let output = failure(&message.value);
    publishing.send(message.map(|_| output)).await;
    let metrics = publishing.metrics.clone();
    let counted = "blipstream_failures_total{code=\"bad_message\",stage=\"parse\"} 1";
    eventually("it is counted", || metrics.render().contains(counted)).await;
    assert_eq!(metrics.dead_letters_so_far(), 0);
    bench.broker.up().unwrap();
    assert_eq!(publishing.end().await.published, 1);
    assert_eq!(metrics.dead_letters_so_far(), 1);
    assert!(metrics.render().contains(counted), "{}", metrics.render());
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_deadline_what_is_not_acknowledged_is_given_up_and_not_reported_as_lost() {
    let bench = Bench::new(1);
    bench.write_numbers(0..10);
    let member = bench.member();
    let taken = member.take(10).await;
    let publishing = Publishing::start(&bench);
    bench.broker.down().unwrap();
    for message in taken {
        let output = caption(&message.value);
        publishing.send(message.map(|_| output)).await;
    }
    publishing.give_up.cancel();
    assert_eq!(publishing.end().await, Summary { published: 0, abandoned: 10 });
    assert_eq!(member.ledger.take_lost(), None);
    assert_eq!(member.messages.used(), Limit::default());
    bench.broker.up().unwrap();
    member.close().await.unwrap();
    assert_eq!(bench.committed().into_iter().map(Option::unwrap_or_default).sum::<i64>(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_headers_pass_through() {
    let bench = Bench::new(1);
    let headers = vec![
        ("traceparent".to_owned(), Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into())),
        ("twice".to_owned(), Some("a".into())),
        ("twice".to_owned(), Some("b".into())),
        ("null".to_owned(), None),
        ("empty".to_owned(), Some("".into())),
    ];
    let record = NewRecord { key: Some(b"k\0\xff".into()), value: Some(b"7".into()), headers: headers.clone() };
    bench.write(IN, [record.clone(), NewRecord { key: None, ..record }]);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    for _ in 0..2 {
        let message = member.next().await;
        let output = caption(&message.value);
        publishing.send(message.map(|_| output)).await;
    }
    assert_eq!(publishing.end().await.published, 2);
    member.close().await.unwrap();
    let captions = bench.read(CAPTIONS);
    for (offset, caption) in captions.iter().enumerate() {
        let mut expected = headers.clone();
        expected.push(("blipstream-origin".into(), Some(format!("in/0/{offset}").into())));
        assert_eq!(caption.headers, expected);
    }
    let keys: Vec<_> = captions.iter().map(|caption| caption.key.as_deref()).collect();
    assert_eq!(keys, [Some(&b"k\0\xff"[..]), None]);
}

#[tokio::test(flavor = "multi_thread")]
async fn records_go_to_the_partition_that_java_clients_choose() {
    const PARTITIONS: i32 = 97;
    // murmur2 as Apache Kafka's Java client computes it; the vectors are those of librdkafka's unit tests.
    let hashes: [(&str, u32); 8] = [
        ("kafka", 0xd067_cf64),
        ("giberish123456789", 0x8f55_2b0c),
        ("1234", 0x9fc9_7b14),
        ("234", 0xe7c0_09ca),
        ("34", 0x8739_30da),
        ("4", 0x5a4b_5ca1),
        ("PreAmbleWillBeRemoved,ThePrePartThatIs", 0x7842_4f1c),
        ("reAmbleWillBeRemoved,ThePrePartThatIs", 0x4a62_b377),
    ];
    let bench = Bench::new(PARTITIONS);
    bench.write(IN, hashes.map(|(key, _)| NewRecord { key: Some(key.into()), ..numbered(1) }));
    let found: BTreeMap<String, i32> = bench
        .read(IN)
        .iter()
        .map(|message| (String::from_utf8_lossy(message.key.as_ref().unwrap()).into_owned(), message.partition))
        .collect();
    let expected = hashes.map(|(key, hash)| (key.to_owned(), ((hash & 0x7fff_ffff) % PARTITIONS as u32) as i32));
    assert_eq!(found, expected.into());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caption_that_its_topic_refuses_as_too_long_becomes_a_dead_letter() {
    let bench = Bench::new(1);
    bench.write_numbers(0..1);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    // In its batch, and once more alone.
    bench.broker.fail(&[Fault::ProduceTooLarge, Fault::ProduceTooLarge]).unwrap();
    let message = member.next().await;
    let output = caption(&message.value);
    publishing.send(message.map(|_| output)).await;
    let metrics = publishing.metrics.clone();
    assert_eq!(publishing.end().await.published, 1);
    assert_too_large(&metrics);
    assert!(bench.read(CAPTIONS).is_empty());
    assert_eq!(bench.read(DEAD)[0].key.as_deref(), Some(&b"0"[..]));
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_batch_blames_no_record_that_the_topic_takes_alone() {
    let bench = Bench::new(1);
    bench.write_numbers(0..20);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    let taken = member.take(20).await;
    bench.broker.fail(&[Fault::ProduceTooLarge]).unwrap();
    for message in taken {
        let output = caption(&message.value);
        publishing.send(message.map(|_| output)).await;
    }
    let metrics = publishing.metrics.clone();
    assert_eq!(publishing.end().await.published, 20);
    assert_eq!((metrics.captions_so_far(), metrics.dead_letters_so_far()), (20, 0));
    assert_eq!(bench.read(CAPTIONS).len(), 20);
    assert!(bench.read(DEAD).is_empty());
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caption_over_the_configured_size_becomes_a_dead_letter() {
    let mut bench = Bench::new(1);
    bench.kafka.max_message_size = ByteSize::kib(10);
    bench.write_numbers(0..1);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    let message = member.next().await;
    let Output::Caption { mut record, message: source, device, rejected } = caption(&message.value) else {
        panic!("not a caption")
    };
    record.text = "long ".repeat(50_000);
    publishing.send(message.map(|_| Output::Caption { record, message: source, device, rejected })).await;
    let metrics = publishing.metrics.clone();
    assert_eq!(publishing.end().await.published, 1);
    assert_too_large(&metrics);
    assert_eq!(bench.read(DEAD).len(), 1);
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_comparison_over_the_configured_size_is_shortened_and_its_caption_is_published() {
    let mut bench = Bench::new(1);
    bench.kafka.max_message_size = ByteSize::kib(10);
    bench.write_numbers(0..2);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    for id in ["short".to_owned(), "long ".repeat(50_000)] {
        let message = member.next().await;
        let outputs = (caption(&message.value), comparison(&message.value, &id));
        let (first, second) = message.fork(outputs.1);
        publishing.send(first.map(|_| outputs.0)).await;
        publishing.send(second).await;
    }
    let metrics = publishing.metrics.clone();
    assert_eq!(publishing.end().await.published, 4);
    assert_eq!((metrics.captions_so_far(), metrics.dead_letters_so_far()), (2, 0));
    let mut records: Vec<(serde_json::Value, bool)> = bench
        .read(CANARY)
        .iter()
        .map(|m| (serde_json::from_slice(m.payload.as_ref().unwrap()).unwrap(), m.key.is_some()))
        .collect();
    records.sort_by_key(|(record, _)| record["origin"]["offset"].as_i64());
    let said: Vec<_> =
        records.iter().map(|(record, key)| (record["id"].as_str().unwrap(), &record["shortened"], *key)).collect();
    assert_eq!(said, [("short", &serde_json::Value::Null, true), ("in/0/1", &true.into(), false)]);
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_that_its_topic_refuses_as_too_long_is_sent_as_a_pointer() {
    let bench = Bench::new(1);
    bench.write_numbers(0..1);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    bench.broker.fail(&[Fault::ProduceTooLarge, Fault::ProduceTooLarge]).unwrap();
    let message = member.next().await;
    let output = failure(&message.value);
    publishing.send(message.map(|_| output)).await;
    assert_eq!(publishing.end().await.published, 1);
    assert_eq!(bench.read(DEAD)[0].key.as_deref(), Some(&b"0"[..]));
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_a_person_must_remove_stalls_and_drops_nothing() {
    let bench = Bench::new(1);
    bench.write_numbers(0..3);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    bench.broker.fail(&[Fault::ProduceNotAuthorised]).unwrap();
    for message in member.take(3).await {
        let output = caption(&message.value);
        publishing.send(message.map(|_| output)).await;
    }
    let metrics = publishing.metrics.clone();
    assert_eq!(publishing.end().await.published, 3);
    assert!(!metrics.render().contains("blipstream_publish_refusals_total 0"));
    let blocked = metrics.blocked_so_far(Stage::Publish);
    assert!(blocked >= Duration::from_millis(250), "the stage waits for half a base of the back-off: {blocked:?}");
    assert_eq!((metrics.captions_so_far(), metrics.dead_letters_so_far()), (3, 0));
    assert_eq!(bench.read(CAPTIONS).len(), 3);
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(3)]);
}
