//! `blipstream bench`, as a person runs it, on the small model.

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
    assert!(report["ceilings"].as_array().unwrap().iter().all(|ceiling| ceiling.as_f64().unwrap() > 1e8), "{report}");
    let text = bench(&arguments);
    assert!(text.out.contains("images/s") && text.out.contains("GFLOP/s of products in f32 on native"), "{}", text.out);
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
fn what_cannot_be_measured_is_bad_usage() {
    for (arguments, word) in [
        (&["captioner", "--batch", "0"][..], "--batch"),
        (&["captioner", "--dtype", "f8"], "--dtype"),
        (&["captioner", "--device", "gpu"], "--device"),
        (&["pipeline", "--size", "640"], "640x427"),
        (&["pipeline", "--time", "0s"], "--time"),
    ] {
        let ran = bench(arguments);
        assert_eq!(ran.code, Some(2), "{}", ran.err);
        assert!(ran.err.contains(word), "{}", ran.err);
    }
}
