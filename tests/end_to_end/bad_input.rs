//! Every bad message or image ends as exactly one dead letter with the right code, and its neighbours are captioned.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blipstream::caption::fake::FakeOptions;
use blipstream::kafka::NewRecord;
use bytes::Bytes;
use serde_json::json;

use crate::support::client::eventually;
use crate::support::flow::{Flow, request};
use crate::support::images::{Answer, ImageServer, jpeg, png, png_header};

fn raw(value: impl Into<Vec<u8>>) -> NewRecord {
    NewRecord { value: Some(value.into()), ..NewRecord::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_healthy_input_ends_as_a_caption_and_every_bad_one_as_a_dead_letter() {
    let mut flow = Flow::start(1);
    flow.settings.fetch.max_body = bytesize::ByteSize::mib(1);
    flow.settings.fetch.total_timeout = Duration::from_millis(400);
    flow.settings.fetch.attempts = 2;
    let picture = png(30, 20, 5);
    let mut truncated = jpeg(64, 64, 6);
    truncated.truncate(truncated.len() / 2);
    let images = ImageServer::start().await;
    let images = images
        .with("/good.png", Answer::Body(picture.clone()))
        .with("/good.jpg", Answer::Chunked(jpeg(50, 40, 7)))
        .with("/tiny.png", Answer::Body(png(1, 1, 8)))
        .with("/missing", Answer::status(404))
        .with("/secret", Answer::status(403))
        .with("/teapot", Answer::status(418))
        .with("/broken", Answer::status(500))
        .with("/later", Answer::status(429))
        .with_all("/flaky.png", vec![Answer::status(503), Answer::Body(picture.clone())])
        .with("/silence", Answer::Silence)
        .with("/page", Answer::Body(b"<html><body>Not found, sorry</body></html>".to_vec()))
        .with("/empty", Answer::Body(Vec::new()))
        .with("/truncated.jpg", Answer::Body(truncated))
        .with("/endless", Answer::Endless)
        .with("/huge", Answer::Body(vec![0; 2 << 20]))
        .with("/bomb.png", Answer::Body(png_header(30_000, 30_000)))
        .with("/nothing.png", Answer::Body(png_header(0, 5)))
        .with("/inward", Answer::redirect("http://169.254.169.254/latest/meta-data"))
        .with("/closed", Answer::Closed);
    let url = |path: &str| images.url(path).to_string();
    let base64 = STANDARD.encode(&picture);
    let table = json!({"input_data": {"columns": ["image"], "index": [0, 1, 2],
        "data": [[url("/good.png")], [url("/missing")], [base64]]}});
    let event = json!({"specversion": "1.0", "id": "event", "source": "test", "type": "image",
        "data": {"image": url("/good.png")}});
    let junk = NewRecord {
        key: Some(vec![0xFF, 0xFE]),
        headers: vec![
            ("\u{7f}junk".into(), Some(Bytes::from_static(&[0, 159, 146, 150]))),
            ("traceparent".into(), Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into())),
            ("empty".into(), None),
            ("blipstream-origin".into(), Some("no/origin".into())),
        ],
        ..request("junk headers", url("/good.png"))
    };
    let ok = Ok::<usize, &str>;
    // Each input with what becomes of it: so many captions, or a dead letter with this code.
    let cases: Vec<(NewRecord, Result<usize, &str>)> = vec![
        (request("png", url("/good.png")), ok(1)),
        (raw("{"), Err("bad_message")),
        (raw("[1, 2]"), Err("bad_message")),
        (raw("{\"image\": 5}"), Err("bad_message")),
        (raw("{\"id\": \"no image\"}"), Err("bad_message")),
        (raw([0xC3, 0x28]), Err("bad_message")),
        (request("jpeg", url("/good.jpg")), ok(1)),
        (raw(json!({"image": url("/good.png"), "params": {"max_new_token": 5}}).to_string()), Err("bad_params")),
        (raw(json!({"image": url("/good.png"), "params": {"max_new_tokens": 5000}}).to_string()), Err("bad_params")),
        (raw(json!({"image": url("/good.png"), "params": {"num_beams": 99}}).to_string()), Err("bad_params")),
        (raw(json!({"image": url("/good.png"), "params": {"top_p": 0.9}}).to_string()), Err("bad_params")),
        (raw(json!({"image": url("/good.png"), "params": {"do_sample": "yes"}}).to_string()), Err("bad_params")),
        (raw(json!({"image": url("/good.png"), "params": {"num_beams": 3}}).to_string()), ok(1)),
        (raw(json!({"image": url("/good.png"), "deadline": "2020-01-01T00:00:00Z"}).to_string()), Err("deadline")),
        (request("ftp", "ftp://example.com/a.jpg"), Err("bad_reference")),
        (request("s3", "s3://bucket/a.jpg"), Err("access_denied")),
        (request("s3a", "s3a://bucket/a.jpg"), Err("bad_reference")),
        (request("broken base64", "data:image/png;base64,????"), Err("bad_reference")),
        (request("private", "http://10.1.2.3/a.jpg"), Err("blocked_address")),
        (request("inward", url("/inward")), Err("blocked_address")),
        (request("file", "file:///etc/passwd"), Err("access_denied")),
        (request("base64", base64.clone()), ok(1)),
        (request("data", format!("data:image/png;base64,{base64}")), ok(1)),
        (request("404", url("/missing")), Err("not_found")),
        (request("403", url("/secret")), Err("access_denied")),
        (request("418", url("/teapot")), Err("http_4xx")),
        (request("500", url("/broken")), Err("http_5xx")),
        (request("429", url("/later")), Err("http_429")),
        (request("flaky", url("/flaky.png")), ok(1)),
        (request("silence", url("/silence")), Err("timeout")),
        (request("closed", url("/closed")), Err("connect")),
        (request("html", url("/page")), Err("unsupported_media")),
        (request("empty", url("/empty")), Err("unsupported_media")),
        (request("truncated", url("/truncated.jpg")), Err("decode")),
        (request("endless", url("/endless")), Err("too_large")),
        (request("huge", url("/huge")), Err("too_large")),
        (request("bomb", url("/bomb.png")), Err("too_many_pixels")),
        (request("zero", url("/nothing.png")), Err("decode")),
        (request("1×1", url("/tiny.png")), ok(1)),
        (request("10 MB", STANDARD.encode(vec![7; 7 << 20])), Err("too_large")),
        (raw(event.to_string()), ok(1)),
        (raw(url("/good.png")), ok(1)),
        (junk, ok(1)),
        (raw(table.to_string()), ok(2)),
        (request("last", url("/good.png")), ok(1)),
    ];
    let captions: usize = cases.iter().filter_map(|(_, outcome)| outcome.ok()).sum();
    // The missing row of the table is a dead letter beside its two captions.
    let letters = cases.iter().filter(|(_, outcome)| outcome.is_err()).count() + 1;
    let (records, outcomes): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
    flow.write(records.clone());
    let worker = flow.worker(FakeOptions::default());
    let answers = flow.until_answered(captions + letters);
    eventually("all is committed", || flow.committed() == [Some(records.len() as i64)]).await;
    let budget = worker.control.budget().clone();
    assert!(worker.stop().await.clean());
    assert_eq!((budget.messages.used().items, budget.images.used().bytes), (0, 0), "permits were not given back");

    for (offset, (record, outcome)) in records.iter().zip(&outcomes).enumerate() {
        let origin = format!("requests/0/{offset}");
        let input = String::from_utf8_lossy(record.value.as_deref().unwrap()).chars().take(90).collect::<String>();
        match outcome {
            Ok(1) => assert_eq!(answers.captions.get(&origin).map(Vec::len), Some(1), "{input}"),
            Ok(_) => {}
            Err(code) => {
                let letters = answers.dead_letters.get(&origin).unwrap_or_else(|| panic!("no dead letter: {input}"));
                assert_eq!(letters.len(), 1, "{input}");
                let message = letters[0].header("blipstream-error-message").unwrap();
                assert_eq!(letters[0].header("blipstream-error-code"), Some(*code), "{input}: {message}");
                assert_eq!(letters[0].payload.as_deref(), record.value.as_deref(), "the value is kept: {input}");
                assert_eq!(letters[0].key.as_deref(), record.key.as_deref(), "the key is kept: {input}");
            }
        }
    }
    // The table: two captions with their rows, one dead letter in the native form.
    let row = |index: usize| format!("requests/0/{}/{index}", records.len() - 2);
    assert_eq!(answers.captions[&row(0)][0]["index"], 0);
    assert_eq!(answers.captions[&row(2)][0]["index"], 2);
    let letter = &answers.dead_letters[&row(1)][0];
    let native: serde_json::Value = serde_json::from_slice(letter.payload.as_ref().unwrap()).unwrap();
    assert_eq!(native["image"], json!(url("/missing")));
    assert_eq!(letter.header("blipstream-error-code"), Some("not_found"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_tells_what_it_is_about_and_echoes_no_secret() {
    let flow = Flow::start(1);
    let images = ImageServer::start().await.with("/a.png", Answer::Body(png(30, 20, 5)));
    let url = format!("http://user:password@127.0.0.1:{}/a.png?token=secret", images.port());
    let mut asked = request("mine", &url);
    asked.headers.push(("traceparent".into(), Some("00-abc".into())));
    asked.value = Some(json!({"id": "mine", "image": url, "meta": {"shelf": 7}}).to_string().into_bytes());
    flow.write([asked]);
    let worker = flow.worker(FakeOptions::default());
    let answers = flow.until_answered(1);
    assert!(worker.stop().await.clean());
    let record = &answers.captions["requests/0/0"][0];
    assert_eq!(record["schema"], "blipstream.caption.v1");
    assert_eq!((&record["id"], &record["meta"]["shelf"]), (&json!("mine"), &json!(7)));
    assert_eq!(record["image"]["url"], json!(images.url("/a.png")));
    assert_eq!((&record["image"]["width"], &record["image"]["height"]), (&json!(30), &json!(20)));
    assert_eq!(record["image"]["format"], "png");
    assert_eq!(record["origin"], json!({"topic": "requests", "partition": 0, "offset": 0}));
    assert!(record["timing_ms"]["total"].as_f64().unwrap() >= record["timing_ms"]["caption"].as_f64().unwrap());
    let text = record.to_string();
    assert!(!text.contains("password") && !text.contains("secret"), "{text}");
    let message = flow.read("captions").pop().unwrap();
    assert_eq!(message.header("traceparent"), Some("00-abc"));
    assert_eq!(message.key.as_deref(), Some(&b"mine"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_over_the_largest_size_is_a_pointer_among_the_dead_letters() {
    let mut flow = Flow::start(1);
    let picture = STANDARD.encode(png(30, 20, 5));
    let mut long = request("long", "A".repeat(200 << 10));
    long.headers.push(("traceparent".into(), Some("00-abc".into())));
    flow.write([request("before", &picture), long.clone(), request("after", &picture)]);
    flow.settings.kafka.max_message_size = bytesize::ByteSize::kib(100);
    let worker = flow.worker(FakeOptions::default());
    let answers = flow.until_answered(3);
    assert!(worker.stop().await.clean());
    assert_eq!(answers.captioned_ids().into_iter().collect::<Vec<_>>(), ["after", "before"]);
    let letter = &answers.dead_letters["requests/0/1"][0];
    assert_eq!(letter.header("blipstream-error-code"), Some("too_large"));
    assert!(letter.header("blipstream-error-message").unwrap().contains("kafka.max_message_size"));
    assert_eq!((letter.key.as_deref(), letter.header("traceparent")), (Some(&b"long"[..]), Some("00-abc")));
    let pointer: serde_json::Value = serde_json::from_slice(letter.payload.as_ref().unwrap()).unwrap();
    assert_eq!(pointer["blipstream_pointer"]["length"], json!(long.value.unwrap().len()));
    assert_eq!(flow.committed(), [Some(3)]);
}
