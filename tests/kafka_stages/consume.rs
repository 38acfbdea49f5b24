//! Taking messages: room, pauses, spans, ends.

use std::time::{Duration, Instant};

use crate::bench::{Bench, IN, Member, PATIENCE, eventually, number, numbered, quiet};
use blipstream::budget::Limit;
use blipstream::gate::Reason;
use blipstream::kafka::{Consumer, Event, NewRecord, Start};
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
    // The end may be reached before the consumer has looked at the pool once more.
    eventually("caught up", || member.consume.view().caught_up() && member.paused() == 0).await;
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
    assert_eq!(member.gate.reasons(), [Reason::Queue]);
    let mut seen: Vec<usize> = Vec::new();
    while seen.len() < 300 {
        seen.push(number(&member.next().await.resolve(Outcome::Published)));
    }
    eventually("caught up", || member.consume.view().caught_up() && member.gate.reasons().is_empty()).await;
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
    assert_eq!(member.gate.reasons(), [Reason::Span]);
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
async fn messages_that_waited_for_room_do_not_make_a_span_longer_than_allowed() {
    const SPAN: usize = 10;
    let mut bench = Bench::new(1);
    bench.flow.max_span = SPAN as u64;
    bench.write_numbers(0..60);
    // A queue that is shorter than the span: the messages behind it are held, more of them than the span has room for.
    let member = Member::start(&bench, Limit { items: 1000, bytes: 64 << 20 }, SPAN - 2);
    eventually("the queue is full", || member.output.is_full()).await;
    eventually("messages are held", || member.consume.view().status().held_bytes > 0).await;
    let first = member.take(SPAN).await;
    quiet().await;
    assert!(member.output.is_empty(), "taken beyond the span");
    let view = member.consume.view();
    eventually("nothing of it is held", || view.status().held_bytes == 0).await;
    assert_eq!((view.status().partitions[0].span, view.status().partitions[0].open), (SPAN as u64, SPAN));
    let mut seen: Vec<usize> = first.into_iter().map(|message| number(&message.resolve(Outcome::Published))).collect();
    while seen.len() < 60 {
        seen.push(number(&member.next().await.resolve(Outcome::Published)));
    }
    assert_eq!(seen, (0..60).collect::<Vec<_>>());
    eventually("caught up", || view.caught_up()).await;
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(60)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn long_messages_that_wait_for_room_are_few_and_none_is_lost() {
    const LENGTH: usize = 300 << 10;
    let bench = Bench::new(1);
    // Under the 5 MiB that the embedded broker keeps.
    let long = |number: usize| {
        let value = format!("{}{number}", "0".repeat(LENGTH));
        NewRecord { value: Some(value.into()), ..numbered(number) }
    };
    bench.write(IN, (0..12).map(long));
    let member = Member::start(&bench, Limit { items: 1000, bytes: 64 << 20 }, 1);
    let view = member.consume.view();
    eventually("everything is paused", || member.paused() == 1).await;
    quiet().await;
    let held = view.status().held_bytes;
    // Not all eleven: 1 MiB, and the message that passed it.
    assert!(held > LENGTH && held < (1 << 20) + LENGTH + 8192, "{held} bytes are held");
    for expected in 0..12 {
        assert_eq!(number(&member.next().await.resolve(Outcome::Published)), expected);
    }
    eventually("caught up", || view.caught_up()).await;
    assert!(member.output.is_empty());
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(12)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_on_messages_in_flight_holds_consumption_until_it_is_lifted() {
    const LIMIT: usize = 5;
    let bench = Bench::new(1);
    let member = bench.member();
    member.gate.limit(Some(LIMIT));
    bench.write_numbers(0..100);
    let first = member.take(LIMIT).await;
    eventually("it is the limit that holds", || member.gate.reasons() == [Reason::Limit]).await;
    eventually("everything is paused", || member.paused() == 1).await;
    assert!(member.output.is_empty());
    let mut seen: Vec<usize> = first.into_iter().map(|message| number(&message.resolve(Outcome::Published))).collect();
    while seen.len() < 60 {
        let message = member.next().await;
        assert!(member.ledger.open_tickets() <= LIMIT);
        seen.push(number(&message.resolve(Outcome::Published)));
    }
    member.gate.limit(None);
    let rest = member.take(40).await;
    assert_eq!(member.gate.reasons(), []);
    seen.extend(rest.into_iter().map(|message| number(&message.resolve(Outcome::Published))));
    assert_eq!(seen, (0..100).collect::<Vec<_>>());
    member.close().await.unwrap();
}

/// A consumer that is slower than the network, as no worker ever polls.
#[test]
fn statistics_tell_how_much_was_read_ahead() {
    let bench = Bench::new(1);
    let record = |number| NewRecord { value: Some(vec![b'x'; 1000]), ..numbered(number) };
    bench.write(IN, (0..400).map(record));
    let consumer = Consumer::new(&bench.kafka).unwrap();
    consumer.subscribe().unwrap();
    let (mut most, mut messages, deadline) = (0, 0, Instant::now() + PATIENCE);
    while most == 0 || messages < 400 {
        assert!(Instant::now() < deadline, "{messages} messages, at most {most} bytes ahead");
        match consumer.poll(Duration::from_millis(100)) {
            Some(Event::Assigned(member, partitions)) => {
                consumer.assign(member, &[(partitions[0].clone(), Start::Beginning)]).unwrap();
            }
            Some(Event::Message(_)) => {
                messages += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            Some(Event::Stats(_, stats)) => most = most.max(stats.prefetched_bytes),
            _ => {}
        }
    }
    assert!((1000..=400 * 1100).contains(&most), "{most} bytes");
    consumer.close();
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
    // Before the messages were there, it was only slow.
    let before = member.consume.view().status().reseeks;
    quiet().await;
    member.gate.shut(Reason::Operator);
    eventually("everything is paused", || member.paused() == 2).await;
    quiet().await;
    assert_eq!(member.consume.view().status().reseeks, before);
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
