//! An image that captioner, filter and answerer look at through equal image encoders is encoded once, and nothing that they
//! tell of it changes by that.

use std::collections::HashSet;
use std::sync::Arc;

use blipstream::caption::config::BlipConfig;
use blipstream::caption::{
    Answerer, Ask, Backend, BlipEngine, DeviceSpec, DtypeSpec, Encoders, Engine, ErrorKind, LoadOptions, Matcher,
    Model, ModelSource, Params, Pixels, Told, Viewer, load_answerer, load_matcher, load_model, tell,
};

use crate::fixture::{self, Fixture, report};

/// Random weights of small sizes; equal seeds give equal ones.
fn random(seed: u64, backend: Backend) -> LoadOptions {
    let mut config = BlipConfig::base();
    config.vision.hidden_size = 64;
    config.vision.intermediate_size = 128;
    config.vision.num_hidden_layers = 2;
    config.vision.num_attention_heads = 4;
    config.vision.image_size = 48;
    config.text.hidden_size = 64;
    config.text.intermediate_size = 128;
    config.text.num_hidden_layers = 2;
    config.text.num_attention_heads = 4;
    let source = ModelSource::Random { id: format!("random {seed}"), config, seed };
    LoadOptions { device: DeviceSpec::Cpu, dtype: DtypeSpec::F32, backend, ..LoadOptions::new(source) }
}

const BACKENDS: [Backend; 3] = [Backend::Native(None), Backend::Candle, Backend::Fused];

fn images(count: u64) -> Vec<Pixels> {
    (0..count).map(|seed| blipstream::caption::pictures::pixels(48, seed).unwrap()).collect()
}

/// Images with a caption, with a caption and texts that are judged, and with texts alone, in turn; every other one with
/// a question.
fn items() -> Vec<(Pixels, Ask)> {
    let caption = || Some(Params { max_new_tokens: 6, ..Params::default() });
    let texts = || vec!["7 8 9".to_owned(), "11".to_owned()];
    let ask = |at: usize| match at % 3 {
        0 => Ask { caption: caption(), texts: texts(), filter: true, ..Ask::default() },
        1 => Ask { caption: caption(), ..Ask::default() },
        _ => Ask { caption: None, texts: texts(), filter: true, ..Ask::default() },
    };
    let asking = |at: usize| match at % 2 {
        0 => Ask { questions: vec!["12 13".into()], answering: caption().unwrap(), ..ask(at) },
        _ => ask(at),
    };
    images(7).into_iter().enumerate().map(|(at, image)| (image, asking(at))).collect()
}

/// The scores of everything that was judged.
fn scores(told: &Told) -> Vec<f32> {
    let all = told.generated.iter().chain(&told.found).map(|judged| judged.as_ref().unwrap());
    all.flat_map(|judged| [judged.logits[0], judged.logits[1], judged.itc]).collect()
}

/// What these models tell of all images.
fn told(models: (Arc<Model>, Arc<Matcher>, Arc<Answerer>)) -> Vec<Told> {
    let (captioner, mut filter, mut answerer) = models;
    let mut captioner = BlipEngine::new(captioner);
    let told = tell(&mut captioner, Some(&mut filter), Some(&mut answerer), &items()).unwrap();
    told.into_iter().map(Result::unwrap).collect()
}

#[test]
fn a_shared_image_encoder_changes_nothing_that_is_told() {
    for backend in BACKENDS {
        let options = random(5, backend);
        let load = |encoders: &mut Encoders| {
            (
                encoders.load_model(&options).unwrap(),
                encoders.load_matcher(&options).unwrap(),
                encoders.load_answerer(&options).unwrap(),
            )
        };
        let alone = (load_model(&options).unwrap(), load_matcher(&options).unwrap(), load_answerer(&options).unwrap());
        let encoders = HashSet::from([alone.0.encoder(), alone.1.encoder(), alone.2.encoder()]);
        assert_eq!(encoders.len(), 3);
        let shared = load(&mut Encoders::default());
        assert_eq!([shared.1.encoder(), shared.2.encoder()], [shared.0.encoder(); 2]);

        let (expected, found) = (told(alone), told(shared));
        let mut most = 0f32;
        let mut differ = |found: &[f32], expected: &[f32]| {
            assert_eq!(found.len(), expected.len());
            most = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(most, f32::max);
        };
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found.caption, expected.caption);
            differ(&scores(found), &scores(expected));
            assert_eq!(found.answers.len(), expected.answers.len());
            for (found, expected) in found.answers.iter().zip(&expected.answers) {
                let (found, expected) = (found.as_ref().unwrap(), expected.as_ref().unwrap());
                assert_eq!(found.token_ids, expected.token_ids);
                differ(&[found.logprob], &[expected.logprob]);
            }
        }
        assert_eq!(found.iter().filter(|told| !told.answers.is_empty()).count(), 4);
        report(&format!("{backend}: scores differ by at most {most:.1e} where the image encoder is shared"));
        assert!(most < 1e-5, "{backend}: {most}");
    }
}

#[test]
fn what_was_seen_is_remembered_in_any_order_and_number() {
    for backend in BACKENDS {
        // A model whose captions differ from image to image.
        let fixture = Fixture::all().remove(0);
        let model = fixture::load_on(&fixture.directory(), DtypeSpec::F32, backend).unwrap();
        let images: Vec<_> = fixture.images.iter().cycle().take(5).cloned().collect();
        let mut captioner = BlipEngine::new(model).with_encode_size(3);
        let sights = captioner.see(&images).unwrap();
        let mut captions = |order: &[usize]| {
            let chosen: Vec<_> = order.iter().map(|at| sights[*at].clone()).collect();
            let encoded = captioner.remember(&chosen).unwrap();
            let rows: Vec<_> =
                encoded.iter().map(|image| captioner.admit(image, &Params::default()).unwrap()).collect();
            let mut captions = vec![Vec::new(); rows.len()];
            while captioner.active() > 0 {
                for (row, caption) in captioner.step().unwrap() {
                    captions[rows.iter().position(|other| *other == row).unwrap()] = caption.token_ids;
                }
            }
            captions
        };
        let all = captions(&[0, 1, 2, 3, 4]);
        assert!(all.iter().any(|caption| *caption != all[0]), "the images differ");
        for order in [&[4, 2, 0][..], &[1], &[3, 4, 0, 1, 2, 2]] {
            let expected: Vec<_> = order.iter().map(|at| all[*at].clone()).collect();
            assert_eq!(captions(order), expected, "{backend}: {order:?}");
        }
    }
}

#[test]
fn image_encoders_that_differ_in_anything_are_not_shared() {
    let mut encoders = Encoders::default();
    let first = encoders.load_model(&random(5, Backend::Candle)).unwrap();
    let [weights, kernels] = [random(6, Backend::Candle), random(5, Backend::Native(None))];
    let precision = LoadOptions { dtype: DtypeSpec::Bf16, ..random(5, Backend::Candle) };
    let mut others = [weights, kernels, precision].map(|options| encoders.load_matcher(&options).unwrap());
    for other in &mut others {
        assert_ne!(other.encoder(), first.encoder());
        let sights = BlipEngine::new(first.clone()).see(&images(1)).unwrap();
        let error = other.remember(&sights).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::BadInput);
        assert!(error.to_string().contains("another image encoder"), "{error}");
    }
    // One that no model has any more is no longer kept.
    let id = first.encoder();
    drop(first);
    assert_ne!(encoders.load_model(&random(5, Backend::Candle)).unwrap().encoder(), id);
}
