//! Captions equal the reference implementation's: token for token in f32, whatever the batch, from every layout in
//! which models are published.
//!
//! The fixtures, and the reference's results for them, are written by `tests/reference/make_fixtures.py`. Run with
//! `-- --nocapture` to see the largest differences.

mod batching;
mod fixture;
mod hub;
mod layouts;
mod oracle;
mod precision;

use blipstream::caption::{Finish, caption};
use fixture::{Fixture, TOLERANCE, report};

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

#[test]
fn the_fixtures_can_tell_right_from_wrong() {
    for fixture in Fixture::all() {
        let free: Vec<_> = fixture.captions.iter().filter(|c| c.is_free()).collect();
        assert_eq!(free.len(), fixture.images.len());
        let different = free.iter().filter(|a| free.iter().filter(|b| a.token_ids == b.token_ids).count() == 1).count();
        assert!(different * 2 > free.len(), "{}: captions do not depend on the image", fixture.name);
        for finish in [Finish::Stop, Finish::Length] {
            assert!(fixture.captions.iter().any(|c| c.finish == finish), "{}: none ends by {finish:?}", fixture.name);
        }
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
