//! The bundled model: the same by every way in. How well it sees is the matter of `fidelity/gate.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use blipstream::kafka::NewRecord;
use blipstream::message::Message;
use blipstream::settings::Kafka;
use serde_json::{Value, json};

use crate::support::client::read_all;
use crate::support::flow::{Flow, request};
use crate::support::images::{Answer, ImageServer};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn blipstream(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_blipstream")).current_dir(root()).args(arguments).output().unwrap()
}

fn json_lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_captioned_by_the_command_and_by_the_pipeline_gives_the_same_captions() {
    let folder = "models/demo/images";
    let output = blipstream(&["caption", folder, "--model", "demo", "--output", "jsonl"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let by_command: BTreeMap<String, String> = json_lines(&output)
        .into_iter()
        .map(|record| {
            let name = record["id"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
            (name, record["text"].as_str().unwrap().to_owned())
        })
        .collect();
    assert!(by_command.len() >= 24, "{} demo images", by_command.len());

    let flow = Flow::start(2);
    let mut images = ImageServer::start().await;
    for name in by_command.keys() {
        let bytes = std::fs::read(root().join(folder).join(name)).unwrap();
        images = images.with(&format!("/{name}"), Answer::Body(bytes));
    }
    flow.write(by_command.keys().map(|name| request(name, images.url(&format!("/{name}")))));
    let worker = flow.process();
    let answers = flow.until_answered(by_command.len());
    assert_eq!(worker.terminate(), Some(0));
    let text =
        |record: &Value| (record["id"].as_str().unwrap().to_owned(), record["text"].as_str().unwrap().to_owned());
    let by_pipeline: BTreeMap<_, _> = answers.captions.values().flatten().map(text).collect();
    assert_eq!(by_command, by_pipeline);
}

/// The texts of a record's candidates, of which the first is the record's own.
fn candidates(record: &Value) -> Vec<&str> {
    let texts: Vec<_> =
        record["candidates"].as_array().unwrap().iter().map(|one| one["text"].as_str().unwrap()).collect();
    assert_eq!(texts[0], record["text"]);
    assert_eq!(record["candidates"][0]["tokens"], record["tokens"]);
    texts
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_one_stream_ask_for_beams_and_samples_and_a_seed_draws_the_same_by_the_command() {
    let name = "harbour-night.jpg";
    let path = format!("models/demo/images/{name}");
    let images =
        ImageServer::start().await.with(&format!("/{name}"), Answer::Body(std::fs::read(root().join(&path)).unwrap()));
    let image = images.url(&format!("/{name}"));
    let sampled = json!({"do_sample": true, "temperature": 1.5, "seed": 7, "num_return_sequences": 4});
    let asked = [
        json!({}),
        json!({"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5}),
        sampled.clone(),
        json!({"repetition_penalty": 1.2, "min_new_tokens": 4}),
        sampled,
    ];
    let flow = Flow::start(1);
    flow.write(asked.iter().map(|params| NewRecord {
        value: Some(json!({"image": image, "params": params}).to_string().into()),
        ..NewRecord::default()
    }));
    let worker = flow.process();
    let answers = flow.until_answered(asked.len());
    assert_eq!(worker.terminate(), Some(0));
    let record = |offset: usize| &answers.captions[&format!("requests/0/{offset}")][0];
    assert_eq!((record(0).get("candidates"), record(3).get("candidates")), (None, None));
    let beams = candidates(record(1));
    assert_eq!(beams.iter().collect::<BTreeSet<_>>().len(), 3, "{beams:?}");
    let samples = candidates(record(2));
    assert_eq!(samples.len(), 4);
    assert_eq!(samples, candidates(record(4)), "equal seeds");

    let ways = ["--do-sample", "--temperature", "1.5", "--seed", "7", "--num-return-sequences", "4"];
    let all = [&["caption", &path, "--model", "demo"][..], &ways].concat();
    let output = blipstream(&all);
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = samples.iter().map(|sample| format!("{path}\t{sample}")).collect();
    assert_eq!(text.lines().collect::<Vec<_>>(), lines, "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn results_come_in_the_order_of_the_arguments_and_failures_keep_their_place() {
    let (first, last) = ("models/demo/images/harbour-night.jpg", "models/demo/images/cabin.jpg");
    let output = blipstream(&["caption", first, "missing.jpg", last, "--model", "demo", "--output", "jsonl"]);
    assert_eq!(output.status.code(), Some(3), "a failure is above the allowed rate of 0");
    let records = json_lines(&output);
    let ids: Vec<_> = records.iter().map(|record| record["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [first, "missing.jpg", last]);
    assert_eq!(records[1]["error"]["code"], "not_found");
    assert_eq!(records[0]["model"]["id"], "blipstream-demo");
    let allowed = ["caption", first, "missing.jpg", last, "--model", "demo", "--max-failure-rate", "0.5"];
    let output = blipstream(&allowed);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 2);
    assert!(text.starts_with(&format!("{first}\t")), "{text}");
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("missing.jpg: not_found"), "{errors}");
}

#[test]
fn a_wrong_model_or_device_is_explained_and_nothing_is_printed_on_standard_output() {
    for (arguments, words) in [
        (["--model", "tests/fixtures/scenes"], "config.json"),
        (["--device", "tpu"], "tpu"),
        (["--dtype", "f8"], "f8"),
        (["--device", "cuda:0"], "cuda"),
    ] {
        let mut all = vec!["caption", "models/demo/images/cabin.jpg"];
        if arguments[0] != "--model" {
            all.extend(["--model", "demo"]);
        }
        all.extend(arguments);
        let output = blipstream(&all);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(words), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn the_demo_captions_every_image_and_shows_a_dead_letter() {
    let output = blipstream(&["demo"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("28 images in ") && said.contains("1 dead letter"), "{said}");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let truth = std::fs::read_to_string(root().join("models/demo/images/captions.json")).unwrap();
    let truth: BTreeMap<String, String> = serde_json::from_str(&truth).unwrap();
    // Of the pages' own texts every third is true, and the filter knows which.
    let alt: BTreeMap<String, String> =
        serde_json::from_str(&std::fs::read_to_string(root().join("models/demo/images/alt-texts.json")).unwrap())
            .unwrap();
    let third = |number: usize| alt.values().skip(number).step_by(3).cloned().collect::<Vec<_>>();
    let told = |label: &str| {
        let texts = said.lines().filter_map(|line| line.trim().strip_prefix(label)?.split_once("  "));
        let mut texts: Vec<String> = texts.map(|(_, text)| text.to_owned()).collect();
        texts.sort_unstable();
        texts
    };
    let sorted = |mut texts: Vec<String>| {
        texts.sort_unstable();
        texts
    };
    assert_eq!(told("alt text kept     "), sorted(third(0)), "{said}");
    assert_eq!(told("alt text rejected "), sorted([third(1), third(2)].concat()), "{said}");
    assert!(said.contains("28 alt texts judged: 10 kept, 18 rejected"), "{said}");
    // `[ 3/29]  name  caption`
    let lines = said.lines().filter_map(|line| line.split_once("]  ")?.1.split_once("  "));
    let captions: BTreeMap<String, String> = lines
        .filter(|(_, text)| !text.contains("dead letter"))
        .map(|(name, text)| (name.to_owned(), text.trim().to_owned()))
        .collect();
    assert_eq!(captions, truth);
}

#[test]
fn a_demo_that_is_kept_running_tells_how_to_talk_to_it_and_stops_on_sigint() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_blipstream"))
        .args(["demo", "--keep-running"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    while !said.contains("blipstream submit") {
        assert!(out.read_line(&mut said).unwrap() > 0, "it ended: {said}");
    }
    let after =
        |label: &str| said.lines().rev().find_map(|line| line.trim().strip_prefix(label)).unwrap().trim().to_owned();
    let servers = after("bootstrap servers");
    let request = format!("| kcat -b {servers} -t blipstream.requests -P");
    let captions = format!("kcat -b {servers} -t blipstream.captions -C -o beginning -e");
    assert!(said.contains(&request) && said.contains(&captions), "{said}");
    let address = after("metrics").strip_prefix("http://").unwrap().strip_suffix("/metrics").unwrap().to_owned();
    let mut admin = TcpStream::connect(address).unwrap();
    admin.write_all(b"GET /metrics HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").unwrap();
    let mut metrics = String::new();
    admin.read_to_string(&mut metrics).unwrap();
    assert!(metrics.contains("blipstream_captions_total{device=\"cpu\",model=\"blipstream-demo\"} 28"), "{metrics}");
    // The bound of --rounds counts on this length.
    let kafka = Kafka { bootstrap_servers: servers, ..Kafka::default() };
    let records = read_all(&kafka, &kafka.captions_topic);
    let longest = records.iter().map(Message::size).max().unwrap();
    println!("the longest of {} caption records has {longest} bytes", records.len());
    assert!(records.len() == 28 && longest < 1250, "{} records of up to {longest} bytes", records.len());

    let interrupted = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    out.read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
}

#[test]
fn a_demo_that_the_embedded_broker_cannot_hold_is_refused() {
    let output = blipstream(&["demo", "--rounds", "1000"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("--rounds is between 1 and 117") && said.contains("4.0 MiB of a partition"), "{said}");
}
