//! The demo filter judges 400 pairs of scenes and texts that it was not trained on, half of them wrong in one word.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blipstream::caption::preprocess::{Limits, Resizer, decode};
use blipstream::caption::{Backend, DeviceSpec, DtypeSpec, LoadOptions, Match, Matcher, ModelSource, load_matcher};
use serde::Deserialize;

use crate::fixture::report;

/// Least share that is judged right, in percent, and most that a narrower precision judges otherwise.
const RIGHT: usize = 95;
const FLIPPED: usize = 1;

#[derive(Deserialize)]
struct Pair {
    file: String,
    right: String,
    wrong: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// As the program puts it together: the image encoder is the captioner's.
fn source() -> ModelSource {
    let demo = root().join("models/demo");
    let index = r#"{"weight_map": {"a": "captioner.safetensors", "b": "reader.safetensors"}}"#;
    let file = |name: &str| Cow::Owned(std::fs::read(demo.join(name)).unwrap());
    let files = [
        ("config.json", file("filter/config.json")),
        ("preprocessor_config.json", file("preprocessor_config.json")),
        ("tokenizer.json", file("tokenizer.json")),
        ("model.safetensors.index.json", Cow::Borrowed(index.as_bytes())),
        ("captioner.safetensors", file("model.safetensors")),
        ("reader.safetensors", file("filter/reader.safetensors")),
    ];
    let files = files.map(|(name, bytes)| (name.to_owned(), bytes));
    ModelSource::Memory { id: "demo filter".into(), files: BTreeMap::from(files) }
}

/// The judgements of the true and of the wrong text of each scene, one after the other.
fn judge(matcher: &Matcher, pairs: &[Pair]) -> Vec<Match> {
    let scenes = root().join("tests/fixtures/scenes");
    let limits = Limits { max_pixels: 1 << 23, max_side: 4096, max_memory: 64 << 20 };
    let mut resizer = Resizer::new();
    let pixels = pairs.iter().map(|pair| {
        let picture = decode(&std::fs::read(scenes.join(&pair.file)).unwrap(), &limits).unwrap();
        matcher.preprocessor().resize(&picture, &mut resizer).unwrap()
    });
    let images = matcher.encode(&pixels.collect::<Vec<_>>()).unwrap();
    let both = images.iter().zip(pairs).flat_map(|(image, pair)| [(image, pair.right.as_str()), (image, &pair.wrong)]);
    matcher.judge(&both.collect::<Vec<_>>()).unwrap().into_iter().map(Result::unwrap).collect()
}

#[test]
fn the_demo_filter_judges_unseen_pairs_right_in_every_precision() {
    let json = std::fs::read(root().join("tests/fixtures/scenes/pairs.json")).unwrap();
    let pairs: Vec<Pair> = serde_json::from_slice(&json).unwrap();
    assert_eq!(pairs.len(), 200);
    for pair in &pairs {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let (right, wrong) = (words(&pair.right), words(&pair.wrong));
        let different = right.iter().zip(&wrong).filter(|(a, b)| a != b).count();
        // One word, and the article or the plural that follows from it.
        assert!(right.len() == wrong.len() && (1..=2).contains(&different), "{} / {}", pair.right, pair.wrong);
    }
    let mut exact: Option<Vec<bool>> = None;
    let ways =
        [(DtypeSpec::F32, Backend::Native(None)), (DtypeSpec::Bf16, Backend::Candle), (DtypeSpec::Bf16, Backend::Auto)];
    for (dtype, backend) in ways {
        let options = LoadOptions { device: DeviceSpec::Cpu, dtype, backend, ..LoadOptions::new(source()) };
        let matcher = load_matcher(&options).unwrap();
        let judged: Vec<bool> = judge(&matcher, &pairs).iter().map(|judged| judged.itm >= 0.5).collect();
        let right = judged.iter().enumerate().filter(|(at, matches)| **matches == (at % 2 == 0)).count();
        let flipped = exact.as_ref().map_or(0, |exact| exact.iter().zip(&judged).filter(|(a, b)| a != b).count());
        let on = &matcher.info().backend;
        report(&format!("{dtype} on {on}: {right} of {} judged right, {flipped} otherwise than in f32", judged.len()));
        assert!(right * 100 >= judged.len() * RIGHT && flipped * 100 <= judged.len() * FLIPPED, "{dtype} on {on}");
        exact.get_or_insert(judged);
    }
}
