//! What failed for a reason that may pass comes back later, in its own time, and is a dead letter only in the end.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blipstream::caption::fake::FakeOptions;
use blipstream::settings::RetryTopic;

use crate::support::client::eventually;
use crate::support::flow::{Answers, Flow, RETRIES, request};
use crate::support::images::{Answer, ImageServer, png};

/// A flow with two retry topics.
fn flow(delays: [u64; 2]) -> Flow {
    let mut flow = Flow::start(2);
    flow.settings.fetch.attempts = 1;
    let topic = |(topic, ms): (&&str, u64)| RetryTopic { topic: (*topic).into(), delay: Duration::from_millis(ms) };
    flow.settings.kafka.retry_topics = RETRIES.iter().zip(delays).map(topic).collect();
    flow
}

/// 503 for so many requests, then a picture.
fn first_away(requests: usize) -> Vec<Answer> {
    let mut answers = vec![Answer::status(503); requests];
    answers.push(Answer::Body(png(20, 20, 1)));
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_recovers_costs_a_delay_and_no_dead_letter() {
    let flow = flow([700, 60_000]);
    let images = ImageServer::start().await;
    let images = images.with_all("/flaky", vec![Answer::status(503), Answer::Body(png(20, 20, 1))]);
    let worker = flow.worker(FakeOptions::default());
    let began = Instant::now();
    flow.write([request("late", images.url("/flaky"))]);
    let answers = flow.until_answered(1);
    assert!(began.elapsed() >= Duration::from_millis(700), "it came back before its time");
    let (origin, records) = answers.captions.first_key_value().expect("a caption");
    assert_eq!(records[0]["id"], "late");
    assert!(origin.starts_with("requests/"), "{origin}: it keeps the place where it was first consumed");
    let retried = &flow.read(RETRIES[0])[0];
    assert_eq!(retried.header("blipstream-error-code"), Some("http_5xx"));
    assert_eq!(retried.header("blipstream-origin"), Some(origin.as_str()));
    assert_eq!(retried.key.as_deref(), Some(&b"late"[..]));
    assert!(worker.stop().await.clean());
    assert!(Answers::read(&flow).dead_letters.is_empty() && flow.read(RETRIES[1]).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_never_recovers_passes_every_retry_topic_and_is_one_dead_letter() {
    let flow = flow([300, 600]);
    let images = ImageServer::start().await.with("/down", Answer::status(500));
    flow.write([request("down", images.url("/down"))]);
    let worker = flow.worker(FakeOptions::default());
    let answers = flow.until_answered(1);
    let (_, letters) = answers.dead_letters.first_key_value().expect("a dead letter");
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].header("blipstream-error-code"), Some("http_5xx"));
    assert_eq!(letters[0].header("blipstream-attempts"), Some("3"), "the tries of all its lives");
    assert_eq!(letters[0].header("blipstream-not-before"), None);
    assert_eq!((flow.read(RETRIES[0]).len(), flow.read(RETRIES[1]).len()), (1, 1));
    let first = |message: &blipstream::message::Message| {
        message.header("blipstream-first-failed-at").expect("a time").to_owned()
    };
    assert_eq!(first(&flow.read(RETRIES[1])[0]), first(&letters[0]), "when it failed first is kept");
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_wait_for_their_time_hold_up_nobody_and_survive_their_worker() {
    let mut flow = flow([3_000, 60_000]);
    // Each of them is away once.
    flow.settings.fetch.share = false;
    let images = ImageServer::start().await;
    let images = images.with_all("/away", first_away(20));
    flow.write((0..20).map(|n| request(format!("late-{n}"), images.url("/away"))));
    let worker = flow.worker(FakeOptions::default());
    eventually("all of them wait", || flow.read(RETRIES[0]).len() == 20).await;
    let inline = STANDARD.encode(png(12, 9, 7));
    flow.write((0..50).map(|n| request(n, &inline)));
    let answers = flow.until_answered(50);
    assert!(answers.captioned_ids().iter().all(|id| !id.starts_with("late")), "the others did not wait");
    assert!(worker.stop().await.clean());
    let next = flow.worker(FakeOptions::default());
    let answers = flow.until_answered(70);
    assert_eq!(answers.captioned_ids().len(), 70);
    assert!(next.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_hangs_delays_only_its_own_messages_and_is_soon_left_alone() {
    const HANGING: usize = 400;
    let mut flow = flow([60_000, 60_000]);
    flow.settings.fetch.breaker_failures = 5;
    flow.settings.fetch.per_host = 2;
    flow.settings.fetch.read_timeout = Duration::from_millis(200);
    flow.settings.fetch.connect_timeout = Duration::from_millis(200);
    // What is being looked at is one host among others, not the worker's surroundings.
    flow.settings.fetch.outage_window = Duration::ZERO;
    // Its messages fill all the places that there are, several times over.
    flow.settings.flow.max_messages = 100;
    let images = ImageServer::start_everywhere().await;
    let images = images.with("/hangs", Answer::Silence).with("/good", Answer::Body(png(20, 20, 1)));
    flow.write((0..HANGING).map(|n| request(format!("hanging-{n}"), images.url("/hangs"))));
    flow.write((0..50).map(|n| request(n, images.url_at("127.0.0.9", "/good"))));
    let worker = flow.worker(FakeOptions::default());
    let answers = flow.until_answered(50);
    assert!(answers.captioned_ids().iter().all(|id| !id.starts_with("hanging")));
    eventually("all of them are put off", || flow.read(RETRIES[0]).len() == HANGING).await;
    let asked = images.seen().requests("/hangs");
    assert!((5..20).contains(&asked), "the host was asked {asked} times");
    for message in flow.read(RETRIES[0]) {
        assert_eq!(message.header("blipstream-error-code"), Some("timeout"));
    }
    let metrics = worker.control.metrics().render();
    assert!(metrics.contains("blipstream_fetch_hosts_left_alone 1"), "{metrics}");
    assert!(worker.stop().await.clean());
    assert!(Answers::read(&flow).dead_letters.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permanent_failure_and_a_deadline_that_comes_first_are_dead_letters_at_once() {
    let flow = flow([60_000, 60_000]);
    let images = ImageServer::start().await.with("/gone", Answer::status(404)).with("/down", Answer::status(500));
    let deadline = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(30);
    let mut urgent = request("urgent", images.url("/down"));
    let value = serde_json::json!({"id": "urgent", "image": images.url("/down"), "deadline": deadline.to_string()});
    urgent.value = Some(value.to_string().into_bytes());
    flow.write([request("gone", images.url("/gone")), urgent]);
    let worker = flow.worker(FakeOptions::default());
    let answers = flow.until_answered(2);
    assert_eq!(answers.dead_letters.len(), 2);
    assert!(worker.stop().await.clean());
    assert!(flow.read(RETRIES[0]).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_that_is_far_away_delays_a_record_by_no_more_than_its_topics_delay() {
    let flow = flow([500, 60_000]);
    let mut far = request("far", STANDARD.encode(png(12, 9, 3)));
    far.headers.push(("blipstream-not-before".into(), Some("2999-01-01T00:00:00Z".into())));
    flow.write_to(RETRIES[0], [far]);
    let worker = flow.worker(FakeOptions::default());
    let answers = flow.until_answered(1);
    assert!(answers.captioned_ids().contains("far"));
    assert!(worker.stop().await.clean());
}
