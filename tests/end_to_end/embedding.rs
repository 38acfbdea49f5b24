//! Images and texts as points of one space, in the stream and by the command.

use blipstream::caption::fake::FakeOptions;
use bytesize::ByteSize;
use serde_json::{Value, json};

use crate::support::alone::blipstream;
use crate::support::flow::{Flow, asking, request};
use crate::support::promises::inline;

fn point(value: &Value) -> Vec<f64> {
    value.as_array().unwrap_or_else(|| panic!("no point: {value}")).iter().map(|x| x.as_f64().unwrap()).collect()
}

fn product(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn images_and_texts_are_embedded_alone_and_beside_other_tasks() {
    let mut flow = Flow::start(1);
    flow.settings.filter.source = Some("fake".into());
    flow.settings.model.caption_cache = ByteSize::mib(1);
    let worker = flow.worker(FakeOptions::default());
    let image = inline(0);
    flow.write([asking(&json!({"image": image}))]);
    let caption = flow.until_answered(1).captions["requests/0/0"][0]["text"].as_str().unwrap().to_owned();
    let requests = [
        json!({"image": image, "tasks": ["embed"]}),
        json!({"image": image, "tasks": ["embed"], "text": [caption, "…", "a dog"]}),
        json!({"image": image, "tasks": ["caption", "filter", "embed"], "text": "a dog"}),
        json!({"image": image, "tasks": ["filter", "embed"], "text": "…"}),
        json!({"image": image, "tasks": ["embed"], "text": vec!["a dog"; 17]}),
    ];
    flow.write(requests.iter().map(asking));
    flow.until_answered(1 + requests.len());
    flow.write([asking(&requests[1])]);
    let answers = flow.until_answered(1 + requests.len() + 1);
    let record = |offset: &str| &answers.captions[&format!("requests/0/{offset}")][0];

    let alone = record("1");
    let of_image = point(&alone["embeddings"]["image"]);
    assert!((product(&of_image, &of_image) - 1.0).abs() < 1e-5);
    assert_eq!(alone["embeddings"]["text"], json!([]));
    assert_eq!((&alone["text"], &alone["tokens"], alone.get("candidates")), (&json!(""), &Value::Null, None));
    assert_eq!(alone["filter"]["id"], "fake filter");
    let embeddings = &record("2")["embeddings"];
    assert_eq!((&embeddings["image"], &embeddings["text"][0]), (&alone["embeddings"]["image"], &embeddings["image"]));
    assert_eq!(
        (&embeddings["text"][1], &embeddings["errors"]),
        (&Value::Null, &json!({"text[1]": "the text has no words"}))
    );
    assert_ne!(point(&embeddings["text"][2]), of_image);
    let beside = record("3");
    assert_eq!((&beside["text"], beside["candidates"].as_array().unwrap().len()), (&json!(caption), 2));
    assert_eq!(beside["embeddings"]["text"][0], embeddings["text"][2]);
    assert_eq!(record("4")["embeddings"]["image"], alone["embeddings"]["image"], "its text alone is no good");
    let letter = &answers.dead_letters["requests/0/5"][0];
    assert_eq!(letter.header("blipstream-error-code"), Some("bad_params"));
    assert!(letter.header("blipstream-error-message").unwrap().contains("(filter.texts_limit)"), "{letter:?}");
    assert_eq!((&record("6")["cached"], &record("6")["embeddings"]), (&json!(true), embeddings));
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_filter_only_what_asks_for_embeddings_is_a_dead_letter() {
    let flow = Flow::start(1);
    let worker = flow.worker(FakeOptions::default());
    flow.write([asking(&json!({"image": inline(0), "tasks": ["embed"]})), request("plain", inline(0))]);
    let answers = flow.until_answered(2);
    assert!(answers.captions.contains_key("requests/0/1"));
    let letter = &answers.dead_letters["requests/0/0"][0];
    assert_eq!(letter.header("blipstream-error-code"), Some("model_unavailable"));
    let message = letter.header("blipstream-error-message").unwrap();
    assert!(message.contains("the task `embed` needs a model that embeds images and texts"), "{message}");
    assert!(worker.stop().await.clean());
}

fn lines(out: &str) -> Vec<Value> {
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn the_cosines_of_what_the_command_embeds_are_those_that_score_tells() {
    let images = ["models/demo/images/cabin.jpg", "models/demo/images/beach-morning.png"];
    let texts = ["a white house and a red tree in a forest", "two blue boats by the sea"];
    let model = ["--model", "demo", "--dtype", "f32"];
    let wanted = ["--text", texts[0], "--text", texts[1]];
    let (code, out, error) = blipstream(&[&["embed"], &images[..], &wanted, &model].concat());
    assert_eq!(code, Some(0), "{error}");
    let found = lines(&out);
    assert_eq!(
        [&found[0]["text"], &found[1]["text"], &found[2]["id"], &found[3]["id"]],
        [texts[0], texts[1], images[0], images[1]]
    );
    for (at, image) in images.iter().enumerate() {
        let (_, out, _) = blipstream(&[&["score", image], &texts[..], &model, &["--output", "jsonl"]].concat());
        for (text, candidate) in lines(&out)[0]["candidates"].as_array().unwrap().iter().enumerate() {
            let cosine = product(&point(&found[2 + at]["embedding"]), &point(&found[text]["embedding"]));
            assert!((cosine - candidate["itc"].as_f64().unwrap()).abs() < 1e-4, "{image}: {candidate} and {cosine}");
        }
    }
}

#[test]
fn what_cannot_be_embedded_is_told_in_its_line_and_the_rest_is_embedded() {
    let (image, demo) = ("models/demo/images/cabin.jpg", ["--model", "demo"]);
    let (code, out, error) = blipstream(&[&["embed", "missing.jpg", image, "--text", "…"][..], &demo].concat());
    assert_eq!(code, Some(3), "{error}");
    let found = lines(&out);
    assert_eq!((&found[0]["text"], &found[0]["error"]["code"]), (&json!("…"), &json!("bad_params")));
    assert_eq!((&found[1]["id"], &found[1]["error"]["code"]), (&json!("missing.jpg"), &json!("not_found")));
    assert!(found[2]["id"] == image && !point(&found[2]["embedding"]).is_empty(), "{out}");
    let tolerant = ["embed", "missing.jpg", image, "--max-failure-rate", "0.5"];
    assert_eq!(blipstream(&[&tolerant[..], &demo].concat()).0, Some(0));
    let (code, out, _) = blipstream(&[&["embed", "--text", "a dog"][..], &demo].concat());
    assert_eq!((code, lines(&out).len()), (Some(0), 1), "texts alone");
    for (arguments, code, words) in [
        (&["embed", "--model", "demo"][..], 2, "required"),
        (&["embed", image, "--model", "tests/fixtures/answering/widths"], 1, "BlipForImageTextRetrieval"),
        (&["embed", image, "--model", "demo", "--max-failure-rate", "2"], 2, "--max-failure-rate"),
    ] {
        let (found, out, error) = blipstream(arguments);
        assert!((found, out.as_str()) == (Some(code), "") && error.contains(words), "{arguments:?}: {error}");
    }
}
