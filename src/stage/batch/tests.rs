//! What the queue promises.

use std::thread;

use proptest::prelude::*;

use super::*;

const NOW: Take = Take { max: 4, linger: Duration::ZERO, work: Duration::ZERO };

/// Longer than any test: who waits for it has failed.
const EVER: Duration = Duration::from_secs(60);

fn lingering(linger: Duration) -> Take {
    Take { linger, ..NOW }
}

/// A queue of one lane, of items that have all the time in the world.
fn queue<T>(capacity: usize) -> Queue<T> {
    Queue::new(capacity, &[1], |_| None)
}

proptest! {
    #[test]
    fn lanes_lose_nothing_and_keep_the_order_within_a_lane(
        weights in proptest::collection::vec(0u32..5, 1..4),
        pushes in proptest::collection::vec(0usize..4, 0..200),
    ) {
        let mut lanes = Lanes::new(&weights);
        for (order, lane) in pushes.iter().enumerate() {
            lanes.push(*lane, ((*lane).min(weights.len() - 1), order));
        }
        let popped: Vec<_> = std::iter::from_fn(|| lanes.pop()).collect();
        prop_assert_eq!(popped.len(), pushes.len());
        for lane in 0..weights.len() {
            let orders: Vec<_> = popped.iter().filter(|(l, _)| *l == lane).map(|(_, o)| *o).collect();
            prop_assert!(orders.is_sorted());
        }
    }

    #[test]
    fn lanes_share_in_proportion_to_their_weights(a in 1u32..8, b in 1u32..8) {
        let mut lanes = Lanes::new(&[a, b]);
        for _ in 0..100 {
            lanes.push(0, 0usize);
            lanes.push(1, 1usize);
        }
        let rounds = 6;
        let picks: Vec<_> = (0..(a + b) * rounds).filter_map(|_| lanes.pop()).collect();
        prop_assert_eq!(picks.iter().filter(|l| **l == 0).count() as u32, a * rounds);
    }
}

#[test]
fn a_backlog_does_not_starve_the_other_lane() {
    let mut lanes = Lanes::new(&[1, 1]);
    (0..1000).for_each(|i| lanes.push(0, i));
    lanes.push(1, 5000);
    assert!((0..2).filter_map(|_| lanes.pop()).any(|item| item == 5000));
}

#[test]
fn a_free_device_takes_what_is_there_at_once() {
    let queue = queue(10);
    queue.push(0, 'a').unwrap();
    assert_eq!(queue.take(NOW), Some((vec!['a'], Flush::Idle)));
}

#[test]
fn a_batch_is_never_larger_than_asked_for() {
    let queue = queue(10);
    (0..6).for_each(|i| queue.push(0, i).unwrap());
    assert_eq!(queue.take(NOW), Some((vec![0, 1, 2, 3], Flush::Full)));
    assert_eq!(queue.take(NOW), Some((vec![4, 5], Flush::Idle)));
}

#[test]
fn lingering_ends_when_the_batch_is_full() {
    let queue = queue(10);
    queue.push(0, 0).unwrap();
    let device = {
        let queue = queue.clone();
        thread::spawn(move || queue.take(lingering(EVER)))
    };
    (1..4).for_each(|i| queue.push(0, i).unwrap());
    assert_eq!(device.join().unwrap(), Some((vec![0, 1, 2, 3], Flush::Full)));
}

#[test]
fn lingering_ends_with_its_time() {
    let queue = queue(10);
    queue.push(0, 'a').unwrap();
    assert_eq!(queue.take(lingering(Duration::from_millis(5))), Some((vec!['a'], Flush::Linger)));
}

#[test]
fn closing_ends_lingering_and_drains_what_is_there() {
    let queue = queue(10);
    queue.push(0, 'a').unwrap();
    queue.close();
    assert_eq!(queue.take(lingering(EVER)), Some((vec!['a'], Flush::Drain)));
    queue.done();
    assert_eq!(queue.take(NOW), None);
    assert_eq!(queue.push(0, 'b'), Err('b'));
}

#[test]
fn pushing_waits_for_room() {
    let queue = queue(2);
    queue.push(0, 0).unwrap();
    queue.push(0, 1).unwrap();
    let pusher = {
        let queue = queue.clone();
        thread::spawn(move || (2..40).try_for_each(|i| queue.push(0, i)))
    };
    let mut seen = Vec::new();
    while seen.len() < 40 {
        let (batch, _) = queue.take(NOW).unwrap();
        assert!(batch.len() <= 2, "the queue held more than its capacity");
        seen.extend(batch);
    }
    pusher.join().unwrap().unwrap();
    assert!(seen.is_sorted());
}

#[test]
fn several_devices_share_the_queue_and_none_of_its_items_is_lost_or_taken_twice() {
    let queue = Queue::new(8, &[1, 3], |_| None);
    let devices: Vec<_> = [1, 3, 4]
        .map(|max| {
            let queue = queue.clone();
            thread::spawn(move || {
                let mut seen = Vec::new();
                while let Some((batch, _)) = queue.take(Take { max, ..lingering(Duration::from_micros(50)) }) {
                    seen.extend(batch);
                    queue.done();
                }
                seen
            })
        })
        .into();
    (0..2000).for_each(|i| queue.push(i % 2, i).unwrap());
    queue.close();
    let mut all: Vec<_> = devices.into_iter().flat_map(|d| d.join().unwrap()).collect();
    all.sort_unstable();
    assert_eq!(all, (0..2000).collect::<Vec<_>>());
}

#[test]
fn a_batch_that_is_put_back_is_the_next_one() {
    let queue = queue(4);
    (0..4).for_each(|i| queue.push(0, i).unwrap());
    let (batch, _) = queue.take(NOW).unwrap();
    queue.push(0, 9).unwrap();
    queue.put_back(batch.into_iter().map(|i| (0, i)).collect());
    assert_eq!(queue.take(NOW).unwrap().0, vec![0, 1, 2, 3]);
}

#[test]
fn a_device_waits_at_the_end_for_what_another_one_may_put_back() {
    let queue = queue(4);
    queue.push(0, 'a').unwrap();
    let (batch, _) = queue.take(NOW).unwrap();
    queue.close();
    let other = {
        let queue = queue.clone();
        thread::spawn(move || queue.take(NOW))
    };
    queue.put_back(batch.into_iter().map(|item| (0, item)).collect());
    queue.done();
    assert_eq!(other.join().unwrap(), Some((vec!['a'], Flush::Drain)));
}

#[test]
fn an_abandoned_queue_hands_back_what_waits_and_refuses_more() {
    let queue = queue(4);
    queue.push(0, 1).unwrap();
    assert_eq!(queue.abandon(), vec![1]);
    assert_eq!(queue.push(0, 2), Err(2));
}

#[test]
fn a_full_queue_is_taken_at_once_however_large_the_batch_might_be() {
    let queue = queue(2);
    (0..2).for_each(|i| queue.push(0, i).unwrap());
    assert_eq!(queue.take(Take { max: 256, ..lingering(EVER) }), Some((vec![0, 1], Flush::Full)));
}

/// An item that is of use until some moment.
type Dated = (char, Option<Instant>);

fn dated() -> Queue<Dated> {
    Queue::new(10, &[1], |item: &Dated| item.1)
}

fn names(taken: Option<(Vec<Dated>, Flush)>) -> (String, Flush) {
    let (batch, reason) = taken.unwrap();
    (batch.into_iter().map(|(name, _)| name).collect(), reason)
}

#[test]
fn lingering_leaves_time_for_the_work_before_the_earliest_deadline() {
    let queue = dated();
    let due = Instant::now() + EVER;
    queue.push(0, ('a', Some(due + EVER))).unwrap();
    queue.push(0, ('b', Some(due))).unwrap();
    queue.push(0, ('c', None)).unwrap();
    let take = Take { work: EVER.saturating_sub(Duration::from_millis(50)), ..lingering(EVER * 10) };
    assert_eq!(names(queue.take(take)), ("abc".into(), Flush::Linger));
    assert!(Instant::now() < due, "the deadline has passed");
}

#[test]
fn what_would_come_too_late_after_any_wait_is_taken_at_once() {
    let (queue, began) = (dated(), Instant::now());
    queue.push(0, ('a', Some(began + EVER * 10))).unwrap();
    // Nobody knows yet how long a batch takes.
    assert_eq!(names(queue.take(Take { work: Duration::MAX, ..lingering(EVER) })), ("a".into(), Flush::Linger));
    assert!(began.elapsed() < EVER);
}

#[test]
fn an_urgent_item_that_comes_later_ends_lingering() {
    let (queue, began) = (dated(), Instant::now());
    queue.push(0, ('a', None)).unwrap();
    let device = {
        let queue = queue.clone();
        thread::spawn(move || queue.take(lingering(EVER)))
    };
    queue.push(0, ('b', Some(Instant::now()))).unwrap();
    assert_eq!(names(device.join().unwrap()), ("ab".into(), Flush::Linger));
    assert!(began.elapsed() < EVER);
}

proptest! {
    #[test]
    fn guests_get_their_share_however_many_lanes_the_stream_has(
        weights in proptest::collection::vec(1u32..5, 1..4),
        share in 1usize..10,
    ) {
        let mut lanes = Lanes::new(&weights).with_guests(share as f64 / 10.0);
        for lane in 0..=weights.len() {
            (0..200).for_each(|_| lanes.push(lane, lane));
        }
        let picks: Vec<_> = (0..100).filter_map(|_| lanes.pop()).collect();
        prop_assert_eq!(picks.iter().filter(|lane| **lane == weights.len()).count(), share * 10);
    }
}

#[test]
fn guests_and_the_stream_leave_their_turns_to_each_other_when_they_have_nothing() {
    let mut lanes = Lanes::new(&[1]).with_guests(0.1);
    (0..5).for_each(|_| lanes.push(1, "guest"));
    assert_eq!(std::iter::from_fn(|| lanes.pop()).count(), 5);
    (0..5).for_each(|_| lanes.push(0, "stream"));
    assert_eq!(std::iter::from_fn(|| lanes.pop()).count(), 5);
    assert!(lanes.is_empty());
}

#[test]
fn a_queue_that_is_full_of_the_stream_keeps_no_guest_out() {
    let queue = Queue::with_guests(2, &[1], Guests { share: 0.5, room: 1 }, |_| None);
    queue.push(0, "stream").unwrap();
    queue.push(0, "stream").unwrap();
    queue.push(1, "guest").unwrap();
    let (batch, _) = queue.take(Take { max: 2, ..NOW }).unwrap();
    assert!(batch.contains(&"guest") && batch.contains(&"stream"), "{batch:?}");
}

#[test]
fn who_has_something_else_to_do_takes_what_is_there_and_waits_for_nothing() {
    let queue = Queue::new(8, &[1], |(_, due): &(u32, Option<Instant>)| *due);
    let take = Take { max: 2, ..lingering(EVER) };
    assert!(queue.try_take(take).is_none(), "nothing is there");
    queue.push(0, (1, None)).unwrap();
    assert!(queue.try_take(take).is_none(), "a fuller batch may come");
    let (batch, reason) = queue.try_take(Take { max: 2, ..NOW }).unwrap();
    assert_eq!((batch.len(), reason), (1, Flush::Idle));
    queue.done();
    queue.push(0, (2, None)).unwrap();
    queue.push(0, (3, None)).unwrap();
    assert_eq!(queue.try_take(take).unwrap().1, Flush::Full);
    queue.done();
    queue.push(0, (4, Some(Instant::now()))).unwrap();
    assert_eq!(queue.try_take(take).unwrap().1, Flush::Linger, "it is due");
    queue.done();
    queue.close();
    assert!(queue.try_take(take).is_none() && queue.take(take).is_none());
}
