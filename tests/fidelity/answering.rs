//! Questions about images are answered as by the reference, whatever they are asked with.
//!
//! The models, and the reference's answers, are written by `tests/reference/make_answering.py`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blipstream::caption::{
    Answerer, Backend, BeamSearch, Caption, DeviceSpec, DtypeSpec, Encoded, ErrorKind, LoadOptions, ModelSource,
    Params, Pixels, Sampling, Strategy, load_answerer, load_matcher, load_model, number,
};
use serde::Deserialize;

use crate::fixture::{self, TOLERANCE, report};

const MODELS: [&str; 3] = ["proportions", "widths", "depths"];
const BACKENDS: [Backend; 3] = [Backend::Native(None), Backend::Candle, Backend::Fused];

#[derive(Deserialize)]
struct Expected {
    parameters: u64,
    answers: Vec<Asked>,
}

#[derive(Deserialize)]
struct Asked {
    image: usize,
    question: String,
    max_new_tokens: usize,
    min_new_tokens: usize,
    num_beams: usize,
    length_penalty: f32,
    repetition_penalty: f32,
    /// Best first.
    answers: Vec<Answer>,
}

#[derive(Deserialize)]
struct Answer {
    token_ids: Vec<u32>,
    text: String,
    logprob: f32,
}

impl Asked {
    fn params(&self) -> Params {
        let search = BeamSearch { beams: self.num_beams, length_penalty: number(self.length_penalty) };
        Params {
            prompt: None,
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            repetition_penalty: number(self.repetition_penalty),
            strategy: if self.num_beams > 1 { Strategy::Beam(search) } else { Strategy::Greedy },
            captions: self.answers.len(),
        }
    }

    /// How far the logarithms of probabilities are off.
    fn check(&self, found: &Caption) -> f32 {
        let tokens: Vec<_> = found.all().map(|one| &one.token_ids).collect();
        let expected: Vec<_> = self.answers.iter().map(|answer| &answer.token_ids).collect();
        assert_eq!(tokens, expected, "image {}, {:?} with {:?}", self.image, self.question, self.params());
        let differences = found.all().zip(&self.answers).map(|(found, answer)| {
            assert_eq!(found.text, answer.text);
            (found.logprob - answer.logprob).abs()
        });
        differences.fold(0.0, f32::max)
    }
}

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/answering").join(name)
}

fn options(directory: PathBuf, dtype: DtypeSpec, backend: Backend) -> LoadOptions {
    LoadOptions { device: DeviceSpec::Cpu, dtype, backend, ..LoadOptions::new(ModelSource::Dir(directory)) }
}

fn answerer(name: &str, dtype: DtypeSpec, backend: Backend) -> Arc<Answerer> {
    load_answerer(&options(directory(name), dtype, backend)).unwrap()
}

fn expected(name: &str) -> (Expected, Vec<Pixels>) {
    fixture::expected(&directory(name))
}

fn ask<'a>(answerer: &Answerer, images: &[Encoded], asked: impl IntoIterator<Item = &'a Asked>) -> Vec<Caption> {
    let asked = asked.into_iter().map(|one| (&images[one.image], one.question.as_str(), one.params()));
    answerer.answer(&asked.collect::<Vec<_>>()).unwrap().into_iter().map(Result::unwrap).collect()
}

#[test]
fn answers_equal_the_reference_token_for_token_alone_and_in_batches_of_any_order() {
    for name in MODELS {
        let (expected, images) = expected(name);
        let asked = &expected.answers;
        for backend in BACKENDS {
            let answerer = answerer(name, DtypeSpec::F32, backend);
            assert_eq!(answerer.info().parameters, expected.parameters, "{name}");
            let encoded = answerer.encode(&images).unwrap();
            let mut most = 0f32;
            for one in asked {
                let image = answerer.encode(&images[one.image..=one.image]).unwrap().remove(0);
                let alone = answerer.answer(&[(&image, &one.question, one.params())]).unwrap().remove(0).unwrap();
                most = most.max(one.check(&alone));
            }
            // Every order mixes images, lengths and searches; 5 and 31 are no divisors of any of the counts.
            for stride in [1, 5, 31] {
                let order = || (0..asked.len()).map(|at| &asked[at * stride % asked.len()]);
                assert_eq!(order().map(std::ptr::from_ref).collect::<BTreeSet<_>>().len(), asked.len());
                for (one, together) in order().zip(ask(&answerer, &encoded, order())) {
                    most = most.max(one.check(&together));
                }
            }
            report(&format!(
                "{name} on {backend}: {} answers to {} questions are equal alone and in batches, logprobs differ by at most \
                 {most:.1e}",
                asked.iter().map(|one| one.answers.len()).sum::<usize>(),
                asked.len()
            ));
            assert!(most < TOLERANCE, "{name} on {backend}");
        }
    }
}

/// What `make_answering.py` asserts before it writes them, so that nobody can weaken them unseen.
#[test]
fn the_fixtures_can_tell_right_from_wrong() {
    for name in MODELS {
        let (Expected { answers, .. }, images) = expected(name);
        let plain: Vec<_> = answers.iter().filter(|one| one.params().strategy == Strategy::Greedy).collect();
        let pairs = |same: fn(&Asked, &Asked) -> bool| {
            let pairs = plain.iter().enumerate().flat_map(|(at, a)| plain[at + 1..].iter().map(move |b| (a, b)));
            let (mut all, mut different) = (0, 0);
            for (a, b) in pairs.filter(|(a, b)| a.min_new_tokens == b.min_new_tokens && same(a, b)) {
                all += 1;
                different += usize::from(a.answers[0].token_ids != b.answers[0].token_ids);
            }
            (different, all)
        };
        let (by_question, of_image) = pairs(|a, b| a.image == b.image);
        let (by_image, of_question) = pairs(|a, b| a.question == b.question);
        report(&format!(
            "{name}: {by_question} of {of_image} pairs of questions to an image have different answers, and {by_image} of \
             {of_question} pairs of images"
        ));
        assert!(by_question * 100 >= of_image * 70 && by_image * 100 >= of_question * 40, "{name}");
        let lengths: BTreeSet<_> = plain.iter().map(|one| one.answers[0].token_ids.len()).collect();
        assert!(lengths.len() >= 4, "{name}: {lengths:?}");
        assert!(answers.len() >= 40 && images.len() >= 4);
        let beams: Vec<_> = answers.iter().filter(|one| one.num_beams == 3).collect();
        assert!(beams.len() >= 12 && beams.iter().any(|one| one.answers.len() == 3), "{name}");
    }
}

#[test]
fn reduced_precisions_give_most_answers_of_f32() {
    for (dtype, backend) in [
        (DtypeSpec::Bf16, Backend::Native(None)),
        (DtypeSpec::Bf16, Backend::Candle),
        (DtypeSpec::F16, Backend::Candle),
    ] {
        let (mut answers, mut flips, mut first) = (0, 0, 0);
        for name in MODELS {
            let (expected, images) = expected(name);
            let answerer = answerer(name, dtype, backend);
            assert_eq!(answerer.info().dtype, dtype.to_string());
            let encoded = answerer.encode(&images).unwrap();
            let found = ask(&answerer, &encoded, &expected.answers);
            for (asked, found) in expected.answers.iter().zip(found).filter(|(asked, _)| asked.num_beams == 1) {
                let expected = &asked.answers[0].token_ids;
                assert!(found.logprob.is_finite() && found.logprob < 0.0);
                assert!((asked.min_new_tokens..=asked.max_new_tokens).contains(&found.tokens));
                answers += 1;
                flips += usize::from(&found.token_ids != expected);
                first += usize::from(found.token_ids[0] != expected[0]);
            }
        }
        report(&format!(
            "{dtype} on {backend}: {flips} of {answers} answers flip, {first} of them with the first token"
        ));
        let allowed = if dtype == DtypeSpec::F16 { [10, 5] } else { [40, 15] };
        assert!(flips * 100 <= allowed[0] * answers && first * 100 <= allowed[1] * answers, "{dtype} on {backend}");
    }
}

/// What bf16 rounds may depend on how many rows are multiplied together.
#[test]
fn in_bf16_the_company_of_other_questions_changes_hardly_an_answer() {
    for backend in [Backend::Native(None), Backend::Candle] {
        let (mut answers, mut flips) = (0, 0);
        for name in MODELS {
            let (expected, images) = expected(name);
            let answerer = answerer(name, DtypeSpec::Bf16, backend);
            let encoded = answerer.encode(&images).unwrap();
            let together = ask(&answerer, &encoded, &expected.answers);
            for (one, together) in expected.answers.iter().zip(together) {
                let image = answerer.encode(&images[one.image..=one.image]).unwrap().remove(0);
                let alone = answerer.answer(&[(&image, &one.question, one.params())]).unwrap().remove(0).unwrap();
                let both = alone.all().zip(together.all());
                flips += both.filter(|(alone, together)| alone.token_ids != together.token_ids).count();
                answers += one.answers.len();
            }
        }
        report(&format!("bf16 on {backend}: {flips} of {answers} answers flip in company"));
        assert!(answers > 200 && flips * 100 <= answers, "{backend}");
    }
}

#[test]
fn samples_are_drawn_by_their_seed_whatever_is_asked_at_the_time() {
    let (expected, images) = expected("proportions");
    for backend in BACKENDS {
        let answerer = answerer("proportions", DtypeSpec::F32, backend);
        let encoded = answerer.encode(&images).unwrap();
        let sample = |seed: u64| Params {
            strategy: Strategy::Sample(Sampling { temperature: number(1.5), top_k: 0, top_p: number(1.0), seed }),
            captions: 4,
            max_new_tokens: 6,
            ..Params::default()
        };
        let asked: Vec<_> = expected.answers.iter().step_by(3).collect();
        // More of them than are written at a time.
        let all: Vec<_> = asked
            .iter()
            .zip(0..)
            .map(|(one, seed)| (&encoded[one.image], one.question.as_str(), sample(seed)))
            .collect();
        assert!(all.len() * 4 > 64);
        let tokens = |found: &Caption| found.all().map(|one| one.token_ids.clone()).collect::<Vec<_>>();
        let together: Vec<_> =
            answerer.answer(&all).unwrap().into_iter().map(|found| tokens(&found.unwrap())).collect();
        let mut different = 0;
        for (one, together) in all.iter().zip(&together) {
            let alone = answerer.answer(std::slice::from_ref(one)).unwrap().remove(0).unwrap();
            different += tokens(&alone).iter().zip(together).filter(|(alone, together)| alone != together).count();
        }
        // A draw that falls within the rounding of where one token's share ends and the next one's begins may go either way.
        report(&format!("{backend}: {different} of {} drawn answers differ alone", 4 * all.len()));
        assert!(different * 50 <= 4 * all.len(), "{backend}");
        assert!(together.iter().any(|answers| answers.iter().collect::<BTreeSet<_>>().len() == 4));
    }
}

#[test]
fn a_question_that_cannot_be_answered_is_refused_alone() {
    let (expected, images) = expected("depths");
    let one = &expected.answers[0];
    for backend in BACKENDS {
        let answerer = answerer("depths", DtypeSpec::F32, backend);
        let encoded = answerer.encode(&images).unwrap();
        let other = self::answerer("depths", DtypeSpec::F32, backend);
        let captioner = load_model(&options(crate::fixture::directory("depths"), DtypeSpec::F32, backend)).unwrap();
        let foreign = {
            use blipstream::caption::{BlipEngine, Engine};
            BlipEngine::new(captioner).encode(&images[..1]).unwrap().remove(0)
        };
        let (image, long) = (&encoded[one.image], "a dog ".repeat(40));
        let with = |params: Params| (image, one.question.as_str(), params);
        let asked = [
            (image, "", Params::default()),
            (image, " ?! ", Params::default()),
            (image, long.as_str(), Params::default()),
            with(one.params()),
            with(Params { max_new_tokens: 0, ..Params::default() }),
            with(Params { max_new_tokens: 40, ..Params::default() }),
            with(Params { captions: 2, ..Params::default() }),
            with(Params { prompt: Some("it is".into()), ..Params::default() }),
            (&foreign, one.question.as_str(), Params::default()),
        ];
        let results = answerer.answer(&asked).unwrap();
        let said =
            ["no words", "no words", "80 tokens", "", "max_new_tokens", "the model can see", "num_return", "prompt"];
        for (at, result) in results.iter().enumerate() {
            match result {
                Ok(answer) => assert!(at == 3 && one.check(answer) < TOLERANCE),
                Err(error) => {
                    let kind = if at == 8 { ErrorKind::BadInput } else { ErrorKind::BadParams };
                    assert_eq!(error.kind(), kind, "{error}");
                    assert!(error.to_string().contains(said.get(at).unwrap_or(&"another kind")), "{at}: {error}");
                }
            }
        }
        assert!(answerer.answer(&[]).unwrap().is_empty() && other.encode(&[]).unwrap().is_empty());
        let wrong = Pixels::new(8, vec![0; 192]).unwrap();
        assert_eq!(answerer.encode(&[wrong]).err().unwrap().kind(), ErrorKind::BadInput);
    }
}

#[test]
fn a_model_of_another_kind_is_told_by_its_name() {
    let of = |directory: PathBuf| options(directory, DtypeSpec::F32, Backend::Candle);
    let captioner = load_answerer(&of(crate::fixture::directory("depths"))).err().unwrap().to_string();
    assert!(captioner.contains("BlipForConditionalGeneration, a model that writes captions"), "{captioner}");
    assert!(captioner.contains("one that answers questions about images is BlipForQuestionAnswering"), "{captioner}");
    let told = [
        load_model(&of(directory("depths"))).err().unwrap().to_string(),
        load_matcher(&of(directory("depths"))).err().unwrap().to_string(),
    ];
    for told in told {
        assert!(told.contains("BlipForQuestionAnswering, a model that answers questions about images"), "{told}");
    }
}

#[test]
fn a_model_of_random_weights_answers() {
    let mut config = blipstream::caption::config::BlipConfig::base();
    config.vision.image_size = 32;
    (config.vision.num_hidden_layers, config.text.num_hidden_layers) = (1, 1);
    let source = ModelSource::Random { id: "random".into(), config, seed: 3 };
    let options = LoadOptions { device: DeviceSpec::Cpu, dtype: DtypeSpec::Bf16, ..LoadOptions::new(source) };
    let answerer = load_answerer(&options).unwrap();
    let image = answerer.encode(&[Pixels::new(32, vec![7; 32 * 32 * 3]).unwrap()]).unwrap().remove(0);
    let params = Params { max_new_tokens: 3, ..Params::default() };
    let answer = answerer.answer(&[(&image, "w5 w6", params)]).unwrap().remove(0).unwrap();
    assert!(answer.tokens >= 1 && answer.logprob.is_finite());
}
