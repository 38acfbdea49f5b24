//! `POST /score`.

use blipstream::caption::fake::FakeOptions;
use serde_json::{Value, json};

use super::support::images::{Answer, ImageServer, png};
use super::support::promises::inline;
use super::{Server, settings, with_answerer, with_filter};

fn table(images: &[&str]) -> String {
    let rows: Vec<_> = images.iter().map(|image| json!([image])).collect();
    let index: Vec<_> = (0..images.len()).collect();
    json!({"input_data": {"columns": ["image"], "index": index, "data": rows}}).to_string()
}

fn keys(row: &Value) -> Vec<&str> {
    row.as_object().unwrap().keys().map(String::as_str).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cards_table_gets_the_cards_list_of_texts() {
    let server = Server::start().await;
    let images = [inline(1), inline(2), inline(1)];
    let images: Vec<&str> = images.iter().map(String::as_str).collect();
    let reply = server.post("/score", &table(&images)).await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")), "{reply:?}");
    let rows = reply.json();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 3);
    assert!(
        rows.iter().all(|row| keys(row) == ["text"] && row["text"].as_str().unwrap().starts_with("a ")),
        "{rows:?}"
    );
    assert!(rows[0] == rows[2] && rows[0] != rows[1], "in the order of the rows: {rows:?}");
    // The values of a table's only column may stand in a list, and a request may be in the native form.
    let flat = json!({"input_data": {"columns": ["image"], "index": [0, 1], "data": images[..2]}}).to_string();
    assert_eq!(server.post("/score", &flat).await.json(), json!(rows[..2]));
    let native = json!({"image": images[1]}).to_string();
    assert_eq!(server.post("/score", &native).await.json(), json!(rows[1..2]));
    assert_eq!(server.post("/score", &table(&[])).await.json(), json!([]));
    assert_eq!(server.metric("blipstream_endpoint_rows_total{code=\"ok\"}"), 6);
    assert_eq!(server.metric("blipstream_endpoint_requests_total{route=\"score\",status=\"200\"}"), 4);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_fails_fails_alone_and_in_its_place() {
    let images = ImageServer::start().await.with("/a.png", Answer::Body(png(9, 9, 3)));
    let mut settings = settings();
    settings.fetch.allow_networks.push("127.0.0.0/8".parse().unwrap());
    let server = Server::with(settings, FakeOptions::default()).await;
    let (good, gone) = (images.url("/a.png").to_string(), images.url("/b.png").to_string());
    let rows = server
        .post("/score", &table(&["hdfs://x/y", &good, &gone, "bm8gaW1hZ2UgYXQgYWxsLCBzdXJlbHk=", &good]))
        .await
        .json();
    let codes: Vec<_> = (0..5).map(|at| rows[at]["error"]["code"].as_str()).collect();
    assert_eq!(codes, [Some("bad_reference"), None, Some("not_found"), Some("unsupported_media"), None], "{rows}");
    assert!(
        rows[0]["text"].is_null() && rows[0]["error"]["message"].as_str().unwrap().contains("data[0].image"),
        "{rows}"
    );
    for code in ["bad_reference", "not_found", "unsupported_media"] {
        assert_eq!(server.metric(&format!("blipstream_endpoint_rows_total{{code=\"{code}\"}}")), 1, "{code}");
    }
    assert_eq!((&rows[2]["error"]["stage"], &rows[1]["text"]), (&json!("fetch"), &rows[4]["text"]));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_records_judged_texts_and_embeddings_come_where_they_are_asked_for() {
    let server = Server::with(with_filter(), FakeOptions::default()).await;
    let request =
        json!({"id": "mine", "image": inline(1), "tasks": ["caption", "filter"], "text": ["a dog"]}).to_string();
    let row = &server.post("/score", &request).await.json()[0];
    assert_eq!(keys(row), ["candidates", "text"]);
    assert_eq!(row["candidates"].as_array().unwrap().len(), 2);
    let record = &server.post("/score?records=true", &request).await.json()[0];
    assert_eq!((&record["schema"], &record["id"]), (&json!("blipstream.caption.v1"), &json!("mine")));
    assert_eq!(record["origin"]["topic"], "endpoint");
    let request = json!({"image": inline(1), "tasks": ["embed"], "text": ["a dog"]}).to_string();
    let row = &server.post("/score", &request).await.json()[0];
    assert_eq!(keys(row), ["embeddings", "text"]);
    assert_eq!(keys(&row["embeddings"]), ["image", "text"]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_of_a_request_and_of_a_table_are_answered_in_their_rows() {
    let server = Server::with(with_answerer(), FakeOptions::default()).await;
    let both = json!(["caption", "answer"]);
    let request = json!({"image": inline(1), "tasks": both, "questions": ["what colour", "?"]}).to_string();
    let row = &server.post("/score", &request).await.json()[0];
    assert_eq!(keys(row), ["answers", "text"]);
    assert!(row["answers"][0]["text"].as_str().unwrap().starts_with("colour "), "{row}");
    assert_eq!((&row["answers"][1]["text"], row["answers"][1].get("error").is_some()), (&Value::Null, true));
    let record = &server.post("/score?records=true", &request).await.json()[0];
    assert_eq!((&record["answers"], &record["answerer"]["id"]), (&row["answers"], &json!("fake answerer")));
    let table = json!({"input_data": {"columns": ["image", "questions", "tasks"],
        "data": [[inline(1), "what colour", ["answer"]], [inline(1), "what colour", null], [inline(1), null, null]]}});
    let rows = server.post("/score", &table.to_string()).await.json();
    assert_eq!(rows[0]["text"], row["answers"][0]["text"], "{rows}");
    let error = rows[1]["error"]["message"].as_str().unwrap();
    assert!(error.contains("data[1].questions: has no effect without the task `answer`"), "{rows}");
    assert_eq!(keys(&rows[2]), ["text"]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_cannot_be_answered_says_what_is_wrong_and_where() {
    let mut settings = settings();
    (settings.endpoint.max_rows, settings.model.sequences_limit) = (100, 4);
    let options = FakeOptions { max_prompt_words: 8, ..FakeOptions::default() };
    let server = Server::with(settings, options.clone()).await;
    let image = inline(1);
    let many = table(&vec![image.as_str(); 1000]);
    let input = |input: Value| json!({"input_data": input}).to_string();
    // The request as a whole.
    for (body, code, text) in [
        (String::new(), "bad_message", "empty"),
        ("{".into(), "bad_message", "not valid JSON"),
        (many, "bad_message", "input_data.data: 1000 rows; at most 100"),
        (input(json!({"columns": ["picture"], "data": [["x"]]})), "bad_message", "the column `image` is missing"),
        (
            input(json!({"columns": ["image", "id"], "data": [["x", "1"], ["x"]]})),
            "bad_message",
            "data[1]: 1 values for 2",
        ),
        (
            input(json!({"columns": ["image"], "index": [0], "data": [["x"], ["x"]]})),
            "bad_message",
            "1 values for 2 rows",
        ),
        (json!({"image": image, "tasks": ["paint"]}).to_string(), "bad_params", "tasks[0]: unknown task `paint`"),
        (json!({"image": image, "params": {"beams": 3}}).to_string(), "bad_params", "beams"),
    ] {
        let reply = server.post("/score", &body).await;
        let error = &reply.json()["error"];
        assert_eq!((reply.status, error["code"].as_str()), (400, Some(code)), "{reply:?}");
        assert!(error["message"].as_str().unwrap().contains(text), "{text}: {reply:?}");
    }
    // One row of it.
    for (row, code, text) in [
        (json!({"image": image, "params": {"num_beams": 9}}), "bad_params", "num_beams"),
        (json!({"image": image, "prompt": "a ".repeat(30)}), "bad_params", "prompt"),
        (json!({"image": image, "tasks": ["filter"], "text": ["a dog"]}), "model_unavailable", "filter.source"),
        (json!({"image": image, "tasks": ["answer"], "questions": "how many"}), "model_unavailable", "answerer.source"),
    ] {
        let reply = server.post("/score", &row.to_string()).await;
        let error = &reply.json()[0]["error"];
        assert_eq!((reply.status, error["code"].as_str()), (200, Some(code)), "{reply:?}");
        assert!(error["message"].as_str().unwrap().contains(text), "{text}: {reply:?}");
    }
    server.stop().await;
    let server = Server::with(with_filter(), options).await;
    let reply = server.post("/score", &json!({"image": image, "tasks": ["filter"], "text": " ! "}).to_string()).await;
    assert!(reply.json()[0]["error"]["message"].as_str().unwrap().contains("text[0]"), "{reply:?}");
    server.stop().await;
}
