//! The same picture twice: captioned once, answered as often as it is asked for.

use std::collections::BTreeSet;

use blipstream::caption::fake::FakeOptions;
use bytesize::ByteSize;
use serde_json::{Value, json};

use crate::support::flow::{Answers, Flow, request};
use crate::support::images::{Answer, ImageServer, png};
use crate::support::promises::inline;

fn record<'a>(answers: &'a Answers, id: &str) -> &'a Value {
    let mut records = answers.captions.values().flatten();
    records.find(|record| record["id"] == id).unwrap_or_else(|| panic!("no caption of {id}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_equal_picture_gets_the_caption_that_was_written_for_it_before() {
    let mut flow = Flow::start(2);
    flow.settings.model.caption_cache = ByteSize::mib(1);
    let images = ImageServer::start().await.with("/a", Answer::Body(png(20, 10, 1)));
    // Fetched, and inline: what counts is what the picture is.
    flow.write((0..3).map(|n| request(format!("first-{n}"), inline(n))).chain([request("web", images.url("/a"))]));
    let worker = flow.worker(FakeOptions::default());
    let first = flow.until_answered(4);
    assert!(first.captions.values().flatten().all(|record| record.get("cached").is_none()));

    flow.write((0..30).map(|n| request(format!("again-{n}"), inline(n % 3))));
    flow.write([request("web again", images.url_at("127.0.0.1", "/a?other"))]);
    let mut prompted = request("prompted", "");
    prompted.value =
        Some(json!({"id": "prompted", "image": inline(0), "prompt": "a photo of"}).to_string().into_bytes());
    let mut wrong = request("wrong", "");
    let params = json!({"max_new_tokens": 100_000});
    wrong.value = Some(json!({"id": "wrong", "image": inline(0), "params": params}).to_string().into_bytes());
    flow.write([prompted, wrong]);
    let answers = flow.until_answered(4 + 30 + 3);
    for n in 0..30 {
        let (again, first) = (record(&answers, &format!("again-{n}")), record(&answers, &format!("first-{}", n % 3)));
        assert_eq!(again["cached"], true, "{again}");
        for field in ["text", "logprob", "tokens", "finish", "model", "image"] {
            assert_eq!(again[field], first[field], "{field} of again-{n}");
        }
        assert_ne!(again["origin"], first["origin"]);
    }
    assert_eq!(record(&answers, "web again")["cached"], true);
    assert_eq!(record(&answers, "web again")["image"]["width"], 20);
    assert!(record(&answers, "prompted").get("cached").is_none(), "it asks for something else");
    let codes: BTreeSet<_> =
        answers.dead_letters.values().flatten().map(|d| d.header("blipstream-error-code")).collect();
    assert_eq!(codes, BTreeSet::from([Some("bad_params")]));

    let metrics = worker.control.metrics().render();
    for line in [
        "blipstream_caption_cache_lookups_total{result=\"hit\"} 31",
        "blipstream_caption_cache_lookups_total{result=\"miss\"} 5",
        "blipstream_captions_total{device=\"cache\",model=\"fake\"} 31",
    ] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_cache_off_every_picture_reaches_a_device() {
    let flow = Flow::start(1);
    flow.write((0..2).map(|n| request(n, inline(1))));
    let worker = flow.worker(FakeOptions::default());
    flow.until_answered(2);
    flow.write((2..4).map(|n| request(n, inline(1))));
    let answers = flow.until_answered(4);
    assert!(answers.captions.values().flatten().all(|record| record.get("cached").is_none()));
    assert!(!worker.control.metrics().render().contains("device=\"cache\""));
    assert!(worker.stop().await.clean());
}
