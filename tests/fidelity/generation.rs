//! Beams, penalties and samples are the reference's: the same tokens, and drawn by the same probabilities, whatever else
//! is captioned at the time.
//!
//! What the reference gives is written by `tests/reference/make_generation.py`.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use blipstream::caption::{
    Backend, BeamSearch, BlipEngine, Caption, DtypeSpec, Engine, Model, Params, Pixels, RowId, Sampling, Strategy,
    caption, number,
};
use serde::Deserialize;

use crate::fixture::{Fixture, TOLERANCE, load_if_here, load_on, report};

/// Draws from each distribution.
const DRAWS: usize = 20_000;
/// Of a chance of one in a thousand, in standard deviations.
const RARE: f64 = 3.09;

#[derive(Deserialize)]
struct Expected {
    searches: Vec<Search>,
    samplings: Vec<Distribution>,
}

#[derive(Deserialize)]
struct Search {
    image: usize,
    prompt: Option<String>,
    max_new_tokens: usize,
    min_new_tokens: usize,
    num_beams: usize,
    length_penalty: f32,
    repetition_penalty: f32,
    /// Of each caption, best first.
    token_ids: Vec<Vec<u32>>,
}

#[derive(Deserialize)]
struct Distribution {
    image: usize,
    temperature: f32,
    top_k: usize,
    top_p: f32,
    repetition_penalty: f32,
    /// The likelier captions of at most two tokens.
    captions: Vec<Probable>,
}

#[derive(Deserialize)]
struct Probable {
    token_ids: Vec<u32>,
    probability: f64,
}

fn expected(fixture: &Fixture) -> Expected {
    serde_json::from_slice(&std::fs::read(fixture.directory().join("generation.json")).unwrap()).unwrap()
}

impl Search {
    fn params(&self) -> Params {
        let search = BeamSearch { beams: self.num_beams, length_penalty: number(self.length_penalty) };
        Params {
            prompt: self.prompt.clone(),
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            repetition_penalty: number(self.repetition_penalty),
            strategy: if self.num_beams > 1 { Strategy::Beam(search) } else { Strategy::Greedy },
            captions: self.token_ids.len(),
        }
    }

    fn check(&self, caption: &Caption) {
        assert_eq!(all_tokens(caption), self.token_ids, "image {} with {:?}", self.image, self.params());
    }
}

/// The logarithm of the probability of a caption without a prompt, by the scores after each of its tokens.
fn logprob(fixture: &Fixture, model: &Model, image: usize, token_ids: &[u32]) -> f32 {
    let begin = fixture.captions[0].sequence[0];
    let before: Vec<u32> = [begin].iter().chain(&token_ids[..token_ids.len() - 1]).copied().collect();
    let scores = model.logits(&fixture.images[image], &before).unwrap();
    let of_token = |(scores, token): (&Vec<f32>, &u32)| {
        let sum: f64 = scores.iter().map(|score| f64::from(*score).exp()).sum();
        scores[*token as usize] - sum.ln() as f32
    };
    scores.iter().zip(token_ids).map(of_token).sum()
}

impl Distribution {
    fn params(&self, seed: u64, captions: usize) -> Params {
        Params {
            max_new_tokens: 2,
            repetition_penalty: number(self.repetition_penalty),
            strategy: Strategy::Sample(Sampling {
                temperature: number(self.temperature),
                top_k: self.top_k,
                top_p: number(self.top_p),
                seed,
            }),
            captions,
            ..Params::default()
        }
    }

    /// The statistic of the chi-squared test of so many draws, over what is rare by chance: above 1 they are of another
    /// distribution.
    fn misfit(&self, counts: &HashMap<Vec<u32>, usize>) -> f64 {
        let (mut statistic, mut cells, mut listed, mut drawn) = (0.0, 0, 0.0, 0);
        let mut cell = |probability: f64, count: usize| {
            let expected = probability * DRAWS as f64;
            statistic += (count as f64 - expected).powi(2) / expected;
            cells += 1;
        };
        for Probable { token_ids, probability } in &self.captions {
            let count = counts.get(token_ids).copied().unwrap_or(0);
            cell(*probability, count);
            listed += probability;
            drawn += count;
        }
        let rest = 1.0 - listed;
        if rest * DRAWS as f64 >= 5.0 {
            cell(rest, DRAWS - drawn);
        } else if (DRAWS - drawn) as f64 > rest * DRAWS as f64 + 15.0 {
            // What is improbable was drawn.
            return f64::INFINITY;
        }
        // Wilson and Hilferty 1931.
        let freedom = f64::from(cells - 1);
        let spread = 2.0 / (9.0 * freedom);
        statistic / (freedom * (1.0 - spread + RARE * spread.sqrt()).powi(3))
    }
}

fn all_tokens(caption: &Caption) -> Vec<Vec<u32>> {
    [caption].into_iter().chain(&caption.more).map(|one| one.token_ids.clone()).collect()
}

#[test]
fn beams_and_penalties_find_what_the_reference_finds_on_every_backend() {
    for fixture in Fixture::all() {
        let searches = expected(&fixture).searches;
        for backend in [Backend::Native(None), Backend::Candle, Backend::Fused] {
            let model = load_on(&fixture.directory(), DtypeSpec::F32, backend).unwrap();
            let mut engine = BlipEngine::new(model.clone());
            for search in &searches {
                let item = (fixture.images[search.image].clone(), search.params());
                let found = caption(&mut engine, &[item]).unwrap().remove(0).unwrap();
                search.check(&found);
                for one in [&found].into_iter().chain(&found.more).filter(|_| search.prompt.is_none()) {
                    let expected = logprob(&fixture, &model, search.image, &one.token_ids);
                    assert!((one.logprob - expected).abs() < TOLERANCE, "{} and {expected}", one.logprob);
                    assert_eq!(one.tokens, one.token_ids.len());
                }
            }
        }
        let count = searches.iter().map(|search| search.token_ids.len()).sum::<usize>();
        report(&format!("{}: {count} captions of {} searches are equal", fixture.name, searches.len()));
    }
}

/// Has rows of all ways join and leave one after the other, in an order in which neighbours differ, and tells the captions of
/// each by its place in `all`.
fn in_company<T>(
    engine: &mut BlipEngine,
    fixture: &Fixture,
    all: &[(usize, Params, T)],
    mut told: impl FnMut(usize, Caption),
) {
    let encoded = engine.encode(&fixture.images).unwrap();
    let mut waiting = (0..all.len()).map(|at| at * 31 % all.len());
    let mut running: HashMap<RowId, usize> = HashMap::new();
    let (mut widest, mut left) = (0, all.len());
    for step in 0.. {
        if step % 5 != 4
            && let Some(at) = waiting.next()
        {
            let (image, params, _) = &all[at];
            running.insert(engine.admit(&encoded[*image], params).unwrap(), at);
        }
        for (row, caption) in engine.step().unwrap() {
            told(running.remove(&row).expect("an unknown row finished"), caption);
            left -= 1;
        }
        widest = widest.max(engine.active());
        assert_eq!(engine.active(), running.len());
        if left == 0 {
            break;
        }
    }
    assert!(widest > 5, "the rows hardly overlapped");
}

/// Greedy captions, penalties, beams of several widths and samples, with and without prompts.
#[test]
fn a_batch_of_all_ways_in_which_rows_join_and_leave_changes_no_caption() {
    for fixture in Fixture::all() {
        let Expected { searches, samplings } = expected(&fixture);
        for backend in [Backend::Native(None), Backend::Candle, Backend::Fused] {
            let mut engine = BlipEngine::new(load_on(&fixture.directory(), DtypeSpec::F32, backend).unwrap());
            let drawn = samplings.iter().map(|sampling| {
                let params = Params { max_new_tokens: 9, ..sampling.params(5, 3) };
                let item = (fixture.images[sampling.image].clone(), params);
                let alone = caption(&mut engine, std::slice::from_ref(&item)).unwrap().remove(0).unwrap();
                (sampling.image, item.1, all_tokens(&alone))
            });
            let drawn: Vec<_> = drawn.collect();
            let searched = searches.iter().map(|search| (search.image, search.params(), search.token_ids.clone()));
            let plain = fixture.captions.iter().map(|one| (one.image, one.params(), vec![one.token_ids.clone()]));
            let all: Vec<_> = searched.chain(drawn).chain(plain).collect();
            in_company(&mut engine, &fixture, &all, |at, caption| {
                let (image, params, tokens) = &all[at];
                assert_eq!(&all_tokens(&caption), tokens, "{} on {backend}: {image}, {params:?}", fixture.name);
            });
        }
    }
}

/// What bf16 rounds may depend on how many rows are multiplied together.
#[test]
fn in_bf16_the_company_of_other_rows_changes_hardly_a_caption() {
    for backend in [Backend::Native(None), Backend::Candle, Backend::OneDnn] {
        let mut kinds: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for fixture in Fixture::all() {
            let Some(model) = load_if_here(&fixture.directory(), DtypeSpec::Bf16, backend) else { continue };
            let Expected { searches, samplings } = expected(&fixture);
            let drawn = samplings.iter().map(|sampling| {
                let params = Params { max_new_tokens: 9, ..sampling.params(5, 3) };
                (sampling.image, params)
            });
            let searched = searches.iter().map(|search| (search.image, search.params()));
            let plain = fixture.captions.iter().map(|one| (one.image, one.params()));
            let mut engine = BlipEngine::new(model);
            let alone = |(image, params): (usize, Params)| {
                let item = (fixture.images[image].clone(), params);
                let tokens = all_tokens(&caption(&mut engine, std::slice::from_ref(&item)).unwrap().remove(0).unwrap());
                (image, item.1, tokens)
            };
            let all: Vec<_> = searched.chain(drawn).chain(plain).map(alone).collect();
            assert_ne!(all.len() % 31, 0, "every 31st would be the same again and again");
            in_company(&mut engine, &fixture, &all, |at, caption| {
                let (_, params, alone) = &all[at];
                let kind = match params.strategy {
                    Strategy::Greedy => "greedy",
                    Strategy::Beam(_) => "beams",
                    Strategy::Sample(_) => "samples",
                };
                let (flips, captions) = kinds.entry(kind).or_default();
                *flips += all_tokens(&caption).iter().zip(alone).filter(|(together, alone)| together != alone).count();
                *captions += alone.len();
            });
        }
        for (kind, (flips, captions)) in kinds {
            report(&format!("bf16 on {backend}, {kind}: {flips} of {captions} captions flip in company"));
            assert!(captions > 20 && flips * 100 <= captions, "{kind} on {backend}");
        }
    }
}

#[test]
fn samples_are_drawn_by_the_probabilities_of_the_reference() {
    for fixture in Fixture::all() {
        let mut engine = fixture.engine();
        let samplings = expected(&fixture).samplings;
        for (index, sampling) in samplings.iter().enumerate() {
            let counts = draw(&mut engine, &fixture.images[sampling.image], sampling);
            let misfit = sampling.misfit(&counts);
            let Distribution { temperature, top_k, top_p, .. } = sampling;
            report(&format!(
                "{}: temperature {temperature}, top_k {top_k}, top_p {top_p}: {DRAWS} draws, {} captions, {misfit:.2} of \
                 what one in a thousand goes beyond",
                fixture.name,
                counts.len()
            ));
            assert!(misfit < 1.0, "{misfit}");
            // The same draws as of another distribution.
            let other = &samplings[(index + 1) % samplings.len()];
            assert!(other.misfit(&counts) > 2.0, "the test cannot tell one distribution from another");
        }
    }
}

/// How often each caption was drawn.
fn draw(engine: &mut BlipEngine, image: &Pixels, sampling: &Distribution) -> HashMap<Vec<u32>, usize> {
    let (rows, captions) = (20, 50);
    let encoded = engine.encode(std::slice::from_ref(image)).unwrap().remove(0);
    let mut counts = HashMap::new();
    for batch in 0..DRAWS / (rows * captions) {
        for row in 0..rows {
            engine.admit(&encoded, &sampling.params((batch * rows + row) as u64, captions)).unwrap();
        }
        while engine.active() > 0 {
            for (_, caption) in engine.step().unwrap() {
                for tokens in all_tokens(&caption) {
                    *counts.entry(tokens).or_default() += 1;
                }
            }
        }
    }
    assert_eq!(counts.values().sum::<usize>(), DRAWS);
    counts
}

#[test]
fn equal_seeds_draw_equal_captions_and_more_of_them_change_none_before() {
    let fixture = Fixture::read("widths");
    let mut engine = fixture.engine();
    let sampling = &expected(&fixture).samplings[1];
    let mut drawn = |seed: u64, captions: usize| {
        let params = Params { max_new_tokens: 12, ..sampling.params(seed, captions) };
        let caption = caption(&mut engine, &[(fixture.images[0].clone(), params)]).unwrap().remove(0).unwrap();
        all_tokens(&caption)
    };
    let five = drawn(1, 5);
    assert_eq!(five, drawn(1, 5));
    assert_eq!(five[..1], drawn(1, 1));
    assert_eq!(five[..3], drawn(1, 3));
    assert_ne!(five, drawn(2, 5));
    assert_eq!(five.iter().collect::<BTreeSet<_>>().len(), 5, "{five:?}");
}
