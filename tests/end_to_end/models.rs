//! Models are exchanged while the flow runs.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use blipstream::admin;
use blipstream::kafka::NewRecord;
use blipstream::metrics::Metrics;
use blipstream::pipeline::{Control, Wanted};
use bytesize::ByteSize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::support::client::eventually;
use crate::support::flow::{Answers, Flow, asking, request};
use crate::support::http::{Reply, http};
use crate::support::promises::{assert_all_captioned, assert_no_duplicate, inline, slow};

fn caption(name: &str) -> Wanted {
    Wanted { caption: Some(name.into()), ..Wanted::default() }
}

async fn post(admin: SocketAddr, body: &Value) -> Reply {
    http(admin, "POST /admin/models", &body.to_string()).await
}

fn models(answers: &Answers) -> BTreeMap<String, usize> {
    let mut models = BTreeMap::new();
    for record in answers.captions.values().flatten() {
        *models.entry(record["model"]["id"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    models
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn models_are_exchanged_under_load_and_every_message_is_captioned_once() {
    const COUNT: usize = 1200;
    let flow = Flow::start(3);
    let worker = flow.worker_on(vec![slow(), slow()]);
    flow.write((0..COUNT).map(|n| request(n, inline(n))));
    for (at, name) in [(100, "second"), (400, "third")] {
        eventually("work goes on", || worker.control.totals().captions > at).await;
        let control = worker.control.clone();
        let exchange = move || control.models().unwrap().exchange(&caption(name)).map(|now| now.caption.id);
        assert_eq!(tokio::task::spawn_blocking(exchange).await.unwrap().unwrap(), name);
        assert_eq!(worker.control.status().model.unwrap().id, name);
    }
    flow.until_answered(COUNT);
    // What comes after the exchange is the new model's, without exception.
    flow.write((COUNT..COUNT + 50).map(|n| request(n, inline(n))));
    let answers = flow.until_answered(COUNT + 50);
    assert!(worker.stop().await.clean());
    assert_all_captioned(&answers, COUNT + 50);
    assert_no_duplicate(&answers);
    let by_model = models(&answers);
    assert!(["fake", "second", "third"].iter().all(|name| by_model[*name] > 50), "{by_model:?}");
    let late = answers.captions.values().flatten().filter(|record| {
        let id: usize = record["id"].as_str().unwrap().parse().unwrap();
        id >= COUNT && record["model"]["id"] != "third"
    });
    assert_eq!(late.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_old_model_said_is_not_remembered_for_the_new_one() {
    let mut flow = Flow::start(1);
    flow.settings.model.caption_cache = ByteSize::mib(1);
    flow.settings.filter.source = Some("fake".into());
    flow.settings.answerer.source = Some("fake".into());
    let worker = flow.worker(slow());
    let judged = || asking(&json!({"image": inline(1), "tasks": ["caption", "filter"]}));
    let mut count = 0;
    let mut next = |requests: Vec<NewRecord>| {
        count += requests.len();
        flow.write(requests);
        let answers = flow.until_answered(count);
        let record = &answers.captions[&format!("requests/0/{}", count - 1)][0];
        let id = |field: &str| record[field]["id"].as_str().map(str::to_owned);
        (record["cached"] == true, id("model").unwrap(), id("filter"))
    };
    let (model, filter) = (|name: &str| name.to_owned(), |name: &str| Some(name.to_owned()));
    next(vec![judged()]);
    assert_eq!(next(vec![judged()]), (true, model("fake"), filter("fake filter")));
    let models = worker.control.models().unwrap();
    models.exchange(&caption("second")).unwrap();
    assert_eq!(next(vec![judged()]), (false, model("second"), filter("fake filter")));
    assert_eq!(next(vec![judged()]), (true, model("second"), filter("fake filter")));
    models.exchange(&Wanted { filter: Some("other".into()), ..Wanted::default() }).unwrap();
    assert_eq!(next(vec![judged()]), (false, model("second"), filter("other")));
    assert_eq!(models.now().filter.unwrap().id, "other");
    models.exchange(&Wanted { vqa: Some("third".into()), ..Wanted::default() }).unwrap();
    flow.write([asking(&json!({"image": inline(1), "tasks": ["answer"], "questions": "what is it?"}))]);
    let answers = flow.until_answered(count + 1);
    let record = &answers.captions[&format!("requests/0/{count}")][0];
    assert_eq!((&record["answerer"]["id"], record["answers"].as_array().unwrap().len()), (&json!("third"), 1));
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_cannot_be_carried_out_is_refused_with_its_reason_and_nothing_changes() {
    let flow = Flow::start(1);
    let stop = CancellationToken::new();
    let token = Some("secret".to_owned());
    let listen = || SocketAddr::from(([127, 0, 0, 1], 0));
    let early = Control::new(&flow.settings.flow, Arc::new(Metrics::new()));
    let early = admin::serve(listen(), None, early, stop.clone()).await.unwrap().address;
    let reply = post(early, &json!({"caption": "second"})).await;
    assert!(reply.status == 503 && reply.body.contains("being loaded"), "{reply:?}");

    let worker = flow.worker(slow());
    let guarded = admin::serve(listen(), token, worker.control.clone(), stop.clone()).await.unwrap().address;
    assert_eq!(post(guarded, &json!({"caption": "second"})).await.status, 401);
    let admin = admin::serve(listen(), None, worker.control.clone(), stop.clone()).await.unwrap().address;
    eventually("the models are there", || worker.control.models().is_some()).await;
    for (order, words) in [
        (json!({}), "no model is named"),
        (json!({"captain": "second"}), "unknown field `captain`"),
        (json!({"caption": "broken"}), "model.safetensors is missing"),
        (json!({"caption": "large"}), "images of side 16, and what is under way has 8"),
        (json!({"filter": "second"}), "started without one; set filter.source"),
        (json!({"vqa": "second"}), "started without one; set answerer.source"),
        (json!({"canary": "second"}), "started without one; set canary.source"),
    ] {
        let reply = post(admin, &order).await;
        assert!(reply.status == 422 && reply.json()["error"].as_str().unwrap().contains(words), "{order}: {reply:?}");
    }
    assert_eq!(http(admin, "GET /admin/models", "").await.json()["caption"]["id"], "fake");

    let order = json!({"caption": "slow"});
    let first = tokio::spawn(async move { post(admin, &order).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let second = post(admin, &json!({"caption": "second"})).await;
    assert!(second.status == 409 && second.body.contains("under way"), "{second:?}");
    assert_eq!(first.await.unwrap().json()["caption"]["id"], "slow");
    let metrics = worker.control.metrics().render();
    for line in ["model_exchanges_total{result=\"done\"} 1", "model_exchanges_total{result=\"refused\"} 7"] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
    assert!(worker.stop().await.clean());
    stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_takes_a_model_of_a_folder_while_it_runs() {
    let mut flow = Flow::start(1);
    flow.settings.filter.source = Some("demo".into());
    let worker = flow.process();
    let picture =
        |n: usize| asking(&json!({"image": inline(n), "tasks": ["caption", "filter"], "text": "a red circle"}));
    flow.write([picture(0)]);
    let before = flow.until_answered(1).captions["requests/0/0"][0].clone();
    let admin = worker.admin().expect("the admin port is logged");
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo");
    let reply = post(admin, &json!({"caption": folder, "filter": "demo"})).await;
    assert_eq!((reply.status, &reply.json()["caption"]["id"]), (200, &json!(folder)), "{reply:?}");
    let reply = post(admin, &json!({"caption": "no such thing"})).await;
    assert!(reply.status == 422 && reply.body.contains("no such thing"), "{reply:?}");
    flow.write([picture(0)]);
    let after = flow.until_answered(2).captions["requests/0/1"][0].clone();
    assert_eq!((&after["model"]["id"], &before["model"]["id"]), (&json!(folder), &json!("blipstream-demo")));
    // The same weights say the same.
    assert_eq!((&after["text"], &after["candidates"]), (&before["text"], &before["candidates"]));
    assert_eq!(worker.terminate(), Some(0));
}
