//! In f32 every backend says what the reference says, on whatever instructions the machine has.

use blipstream::caption::{Backend, BlipEngine, DtypeSpec, Isa, caption};

use crate::fixture::{Fixture, TOLERANCE, largest_difference, load_if_here, report};

fn backends() -> Vec<Backend> {
    let native = Isa::ALL.into_iter().map(|isa| Backend::Native(Some(isa)));
    native.chain([Backend::OneDnn, Backend::Candle]).collect()
}

#[test]
fn every_backend_equals_the_reference_token_for_token_in_f32() {
    for backend in backends() {
        for fixture in Fixture::all() {
            let Some(model) = load_if_here(&fixture.directory(), DtypeSpec::F32, backend) else { continue };
            let named = model.info().backend.clone();
            assert!(named.replace(' ', ":").starts_with(&backend.to_string()), "{named} is not {backend}");
            let hidden = model.hidden_states(&fixture.images).unwrap();
            let difference = largest_difference(&hidden, &fixture.hidden_states);
            report(&format!("{named}, {}: hidden states differ by at most {difference:.2e}", fixture.name));
            assert!(difference < TOLERANCE, "{named}, {}", fixture.name);
            let ours = caption(&mut BlipEngine::new(model), &fixture.items()).unwrap();
            assert_eq!(ours.len(), fixture.captions.len());
            for (expected, ours) in fixture.captions.iter().zip(ours) {
                expected.check(&ours.unwrap());
            }
        }
    }
}
