//! One message at a time, where workers keep dying.

use std::time::Duration;

use blipstream::disposition::Code;
use blipstream::gate::Reason;
use blipstream::kafka::NewRecord;
use blipstream::message::NOT_BEFORE_HEADER;
use blipstream::offsets::{Committed, Note, Outcome};
use blipstream::settings::RetryTopic;
use blipstream::stage::Output;

use crate::bench::{Bench, IN, SHORT_SESSION, eventually, number, numbered, quiet};

fn bench(partitions: i32) -> Bench {
    let mut bench = Bench::new(partitions);
    bench.kafka.session_timeout = SHORT_SESSION;
    bench
}

fn starts(starts: u32) -> Note {
    Note { starts, ..Note::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_is_written_down_before_the_first_message_and_taken_back_at_the_end() {
    let bench = bench(1);
    bench.write_numbers(0..3);
    let member = bench.member();
    let first = member.next().await;
    assert_eq!(bench.noted(IN, 0), Some(Committed { offset: 0, note: starts(1) }));
    for message in member.take(2).await {
        message.resolve(Outcome::Published);
    }
    member.consume.stop();
    // The deadline of the drain has passed.
    first.abandon();
    member.close().await.unwrap();
    assert_eq!(bench.noted(IN, 0), Some(Committed::from(0)), "it ended in order");

    let member = bench.member();
    drop(member.next().await);
    eventually("the second start", || bench.noted(IN, 0) == Some(Committed { offset: 0, note: starts(1) })).await;
    for message in member.take(2).await {
        message.resolve(Outcome::Published);
    }
    member.close().await.unwrap();
    assert_eq!(bench.noted(IN, 0), Some(Committed { offset: 0, note: starts(1) }), "a message was dropped");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_may_kill_are_taken_alone_and_the_others_wait() {
    let mut bench = bench(2);
    bench.flow.max_span = 3;
    bench.write_numbers(0..40);
    bench.commit([(IN, 1, Committed { offset: 2, note: starts(2) })]);
    let member = bench.member();
    for offset in 2..5 {
        let alone = member.next().await;
        assert_eq!((alone.partition().partition, alone.offset()), (1, offset));
        let starts = if offset == 2 { 3 } else { 1 };
        let note = Note { starts, alone: true, until: Some(5) };
        assert_eq!(bench.noted(IN, 1), Some(Committed { offset, note }));
        quiet().await;
        assert!(member.output.is_empty(), "not alone");
        assert_eq!(member.gate.reasons(), [Reason::Solo]);
        let status = member.consume.view().status();
        let untils: Vec<_> = status.partitions.iter().map(|partition| partition.one_at_a_time_until).collect();
        assert_eq!(untils, [None, Some(5)]);
        alone.resolve(Outcome::Published);
    }
    // Those before the offset were done before.
    let first = member.next().await;
    assert!(!member.gate.reasons().contains(&Reason::Solo));
    assert!(!bench.noted(IN, 1).unwrap().note.alone);
    first.resolve(Outcome::Published);
    for _ in 0..40 - 5 - 1 {
        member.next().await.resolve(Outcome::Published);
    }
    eventually("caught up", || member.consume.view().caught_up()).await;
    member.close().await.unwrap();
    assert!((0..2).all(|partition| bench.noted(IN, partition).unwrap().note == Note::default()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_message_that_was_alone_at_a_death_is_blamed_unread() {
    let bench = bench(1);
    bench.write_numbers(0..4);
    let note = Note { starts: 3, alone: true, until: Some(3) };
    bench.commit([(IN, 0, Committed { offset: 1, note })]);
    let member = bench.member();
    let blamed = member.blamed.recv().await.unwrap();
    let Output::FailedMessage { message, failure, .. } = &blamed.value else { panic!("{blamed:?}") };
    assert_eq!((number(message), failure.code, failure.attempts), (1, Code::Quarantined, 3));
    assert!(!failure.transient && failure.message.contains("alone was in flight"), "{}", failure.message);
    quiet().await;
    assert!(member.output.is_empty(), "the next one is alone, too");
    blamed.resolve(Outcome::Published);
    for expected in 2..4 {
        assert_eq!(number(&member.next().await.resolve(Outcome::Published)), expected);
    }
    member.close().await.unwrap();
    assert_eq!(bench.noted(IN, 0), Some(Committed::from(4)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspect_partition_whose_messages_wait_for_their_time_holds_up_no_other() {
    const RETRY: &str = "retry";
    let mut bench = bench(1);
    bench.kafka.retry_topics = vec![RetryTopic { topic: RETRY.into(), delay: Duration::from_secs(2) }];
    // Far in the future by its header; by the topic's delay, two seconds after it was seen first.
    let header = (NOT_BEFORE_HEADER.to_owned(), Some("2999-01-01T00:00:00Z".into()));
    let behind = NewRecord { key: numbered(100).key, ..numbered(101) };
    bench.write(RETRY, [NewRecord { headers: vec![header], ..numbered(100) }, behind]);
    bench.write_numbers(0..3);
    let partition = bench.read(RETRY)[0].partition;
    bench.commit([(RETRY, partition, Committed { offset: 0, note: starts(2) })]);
    let member = bench.member();
    let others = member.take(3).await;
    assert!(others.iter().all(|message| number(&message.value) < 100));
    assert_eq!(
        bench.noted(RETRY, partition),
        Some(Committed { offset: 0, note: starts(2) }),
        "it waits, and is not blamed"
    );
    eventually("it is time", || member.gate.reasons().contains(&Reason::Solo)).await;
    quiet().await;
    assert!(member.output.is_empty(), "others are in flight");
    for message in others {
        message.resolve(Outcome::Published);
    }
    for expected in [100, 101] {
        let alone = member.next().await;
        quiet().await;
        assert!(member.output.is_empty());
        assert_eq!(number(&alone.resolve(Outcome::Published)), expected);
    }
    eventually("its end is seen", || member.gate.reasons().is_empty()).await;
    member.close().await.unwrap();
    assert_eq!(bench.noted(RETRY, partition), Some(Committed::from(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_partition_is_committed_nowhere() {
    let bench = bench(2);
    bench.write(IN, [numbered(0)]);
    let member = bench.member();
    let only = member.next().await;
    let partition = only.partition().partition;
    only.resolve(Outcome::Published);
    eventually("committed", || bench.noted(IN, partition) == Some(Committed::from(1))).await;
    assert_eq!(bench.noted(IN, 1 - partition), None);
    member.close().await.unwrap();
}
