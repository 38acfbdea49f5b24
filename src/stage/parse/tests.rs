//! What the stage promises.

use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use super::*;
use crate::budget::{Limit, Pool};
use crate::message::{Headers, ORIGIN_HEADER};
use crate::offsets::{Ledger, TopicPartition};

/// Longest message.
const MAX_BYTES: usize = 1 << 20;

const ADDRESS: &str = "https://h.example/p.jpg";

/// The stage with its surroundings.
struct Bench {
    ledger: Ledger,
    pool: Pool,
    partition: TopicPartition,
    input: Sender<Tracked<Message>>,
    rows: Receiver<Tracked<Row>>,
    finished: Receiver<Finished>,
    metrics: Arc<Metrics>,
    stage: Option<tokio::task::JoinHandle<()>>,
}

impl Bench {
    fn new() -> Self {
        let (input, messages) = async_channel::bounded(16);
        let (row_sender, rows) = async_channel::bounded(16);
        let (finished_sender, finished) = async_channel::bounded(16);
        let ledger = Ledger::new();
        let partition = TopicPartition { topic: "requests".into(), partition: 0 };
        ledger.assign(partition.clone());
        let metrics = Arc::new(Metrics::new());
        let stage = Parse {
            input: messages,
            rows: row_sender,
            finished: finished_sender,
            max_bytes: MAX_BYTES,
            max_rows: 100,
            metrics: metrics.clone(),
        };
        let stage = Some(tokio::spawn(stage.run()));
        let pool = Pool::new(Limit { items: 100, bytes: 100 << 20 });
        Self { ledger, pool, partition, input, rows, finished, metrics, stage }
    }

    async fn send(&self, offset: i64, payload: impl Into<Bytes>, headers: Headers) {
        let ticket = self.ledger.open(&self.partition, offset).unwrap();
        let empty = Message::empty(self.partition.topic.clone(), 0, offset);
        let message = Message { payload: Some(payload.into()), headers, ..empty };
        let permit = self.pool.acquire(message.size()).await;
        self.input.send(Tracked::new(message, ticket, permit)).await.unwrap();
    }

    /// Closes the input, waits for the stage to end, and hands out what it sent.
    async fn finish(&mut self) -> (Vec<Tracked<Row>>, Vec<Finished>) {
        self.input.close();
        self.stage.take().unwrap().await.unwrap();
        let rows = std::iter::from_fn(|| self.rows.try_recv().ok()).collect();
        (rows, std::iter::from_fn(|| self.finished.try_recv().ok()).collect())
    }

    fn watermark(&self) -> i64 {
        self.ledger.position(&self.partition).unwrap().watermark
    }
}

fn table(rows: &[&str]) -> String {
    let rows: Vec<_> = rows.iter().map(|row| [row]).collect();
    json!({"input_data": {"columns": ["image"], "data": rows}}).to_string()
}

fn origin(text: &str) -> Headers {
    vec![(ORIGIN_HEADER.to_owned(), Some(Bytes::copy_from_slice(text.as_bytes())))]
}

#[tokio::test]
async fn a_message_of_several_rows_closes_with_the_last_of_them_and_keeps_its_permit_until_then() {
    let mut bench = Bench::new();
    bench.send(5, table(&[ADDRESS, "s3://b/k", ADDRESS]), Vec::new()).await;
    let (rows, failures) = bench.finish().await;
    let who: Vec<_> = rows.iter().map(|row| (row.value.origin.to_string(), row.value.index, row.value.only)).collect();
    assert_eq!(who, [("requests/0/5/0".into(), 0, false), ("requests/0/5/2".into(), 2, false)]);
    assert_eq!((failures.len(), bench.metrics.stage_so_far(Stage::Parse).0), (1, 1));
    for row in rows {
        row.resolve(Outcome::Published);
        assert_eq!((bench.watermark(), bench.pool.used().items), (5, 1));
    }
    for failure in failures {
        let output = failure.resolve(Outcome::Published);
        let Output::FailedMessage { index, native, failure, message } = output else { panic!("not a failed message") };
        assert_eq!((index, failure.code, failure.stage), (Some(1), Code::BadReference, Stage::Parse));
        assert_eq!(serde_json::from_slice::<Value>(&native.unwrap()).unwrap(), json!({"image": "s3://b/k"}));
        assert_eq!(message.offset, 5);
    }
    assert_eq!((bench.watermark(), bench.pool.used()), (6, Limit::default()));
}

#[tokio::test]
async fn a_message_of_one_row_is_whole_whatever_its_form() {
    let mut bench = Bench::new();
    bench.send(0, ADDRESS, Vec::new()).await;
    bench.send(1, table(&[ADDRESS]), Vec::new()).await;
    bench.send(2, table(&["no reference"]), Vec::new()).await;
    let (rows, failures) = bench.finish().await;
    for (offset, row) in rows.into_iter().enumerate() {
        let row = row.resolve(Outcome::Published);
        assert_eq!((row.origin.to_string(), row.index, row.only), (format!("requests/0/{offset}"), 0, true));
    }
    for failure in failures {
        let output = failure.resolve(Outcome::Published);
        assert!(matches!(output, Output::FailedMessage { index: None, native: None, .. }), "{output:?}");
    }
    assert_eq!(bench.watermark(), 3);
}

#[tokio::test]
async fn an_unreadable_message_fails_as_a_whole_and_an_empty_table_is_skipped() {
    let mut bench = Bench::new();
    bench.send(0, "{", Vec::new()).await;
    bench.send(1, table(&[]), Vec::new()).await;
    let (rows, mut failures) = bench.finish().await;
    assert!(rows.is_empty());
    assert_eq!(bench.ledger.open_tickets(), 1, "the empty table is resolved");
    let output = failures.remove(0).resolve(Outcome::Published);
    let Output::FailedMessage { index: None, native: None, failure, .. } = output else { panic!("{output:?}") };
    assert_eq!(failure.code, Code::BadMessage);
    assert_eq!((bench.watermark(), failures.len()), (2, 0));
    assert_eq!(bench.metrics.stage_so_far(Stage::Parse).0, 2);
}

#[tokio::test]
async fn a_replayed_row_keeps_its_identity_and_a_table_cannot_claim_one() {
    let mut bench = Bench::new();
    bench.send(7, ADDRESS, origin("first/2/30/4")).await;
    bench.send(8, ADDRESS, origin("first/2/31")).await;
    bench.send(9, table(&[ADDRESS, ADDRESS]), origin("first/2/30/4")).await;
    bench.send(10, table(&[ADDRESS, ADDRESS]), origin("first/2/32")).await;
    let (rows, _) = bench.finish().await;
    let who =
        rows.into_iter().map(|row| row.resolve(Outcome::Published)).map(|row| (row.origin.to_string(), row.index));
    let expected = [
        ("first/2/30/4", 4),
        ("first/2/31", 0),
        ("requests/0/9/0", 0),
        ("requests/0/9/1", 1),
        ("first/2/32/0", 0),
        ("first/2/32/1", 1),
    ];
    assert_eq!(who.collect::<Vec<_>>(), expected.map(|(origin, index)| (origin.to_owned(), index)));
}

#[tokio::test]
async fn a_request_whose_deadline_has_passed_is_not_fetched() {
    let mut bench = Bench::new();
    bench.send(0, json!({"image": ADDRESS, "deadline": "2020-01-01T00:00:00Z"}).to_string(), Vec::new()).await;
    bench.send(1, json!({"image": ADDRESS, "deadline": "9000-01-01T00:00:00Z"}).to_string(), Vec::new()).await;
    let (mut rows, mut failures) = bench.finish().await;
    assert_eq!((rows.len(), failures.len()), (1, 1));
    assert_eq!(rows.remove(0).resolve(Outcome::Published).origin.offset, 1);
    let output = failures.remove(0).resolve(Outcome::Published);
    let Output::FailedRow(row, failure) = output else { panic!("{output:?}") };
    assert_eq!((row.origin.offset, failure.code), (0, Code::Deadline));
}

#[tokio::test]
async fn a_large_message_is_parsed_like_a_small_one() {
    let mut bench = Bench::new();
    bench.send(0, json!({"image": "iVBO".repeat(LARGE_MESSAGE)}).to_string(), Vec::new()).await;
    let (mut rows, _) = bench.finish().await;
    let row = rows.remove(0).resolve(Outcome::Published);
    assert_eq!(row.request, parse(&row.message, 1).unwrap().remove(0).unwrap());
}

#[tokio::test]
async fn a_message_over_the_limit_is_not_looked_at_and_one_at_the_limit_is() {
    let mut bench = Bench::new();
    let frame = json!({"image": ""}).to_string().len();
    let filling = |bytes: usize| json!({"image": "A".repeat(bytes - frame)}).to_string();
    bench.send(0, filling(MAX_BYTES), Vec::new()).await;
    bench.send(1, filling(MAX_BYTES + 1), Vec::new()).await;
    // Headers count, too.
    bench.send(2, filling(MAX_BYTES - 2), vec![("abc".into(), None)]).await;
    let (mut rows, failures) = bench.finish().await;
    assert_eq!((rows.len(), failures.len()), (1, 2));
    assert_eq!(rows.remove(0).resolve(Outcome::Published).origin.offset, 0);
    for (offset, failure) in (1..).zip(failures) {
        let output = failure.resolve(Outcome::Published);
        let Output::FailedMessage { index: None, native: None, failure, message } = output else {
            panic!("{output:?}")
        };
        assert_eq!((message.offset, failure.code), (offset, Code::TooLarge));
        assert!(failure.message.contains("1048577 bytes") && failure.message.contains("kafka.max_message_size"));
    }
}

#[tokio::test]
async fn ends_when_nobody_takes_the_rows_and_the_ledger_names_the_message() {
    let mut bench = Bench::new();
    bench.rows.close();
    bench.send(3, ADDRESS, Vec::new()).await;
    bench.stage.take().unwrap().await.unwrap();
    assert_eq!(bench.ledger.take_lost().map(|lost| lost.offset), Some(3));
}

#[tokio::test]
async fn waiting_for_room_in_the_next_queue_counts_as_blocked() {
    let mut bench = Bench::new();
    bench.send(0, table(&[ADDRESS; 16]), Vec::new()).await;
    while bench.rows.len() < 16 {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.metrics.blocked_so_far(Stage::Parse), Duration::ZERO);
    bench.send(1, ADDRESS, Vec::new()).await;
    while bench.metrics.blocked_so_far(Stage::Parse).is_zero() {
        tokio::task::yield_now().await;
    }
    let first = bench.rows.recv().await.unwrap();
    let (rest, _) = bench.finish().await;
    let blocked = bench.metrics.blocked_so_far(Stage::Parse);
    let line = format!("blipstream_stage_blocked_seconds_total{{stage=\"parse\"}} {}", blocked.as_secs_f64());
    assert!(bench.metrics.render().lines().any(|rendered| rendered == line), "{line}");
    for row in rest.into_iter().chain([first]) {
        row.resolve(Outcome::Published);
    }
    assert_eq!(bench.watermark(), 2);
}
