//! Images and texts are judged as by the reference, whatever they are judged with.
//!
//! The models, and the reference's judgement, are written by `tests/reference/make_retrieval.py`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blipstream::caption::{
    Backend, DeviceSpec, DtypeSpec, Encoded, ErrorKind, LoadOptions, Match, Matcher, ModelSource, Pixels, load_matcher,
    load_model,
};
use serde::Deserialize;

use crate::fixture::{self, TOLERANCE, report};

const MODELS: [&str; 3] = ["proportions", "widths", "depths"];

#[derive(Deserialize)]
struct Expected {
    parameters: u64,
    texts: Vec<String>,
    pairs: Vec<Pair>,
    image_embeddings: Vec<Vec<f32>>,
    text_embeddings: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct Pair {
    image: usize,
    text: String,
    itm: [f32; 2],
    itc: f32,
}

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/retrieval").join(name)
}

fn options(name: &str, dtype: DtypeSpec, backend: Backend) -> LoadOptions {
    let source = ModelSource::Dir(directory(name));
    LoadOptions { device: DeviceSpec::Cpu, dtype, backend, ..LoadOptions::new(source) }
}

fn matcher(name: &str, backend: Backend) -> Arc<Matcher> {
    load_matcher(&options(name, DtypeSpec::F32, backend)).unwrap()
}

fn expected(name: &str) -> (Expected, Vec<Pixels>) {
    fixture::expected(&directory(name))
}

/// The largest difference between numbers.
fn difference<'a>(pairs: impl IntoIterator<Item = (&'a [f32], &'a [f32])>) -> f32 {
    let pairs = pairs.into_iter().inspect(|(a, b)| assert_eq!(a.len(), b.len()));
    let differences = pairs.flat_map(|(a, b)| a.iter().zip(b).map(|(a, b)| (a - b).abs()));
    differences.fold(0.0, |most, difference| if difference.is_nan() { f32::INFINITY } else { most.max(difference) })
}

fn judged(matcher: &Matcher, images: &[Encoded], pairs: &[Pair]) -> Vec<Match> {
    let asked: Vec<_> = pairs.iter().map(|pair| (&images[pair.image], pair.text.as_str())).collect();
    matcher.judge(&asked).unwrap().into_iter().map(Result::unwrap).collect()
}

#[test]
fn matching_and_contrast_equal_the_reference_on_every_backend() {
    for name in MODELS {
        let (expected, images) = expected(name);
        for backend in [Backend::Native(None), Backend::Candle, Backend::Fused] {
            let matcher = matcher(name, backend);
            assert_eq!(matcher.info().parameters, expected.parameters, "{name}");
            let encoded = matcher.encode(&images).unwrap();
            let found = judged(&matcher, &encoded, &expected.pairs);
            let both = || found.iter().zip(&expected.pairs);
            let itm = difference(both().map(|(found, pair)| (&found.logits[..], &pair.itm[..])));
            let itc = both().map(|(found, pair)| (found.itc - pair.itc).abs()).fold(0.0, f32::max);
            let own: Vec<_> = encoded.iter().map(|image| matcher.image_embedding(image).unwrap()).collect();
            let of_images =
                difference(own.iter().map(Vec::as_slice).zip(expected.image_embeddings.iter().map(Vec::as_slice)));
            let texts: Vec<&str> = expected.texts.iter().map(String::as_str).collect();
            let own: Vec<_> = matcher.text_embeddings(&texts).unwrap().into_iter().map(Result::unwrap).collect();
            let of_texts =
                difference(own.iter().map(Vec::as_slice).zip(expected.text_embeddings.iter().map(Vec::as_slice)));
            report(&format!(
                "{name} on {backend}: {} pairs differ by at most {itm:.1e} (scores of matching) and {itc:.1e} (cosines), \
                 embeddings of images by {of_images:.1e}, of texts by {of_texts:.1e}",
                expected.pairs.len()
            ));
            assert!([itm, itc, of_images, of_texts].into_iter().all(|most| most < TOLERANCE), "{name} on {backend}");
            for (found, pair) in both() {
                let probability = 1.0 / (1.0 + (pair.itm[0] - pair.itm[1]).exp());
                assert!((found.itm - probability).abs() < TOLERANCE);
            }
        }
    }
}

#[test]
fn a_pair_is_judged_alike_alone_and_among_others() {
    for name in MODELS {
        let (expected, images) = expected(name);
        for backend in [Backend::Native(None), Backend::Candle, Backend::Fused] {
            let matcher = matcher(name, backend);
            let encoded = matcher.encode(&images).unwrap();
            let together = judged(&matcher, &encoded, &expected.pairs);
            for (pair, together) in expected.pairs.iter().zip(together).step_by(7) {
                let one = matcher.encode(&images[pair.image..=pair.image]).unwrap().remove(0);
                let alone = matcher.judge(&[(&one, &pair.text)]).unwrap().remove(0).unwrap();
                let most =
                    difference([(&alone.logits[..], &together.logits[..])]).max((alone.itc - together.itc).abs());
                assert!(most < 1e-5, "{name} on {backend}: {most}");
            }
        }
    }
}

#[test]
fn reduced_precisions_judge_alike() {
    for name in MODELS {
        let (expected, images) = expected(name);
        for dtype in [DtypeSpec::Bf16, DtypeSpec::F16] {
            let matcher = load_matcher(&options(name, dtype, Backend::Candle)).unwrap();
            let encoded = matcher.encode(&images).unwrap();
            let found = judged(&matcher, &encoded, &expected.pairs);
            let flips = found.iter().zip(&expected.pairs).filter(|(found, pair)| {
                // What is close to a half may fall either way.
                let margin = pair.itm[1] - pair.itm[0];
                margin.abs() > 0.3 && (found.logits[1] > found.logits[0]) != (margin > 0.0)
            });
            let flips = flips.count();
            report(&format!("{name} in {dtype}: {flips} of {} judgements flip", expected.pairs.len()));
            assert_eq!(flips, 0, "{name} in {dtype}");
        }
    }
}

/// What bf16 rounds may depend on how many rows are multiplied together.
#[test]
fn in_bf16_the_company_of_other_pairs_changes_hardly_a_judgement() {
    for backend in [Backend::Native(None), Backend::Candle] {
        let (mut flips, mut pairs, mut most) = (0, 0, 0f32);
        for name in MODELS {
            let (expected, images) = expected(name);
            let matcher = load_matcher(&options(name, DtypeSpec::Bf16, backend)).unwrap();
            let encoded = matcher.encode(&images).unwrap();
            let together = judged(&matcher, &encoded, &expected.pairs);
            for (pair, together) in expected.pairs.iter().zip(together) {
                let one = matcher.encode(&images[pair.image..=pair.image]).unwrap().remove(0);
                let alone = matcher.judge(&[(&one, &pair.text)]).unwrap().remove(0).unwrap();
                flips += usize::from((alone.itm > 0.5) != (together.itm > 0.5));
                most = most.max((alone.itm - together.itm).abs());
                pairs += 1;
            }
        }
        report(&format!("bf16 on {backend}: {flips} of {pairs} judgements flip in company, by at most {most:.1e}"));
        assert!(pairs >= 100 && flips * 100 <= pairs, "{backend}");
    }
}

#[test]
fn a_text_without_words_or_with_too_many_is_refused_alone() {
    let (expected, images) = expected("depths");
    let matcher = matcher("depths", Backend::Native(None));
    let image = matcher.encode(&images[..1]).unwrap().remove(0);
    let long = "a dog ".repeat(40);
    let texts = ["", expected.texts[1].as_str(), " \n", &long];
    let results = matcher.judge(&texts.map(|text| (&image, text))).unwrap();
    let embedded = matcher.text_embeddings(&texts).unwrap();
    for (at, words) in [(0, "no words"), (2, "no words"), (3, "80 tokens")] {
        for error in [results[at].as_ref().err(), embedded[at].as_ref().err()] {
            let error = error.expect("it is refused");
            assert_eq!(error.kind(), ErrorKind::BadParams);
            assert!(error.to_string().contains(words), "{error}");
        }
    }
    let pair = expected.pairs.iter().find(|pair| pair.image == 0 && pair.text == texts[1]).unwrap();
    assert!(difference([(&results[1].as_ref().unwrap().logits[..], &pair.itm[..])]) < TOLERANCE);
    assert!(embedded[1].is_ok());
    assert!(matcher.judge(&[]).unwrap().is_empty());
}

#[test]
fn a_filter_embeds_as_its_model_does() {
    let (expected, images) = expected("widths");
    let mut filter: Box<dyn blipstream::caption::Filter> = Box::new(matcher("widths", Backend::Native(None)));
    let encoded = filter.encode(&images).unwrap();
    let of_images: Vec<_> = encoded.iter().map(|image| filter.image_embedding(image).unwrap()).collect();
    let texts: Vec<&str> = expected.texts.iter().map(String::as_str).collect();
    let of_texts: Vec<_> = filter.text_embeddings(&texts).unwrap().into_iter().map(Result::unwrap).collect();
    for (found, expected) in [(of_images, expected.image_embeddings), (of_texts, expected.text_embeddings)] {
        assert_eq!(found.len(), expected.len());
        assert!(difference(found.iter().map(Vec::as_slice).zip(expected.iter().map(Vec::as_slice))) < TOLERANCE);
    }
}

#[test]
fn a_model_of_another_kind_is_told_by_its_name() {
    let captioner = ModelSource::Dir(crate::fixture::directory("depths"));
    let error = load_matcher(&LoadOptions { device: DeviceSpec::Cpu, ..LoadOptions::new(captioner) }).err().unwrap();
    assert!(error.to_string().contains("BlipForConditionalGeneration, a model that writes captions"), "{error}");
    let error = load_model(&options("depths", DtypeSpec::F32, Backend::Candle)).err().unwrap();
    assert!(error.to_string().contains("one that writes captions is BlipForConditionalGeneration"), "{error}");
}
