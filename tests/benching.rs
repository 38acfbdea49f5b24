//! `blipstream bench`, as a person runs it, on the small model.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use self::ran::Ran;

#[path = "support/ran.rs"]
mod ran;

fn bench(arguments: &[&str]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blipstream"));
    Ran::of(command.arg("bench").args(arguments).args(["--model", "demo"]).output().unwrap())
}

fn json(ran: &Ran) -> Value {
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    ran.lines().remove(0)
}

#[test]
fn the_captioner_is_measured_by_batch_size_and_phase() {
    let arguments =
        ["captioner", "--device", "cpu", "--dtype", "f32", "--batch", "1,3", "--tokens", "4", "--time", "50ms"];
    let report = json(&bench(&[&arguments[..], &["--json"]].concat()));
    let batches = report["batches"].as_array().unwrap();
    assert_eq!(batches.iter().map(|batch| batch["batch"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 3]);
    for batch in batches {
        let of = |field: &str| batch[field].as_f64().unwrap();
        let whole = 1.0 / of("images_per_second");
        let parts = of("encode") + of("cross_keys_values") + of("decode");
        assert!(parts > 0.0 && parts < whole, "{batch}");
        // Four steps for each batch.
        assert!((of("step") * 4.0 / of("batch") / of("decode") - 1.0).abs() < 1e-6, "{batch}");
    }
    assert!(
        report["ceilings"].as_object().unwrap().values().all(|ceiling| ceiling.as_f64().unwrap() > 1e8),
        "{report}"
    );
    let text = bench(&arguments);
    assert!(
        text.out.contains("images/s")
            && text.out.contains("GFLOP/s in registers")
            && text.out.contains("of products in f32 on native"),
        "{}",
        text.out
    );
}

#[test]
fn the_pipeline_is_measured_against_its_captioner_and_says_what_holds_it_up() {
    let arguments = ["pipeline", "--tokens", "4", "--time", "1s", "--size", "120x90"];
    let report = json(&bench(&[&arguments[..], &["--json", "--set", "batch.max_size=4"]].concat()));
    let of = |field: &str| report[field].as_f64().unwrap();
    assert!((of("pipeline_images_per_second") / of("captioner_images_per_second") / of("ratio") - 1.0).abs() < 1e-6);
    assert!(of("images") >= 16.0 && of("jpeg") > 500.0, "{report}");
    let stages: Vec<_> = report["stages"].as_array().unwrap().iter().map(|stage| stage["stage"].clone()).collect();
    for stage in ["fetch", "decode", "infer", "publish"] {
        assert!(stages.contains(&stage.into()), "{stages:?}");
    }
    assert!(!report["bottleneck"].as_str().unwrap().is_empty());
}

#[test]
fn sizes_and_ways_of_feeding_the_captioner_are_measured() {
    let arguments = ["batching", "--device", "cpu", "--dtype", "f32", "--encode", "1,2", "--rows", "2,3"];
    let arguments = [&arguments[..], &["--tokens", "4", "--time", "20ms"]].concat();
    let report = json(&bench(&[&arguments[..], &["--json"]].concat()));
    let sizes = |part: &str, field: &str| {
        let of = |one: &Value| one[field].as_u64().unwrap();
        report[part].as_array().unwrap().iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!((sizes("encode", "images"), sizes("decode", "rows")), (vec![1, 2], vec![2, 3]));
    for step in report["decode"].as_array().unwrap() {
        let of = |field: &str| step[field].as_f64().unwrap();
        assert!(of("ms_a_row") > 0.0 && (of("ms_a_row") * of("rows") / of("ms_a_step") - 1.0).abs() < 1e-6, "{step}");
    }
    let feeding = &report["feeding"];
    assert_eq!(feeding["rows"], 3);
    let ratios = feeding["ratios"].as_array().unwrap();
    assert!(ratios.len() == 3 && ratios.iter().all(|ratio| ratio.as_f64().unwrap() > 0.0), "{feeding}");
    assert_eq!((&report["model"]["dtype"], &report["tokens"]), (&"f32".into(), &4.into()));
    let text = bench(&arguments).out;
    assert!(text.contains("captions of 1 to 4 tokens, 3 rows") && text.contains("rows that join"), "{text}");
}

#[test]
fn preprocessing_is_measured_on_photographs_and_on_files() {
    let preprocessing = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blipstream"));
        command.args(["bench", "preprocessing", "--time", "1ms"]).args(arguments);
        Ran::of(command.output().unwrap())
    };
    let file = "tests/fixtures/pillow/lossy/420.jpg";
    let report = json(&preprocessing(&[file, "--side", "40", "--json"]));
    let image = &report["images"][0];
    assert_eq!((&image["name"], &image["width"], &image["height"]), (&file.into(), &250.into(), &170.into()));
    assert_eq!((&image["decoded"], &report["side"]), (&serde_json::json!([250, 170]), &40.into()));
    let scaled = preprocessing(&[file, "--side", "40", "--gap", "1.5", "--json"]);
    if scaled.code == Some(0) {
        assert_eq!(json(&scaled)["images"][0]["decoded"], serde_json::json!([125, 85]));
    } else {
        assert!(std::env::var_os("CI").is_none() && scaled.err.contains("libturbojpeg"), "{}", scaled.err);
    }
    assert!(["decode", "resize", "both"].iter().all(|part| image[part].as_f64().unwrap() > 0.0), "{image}");
    let made = preprocessing(&[]);
    assert_eq!(made.code, Some(0), "{}", made.err);
    assert!(made.out.contains("640x427") && made.out.contains("4000x3000"), "{}", made.out);
    let usage = preprocessing(&["--gap", "0.5"]);
    assert!(usage.code == Some(2) && usage.err.contains("--gap"), "{}", usage.err);
    let missing = preprocessing(&["missing.jpg"]);
    assert!(missing.code == Some(1) && missing.err.contains("missing.jpg"), "{}", missing.err);
}

/// A report of `bench captioner` on a device that takes 10 ms for a batch, and 1 ms for each image of it.
fn report_file(folder: &Path) -> PathBuf {
    let batch = |size: u32| {
        format!(r#"{{"batch":{size},"images_per_second":{}}}"#, 1e3 * f64::from(size) / f64::from(10 + size))
    };
    let batches: Vec<_> = [1, 2, 4, 8, 16, 32].into_iter().map(batch).collect();
    let file = folder.join("device.json");
    std::fs::write(&file, format!(r#"{{"version":"0","batches":[{}]}}"#, batches.join(","))).unwrap();
    file
}

fn blipstream(arguments: &[&str]) -> Ran {
    Ran::of(Command::new(env!("CARGO_BIN_EXE_blipstream")).args(arguments).output().unwrap())
}

#[test]
fn a_rate_is_planned_for_from_a_measured_device() {
    let folder = tempfile::tempdir().unwrap();
    let file = report_file(folder.path());
    let arguments = ["plan", "--curve", file.to_str().unwrap(), "--devices", "8", "--goal", "200ms"];
    let plan = json(&blipstream(&[&arguments[..], &["--rate", "20000", "--json"]].concat()));
    // A device gives 762 images a second at most; a worker of eight of them therefore no more than 6095.
    let worker = plan["worker_images_per_second"].as_f64().unwrap();
    assert!(worker > 4500.0 && worker <= 6096.0, "{plan}");
    let workers = (20_000.0 / (worker * 0.8)).ceil() as u64;
    assert_eq!((&plan["batch_size"], &plan["workers"]), (&32.into(), &workers.into()), "{plan}");
    let text = blipstream(&[&arguments[..], &["--rate", "20000"]].concat()).out;
    assert!(text.contains("17.6 Gbit/s for images of 110.0 kB"), "{text}");
    let usage = blipstream(&[&arguments[..], &["--rate", "0"]].concat());
    assert!(usage.code == Some(2) && usage.err.contains("--rate"), "{}", usage.err);
    let goal = blipstream(&["plan", "--curve", file.to_str().unwrap(), "--rate", "1", "--goal", "5ms"]);
    assert!(goal.code == Some(1) && goal.err.contains("a batch of 1 alone takes 11 ms"), "{}", goal.err);
}

#[test]
fn ways_of_batching_are_compared_in_a_report_with_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let (file, report) = (report_file(folder.path()), folder.path().join("policies.md"));
    let arguments = ["bench", "policies", "--curve", file.to_str().unwrap(), "--goal", "400ms", "--images", "3000"];
    let ran = blipstream(&[&arguments[..], &["--devices", "2", "--write", report.to_str().unwrap()]].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert_eq!(std::fs::read_to_string(&report).unwrap(), ran.out);
    // Below half of the load everybody is in time under random arrivals.
    let first = ran.out.lines().find(|line| line.starts_with("| 0.1 |")).unwrap();
    assert_eq!(first.matches("100.0, ").count(), 3, "{first}");
    assert!(ran.out.contains("## A backlog") && ran.out.contains("![images within the goal, by load](policies.svg)"));
    let picture = std::fs::read_to_string(folder.path().join("policies.svg")).unwrap();
    assert!(
        picture.starts_with("<svg") && picture.contains("random arrivals") && picture.matches("<polyline").count() >= 6
    );
    let usage = blipstream(&[&arguments[..], &["--write", "x.svg"]].concat());
    assert!(usage.code == Some(2) && usage.err.contains("x.md"), "{}", usage.err);
}

#[test]
fn what_cannot_be_measured_is_bad_usage() {
    for (arguments, word) in [
        (&["captioner", "--batch", "0"][..], "--batch"),
        (&["captioner", "--dtype", "f8"], "--dtype"),
        (&["batching", "--encode", "1,0"], "--encode"),
        (&["batching", "--tokens", "0"], "--tokens"),
        (&["captioner", "--device", "gpu"], "--device"),
        (&["pipeline", "--size", "640"], "640x427"),
        (&["pipeline", "--time", "0s"], "--time"),
    ] {
        let ran = bench(arguments);
        assert_eq!(ran.code, Some(2), "{}", ran.err);
        assert!(ran.err.contains(word), "{}", ran.err);
    }
}
