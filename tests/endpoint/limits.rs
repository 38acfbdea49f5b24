//! Who is let in, and how much at a time.

use std::time::Duration;

use blipstream::caption::fake::FakeOptions;
use serde_json::json;
use tokio::io::AsyncWriteExt as _;

use super::support::client::eventually;
use super::support::http::raw;
use super::support::promises::inline;
use super::{Server, http, settings};

fn slow(millis: u64) -> FakeOptions {
    FakeOptions { encode_delay: Duration::from_millis(millis), ..FakeOptions::default() }
}

fn two_rows() -> String {
    json!({"input_data": {"columns": ["image"], "data": [[inline(1)], [inline(2)]]}}).to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_finds_no_room_is_told_when_to_come_again() {
    let mut settings = settings();
    (settings.endpoint.max_rows, settings.endpoint.max_in_flight) = (2, 3);
    let server = Server::with(settings, slow(500)).await;
    let body = two_rows();
    let first = server.post("/score", &body);
    let second = async {
        eventually("the first is under way", || server.control.endpoint().unwrap().in_flight() == 2).await;
        let reply = server.post("/score", &body).await;
        assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (429, Some("busy")), "{reply:?}");
        let after: u64 = reply.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=60).contains(&after), "{after}");
        // There is room for one.
        server.post("/score", &json!({"image": inline(3)}).to_string()).await
    };
    let (first, third) = tokio::join!(first, second);
    assert_eq!((first.status, third.status), (200, 200));
    assert_eq!(server.metric("blipstream_endpoint_rows_in_flight"), 0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_body_is_refused_before_it_is_read() {
    let mut settings = settings();
    settings.endpoint.max_body = bytesize::ByteSize::kib(1);
    let server = Server::with(settings, FakeOptions::default()).await;
    // Nothing of it is sent.
    let head = "POST /score HTTP/1.1\r\nhost: test\r\nconnection: close\r\n";
    let reply = raw(server.at, &format!("{head}content-length: 1025\r\n\r\n")).await;
    assert!(reply.status == 413 && reply.body.contains("endpoint.max_body"), "{reply:?}");
    // Of no announced length.
    let chunk = format!("800\r\n{}\r\n0\r\n\r\n", "x".repeat(0x800));
    let reply = raw(server.at, &format!("{head}transfer-encoding: chunked\r\n\r\n{chunk}")).await;
    assert_eq!(reply.status, 413, "{reply:?}");
    assert_eq!(server.post("/score", &"{".repeat(1024)).await.status, 400, "as long as is allowed");
    let used = server.control.budget().endpoint.as_ref().unwrap().messages.used();
    assert_eq!((used.items, used.bytes), (0, 0), "what was refused holds no room");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_no_announced_length_takes_no_more_room_than_it_has_once_it_has_come() {
    let mut settings = settings();
    // Room for one body that may be of any length, not for two.
    settings.flow.max_message_bytes = bytesize::ByteSize::kib(64);
    settings.endpoint.max_body = bytesize::ByteSize::kib(48);
    let server = Server::with(settings, slow(500)).await;
    let body = two_rows();
    let head = "POST /score HTTP/1.1\r\nhost: test\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    let request = format!("{head}{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let second = async {
        eventually("the first is under way", || server.control.endpoint().unwrap().in_flight() == 2).await;
        raw(server.at, &request).await
    };
    let (first, second) = tokio::join!(raw(server.at, &request), second);
    assert_eq!((first.status, second.status), (200, 200), "{second:?}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_takes_too_long_ends_as_an_error() {
    let mut settings = settings();
    settings.endpoint.timeout = Duration::from_millis(300);
    let server = Server::with(settings, slow(1000)).await;
    // The second of two batches waits for longer than it may.
    let rows: Vec<_> = (0..8).map(|seed| json!([inline(seed)])).collect();
    let body = json!({"input_data": {"columns": ["image"], "data": rows}}).to_string();
    let rows = server.post("/score", &body).await.json();
    let late = rows.as_array().unwrap().iter().filter(|row| row["error"]["code"] == "deadline").count();
    assert!((1..8).contains(&late), "{rows}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_no_room_for_ever() {
    let server = Server::with(settings(), slow(50)).await;
    let body = two_rows();
    let mut stream = tokio::net::TcpStream::connect(server.at).await.unwrap();
    let head = format!("POST /score HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    eventually("it is under way", || server.control.endpoint().unwrap().in_flight() > 0).await;
    drop(stream);
    eventually("its rows have ended", || server.control.endpoint().unwrap().in_flight() == 0).await;
    assert!(server.control.take_lost().is_none());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_answers_what_is_under_way_and_sends_others_elsewhere() {
    let server = Server::with(settings(), slow(500)).await;
    let body = two_rows();
    let first = server.post("/score", &body);
    let then = async {
        eventually("it is under way", || server.control.endpoint().unwrap().in_flight() == 2).await;
        server.control.drain("a test");
        let reply = server.post("/score", &body).await;
        assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (503, Some("draining")), "{reply:?}");
        assert_eq!(server.get("/v2/health/ready").await.status, 503);
    };
    let (first, ()) = tokio::join!(first, then);
    assert_eq!(first.status, 200, "{first:?}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_asked_for_where_there_is_one_and_of_web_pages_in_any_case() {
    let server = Server::start().await;
    let body = json!({"image": inline(1)}).to_string();
    assert_eq!(http(server.at, "POST /score\norigin: http://evil.example", &body).await.status, 403);
    server.stop().await;
    let mut settings = settings();
    settings.endpoint.token = Some("secret".into());
    let server = Server::with(settings, FakeOptions::default()).await;
    assert_eq!(server.post("/score", &body).await.status, 401);
    assert_eq!(http(server.at, "POST /score\nauthorization: Bearer secreT", &body).await.status, 401);
    for kind in ["Bearer", "bearer", "BEARER "] {
        let head = format!("POST /score\nauthorization: {kind} secret");
        assert_eq!(http(server.at, &head, &body).await.status, 200, "{kind}");
    }
    assert_eq!(http(server.at, "POST /score\nauthorization: Basic secret", &body).await.status, 401);
    assert_eq!(server.get("/v2/models/caption").await.status, 401);
    for open in ["/", "/v2/health/ready", "/openapi.json"] {
        assert_eq!(server.get(open).await.status, 200, "{open}");
    }
    server.stop().await;
}
