//! Each trick beside messages that mean no harm, on a worker as a process of its own.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use crate::support::flow::{Answers, CAPTIONS, Counter, DEAD_LETTERS, Flow, Process, request};
use crate::support::images::{Answer, ImageServer, png};
use crate::support::tls::AUTHORITY;
use crate::tricks::{self, Trick};
use crate::{TURN, record, recording};

/// Messages beside a trick.
const NEIGHBOURS: usize = 20;
/// Where their pictures are.
const NEIGHBOURS_HOST: &str = "127.0.0.3";
/// Most memory that a trick may take of a worker, beyond what it had: the picture of 64 million pixels is the largest.
const MEMORY: u64 = 400 << 20;

/// What a trick did.
struct Effect {
    /// Until its last message was answered.
    time: Duration,
    /// Most memory beyond what the worker had before, in bytes.
    memory: u64,
    /// Until its neighbours were captioned.
    neighbours: Duration,
}

#[tokio::test(flavor = "multi_thread")]
async fn every_trick_ends_as_its_dead_letter_and_harms_no_neighbour() {
    let _turn = TURN.lock().await;
    let mut flow = Flow::start(1);
    if recording() {
        let networks = flow.settings.fetch.allow_networks.clone();
        flow.settings.fetch = blipstream::settings::Fetch { allow_networks: networks, ..Default::default() };
    } else {
        flow.settings.fetch.connect_timeout = Duration::from_secs(1);
        flow.settings.fetch.read_timeout = Duration::from_secs(1);
        flow.settings.fetch.total_timeout = Duration::from_secs(3);
        flow.settings.fetch.attempts = 2;
    }
    let server = ImageServer::start_everywhere().await;
    for number in 0..NEIGHBOURS {
        server.set(&format!("/good-{number}.png"), Answer::Body(png(300, 200, number as u8)));
    }
    let tricks = tricks::all(&server);
    let worker = flow.process_with(&[("SSL_CERT_FILE", AUTHORITY)]);
    let mut stage = Stage { flow: &flow, worker: &worker, server: &server, counter: flow.counter(), asked: 0 };
    // The first one warms the worker up.
    let calm = Trick { what: "nothing", images: Vec::new(), code: None };
    stage.play(&calm);
    let baseline = (0..3).map(|_| stage.play(&calm).neighbours).max().unwrap();
    let mut table = String::from(
        "| what the server does | messages | end as | after | memory | 20 neighbours are captioned within |\n\
         |---|---:|---|---:|---:|---:|\n",
    );
    for trick in &tricks {
        let effect = stage.play(trick);
        assert!(effect.memory < MEMORY, "{}: {} bytes", trick.what, effect.memory);
        writeln!(table, "{}", line(trick, &effect)).unwrap();
    }
    writeln!(table, "| nothing (the slowest of three) | 0 | | | | {:.2} s |", baseline.as_secs_f64()).unwrap();
    record("table", &table);
    assert_eq!(worker.terminate(), Some(0));
}

/// Longest time for a trick: four tries, each up to its limit, and as much again.
const PATIENCE: Duration = Duration::from_secs(240);

/// A worker, and what it has been given so far.
struct Stage<'a> {
    flow: &'a Flow,
    worker: &'a Process,
    server: &'a ImageServer,
    counter: Counter,
    asked: usize,
}

impl Stage<'_> {
    fn written(&self) -> (usize, usize) {
        (self.counter.records(CAPTIONS), self.counter.records(DEAD_LETTERS))
    }

    /// Writes a trick's messages and its neighbours behind them, and waits until all are answered as they should be.
    fn play(&mut self, trick: &Trick) -> Effect {
        let good = |number: usize| self.server.url_at(NEIGHBOURS_HOST, &format!("/good-{number}.png")).to_string();
        let images = trick.images.iter().cloned().chain((0..NEIGHBOURS).map(good));
        let records: Vec<_> = images.map(|image| request(image.clone(), image)).collect();
        let (first, count) = (self.asked, records.len());
        self.asked += count;
        let captions_before = self.written().0;
        self.worker.forget_peak_memory();
        let (before, begun) = (self.worker.memory(), Instant::now());
        self.flow.write(records);
        let mut neighbours = None;
        let time = loop {
            let (captions, letters) = self.written();
            if captions >= captions_before + NEIGHBOURS {
                neighbours.get_or_insert_with(|| begun.elapsed());
            }
            if captions + letters >= self.asked {
                break begun.elapsed();
            }
            assert!(begun.elapsed() < PATIENCE, "{}: {captions} + {letters} of {} answers", trick.what, self.asked);
            std::thread::sleep(Duration::from_millis(5));
        };
        let memory = self.worker.peak_memory().saturating_sub(before);
        let answers = Answers::read(self.flow);
        for offset in first..first + count {
            let is_trick = offset < first + trick.images.len();
            check(&answers, offset, if is_trick { trick.code } else { None }, trick.what);
        }
        Effect { time, memory, neighbours: neighbours.unwrap_or(time) }
    }
}

/// An offset is answered once, and as it should be.
fn check(answers: &Answers, offset: usize, code: Option<&str>, what: &str) {
    let origin = format!("requests/0/{offset}");
    let letters = answers.dead_letters.get(&origin).map_or(&[][..], Vec::as_slice);
    let captions = answers.captions.get(&origin).map_or(0, Vec::len);
    let told: Vec<_> = letters.iter().map(|letter| letter.header("blipstream-error-message")).collect();
    assert_eq!((captions, letters.len()), if code.is_some() { (0, 1) } else { (1, 0) }, "{what}, {origin}: {told:?}");
    if let Some(letter) = letters.first() {
        assert_eq!(letter.header("blipstream-error-code"), code, "{what}: {told:?}");
    }
}

fn line(trick: &Trick, effect: &Effect) -> String {
    let end = trick.code.map_or("a caption".into(), |code| format!("`{code}`"));
    let Effect { time, memory, neighbours } = effect;
    format!(
        "| {} | {} | {end} | {:.2} s | {} MiB | {:.2} s |",
        trick.what,
        trick.images.len(),
        time.as_secs_f64(),
        memory >> 20,
        neighbours.as_secs_f64()
    )
}
