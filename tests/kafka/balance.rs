//! How the group shares the topics out: each one evenly, whatever the others have.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use blipstream::caption::fake::FakeOptions;
use blipstream::kafka::group_offsets;
use blipstream::settings::{Delivery, Input, RetryTopic};

use crate::support::client::{PATIENCE, eventually};
use crate::support::flow::{Answers, Flow, Worker, request};
use crate::support::images::{Answer, ImageServer, png};
use crate::support::kafka;
use crate::support::promises::{assert_all_captioned, assert_no_duplicate, slow};

const PARTITIONS: usize = 6;

/// A second input, and two retry topics; some of the names sort before those of the requests.
const MORE: [&str; 3] = ["live", "again", "yet-again"];

async fn flow() -> Option<Flow> {
    let mut flow = Flow::on_kafka(PARTITIONS as i32).await?.delivering(Delivery::ExactlyOnce);
    let kafka = &mut flow.settings.kafka;
    let [live, again, yet_again] = kafka::new_topics(&kafka.bootstrap_servers, MORE, PARTITIONS as i32).await;
    kafka.inputs.push(Input { topic: live, weight: 4 });
    kafka.retry_topics = [again, yet_again].map(|topic| RetryTopic { topic, delay: Duration::from_millis(100) }).into();
    flow.settings.fetch.attempts = 1;
    Some(flow)
}

/// The partitions that a worker has of each topic.
fn share(worker: &Worker) -> BTreeMap<String, BTreeSet<i32>> {
    let mut share = BTreeMap::<_, BTreeSet<_>>::new();
    for partition in worker.control.status().consumer.unwrap_or_default().partitions {
        share.entry(partition.topic).or_default().insert(partition.partition);
    }
    share
}

/// Waits until each worker has as much of each input as any other one, and of the retry topics together.
async fn until_even(flow: &Flow, workers: &[&Worker]) {
    let kafka = &flow.settings.kafka;
    let is_even = |worker: &Worker| {
        let share = share(worker);
        let of = |topic: &str| share.get(topic).map_or(0, BTreeSet::len);
        let retries: usize = kafka.retry_topics.iter().map(|retry| of(&retry.topic)).sum();
        kafka.inputs.iter().all(|input| of(&input.topic) == PARTITIONS / workers.len())
            && retries == kafka.retry_topics.len() * PARTITIONS / workers.len()
    };
    eventually("each worker has its share of each topic", || workers.iter().all(|worker| is_even(worker))).await;
}

/// Whether the group is through with so many messages of each input, and of the retry topics with so many at least: there
/// the marks of transactions have offsets, too.
fn is_done(flow: &Flow, each: usize, retries: usize) -> bool {
    let kafka = &flow.settings.kafka;
    let of = |topic| group_offsets(kafka, topic, PATIENCE).unwrap().into_iter().flatten().sum::<i64>() as usize;
    let retried: usize = kafka.retry_topics.iter().map(|retry| of(&retry.topic)).sum();
    kafka.inputs.iter().all(|input| of(&input.topic) == each) && retried >= retries
}

#[tokio::test(flavor = "multi_thread")]
async fn every_worker_has_its_share_of_every_topic_and_what_comes_back_is_captioned_once() {
    const EACH: usize = 60;
    let Some(flow) = flow().await else { return };
    let images = ImageServer::start().await;
    // Every third picture is there at the second try only.
    let flaky = (0..2 * EACH).filter(|n| n % 3 == 0);
    let answers = || vec![Answer::status(503), Answer::Body(png(12, 9, 1))];
    let images = flaky.clone().fold(images, |images, n| images.with_all(&format!("/{n}"), answers()));
    let images = (0..2 * EACH)
        .filter(|n| n % 3 != 0)
        .fold(images, |images, n| images.with(&format!("/{n}"), Answer::Body(png(12, 9, 1))));
    let write = |topic: &str, numbers: std::ops::Range<usize>| {
        flow.write_to(topic, numbers.map(|n| request(n, images.url(&format!("/{n}")))));
    };
    let first = flow.worker(slow());
    until_even(&flow, &[&first]).await;
    let second = flow.worker(slow());
    until_even(&flow, &[&first, &second]).await;
    let third = flow.worker(slow());
    until_even(&flow, &[&first, &second, &third]).await;
    write(flow.requests(), 0..EACH);
    write(&flow.settings.kafka.inputs[1].topic, EACH..2 * EACH);
    flow.until_answered(2 * EACH);
    let retries = flaky.count();
    eventually("everything is committed", || is_done(&flow, EACH, retries)).await;
    let totals = [&first, &second, &third].map(|worker| worker.control.totals().captions);
    assert!(totals.iter().all(|captions| *captions > 0), "{totals:?}");

    assert!(first.stop().await.clean());
    until_even(&flow, &[&second, &third]).await;
    assert!(second.stop().await.clean());
    assert!(third.stop().await.clean());
    let answers = Answers::read(&flow);
    assert_all_captioned(&answers, 2 * EACH);
    assert_no_duplicate(&answers);
    assert!(is_done(&flow, EACH, retries));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_worker_that_comes_back_has_its_share_of_every_topic_again() {
    let Some(mut flow) = flow().await else { return };
    let named = |flow: &mut Flow, name: &str| {
        flow.settings.kafka.group_instance_id = Some(name.into());
        flow.worker(FakeOptions::default())
    };
    let (stays, leaves) = (named(&mut flow, "stays"), named(&mut flow, "leaves"));
    until_even(&flow, &[&stays, &leaves]).await;
    let (kept, had) = (share(&stays), share(&leaves));
    assert!(leaves.stop().await.clean());
    let back = named(&mut flow, "leaves");
    eventually("it has the same again", || share(&back) == had).await;
    assert_eq!(share(&stays), kept);
    until_even(&flow, &[&stays, &back]).await;
    assert!(back.stop().await.clean());
    assert!(stays.stop().await.clean());
}
