//! Promises of delivery that hold on every broker.

use std::collections::BTreeSet;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blipstream::caption::fake::FakeOptions;

use super::client::eventually;
use super::flow::{Answers, Flow, Process, request};
use super::images::png;

/// A small picture as inline data; of 256 kinds.
pub fn inline(seed: usize) -> String {
    STANDARD.encode(png(12, 9, seed as u8))
}

/// An engine that leaves a test time to interfere.
pub fn slow() -> FakeOptions {
    FakeOptions { encode_delay: Duration::from_millis(5), ..FakeOptions::default() }
}

/// The ids from 0 to `count`, and no others, have captions.
pub fn assert_captioned(answers: &Answers, count: usize) {
    let captioned: BTreeSet<String> = answers.captioned_ids().into_iter().map(str::to_owned).collect();
    let ids: BTreeSet<String> = (0..count).map(|n| n.to_string()).collect();
    assert_eq!(captioned, ids, "ids in and ids out differ");
}

/// The same, and nothing failed.
pub fn assert_all_captioned(answers: &Answers, count: usize) {
    assert_captioned(answers, count);
    assert!(answers.dead_letters.is_empty());
}

pub fn assert_no_duplicate(answers: &Answers) {
    let twice: Vec<_> = answers.captions.iter().filter(|(_, records)| records.len() > 1).map(|(o, _)| o).collect();
    assert!(twice.is_empty(), "captioned twice: {twice:?}");
}

/// Kills a worker in the middle of `count` requests and starts another one, which is returned. Nothing is lost, and no
/// partition repeats more than `flow.max_span`.
pub async fn assert_a_kill_loses_nothing(flow: &Flow, partitions: usize, count: usize) -> Process {
    flow.write((0..count).map(|n| request(n, inline(n))));
    let killed = flow.process();
    flow.until_written(40);
    killed.kill();
    assert!(Answers::read(flow).count() < count, "the kill came too late to prove anything");
    let second = flow.process();
    let mut answers = Answers::read(flow);
    eventually("every id is captioned", || {
        answers = Answers::read(flow);
        answers.captioned_ids().len() == count
    })
    .await;
    assert_all_captioned(&answers, count);
    let (duplicates, most) = (answers.count() - count, partitions * flow.settings.flow.max_span as usize);
    assert!(duplicates <= most, "{duplicates} duplicates are more than max_span for each of {partitions} partitions");
    second
}

/// Two workers share four partitions, one leaves in order, and the other one ends what is left: no loss, no duplicate.
pub async fn assert_a_worker_that_leaves_leaves_no_duplicate(flow: &Flow, count: usize) {
    let (first, second) = (flow.worker(slow()), flow.worker(slow()));
    let partitions = |w: &super::flow::Worker| w.control.status().consumer.map_or(0, |c| c.partitions.len());
    eventually("both have partitions", || partitions(&first) == 2 && partitions(&second) == 2).await;
    flow.write((0..count).map(|n| request(n, inline(n))));
    eventually("both have captioned", || first.control.totals().captions > 50 && second.control.totals().captions > 50)
        .await;
    let left = first.stop().await;
    assert!(left.clean());
    assert!((left.totals.captions as usize) < count, "the worker left too late to prove anything");
    let answers = flow.until_answered(count);
    assert!(second.stop().await.clean());
    assert_all_captioned(&answers, count);
    assert_no_duplicate(&answers);
    assert_eq!(answers.count(), count);
}
