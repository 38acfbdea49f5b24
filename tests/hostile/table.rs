//! Each trick beside messages that mean no harm, on a worker as a process of its own.

use std::fmt::Write as _;
use std::time::Duration;

use crate::support::flow::{Answers, Flow, Process, request};
use crate::support::images::{Answer, ImageServer, png};
use crate::support::tls::AUTHORITY;
use crate::tricks::{self, Trick};
use crate::{now_ms, record, recording};

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
    let mut flow = Flow::start(1);
    if recording() {
        let networks = flow.settings.fetch.allow_networks.clone();
        flow.settings.fetch = blipstream::settings::Fetch { allow_networks: networks, ..Default::default() };
    } else {
        flow.settings.fetch.connect_timeout = Duration::from_millis(300);
        flow.settings.fetch.read_timeout = Duration::from_millis(300);
        flow.settings.fetch.total_timeout = Duration::from_secs(1);
        flow.settings.fetch.attempts = 2;
    }
    let server = ImageServer::start_everywhere().await;
    for number in 0..NEIGHBOURS {
        server.set(&format!("/good-{number}.png"), Answer::Body(png(300, 200, number as u8)));
    }
    let tricks = tricks::all(&server);
    let worker = flow.process_with(&[("SSL_CERT_FILE", AUTHORITY)]);
    let mut asked = 0;
    let mut play = |trick: &Trick| play(&flow, &worker, &server, trick, &mut asked);
    // The first one warms the worker up.
    let calm = Trick { what: "nothing", images: Vec::new(), code: None };
    play(&calm);
    let baseline = (0..3).map(|_| play(&calm).neighbours).max().unwrap();
    let mut table = String::from(
        "| what the server does | messages | end as | after | memory | 20 neighbours are captioned within |\n\
         |---|---:|---|---:|---:|---:|\n",
    );
    for trick in &tricks {
        let effect = play(trick);
        assert!(effect.memory < MEMORY, "{}: {} bytes", trick.what, effect.memory);
        writeln!(table, "{}", line(trick, &effect)).unwrap();
    }
    writeln!(table, "| nothing (the slowest of three) | 0 | | | | {:.2} s |", baseline.as_secs_f64()).unwrap();
    record("table", &table);
    assert_eq!(worker.terminate(), Some(0));
}

/// Writes a trick's messages among its neighbours, and waits until all are answered as they should be.
fn play(flow: &Flow, worker: &Process, server: &ImageServer, trick: &Trick, asked: &mut usize) -> Effect {
    let good = |number: usize| server.url_at(NEIGHBOURS_HOST, &format!("/good-{number}.png")).to_string();
    let images = trick.images.iter().cloned();
    // The trick comes first, so that its neighbours stand behind it.
    let records: Vec<_> = images.chain((0..NEIGHBOURS).map(good)).map(|image| request(image.clone(), image)).collect();
    let (first, count) = (*asked, records.len());
    *asked += count;
    worker.forget_peak_memory();
    let (before, begun) = (worker.memory(), now_ms());
    flow.write(records);
    let answers = flow.until_answered(*asked);
    let memory = worker.peak_memory().saturating_sub(before);
    let mut ends = Vec::new();
    for offset in first..first + count {
        let is_trick = offset < first + trick.images.len();
        let at = answered_at(&answers, offset, if is_trick { trick.code } else { None }, trick.what);
        ends.push(Duration::from_millis((at - begun).max(0) as u64));
    }
    let (own, neighbours) = ends.split_at(trick.images.len());
    let longest = |ends: &[Duration]| ends.iter().max().copied().unwrap_or_default();
    Effect { time: longest(own), memory, neighbours: longest(neighbours) }
}

/// When an offset was answered, once, and as it should be; in the broker's milliseconds.
fn answered_at(answers: &Answers, offset: usize, code: Option<&str>, what: &str) -> i64 {
    let origin = format!("requests/0/{offset}");
    let letters = answers.dead_letters.get(&origin).map_or(&[][..], Vec::as_slice);
    let captions = answers.captions.get(&origin).map_or(0, Vec::len);
    let told: Vec<_> = letters.iter().map(|letter| letter.header("blipstream-error-message")).collect();
    assert_eq!((captions, letters.len()), if code.is_some() { (0, 1) } else { (1, 0) }, "{what}, {origin}: {told:?}");
    if let Some(letter) = letters.first() {
        assert_eq!(letter.header("blipstream-error-code"), code, "{what}: {told:?}");
    }
    answers.times[&origin]
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
