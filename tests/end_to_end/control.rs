//! Pause, resume, limits, the admin port, and that memory is bounded.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blipstream::admin;
use blipstream::caption::fake::FakeOptions;
use blipstream::disposition::Stage;
use blipstream::kafka::{Fault, NewRecord};
use blipstream::message::Message;
use blipstream::metrics::Metrics;
use blipstream::pipeline::{Control, Limits};
use blipstream::settings::Input;
use tokio_util::sync::CancellationToken;

use crate::support::client::{PATIENCE, eventually};
use crate::support::flow::{Answers, CAPTIONS, Flow, REQUESTS, request};
use crate::support::http::raw;
use crate::support::images::{Answer, ImageServer, png};

fn inline(seed: usize) -> String {
    STANDARD.encode(png(12, 9, seed as u8))
}

#[tokio::test(flavor = "multi_thread")]
async fn pause_and_resume_under_load_lose_and_repeat_nothing() {
    const COUNT: usize = 1500;
    let flow = Flow::start(3);
    let worker = flow.worker(FakeOptions { encode_delay: Duration::from_millis(2), ..FakeOptions::default() });
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    for round in 1..=3 {
        eventually("work goes on", || worker.control.totals().captions > 100 * round).await;
        worker.control.pause();
        eventually("what was in flight is finished", || worker.control.status().messages_in_flight == 0).await;
        let still = worker.control.totals().captions;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(worker.control.totals().captions, still, "a paused worker captioned");
        assert_eq!(worker.control.status().state, "paused");
        worker.control.resume();
    }
    let answers = flow.until_answered(COUNT);
    assert!(worker.stop().await.clean());
    assert_eq!(answers.captioned_ids().len(), COUNT);
    assert_eq!(answers.count(), COUNT);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_in_flight_stays_inside_the_budget_while_the_device_is_slow() {
    const COUNT: usize = 400;
    let mut flow = Flow::start(2);
    flow.settings.flow.max_messages = 50;
    flow.settings.flow.max_images = 20;
    flow.settings.flow.max_image_bytes = bytesize::ByteSize::kib(200);
    let images = ImageServer::start().await.with("/a.png", Answer::Body(png(120, 90, 3)));
    flow.write((0..COUNT).map(|n| request(n, images.url("/a.png"))));
    let worker = flow.worker(FakeOptions { encode_delay: Duration::from_millis(3), ..FakeOptions::default() });
    let (messages, pictures) = (worker.control.budget().messages.clone(), worker.control.budget().images.clone());
    let (mut most_messages, mut most_bytes) = (0, 0);
    eventually("all are captioned", || {
        let (m, p) = (messages.used(), pictures.used());
        assert!(m.items <= 50 && p.items <= 20 && p.bytes <= 200 * 1024, "{m:?} {p:?}");
        (most_messages, most_bytes) = (most_messages.max(m.items), most_bytes.max(p.bytes));
        worker.control.totals().captions == COUNT as u64
    })
    .await;
    assert!(most_messages > 20 && most_bytes > 0, "the budget was never under pressure: {most_messages} messages");
    assert!(worker.stop().await.clean());
    assert_eq!((messages.used().items, pictures.used().bytes), (0, 0), "permits were not given back");
    assert_eq!(Answers::read(&flow).count(), COUNT);
}

/// A picture that no encoder makes small.
fn noise(side: u32) -> Vec<u8> {
    let mut state = 1u32;
    let picture = image::RgbImage::from_fn(side, side, |_, _| {
        image::Rgb([0; 3].map(|_: u8| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        }))
    });
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_large_images_pauses_the_partitions_and_takes_no_more_memory_than_its_budgets() {
    const FIRST: u64 = 48;
    const COUNT: u64 = 150;
    const MIB: u64 = 1 << 20;
    let mut flow = Flow::start(2);
    let settings = &mut flow.settings;
    settings.flow.max_messages = 100;
    settings.flow.max_message_bytes = bytesize::ByteSize::mib(1);
    settings.flow.max_image_bytes = bytesize::ByteSize::mib(4);
    settings.kafka.prefetch = bytesize::ByteSize::mib(1);
    settings.decode.threads = 1;
    settings.batch.queue = 8;
    settings.fetch.per_host = 64;
    let picture = noise(620);
    let flood = picture.len() as u64 * COUNT;
    assert!(flood > 150 * MIB, "{flood} bytes are no flood");
    let images = ImageServer::start().await.with("/a.png", Answer::Body(picture));
    // Full batches, decoders and connections are at work once before anything is measured.
    flow.write((0..FIRST).map(|n| request(format!("first {n}"), images.url("/a.png"))));
    let worker = flow.process();
    flow.until_answered(FIRST as usize);
    let before = worker.peak_memory();
    let admin = worker.admin().expect("the admin port is logged");
    flow.write((0..COUNT).map(|n| request(n, images.url("/a.png"))));
    let mut paused = false;
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let (_, metrics) = http(admin, "GET /metrics HTTP/1.1", "").await;
        paused |= !metrics.contains("blipstream_kafka_paused_partitions 0");
        if metrics.contains(&format!(
            "blipstream_captions_total{{device=\"cpu\",model=\"blipstream-demo\"}} {}",
            FIRST + COUNT
        )) {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "not in time: {metrics}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The kernel counts by thread and adds up now and then: a peak may be told a little lower later.
    let grown = worker.peak_memory().saturating_sub(before);
    println!("{} MiB before, {} MiB more for {} MiB of images", before / MIB, grown / MIB, flood / MIB);
    assert!(paused, "the flood never paused a partition");
    // The pools and the prefetch are 6 MiB; the rest is what allocators keep for themselves.
    assert!(grown < 64 * MIB, "{} MiB more than at rest", grown / MIB);
    assert_eq!(worker.terminate(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_images_that_wait_for_a_device_each_topic_has_its_share_by_weight() {
    const EACH: usize = 300;
    const BATCH: usize = 8;
    let mut flow = Flow::start_with(1, &["live"]);
    flow.settings.kafka.inputs =
        [(REQUESTS, 1), ("live", 4)].map(|(topic, weight)| Input { topic: topic.into(), weight }).into();
    flow.settings.batch.queue = 2 * EACH;
    let worker = flow.worker(FakeOptions { encode_delay: Duration::from_millis(40), ..FakeOptions::default() });
    worker.control.pause();
    let partitions = || worker.control.status().consumer.map_or(0, |consumer| consumer.partitions.len());
    eventually("it has both topics", || partitions() == 2).await;
    flow.write((0..EACH).map(|n| request(format!("bulk {n}"), inline(n))));
    flow.write_to("live", (0..EACH).map(|n| request(format!("live {n}"), inline(n))));
    worker.control.resume();
    flow.until_answered(2 * EACH);
    assert!(worker.stop().await.clean());
    let answers = flow.read(CAPTIONS);
    let is_live = |message: &&Message| message.key.as_ref().unwrap().starts_with(b"live");
    // The first batches are made of what came first, and one topic may come before the other; at the end only the bulk is
    // left.
    let first = |live: bool| answers.iter().position(|message| is_live(&message) == live).unwrap();
    let (begin, end) = (first(true).max(first(false)) + 2 * BATCH, answers.iter().rposition(|m| is_live(&m)).unwrap());
    assert!(begin + 10 * BATCH < end, "from {begin} to {end} both topics wait");
    let together = &answers[begin..end];
    let live = together.iter().filter(is_live).count();
    let share = live as f64 / together.len() as f64;
    println!("{live} of {} captions are of the live topic, whose share is 4 of 5", together.len());
    assert!((0.7..=0.9).contains(&share), "{live} of {}", together.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_producer_stalls_consumption_with_bounded_memory() {
    const COUNT: usize = 600;
    const MESSAGES: usize = 50;
    let mut flow = Flow::start(2);
    flow.settings.flow.max_messages = MESSAGES;
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    // The broker refuses what the worker writes, four times over; the waits between the tries add up to seconds.
    flow.embedded().fail(&[Fault::ProduceNotAuthorised; 4]).unwrap();
    let worker = flow.worker(FakeOptions::default());
    let consumed = || worker.control.totals().consumed as usize;
    let in_flight = || worker.control.budget().messages.used().items;
    eventually("the budget is spent", || in_flight() >= MESSAGES * 4 / 5).await;
    let stalled = consumed();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(consumed() <= stalled.max(MESSAGES), "consumption went on: {stalled}, then {}", consumed());
    assert_eq!(worker.control.totals().captions, 0, "nothing can have been acknowledged yet");
    eventually("everything is captioned in the end", || {
        assert!(in_flight() <= MESSAGES, "{} messages in flight", in_flight());
        worker.control.totals().captions == COUNT as u64
    })
    .await;
    assert!(worker.stop().await.clean());
    let answers = Answers::read(&flow);
    assert_eq!((answers.count(), answers.captioned_ids().len()), (COUNT, COUNT));
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_change_while_the_worker_runs_as_far_as_its_memory_allows() {
    let mut flow = Flow::start(1);
    flow.settings.model.max_state = Some(bytesize::ByteSize::kib(5));
    let worker = flow.worker(FakeOptions { row_bytes: 1024, ..FakeOptions::default() });
    eventually("it runs", || worker.control.status().state == "running").await;
    assert_eq!(worker.control.status().devices[0].batch_size, 5, "what was asked for was cut to model.max_state");
    let change: Limits =
        serde_json::from_str(r#"{"max_images": 7, "max_image_bytes": "3MiB", "batch_size": 2}"#).unwrap();
    worker.control.set_limits(change).unwrap();
    let status = worker.control.status();
    assert_eq!((status.pools[1].items_limit, status.pools[1].bytes_limit), (7, 3 << 20));
    assert_eq!((status.devices[0].batch_size, status.devices[0].max_batch_size), (2, 5));
    let now = worker.control.set_limits(Limits { batch_size: Some(64), ..Limits::default() }).unwrap();
    assert_eq!(now.batch_size, Some(5));
    let error = worker.control.set_limits(Limits { max_messages: Some(0), ..Limits::default() }).unwrap_err();
    assert!(error.contains("max_messages"), "{error}");
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_on_messages_in_flight_holds_and_can_be_lifted() {
    const COUNT: usize = 300;
    const LIMIT: usize = 6;
    let flow = Flow::start(2);
    let worker = flow.worker(FakeOptions { encode_delay: Duration::from_millis(2), ..FakeOptions::default() });
    let stop = CancellationToken::new();
    let at =
        admin::serve("127.0.0.1:0".parse().unwrap(), None, worker.control.clone(), stop.clone()).await.unwrap().address;
    let put = "PUT /admin/limits HTTP/1.1";
    let (status, body) = http(at, put, &format!("{{\"in_flight\": {LIMIT}}}")).await;
    assert!(status.contains("200") && body.contains("\"in_flight\":6"), "{status} {body}");
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    let mut told = false;
    eventually("a part is captioned under the limit", || {
        let status = worker.control.status();
        assert!(status.messages_in_flight <= LIMIT, "{} in flight", status.messages_in_flight);
        told |= status.held_by.contains(&"limit");
        worker.control.totals().captions >= 100
    })
    .await;
    assert!(told, "/status never said that the limit holds consumption");
    assert!(http(at, put, "{\"in_flight\": 0}").await.0.contains("200"));
    let answers = flow.until_answered(COUNT);
    assert_eq!((answers.count(), answers.captioned_ids().len()), (COUNT, COUNT));
    eventually("nothing holds consumption", || worker.control.status().held_by.is_empty()).await;
    assert!(worker.stop().await.clean());
    stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_does_not_wait_for_company_past_a_deadline() {
    let mut flow = Flow::start(1);
    flow.settings.batch.linger = Duration::from_secs(600);
    let worker = flow.worker(FakeOptions { encode_delay: Duration::from_millis(200), ..FakeOptions::default() });
    eventually("it is ready", || worker.control.readiness().ready).await;
    // The first batch is the only one of its kind: nobody knows yet how long one takes.
    for (id, left) in [("first", 30), ("second", 3)] {
        let deadline = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(left);
        let value = serde_json::json!({"id": id, "image": inline(1), "deadline": deadline.to_string()}).to_string();
        flow.write([NewRecord { value: Some(value.into()), ..request(id, "") }]);
        eventually("it is captioned or dead-lettered", || {
            let totals = worker.control.totals();
            totals.captions + totals.dead_letters == if id == "first" { 1 } else { 2 }
        })
        .await;
    }
    assert_eq!(worker.control.totals().dead_letters, 0, "a row waited for company until its deadline had passed");
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_not_ready_while_its_model_loads_or_no_broker_answers() {
    let flow = Flow::start(1);
    let stop = CancellationToken::new();
    let listen = "127.0.0.1:0".parse().unwrap();
    let loading = Control::new(&flow.settings.flow, Arc::new(Metrics::new()));
    let at = admin::serve(listen, None, loading, stop.clone()).await.unwrap().address;
    let (status, body) = http(at, "GET /readyz HTTP/1.1", "").await;
    assert!(status.contains("503") && body.contains("the model is being loaded"), "{status} {body}");
    assert!(http(at, "GET /livez HTTP/1.1", "").await.0.contains("200"), "loading is no reason to be restarted");

    flow.embedded().down().unwrap();
    let worker = flow.worker(FakeOptions::default());
    let at = admin::serve(listen, None, worker.control.clone(), stop.clone()).await.unwrap().address;
    eventually("the model is loaded", || worker.control.readiness().model.ready).await;
    let (status, body) = http(at, "GET /readyz HTTP/1.1", "").await;
    let readiness: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert!(status.contains("503"), "{status} {body}");
    assert_eq!((&readiness["model"]["ready"], &readiness["broker"]["ready"]), (&true.into(), &false.into()), "{body}");
    assert!(http(at, "GET /livez HTTP/1.1", "").await.0.contains("200"));
    flow.embedded().up().unwrap();
    eventually("it is ready", || worker.control.readiness().ready).await;
    assert!(http(at, "GET /readyz HTTP/1.1", "").await.0.contains("200"));
    assert!(worker.stop().await.clean());
    stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_a_device_is_not_alive_and_one_that_drained_is() {
    let flow = Flow::start(1);
    flow.write([request(0, inline(0))]);
    let stop = CancellationToken::new();
    let listen = "127.0.0.1:0".parse().unwrap();
    let worker = flow.worker(FakeOptions { failing_calls: (1..1000).collect(), ..FakeOptions::default() });
    let at = admin::serve(listen, None, worker.control.clone(), stop.clone()).await.unwrap().address;
    assert!(worker.task.await.unwrap().is_err());
    let (status, body) = http(at, "GET /livez HTTP/1.1", "").await;
    assert!(status.contains("503") && body.contains("no device is left"), "{status} {body}");

    let worker = flow.worker(FakeOptions::default());
    let at = admin::serve(listen, None, worker.control.clone(), stop.clone()).await.unwrap().address;
    flow.until_answered(1);
    assert!(worker.stop().await.clean());
    assert!(http(at, "GET /livez HTTP/1.1", "").await.0.contains("200"));
    stop.cancel();
}

/// A plain HTTP request; returns the status line and the body.
async fn http(address: std::net::SocketAddr, head: &str, body: &str) -> (String, String) {
    let head = format!("{head}\r\nhost: test\r\nconnection: close\r\ncontent-length: {}", body.len());
    let reply = raw(address, &format!("{head}\r\n\r\n{body}")).await;
    (reply.head.lines().next().unwrap().to_owned(), reply.body)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_port_tells_and_steers() {
    let flow = Flow::start(2);
    let worker = flow.worker(FakeOptions::default());
    let stop = CancellationToken::new();
    let listen = "127.0.0.1:0".parse().unwrap();
    let at = admin::serve(listen, Some("secret".into()), worker.control.clone(), stop.clone()).await.unwrap().address;
    eventually("it is ready", || worker.control.readiness().ready).await;
    assert!(http(at, "GET /livez HTTP/1.1", "").await.0.contains("200"));
    let (status, body) = http(at, "GET /readyz HTTP/1.1", "").await;
    assert!(status.contains("200") && body.contains("2 partition(s)"), "{status} {body}");
    flow.write((0..30).map(|n| request(n, inline(n))));
    eventually("all are captioned", || worker.control.totals().captions == 30).await;
    let (_, metrics) = http(at, "GET /metrics HTTP/1.1", "").await;
    assert!(metrics.contains("blipstream_captions_total{device=\"cpu#0\",model=\"fake\"} 30"), "{metrics}");
    assert!(metrics.contains("blipstream_messages_consumed_total{topic=\"requests\"} 30"), "{metrics}");
    assert!(metrics.contains("blipstream_queue_items{stage=\"parse\"} 0"), "{metrics}");
    assert!(metrics.contains("blipstream_stage_duration_seconds_count{stage=\"consume\"} 30"), "{metrics}");
    eventually("commits are counted", || worker.control.metrics().stage_so_far(Stage::Commit).0 > 0).await;
    let (status, _) = http(at, "POST /admin/pause HTTP/1.1", "").await;
    assert!(status.contains("401"), "{status}");
    let (status, body) = http(at, "POST /admin/pause HTTP/1.1\r\nauthorization: Bearer secret", "").await;
    assert!(status.contains("200") && body.contains("paused"), "{status} {body}");
    let (_, body) = http(at, "GET /status HTTP/1.1", "").await;
    let status: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(status["held_by"], serde_json::json!(["operator"]));
    assert!(http(at, "GET /livez HTTP/1.1", "").await.0.contains("200"), "a pause is no reason to be restarted");
    let put = "PUT /admin/limits HTTP/1.1\r\nauthorization: Bearer secret";
    let (status, body) = http(at, put, r#"{"max_image": 3}"#).await;
    assert!(status.contains("422") && body.contains("max_images"), "{status} {body}");
    let (status, _) = http(at, "POST /admin/drain HTTP/1.1\r\nauthorization: Bearer secret", "").await;
    assert!(status.contains("202"), "{status}");
    let summary = worker.task.await.unwrap().unwrap();
    assert!(summary.clean());
    stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn promtool_finds_nothing_to_complain_about() {
    let flow = Flow::start(1);
    let worker = flow.worker(FakeOptions::default());
    flow.write((0..5).map(|n| request(n, if n == 3 { "file:///etc/passwd".to_owned() } else { inline(n) })));
    flow.until_answered(5);
    let text = worker.control.render_metrics();
    assert!(worker.stop().await.clean());
    let child = std::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        assert!(std::env::var_os("CI").is_none(), "promtool is not installed, and CI must have it");
        eprintln!("SKIPPED: promtool is not installed (Debian: the package prometheus)");
        return;
    };
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.trim().is_empty(), "{said}");
}
