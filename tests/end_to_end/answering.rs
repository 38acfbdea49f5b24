//! Questions about images in the stream, answered beside captions and judgements or alone.

use std::path::Path;

use blipstream::caption::fake::FakeOptions;
use blipstream::caption::{Caption, DeviceSpec, DtypeSpec, LoadOptions, ModelSource, Params, load_answerer};
use bytesize::ByteSize;
use serde_json::{Value, json};

use crate::support::alone::{blipstream, pixels};
use crate::support::flow::{Flow, asking, request};
use crate::support::images::{Answer, ImageServer};
use crate::support::promises::inline;

/// The field of each answer.
fn each(record: &Value, field: &str) -> Vec<Value> {
    record["answers"].as_array().unwrap().iter().map(|answer| answer[field].clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_are_answered_alone_and_beside_the_caption_and_a_bad_one_spoils_no_other() {
    let mut flow = Flow::start(1);
    flow.settings.answerer.source = Some("fake".into());
    flow.settings.filter.source = Some("fake".into());
    flow.settings.model.caption_cache = ByteSize::mib(1);
    let worker = flow.worker(FakeOptions::default());
    let (image, both) = (inline(0), json!(["caption", "answer"]));
    let requests = [
        json!({"image": image}),
        json!({"image": image, "tasks": ["answer"], "questions": "what colour"}),
        json!({"image": image, "tasks": both, "questions": ["what colour", "…", "how many"]}),
        json!({"image": image, "tasks": ["answer"], "questions": ["…", "?"]}),
        json!({"image": image, "tasks": ["answer"], "questions": vec!["what"; 17]}),
        json!({"image": image, "tasks": both, "questions": "what colour", "params": {"max_new_tokens": 1}}),
        json!({"image": image, "tasks": both, "questions": "what colour", "prompt": "once",
               "params": {"do_sample": true, "num_return_sequences": 3}}),
        json!({"image": image, "tasks": ["filter", "answer"], "questions": "what colour", "text": "a dog"}),
        json!({"input_data": {"columns": ["image", "questions", "tasks"],
            "data": [[image, ["how many"], ["answer"]], [image, "!", ["answer"]]]}}),
    ];
    flow.write(requests.iter().map(asking));
    flow.until_answered(requests.len() + 1);
    flow.write([asking(&requests[2])]);
    let answers = flow.until_answered(requests.len() + 2);
    let record = |offset: &str| &answers.captions[&format!("requests/0/{offset}")][0];

    let plain = record("0");
    assert_eq!((plain.get("answers"), plain.get("answerer")), (None, None));
    // A fake answer is the last word of the question, and the word of a fake caption that tells the picture.
    let caption = plain["text"].as_str().unwrap();
    let word = caption.rsplit(' ').next().unwrap();
    let (colour, many) = (format!("colour {word}"), format!("many {word}"));
    let alone = record("1");
    assert_eq!(
        alone["answers"],
        json!([{"question": "what colour", "text": colour, "logprob": -1.5, "tokens": 3, "finish": "stop"}])
    );
    assert_eq!((&alone["text"], &alone["logprob"], &alone["tokens"]), (&json!(colour), &json!(-1.5), &json!(3)));
    assert_eq!((&alone["answerer"]["id"], &alone["model"]["id"]), (&json!("fake answerer"), &json!("fake")));
    let beside = record("2");
    assert_eq!(beside["text"], caption);
    assert_eq!(each(beside, "text"), [json!(colour), json!(null), json!(many)]);
    assert_eq!(each(beside, "error"), [json!(null), json!("the text has no words"), json!(null)]);
    assert_eq!(beside["answers"][1]["logprob"], json!(null));
    let brief = record("5");
    assert_eq!((&brief["text"], &brief["finish"]), (&json!("a"), &json!("length")));
    assert_eq!((each(brief, "text"), each(brief, "finish")), (vec![json!("colour")], vec![json!("length")]));
    let drawn = record("6");
    assert_eq!(drawn["candidates"].as_array().unwrap().len(), 3);
    assert!(drawn["text"].as_str().unwrap().starts_with("once a "), "{drawn}");
    assert_eq!(each(drawn, "text"), [json!(colour)], "neither prompt nor siblings");
    let judged = record("7");
    assert_eq!((&judged["text"], each(judged, "text")), (&json!("a dog"), vec![json!(colour)]));
    assert_eq!(judged["candidates"].as_array().unwrap().len(), 1, "answers are not judged");
    assert_eq!(each(record("8/0"), "text"), [json!(many)]);
    let again = record("9");
    assert_eq!((&again["cached"], &again["answers"]), (&json!(true), &beside["answers"]));
    assert_eq!(again["answerer"], beside["answerer"]);
    let refused = |offset: &str, words: &str| {
        let letter = &answers.dead_letters[&format!("requests/0/{offset}")][0];
        assert_eq!(letter.header("blipstream-error-code"), Some("bad_params"));
        assert!(letter.header("blipstream-error-message").unwrap().contains(words), "{letter:?}");
    };
    refused("3", "questions[0]: the text has no words");
    refused("4", "questions: 17 questions; this fleet allows 16 (answerer.questions_limit)");
    refused("8/1", "questions[0]: the text has no words");

    let metrics = worker.control.metrics().render();
    for line in ["blipstream_answers_total{result=\"answered\"} 9", "blipstream_answers_total{result=\"refused\"} 2"] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_answerer_only_what_asks_for_it_is_a_dead_letter() {
    let flow = Flow::start(1);
    let worker = flow.worker(FakeOptions::default());
    let answer = json!({"image": inline(0), "tasks": ["caption", "answer"], "questions": "what colour"});
    flow.write([asking(&answer), request("plain", inline(0))]);
    let answers = flow.until_answered(2);
    assert!(answers.captions.contains_key("requests/0/1"));
    let letter = &answers.dead_letters["requests/0/0"][0];
    assert_eq!(letter.header("blipstream-error-code"), Some("model_unavailable"));
    assert!(letter.header("blipstream-error-message").unwrap().contains("answerer.source"), "{letter:?}");
    assert!(worker.stop().await.clean());
}

/// What the model of a folder answers to questions about an image.
fn by_the_library(model: &str, image: &[u8], questions: &[&str], params: &Params) -> Vec<Caption> {
    let source = ModelSource::Dir(model.into());
    let options = LoadOptions { device: DeviceSpec::Cpu, dtype: DtypeSpec::F32, ..LoadOptions::new(source) };
    let answerer = load_answerer(&options).unwrap();
    let pixels = pixels(answerer.preprocessor(), image);
    let encoded = answerer.encode(&[pixels]).unwrap().remove(0);
    let asked: Vec<_> = questions.iter().map(|question| (&encoded, *question, params.clone())).collect();
    answerer.answer(&asked).unwrap().into_iter().map(Result::unwrap).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_of_three_models_answers_as_the_library_does() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let model = |kind: &str| root.join("tests/fixtures").join(kind).join("depths").display().to_string();
    let mut flow = Flow::start(1);
    flow.settings.model.source = model("reference");
    flow.settings.model.dtype = "f32".into();
    flow.settings.filter.source = Some(model("retrieval"));
    flow.settings.answerer.source = Some(model("answering"));
    flow.settings.answerer.max_new_tokens = 8;
    let bytes = std::fs::read(root.join("models/demo/images/cabin.jpg")).unwrap();
    let images = ImageServer::start().await.with("/cabin.jpg", Answer::Body(bytes.clone()));
    let questions = ["is it a red house?", "where are the two birds", "is it a red house?"];
    flow.write([asking(&json!({"image": images.url("/cabin.jpg").to_string(), "questions": questions,
        "tasks": ["caption", "filter", "answer"], "text": "a house"}))]);
    let worker = flow.process();
    let answers = flow.until_answered(1);
    assert_eq!(worker.terminate(), Some(0));
    let record = &answers.captions["requests/0/0"][0];
    assert_eq!(record["candidates"].as_array().unwrap().len(), 2, "{record}");

    let params = Params { max_new_tokens: 8, ..Params::default() };
    let expected = by_the_library(&model("answering"), &bytes, &questions, &params);
    for (at, expected) in expected.into_iter().enumerate() {
        let found = &record["answers"][at];
        assert_eq!((&found["question"], &found["text"]), (&json!(questions[at]), &json!(expected.text)));
        assert_eq!((&found["tokens"], &found["error"]), (&json!(expected.tokens), &Value::Null));
        assert!((found["logprob"].as_f64().unwrap() as f32 - expected.logprob).abs() < 1e-3, "{record}");
    }
    assert_eq!(record["answerer"]["id"], model("answering"));
}

#[test]
fn check_looks_for_the_answerer_as_for_any_model() {
    let check = |answerer: &str| {
        let fine = ["check", "--json", "--offline", "--timeout", "1s", "--set", "kafka.bootstrap_servers=127.0.0.1:1"];
        let models = format!("answerer.source={answerer}");
        let (_, out, _) = blipstream(&[&fine[..], &["--set", "model.source=demo", "--set", &models]].concat());
        let report: Value = serde_json::from_str(&out).unwrap();
        let items = report["items"].as_array().unwrap().clone();
        items.into_iter().find(|item| item["name"] == "answerer").unwrap()
    };
    let found = check("tests/fixtures/answering/widths");
    assert!(found["state"] == "ok" && found["text"].as_str().unwrap().contains("47 px"), "{found}");
    let other = check("tests/fixtures/reference/widths");
    let text = other["text"].as_str().unwrap();
    assert!(other["state"] == "failed" && text.contains("BlipForQuestionAnswering (answerer.source)"), "{other}");
}

#[test]
fn questions_are_answered_by_the_command_in_their_order_as_by_the_library() {
    let (image, model) = ("models/demo/images/cabin.jpg", "tests/fixtures/answering/widths");
    let questions = ["is it a red house?", "…", "two birds"];
    let ask = |more: &[&str]| {
        blipstream(&[&["answer", image, "--model", model, "--dtype", "f32"], &questions[..], more].concat())
    };
    let (code, out, error) = ask(&[]);
    assert_eq!(code, Some(0), "{error}");
    let lines: Vec<Vec<&str>> = out.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(lines[1], ["-", "the text has no words", "…"]);
    let bytes = std::fs::read(image).unwrap();
    let asked = [questions[0], questions[2]];
    let expected = by_the_library(model, &bytes, &asked, &Params::default());
    for ((line, question), expected) in [&lines[0], &lines[2]].into_iter().zip(asked).zip(&expected) {
        assert_eq!(line[1..], [&expected.text, question], "{out}");
        assert!((line[0].parse::<f32>().unwrap() - expected.logprob.exp()).abs() < 1e-3, "{out}");
    }

    let (_, out, _) = ask(&["--output", "jsonl", "--set", "answerer.max_new_tokens=1"]);
    let record: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&record["id"], each(&record, "question")), (&json!(image), questions.map(Value::from).to_vec()));
    assert_eq!(each(&record, "tokens"), [json!(1), json!(null), json!(1)]);
    assert_eq!((&record["model"], &record["answerer"]["id"]), (&record["answerer"], &json!(model)));
}

#[test]
fn what_is_wrong_with_an_answerer_or_a_question_is_told_by_its_name() {
    let (image, model) = ("models/demo/images/cabin.jpg", "tests/fixtures/answering/widths");
    let other = &format!("answerer.source={model}");
    for (arguments, code, words) in [
        (&["answer", image, "…", "--model", model][..], 3, "questions[0]: the text has no words"),
        (&["answer", "missing.jpg", "a dog?", "--model", model], 3, "missing.jpg: not_found"),
        (&["answer", image, "a dog?"], 2, "which model answers? Say --model"),
        (&["answer", image, "a dog?", "--model", "demo"], 1, "BlipForQuestionAnswering"),
        (&["answer", image, "a dog?", "--model", "tests/fixtures/retrieval/widths"], 1, "BlipForQuestionAnswering"),
        (
            &["worker", "--set", "model.source=demo", "--set", other],
            1,
            "makes its pixels in another way than the captioner",
        ),
        (&["answer", image, "a dog?", "--model", model, "--set", "answerer.num_beams=0"], 2, "answerer.num_beams"),
    ] {
        let (found, out, error) = blipstream(arguments);
        assert_eq!((found, out.as_str()), (Some(code), ""), "{arguments:?}: {error}");
        assert!(error.contains(words), "{arguments:?}: {error}");
    }
}
