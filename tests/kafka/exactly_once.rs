//! Exactly once: no reader of committed records sees two results of one origin, and no origin is skipped.

use std::time::Duration;

use blipstream::caption::fake::FakeOptions;
use blipstream::kafka::NewRecord;
use blipstream::settings::Delivery;
use serde_json::Value;

use crate::support::client::eventually;
use crate::support::flow::{Answers, Flow, request};
use crate::support::kafka;
use crate::support::promises::{assert_captioned, assert_no_duplicate, inline, slow};

async fn flow(partitions: i32) -> Option<Flow> {
    Some(Flow::on_kafka(partitions).await?.delivering(Delivery::ExactlyOnce))
}

fn assert_each_once(answers: &Answers, count: usize) {
    assert_captioned(answers, count);
    assert_no_duplicate(answers);
}

fn metric(worker: &crate::support::flow::Worker, name: &str) -> f64 {
    let text = worker.control.metrics().render();
    let line = text.lines().find(|line| line.starts_with(&format!("blipstream_{name} "))).expect("a metric");
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_has_one_result_and_its_offset_is_committed_with_it() {
    const COUNT: usize = 600;
    let Some(flow) = flow(3).await else { return };
    let broken = NewRecord { value: Some(b"{}".to_vec()), ..NewRecord::default() };
    let tombstone = NewRecord { key: Some(b"gone".to_vec()), ..NewRecord::default() };
    flow.write((0..COUNT).map(|n| request(n, inline(n))).chain([broken, tombstone]));
    let worker = flow.worker(slow());
    let answers = flow.until_answered(COUNT + 1);
    eventually("all offsets are committed", || flow.committed().into_iter().flatten().sum::<i64>() == COUNT as i64 + 2)
        .await;
    assert!(metric(&worker, "transaction_seconds_count") >= 1.0);
    let known: i64 =
        worker.control.status().consumer.unwrap().partitions.iter().filter_map(|partition| partition.committed).sum();
    assert_eq!(known, COUNT as i64 + 2, "the status tells what is committed");
    assert!(worker.stop().await.clean());
    assert_each_once(&answers, COUNT);
    assert_eq!(answers.dead_letters.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_in_the_middle_leaves_no_duplicate_and_loses_nothing() {
    const COUNT: usize = 900;
    let Some(mut flow) = flow(3).await else { return };
    let [canary] = kafka::new_topics(&flow.settings.kafka.bootstrap_servers, ["canary"], 3).await;
    flow.settings.kafka.canary_topic = Some(canary.clone());
    (flow.settings.canary.source, flow.settings.canary.share) = (Some("demo".into()), 0.5);
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    for _ in 0..2 {
        let before = Answers::read(&flow).count();
        let killed = flow.process();
        assert!(flow.until_answered(before + 40).count() < COUNT, "the kill came too late to prove anything");
        killed.kill();
    }
    let last = flow.process();
    let answers = flow.until_answered(COUNT);
    assert_eq!(last.terminate(), Some(0));
    assert_each_once(&Answers::read(&flow), COUNT);
    assert_each_once(&answers, COUNT);
    assert_eq!(flow.committed().into_iter().flatten().sum::<i64>(), COUNT as i64);
    // What the canary was to caption is told by the images.
    let captions = answers.captions.values().flatten();
    let chosen = captions.filter(|caption| caption["image"]["sha256"].as_str().unwrap() < "8");
    let mut chosen: Vec<_> = chosen.map(|caption| caption["id"].as_str().unwrap().to_owned()).collect();
    let compared = flow.read(&canary).into_iter().map(|message| {
        let record: Value = serde_json::from_slice(&message.payload.unwrap()).unwrap();
        assert_eq!(record["result"], "equal");
        record["id"].as_str().unwrap().to_owned()
    });
    let mut compared: Vec<_> = compared.collect();
    assert!(compared.len() > COUNT / 4, "{}", compared.len());
    chosen.sort_unstable();
    compared.sort_unstable();
    assert_eq!(compared, chosen);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_come_and_go_leave_no_duplicate() {
    const COUNT: usize = 3000;
    let Some(flow) = flow(4).await else { return };
    // Slow enough that there is work left when the group has settled, some seconds after a worker came or left.
    let slow = || FakeOptions { encode_delay: Duration::from_millis(40), ..FakeOptions::default() };
    let first = flow.worker(slow());
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    flow.until_answered(100);
    let second = flow.worker(slow());
    eventually("both have captioned", || second.control.totals().captions > 50).await;
    assert!(first.stop().await.clean());
    let third = flow.worker(slow());
    assert!(Answers::read(&flow).count() < COUNT, "the workers changed too late to prove anything");
    flow.until_answered(COUNT);
    assert!(second.stop().await.clean());
    assert!(third.stop().await.clean());
    assert_each_once(&Answers::read(&flow), COUNT);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_that_was_idle_for_longer_than_its_time_out_goes_on_and_repeats_nothing() {
    const COUNT: usize = 400;
    let Some(mut flow) = flow(1).await else { return };
    flow.settings.kafka.transaction_timeout = Duration::from_secs(1);
    flow.settings.kafka.transaction_interval = Duration::from_millis(100);
    let worker = flow.worker(slow());
    flow.write((0..COUNT / 2).map(|n| request(n, inline(n))));
    flow.until_answered(COUNT / 2);
    // Nothing to publish for longer than the time-out: an idle producer has no transaction that could time out.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    flow.write((COUNT / 2..COUNT).map(|n| request(n, inline(n))));
    let answers = flow.until_answered(COUNT);
    assert!(worker.stop().await.clean());
    assert_each_once(&answers, COUNT);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_of_one_configured_id_do_not_work_side_by_side() {
    let Some(mut flow) = flow(2).await else { return };
    flow.settings.kafka.transactional_id = Some(flow.settings.kafka.group_id.clone());
    let first = flow.worker(slow());
    flow.write((0..100).map(|n| request(n, inline(n))));
    flow.until_answered(100);
    let second = flow.worker(slow());
    eventually("the second is ready", || second.control.status().consumer.is_some_and(|c| c.joined)).await;
    flow.write((100..400).map(|n| request(n, inline(n))));
    let error = format!("{:#}", first.task.await.unwrap().unwrap_err());
    assert!(error.contains("kafka.transactional_id") && error.contains("every worker needs one of its own"), "{error}");
    let answers = flow.until_answered(400);
    assert!(second.stop().await.clean());
    assert_each_once(&answers, 400);
}
