//! Nothing is lost: kills, drains, rebalances, slow neighbours, broken devices.

use std::time::{Duration, Instant};

use blipstream::caption::fake::FakeOptions;
use blipstream::pipeline::worker::OVERTIME;

use crate::support::client::eventually;
use crate::support::flow::{Answers, Flow, request};
use crate::support::images::{Answer, ImageServer, jpeg};
use crate::support::promises::{
    assert_a_kill_loses_nothing, assert_a_worker_that_leaves_leaves_no_duplicate, assert_all_captioned,
    assert_no_duplicate, inline, slow,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_in_the_middle_and_restarted_loses_nothing() {
    let mut flow = Flow::start(3);
    flow.settings.flow.max_span = 50;
    let second = assert_a_kill_loses_nothing(&flow, 3, 1000).await;
    assert_eq!(second.terminate(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn drain_on_sigterm_leaves_no_duplicate() {
    const COUNT: usize = 1000;
    let mut flow = Flow::start(3);
    // What is in flight is answered; there is more than that.
    flow.settings.flow.max_messages = 100;
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    let first = flow.process();
    flow.until_written(20);
    assert_eq!(first.terminate(), Some(0));
    assert!(Answers::read(&flow).count() < COUNT, "the signal came too late to prove anything");
    let second = flow.process();
    let answers = flow.until_answered(COUNT);
    assert_all_captioned(&answers, COUNT);
    assert_no_duplicate(&answers);
    assert_eq!(second.terminate(), Some(0));
    assert_eq!(flow.committed().into_iter().flatten().sum::<i64>(), COUNT as i64);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigint_drains_too() {
    const COUNT: usize = 200;
    let flow = Flow::start(1);
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    let worker = flow.process();
    flow.until_answered(10);
    worker.signal("INT");
    assert_eq!(worker.end(), Some(0));
    let answers = Answers::read(&flow);
    assert_no_duplicate(&answers);
    assert_eq!(flow.committed(), [Some(answers.count() as i64)], "what is answered is committed, and nothing else");
}

/// A flow of ten requests, of which the one with this number never gets an answer from its host.
async fn hanging_at(hanging: usize) -> (Flow, ImageServer) {
    let mut flow = Flow::start(1);
    flow.settings.fetch.read_timeout = Duration::from_secs(600);
    flow.settings.fetch.total_timeout = Duration::from_secs(600);
    let images = ImageServer::start().await.with("/silence", Answer::Silence);
    let image = |n: usize| if n == hanging { images.url("/silence").to_string() } else { inline(n) };
    flow.write((0..10).map(|n| request(n, image(n))));
    (flow, images)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_stops_at_once() {
    let (mut flow, _images) = hanging_at(4).await;
    flow.settings.flow.drain_timeout = Duration::from_secs(600);
    let worker = flow.process();
    flow.until_answered(9);
    worker.signal("TERM");
    worker.signal("INT");
    assert_eq!(worker.end(), Some(1));
    assert!(flow.committed()[0].unwrap_or_default() <= 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_is_not_finished_in_time_ends_all_the_same_and_commits_nothing_past_what_hangs() {
    let (mut flow, _images) = hanging_at(4).await;
    flow.settings.flow.drain_timeout = Duration::from_millis(500);
    let worker = flow.process();
    flow.until_answered(9);
    let began = Instant::now();
    assert_eq!(worker.terminate(), Some(1));
    // Another second for the admin port, and one for a busy machine.
    let most = flow.settings.flow.drain_timeout + OVERTIME + Duration::from_secs(2);
    assert!(began.elapsed() < most, "{:?}", began.elapsed());
    assert_eq!(flow.committed(), [Some(4)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publisher_that_cannot_start_says_why() {
    let mut flow = Flow::start(1);
    // The configuration refuses this; librdkafka does, too, and only of a producer.
    flow.settings.kafka.linger = Duration::from_secs(1_000_000);
    let error = flow.worker(FakeOptions::default()).task.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("linger.ms"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_share_the_partitions_and_one_leaves() {
    assert_a_worker_that_leaves_leaves_no_duplicate(&Flow::start(4), 2000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn offsets_committed_never_pass_an_unresolved_message() {
    let flow = Flow::start(1);
    let images = ImageServer::start().await;
    let images = images.with("/held", Answer::Held(Box::new(Answer::Body(jpeg(20, 20, 1)))));
    let requests = (0..60).map(|n| request(n, if n == 7 { images.url("/held").to_string() } else { inline(n) }));
    flow.write(requests);
    let worker = flow.worker(FakeOptions::default());
    eventually("all others are captioned", || worker.control.totals().captions == 59).await;
    eventually("what can be committed is", || flow.committed() == [Some(7)]).await;
    // Several commit intervals later it still stands before the message that hangs.
    tokio::time::sleep(flow.settings.kafka.commit_interval * 4).await;
    assert_eq!(flow.committed(), [Some(7)]);
    images.open_gate();
    eventually("the rest is committed", || flow.committed() == [Some(60)]).await;
    assert!(worker.stop().await.clean());
    assert_no_duplicate(&Answers::read(&flow));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_breaks_gives_its_rows_to_the_others() {
    const COUNT: usize = 300;
    let flow = Flow::start(1);
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    // The second device fails on everything from its third batch on, the probe included.
    let broken = FakeOptions { failing_calls: (3..10_000).collect(), ..slow() };
    let worker = flow.worker_on(vec![slow(), broken]);
    let answers = flow.until_answered(COUNT);
    let status = worker.control.status();
    assert_eq!(status.devices.iter().filter(|device| device.alive).count(), 1);
    let metrics = worker.control.render_metrics();
    assert!(metrics.contains("blipstream_device_up{device=\"cpu#0\"} 1"), "{metrics}");
    assert!(metrics.contains("blipstream_device_up{device=\"cpu#1\"} 0"), "{metrics}");
    assert!(worker.stop().await.clean());
    assert_all_captioned(&answers, COUNT);
    assert_no_duplicate(&answers);
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_of_different_speeds_share_the_work_and_a_quick_one_does_more_than_a_slow_one() {
    const COUNT: usize = 1500;
    let flow = Flow::start(1);
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    // From 8 to 64 milliseconds a batch: the first is eight times as quick as the last.
    let device = |n: u64| FakeOptions { encode_delay: Duration::from_millis(8 * n), ..FakeOptions::default() };
    let worker = flow.worker_on((1..=8).map(device).collect());
    let answers = flow.until_answered(COUNT);
    let metrics = worker.control.render_metrics();
    let captions = |n: usize| -> usize {
        let name = format!("blipstream_captions_total{{device=\"cpu#{n}\",model=\"fake\"}} ");
        metrics.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
    };
    let each: Vec<_> = (0..8).map(captions).collect();
    assert_eq!(each.iter().sum::<usize>(), COUNT, "{each:?}");
    assert!(each.iter().all(|captions| *captions > 0), "a device had nothing to do: {each:?}");
    assert!(each[0] > 2 * each[7], "the quick one waited for the slow one: {each:?}");
    assert!(worker.stop().await.clean());
    assert_all_captioned(&answers, COUNT);
    assert_no_duplicate(&answers);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_device_the_worker_stops_and_the_next_one_captions_everything() {
    const COUNT: usize = 100;
    let flow = Flow::start(1);
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    let worker = flow.worker(FakeOptions { failing_calls: (3..10_000).collect(), ..slow() });
    let error = worker.task.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("no device is left"), "{error}");
    let next = flow.worker(slow());
    let answers = flow.until_answered(COUNT);
    eventually("every id is captioned", || Answers::read(&flow).captioned_ids().len() == COUNT).await;
    assert!(next.stop().await.clean());
    // What the broken worker had published behind an unfinished message may come twice: at least once is the promise.
    assert!(answers.dead_letters.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisonous_image_is_dead_lettered_alone_and_a_full_memory_halves_the_batches() {
    let flow = Flow::start(1);
    let images = ImageServer::start().await;
    let red = image_of([255, 0, 0]);
    let images = images.with("/red", Answer::Body(red)).with("/good", Answer::Body(image_of([1, 2, 3])));
    let name = |n: usize| if n == 11 { "/red" } else { "/good" };
    flow.write((0..40).map(|n| request(n, images.url(name(n)))));
    let options = FakeOptions { poison: Some([255, 0, 0]), memory_for: 3, ..slow() };
    let worker = flow.worker(options);
    let answers = flow.until_answered(40);
    let batch = worker.control.status().devices[0].batch_size;
    assert!(batch <= 3, "batches of {batch} do not fit");
    assert!(worker.stop().await.clean());
    assert_eq!(answers.captions.len(), 39);
    let letter = &answers.dead_letters["requests/0/11"][0];
    assert_eq!(letter.header("blipstream-error-code"), Some("inference"));
}

fn image_of(colour: [u8; 3]) -> Vec<u8> {
    let picture = image::RgbImage::from_pixel(16, 16, image::Rgb(colour));
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}
