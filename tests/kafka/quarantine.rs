//! A message that kills its worker is found, and no other one is blamed.

use std::collections::BTreeSet;
use std::io::Cursor;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blipstream::caption::fake::FakeOptions;
use blipstream::kafka::Consumer;
use blipstream::offsets::{Note, TopicPartition};
use blipstream::settings::{Delivery, Settings};
use tokio::signal::unix::{SignalKind, signal};

use crate::support::client::{PATIENCE, eventually};
use crate::support::flow::{Answers, Flow, request};
use crate::support::promises::{assert_all_captioned, assert_no_duplicate, inline};

/// Names the settings of a worker that this program is to be, instead of a test.
const WORKER: &str = "BLIPSTREAM_TEST_WORKER";
/// The colour of the image that kills.
const DEADLY: [u8; 3] = [250, 1, 2];
const PARTITIONS: i32 = 2;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "no test, but the worker that the tests here start as a process of its own"]
async fn worker_process() {
    let Ok(file) = std::env::var(WORKER) else { return };
    let settings: Settings = toml::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let flow = Flow { broker: None, settings };
    let encode_delay = Duration::from_millis(40);
    let worker = flow.worker(FakeOptions { deadly: Some(DEADLY), encode_delay, ..FakeOptions::default() });
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    let control = worker.control.clone();
    tokio::spawn(async move {
        terminate.recv().await;
        control.drain("SIGTERM");
    });
    assert!(worker.task.await.unwrap().unwrap().clean());
}

/// A worker as a process that may die; killed when dropped.
struct Mortal {
    child: Child,
    _settings: tempfile::NamedTempFile,
}

impl Mortal {
    fn start(flow: &Flow) -> Self {
        let settings = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(settings.path(), toml::to_string(&flow.settings).unwrap()).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "quarantine::worker_process"])
            .env(WORKER, settings.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, _settings: settings }
    }

    /// Whether it died before `done`.
    fn dies_before(&mut self, mut done: impl FnMut() -> bool) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert_eq!(status.code(), None, "it ended, and was not killed");
                return true;
            }
            if done() {
                return false;
            }
            assert!(Instant::now() < deadline, "neither dead nor done in time");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; whether it ended well.
    fn terminate(mut self) -> bool {
        let sent = Command::new("kill").args(["-s", "TERM", &self.child.id().to_string()]).status().unwrap();
        sent.success() && self.child.wait().unwrap().success()
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        // It has ended already, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn on_kafka(delivery: Delivery) -> Option<Flow> {
    let mut flow = Flow::on_kafka(PARTITIONS).await?.delivering(delivery);
    // The next process is the same member of the group: nobody waits for the dead one's session to time out.
    flow.settings.kafka.group_instance_id = Some("mortal".into());
    flow.settings.kafka.transactional_id =
        (delivery == Delivery::ExactlyOnce).then(|| flow.settings.kafka.group_id.clone());
    Some(flow)
}

fn notes(flow: &Flow) -> Vec<Note> {
    let partition = |partition| TopicPartition { topic: flow.requests().into(), partition };
    let partitions: Vec<_> = (0..PARTITIONS).map(partition).collect();
    let committed = Consumer::new(&flow.settings.kafka).unwrap().committed(0, &partitions).unwrap();
    committed
        .into_iter()
        .map(|(_, committed)| committed.map_or_else(Note::default, |committed| committed.note))
        .collect()
}

/// Starts workers until one survives: then one message is a dead letter, and the others are captioned.
fn assert_the_killer_is_found(flow: &mut Flow) -> Answers {
    const COUNT: usize = 60;
    const KILLER: usize = 23;
    flow.settings.flow.max_span = 20;
    let mut picture = Cursor::new(Vec::new());
    let deadly = image::RgbImage::from_pixel(8, 8, image::Rgb(DEADLY));
    deadly.write_to(&mut picture, image::ImageFormat::Png).unwrap();
    let deadly = STANDARD.encode(picture.into_inner());
    flow.write((0..COUNT).map(|n| request(n, if n == KILLER { deadly.clone() } else { inline(n) })));

    let all_answered = |flow: &Flow| Answers::read(flow).origins().len() == COUNT;
    let (mut deaths, mut worker) = (0, Mortal::start(flow));
    while worker.dies_before(|| all_answered(flow)) {
        deaths += 1;
        assert!(deaths < 12, "still dying");
        worker = Mortal::start(flow);
    }
    assert!(worker.terminate());
    assert!(deaths >= 3, "blamed after {deaths} deaths");

    let answers = Answers::read(flow);
    let letters: Vec<_> = answers.dead_letters.values().flatten().collect();
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!(letters[0].key.as_deref(), Some(KILLER.to_string().as_bytes()));
    assert_eq!(letters[0].header("blipstream-error-code"), Some("quarantined"));
    assert_eq!(letters[0].header("blipstream-stage"), Some("consume"));
    let innocent: BTreeSet<String> = (0..COUNT).filter(|n| *n != KILLER).map(|n| n.to_string()).collect();
    assert_eq!(answers.captioned_ids().into_iter().map(str::to_owned).collect::<BTreeSet<_>>(), innocent);
    assert_eq!(notes(flow), [Note::default(); PARTITIONS as usize], "the last one ended in order");
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_kills_its_worker_is_found_on_the_embedded_broker() {
    let mut flow = Flow::start(PARTITIONS);
    flow.settings.kafka.session_timeout = Duration::from_millis(1500);
    assert_the_killer_is_found(&mut flow);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_kills_its_worker_is_found_at_least_once() {
    let Some(mut flow) = on_kafka(Delivery::AtLeastOnce).await else { return };
    assert_the_killer_is_found(&mut flow);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_kills_its_worker_is_found_exactly_once() {
    let Some(mut flow) = on_kafka(Delivery::ExactlyOnce).await else { return };
    assert_no_duplicate(&assert_the_killer_is_found(&mut flow));
}

/// Kills workers that were getting on, more often than would make them suspect: nothing is blamed for it.
async fn assert_kills_blame_nothing(flow: &Flow) {
    const COUNT: usize = 1500;
    const KILLS: usize = 4;
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    let mut last = flow.committed();
    for _ in 0..KILLS {
        let worker = Mortal::start(flow);
        // Every partition gets on: a kill counts where it found one that did not.
        let beyond =
            |now: &[Option<i64>]| now.iter().zip(&last).all(|(now, last)| now.unwrap_or(0) > last.unwrap_or(0));
        let mut now = flow.committed();
        eventually("all partitions get on", || {
            now = flow.committed();
            beyond(&now)
        })
        .await;
        worker.kill();
        last = flow.committed();
        assert!(last.iter().flatten().sum::<i64>() < COUNT as i64, "the kill came too late to prove anything");
        assert!(notes(flow).iter().all(|note| note.starts <= 1 && !note.alone), "{:?}", notes(flow));
    }
    let worker = Mortal::start(flow);
    eventually("all is committed", || flow.committed().iter().flatten().sum::<i64>() == COUNT as i64).await;
    assert!(worker.terminate());
    assert_all_captioned(&Answers::read(flow), COUNT);
    assert_eq!(notes(flow), [Note::default(); PARTITIONS as usize]);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_are_killed_while_they_get_on_blame_nothing_at_least_once() {
    let Some(flow) = on_kafka(Delivery::AtLeastOnce).await else { return };
    assert_kills_blame_nothing(&flow).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_are_killed_while_they_get_on_blame_nothing_exactly_once() {
    let Some(flow) = on_kafka(Delivery::ExactlyOnce).await else { return };
    assert_kills_blame_nothing(&flow).await;
    assert_no_duplicate(&Answers::read(&flow));
}
