//! A worker whose surroundings fail pauses instead of flooding the dead letters, and goes on by itself.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blipstream::caption::fake::FakeOptions;
use blipstream::kafka::NewRecord;
use serde_json::json;

use crate::support::client::eventually;
use crate::support::flow::{Answers, Flow, Worker, request};
use crate::support::images::{Answer, ImageServer, png};

const OUTAGE: &str = "blipstream_backpressure_active{reason=\"outage\"}";
const DEAD_LETTERS: &str = "blipstream_backpressure_active{reason=\"dead_letters\"}";

/// A flow whose tries are not spent before anybody has noticed.
fn flow() -> Flow {
    let mut flow = Flow::start(2);
    flow.settings.fetch.backoff = Duration::from_secs(1);
    flow.settings.fetch.max_backoff = Duration::from_secs(5);
    // Each row is on its own: what is counted is its tries.
    flow.settings.fetch.share = false;
    flow
}

/// A request for `path` of one of many hosts.
fn from_host(images: &ImageServer, host: usize, path: &str, id: impl ToString) -> NewRecord {
    request(id, images.url_at(&format!("127.0.0.{}", host + 1), path))
}

fn picture() -> Answer {
    Answer::Body(png(20, 20, 1))
}

fn is_held_by(worker: &Worker, reason: &str) -> bool {
    worker.control.status().held_by.contains(&reason)
}

fn shows(worker: &Worker, line: String) -> bool {
    worker.control.render_metrics().lines().any(|shown| shown == line)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_pauses_the_worker_and_everything_is_captioned_once_it_is_over() {
    const FIRST: usize = 60;
    const LATER: usize = 40;
    let flow = flow();
    let images = ImageServer::start_everywhere().await.with("/a.png", Answer::status(503));
    let all = |range: std::ops::Range<usize>| range.map(|n| from_host(&images, n % 6, "/a.png", n));
    let worker = flow.worker(FakeOptions::default());
    flow.write(all(0..FIRST));
    eventually("the worker notices", || is_held_by(&worker, "outage")).await;
    assert!(shows(&worker, format!("{OUTAGE} 1")));
    flow.write(all(FIRST..FIRST + LATER));
    // What was under way comes to its end; after that there are only probes.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let requests = images.seen().total();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let probes = images.seen().total() - requests;
    assert!((1..=4).contains(&probes), "{probes} requests in three seconds of an outage");
    assert!(is_held_by(&worker, "outage"));
    let status = worker.control.status();
    assert!(status.messages_in_flight < FIRST + LATER, "it went on consuming");
    assert_eq!((status.totals.captions, status.totals.dead_letters), (0, 0));

    images.set("/a.png", picture());
    let answers = flow.until_answered(FIRST + LATER);
    assert_eq!((answers.captioned_ids().len(), answers.dead_letters.len()), (FIRST + LATER, 0));
    eventually("the gate is open again", || shows(&worker, format!("{OUTAGE} 0"))).await;
    assert!(!is_held_by(&worker, "outage"));
    assert!(worker.stop().await.clean());
    assert_eq!(Answers::read(&flow).count(), FIRST + LATER, "each once");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_broken_host_pauses_nobody() {
    let mut flow = flow();
    flow.settings.fetch.backoff = Duration::from_millis(1);
    let images = ImageServer::start_everywhere().await.with("/bad.png", Answer::status(500)).with("/a.png", picture());
    let bad = (0..100).map(|n| from_host(&images, 9, "/bad.png", format!("bad {n}")));
    let good = (0..50).map(|n| from_host(&images, n % 5, "/a.png", n));
    flow.write(bad.chain(good));
    let worker = flow.worker(FakeOptions::default());
    let answers = flow.until_answered(150);
    assert_eq!((answers.captioned_ids().len(), answers.dead_letters.len()), (50, 100));
    let codes = answers.dead_letters.values().flatten().map(|letter| letter.header("blipstream-error-code"));
    assert_eq!(codes.collect::<BTreeSet<_>>(), BTreeSet::from([Some("http_5xx")]));
    // Every fetch had the tries that are its due: none was held.
    assert_eq!(images.seen().requests("/bad.png"), 100 * flow.settings.fetch.attempts as usize);
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_that_are_broken_for_good_do_not_stop_the_worker_for_good() {
    let mut flow = flow();
    flow.settings.fetch.attempts = 2;
    let images = ImageServer::start_everywhere().await.with("/bad.png", Answer::status(500)).with("/a.png", picture());
    let worker = flow.worker(FakeOptions::default());
    // Few, since those that are not in hand when it is noticed stand before the others, and are let in by fours.
    flow.write((0..10).map(|n| from_host(&images, n % 5, "/bad.png", format!("bad {n}"))));
    eventually("five of five hosts fail", || is_held_by(&worker, "outage")).await;
    // Only now others come along.
    flow.write((0..50).map(|n| from_host(&images, 10 + n % 3, "/a.png", n)));
    let answers = flow.until_answered(60);
    assert_eq!((answers.captioned_ids().len(), answers.dead_letters.len()), (50, 10));
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_passes_in_an_outage_too() {
    let flow = flow();
    let images = ImageServer::start_everywhere().await.with("/a.png", Answer::status(503));
    let worker = flow.worker(FakeOptions::default());
    flow.write((0..30).map(|n| from_host(&images, n % 6, "/a.png", n)));
    eventually("the worker notices", || is_held_by(&worker, "outage")).await;
    assert!((1..=30).contains(&worker.stop().await.unfinished));

    let worker = flow.worker(FakeOptions::default());
    let deadline = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(4);
    let url = images.url_at("127.0.0.7", "/a.png");
    let value = json!({"id": "urgent", "image": url, "deadline": deadline.to_string()}).to_string().into_bytes();
    flow.write([NewRecord { key: None, value: Some(value), headers: Vec::new() }]);
    let answers = flow.until_answered(1);
    assert!(jiff::Timestamp::now() >= deadline);
    let (_, letters) = answers.dead_letters.first_key_value().expect("a dead letter");
    assert_eq!(letters[0].header("blipstream-error-code"), Some("deadline"));
    assert_eq!((answers.count(), is_held_by(&worker, "outage")), (1, true));
    assert_eq!(worker.stop().await.unfinished, 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_does_not_wait_for_the_end_of_an_outage_and_the_next_worker_captions_what_was_held() {
    const COUNT: usize = 60;
    let flow = flow();
    let images = ImageServer::start_everywhere().await.with("/a.png", Answer::status(503));
    let worker = flow.worker(FakeOptions::default());
    // One that is well, so that there is an offset to be committed.
    flow.write([request("well", STANDARD.encode(png(12, 9, 7)))]);
    flow.until_answered(1);
    flow.write((0..COUNT).map(|n| from_host(&images, n % 6, "/a.png", n)));
    eventually("the worker notices", || is_held_by(&worker, "outage")).await;
    let began = Instant::now();
    let summary = worker.stop().await;
    assert!(began.elapsed() < flow.settings.flow.drain_timeout / 2, "it took {:?}", began.elapsed());
    assert!(summary.unfinished > 0 && summary.lost.is_empty(), "{summary:?}");
    assert!(Answers::read(&flow).dead_letters.is_empty());

    images.set("/a.png", picture());
    let next = flow.worker(FakeOptions::default());
    let answers = flow.until_answered(COUNT + 1);
    assert_eq!((answers.captioned_ids().len(), answers.dead_letters.len()), (COUNT + 1, 0));
    assert!(next.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_over_the_ceiling_wait_for_their_time_and_good_messages_open_the_gate_again() {
    // 20 a second, and 200 at once.
    const BURST: usize = 200;
    const BAD: usize = BURST + 40;
    let mut flow = flow();
    flow.settings.fetch.attempts = 1;
    flow.settings.fetch.per_host = 64;
    flow.settings.flow.max_dead_letters_per_minute = 1200;
    let images = ImageServer::start_everywhere().await.with("/bad.png", Answer::status(500)).with("/a.png", picture());
    let worker = flow.worker(FakeOptions::default());
    let began = Instant::now();
    // What is the input's fault is not held back, nor does it count.
    flow.write((0..50).map(|n| request(format!("gone {n}"), images.url("/gone.png"))));
    flow.write((0..BAD).map(|n| request(format!("bad {n}"), images.url("/bad.png"))));
    eventually("the worker pauses", || is_held_by(&worker, "dead_letters")).await;
    assert!(shows(&worker, format!("{DEAD_LETTERS} 1")));
    flow.write((0..30).map(|n| request(n, images.url("/a.png"))));
    eventually("the dead letters are written", || worker.control.totals().dead_letters == 50 + BAD as u64).await;
    let least = Duration::from_millis((BAD - BURST) as u64 * 1000 / 20);
    assert!(began.elapsed() >= least, "{BAD} dead letters in {:?}", began.elapsed());
    let answers = flow.until_answered(50 + BAD + 30);
    assert_eq!((answers.captioned_ids().len(), answers.dead_letters.len()), (30, 50 + BAD));
    eventually("the gate is open again", || shows(&worker, format!("{DEAD_LETTERS} 0"))).await;
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_that_wait_for_their_time_are_the_next_workers_when_theirs_ends() {
    let mut flow = flow();
    flow.settings.fetch.attempts = 1;
    flow.settings.flow.max_dead_letters_per_minute = 6;
    let images = ImageServer::start_everywhere().await.with("/a.png", Answer::status(500));
    let worker = flow.worker(FakeOptions::default());
    flow.write((0..20).map(|n| request(n, images.url("/a.png"))));
    eventually("the worker pauses", || is_held_by(&worker, "dead_letters")).await;
    let began = Instant::now();
    let summary = worker.stop().await;
    assert!(began.elapsed() < flow.settings.flow.drain_timeout / 2, "it took {:?}", began.elapsed());
    assert!(summary.unfinished > 0 && summary.lost.is_empty(), "{summary:?}");
    let written = Answers::read(&flow).dead_letters.len();
    assert!((1..=2).contains(&written), "{written} at once");
    images.set("/a.png", picture());
    let next = flow.worker(FakeOptions::default());
    eventually("the next one captions the rest", || Answers::read(&flow).origins().len() == 20).await;
    assert!(next.stop().await.clean());
}
