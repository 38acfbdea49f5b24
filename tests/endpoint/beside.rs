//! Stream and endpoint on the same devices.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use blipstream::caption::fake::FakeOptions;
use blipstream::endpoint;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::http;
use super::support::client::eventually;
use super::support::flow::{Flow, request};
use super::support::promises::inline;

/// Rows of a request: two batches.
const ROWS: usize = 16;

/// A worker with an endpoint, on a flow with so many messages, each batch of 8 images taking 20 ms.
fn flow(share: f64, messages: usize) -> Flow {
    let mut flow = Flow::start(2);
    flow.settings.endpoint.listen = Some(([127, 0, 0, 1], 0).into());
    (flow.settings.endpoint.share, flow.settings.endpoint.timeout) = (share, Duration::from_secs(60));
    flow.write((0..messages).map(|number| request(number, inline(number))));
    flow
}

fn slow() -> FakeOptions {
    FakeOptions { encode_delay: Duration::from_millis(20), ..FakeOptions::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn stream_and_endpoint_keep_their_shares_while_both_have_work() {
    let flow = flow(0.25, 2000);
    let worker = flow.worker(slow());
    let stop = CancellationToken::new();
    let port = endpoint::serve(&flow.settings.endpoint, worker.control.clone(), stop.clone()).await.unwrap();
    eventually("the stream is at work", || worker.control.totals().captions > 100).await;
    let body = {
        let rows: Vec<_> = (0..ROWS).map(|seed| json!([inline(seed)])).collect();
        json!({"input_data": {"columns": ["image"], "data": rows}}).to_string()
    };
    // Enough clients that some rows of theirs always wait.
    let (answered, over) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
    let client = |_| {
        let (body, answered, over, at) = (body.clone(), answered.clone(), over.clone(), port.address);
        tokio::spawn(async move {
            while !over.is_cancelled() {
                let reply = http(at, "POST /score", &body).await;
                assert_eq!(reply.status, 200, "{reply:?}");
                answered.fetch_add(ROWS, Ordering::Relaxed);
            }
        })
    };
    let clients: Vec<_> = (0..6).map(client).collect();
    eventually("the endpoint answers", || answered.load(Ordering::Relaxed) > 0).await;
    let before = (worker.control.totals().captions, answered.load(Ordering::Relaxed));
    eventually("both have done more", || worker.control.totals().captions > before.0 + 600).await;
    let stream = (worker.control.totals().captions - before.0) as f64;
    let direct = (answered.load(Ordering::Relaxed) - before.1) as f64;
    over.cancel();
    for client in clients {
        client.await.unwrap();
    }
    let share = direct / (stream + direct);
    println!("the endpoint had {:.1} % of the images: {direct} beside {stream}", share * 100.0);
    // Whole requests are counted, and what is published, some time after the devices; so some leeway.
    assert!((0.15..0.32).contains(&share), "{share}: {direct} beside {stream}");
    let answers = flow.until_answered(2000);
    assert_eq!(answers.captioned_ids().len(), 2000, "the stream lost nothing");
    assert!(worker.stop().await.clean());
    stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_pause_holds_the_endpoint_too_and_kafkas_end_does_not() {
    let flow = flow(0.5, 0);
    let worker = flow.worker(FakeOptions::default());
    let stop = CancellationToken::new();
    let port = endpoint::serve(&flow.settings.endpoint, worker.control.clone(), stop.clone()).await.unwrap();
    eventually("it is ready", || worker.control.readiness().ready && worker.control.answers()).await;
    let body = json!({"image": inline(1)}).to_string();
    worker.control.pause();
    let reply = http(port.address, "POST /score", &body).await;
    assert!(reply.status == 429 && reply.header("retry-after").is_some(), "{reply:?}");
    worker.control.resume();
    flow.embedded().down().unwrap();
    assert_eq!(http(port.address, "POST /score", &body).await.status, 200);
    flow.embedded().up().unwrap();
    assert!(worker.stop().await.clean());
    stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_says_that_its_model_is_loading() {
    let flow = flow(0.5, 0);
    let control =
        blipstream::pipeline::Control::new(&flow.settings.flow, Arc::new(blipstream::metrics::Metrics::new()));
    let stop = CancellationToken::new();
    let port = endpoint::serve(&flow.settings.endpoint, control.clone(), stop.clone()).await.unwrap();
    let reply = http(port.address, "POST /score", "{}").await;
    assert!(reply.status == 503 && reply.header("retry-after").is_some(), "{reply:?}");
    assert!(reply.body.contains("the model is being loaded"), "{reply:?}");
    assert_eq!(http(port.address, "GET /v2/health/live", "").await.status, 200);
    assert_eq!(http(port.address, "GET /v2/health/ready", "").await.status, 503);
    control.drain("a test");
    let reply = http(port.address, "POST /score", "{}").await;
    assert!(reply.status == 503 && reply.body.contains("shutting down"), "from the order to drain on: {reply:?}");
    stop.cancel();
}
