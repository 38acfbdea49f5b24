//! The Open Inference Protocol.

use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blipstream::caption::fake::FakeOptions;
use serde_json::{Value, json};

use super::serving::Serving;
use super::support::http::http;
use super::support::promises::inline;
use super::{Server, with_answerer, with_filter};

fn tensor(name: &str, data: &[&str]) -> Value {
    json!({"name": name, "shape": [data.len()], "datatype": "BYTES", "data": data})
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_described_and_answer() {
    let server = Server::with(with_filter(), FakeOptions::default()).await;
    for path in ["/v2/health/live", "/v2/health/ready", "/v2/models/caption/ready", "/v2/models/filter/ready"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    assert_eq!(server.get("/v2").await.json()["name"], "blipstream");
    let model = server.get("/v2/models/caption").await.json();
    assert_eq!((&model["name"], &model["inputs"][0]["name"]), (&json!("caption"), &json!("image")));
    assert_eq!(model["outputs"][0], json!({"name": "text", "datatype": "BYTES", "shape": [-1]}));

    let (a, b) = (inline(1), inline(2));
    let request = json!({"id": "42", "inputs": [tensor("image", &[&a, &b])]}).to_string();
    let answer = server.post("/v2/models/caption/infer", &request).await.json();
    assert_eq!((&answer["model_name"], &answer["id"]), (&json!("caption"), &json!("42")));
    let output = &answer["outputs"][0];
    assert_eq!(
        (&output["name"], &output["datatype"], &output["shape"]),
        (&json!("text"), &json!("BYTES"), &json!([2]))
    );
    let scored = server.post("/score", &json!({"image": a}).to_string()).await.json();
    assert_eq!(output["data"][0], scored[0]["text"], "the same caption by both ways");

    let request = json!({"inputs": [tensor("image", &[&a]), tensor("text", &["a dog"])]}).to_string();
    let answer = server.post("/v2/models/filter/infer", &request).await.json();
    let names: Vec<_> = answer["outputs"].as_array().unwrap().iter().map(|output| &output["name"]).collect();
    assert_eq!(names, ["itm", "itc", "kept"]);
    assert_eq!(answer["outputs"][2]["data"], json!([false]));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_about_each_image_is_answered() {
    let server = Server::with(with_answerer(), FakeOptions::default()).await;
    assert_eq!(server.get("/v2/models/vqa/ready").await.status, 200);
    let model = server.get("/v2/models/vqa").await.json();
    assert_eq!((&model["name"], &model["inputs"][1]["name"]), (&json!("vqa"), &json!("question")));
    let (a, b) = (inline(1), inline(2));
    let mut request = json!({
        "inputs": [tensor("question", &["what colour", "how many"]), tensor("image", &[&a, &b])],
        "parameters": {"max_new_tokens": 1},
    });
    let answer = server.post("/v2/models/vqa/infer", &request.to_string()).await.json();
    assert_eq!(
        answer["outputs"][0],
        json!({"name": "text", "datatype": "BYTES", "shape": [2], "data": ["colour", "many"]})
    );
    request["inputs"][0]["data"][1] = json!("?");
    let reply = server.post("/v2/models/vqa/infer", &request.to_string()).await;
    let error = reply.json()["error"].as_str().unwrap().to_owned();
    assert!(reply.status == 400 && error.starts_with("row 1: bad_params: questions[0]: "), "{reply:?}");
    request["outputs"] = json!([{"name": "text"}, {"name": "logprob"}, {"name": "error"}]);
    let outputs = &server.post("/v2/models/vqa/infer", &request.to_string()).await.json()["outputs"];
    assert_eq!((&outputs[0]["data"], &outputs[1]["data"]), (&json!(["colour", ""]), &json!([-0.5, 0.0])));
    assert!(outputs[2]["data"][1].as_str().unwrap().starts_with("bad_params: "), "{outputs}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_answers_over_http_as_by_the_command() {
    let (model, answerer) = ("tests/fixtures/reference/depths", "tests/fixtures/answering/depths");
    let (image, questions) = ("models/demo/images/cabin.jpg", ["is it a red house?", "two birds"]);
    let precision = ["--set", "model.dtype=f32", "--set", "log.filter=warn"];
    let serving = Serving::start(&[&["--model", model, "--answerer", answerer], &precision[..]].concat()).await;
    let bytes = STANDARD.encode(std::fs::read(image).unwrap());
    let request = json!({"inputs": [tensor("image", &[&bytes, &bytes]), tensor("question", &questions)]});
    let reply = http(serving.at, "POST /v2/models/vqa/infer", &request.to_string()).await.json();
    let mut command = Command::new(env!("CARGO_BIN_EXE_blipstream"));
    command.args(["answer", image]).args(questions).args(["--model", answerer, "--dtype", "f32", "--output", "jsonl"]);
    let record: Value = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
    let expected = [&record["answers"][0]["text"], &record["answers"][1]["text"]];
    assert_eq!(reply["outputs"][0]["data"], json!(expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_and_outputs_are_taken_by_their_names() {
    let server = Server::start().await;
    let image = inline(1);
    let request = json!({
        "parameters": {"max_new_tokens": 2, "binary_data_output": false},
        "inputs": [tensor("image", &[&image]), tensor("prompt", &["once"])],
        "outputs": [{"name": "logprob"}, {"name": "text"}],
    });
    let answer = server.post("/v2/models/caption/infer", &request.to_string()).await.json();
    assert_eq!((&answer["outputs"][0]["name"], &answer["outputs"][0]["datatype"]), (&json!("logprob"), &json!("FP32")));
    let text = answer["outputs"][1]["data"][0].as_str().unwrap();
    assert!(text.starts_with("once ") && text.split(' ').count() == 3, "{text}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_row_fails_a_request_unless_errors_are_asked_for() {
    let server = Server::start().await;
    let good = inline(1);
    let mut request = json!({"inputs": [tensor("image", &[&good, "bm8gaW1hZ2UgYXQgYWxsLCBzdXJlbHk="])]});
    let reply = server.post("/v2/models/caption/infer", &request.to_string()).await;
    let error = reply.json()["error"].as_str().unwrap().to_owned();
    assert!(reply.status == 400 && error.starts_with("row 1: unsupported_media: "), "{reply:?}");
    request["outputs"] = json!([{"name": "text"}, {"name": "error"}]);
    let answer = server.post("/v2/models/caption/infer", &request.to_string()).await.json();
    let (texts, errors) = (&answer["outputs"][0]["data"], &answer["outputs"][1]["data"]);
    assert!(texts[0] != "" && texts[1] == "" && errors[0] == "", "{answer}");
    assert!(errors[1].as_str().unwrap().starts_with("unsupported_media: "), "{answer}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_cannot_be_answered_says_what_is_wrong() {
    let mut settings = with_filter();
    settings.endpoint.max_rows = 3;
    let server = Server::with(settings, FakeOptions::default()).await;
    let with = |name: &str, value: Value| {
        let mut tensor = tensor("image", &["AAAA"]);
        tensor[name] = value;
        json!({"inputs": [tensor]})
    };
    let picture = inline(1);
    let image = || tensor("image", &[&picture]);
    let filter = |parameters| json!({"inputs": [image(), tensor("text", &["a dog"])], "parameters": parameters});
    for (path, body, status, text) in [
        ("caption", json!([]), 400, "invalid type"),
        ("caption", json!({"inputs": []}), 400, "image is missing"),
        ("caption", json!({"inputs": [image(), image()]}), 400, "twice"),
        (
            "caption",
            json!({"inputs": [tensor("pixels", &["A"])]}),
            400,
            "the model has no \"pixels\"; it has image, prompt",
        ),
        ("caption", with("datatype", json!("FP32")), 400, "its datatype is FP32"),
        ("caption", with("shape", json!([2])), 400, "its shape is [2], with 1 values"),
        ("caption", with("data", json!([7])), 400, "data[0] is no string"),
        ("caption", json!({"inputs": [image(), tensor("prompt", &[])]}), 400, "prompt: 0 values for 1 images"),
        ("caption", json!({"inputs": [tensor("image", &["A"; 4])]}), 400, "4 images; at most 3"),
        ("caption", json!({"inputs": [image()], "outputs": [{"name": "boxes"}]}), 400, "the model has no \"boxes\""),
        (
            "caption",
            json!({"inputs": [image()], "parameters": {"num_beam": 3}}),
            400,
            "parameters: unknown name `num_beam`; did you mean `num_beams`?",
        ),
        (
            "caption",
            json!({"inputs": [image()], "parameters": {"top_k": "3"}}),
            400,
            "parameters.top_k: expected a whole",
        ),
        ("caption", json!({"inputs": [image()], "more": vec![0; 250_000]}), 400, "more than 250000 JSON values"),
        ("filter", filter(json!({"top_k": 3})), 400, "parameters: \"top_k\" has no effect on the model filter"),
        ("filter", json!({"inputs": [image()]}), 400, "text is missing"),
        ("vqa", json!({"inputs": [image()]}), 404, "answerer.source"),
        ("llm", json!({"inputs": [image()]}), 404, "no such model"),
    ] {
        let reply = server.post(&format!("/v2/models/{path}/infer"), &body.to_string()).await;
        let error = reply.json()["error"].as_str().unwrap().to_owned();
        assert!(reply.status == status && error.contains(text), "{text}: {reply:?}");
    }
    let idle = filter(json!({"binary_data_output": false})).to_string();
    assert_eq!(server.post("/v2/models/filter/infer", &idle).await.status, 200, "what changes nothing anywhere");
    let head = "POST /v2/models/caption/infer\ninference-header-content-length: 2";
    let reply = super::http(server.at, head, "{}").await;
    assert!(reply.status == 400 && reply.body.contains("binary form"), "{reply:?}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_not_loaded_is_not_there() {
    let server = Server::start().await;
    assert_eq!(server.get("/v2/models/filter/ready").await.status, 404);
    let reply = server.post("/v2/models/filter/infer", "{}").await;
    assert!(reply.status == 404 && reply.body.contains("filter.source"), "{reply:?}");
    server.stop().await;
}
