//! Taking messages: room, pauses, spans, ends.

use std::time::Duration;

use crate::bench::{Bench, IN, Member, eventually, number, numbered, quiet};
use blipstream::budget::Limit;
use blipstream::gate::Reason;
use blipstream::kafka::NewRecord;
use blipstream::offsets::Outcome;
use blipstream::settings::Input;

#[tokio::test(flavor = "multi_thread")]
async fn pausing_for_a_spent_pool_loses_and_repeats_nothing() {
    let bench = Bench::new(2);
    bench.write_numbers(0..400);
    let limit = Limit { items: 10, bytes: 64 << 20 };
    let member = Member::start(&bench, limit, 100);
    eventually("everything is paused", || member.paused() == 2).await;
    assert!(member.gate.reasons().contains(&Reason::Messages));
    let mut seen = Vec::new();
    while seen.len() < 400 {
        assert!(member.messages.used().items <= limit.items);
        let message = member.next().await;
        seen.push(number(&message.resolve(Outcome::Published)));
    }
    eventually("caught up", || member.consume.view().caught_up()).await;
    assert_eq!(member.paused(), 0);
    seen.sort_unstable();
    assert_eq!(seen, (0..400).collect::<Vec<_>>());
    assert!(member.output.is_empty());
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_loses_and_repeats_nothing() {
    let bench = Bench::new(2);
    bench.write_numbers(0..300);
    let member = Member::start(&bench, Limit { items: 1000, bytes: 64 << 20 }, 2);
    eventually("everything is paused", || member.paused() == 2).await;
    let mut seen: Vec<usize> = Vec::new();
    while seen.len() < 300 {
        seen.push(number(&member.next().await.resolve(Outcome::Published)));
    }
    eventually("caught up", || member.consume.view().caught_up()).await;
    seen.sort_unstable();
    assert_eq!(seen, (0..300).collect::<Vec<_>>());
    member.close().await.unwrap();
    assert_eq!(bench.committed().into_iter().map(Option::unwrap_or_default).sum::<i64>(), 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shut_gate_stops_delivery_and_keeps_the_membership() {
    let mut bench = Bench::new(2);
    bench.kafka.max_poll_interval = Duration::from_secs(6);
    let member = bench.member();
    eventually("joined", || member.consume.view().status().partitions.len() == 2).await;
    member.gate.shut(Reason::Operator);
    eventually("everything is paused", || member.paused() == 2).await;
    bench.write_numbers(0..20);
    quiet().await;
    assert!(member.output.is_empty());
    assert_eq!(member.consume.view().status().partitions.len(), 2);
    member.gate.clear(Reason::Operator);
    for message in member.take(20).await {
        message.resolve(Outcome::Published);
    }
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_that_is_too_long_pauses_its_partition_until_the_oldest_is_resolved() {
    let mut bench = Bench::new(1);
    bench.flow.max_span = 20;
    bench.write_numbers(0..100);
    let member = bench.member();
    let oldest = member.next().await;
    for message in member.take(19).await {
        message.resolve(Outcome::Published);
    }
    eventually("the partition is paused", || member.paused() == 1).await;
    quiet().await;
    assert!(member.output.is_empty());
    oldest.resolve(Outcome::Published);
    for expected in 20..100 {
        assert_eq!(number(&member.next().await.resolve(Outcome::Published)), expected);
    }
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(100)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn advances_offset_past_tombstones() {
    let bench = Bench::new(1);
    let tombstone = || NewRecord { value: None, ..numbered(0) };
    bench.write(IN, [numbered(0), tombstone(), tombstone(), numbered(1), tombstone()]);
    let member = bench.member();
    for message in member.take(2).await {
        message.resolve(Outcome::Published);
    }
    eventually("caught up", || member.consume.view().caught_up()).await;
    assert!(member.output.is_empty());
    let view = member.consume.view();
    member.close().await.unwrap();
    assert_eq!(view.status().tombstones, 3);
    assert_eq!(view.status().messages[IN], 5);
    assert_eq!(bench.committed(), [Some(5)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_paused_or_at_its_end_is_not_taken_for_stuck() {
    let mut bench = Bench::new(2);
    bench.kafka.stuck_after = Duration::from_millis(50);
    bench.write_numbers(0..5);
    let member = bench.member();
    let taken = member.take(5).await;
    eventually("a broker is known to be up", || member.consume.view().status().brokers_up == 1).await;
    quiet().await;
    member.gate.shut(Reason::Operator);
    eventually("everything is paused", || member.paused() == 2).await;
    quiet().await;
    assert_eq!(member.consume.view().status().reseeks, 0);
    for message in taken {
        message.resolve(Outcome::Published);
    }
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_silent_for_too_long_is_read_anew_and_repeats_nothing() {
    let mut bench = Bench::new(1);
    bench.kafka.stuck_after = Duration::from_millis(50);
    bench.write_numbers(0..20);
    let member = bench.member();
    eventually("a broker is known to be up", || member.consume.view().status().brokers_up == 1).await;
    // Answers take longer than the watchdog waits, so that it barks at a partition that is only slow.
    bench.broker.round_trip_time(Duration::from_millis(200)).unwrap();
    bench.write_numbers(20..40);
    eventually("it was read anew", || member.consume.view().status().reseeks > 0).await;
    bench.broker.round_trip_time(Duration::ZERO).unwrap();
    let mut seen = Vec::new();
    for message in member.take(40).await {
        seen.push(number(&message.resolve(Outcome::Published)));
    }
    assert_eq!(seen, (0..40).collect::<Vec<_>>());
    eventually("caught up", || member.consume.view().caught_up()).await;
    assert!(member.output.is_empty());
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_input_topics_are_caught_up_when_both_are() {
    let mut bench = Bench::new(2);
    bench.kafka.inputs.push(Input { topic: "more".into(), weight: 1 });
    bench.write("more", (0..10).map(numbered));
    bench.write_numbers(10..20);
    let member = bench.member();
    let view = member.consume.view();
    let mut taken = member.take(20).await;
    let last = taken.pop().unwrap();
    for message in taken {
        message.resolve(Outcome::Published);
    }
    quiet().await;
    assert!(!view.caught_up());
    last.resolve(Outcome::Published);
    eventually("caught up", || view.caught_up()).await;
    eventually("the status knows", || view.status().joined && view.status().brokers_up == 1).await;
    let lags = || view.status().partitions.iter().map(|partition| partition.lag).collect::<Vec<_>>();
    eventually("no lag is left", || !lags().is_empty() && lags().iter().all(|l| *l == Some(0))).await;
    member.close().await.unwrap();
}
