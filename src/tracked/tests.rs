//! What a tracked value promises of its ticket and its permits.

use super::*;
use crate::budget::{Limit, Pool};
use crate::offsets::{Ledger, Reach};

struct Bench {
    ledger: Ledger,
    partition: TopicPartition,
    messages: Pool,
    images: Pool,
}

impl Bench {
    fn new() -> Self {
        let ledger = Ledger::new();
        let partition = TopicPartition { topic: "t".into(), partition: 0 };
        ledger.assign(partition.clone());
        let pool = || Pool::new(Limit { items: 10, bytes: 1000 });
        Self { ledger, partition, messages: pool(), images: pool() }
    }

    fn message<T>(&self, value: T) -> Tracked<T> {
        let ticket = self.ledger.open(&self.partition, 5).unwrap();
        Tracked::new(value, ticket, self.messages.try_acquire(100).unwrap())
    }

    fn watermark(&self) -> i64 {
        self.ledger.position(&self.partition).unwrap().watermark
    }
}

#[test]
fn the_message_permit_comes_back_with_the_last_row_and_so_does_the_offset() {
    let bench = Bench::new();
    let rows = bench.message("table").split(vec![1, 2, 3]).unwrap();
    for (at, row) in rows.into_iter().enumerate() {
        assert_eq!((bench.watermark(), bench.messages.used()), (5, Limit { items: 1, bytes: 100 }));
        assert_eq!(row.resolve(Outcome::Published), at + 1);
    }
    assert_eq!((bench.watermark(), bench.messages.used()), (6, Limit::default()));
}

#[test]
fn splitting_into_nothing_gives_the_tag_back() {
    let bench = Bench::new();
    let tag = bench.message("table").split(Vec::<()>::new()).unwrap_err();
    assert_eq!(bench.ledger.open_tickets(), 1);
    tag.resolve(Outcome::Skipped);
    assert_eq!((bench.watermark(), bench.messages.used(), bench.ledger.take_lost()), (6, Limit::default(), None));
}

#[test]
fn the_image_permit_shrinks_and_is_released_before_the_ticket_is_resolved() {
    let bench = Bench::new();
    let mut row = bench.message("row").with_image(bench.images.try_acquire(500).unwrap());
    row.shrink_image(200);
    assert_eq!(bench.images.used(), Limit { items: 1, bytes: 200 });
    row.release_image();
    assert_eq!((bench.images.used(), bench.watermark()), (Limit::default(), 5));
    row.resolve(Outcome::Published);
    assert_eq!(bench.watermark(), 6);
}

#[test]
fn resolving_gives_the_image_permit_back() {
    let bench = Bench::new();
    bench.message("row").with_image(bench.images.try_acquire(500).unwrap()).resolve(Outcome::Published);
    assert_eq!(bench.images.used(), Limit::default());
}

#[test]
fn changing_and_parting_a_value_keeps_its_tag() {
    let bench = Bench::new();
    let (value, tag) = bench.message(20).map(|value| value + 1).part();
    let joined = Tracked::join(value * 2, tag);
    assert_eq!(joined.partition(), &bench.partition);
    assert_eq!(joined.resolve(Outcome::Published), 42);
    assert_eq!((bench.watermark(), bench.ledger.take_lost()), (6, None));
}

#[test]
fn a_dropped_value_is_a_lost_message_and_its_permits_come_back() {
    let bench = Bench::new();
    drop(bench.message("row").with_image(bench.images.try_acquire(500).unwrap()));
    assert_eq!(bench.ledger.take_lost().map(|lost| lost.offset), Some(5));
    assert_eq!((bench.messages.used(), bench.images.used()), (Limit::default(), Limit::default()));
    assert_eq!(bench.watermark(), 5);
}

#[test]
fn a_fork_keeps_its_message_open_until_both_are_resolved_and_takes_the_image_permit_along() {
    for beside_first in [true, false] {
        let bench = Bench::new();
        let row = bench.message("row").with_image(bench.images.try_acquire(500).unwrap());
        let (row, beside) = row.fork(7);
        let used = || (bench.messages.used().bytes, bench.images.used().bytes);
        if beside_first {
            assert_eq!(beside.resolve(Outcome::Published), 7);
            assert_eq!((used(), bench.watermark()), ((100, 0), 5));
            row.resolve(Outcome::Published);
        } else {
            assert_eq!(row.resolve(Outcome::Published), "row");
            assert_eq!((used(), bench.watermark()), ((100, 500), 5));
            beside.resolve(Outcome::Published);
        }
        assert_eq!((used(), bench.watermark(), bench.ledger.take_lost()), ((0, 0), 6, None));
    }
}

#[test]
fn a_message_is_ready_for_a_transaction_when_both_of_a_fork_are() {
    let bench = Bench::new();
    let (mut row, mut beside) = bench.message("row").fork(7);
    let due = || bench.ledger.due(Reach::Ready).first().map(|prefix| prefix.end.offset);
    row.ready();
    assert_eq!(due(), Some(5));
    beside.ready();
    assert_eq!(due(), Some(6));
    row.resolve(Outcome::Published);
    beside.resolve(Outcome::Published);
    assert_eq!(bench.watermark(), 6);
}
