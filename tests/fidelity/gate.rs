//! What a reduced precision must keep to be offered: nearly all captions of the demo model's scenes, none of which it was
//! trained on.

use std::path::{Path, PathBuf};

use blipstream::caption::preprocess::{Limits, Resizer, decode};
use blipstream::caption::{Backend, BlipEngine, DtypeSpec, Model, Params, Pixels, caption};
use serde_json::Value;

use crate::fixture::{load_if_here, load_on, report};

/// Of the sheet: scenes in a row, and the side of one.
const COLUMNS: usize = 20;
const SIDE: usize = 112;
/// Least share of captions that a reduced precision leaves as they are in f32, in percent.
const SAME: usize = 99;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn strings(json: &Value) -> Vec<String> {
    json.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

/// 200 scenes in files of their own and 300 on a sheet, with their true captions.
fn scenes(model: &Model) -> Vec<(Pixels, String)> {
    let fixtures = root().join("tests/fixtures");
    let limits = Limits { max_pixels: 1 << 23, max_side: 4096, max_memory: 64 << 20 };
    let list = std::fs::read_to_string(fixtures.join("scenes/scenes.jsonl")).unwrap();
    let mut resizer = Resizer::new();
    let mut scenes: Vec<(Pixels, String)> = list
        .lines()
        .map(|line| {
            let scene: Value = serde_json::from_str(line).unwrap();
            let bytes = std::fs::read(fixtures.join("scenes").join(scene["file"].as_str().unwrap())).unwrap();
            let pixels = model.preprocessor().resize(&decode(&bytes, &limits).unwrap(), &mut resizer).unwrap();
            (pixels, scene["caption"].as_str().unwrap().to_owned())
        })
        .collect();
    let sheet = decode(&std::fs::read(fixtures.join("sheet.jpg")).unwrap(), &limits).unwrap();
    let captions = std::fs::read_to_string(fixtures.join("sheet.json")).unwrap();
    scenes.extend(strings(&serde_json::from_str(&captions).unwrap()).into_iter().zip(0..).map(|(caption, number)| {
        let (top, left) = (number / COLUMNS * SIDE, number % COLUMNS * SIDE);
        let rows = (top..top + SIDE).map(|row| &sheet.rgb[3 * (row * sheet.width as usize + left)..][..3 * SIDE]);
        (Pixels::new(SIDE, rows.collect::<Vec<_>>().concat()).unwrap(), caption)
    }));
    scenes
}

fn captions(model: std::sync::Arc<Model>, scenes: &[(Pixels, String)]) -> Vec<String> {
    let mut engine = BlipEngine::new(model);
    let batches = scenes.chunks(32).flat_map(|scenes| {
        let items: Vec<_> = scenes.iter().map(|(pixels, _)| (pixels.clone(), Params::default())).collect();
        caption(&mut engine, &items).unwrap().into_iter().map(|caption| caption.unwrap().text)
    });
    batches.collect()
}

fn equal<'a>(ours: &[String], others: impl Iterator<Item = &'a String>) -> usize {
    ours.iter().zip(others).filter(|(a, b)| a == b).count()
}

#[test]
fn reduced_precisions_leave_99_of_100_captions_as_they_are_in_f32() {
    let demo = root().join("models/demo");
    let exact = load_on(&demo, DtypeSpec::F32, Backend::Native(None)).unwrap();
    let scenes = scenes(&exact);
    assert_eq!(scenes.len(), 500);
    let in_f32 = captions(exact, &scenes);
    let right = equal(&in_f32, scenes.iter().map(|(_, truth)| truth));
    report(&format!("f32: {right} of 500 scenes exactly right"));
    assert!(right >= 490);
    for (backend, dtype) in [
        (Backend::Native(None), DtypeSpec::Bf16),
        (Backend::OneDnn, DtypeSpec::Bf16),
        (Backend::OneDnn, DtypeSpec::Int8),
    ] {
        let Some(model) = load_if_here(&demo, dtype, backend) else { continue };
        let named = format!("{dtype} on {}", model.info().backend);
        let ours = captions(model, &scenes);
        let same = equal(&ours, in_f32.iter());
        let right = equal(&ours, scenes.iter().map(|(_, truth)| truth));
        report(&format!("{named}: {same} of 500 captions as in f32, {right} exactly right"));
        assert!(same * 100 >= SAME * scenes.len(), "{named}: {same} of 500");
    }
}
