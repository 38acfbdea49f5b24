//! What a faster way must keep to be offered: nearly all captions of the demo model's scenes, none of which it was trained
//! on.

use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blipstream::caption::preprocess::{Limits, Resizer, decode, decode_at_least};
use blipstream::caption::{
    Backend, BeamSearch, BlipEngine, DtypeSpec, Model, Params, Pixels, Sampling, Strategy, caption, number,
};
use image::imageops::{FilterType, resize};
use image::{ImageFormat, RgbImage};
use serde_json::Value;

use crate::fixture::{load_if_here, load_on, report};
use crate::turbo::turbo;

/// Of the sheet: scenes in a row, and the side of one.
const COLUMNS: usize = 20;
const SIDE: usize = 112;
/// Least share of captions that a faster way leaves as they are, in percent.
const SAME: usize = 99;

const LIMITS: Limits = Limits { max_pixels: 1 << 23, max_side: 4096, max_memory: 64 << 20 };

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn strings(json: &Value) -> Vec<String> {
    json.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

/// The 300 scenes on the sheet, row by row.
fn sheet() -> Vec<Vec<u8>> {
    let bytes = std::fs::read(root().join("tests/fixtures/sheet.jpg")).unwrap();
    let sheet = decode(&bytes, &LIMITS).unwrap();
    let scene = |number: usize| {
        let (top, left) = (number / COLUMNS * SIDE, number % COLUMNS * SIDE);
        let rows = (top..top + SIDE).map(|row| &sheet.rgb[3 * (row * sheet.width as usize + left)..][..3 * SIDE]);
        rows.collect::<Vec<_>>().concat()
    };
    (0..300).map(scene).collect()
}

/// 200 scenes in files of their own and 300 on a sheet, with their true captions.
fn scenes(model: &Model) -> Vec<(Pixels, String)> {
    let fixtures = root().join("tests/fixtures");
    let list = std::fs::read_to_string(fixtures.join("scenes/scenes.jsonl")).unwrap();
    let mut resizer = Resizer::new();
    let mut scenes: Vec<(Pixels, String)> = list
        .lines()
        .map(|line| {
            let scene: Value = serde_json::from_str(line).unwrap();
            let bytes = std::fs::read(fixtures.join("scenes").join(scene["file"].as_str().unwrap())).unwrap();
            let pixels = model.preprocessor().resize(&decode(&bytes, &LIMITS).unwrap(), &mut resizer).unwrap();
            (pixels, scene["caption"].as_str().unwrap().to_owned())
        })
        .collect();
    let captions = std::fs::read_to_string(fixtures.join("sheet.json")).unwrap();
    let pixels = sheet().into_iter().map(|rgb| Pixels::new(SIDE, rgb).unwrap());
    scenes.extend(pixels.zip(strings(&serde_json::from_str(&captions).unwrap())));
    scenes
}

fn captions(model: Arc<Model>, scenes: &[(Pixels, String)]) -> Vec<String> {
    captions_by(model, scenes, |_| Params::default())
}

/// The same, each scene in its own way.
fn captions_by(model: Arc<Model>, scenes: &[(Pixels, String)], params: impl Fn(usize) -> Params) -> Vec<String> {
    let mut engine = BlipEngine::new(model);
    let numbered: Vec<_> = scenes.iter().enumerate().collect();
    let batches = numbered.chunks(32).flat_map(|scenes| {
        let items: Vec<_> = scenes.iter().map(|(at, (pixels, _))| (pixels.clone(), params(*at))).collect();
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
    let said_and_true = in_f32.iter().zip(scenes.iter().map(|(_, truth)| truth));
    let wrong: Vec<_> = said_and_true.filter(|(said, truth)| said != truth).collect();
    assert!(right >= 490, "said, and true: {wrong:?}");
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

/// Its name, the parameters of a scene, and the least share of captions that stay, in percent.
type Way<'a> = (&'a str, &'a dyn Fn(usize) -> Params, usize);

/// A draw that falls within the rounding of where one token's share ends and the next one's begins goes either way.
#[test]
fn bf16_leaves_99_of_100_captions_of_beams_and_samples_as_they_are_in_f32() {
    let demo = root().join("models/demo");
    let exact = load_on(&demo, DtypeSpec::F32, Backend::Native(None)).unwrap();
    let scenes = scenes(&exact);
    let beams = |_| Params {
        strategy: Strategy::Beam(BeamSearch { beams: 3, length_penalty: number(1.0) }),
        ..Params::default()
    };
    let sampled = |temperature: f32, seed: usize| {
        let (temperature, top_p) = (number(temperature), number(1.0));
        Params {
            strategy: Strategy::Sample(Sampling { temperature, top_k: 0, top_p, seed: seed as u64 }),
            ..Params::default()
        }
    };
    let (usual, wild) = (|seed| sampled(1.0, seed), |seed| sampled(2.0, seed));
    // At a temperature of 2 every one of the 20 tokens is a draw among many.
    let ways: [Way<'_>; 3] =
        [("3 beams", &beams, SAME), ("samples", &usual, SAME), ("samples at a temperature of 2", &wild, 85)];
    for (way, params, least) in ways {
        let in_f32 = captions_by(exact.clone(), &scenes, params);
        for (backend, dtype) in [(Backend::Native(None), DtypeSpec::Bf16), (Backend::OneDnn, DtypeSpec::Bf16)] {
            let Some(model) = load_if_here(&demo, dtype, backend) else { continue };
            let named = format!("{way} in {dtype} on {}", model.info().backend);
            let same = equal(&captions_by(model, &scenes, params), in_f32.iter());
            let right = equal(&in_f32, scenes.iter().map(|(_, truth)| truth));
            report(&format!("{named}: {same} of 500 captions as in f32, where {right} are exactly right"));
            assert!(same * 100 >= least * scenes.len(), "{named}: {same} of 500");
        }
    }
}

/// A scene as a JPEG of four times its side.
fn enlarged(rgb: Vec<u8>) -> Vec<u8> {
    let [side, large] = [SIDE, 4 * SIDE].map(|side| side as u32);
    let scene = resize(&RgbImage::from_raw(side, side, rgb).unwrap(), large, large, FilterType::CatmullRom);
    let mut jpeg = Cursor::new(Vec::new());
    scene.write_to(&mut jpeg, ImageFormat::Jpeg).unwrap();
    jpeg.into_inner()
}

#[test]
fn jpegs_decoded_at_a_part_of_their_size_leave_99_of_100_captions_as_they_are() {
    let model = load_on(&root().join("models/demo"), DtypeSpec::F32, Backend::Native(None)).unwrap();
    let Some(turbo) = turbo() else { return };
    let mut resizer = Resizer::new();
    let jpegs: Vec<_> = sheet().into_iter().map(enlarged).collect();
    let mut captions_at = |least: usize, side: u32| {
        let scene = |jpeg: &Vec<u8>| {
            let picture = decode_at_least(jpeg, &LIMITS, least as u32, &turbo).unwrap();
            assert_eq!((picture.width, picture.height), (side, side));
            (model.preprocessor().resize(&picture, &mut resizer).unwrap(), String::new())
        };
        let scenes: Vec<_> = jpegs.iter().map(scene).collect();
        captions(model.clone(), &scenes)
    };
    let whole = captions_at(4 * SIDE, 448);
    for (gap, side) in [(1, 112), (2, 224)] {
        let same = equal(&captions_at(gap * SIDE, side), whole.iter());
        report(&format!(
            "JPEGs with sides of at least {gap} times the model's: {same} of 300 captions as from whole ones"
        ));
        assert!(same * 100 >= SAME * jpegs.len(), "gap {gap}: {same} of 300");
    }
}
