//! Reduced precisions run, and stay as near to the reference as their mantissas allow.

use blipstream::caption::{Backend, BlipEngine, DtypeSpec, caption};

use crate::fixture::{Fixture, largest_difference, load_from, load_if_here, report};

/// How far scores may be off, as a share of the spread of the scores; and how many first tokens may differ of all.
///
/// The weights of the fixtures are scaled to make differences show, some ten times as much as trained weights would.
struct Allowance {
    dtype: DtypeSpec,
    backend: Backend,
    scores: f32,
    first_tokens: f32,
}

const ALLOWANCES: [Allowance; 4] = [
    Allowance { dtype: DtypeSpec::Bf16, backend: Backend::Native(None), scores: 0.10, first_tokens: 0.2 },
    Allowance { dtype: DtypeSpec::F16, backend: Backend::Candle, scores: 0.02, first_tokens: 0.1 },
    Allowance { dtype: DtypeSpec::Bf16, backend: Backend::OneDnn, scores: 0.10, first_tokens: 0.2 },
    Allowance { dtype: DtypeSpec::Int8, backend: Backend::OneDnn, scores: 0.15, first_tokens: 0.2 },
];

#[test]
fn reduced_precisions_stay_near_the_reference() {
    for Allowance { dtype, backend, scores, first_tokens } in ALLOWANCES {
        let (mut captions, mut equal, mut first) = (0, 0, 0);
        for fixture in Fixture::all() {
            let Some(model) = load_if_here(&fixture.directory(), dtype, backend) else { continue };
            assert_eq!(model.info().dtype, dtype.to_string());
            for (image, (ids, expected)) in fixture.forced.iter().enumerate() {
                let logits = model.logits(&fixture.images[image], ids).unwrap();
                let error = largest_difference(&logits, expected) / spread(expected);
                report(&format!(
                    "{} in {dtype} on {backend}: logits of image {image} off by {error:.4} of their spread",
                    fixture.name
                ));
                assert!(error < scores);
            }
            let mut engine = BlipEngine::new(model);
            let ours = caption(&mut engine, &fixture.items()).unwrap();
            for (expected, ours) in fixture.captions.iter().zip(ours) {
                let ours = ours.unwrap().token_ids;
                captions += 1;
                equal += usize::from(ours == expected.token_ids);
                first += usize::from(ours[0] == expected.token_ids[0]);
            }
        }
        report(&format!("{dtype} on {backend}: {equal} of {captions} captions equal, {first} first tokens"));
        assert!((captions - first) as f32 <= first_tokens * captions as f32);
    }
}

#[test]
fn half_precisions_do_not_depend_on_the_batch_size_for_their_lengths_and_order() {
    let fixture = Fixture::read("depths");
    let mut engine = BlipEngine::new(load_from(&fixture.directory(), DtypeSpec::Bf16));
    let together = caption(&mut engine, &fixture.items()).unwrap();
    assert_eq!(together.len(), fixture.captions.len());
    for (expected, ours) in fixture.captions.iter().zip(together) {
        let ours = ours.unwrap();
        assert!((expected.min_new_tokens..=expected.max_new_tokens).contains(&ours.tokens));
        assert!(ours.logprob.is_finite() && ours.logprob < 0.0);
    }
}

fn spread(scores: &[Vec<f32>]) -> f32 {
    let values = || scores.iter().flatten().copied();
    values().fold(f32::NEG_INFINITY, f32::max) - values().fold(f32::INFINITY, f32::min)
}
