//! CapFilt: captions and texts that were found are judged, the best is kept, and what matches nothing goes elsewhere.

use std::path::Path;

use blipstream::caption::fake::FakeOptions;
use blipstream::caption::{DeviceSpec, DtypeSpec, LoadOptions, ModelSource, load_matcher};
use bytesize::ByteSize;
use serde_json::{Value, json};

use crate::support::alone::{blipstream, pixels};
use crate::support::flow::{Flow, RETRIES, asking, request};
use crate::support::promises::inline;

const FILTERED: &str = "filtered";

/// The field of each candidate.
fn each(record: &Value, field: &str) -> Vec<Value> {
    record["candidates"].as_array().unwrap().iter().map(|candidate| candidate[field].clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_best_text_is_kept_whoever_wrote_it_and_what_matches_nothing_has_a_topic_of_its_own() {
    let mut flow = Flow::start_with(1, &[FILTERED, RETRIES[0], RETRIES[1]]);
    flow.settings.kafka.filtered_topic = Some(FILTERED.into());
    flow.settings.filter.source = Some("fake".into());
    flow.settings.model.caption_cache = ByteSize::mib(1);
    let worker = flow.worker(FakeOptions::default());
    flow.write([request("plain", inline(0))]);
    let plain = flow.until_answered(1).captions["requests/0/0"][0].clone();
    assert_eq!((plain.get("filter"), plain.get("candidates")), (None, None));
    // The last word of a fake caption is what a fake filter looks for.
    let caption = plain["text"].as_str().unwrap().to_owned();
    let word = caption.rsplit(' ').next().unwrap();
    let image = inline(0);
    let both = json!(["caption", "filter"]);
    let cut = json!({"max_new_tokens": 2});
    let samples = json!({"do_sample": true, "num_return_sequences": 3});
    let requests = [
        json!({"image": image, "tasks": both, "text": ["IMG_4711", format!("found {word}")]}),
        json!({"image": image, "tasks": ["filter"], "text": ["IMG_4711", format!("found {word}")]}),
        json!({"image": image, "tasks": ["filter"], "text": "nothing of it"}),
        json!({"image": image, "tasks": both, "params": cut}),
        json!({"image": image, "tasks": both, "params": cut, "text": word}),
        json!({"image": image, "tasks": both, "params": samples}),
        json!({"image": image, "tasks": both, "text": ["…", word]}),
        json!({"image": image, "tasks": ["filter"], "text": vec![word; 17]}),
        json!({"input_data": {"columns": ["image", "text", "tasks"],
            "data": [[image, word, ["filter"]], [image, "…", ["filter"]]]}}),
    ];
    flow.write(requests.iter().map(asking));
    flow.until_answered(1 + requests.len() + 1);
    flow.write([asking(&requests[2])]);
    let answers = flow.until_answered(1 + requests.len() + 1 + 1);
    let kept = |offset: &str| &answers.captions[&format!("requests/0/{offset}")][0];
    let rejected = |offset: &str| &answers.filtered[&format!("requests/0/{offset}")][0];

    let first = kept("1");
    assert_eq!(
        (&first["text"], &first["filter"]["id"]),
        (&json!(caption), &json!("fake filter")),
        "of equals the first"
    );
    assert_eq!(each(first, "source"), ["generated", "found", "found"]);
    assert_eq!(each(first, "kept"), [true, false, true]);
    assert_eq!(each(first, "tokens"), [plain["tokens"].clone(), Value::Null, Value::Null]);
    assert!(
        first["candidates"][0]["itm"].as_f64().unwrap() > 0.9 && first["candidates"][1]["itc"].as_f64().unwrap() < 0.0
    );
    let found = kept("2");
    assert_eq!(
        (&found["text"], &found["logprob"], &found["finish"]),
        (&json!(format!("found {word}")), &Value::Null, &Value::Null)
    );
    assert_eq!(each(rejected("3"), "kept"), [false]);
    assert_eq!((&rejected("3")["text"], rejected("3").get("cached")), (&json!("nothing of it"), None));
    assert_eq!(each(rejected("4"), "source"), ["generated"], "a caption that does not match");
    assert_eq!((&kept("5")["text"], each(kept("5"), "kept")), (&json!(word), vec![json!(false), json!(true)]));
    assert_eq!(each(kept("6"), "kept"), [true, true, true]);
    assert_eq!(each(kept("7"), "error"), [json!(null), json!("the text has no words"), json!(null)]);
    assert_eq!(each(kept("7"), "kept"), [true, false, true]);
    let refused = |offset: &str, words: &str| {
        let letter = &answers.dead_letters[&format!("requests/0/{offset}")][0];
        assert_eq!(letter.header("blipstream-error-code"), Some("bad_params"));
        assert!(letter.header("blipstream-error-message").unwrap().contains(words), "{letter:?}");
    };
    refused("8", "text: 17 texts; this fleet allows 16 (filter.texts_limit)");
    assert_eq!(kept("9/0")["index"], 0);
    refused("9/1", "text[0]: the text has no words");
    assert_eq!(rejected("10")["cached"], true, "judged before, and rejected again");
    assert_eq!(
        (each(rejected("10"), "itm"), &rejected("10")["filter"]),
        (each(rejected("3"), "itm"), &rejected("3")["filter"])
    );

    let metrics = worker.control.metrics().render();
    for line in [
        "blipstream_filter_candidates_total{kept=\"true\",source=\"generated\"} 5",
        "blipstream_filter_candidates_total{kept=\"false\",source=\"generated\"} 2",
        "blipstream_filter_candidates_total{kept=\"true\",source=\"found\"} 5",
        "blipstream_filter_candidates_total{kept=\"false\",source=\"found\"} 5",
        "blipstream_filter_match_probability_count{source=\"found\"} 9",
    ] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
    assert!(worker.stop().await.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_filter_only_what_asks_for_it_is_a_dead_letter() {
    let flow = Flow::start(1);
    let worker = flow.worker(FakeOptions::default());
    let filter = json!({"image": inline(0), "tasks": ["caption", "filter"]});
    flow.write([asking(&filter), request("plain", inline(0))]);
    let answers = flow.until_answered(2);
    assert!(answers.captions.contains_key("requests/0/1"));
    let letter = &answers.dead_letters["requests/0/0"][0];
    assert_eq!(letter.header("blipstream-error-code"), Some("model_unavailable"));
    assert!(letter.header("blipstream-error-message").unwrap().contains("filter.source"), "{letter:?}");
    assert!(worker.stop().await.clean());
}

#[test]
fn texts_are_scored_by_the_command_the_best_first_as_the_library_judges_them() {
    let (image, model) = ("models/demo/images/cabin.jpg", "tests/fixtures/retrieval/widths");
    let texts = ["two red birds under a tree", "a dog", "boat"];
    let score =
        |more: &[&str]| blipstream(&[&["score", image, "--model", model, "--dtype", "f32"], &texts[..], more].concat());
    let (code, out, error) = score(&[]);
    assert_eq!(code, Some(0), "{error}");
    let lines: Vec<Vec<&str>> = out.lines().map(|line| line.split('\t').collect()).collect();
    let number = |text: &str| text.parse::<f32>().unwrap();
    assert!(lines.windows(2).all(|pair| number(pair[0][0]) >= number(pair[1][0])), "{out}");
    assert!(lines.iter().all(|line| (number(line[0]) >= 0.5) == (line[2] == "yes")), "{out}");

    let (_, out, _) = score(&["--output", "jsonl"]);
    let record: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(each(&record, "text"), texts);
    let source = ModelSource::Dir(model.into());
    let options = LoadOptions { device: DeviceSpec::Cpu, dtype: DtypeSpec::F32, ..LoadOptions::new(source) };
    let matcher = load_matcher(&options).unwrap();
    let pixels = pixels(matcher.preprocessor(), &std::fs::read(image).unwrap());
    let encoded = matcher.encode(&[pixels]).unwrap().remove(0);
    let judged = matcher.judge(&texts.map(|text| (&encoded, text))).unwrap();
    for (itm, judged) in each(&record, "itm").iter().zip(judged) {
        assert!((itm.as_f64().unwrap() as f32 - judged.unwrap().itm).abs() < 1e-4);
    }
}

#[test]
fn what_is_wrong_with_a_filter_or_a_text_is_told_by_its_name() {
    let (image, model) = ("models/demo/images/cabin.jpg", "tests/fixtures/retrieval/widths");
    let other = &format!("filter.source={model}");
    for (arguments, code, words) in [
        (&["score", image, "…", "--model", model][..], 3, "text[0]: the text has no words"),
        (&["score", "missing.jpg", "a dog", "--model", model], 3, "missing.jpg: not_found"),
        (&["score", image, "a dog", "--model", "tests/fixtures/reference/widths"], 1, "BlipForImageTextRetrieval"),
        (&["caption", image, "--model", model], 1, "BlipForConditionalGeneration"),
        (
            &["worker", "--set", "model.source=demo", "--set", other],
            1,
            "makes its pixels in another way than the captioner",
        ),
        (&["caption", image, "--model", "demo", "--num-return-sequences", "2"], 2, "params.num_return_sequences is 2"),
        (&["caption", image, "--model", "demo", "--temperature", "2"], 2, "no effect without do_sample"),
        (&["caption", image, "--model", "demo", "--set", "filter.threshold=2"], 2, "filter.threshold"),
        (
            &["caption", image, "--model", "demo", "--set", "kafka.filtered_topic=blipstream.dlq"],
            2,
            "kafka.filtered_topic",
        ),
    ] {
        let (found, out, error) = blipstream(arguments);
        assert_eq!((found, out.as_str()), (Some(code), ""), "{arguments:?}: {error}");
        assert!(error.contains(words), "{arguments:?}: {error}");
    }
}

#[test]
fn a_folder_and_lists_are_captioned_and_filtered_without_kafka() {
    let folder = tempfile::TempDir::new().unwrap();
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo/images");
    let image = |name: &str| images.join(name).display().to_string();
    let (cabin, beach) = (image("cabin.jpg"), image("beach-morning.png"));
    let (csv, lines) = (folder.path().join("pages.csv"), folder.path().join("pages.jsonl"));
    let (right, wrong) = ("a white house and a red tree", "two blue boats by the sea");
    std::fs::write(&csv, format!("url,alt,page\n{cabin},{right},7\n{beach},IMG_4711.JPG,8\nmissing.jpg,{wrong},9\n"))
        .unwrap();
    std::fs::write(
        &lines,
        json!({"id": "both", "image": format!("file://{cabin}"), "text": [right, wrong]}).to_string(),
    )
    .unwrap();
    let (csv, lines) = (csv.display().to_string(), lines.display().to_string());
    let models = ["--model", "demo", "--filter", "demo"];
    let ask = |inputs: &[&str]| blipstream(&[&["capfilt"][..], inputs, &models].concat());

    let (code, out, error) = ask(&[&csv, &lines, "--column", "url", "--text-column", "alt", "--output", "jsonl"]);
    assert_eq!(code, Some(3), "a file is missing: {error}");
    let records: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let kept: Vec<_> =
        records.iter().filter(|record| record.get("error").is_none()).map(|record| each(record, "kept")).collect();
    assert_eq!(kept, [vec![true, true], vec![true, false], vec![true, true, false]], "{out}");
    assert_eq!(
        (&records[0]["meta"]["page"], records[0]["meta"].get("alt"), &records[3]["id"]),
        (&json!("7"), None, &json!("both"))
    );
    assert!(records[2]["error"]["message"].as_str().unwrap().contains("no such file"), "{out}");

    let (code, out, error) = ask(&[&cabin, "--num-beams", "2", "--num-return-sequences", "2"]);
    assert_eq!(code, Some(0), "{error}");
    let rows: Vec<Vec<&str>> = out.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(
        rows.iter().map(|row| (row[2], row[3])).collect::<Vec<_>>(),
        [("generated", cabin.as_str()); 2],
        "{out}"
    );
    assert_eq!((rows[0][0], rows[0][4]), ("kept", "a white house and a red tree in a forest on a snowy night"));
    let (code, _, error) = blipstream(&["capfilt", &cabin, "--model", "demo"]);
    assert_eq!((code, error.contains("--filter")), (Some(2), true), "{error}");
}
