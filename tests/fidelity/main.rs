//! Captions equal the reference implementation's: token for token in f32, whatever the batch, from every layout in
//! which models are published.
//!
//! The fixtures, and the reference's results for them, are written by `tests/reference/make_fixtures.py`. Run with
//! `-- --nocapture` to see the largest differences.

mod answering;
mod backends;
mod batching;
mod filter;
mod fixture;
mod gate;
mod generation;
mod hub;
mod layouts;
mod matching;
mod oracle;
mod precision;
mod sharing;
#[path = "../support/turbo.rs"]
mod turbo;

use std::collections::BTreeSet;

use blipstream::caption::{Finish, caption};
use fixture::{Expected, Fixture, TOLERANCE, report};

#[test]
fn hidden_states_and_logits_equal_the_reference() {
    for fixture in Fixture::all() {
        let model = fixture.model();
        let hidden = model.hidden_states(&fixture.images).unwrap();
        let difference = fixture::largest_difference(&hidden, &fixture.hidden_states);
        report(&format!("{}: hidden states differ by at most {difference:.2e}", fixture.name));
        assert!(difference < TOLERANCE, "{}", fixture.name);
        for (image, (ids, expected)) in fixture.forced.iter().enumerate() {
            let logits = model.logits(&fixture.images[image], ids).unwrap();
            let difference = fixture::largest_difference(&logits, expected);
            report(&format!("{}: logits of image {image} differ by at most {difference:.2e}", fixture.name));
            assert!(difference < TOLERANCE, "{}", fixture.name);
        }
    }
}

#[test]
fn captions_equal_the_reference_token_for_token() {
    for fixture in Fixture::all() {
        let mut engine = fixture.engine();
        let (mut tokens, mut logprob) = (0, 0f32);
        for expected in &fixture.captions {
            let item = (fixture.images[expected.image].clone(), expected.params());
            let caption = caption(&mut engine, &[item]).unwrap().remove(0).unwrap();
            expected.check(&caption);
            tokens += caption.tokens;
            logprob = logprob.max((caption.logprob - expected.logprob).abs());
        }
        let count = fixture.captions.len();
        report(&format!(
            "{}: {count} captions of {tokens} tokens are equal, logprobs differ by at most {logprob:.2e}",
            fixture.name
        ));
    }
}

/// What `make_fixtures.py` asserts before it writes them, so that nobody can weaken them unseen.
#[test]
fn the_fixtures_can_tell_right_from_wrong() {
    for fixture in Fixture::all() {
        let name = fixture.name;
        let free: Vec<_> = fixture.captions.iter().filter(|c| c.is_free()).collect();
        let prompted: Vec<_> =
            fixture.captions.iter().filter(|c| c.prompt.is_some() && c.min_new_tokens == 0).collect();
        for group in [&free, &prompted] {
            assert_eq!(group.len(), fixture.images.len());
            let pairs = || group.iter().enumerate().flat_map(|(n, a)| group[n + 1..].iter().map(move |b| (a, b)));
            let different = pairs().filter(|(a, b)| a.token_ids != b.token_ids).count();
            report(&format!("{name}: {different} of {} pairs of images have different captions", pairs().count()));
            assert!(different * 100 >= pairs().count() * 80, "{name}: captions hardly depend on the image");
        }
        let lengths: BTreeSet<_> = free.iter().map(|c| c.token_ids.len()).collect();
        assert!(lengths.len() >= 3, "{name}: captions end at {lengths:?} tokens only");
        for finish in [Finish::Stop, Finish::Length] {
            assert!(fixture.captions.iter().any(|c| c.finish == finish), "{name}: none ends by {finish:?}");
        }
    }
}

/// How far the best token is ahead of the second best, at the closest choice of a caption.
fn smallest_margin(caption: &Expected, scores: &[Vec<f32>], end: usize) -> f32 {
    let prompt = caption.sequence.len() - caption.token_ids.len();
    let margin = |(step, &chosen): (usize, &u32)| {
        let scores = &scores[prompt + step - 1];
        let held_back = |token: usize| token == end && step < caption.min_new_tokens;
        let others = scores.iter().enumerate().filter(|&(token, _)| token != chosen as usize && !held_back(token));
        scores[chosen as usize] - others.map(|(_, score)| *score).fold(f32::NEG_INFINITY, f32::max)
    };
    caption.token_ids.iter().enumerate().map(margin).fold(f32::INFINITY, f32::min)
}

#[test]
fn no_choice_of_a_token_is_close() {
    for fixture in Fixture::all() {
        let (model, end) = (fixture.model(), 3);
        let (mut ours, mut theirs, mut apart) = (f32::INFINITY, f32::INFINITY, 0f32);
        for caption in &fixture.captions {
            let scores = model.logits(&fixture.images[caption.image], &caption.sequence).unwrap();
            ours = ours.min(smallest_margin(caption, &scores, end));
            // The reference's own scores are there for some captions; they tell how far ours may be off.
            if let Some((_, reference)) = fixture.forced.iter().find(|(ids, _)| *ids == caption.sequence) {
                theirs = theirs.min(smallest_margin(caption, reference, end));
                apart = apart.max(fixture::largest_difference(&scores, reference));
            }
        }
        let name = fixture.name;
        report(&format!("{name}: the closest choice has a margin of {ours:.4}, by scores that are {apart:.1e} apart"));
        assert!(theirs.is_finite(), "{name}: no caption has the reference's own scores");
        assert!(theirs.min(ours - 2.0 * apart) > 10.0 * TOLERANCE, "{name}: {ours} is too close to the tolerance");
    }
}

#[test]
fn lengths_that_a_caller_asks_for_are_kept() {
    for fixture in Fixture::all() {
        for expected in fixture.captions.iter().filter(|c| !c.is_free()) {
            let length = expected.token_ids.len();
            assert!((expected.min_new_tokens..=expected.max_new_tokens).contains(&length));
        }
        let held_back = fixture.captions.iter().filter(|c| c.min_new_tokens > 0).count();
        let cut_short = fixture.captions.iter().filter(|c| c.max_new_tokens < 20).count();
        assert!(held_back > 1 && cut_short > 1, "{}", fixture.name);
    }
}

#[test]
fn a_model_knows_its_size() {
    for fixture in Fixture::all() {
        let model = fixture.model();
        let info = model.info();
        assert_eq!(info.parameters, fixture.parameters, "{}", fixture.name);
        assert_eq!(info.image_size, fixture.images[0].size());
        assert_eq!((info.dtype.as_str(), info.device.as_str()), ("f32", "cpu"));
    }
}
