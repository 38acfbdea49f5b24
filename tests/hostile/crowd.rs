//! Ten thousand messages, a third of them hostile.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blipstream::caption::fake::FakeOptions;
use blipstream::kafka::NewRecord;

use crate::support::client::within;
use crate::support::flow::{Answers, CAPTIONS, Flow, request};
use crate::support::images::{Answer, ImageServer, jpeg, png, png_header};
use crate::{TURN, record, recording};

const MESSAGES: usize = 10_000;
/// Over so many that the embedded broker keeps all of each.
const PARTITIONS: i32 = 16;
/// Hosts of healthy pictures, and of hostile ones.
const HOSTS: usize = 20;

/// A tenth of it is usual.
const PATIENCE: Duration = Duration::from_secs(180);

/// What a crowd took.
struct Outcome {
    answers: Answers,
    /// Until the last healthy message was captioned.
    healthy: Duration,
    /// Until everything was answered.
    all: Duration,
}

/// The hostile third, by number: what it asks for and the code it ends under.
fn hostile(server: &ImageServer, number: usize) -> (NewRecord, &'static str) {
    let host = format!("127.0.1.{}", 1 + number % HOSTS);
    let url = |path: &str| format!("{}?{number}", server.url_at(&host, path));
    let of = |image: String, code| (request(format!("bad-{number}"), image), code);
    match number % 16 {
        0 => of(url("/missing"), "not_found"),
        1 => of(url("/broken"), "http_5xx"),
        2 => of(url("/busy"), "http_429"),
        3 => of(url("/page"), "unsupported_media"),
        4 => of(url("/half.jpg"), "decode"),
        5 => of(url("/bomb.png"), "too_many_pixels"),
        6 => of(url("/loop"), "http_4xx"),
        7 => of(url("/inward"), "blocked_address"),
        8 => of(url("/huge"), "too_large"),
        9 => of(url("/closed"), "connect"),
        10 => of("http://10.1.2.3/a.jpg".into(), "blocked_address"),
        11 => of("file:///etc/passwd".into(), "access_denied"),
        12 => of(STANDARD.encode(format!("this is no picture, it is text number {number}")), "unsupported_media"),
        13 => of(format!("ftp://{host}/a.jpg"), "bad_reference"),
        14 => of(url("/packed"), "unsupported_media"),
        _ => (
            NewRecord { value: Some(format!("{{\"image\": {number}").into_bytes()), ..Default::default() },
            "bad_message",
        ),
    }
}

/// Whether a message of a crowd is hostile: every third one.
fn is_hostile(number: usize) -> bool {
    number % 3 == 2
}

async fn run(with_hostile: bool) -> Outcome {
    let flow = Flow::start(PARTITIONS);
    let server = ImageServer::start_everywhere().await;
    for (path, answer) in [
        ("/broken", Answer::status(500)),
        ("/busy", Answer::status(429)),
        ("/page", Answer::Body(b"<html>no image</html>".to_vec())),
        ("/half.jpg", Answer::Body(jpeg(200, 200, 1)[..2000].to_vec())),
        ("/bomb.png", Answer::Body(png_header(30_000, 30_000))),
        ("/loop", Answer::redirect("/loop")),
        ("/inward", Answer::redirect("http://169.254.169.254/")),
        ("/huge", Answer::Lying { declared: 1 << 40, body: vec![0; 100] }),
        ("/closed", Answer::Closed),
        ("/packed", Answer::With(vec![("content-encoding", "br".into())], vec![0; 100])),
        ("/good.png", Answer::Body(png(120, 80, 4))),
    ] {
        server.set(path, answer);
    }
    let good = |number: usize| {
        let host = format!("127.0.0.{}", 2 + number % HOSTS);
        request(format!("good-{number}"), format!("{}?{number}", server.url_at(&host, "/good.png")))
    };
    let mut records = Vec::new();
    for number in 0..MESSAGES {
        match is_hostile(number) {
            true if with_hostile => records.push(hostile(&server, number).0),
            true => {}
            false => records.push(good(number)),
        }
    }
    let count = records.len();
    flow.write(records);
    // 400 images a second; so the captioner is what the healthy ones wait for.
    let worker = flow.worker(FakeOptions { encode_delay: Duration::from_millis(20), ..FakeOptions::default() });
    let (counter, begun) = (flow.counter(), Instant::now());
    let healthy = (0..MESSAGES).filter(|number| !is_hostile(*number)).count();
    within(PATIENCE, "the healthy ones are captioned", || counter.records(CAPTIONS) >= healthy).await;
    let healthy = begun.elapsed();
    let all = || flow.committed().iter().map(|offset| offset.unwrap_or(0)).sum::<i64>() == count as i64;
    within(PATIENCE, "everything is committed", all).await;
    let all = begun.elapsed();
    let budget = worker.control.budget().clone();
    assert!(worker.stop().await.clean());
    assert_eq!((budget.messages.used().items, budget.images.used().bytes), (0, 0), "permits were not given back");
    let answers = Answers::read(&flow);
    Outcome { answers, healthy, all }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_ten_thousand_messages_a_third_of_them_hostile_each_has_its_one_answer() {
    let _turn = TURN.lock().await;
    let mixed = run(true).await;
    let mut codes = BTreeMap::new();
    assert!(mixed.answers.captions.values().all(|records| records.len() == 1), "a caption twice");
    assert!(mixed.answers.dead_letters.values().all(|letters| letters.len() == 1), "a dead letter twice");
    assert_eq!(mixed.answers.origins().len(), MESSAGES);
    for letter in mixed.answers.dead_letters.values().flatten() {
        *codes.entry(letter.header("blipstream-error-code").unwrap().to_owned()).or_insert(0) += 1;
    }
    let server = ImageServer::start().await;
    let mut expected = BTreeMap::new();
    let hostile_numbers = (0..MESSAGES).filter(|number| is_hostile(*number));
    hostile_numbers.for_each(|number| *expected.entry(hostile(&server, number).1.to_owned()).or_insert(0) += 1);
    assert_eq!(codes, expected);
    let good: Vec<String> = (0..MESSAGES).filter(|n| !is_hostile(*n)).map(|n| format!("good-{n}")).collect();
    let captioned = mixed.answers.captioned_ids();
    assert!(good.iter().all(|id| captioned.contains(id.as_str())) && captioned.len() == good.len());
    if recording() {
        record("crowd", &compare(mixed).await);
    }
}

/// The same crowd with and without its hostile third, twice more in turn.
async fn compare(first: Outcome) -> String {
    let mut text = String::from(
        "| round | healthy ones alone | among hostile ones | slowed by | all 10,000 are answered |\n|---:|---:|---:|---:|---:|\n",
    );
    let mut mixed = Some(first);
    for round in 1..=3 {
        let alone = run(false).await.healthy.as_secs_f64();
        let among = match mixed.take() {
            Some(first) => first,
            None => run(true).await,
        };
        let (healthy, all) = (among.healthy.as_secs_f64(), among.all.as_secs_f64());
        let slowed = (healthy / alone - 1.0) * 100.0;
        writeln!(text, "| {round} | {alone:.1} s | {healthy:.1} s | {slowed:.1} % | {all:.1} s |").unwrap();
    }
    text
}
