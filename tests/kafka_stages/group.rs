//! Commits, rebalances, the beginning and the end of a membership.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::bench::{Bench, IN, Member, PATIENCE, SHORT_SESSION, eventually, number, quiet};
use blipstream::kafka::{Error, Fault, TopicCheck, check_topics};
use blipstream::offsets::Outcome;
use blipstream::settings;
use blipstream::stage::consume::CLOSE;

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_never_passes_an_unresolved_message() {
    let bench = Bench::new(1);
    bench.write_numbers(0..10);
    let member = bench.member();
    let mut taken = member.take(10).await;
    let third = taken.remove(3);
    // Newest first: completion is out of order.
    for message in taken.into_iter().rev() {
        message.resolve(Outcome::Published);
    }
    eventually("three are committed", || bench.committed() == [Some(3)]).await;
    quiet().await;
    assert_eq!(bench.committed(), [Some(3)]);
    third.resolve(Outcome::Published);
    eventually("all are committed", || bench.committed() == [Some(10)]).await;
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_resolved_is_delivered_again_to_the_next_worker() {
    let mut bench = Bench::new(1);
    bench.kafka.session_timeout = SHORT_SESSION;
    bench.write_numbers(0..10);
    let member = bench.member();
    let mut taken = member.take(10).await;
    let rest = taken.split_off(4);
    for message in taken {
        message.resolve(Outcome::Published);
    }
    member.close().await.unwrap();
    for message in rest {
        // The deadline of the drain has passed.
        message.abandon();
    }
    assert_eq!(bench.committed(), [Some(4)]);
    let next = bench.member();
    let numbers: Vec<usize> = next.take(6).await.into_iter().map(|m| number(&m.resolve(Outcome::Published))).collect();
    assert_eq!(numbers, (4..10).collect::<Vec<_>>());
    next.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(10)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_drain_close_commits_everything_that_was_taken() {
    let bench = Bench::new(2);
    bench.write_numbers(0..50);
    let member = bench.member();
    let first = member.take(50).await;
    member.consume.stop();
    eventually("the channel is closed", || member.output.is_closed()).await;
    bench.write_numbers(50..60);
    quiet().await;
    assert!(member.output.is_empty());
    assert_eq!(member.consume.view().status().partitions.len(), 2, "still a member while draining");
    for message in first {
        message.resolve(Outcome::Published);
    }
    member.close().await.unwrap();
    assert_eq!(bench.committed().into_iter().map(Option::unwrap_or_default).sum::<i64>(), 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_joins_and_leaves_loses_and_repeats_nothing() {
    let mut bench = Bench::new(4);
    bench.kafka.session_timeout = SHORT_SESSION;
    let seen: Arc<Mutex<BTreeMap<usize, usize>>> = Arc::default();
    let echo = |member: &Member| {
        let (output, seen) = (member.output.clone(), seen.clone());
        tokio::spawn(async move {
            while let Ok(message) = output.recv().await {
                // Rows take their time, so that some are open whenever partitions move.
                tokio::time::sleep(Duration::from_millis(1)).await;
                *seen.lock().unwrap().entry(number(&message.value)).or_default() += 1;
                message.resolve(Outcome::Published);
            }
        })
    };
    let first = bench.member();
    let first_echo = echo(&first);
    bench.write_numbers(0..200);
    eventually("the first works", || seen.lock().unwrap().len() > 20).await;
    let second = bench.member();
    let second_echo = echo(&second);
    bench.write_numbers(200..400);
    let shares = || {
        let count = |member: &Member| member.consume.view().status().partitions.len();
        (count(&first), count(&second))
    };
    eventually("they share", || shares() == (2, 2)).await;
    bench.write_numbers(400..600);
    eventually("both work", || seen.lock().unwrap().len() > 420).await;
    // Stop, drain, close: the echo ends when the channel is closed and empty.
    second.consume.stop();
    second_echo.await.unwrap();
    second.close().await.unwrap();
    bench.write_numbers(600..700);
    eventually("the first has all partitions", || first.consume.view().status().partitions.len() == 4).await;
    eventually("all is done", || seen.lock().unwrap().len() == 700 && first.consume.view().caught_up()).await;
    first.close().await.unwrap();
    first_echo.await.unwrap();
    let repeated: Vec<_> = seen.lock().unwrap().iter().filter(|(_, times)| **times > 1).map(|(n, _)| *n).collect();
    assert_eq!(repeated, Vec::<usize>::new());
    assert_eq!(bench.committed().into_iter().map(Option::unwrap_or_default).sum::<i64>(), 700);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_message_is_named_and_never_committed() {
    let bench = Bench::new(1);
    bench.write_numbers(0..5);
    let member = bench.member();
    for (at, message) in member.take(5).await.into_iter().enumerate() {
        if at == 2 { drop(message) } else { drop(message.resolve(Outcome::Published)) }
    }
    let lost = member.ledger.take_lost().unwrap();
    assert_eq!((lost.partition.to_string().as_str(), lost.offset), ("in/0", 2));
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_commit_is_tried_again() {
    let bench = Bench::new(1);
    bench.write_numbers(0..5);
    let member = bench.member();
    let taken = member.take(5).await;
    bench.broker.fail(&[Fault::CommitRebalancing]).unwrap();
    for message in taken {
        message.resolve(Outcome::Published);
    }
    eventually("committed", || bench.committed() == [Some(5)]).await;
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_ends_in_bounded_time_while_the_brokers_are_away() {
    let mut bench = Bench::new(1);
    // Far longer than the end may take, so that the partition does not count as lost before the commit is given up.
    bench.kafka.session_timeout = Duration::from_secs(45);
    bench.kafka.commit_interval = Duration::from_secs(60);
    bench.write_numbers(0..3);
    let member = bench.member();
    let taken = member.take(3).await;
    bench.broker.down().unwrap();
    for message in taken {
        message.resolve(Outcome::Published);
    }
    member.consume.stop();
    let began = Instant::now();
    let closed = member.consume.close().await;
    assert!(began.elapsed() < CLOSE + Duration::from_secs(1), "{:?}", began.elapsed());
    assert!(closed.unwrap_err().to_string().starts_with("committing offsets: "));
    bench.broker.up().unwrap();
    // That the first message was begun, or all that was resolved: a commit that was under way may still arrive, if the
    // client is back before the question is.
    let committed = bench.committed();
    assert!(matches!(committed[..], [Some(0 | 3)]), "{committed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_under_way_when_partitions_were_lost_counts_only_when_it_comes_again() {
    let mut bench = Bench::new(1);
    bench.kafka.session_timeout = SHORT_SESSION;
    bench.write_numbers(0..5);
    let member = bench.member();
    let before = member.take(5).await;
    eventually("the status is young", || member.consume.view().status().partitions.len() == 1).await;
    bench.broker.down().unwrap();
    let gone = || member.consume.view().status().partitions.is_empty();
    eventually("the partition is lost", gone).await;
    for message in before {
        message.resolve(Outcome::Published);
    }
    bench.broker.up().unwrap();
    let after = member.take(5).await;
    quiet().await;
    assert_eq!(bench.committed()[0].unwrap_or_default(), 0);
    for message in after {
        message.resolve(Outcome::Published);
    }
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(5)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_without_offsets_begins_at_the_beginning() {
    let bench = Bench::new(1);
    bench.write_numbers(0..3);
    let member = bench.member();
    assert_eq!(number(&member.next().await.resolve(Outcome::Published)), 0);
    for message in member.take(2).await {
        message.resolve(Outcome::Published);
    }
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offset_out_of_range_stops_the_worker_with_its_place() {
    let mut bench = Bench::new(1);
    bench.kafka.session_timeout = SHORT_SESSION;
    bench.write_numbers(0..3);
    bench.commit([(IN, 0, 1000.into())]);
    let mut member = bench.member();
    let error = tokio::time::timeout(PATIENCE, member.consume.failed()).await.expect("a failure in time");
    assert!(matches!(error, Error::OffsetOutOfRange { offset: 1000, low: 0, high: 3, .. }), "{error}");
    assert!(error.to_string().contains("in/0"), "{error}");
    assert_eq!(member.close().await, Err(error));
    assert_eq!(bench.committed(), [Some(1000)]);
}

#[test]
fn a_check_finds_topics_and_names_what_is_missing() {
    let bench = Bench::new(3);
    let brokers = check_topics(&bench.kafka, &TopicCheck::of(&bench.kafka), PATIENCE).unwrap();
    let partitions: Vec<usize> = brokers.topics.iter().map(|topic| topic.partitions).collect();
    assert_eq!(partitions, [3, 1, 1, 1]);
    assert_eq!(brokers.addresses.len(), 1);
    let missing = TopicCheck { topic: "missing".into(), setting: "kafka.inputs" };
    let error = check_topics(&bench.kafka, &[missing], PATIENCE).unwrap_err();
    assert!(matches!(error, Error::UnknownTopic { .. }), "{error}");
    assert!(error.to_string().contains("kafka.inputs"), "{error}");
    let away = settings::Kafka { bootstrap_servers: "127.0.0.1:1".into(), ..bench.kafka };
    let error = check_topics(&away, &TopicCheck::of(&away), Duration::from_secs(1)).unwrap_err();
    assert!(error.to_string().contains("kafka.bootstrap_servers"), "{error}");
}
