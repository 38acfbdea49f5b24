//! Partitions that move between workers: who pauses goes on pausing, what is in flight is finished first, and what an
//! earlier owner finishes late moves nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use blipstream::caption::fake::FakeOptions;
use blipstream::kafka::{NewRecord, write_records};
use blipstream::settings::Delivery;
use blipstream::stage::consume::ConsumeStatus;
use tokio_util::sync::CancellationToken;

use crate::support::client::{PATIENCE, eventually};
use crate::support::flow::{Answers, Flow, Worker, request};
use crate::support::images::{Answer, ImageServer, png};
use crate::support::promises::{assert_all_captioned, assert_no_duplicate, inline, slow};

/// The series that a partition of a worker has.
const SERIES: [&str; 3] = ["kafka_consumer_lag", "kafka_committed_offset", "kafka_incomplete_offsets"];

fn consumer(worker: &Worker) -> ConsumeStatus {
    worker.control.status().consumer.unwrap_or_default()
}

/// The partitions of a worker.
fn partitions(worker: &Worker) -> BTreeSet<i32> {
    consumer(worker).partitions.iter().map(|partition| partition.partition).collect()
}

/// What a worker tells of each partition under this name.
fn series(worker: &Worker, name: &str) -> BTreeMap<i32, i64> {
    let text = worker.control.render_metrics();
    let lines = text.lines().filter_map(|line| line.strip_prefix(&format!("blipstream_{name}{{"))?.split_once("} "));
    let pairs = lines.map(|(labels, value)| {
        let partition = labels.split(',').find_map(|label| label.strip_prefix("partition=\"")).unwrap();
        (partition.trim_end_matches('"').parse().unwrap(), value.parse().unwrap())
    });
    pairs.collect()
}

fn lag(worker: &Worker) -> i64 {
    series(worker, "kafka_consumer_lag").values().sum()
}

/// Waits until a worker has so many partitions, and shows what it has of each, and nothing of any other one.
async fn until_it_has(worker: &Worker, count: usize) -> BTreeSet<i32> {
    eventually("partitions have moved", || partitions(worker).len() == count).await;
    let has = partitions(worker);
    for name in SERIES {
        let shown = || series(worker, name).into_keys().collect::<BTreeSet<_>>();
        eventually(name, || shown() == has).await;
    }
    has
}

fn named(flow: &mut Flow, name: &str) {
    flow.settings.kafka.group_instance_id = Some(name.into());
}

fn numbered(numbers: std::ops::Range<usize>) -> impl Iterator<Item = NewRecord> {
    numbers.map(|n| request(n, inline(n)))
}

fn committed(flow: &Flow) -> i64 {
    flow.committed().into_iter().flatten().sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_worker_that_comes_back_in_time_has_its_partitions_again_and_the_others_notice_nothing() {
    let Some(mut flow) = Flow::on_kafka(4).await else { return };
    named(&mut flow, "stays");
    let stays = flow.worker(FakeOptions::default());
    flow.write(numbered(0..100));
    eventually("all are committed", || committed(&flow) == 100).await;
    named(&mut flow, "comes back");
    let killed = flow.process();
    let kept = until_it_has(&stays, 2).await;
    flow.write(numbered(100..200));
    eventually("both work", || committed(&flow) == 200).await;
    let rebalances = consumer(&stays).rebalances;

    killed.kill();
    let mut written = 200;
    // After a kill, and after an end in order.
    for _ in 0..2 {
        let back = flow.worker(FakeOptions::default());
        let got = until_it_has(&back, 2).await;
        assert!(got.is_disjoint(&kept), "{got:?} {kept:?}");
        flow.write(numbered(written..written + 100));
        written += 100;
        eventually("both work", || committed(&flow) == written as i64).await;
        assert!(back.stop().await.clean());
    }
    assert_eq!((consumer(&stays).rebalances, partitions(&stays)), (rebalances, kept));
    assert!(stays.stop().await.clean());
    let answers = Answers::read(&flow);
    assert_all_captioned(&answers, written);
    assert_no_duplicate(&answers);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_workers_of_one_name_the_first_ends_and_says_which_setting_is_wrong() {
    let Some(mut flow) = Flow::on_kafka(2).await else { return };
    named(&mut flow, "twin");
    let first = flow.worker(FakeOptions::default());
    eventually("the first works", || partitions(&first).len() == 2).await;
    let second = flow.worker(FakeOptions::default());
    let error = tokio::time::timeout(PATIENCE, first.task).await.unwrap().unwrap().unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("kafka.group_instance_id") && error.contains("a name of its own"), "{error}");
    flow.write(numbered(0..10));
    assert_all_captioned(&flow.until_answered(10), 10);
    assert!(second.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_worker_stays_paused_for_what_it_keeps_and_what_it_gets_and_its_lag_grows_by_what_is_written() {
    let Some(flow) = Flow::on_kafka(4).await else { return };
    let paused = flow.worker(FakeOptions::default());
    flow.write(numbered(0..20));
    eventually("all are committed", || committed(&flow) == 20).await;
    paused.control.pause();
    flow.write(numbered(20..60));
    eventually("the lag has grown", || lag(&paused) == 40).await;

    let other = flow.worker(FakeOptions::default());
    let kept = until_it_has(&paused, 2).await;
    let share = |kept: &BTreeSet<i32>| {
        let requests = flow.read(flow.requests());
        requests.iter().skip(20).filter(|message| !kept.contains(&message.partition)).count()
    };
    until_it_has(&other, 2).await;
    eventually("the other one captions what it has", || lag(&other) == 0).await;
    let others = other.control.totals().captions;
    assert!((1..40).contains(&others), "{others} of {}", share(&kept));
    assert_eq!(lag(&paused), 40 - others as i64);
    assert!(other.stop().await.clean());

    until_it_has(&paused, 4).await;
    flow.write(numbered(60..100));
    eventually("the lag has grown", || lag(&paused) == 80 - others as i64).await;
    assert!(consumer(&paused).partitions.iter().all(|partition| partition.paused));
    assert_eq!((paused.control.totals().captions, paused.control.status().state), (20, "paused"));

    paused.control.resume();
    assert_all_captioned(&flow.until_answered(100), 100);
    eventually("nothing is left", || lag(&paused) == 0 && committed(&flow) == 100).await;
    assert!(paused.stop().await.clean());
    assert_no_duplicate(&Answers::read(&flow));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_moves_when_what_is_in_flight_of_it_is_published_and_committed() {
    let Some(mut flow) = Flow::on_kafka(4).await else { return };
    // Whoever shares this machine may slow the drain.
    flow.settings.kafka.revoke_drain = PATIENCE;
    let slow = || FakeOptions { encode_delay: Duration::from_millis(40), ..FakeOptions::default() };
    let first = flow.worker(slow());
    // There is always something in flight, however fast this machine is.
    let enough = CancellationToken::new();
    let _however_this_ends = enough.clone().drop_guard();
    let writing = tokio::task::spawn_blocking({
        let (kafka, topic) = (flow.settings.kafka.clone(), flow.requests().to_owned());
        let (enough, captions) = (enough.clone(), first.control.clone());
        move || {
            let mut written = 0;
            while !enough.is_cancelled() {
                // All that is missing at once: the slower the brokers are, the more it is.
                let wanted = captions.totals().captions as usize + 500;
                if written + 100 <= wanted {
                    written += write_records(&kafka, &topic, numbered(written..wanted), PATIENCE).unwrap();
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            written
        }
    });
    eventually("the first works", || first.control.totals().captions > 50).await;
    eventually("there is something to drain", || first.control.status().messages_in_flight > 100).await;
    let second = flow.worker(slow());
    until_it_has(&second, 2).await;
    until_it_has(&first, 2).await;
    eventually("both work", || second.control.totals().captions > 50).await;
    enough.cancel();
    let written = writing.await.unwrap();
    flow.until_answered(written);
    assert!(second.stop().await.clean());
    assert!(first.stop().await.clean());
    let answers = Answers::read(&flow);
    assert_all_captioned(&answers, written);
    assert_no_duplicate(&answers);
}

/// Two partitions whose first message hangs for who asks first; the rest of them does not. One of them moves after the
/// bound of the drain, and its new owner goes on to its end. Then the first owner finishes.
async fn assert_a_late_completion_moves_nothing(delivery: Delivery) {
    let Some(flow) = Flow::on_kafka(2).await else { return };
    let mut flow = flow.delivering(delivery);
    flow.settings.kafka.revoke_drain = Duration::from_millis(500);
    let answers = || vec![Answer::Held(Box::new(Answer::Body(png(9, 9, 1)))), Answer::Body(png(9, 9, 1))];
    let images = ImageServer::start().await.with_all("/0", answers()).with_all("/1", answers());
    // Java's hash puts them into the partitions 0 and 1, see `interop`.
    let keys = ["21", "a-little-bit-longer-string"];
    let write = |numbers: std::ops::Range<usize>, partitions: &BTreeSet<i32>| {
        let records = numbers.flat_map(|n| partitions.iter().map(move |partition| (n, *partition as usize)));
        flow.write(records.map(|(n, partition)| {
            let image = if n == 0 { images.url(&format!("/{partition}")).to_string() } else { inline(n) };
            NewRecord { key: Some(keys[partition].into()), ..request(format!("{partition}-{n}"), image) }
        }));
    };
    write(0..10, &[0, 1].into());
    let first = flow.worker(slow());
    images.until(|seen| seen.requests("/0") == 1 && seen.requests("/1") == 1).await;
    let second = flow.worker(slow());
    let moved = until_it_has(&second, 1).await;
    let at = *moved.first().unwrap() as usize;
    eventually("the new owner goes on", || flow.committed()[at] == Some(10)).await;
    write(10..15, &moved);
    eventually("the new owner goes on", || flow.committed()[at] == Some(15)).await;
    assert_ne!(flow.committed()[1 - at], Some(10), "the first owner has nothing left to finish");

    images.open_gate();
    let mut ends = [Some(10); 2];
    ends[at] = Some(15);
    eventually("the first owner has finished", || flow.committed() == ends).await;
    assert!(first.stop().await.clean());
    assert_eq!(flow.committed(), ends);
    assert!(second.stop().await.clean());
    assert_eq!(flow.committed(), ends);
    let answers = Answers::read(&flow);
    assert_eq!(answers.captions.len(), 25);
    if delivery == Delivery::ExactlyOnce {
        assert_no_duplicate(&answers);
    } else {
        // What was captioned behind the hanging one was not committed when the bound was reached.
        let twice: Vec<_> = answers.captions.iter().filter(|(_, records)| records.len() > 1).collect();
        assert!(twice.iter().all(|(origin, _)| origin.contains(&format!("/{at}/"))), "{twice:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_finished_after_its_partition_went_to_another_worker_moves_no_offset() {
    assert_a_late_completion_moves_nothing(Delivery::AtLeastOnce).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_finished_after_its_partition_went_to_another_worker_is_not_published_in_a_transaction() {
    assert_a_late_completion_moves_nothing(Delivery::ExactlyOnce).await;
}
