//! The fetch stage in the flow: rows with tickets in, fetched rows and failures out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_channel::{Receiver, Sender};
use blipstream::budget::{Limit, Pool};
use blipstream::disposition::{Code, Stage};
use blipstream::gate::{Gate, Passage};
use blipstream::message::{ImageRef, Message, Origin, Request, Row, Timing};
use blipstream::metrics::Metrics;
use blipstream::offsets::{Ledger, Outcome, TopicPartition};
use blipstream::settings;
use blipstream::stage::fetch::{self, Fetcher, Surroundings};
use blipstream::stage::{Fetched, Finished, Output};
use blipstream::tracked::Tracked;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::PIXEL_BYTES;
use super::support::client::eventually;
use super::support::images::{Answer, ImageServer, png};

/// The stage with its channels, and the books that its rows are entered in.
struct Rig {
    ledger: Ledger,
    partition: TopicPartition,
    messages: Pool,
    images: Pool,
    rows: Sender<Tracked<Row>>,
    fetched: Receiver<Tracked<Fetched>>,
    finished: Receiver<Finished>,
    metrics: Arc<Metrics>,
    stage: JoinHandle<()>,
}

impl Rig {
    /// A stage whose outputs hold `queue` rows.
    fn start(queue: usize) -> Self {
        Self::start_with(queue, 2, Duration::from_millis(1), None)
    }

    /// The same with so many tries, after up to so long a wait, and with a gate that is shut in an outage.
    fn start_with(queue: usize, attempts: u32, backoff: Duration, gate: Option<Gate>) -> Self {
        let settings = settings::Fetch {
            allow_networks: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
            attempts,
            backoff,
            per_host: 2,
            concurrency: 4,
            // Rows ask for the same few addresses, each for itself.
            share: false,
            ..settings::Fetch::default()
        };
        let pool = || Pool::new(Limit { items: 1000, bytes: 64 << 20 });
        let (messages, images, ledger) = (pool(), pool(), Ledger::new());
        let metrics = Arc::new(Metrics::new());
        let partition = TopicPartition { topic: "requests".into(), partition: 0 };
        ledger.assign(partition.clone());
        let mut fetcher = Fetcher::new(&settings, images.clone(), PIXEL_BYTES, metrics.clone()).unwrap();
        if let Some(gate) = gate {
            let around = Surroundings { gate, ledger: ledger.clone(), draining: CancellationToken::new() };
            fetcher = fetcher.looking_for_outages(&settings, around);
        }
        let fetcher = Arc::new(fetcher);
        let (rows, input) = async_channel::bounded(10);
        let (to_decode, fetched) = async_channel::bounded(queue);
        let (to_publish, finished) = async_channel::bounded(queue);
        let stage = tokio::spawn(fetch::run(fetcher, input, to_decode, to_publish));
        Self { ledger, partition, messages, images, rows, fetched, finished, metrics, stage }
    }

    /// A row that asks for an image.
    fn row(&self, offset: i64, image: ImageRef, deadline: Option<jiff::Timestamp>) -> Tracked<Row> {
        let message = Arc::new(Message::empty(self.partition.topic.clone(), 0, offset));
        let origin = Origin { topic: message.topic.clone(), partition: 0, offset, index: None };
        let request = Request { deadline, ..Request::of(image) };
        let row = Row { message, request, origin, index: 0, only: true, timing: Timing::default() };
        let ticket = self.ledger.open(&self.partition, offset).unwrap();
        Tracked::new(row, ticket, self.messages.try_acquire(1).unwrap())
    }
}

#[tokio::test]
async fn every_row_ends_as_a_body_or_a_failure_and_the_stage_ends_with_its_input() {
    let body = png(8, 8, 1);
    let server = ImageServer::start()
        .await
        .with("/good", Answer::Body(body.clone()))
        .with("/broken", Answer::status(500))
        .with("/silent", Answer::Silence);
    let rig = Rig::start(100);
    let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_millis(100);
    for (offset, path, deadline) in [
        (0, "/good", None),
        (1, "/missing", None),
        (2, "/broken", None),
        (3, "/silent", Some(soon)),
        (4, "/good", None),
    ] {
        rig.rows.send(rig.row(offset, ImageRef::Http(server.url(path)), deadline)).await.unwrap();
    }
    let Rig { ledger, partition, messages, images, rows, fetched, finished, stage, .. } = rig;
    drop(rows);
    stage.await.unwrap();

    let mut good = Vec::new();
    while let Ok(row) = fetched.recv().await {
        assert_eq!(&row.value.body[..], &body[..]);
        assert!(row.value.row.timing.fetch > 0.0);
        good.push(row);
    }
    assert_eq!(images.used(), Limit { items: 2, bytes: 2 * PIXEL_BYTES }, "each fetched row carries its permit");
    let mut failures = BTreeMap::new();
    while let Ok(ended) = finished.recv().await {
        let Output::FailedRow(row, failure) = ended.resolve(Outcome::Published) else { panic!("not a failed row") };
        assert_eq!(failure.stage, Stage::Fetch);
        assert!(row.timing.fetch > 0.0 && failure.first_failed_at <= jiff::Timestamp::now());
        failures.insert(row.origin.offset, (failure.code, failure.attempts));
    }
    assert_eq!(failures, BTreeMap::from([(1, (Code::NotFound, 1)), (2, (Code::Http5xx, 2)), (3, (Code::Deadline, 1))]));
    for row in good {
        row.resolve(Outcome::Published);
    }
    assert_eq!((ledger.open_tickets(), ledger.take_lost()), (0, None));
    assert_eq!(ledger.position(&partition).unwrap().watermark, 5);
    assert_eq!((images.used(), messages.used()), (Limit::default(), Limit::default()));
}

#[tokio::test]
async fn rows_of_a_hanging_host_let_the_others_pass() {
    let image = png(8, 8, 1);
    let server = ImageServer::start()
        .await
        .with("/hangs", Answer::Held(Box::new(Answer::Body(image.clone()))))
        .with("/good", Answer::Body(image));
    let rig = Rig::start(100);
    for offset in 0..60 {
        rig.rows.send(rig.row(offset, ImageRef::Http(server.url("/hangs")), None)).await.unwrap();
    }
    server.until(|seen| seen.active == 2).await;
    for offset in 60..80 {
        rig.rows.send(rig.row(offset, ImageRef::Http(server.url_at("localhost", "/good")), None)).await.unwrap();
    }
    let mut passed = Vec::new();
    for _ in 0..20 {
        passed.push(rig.fetched.recv().await.unwrap().resolve(Outcome::Published).row.origin.offset);
    }
    passed.sort_unstable();
    assert_eq!(passed, (60..80).collect::<Vec<i64>>());
    server.open_gate();
    for _ in 0..60 {
        rig.fetched.recv().await.unwrap().resolve(Outcome::Published);
    }
    drop(rig.rows);
    rig.stage.await.unwrap();
    assert_eq!((rig.ledger.open_tickets(), rig.images.used()), (0, Limit::default()));
}

#[tokio::test]
async fn a_full_queue_behind_the_stage_holds_it_back_and_loses_nothing() {
    let rig = Rig::start(1);
    let image = ImageRef::Base64("AAAA".into());
    let (rows, fetched) = (rig.rows.clone(), rig.fetched.clone());
    let sent: Vec<_> = (0..300).map(|offset| rig.row(offset, image.clone(), None)).collect();
    let feed = tokio::spawn(async move {
        for row in sent {
            rows.send(row).await.unwrap();
        }
    });
    // 4 fetches × 32 waiting rows, one in the queue behind and ten before: the rest must wait outside.
    let most = 4 * 32;
    let filled = async {
        while rig.images.used().items < most + 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), filled).await.expect("the stage never filled up");
    assert!(rig.images.used().items <= most + 1, "{:?}", rig.images.used());
    let waiting = format!("blipstream_queue_bytes{{stage=\"decode\"}} {}", 3 * (most + 1));
    eventually("all bodies are counted", || rig.metrics.render().lines().any(|line| line == waiting)).await;
    let blocked = rig.metrics.blocked_so_far(Stage::Fetch);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(rig.metrics.blocked_so_far(Stage::Fetch) >= blocked + Duration::from_millis(20));
    for _ in 0..300 {
        fetched.recv().await.unwrap().resolve(Outcome::Published);
        assert!(rig.images.used().items <= most + 1, "{:?}", rig.images.used());
    }
    feed.await.unwrap();
    drop(rig.rows);
    rig.stage.await.unwrap();
    assert_eq!((rig.ledger.open_tickets(), rig.images.used()), (0, Limit::default()));
}

#[tokio::test]
async fn what_an_outage_holds_is_not_fetched_once_its_partition_is_another_workers() {
    let server = ImageServer::start_everywhere().await.with("/a", Answer::status(503));
    let gate = Gate::new();
    let rig = Rig::start_with(100, 10, Duration::from_millis(100), Some(gate.clone()));
    let image = |host: i64| ImageRef::Http(server.url_at(&format!("127.0.0.{}", host + 1), "/a"));
    for offset in 0..12 {
        rig.rows.send(rig.row(offset, image(offset % 6), None)).await.unwrap();
    }
    eventually("an outage", || gate.passage() == Passage::Shut).await;
    rig.ledger.revoke(&rig.partition);
    rig.ledger.assign(rig.partition.clone());
    server.set("/a", Answer::Body(png(8, 8, 1)));
    for offset in 100..103 {
        rig.rows.send(rig.row(offset, image(offset), None)).await.unwrap();
    }
    for _ in 0..3 {
        let row = tokio::time::timeout(Duration::from_secs(20), rig.fetched.recv()).await.expect("a row").unwrap();
        assert!(row.resolve(Outcome::Published).row.origin.offset >= 100);
    }
    eventually("the outage is over", || gate.passage() == Passage::Open).await;
    drop(rig.rows);
    rig.stage.await.unwrap();
    assert!(rig.fetched.recv().await.is_err() && rig.finished.recv().await.is_err(), "more came out");
    assert_eq!((rig.ledger.open_tickets(), rig.ledger.take_lost(), rig.messages.used()), (0, None, Limit::default()));
}
