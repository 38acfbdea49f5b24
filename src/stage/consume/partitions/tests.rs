//! What follows from what the thread knows of its partitions.

use proptest::prelude::*;

use super::*;
use crate::kafka::PartitionStats;

fn partition(topic: &str, number: i32) -> TopicPartition {
    TopicPartition { topic: topic.into(), partition: number }
}

fn two_topics(now: Instant) -> Partitions {
    let mut partitions = Partitions::default();
    for name in ["a", "b"] {
        partitions.assigned(partition(name, 0), Start::Beginning, now);
    }
    partitions.change(false, now);
    partitions
}

/// A single partition that was read up to this offset.
fn read_to(offset: i64, now: Instant) -> Partitions {
    let mut partitions = Partitions::default();
    partitions.assigned(partition("a", 0), Start::Beginning, now);
    partitions.change(false, now);
    partitions.received(&partition("a", 0), offset, now);
    partitions
}

fn stats(topic: &str, end_seen: Option<i64>, prefetched: u64) -> Stats {
    let one = PartitionStats { partition: partition(topic, 0), log_end: end_seen, end_seen, prefetched };
    Stats { partitions: vec![one], ..Stats::default() }
}

#[test]
fn a_new_partition_is_told_its_state_even_when_it_should_simply_run() {
    let now = Instant::now();
    let mut partitions = Partitions::default();
    partitions.assigned(partition("a", 0), Start::At(3), now);
    assert_eq!(partitions.change(false, now).resume, [partition("a", 0)]);
    assert_eq!(partitions.change(false, now), Change::default());
}

#[test]
fn a_partition_assigned_while_everything_rests_is_paused() {
    let now = Instant::now();
    let mut partitions = Partitions::default();
    partitions.assigned(partition("a", 0), Start::At(3), now);
    assert_eq!(partitions.change(true, now).pause, [partition("a", 0)]);
}

#[test]
fn a_message_of_a_partition_that_rests_shows_that_the_pause_is_lost_and_it_is_paused_anew() {
    let now = Instant::now();
    let mut partitions = two_topics(now);
    let a = partition("a", 0);
    assert_eq!(partitions.change(true, now).pause.len(), 2);
    assert_eq!(partitions.change(true, now), Change::default());
    assert_eq!(partitions.received(&a, 0, now), Arrival::Taken);
    assert_eq!(partitions.change(true, now).pause, std::slice::from_ref(&a));
    assert_eq!(partitions.change(true, now), Change::default());
    assert_eq!(partitions.change(false, now).resume.len(), 2);
    // One that is not due counts, too.
    let due = now + Duration::from_secs(60);
    for offset in [1, 2] {
        assert!(partitions.defer(&a, offset, due, now));
        assert_eq!(partitions.change(false, now).pause, std::slice::from_ref(&a));
    }
}

#[test]
fn a_full_span_rests_only_its_own_partition_until_it_is_under_half() {
    let now = Instant::now();
    let mut partitions = two_topics(now);
    partitions.spanned(&partition("a", 0), 10, 10);
    assert_eq!(partitions.change(false, now).pause, [partition("a", 0)]);
    partitions.spanned(&partition("a", 0), 5, 10);
    assert_eq!(partitions.change(false, now), Change::default());
    partitions.spanned(&partition("a", 0), 4, 10);
    assert_eq!(partitions.change(false, now).resume, [partition("a", 0)]);
}

#[test]
fn what_was_turned_away_is_read_again_and_nothing_behind_it_is_taken_before() {
    let now = Instant::now();
    let mut partitions = two_topics(now);
    let name = partition("a", 0);
    (0..6).for_each(|offset| assert_eq!(partitions.received(&name, offset, now), Arrival::Taken));
    partitions.spanned(&name, 10, 10);
    partitions.turn_away(&name, 4);
    assert_eq!(partitions.received(&name, 6, now), Arrival::Left, "4 and 5 come first");
    assert_eq!(partitions.change(false, now).pause, [partition("a", 0)]);
    assert_eq!(partitions.received(&name, 7, now), Arrival::Left);
    partitions.spanned(&name, 0, 10);
    let change = partitions.change(false, now);
    assert_eq!((change.resume, change.seek), (vec![name.clone()], vec![(name.clone(), Start::At(4))]));
    assert_eq!(partitions.received(&name, 4, now), Arrival::Taken);
}

#[test]
fn a_span_that_is_short_again_before_the_partition_rested_loses_nothing() {
    let now = Instant::now();
    let mut partitions = two_topics(now);
    let name = partition("a", 0);
    (0..6).for_each(|offset| assert_eq!(partitions.received(&name, offset, now), Arrival::Taken));
    partitions.spanned(&name, 10, 10);
    partitions.turn_away(&name, 4);
    partitions.spanned(&name, 0, 10);
    // It was never paused, so there is nothing to resume.
    let change = partitions.change(false, now);
    assert_eq!(change, Change { seek: vec![(name, Start::At(4))], ..Change::default() });
    assert_eq!(partitions.change(false, now), Change::default());
}

#[test]
fn a_resumed_partition_reads_on_behind_the_last_message_that_came() {
    let now = Instant::now();
    let mut partitions = two_topics(now);
    partitions.received(&partition("a", 0), 6, now);
    partitions.change(true, now);
    let seek = [(partition("a", 0), Start::At(7)), (partition("b", 0), Start::Beginning)];
    assert_eq!(partitions.change(false, now).seek, seek);
}

#[test]
fn two_reasons_to_rest_do_not_fight() {
    let now = Instant::now();
    let mut partitions = two_topics(now);
    partitions.spanned(&partition("a", 0), 10, 10);
    partitions.change(true, now);
    // The pools have room again, the span has not.
    assert_eq!(partitions.change(false, now).resume, [partition("b", 0)]);
    // The span is short again while the pools are spent.
    partitions.change(true, now);
    partitions.spanned(&partition("a", 0), 0, 10);
    assert_eq!(partitions.change(true, now), Change::default());
    assert_eq!(partitions.change(false, now).resume.len(), 2);
}

#[test]
fn an_end_is_believed_at_once_only_when_one_topic_can_be_meant() {
    let now = Instant::now();
    let mut partitions = two_topics(now);
    partitions.ended(0, |_| true, now);
    assert!(partitions.iter().all(|(_, state)| !state.at_end));
    partitions.learn(&stats("a", Some(0), 0), now);
    partitions.ended(0, |_| true, now);
    assert!(partitions.all_at_end());
    assert_eq!(partitions.received(&partition("b", 0), 0, now), Arrival::Taken);
    assert!(!partitions.all_at_end());
}

#[test]
fn an_end_is_that_of_the_member_that_tells_it() {
    let now = Instant::now();
    let mut partitions = two_topics(now);
    partitions.ended(0, |partition| &*partition.topic == "b", now);
    assert!(partitions.is_at_end(&partition("b", 0)) && !partitions.is_at_end(&partition("a", 0)));
    partitions.ended(0, |partition| &*partition.topic == "a", now);
    assert!(partitions.all_at_end());
}

#[test]
fn statistics_show_an_end_behind_transaction_markers_and_not_before_prefetched_messages() {
    let now = Instant::now();
    let mut partitions = read_to(7, now);
    partitions.learn(&stats("a", Some(10), 2), now);
    assert!(!partitions.all_at_end());
    partitions.learn(&stats("a", Some(10), 0), now);
    assert!(partitions.all_at_end());
}

#[test]
fn old_statistics_do_not_end_a_partition_that_went_on() {
    let now = Instant::now();
    let mut partitions = read_to(12, now);
    partitions.learn(&stats("a", Some(10), 0), now);
    assert!(!partitions.all_at_end());
}

#[test]
fn only_a_silent_partition_that_should_deliver_is_stuck_and_is_named_once() {
    let (now, after) = (Instant::now(), Duration::from_secs(30));
    let later = now + after;
    let mut partitions = two_topics(now);
    partitions.received(&partition("a", 0), 41, now);
    partitions.spanned(&partition("b", 0), 9, 1);
    partitions.change(false, now);
    assert_eq!(partitions.stuck(after, now + after / 2), []);
    assert_eq!(partitions.stuck(after, later), [(partition("a", 0), Start::At(42))]);
    assert_eq!(partitions.stuck(after, later), []);
    partitions.learn(&stats("a", Some(42), 0), later);
    assert_eq!(partitions.stuck(after, later + after), []);
}

#[test]
fn messages_of_a_leaving_or_foreign_partition_are_not_taken() {
    let now = Instant::now();
    let mut partitions = two_topics(now);
    partitions.leaving(&[partition("a", 0)]);
    assert_eq!(partitions.received(&partition("a", 0), 1, now), Arrival::Left);
    assert_eq!(partitions.received(&partition("c", 0), 1, now), Arrival::Left);
    assert_eq!(partitions.received(&partition("b", 0), 1, now), Arrival::Taken);
    assert_eq!(partitions.change(false, now).pause, [partition("a", 0)]);
}

#[test]
fn a_message_that_is_not_due_rests_its_partition_and_is_read_again_when_it_is() {
    let now = Instant::now();
    let (before, due) = (now + Duration::from_secs(9), now + Duration::from_secs(10));
    let mut partitions = two_topics(now);
    assert_eq!(partitions.received(&partition("a", 0), 4, now), Arrival::Taken);
    assert!(partitions.defer(&partition("a", 0), 5, due, now));
    assert_eq!(partitions.received(&partition("a", 0), 6, now), Arrival::Left, "read ahead of the pause");
    assert_eq!(partitions.change(false, now).pause, [partition("a", 0)]);
    assert_eq!(partitions.change(false, before), Change::default());
    assert_eq!(partitions.stuck(Duration::from_secs(5), before).len(), 1, "only b");
    let change = partitions.change(false, due);
    assert_eq!((change.resume, change.seek), (vec![partition("a", 0)], vec![(partition("a", 0), Start::At(5))]));
    assert!(!partitions.defer(&partition("a", 0), 5, due + Duration::from_secs(10), due), "it waits once");
    assert_eq!(partitions.received(&partition("a", 0), 5, due), Arrival::Taken);
}

#[test]
fn a_seek_that_was_lost_on_its_way_passes_over_nothing() {
    let now = Instant::now();
    let name = partition("a", 0);
    let mut partitions = read_to(3, now);
    partitions.turn_away(&name, 4);
    for _ in 0..SEEKS {
        assert_eq!(partitions.change(false, now).seek, [(name.clone(), Start::At(4))]);
        assert_eq!(partitions.received(&name, 5, now), Arrival::Ahead(4));
        assert_eq!(partitions.received(&name, 6, now), Arrival::Left);
    }
    partitions.change(false, now);
    assert_eq!(partitions.received(&name, 4, now), Arrival::Taken);
    assert_eq!(partitions.received(&name, 7, now), Arrival::Taken, "offsets are sparse");
}

#[test]
fn a_lost_seek_to_the_last_message_is_no_end_and_is_tried_again_when_nothing_comes() {
    let now = Instant::now();
    let name = partition("a", 0);
    let mut partitions = read_to(3, now);
    partitions.turn_away(&name, 4);
    partitions.change(false, now);
    partitions.ended(0, |_| true, now);
    partitions.learn(&stats("a", Some(5), 0), now);
    assert!(!partitions.is_at_end(&name));
    let later = now + Duration::from_secs(5);
    assert_eq!(partitions.stuck(Duration::from_secs(5), later), [(name.clone(), Start::At(4))]);
    assert_eq!(partitions.received(&name, 4, later), Arrival::Taken);
    partitions.ended(0, |_| true, later);
    assert!(partitions.is_at_end(&name));
}

#[test]
fn a_message_that_has_gone_from_the_log_is_not_waited_for_forever() {
    let now = Instant::now();
    let name = partition("a", 0);
    let mut partitions = read_to(3, now);
    partitions.turn_away(&name, 6);
    partitions.turn_away(&name, 4);
    partitions.turn_away(&name, 5);
    for _ in 0..SEEKS {
        partitions.change(false, now);
        assert_eq!(partitions.received(&name, 5, now), Arrival::Ahead(4));
    }
    partitions.change(false, now);
    assert_eq!(partitions.received(&name, 5, now), Arrival::Without(4));
    assert_eq!(partitions.received(&name, 6, now), Arrival::Taken);
}

#[test]
fn a_partition_that_could_not_be_sought_takes_nothing_and_is_sought_again() {
    let now = Instant::now();
    let mut partitions = two_topics(now);
    partitions.received(&partition("a", 0), 6, now);
    partitions.change(true, now);
    partitions.change(false, now);
    partitions.not_sought(&partition("a", 0));
    assert_eq!(partitions.received(&partition("a", 0), 9, now), Arrival::Left, "messages between would be passed over");
    assert_eq!(partitions.change(false, now).seek, [(partition("a", 0), Start::At(7))]);
    assert_eq!(partitions.received(&partition("a", 0), 7, now), Arrival::Taken);
}

proptest! {
    #[test]
    fn what_librdkafka_was_told_is_always_what_is_wanted(
        steps in proptest::collection::vec((0u8..6, 0i32..3, 0u64..12, any::<bool>()), 0..100)
    ) {
        let now = Instant::now();
        let mut partitions = Partitions::default();
        let mut told = BTreeMap::new();
        for (step, number, span, shut) in steps {
            let name = partition("t", number);
            match step {
                0 => { told.remove(&name); partitions.assigned(name, Start::Beginning, now) }
                1 => { told.remove(&name); partitions.removed(&name) }
                2 => partitions.leaving(&[name]),
                _ => partitions.spanned(&name, span, 10),
            }
            let change = partitions.change(shut, now);
            for name in change.pause {
                prop_assert_ne!(told.insert(name, true), Some(true), "paused twice");
            }
            for name in change.resume {
                prop_assert_ne!(told.insert(name, false), Some(false), "resumed twice");
            }
            for (name, state) in partitions.iter() {
                prop_assert_eq!(told.get(name), Some(&state.resting(shut)));
            }
        }
    }
}
