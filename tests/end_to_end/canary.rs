//! A second captioner captions a share of the images once more.

use std::collections::{BTreeMap, BTreeSet};

use blipstream::caption::fake::FakeOptions;
use blipstream::endpoint;
use blipstream::pipeline::Wanted;
use blipstream::settings::Delivery;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::support::client::eventually;
use crate::support::flow::{Answers, Flow, Worker, asking, request};
use crate::support::http::http;
use crate::support::promises::{assert_all_captioned, assert_no_duplicate, inline, slow};

const CANARY: &str = "canary";

/// A flow whose workers have this canary, and a topic for it.
fn flow(partitions: i32, canary: &str, share: f64) -> Flow {
    let mut flow = Flow::start_with(partitions, &[CANARY]);
    flow.settings.kafka.retry_topics.clear();
    flow.settings.kafka.canary_topic = Some(CANARY.into());
    (flow.settings.canary.source, flow.settings.canary.share) = (Some(canary.into()), share);
    flow
}

/// What was compared, by the id of the request.
fn compared(flow: &Flow) -> BTreeMap<String, Vec<Value>> {
    let mut records: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for message in flow.read(CANARY) {
        let record: Value = serde_json::from_slice(message.payload.as_ref().unwrap()).unwrap();
        let origin = message.header("blipstream-origin").unwrap();
        assert!(origin.starts_with("requests/"), "{origin}");
        let id = record["id"].as_str().unwrap().to_owned();
        assert_eq!(message.key.as_deref(), Some(id.as_bytes()));
        records.entry(id).or_default().push(record);
    }
    records
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_canary_captions_its_share_and_every_caption_and_comparison_is_published_once() {
    const COUNT: usize = 256;
    for delivery in [Delivery::AtLeastOnce, Delivery::ExactlyOnce] {
        let flow = flow(3, "other", 0.3).delivering(delivery);
        let worker = flow.worker_on(vec![slow(), slow()]);
        flow.write((0..COUNT).map(|n| request(n, inline(n))));
        flow.until_answered(COUNT);
        assert!(worker.stop().await.clean());
        let answers = Answers::read(&flow);
        assert_all_captioned(&answers, COUNT);
        assert_no_duplicate(&answers);
        if delivery == Delivery::AtLeastOnce {
            // The embedded broker does not tell the offsets of transactions.
            assert_eq!(flow.committed().into_iter().flatten().sum::<i64>(), COUNT as i64);
        }

        let captions: BTreeMap<&str, &Value> =
            answers.captions.values().flatten().map(|record| (record["id"].as_str().unwrap(), record)).collect();
        let first =
            |record: &Value| u64::from_str_radix(&record["image"]["sha256"].as_str().unwrap()[..8], 16).unwrap();
        let chosen = captions.iter().filter(|(_, record)| (first(record) as f64) < 0.3 * 4_294_967_296.0);
        let chosen: BTreeSet<&str> = chosen.map(|(id, _)| *id).collect();
        assert!((50..105).contains(&chosen.len()), "{}", chosen.len());
        let compared = compared(&flow);
        assert_eq!(compared.keys().map(String::as_str).collect::<BTreeSet<_>>(), chosen);
        for (id, records) in &compared {
            let [record] = &records[..] else { panic!("compared twice: {records:?}") };
            let caption = captions[id.as_str()];
            assert_eq!((&record["schema"], &record["result"]), (&json!("blipstream.canary.v1"), &json!("different")));
            assert_eq!((&record["caption"]["text"], &record["word_distance"]), (&caption["text"], &json!(1)));
            let words = caption["text"].as_str().unwrap().split_once(' ').unwrap().1;
            assert_eq!(record["canary"]["text"], format!("the {words}"));
            assert_eq!((&record["caption"]["model"], &record["image"]), (&caption["model"], &caption["image"]));
            assert_eq!((&record["canary"]["model"]["id"], &record["origin"]), (&json!("other"), &caption["origin"]));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_that_fails_costs_no_caption_and_no_device() {
    let flow = flow(1, "broken", 1.0);
    let worker = flow.worker(FakeOptions::default());
    flow.write((0..50).map(|n| request(n, inline(n))));
    flow.until_answered(50);
    assert!(worker.control.status().devices.iter().all(|device| device.alive));
    let metrics = worker.control.metrics().clone();
    assert!(worker.stop().await.clean());
    let answers = Answers::read(&flow);
    assert_all_captioned(&answers, 50);
    assert_no_duplicate(&answers);
    let compared = compared(&flow);
    assert_eq!(compared.len(), 50);
    for record in compared.values().flatten() {
        assert_eq!((&record["result"], &record["canary"]["text"]), (&json!("error"), &Value::Null));
        assert!(record["canary"]["error"].as_str().unwrap().contains("memory"), "{record}");
        assert!(record["caption"]["text"].as_str().unwrap().starts_with("a "), "{record}");
    }
    assert!(metrics.render().contains("blipstream_canary_total{result=\"error\"} 50"));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_row_is_compared_by_itself_and_what_only_the_canary_cannot_do_spoils_no_other() {
    let flow = flow(1, "brief", 1.0);
    let worker = flow.worker(FakeOptions::default());
    let row = |n: usize, prompt: &str| json!([inline(n), prompt]);
    let table = json!({"input_data": {"columns": ["image", "prompt"], "data": [
        row(1, "a picture"), row(2, "a picture of"), ["data:,", ""], row(1, "a picture")]}});
    flow.write([asking(&table)]);
    flow.until_answered(4);
    assert!(worker.stop().await.clean());
    let answers = Answers::read(&flow);
    assert_eq!((answers.captions.len(), answers.dead_letters.len()), (3, 1));
    let mut records: Vec<Value> =
        flow.read(CANARY).iter().map(|m| serde_json::from_slice(m.payload.as_ref().unwrap()).unwrap()).collect();
    records.sort_by_key(|record| record["index"].as_u64());
    let results: Vec<_> = records.iter().map(|record| (record["index"].clone(), record["result"].clone())).collect();
    assert_eq!(results, [(0, "equal"), (1, "error"), (3, "equal")].map(|(at, result)| (json!(at), json!(result))));
    assert!(records[1]["canary"]["error"].as_str().unwrap().contains("the prompt has 3 tokens"), "{}", records[1]);
    assert_eq!((&records[0]["word_distance"], &records[1]["word_distance"]), (&json!(0), &Value::Null));
    assert_eq!(flow.committed(), [Some(1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_canary_has_no_image_of_the_endpoint_and_can_be_exchanged() {
    let mut flow = flow(1, "other", 1.0);
    flow.settings.endpoint.listen = Some(([127, 0, 0, 1], 0).into());
    let worker = flow.worker(FakeOptions::default());
    let stop = CancellationToken::new();
    let port = endpoint::serve(&flow.settings.endpoint, worker.control.clone(), stop.clone()).await.unwrap();
    eventually("the models are there", || worker.control.models().is_some()).await;
    let row = json!({"input_data": {"columns": ["image"], "data": [[inline(1)]]}}).to_string();
    assert_eq!(http(port.address, "POST /score", &row).await.status, 200);
    let metrics = worker.control.metrics().render();
    assert!(
        metrics.contains("blipstream_batch_size_count{device=\"cpu#0\",model=\"fake\",phase=\"encode\"} 1"),
        "{metrics}"
    );
    assert!(!metrics.contains("model=\"other\""), "{metrics}");
    let models = worker.control.models().unwrap();
    let large = Wanted { canary: Some("large".into()), ..Wanted::default() };
    let refused = models.exchange(&large).unwrap_err().to_string();
    assert!(refused.contains("canary: the model takes images of side 16, and what is under way has 8"), "{refused}");
    assert_eq!(models.now().canary.unwrap().id, "other");
    for (n, name) in ["second", "third"].into_iter().enumerate() {
        let wanted = Wanted { canary: Some(name.into()), ..Wanted::default() };
        let now = models.exchange(&wanted).unwrap();
        assert_eq!((now.caption.id.as_str(), now.canary.unwrap().id.as_str()), ("fake", name));
        flow.write([request(n, inline(n))]);
        flow.until_answered(n + 1);
    }
    assert!(worker.stop().await.clean());
    stop.cancel();
    let models: Vec<_> =
        compared(&flow).into_values().flatten().map(|record| record["canary"]["model"]["id"].clone()).collect();
    assert_eq!(models, ["second", "third"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_breaks_ends_what_was_gathered_for_its_canary() {
    const COUNT: usize = 200;
    let flow = flow(1, "other", 0.5);
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    // The second device fails on everything from its third batch on, the probe included.
    let broken = FakeOptions { failing_calls: (3..10_000).collect(), ..slow() };
    let worker = flow.worker_on(vec![slow(), broken]);
    flow.until_answered(COUNT);
    let alive = |worker: &Worker| worker.control.status().devices.iter().filter(|device| device.alive).count();
    eventually("one device is left", || alive(&worker) == 1).await;
    assert!(worker.stop().await.clean());
    let answers = Answers::read(&flow);
    assert_all_captioned(&answers, COUNT);
    assert_no_duplicate(&answers);
    let compared = compared(&flow);
    assert!(compared.values().all(|records| records.len() == 1), "compared twice");
    let chosen = answers.captions.values().flatten().filter(|record| record["image"]["sha256"].as_str().unwrap() < "8");
    assert_eq!(compared.len(), chosen.count());
    for record in compared.values().flatten().filter(|record| record["result"] != "different") {
        assert_eq!(record["canary"]["error"], "the device failed", "{record}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_loses_no_comparison() {
    const COUNT: usize = 120;
    let flow = flow(2, "demo", 1.0);
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    let killed = flow.process();
    flow.until_written(20);
    killed.kill();
    assert!(Answers::read(&flow).count() < COUNT, "the kill came too late to prove anything");
    let second = flow.process();
    eventually("every id is captioned", || Answers::read(&flow).captioned_ids().len() == COUNT).await;
    assert_eq!(second.terminate(), Some(0));
    assert_all_captioned(&Answers::read(&flow), COUNT);
    let compared = compared(&flow);
    assert_eq!(compared.len(), COUNT);
    assert!(compared.values().flatten().all(|record| record["result"] == "equal"));
}
