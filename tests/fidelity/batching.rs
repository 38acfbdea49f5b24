//! A caption does not depend on what else is captioned at the time.

use std::collections::HashMap;

use blipstream::caption::{BeamSearch, Engine, ErrorKind, Params, RowId, Sampling, Strategy, caption, number};

use crate::fixture::{Fixture, report};

#[test]
fn a_batch_in_any_order_gives_what_single_images_give() {
    for fixture in Fixture::all() {
        let items = fixture.items();
        let count = items.len();
        let mut engine = fixture.engine();
        // Every order here mixes prompts and lengths; the last is a stride through the list.
        let orders: [Vec<usize>; 3] =
            [(0..count).collect(), (0..count).rev().collect(), (0..count).map(|index| index * 7 % count).collect()];
        for order in orders {
            let batch: Vec<_> = order.iter().map(|&index| items[index].clone()).collect();
            let captions = caption(&mut engine, &batch).unwrap();
            for (index, caption) in order.into_iter().zip(captions) {
                fixture.captions[index].check(&caption.unwrap());
            }
            assert_eq!(engine.active(), 0);
        }
        report(&format!("{}: a batch of {count} equals {count} batches of 1 in three orders", fixture.name));
    }
}

#[test]
fn rows_that_join_and_leave_midway_change_no_caption() {
    for fixture in Fixture::all() {
        let mut engine = fixture.engine();
        let encoded = engine.encode(&fixture.images).unwrap();
        let mut waiting = fixture.captions.iter();
        let mut running: HashMap<RowId, &crate::fixture::Expected> = HashMap::new();
        let (mut done, mut widest) = (0, 0);
        for step in 0.. {
            // One row joins at every other step, so that rows of all ages run together.
            if step % 2 == 0
                && let Some(expected) = waiting.next()
            {
                let row = engine.admit(&encoded[expected.image], &expected.params()).unwrap();
                running.insert(row, expected);
            }
            for (row, caption) in engine.step().unwrap() {
                running.remove(&row).expect("an unknown row finished").check(&caption);
                done += 1;
            }
            widest = widest.max(engine.active());
            assert_eq!(engine.active(), running.len());
            if running.is_empty() && waiting.len() == 0 {
                break;
            }
        }
        assert_eq!(done, fixture.captions.len());
        assert!(widest > 3, "the rows hardly overlapped");
    }
}

#[test]
fn one_encoding_serves_several_rows() {
    let fixture = Fixture::read("widths");
    let mut engine = fixture.engine();
    let encoded = engine.encode(&fixture.images[..1]).unwrap().remove(0);
    let wanted: Vec<_> = fixture.captions.iter().filter(|expected| expected.image == 0).collect();
    let rows: Vec<_> = wanted.iter().map(|expected| engine.admit(&encoded, &expected.params()).unwrap()).collect();
    drop(encoded);
    while engine.active() > 0 {
        for (row, caption) in engine.step().unwrap() {
            let index = rows.iter().position(|id| *id == row).unwrap();
            wanted[index].check(&caption);
        }
    }
}

fn beams(beams: usize, length_penalty: f32) -> Strategy {
    Strategy::Beam(BeamSearch { beams, length_penalty: number(length_penalty) })
}

fn sample(temperature: f32, top_p: f32) -> Strategy {
    Strategy::Sample(Sampling { temperature: number(temperature), top_k: 0, top_p: number(top_p), seed: 0 })
}

#[test]
fn a_row_with_bad_parameters_is_refused_alone() {
    let fixture = Fixture::read("depths");
    let mut engine = fixture.engine();
    let bad = [
        Params { prompt: Some("a dog ".repeat(30)), ..Params::default() },
        Params { max_new_tokens: 0, ..Params::default() },
        Params { max_new_tokens: 3, min_new_tokens: 4, ..Params::default() },
        Params { max_new_tokens: usize::MAX, ..Params::default() },
        Params { repetition_penalty: number(0.0), ..Params::default() },
        Params { captions: 2, ..Params::default() },
        Params { captions: 0, ..Params::default() },
        Params { strategy: beams(0, 1.0), ..Params::default() },
        Params { strategy: beams(2, f32::INFINITY), ..Params::default() },
        Params { strategy: beams(2, 1.0), captions: 3, ..Params::default() },
        Params { strategy: sample(-1.0, 1.0), ..Params::default() },
        Params { strategy: sample(1.0, 0.0), ..Params::default() },
    ];
    let mut items: Vec<_> = bad.into_iter().map(|params| (fixture.images[0].clone(), params)).collect();
    items.insert(2, (fixture.images[0].clone(), fixture.captions[0].params()));
    let captions = caption(&mut engine, &items).unwrap();
    for (index, caption) in captions.into_iter().enumerate() {
        match caption {
            Ok(caption) => fixture.captions[0].check(&caption),
            Err(error) => assert_eq!((error.kind(), index == 2), (ErrorKind::BadParams, false), "{error}"),
        }
    }
}

#[test]
fn an_empty_prompt_is_no_prompt() {
    let fixture = Fixture::read("depths");
    let params = Params { prompt: Some(" ".into()), ..Params::default() };
    let captions = caption(&mut fixture.engine(), &[(fixture.images[0].clone(), params)]).unwrap();
    fixture.captions[0].check(captions[0].as_ref().unwrap());
}

#[test]
fn an_image_of_another_size_or_engine_is_refused() {
    let (one, other) = (Fixture::read("depths"), Fixture::read("widths"));
    let mut engine = one.engine();
    assert_eq!(engine.encode(&other.images).err().unwrap().kind(), ErrorKind::BadInput);
    let mut fake = blipstream::caption::fake::FakeEngine::default();
    let pixels = blipstream::caption::Pixels::new(8, vec![0; 192]).unwrap();
    let foreign = fake.encode(&[pixels]).unwrap().remove(0);
    assert_eq!(engine.admit(&foreign, &Params::default()).err().unwrap().kind(), ErrorKind::BadInput);
}

#[test]
fn engines_on_several_threads_share_one_model() {
    let fixture = Fixture::read("proportions");
    let model = fixture.model();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            let mut engine = blipstream::caption::BlipEngine::new(model.clone());
            let fixture = &fixture;
            scope.spawn(move || {
                let captions = caption(&mut engine, &fixture.items()).unwrap();
                for (expected, caption) in fixture.captions.iter().zip(captions) {
                    expected.check(&caption.unwrap());
                }
            });
        }
    });
}

#[test]
fn a_cleared_engine_starts_afresh() {
    let fixture = Fixture::read("proportions");
    let mut engine = fixture.engine();
    let encoded = engine.encode(&fixture.images).unwrap();
    for image in &encoded {
        engine.admit(image, &Params::default()).unwrap();
    }
    engine.step().unwrap();
    assert!(engine.active() > 0);
    engine.clear();
    assert_eq!(engine.active(), 0);
    for (expected, caption) in fixture.captions.iter().zip(caption(&mut engine, &fixture.items()).unwrap()) {
        expected.check(&caption.unwrap());
    }
    let phases = engine.take_phases();
    assert_eq!(phases.images, fixture.images.len() + fixture.captions.len());
    assert!(phases.steps > 0 && phases.tokens > phases.steps);
}
