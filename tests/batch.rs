//! The command `batch` as a person runs it: every kind of input to every kind of output, killed and gone on with.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;

use parquet::basic::{LogicalType, Type as Physical};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Value, json};

use self::images::{Answer, ImageServer, jpeg, png};
use self::place::{LIMIT, Place, finish, signal};

#[allow(dead_code, missing_docs)]
#[path = "support/images.rs"]
mod images;
#[allow(missing_docs)]
#[path = "support/place.rs"]
mod place;
#[allow(dead_code)]
#[path = "support/ran.rs"]
mod ran;

fn texts<'v>(rows: &'v [Value], column: &str) -> Vec<&'v str> {
    rows.iter().map(|row| row[column].as_str().unwrap_or_default()).collect()
}

fn tar(path: &Path, members: &[(&str, Vec<u8>)]) {
    let mut builder = tar::Builder::new(File::create(path).unwrap());
    for (name, data) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, data.as_slice()).unwrap();
    }
    builder.finish().unwrap();
}

#[test]
fn every_kind_of_input_becomes_the_same_captions_in_every_kind_of_output() {
    let place = Place::new();
    let pictures = [png(40, 30, 1), jpeg(30, 40, 200), png(64, 64, 90)];
    for (number, picture) in pictures.iter().enumerate() {
        place.write(&format!("folder/{number}.img.png"), picture);
    }
    place
        .write("list.csv", "image,label,empty\nfolder/0.img.png,a,\nfolder/1.img.png,\"b, c\",\nfolder/2.img.png,d,\n");
    place.write(
        "list.jsonl",
        "{\"label\":1,\"url\":\"folder/0.img.png\"}\n\"folder/1.img.png\"\n{\"url\":\"folder/2.img.png\",\"tags\":[1]}\n",
    );
    let member = |number: usize, end: &str| format!("{number}.{end}");
    tar(
        &place.path("shard.tar"),
        &[
            (&member(0, "png"), pictures[0].clone()),
            (&member(0, "cls"), b"7".to_vec()),
            (&member(1, "jpg"), pictures[1].clone()),
            (&member(1, "txt"), b"found".to_vec()),
            (&member(2, "png"), pictures[2].clone()),
        ],
    );
    // A table of our own is an input, too: its text does not clash with the new one.
    let ran = place.run(&["list.csv", "--output", "table.parquet", "--quiet"]);
    assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (Some(0), "", ""), "{ran:?}");

    let inputs = ["folder", "list.csv", "list.jsonl", "shard.tar", "table.parquet"];
    let ran = place.run(&[&inputs[..], &["--output", "all.jsonl"]].concat());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.out.starts_with("15 rows: 15 captioned, 0 failed; "), "{ran:?}");
    let rows = place.rows("all.jsonl");
    let of = |input: usize| &rows[input * 3..input * 3 + 3];
    for (input, name) in inputs.iter().enumerate() {
        let column = "blipstream_text";
        assert_eq!(texts(of(input), column), texts(of(0), column), "{name}");
        assert!(texts(of(input), "blipstream_place").iter().all(|place| place.starts_with(name)), "{name}");
    }
    assert!(texts(of(0), "blipstream_text").iter().all(|text| !text.is_empty()));
    assert_eq!(of(1)[1]["label"], "b, c");
    assert_eq!((&of(2)[0]["label"], &of(2)[2]["tags"]), (&json!(1), &json!([1])));
    assert_eq!((&of(3)[0]["image"], &of(3)[0]["cls"], &of(3)[1]["txt"]), (&json!("0.png"), &json!(7), &json!("found")));
    assert_eq!(of(4)[0]["text"], of(1)[0]["blipstream_text"], "what the table brought");
    assert_eq!(of(4)[1]["image_width"], 30, "of the table");
    assert_eq!(of(4)[1]["blipstream_image_width"], 30, "of the picture");
    assert_eq!(of(3)[1]["blipstream_image_format"], "jpeg");

    let ran = place.run(&["list.csv", "--output", "captions.csv"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let mut reader = csv::Reader::from_path(place.path("captions.csv")).unwrap();
    let header: Vec<_> = reader.headers().unwrap().iter().map(str::to_owned).collect();
    let ours = "place text logprob tokens finish error_code error_message image_sha256 image_width image_height \
                image_bytes image_format";
    let expected: Vec<_> = ["image", "label", "empty"].into_iter().chain(ours.split_whitespace()).collect();
    assert_eq!(header, expected);
    let records: Vec<_> = reader.records().map(Result::unwrap).collect();
    assert_eq!((&records[1][1], &records[1][2], &records[1][3]), ("b, c", "", "list.csv:3"));
    assert_eq!(records.iter().map(|record| record[4].to_owned()).collect::<Vec<_>>(), texts(of(0), "blipstream_text"));
}

#[test]
fn a_parquet_output_has_types_and_reads_back() {
    let place = Place::new();
    place.write("a.png", png(20, 10, 3));
    place.write(
        "list.jsonl",
        "{\"image\":\"a.png\",\"n\":1,\"x\":0.5,\"ok\":true,\"o\":{\"k\":1}}\n{\"image\":\"b.png\",\"n\":2}\n",
    );
    let ran = place.run(&["list.jsonl", "--output", "out.parquet"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let reader = SerializedFileReader::new(File::open(place.path("out.parquet")).unwrap()).unwrap();
    let schema = reader.metadata().file_metadata().schema();
    let kind = |name: &str| {
        let field =
            schema.get_fields().iter().find(|field| field.name() == name).unwrap_or_else(|| panic!("no {name}"));
        let is_text = matches!(field.get_basic_info().logical_type_ref(), Some(LogicalType::String));
        (field.get_physical_type(), is_text)
    };
    assert_eq!(kind("n"), (Physical::INT64, false));
    assert_eq!(kind("x"), (Physical::DOUBLE, false));
    assert_eq!(kind("ok"), (Physical::BOOLEAN, false));
    for name in ["image", "o", "text", "place", "error_code", "image_sha256"] {
        assert_eq!(kind(name), (Physical::BYTE_ARRAY, true), "{name}");
    }
    assert_eq!((kind("tokens").0, kind("logprob").0), (Physical::INT64, Physical::DOUBLE));
    let rows: Vec<_> = reader.get_row_iter(None).unwrap().map(|row| row.unwrap().into_columns()).collect();
    let cell = |row: usize, name: &str| rows[row].iter().find(|(column, _)| column == name).unwrap().1.clone();
    assert_eq!((cell(0, "n"), cell(0, "o")), (Field::Long(1), Field::Str("{\"k\":1}".into())));
    assert_eq!((cell(0, "image_width"), cell(0, "image_height")), (Field::Long(20), Field::Long(10)));
    assert_eq!((cell(1, "text"), cell(1, "error_code")), (Field::Null, Field::Str("not_found".into())));
}

#[test]
fn a_job_of_a_thousand_images_that_is_killed_again_and_again_has_each_row_once_and_in_order() {
    let place = Place::new();
    place.list("list.csv", 1_000);
    let arguments = ["list.csv", "--output", "out.jsonl", "--mini-batch-size", "40"];
    let mut before = 0;
    for rows in [150, 500, 800] {
        let mut child = place.batch(&arguments).spawn().unwrap();
        place.until_recorded("out.jsonl", rows);
        child.kill().unwrap();
        let ran = finish(child);
        assert_eq!(ran.code, None, "it ended before it was killed: {ran:?}");
        assert!(!place.path("out.jsonl").exists(), "an output of a job that is not done");
        if before > 0 {
            assert!(ran.err.contains(&format!("going on with out.jsonl: {before} rows are done")), "{ran:?}");
        }
        before = place.recorded("out.jsonl");
    }
    // What a crash of the machine may leave.
    let journal = place.path("out.jsonl.journal.jsonl");
    let whole = fs::read(&journal).unwrap();
    fs::write(&journal, [&whole[..], b"{\"row\":999,\"pla"].concat()).unwrap();

    let ran = place.run(&arguments);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.out.starts_with("1,000 rows: 1,000 captioned, 0 failed; "), "{ran:?}");
    assert!(ran.out.contains(&format!("; {before} of them in earlier runs")), "{ran:?}");
    let rows = place.rows("out.jsonl");
    let numbers: Vec<_> = rows.iter().map(|row| row["number"].as_str().unwrap().parse::<usize>().unwrap()).collect();
    assert_eq!(numbers, (0..1_000).collect::<Vec<_>>());
    assert!(texts(&rows, "text").iter().all(|text| !text.is_empty()));
    assert_eq!(place.recorded("out.jsonl"), 1_000, "work was done twice");
    let pictures: BTreeSet<_> = texts(&rows, "image_sha256").into_iter().collect();
    assert_eq!(pictures.len(), 1_000);
    let report: Value = serde_json::from_str(&place.read("out.jsonl.report.json")).unwrap();
    assert_eq!((&report["rows"], &report["resumed"]), (&json!(1_000), &json!(before)));
    let counted: u64 = report["tokens"]["histogram"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(counted, 1_000);
    assert!(place.read("out.jsonl.report.svg").contains("1000 captioned"));

    let written = fs::metadata(place.path("out.jsonl")).unwrap().modified().unwrap();
    let again = place.run(&arguments);
    assert_eq!((again.code, again.out.as_str()), (Some(0), ""), "{again:?}");
    assert!(again.err.starts_with("this job is finished: 1,000 rows, 0 failed"), "{again:?}");
    assert_eq!(fs::metadata(place.path("out.jsonl")).unwrap().modified().unwrap(), written);
    // The journal has all that the output has.
    fs::remove_file(place.path("out.jsonl")).unwrap();
    assert_eq!(place.run(&arguments).code, Some(0));
    assert_eq!(place.rows("out.jsonl"), rows);
}

#[test]
fn a_signal_ends_a_job_in_order_and_the_same_command_goes_on() {
    let place = Place::new();
    place.list("list.csv", 400);
    let arguments = ["list.csv", "--output", "out.csv", "--mini-batch-size", "20"];
    let child = place.batch(&arguments).spawn().unwrap();
    place.until_recorded("out.csv", 20);
    signal(&child, "-TERM");
    let ran = finish(child);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.err.contains("stopping: ") && ran.err.contains("the same command goes on from there"), "{ran:?}");
    let done = place.recorded("out.csv");
    assert!(done < 400, "it was too late to stop it");
    let ran = place.run(&arguments);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.err.contains(&format!("going on with out.csv: {done} rows are done")), "{ran:?}");
    assert_eq!(place.read("out.csv").lines().count(), 401);
    assert_eq!(place.recorded("out.csv"), 400);
}

#[test]
fn bad_rows_are_rows_with_an_error_and_their_place() {
    let place = Place::new();
    place.write("a.png", png(16, 16, 1));
    place.write("b.png", "no image");
    place.write("list.csv", "image,n\na.png,1\nmissing.png,2\na.png\nftp://e.com/x,4\n,5\nb.png,6\na.png,7\n");
    let ran = place.run(&["list.csv", "--output", "out.jsonl"]);
    assert_eq!(ran.code, Some(0), "any number of failures is allowed: {ran:?}");
    assert!(ran.out.starts_with("7 rows: 2 captioned, 5 failed; "), "{ran:?}");
    assert!(ran.out.contains("\n  bad_reference: 2\n"), "{ran:?}");
    let rows = place.rows("out.jsonl");
    let found: Vec<_> = rows.iter().map(|row| (&row["place"], &row["n"], row["error_code"].as_str())).collect();
    let at = |line: u32| json!(format!("list.csv:{line}"));
    let number = |n: u32| json!(n.to_string());
    assert_eq!(
        found,
        [
            (&at(2), &number(1), None),
            (&at(3), &number(2), Some("not_found")),
            (&at(4), &Value::Null, Some("bad_message")),
            (&at(5), &number(4), Some("bad_reference")),
            (&at(6), &number(5), Some("bad_reference")),
            (&at(7), &number(6), Some("unsupported_media")),
            (&at(8), &number(7), None),
        ]
    );
    assert_eq!(rows[2]["error_message"], "1 values for 2 columns");
}

#[test]
fn a_job_stops_when_more_rows_failed_than_allowed_and_goes_on_when_more_are() {
    let place = Place::new();
    let names: Vec<_> = (0..60).map(|n| format!("missing-{n}.png")).collect();
    place.write("list.csv", format!("image\n{}\n", names.join("\n")));
    let threshold = |most: &str, more: &[&str]| {
        let arguments = ["list.csv", "--output", "out.csv", "--mini-batch-size", "4", "--error-threshold", most];
        place.run(&[&arguments[..], more].concat())
    };
    let ran = threshold("5", &[]);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert!(ran.err.contains("rows failed, and --error-threshold is 5"), "{ran:?}");
    assert!((6..20).contains(&place.recorded("out.csv")), "{}", place.recorded("out.csv"));
    assert!(!place.path("out.csv").exists());
    assert_eq!(threshold("5", &[]).code, Some(3));
    assert_eq!(threshold("5", &["--retry-failed"]).code, Some(3), "the images are still missing");
    let ran = threshold("60", &[]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(place.read("out.csv").lines().count(), 61);
}

#[tokio::test(flavor = "multi_thread")]
async fn transient_failures_are_tried_anew_and_retry_failed_does_only_the_failed_rows() {
    let place = Place::new();
    let server = ImageServer::of_all_kinds().await;
    let names = ["good", "gone", "shaky", "down"];
    let lines = names.map(|name| format!("{}\n", server.url(&format!("/{name}.png"))));
    place.write("list.txt", lines.concat());
    let batch = async |more: &[&str]| {
        let arguments = ["list.txt", "--output", "out.jsonl", "--allow-network", "127.0.0.0/8", "--max-retries", "2"];
        let once = ["--set", "fetch.attempts=1", "--set", "fetch.cache=0B"];
        let child = place.batch(&[&arguments[..], &once, more].concat()).spawn().unwrap();
        tokio::task::spawn_blocking(move || finish(child)).await.unwrap()
    };
    let codes = || {
        let rows = place.rows("out.jsonl");
        rows.iter().map(|row| row["error_code"].as_str().unwrap_or("-").to_owned()).collect::<Vec<_>>()
    };
    let ran = batch(&[]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(codes(), ["-", "not_found", "-", "http_5xx"]);
    let seen = server.seen();
    let requests = ["/good.png", "/gone.png", "/shaky.png", "/down.png"].map(|path| seen.requests(path));
    assert_eq!(requests, [1, 1, 3, 3], "a 404 is not worth another try, a 503 two");
    let report: Value = serde_json::from_str(&place.read("out.jsonl.report.json")).unwrap();
    assert_eq!(report["retries"], 4);

    server.set("/gone.png", Answer::Body(png(24, 24, 3)));
    let ran = batch(&["--retry-failed"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.err.starts_with("trying 2 failed rows anew\n"), "{ran:?}");
    assert_eq!(codes(), ["-", "-", "-", "http_5xx"], "written anew");
    assert_eq!(server.seen().requests("/good.png"), 1, "a row that did not fail was done again");
    server.set("/down.png", Answer::Body(png(24, 24, 4)));
    assert_eq!(batch(&["--retry-failed"]).await.code, Some(0));
    assert_eq!(codes(), ["-"; 4]);
    let ran = batch(&["--retry-failed"]).await;
    assert!(ran.err.starts_with("this job is finished: 4 rows, 0 failed"), "{ran:?}");
}

#[test]
fn another_job_is_not_gone_on_with_and_two_processes_do_not_share_one() {
    let place = Place::new();
    place.list("list.csv", 300);
    place.write("precious.csv", "not ours");
    let ran = place.run(&["list.csv", "--output", "precious.csv"]);
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.err.contains("precious.csv exists, and is of no job; --restart replaces it"), "{ran:?}");
    assert_eq!(place.read("precious.csv"), "not ours");

    let first = place.batch(&["list.csv", "--output", "out.csv"]).spawn().unwrap();
    place.until_recorded("out.csv", 1);
    let second = place.run(&["list.csv", "--output", "out.csv"]);
    assert_eq!(second.code, Some(1), "{second:?}");
    assert!(second.err.contains("another process works on this job"), "{second:?}");
    signal(&first, "-INT");
    assert_eq!(finish(first).code, Some(1));

    for (more, what) in [
        (&["--prompt", "a photo of"][..], "prompt: a photo of now, none then"),
        (&["--num-beams", "2"], "parameters: {\"num_beams\":2} now, {} then"),
        (&["--column", "image"], "--column: image now, none then"),
        (&["images"], "inputs: list.csv images now, list.csv then"),
    ] {
        let ran = place.run(&[&["list.csv", "--output", "out.csv"], more].concat());
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert!(ran.err.contains(what) && ran.err.contains("--restart"), "{what}: {ran:?}");
    }
    place.list("list.csv", 3);
    let ran = place.run(&["list.csv", "--output", "out.csv"]);
    assert!(ran.code == Some(2) && ran.err.contains("list.csv: ") && ran.err.contains(" bytes now"), "{ran:?}");
    let ran = place.run(&["list.csv", "--output", "out.csv", "--restart"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(place.read("out.csv").lines().count(), 4);
}

#[test]
fn what_is_wrong_with_the_command_is_told_before_a_model_is_loaded() {
    let place = Place::new();
    place.write("a.png", png(16, 16, 1));
    place.write("list.csv", "photo,label\na.png,x\n");
    for (arguments, what) in [
        (&["missing.csv", "--output", "o.csv"][..], "missing.csv: cannot be read"),
        (&["list.csv", "--output", "o.csv"], "none of the columns (photo, label) is called image, url, image_url"),
        (&["list.csv", "--column", "img", "--output", "o.csv"], "has no column img (--column); it has photo, label"),
        (&["a.png", "--output", "o.txt"], "which form? Name it x.jsonl, x.csv or x.parquet"),
        (&["a.png", "--output", "o.csv", "--retry-failed"], "there is no job of o.csv"),
        (&["a.png", "--output", "o.csv", "--error-threshold", "-2"], "-2 is not in -1.."),
        (&["-", "--output", "o.csv"], "standard input cannot be read again"),
        (&["a.png", "list.csv", "--column", "photo", "--output", "./list.csv", "--restart"], "list.csv is an input"),
    ] {
        // No such model: it is not looked for.
        let ran = place.run(&[arguments, &["--model", "nowhere"]].concat());
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert!(ran.err.contains(what), "{what}: {ran:?}");
    }
    assert_eq!(fs::read_dir(place.folder.path()).unwrap().count(), 2, "something was begun");
}

#[test]
fn a_summary_alone_writes_no_rows() {
    let place = Place::new();
    place.write("a.png", png(16, 16, 1));
    let ran = place.run(&["a.png", "missing.tar.png", "--output", "o.csv", "--output-action", "summary_only"]);
    assert_eq!(ran.code, Some(2), "an argument that is no file: {ran:?}");
    let ran = place.run(&["a.png", "--output", "o.csv", "--output-action", "summary_only"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.out.starts_with("1 row: 1 captioned") && !ran.out.contains("output "), "{ran:?}");
    assert!(!place.path("o.csv").exists() && place.path("o.csv.report.json").exists());
}

#[test]
fn an_output_of_an_earlier_job_is_not_taken_for_that_of_a_later_one() {
    let place = Place::new();
    place.list("list.csv", 2);
    let arguments = ["list.csv", "--output", "out.csv"];
    assert_eq!(place.run(&arguments).code, Some(0));
    place.list("list.csv", 3);
    let ran = place.run(&[&arguments[..], &["--restart", "--output-action", "summary_only"]].concat());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(place.read("out.csv").lines().count(), 3, "nobody asked for another one");
    let ran = place.run(&arguments);
    assert!(ran.code == Some(0) && ran.out.contains("output   out.csv"), "{ran:?}");
    assert_eq!(place.read("out.csv").lines().count(), 4);
    assert!(place.run(&arguments).err.starts_with("this job is finished: 3 rows"));
}

#[test]
fn a_signal_ends_the_command_while_it_writes_its_output() {
    let place = Place::new();
    place.write("a.png", png(16, 16, 1));
    // More than a pipe holds, so that the writing does not end.
    place.write("list.jsonl", json!({"image": "a.png", "note": "x".repeat(1 << 20)}).to_string());
    assert!(Command::new("mkfifo").arg(place.path("out.csv.part")).status().unwrap().success());
    let child = place.batch(&["list.jsonl", "--output", "out.csv", "--quiet"]).spawn().unwrap();
    let (sender, written) = mpsc::sync_channel(1);
    let part = place.path("out.csv.part");
    // Opening it waits for who writes.
    std::thread::spawn(move || sender.send(File::open(part)));
    let _pipe = written.recv_timeout(LIMIT).expect("nothing is written").unwrap();
    signal(&child, "-TERM");
    assert_eq!(finish(child).code, None, "it ended by itself");
}
