//! `blipstream batch --kafka`: a job's rows through the workers behind Kafka, killed and gone on with.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::time::Duration;

use blipstream::caption::fake::FakeOptions;
use blipstream::disposition::{Code, Failure, Stage};
use blipstream::kafka::{From, NewRecord, ReadLimits, read_records};
use blipstream::message::{DeadLetter, Message};
use serde_json::{Value, json};

use crate::support::client::{PATIENCE, eventually};
use crate::support::flow::{CAPTIONS, DEAD_LETTERS, Flow, REQUESTS, request};
use crate::support::images::{Answer, ImageServer, png};
use crate::support::job::Job;
use crate::support::place::{Place, finish, signal};
use crate::support::promises::{inline, slow};

/// A worker of the test's own: each request, in its order, as often as `answer` wants more.
fn each_request(job: &Job, mut answer: impl FnMut(&Message) -> bool) {
    let limits = ReadLimits { from: From::Beginning, timeout: PATIENCE, stop_at_end: false };
    let mut wants = true;
    read_records(&job.flow.settings.kafka, REQUESTS, limits, |request| {
        wants = answer(&request);
        wants
    })
    .unwrap();
    assert!(!wants, "not as many requests came");
}

/// A dead letter, as a worker would write it.
fn dead_letter(request: &Message, code: Code) -> NewRecord {
    let failure = Failure::with_message(Stage::Fetch, code, "so it was".into());
    let letter = DeadLetter::new(request, &request.origin(), None, &failure, "test", 1 << 20);
    let owned = |bytes: Option<bytes::Bytes>| bytes.map(|bytes| bytes.to_vec());
    NewRecord { key: owned(letter.key), value: owned(letter.value), headers: letter.headers }
}

/// A caption record, as a worker would write it.
fn caption(key: &[u8], text: &str) -> NewRecord {
    let image = json!({"url": null, "sha256": text, "width": 1, "height": 1, "bytes": 1, "format": "png"});
    let record = json!({
        "schema": "blipstream.caption.v1", "id": String::from_utf8_lossy(key), "index": 0, "text": text,
        "logprob": -1.0, "tokens": 2, "finish": "stop", "image": image,
        "origin": {"topic": REQUESTS, "partition": 0, "offset": 0},
    });
    NewRecord { key: Some(key.to_vec()), value: Some(record.to_string().into_bytes()), headers: Vec::new() }
}

fn fast() -> FakeOptions {
    FakeOptions::default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_over_kafka_has_a_row_for_each_image_in_order_and_takes_no_answers_of_others() {
    let job = Job::of_pictures(Flow::start(3), 60);
    let asks = ["--prompt", "a photo of", "--max-new-tokens", "7"];
    let child = job.spawn(&[&["list.csv", "--mini-batch-size", "25"][..], &asks].concat());
    job.until_requested(25).await;
    // Another sender's requests, and records that look like answers, of another job and of nobody, before the true ones.
    job.flow.write((0..40).map(|n| request(n, inline(n))));
    let foreign = |row: u32| {
        [format!("batch-0000000000000000-{row}-0-1"), format!("images/{row}.png"), format!("list.csv:{}", row + 2)]
            .map(|key| caption(key.as_bytes(), "foreign"))
    };
    job.flow.write_to(CAPTIONS, (0..60).flat_map(foreign));
    let worker = job.flow.worker(slow());
    let ran = finish(child);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.out.starts_with("60 rows: 60 captioned, 0 failed; "), "{ran:?}");
    job.assert_complete(60);
    assert!(job.rows().iter().all(|row| row["text"].as_str().unwrap().starts_with("a photo of ")), "the prompt");
    let ours =
        job.flow.read(REQUESTS).into_iter().filter(|request| request.key.as_ref().unwrap().starts_with(b"batch-"));
    let asked: Vec<Value> = ours.map(|request| serde_json::from_slice(&request.payload.unwrap()).unwrap()).collect();
    assert_eq!(asked.len(), 60, "a request for each row");
    assert!(asked.iter().all(|request| request["params"] == json!({"max_new_tokens": 7})));
    let report: Value = serde_json::from_str(&job.place.read("out.jsonl.report.json")).unwrap();
    assert_eq!((&report["model"], &report["captioned"]), (&json!("kafka:requests"), &json!(60)));
    assert!(worker.stop().await.clean());
    // And what was done without workers is not gone on with by them, or the other way round.
    let alone =
        job.place.run(&["list.csv", "--output", "out.jsonl", "--prompt", "a photo of", "--max-new-tokens", "7"]);
    assert!(alone.code == Some(2) && alone.err.contains("model: demo now, kafka:requests then"), "{alone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_killed_takes_the_answers_that_came_while_it_was_down_and_asks_for_nothing_twice() {
    let job = Job::of_pictures(Flow::start(3), 300);
    let arguments = ["list.csv", "--mini-batch-size", "40"];
    let worker = job.flow.worker(slow());
    let mut child = job.spawn(&arguments);
    job.place.until_recorded("out.jsonl", 60);
    assert!(worker.stop().await.clean());
    let counter = job.flow.counter();
    eventually("some have no answer", || counter.records(REQUESTS) >= counter.records(CAPTIONS) + 10).await;
    child.kill().unwrap();
    assert_eq!(finish(child).code, None, "it ended before it was killed");

    let worker = job.flow.worker(slow());
    job.until_all_answered().await;
    let ran = job.run(&arguments);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.err.contains(" answers had come meanwhile"), "{ran:?}");
    job.assert_complete(300);
    assert_eq!(job.requests(), 300, "work was done twice");
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_killed_again_and_again_has_each_row_once_whenever_the_answers_come() {
    let job = Job::of_pictures(Flow::start(2), 200);
    let arguments = ["list.csv", "--mini-batch-size", "30"];
    // Nobody answers, and so the requests of the first run are sent by the second one, too.
    let mut child = job.spawn(&arguments);
    job.until_requested(30).await;
    child.kill().unwrap();
    finish(child);
    let mut child = job.spawn(&arguments);
    job.until_requested(60).await;
    let worker = job.flow.worker(slow());
    for rows in [40, 90, 150] {
        job.place.until_recorded("out.jsonl", rows);
        child.kill().unwrap();
        assert_eq!(finish(child).code, None, "it ended before it was killed");
        child = job.spawn(&arguments);
    }
    let ran = finish(child);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    job.assert_complete(200);
    let requests = job.requests();
    assert!((230..=200 + 4 * 30).contains(&requests), "{requests} requests: more than a mini-batch for each kill");
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_a_row_with_its_error_and_retry_failed_asks_for_nothing_else() {
    let mut flow = Flow::start(2);
    flow.settings.fetch.attempts = 1;
    flow.settings.fetch.cache = bytesize::ByteSize::b(0);
    let job = Job::new(flow);
    let server = ImageServer::of_all_kinds().await;
    let lines = ["good", "gone", "shaky", "down"].map(|name| format!("{}\n", server.url(&format!("/{name}.png"))));
    job.place.write("list.txt", lines.concat());
    let worker = job.flow.worker(fast());
    let arguments = ["list.txt", "--max-retries", "2"];
    let ran = job.run(&arguments);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.out.contains("\n  http_5xx: 1\n") && ran.out.contains("; 4 retries"), "{ran:?}");
    assert_eq!(job.codes(), ["-", "not_found", "-", "http_5xx"]);
    let message = job.rows()[1]["error_message"].as_str().unwrap().to_owned();
    assert!(message.contains("/gone.png") && message.contains("404"), "{message}");
    let seen = server.seen();
    let requests = ["/good.png", "/gone.png", "/shaky.png", "/down.png"].map(|path| seen.requests(path));
    assert_eq!(requests, [1, 1, 3, 3], "a 404 is not worth another try, a 503 two");

    server.set("/gone.png", Answer::Body(png(24, 24, 3)));
    let before = job.requests();
    let again = [&arguments[..], &["--retry-failed"]].concat();
    let ran = job.run(&again);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.err.starts_with("trying 2 failed rows anew\n"), "{ran:?}");
    assert_eq!(job.codes(), ["-", "-", "-", "http_5xx"], "written anew");
    assert_eq!(job.requests() - before, 4, "one for the image that is there again, three for the other one");
    server.set("/down.png", Answer::Body(png(24, 24, 4)));
    assert_eq!(job.run(&again).code, Some(0));
    assert_eq!(job.codes(), ["-"; 4]);

    server.set("/gone.png", Answer::status(404));
    let stopped = job.run(&["list.txt", "--error-threshold", "0", "--restart"]);
    assert_eq!(stopped.code, Some(3), "{stopped:?}");
    assert!(stopped.err.contains(" rows failed, and --error-threshold is 0"), "{stopped:?}");
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_worker_rows_fail_in_time_and_late_answers_are_taken_by_retry_failed() {
    let job = Job::of_pictures(Flow::start(2), 3);
    let ran = job.run(&["list.csv", "--timeout", "3s"]);
    assert_eq!(ran.code, Some(0), "any number of failures is allowed: {ran:?}");
    assert!(
        ran.out.starts_with("3 rows: 0 captioned, 3 failed; ") && ran.out.contains("\n  no_answer: 3\n"),
        "{ran:?}"
    );
    let question = "Does a worker run that reads requests, and is it quick enough?";
    assert!(ran.err.contains(&format!("no worker has answered anything for 3s. {question}")), "{ran:?}");
    assert_eq!(job.codes(), ["no_answer"; 3]);
    let message = job.rows()[0]["error_message"].as_str().unwrap().to_owned();
    assert!(message.starts_with("no answer for 3s to the request requests/"), "{message}");
    assert!(message.contains(question) && message.contains("--retry-failed"), "{message}");
    assert_eq!(job.requests(), 3, "slow workers are not given twice the work");

    let worker = job.flow.worker(fast());
    job.until_all_answered().await;
    let ran = job.run(&["list.csv", "--timeout", "30s", "--retry-failed"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.err.contains("3 answers had come meanwhile"), "{ran:?}");
    assert_eq!((job.codes(), job.requests()), (vec!["-".to_owned(); 3], 3));
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_or_a_topic_that_is_not_there_is_told_and_the_same_command_goes_on_once_it_is() {
    let job = Job::of_pictures(Flow::start(1), 3);
    let nowhere = ["--set", "kafka.bootstrap_servers=127.0.0.1:1"];
    let ran = job.run(&[&["list.csv", "--timeout", "500ms"][..], &nowhere].concat());
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.err.contains("no Kafka broker answers at 127.0.0.1:1 ("), "{ran:?}");
    assert!(ran.err.contains("Check kafka.bootstrap_servers"), "{ran:?}");
    let worker = job.flow.worker(fast());
    assert_eq!(job.run(&["list.csv"]).code, Some(0));
    job.assert_complete(3);
    assert!(worker.stop().await.clean());

    let ran = job.run(&["list.csv", "--topic", "missing", "--restart"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let told = "the topic `missing` does not exist; create it, or change --topic or kafka.inputs";
    assert!(ran.err.contains(told), "{ran:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn brokers_that_answer_no_more_end_the_job_and_what_is_done_is_kept() {
    let job = Job::of_pictures(Flow::start(1), 40);
    let worker = job.flow.worker(fast());
    let arguments = ["list.csv", "--mini-batch-size", "4", "--timeout", "3s"];
    let child = job.spawn(&arguments);
    job.place.until_recorded("out.jsonl", 4);
    job.flow.embedded().round_trip_time(Duration::from_secs(6)).unwrap();
    let ran = finish(child);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.err.contains("the brokers acknowledged nothing for 3s"), "{ran:?}");
    assert!(ran.err.contains("What is done is kept; the same command goes on from there"), "{ran:?}");
    job.flow.embedded().round_trip_time(Duration::ZERO).unwrap();
    // Those that the brokers had may have failed for want of an answer.
    let ran = job.run(&["list.csv", "--mini-batch-size", "4", "--timeout", "60s", "--retry-failed"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    job.assert_captioned(40);
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_than_a_mini_batch_is_under_way_and_each_kind_of_answer_is_told_from_its_doubles() {
    let job = Job::of_pictures(Flow::start(1), 12);
    let child = job.spawn(&["list.csv", "--mini-batch-size", "4", "--max-retries", "1", "--timeout", "60s"]);
    let counter = job.flow.counter();
    let (mut settled, mut keys) = (0, BTreeSet::new());
    each_request(&job, |request| {
        let sent = counter.records(REQUESTS);
        assert!(sent <= settled + 4, "{sent} requests were sent, and only {settled} were settled");
        let key = request.key.clone().unwrap();
        assert!(keys.insert(key.clone()), "a request twice");
        let body: Value = serde_json::from_slice(request.payload.as_ref().unwrap()).unwrap();
        assert_eq!(body["id"].as_str().unwrap().as_bytes(), key, "its key is its id");
        let row: u32 = body["id"].as_str().unwrap().split('-').nth(2).unwrap().parse().unwrap();
        // Each answer twice, as a worker may give it after a crash; every third row is dead.
        let (topic, answer) = match row % 3 {
            0 => (DEAD_LETTERS, dead_letter(request, Code::Decode)),
            _ => (CAPTIONS, caption(&key, &format!("row {row}"))),
        };
        job.flow.write_to(topic, [answer.clone(), answer]);
        settled += 1;
        settled < 12
    });
    let ran = finish(child);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let rows = job.rows();
    for (number, row) in rows.iter().enumerate() {
        let (text, code) = match number % 3 {
            0 => (Value::Null, json!("decode")),
            _ => (json!(format!("row {number}")), Value::Null),
        };
        assert_eq!((&row["text"], &row["error_code"]), (&text, &code), "{row}");
    }
    assert_eq!((rows.len(), job.requests(), job.place.recorded("out.jsonl")), (12, 12, 12));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_lets_the_answers_come_that_are_under_way_and_the_same_command_goes_on() {
    let job = Job::of_pictures(Flow::start(2), 100);
    let arguments = ["list.csv", "--mini-batch-size", "10"];
    let child = job.spawn(&arguments);
    job.until_requested(10).await;
    signal(&child, "-TERM");
    let worker = job.flow.worker(fast());
    let ran = finish(child);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.err.contains("stopping: 10 images are still under way; a second signal ends at once"), "{ran:?}");
    assert!(ran.err.contains("stopped: 10 rows are done and kept"), "{ran:?}");
    assert_eq!(job.run(&arguments).code, Some(0));
    job.assert_complete(100);
    assert_eq!(job.requests(), 100);

    let mut child = job.spawn(&["list.csv", "--restart", "--topic", "retry.1"]);
    let counter = job.flow.counter();
    eventually("requests that nobody reads", || counter.records("retry.1") == 100).await;
    signal(&child, "-INT");
    let mut said = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut said).unwrap();
    assert!(said.starts_with("stopping: 100 images are still under way"), "{said}");
    signal(&child, "-INT");
    assert_eq!(finish(child).code, Some(130));
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn local_images_travel_in_requests_or_as_addresses_and_what_cannot_is_a_row_with_an_error() {
    let mut flow = Flow::start(1);
    flow.settings.kafka.max_message_size = bytesize::ByteSize::kib(20);
    let job = Job::new(flow);
    job.place.write("a.png", png(16, 16, 1));
    job.place.write("empty.png", "");
    job.place.write("long.png", vec![7; 40_000]);
    job.place.write("list.csv", "image,n\na.png,1\nempty.png,2\nlong.png,3\nmissing.png,4\n");
    let worker = job.flow.worker(fast());
    let ran = job.run(&["list.csv"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(job.codes(), ["-", "unsupported_media", "too_large", "not_found"]);
    let rows = job.rows();
    assert_eq!((&rows[0]["image"], &rows[0]["n"]), (&json!("a.png"), &json!("1")));
    let message = rows[2]["error_message"].as_str().unwrap();
    assert!(message.contains("long.png") && message.contains("kafka.max_message_size"), "{message}");
    assert!(message.contains("--as-file-url"), "{message}");
    assert_eq!(job.requests(), 1);

    let ran = job.run(&["list.csv", "--as-file-url", "--restart"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(job.codes(), ["access_denied"; 4], "the worker opens no folder");
    let last = job.flow.read(REQUESTS).pop().unwrap();
    let last: Value = serde_json::from_slice(&last.payload.unwrap()).unwrap();
    let address = format!("file://{}", job.place.path("missing.png").display());
    assert_eq!(last["image"], address);
    assert!(worker.stop().await.clean());
}

#[test]
fn flags_of_a_model_and_of_workers_do_not_go_together() {
    let place = Place::new();
    place.list("list.csv", 1);
    for (arguments, what) in [
        (&["--kafka", "--model", "demo"][..], "'--kafka' cannot be used with '--model"),
        (&["--kafka", "--device", "cpu"], "'--kafka' cannot be used with '--device"),
        (&["--model", "demo", "--topic", "other"], "cannot be used with '--topic <TOPIC>'"),
        (&["--model", "demo", "--timeout", "1m"], "cannot be used with '--timeout <DURATION>'"),
        (&["--kafka", "--timeout", "0s"], "--timeout must be longer than 0"),
        (&["--kafka", "--set", "kafka.inputs=[]"], "kafka.inputs"),
    ] {
        let ran = place.run(&[&["list.csv", "--output", "o.csv"], arguments].concat());
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert!(ran.err.contains(what), "{what}: {ran:?}");
    }
    assert!(!place.path("o.csv.journal.jsonl").exists(), "something was begun");
}
