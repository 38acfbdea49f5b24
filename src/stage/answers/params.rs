//! From what a request asks for, and the defaults and limits of the fleet, to the parameters of its captions and answers.

use crate::caption::{BeamSearch, Number, Params, Sampling, Strategy};
use crate::message::{Request, RequestParams};
use crate::settings;

/// The parameters of the captions of a request for the picture of this SHA-256, in hex.
///
/// # Errors
/// They are over the fleet's limits or make no sense, in words for people.
pub(super) fn of_captions(model: &settings::Model, request: &Request, sha256: &str) -> Result<Params, String> {
    let prompt = request.prompt.clone().or_else(|| model.prompt.clone());
    Ok(Params { prompt, ..params(model, &request.params, sha256)? })
}

/// Those of its answers: one to each question, and no prompt.
///
/// # Errors
/// As of [`of_captions`].
pub(super) fn of_answers(model: &settings::Model, request: &Request, sha256: &str) -> Result<Params, String> {
    params(model, &RequestParams { num_return_sequences: None, ..request.params.clone() }, sha256)
}

/// Refuses parameters that no request may have.
///
/// # Errors
/// What is wrong with them, in words for people.
pub fn check_params(model: &settings::Model, params: &RequestParams) -> Result<(), String> {
    self::params(model, params, "").map(|_| ())
}

fn params(model: &settings::Model, asked: &RequestParams, sha256: &str) -> Result<Params, String> {
    let max_new_tokens = asked.max_new_tokens.unwrap_or(model.max_new_tokens);
    let min_new_tokens = asked.min_new_tokens.unwrap_or(model.min_new_tokens.min(max_new_tokens));
    within("max_new_tokens", max_new_tokens, model.max_new_tokens_limit, "model.max_new_tokens_limit")?;
    if min_new_tokens > max_new_tokens {
        return Err(format!(
            "params.min_new_tokens ({min_new_tokens}) is larger than max_new_tokens ({max_new_tokens})"
        ));
    }
    let strategy = strategy(model, asked, sha256)?;
    // A default that the request's own strategy cannot keep is none.
    let default = match strategy {
        Strategy::Greedy => 1,
        Strategy::Sample(_) => model.num_return_sequences,
        Strategy::Beam(search) => model.num_return_sequences.min(search.beams),
    };
    let captions = asked.num_return_sequences.unwrap_or(default);
    within("num_return_sequences", captions, model.sequences_limit, "model.sequences_limit")?;
    let repetition_penalty = asked.repetition_penalty.unwrap_or(model.repetition_penalty);
    let params = Params {
        prompt: None,
        max_new_tokens,
        min_new_tokens,
        repetition_penalty: number("repetition_penalty", repetition_penalty)?,
        strategy,
        captions,
    };
    // It begins with the name of what is wrong.
    params.check().map_err(|error| format!("params.{error}"))?;
    Ok(params)
}

fn strategy(model: &settings::Model, asked: &RequestParams, sha256: &str) -> Result<Strategy, String> {
    // Who asks for one way does not mean the fleet's other one.
    let sample = asked.do_sample.unwrap_or(model.do_sample && asked.num_beams.is_none_or(|beams| beams == 1));
    let beams = asked.num_beams.unwrap_or(if sample { 1 } else { model.num_beams });
    within("num_beams", beams, model.sequences_limit, "model.sequences_limit")?;
    if sample && beams > 1 {
        return Err(format!(
            "params.num_beams is {beams} beside do_sample: a caption is drawn, or searched with beams"
        ));
    }
    let without = |name: &str, what: &str| Err(format!("params.{name}: has no effect without {what}"));
    if beams == 1 && asked.length_penalty.is_some() {
        return without("length_penalty", "num_beams above 1");
    }
    if !sample && let Some(name) = of_sampling(asked) {
        return without(name, "do_sample");
    }
    Ok(if sample {
        Strategy::Sample(Sampling {
            temperature: number("temperature", asked.temperature.unwrap_or(model.temperature))?,
            top_k: asked.top_k.unwrap_or(model.top_k),
            top_p: number("top_p", asked.top_p.unwrap_or(model.top_p))?,
            seed: asked.seed.unwrap_or_else(|| seed_of(sha256)),
        })
    } else if beams > 1 {
        let length_penalty = asked.length_penalty.unwrap_or(model.length_penalty);
        Strategy::Beam(BeamSearch { beams, length_penalty: number("length_penalty", length_penalty)? })
    } else {
        Strategy::Greedy
    })
}

/// The name of a parameter that is there and means nothing unless tokens are drawn.
fn of_sampling(asked: &RequestParams) -> Option<&'static str> {
    let given = [
        ("temperature", asked.temperature.is_some()),
        ("top_k", asked.top_k.is_some()),
        ("top_p", asked.top_p.is_some()),
        ("seed", asked.seed.is_some()),
    ];
    given.into_iter().find_map(|(name, given)| given.then_some(name))
}

/// Where no seed is asked for, equal pictures get equal captions, and different ones are drawn independently.
fn seed_of(sha256: &str) -> u64 {
    sha256.get(..16).and_then(|start| u64::from_str_radix(start, 16).ok()).unwrap_or_default()
}

fn within(name: &str, value: usize, limit: usize, setting: &str) -> Result<(), String> {
    if (1..=limit).contains(&value) {
        return Ok(());
    }
    Err(format!("params.{name} is {value}; this fleet allows 1 to {limit} ({setting})"))
}

fn number(name: &str, value: f64) -> Result<Number, String> {
    Number::new(value as f32).map_err(|_| format!("params.{name} is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::ImageRef;

    const SHA256: &str = "00000000000000ff0000000000000000000000000000000000000000000000ff";

    fn of(model: &settings::Model, params: serde_json::Value) -> Result<Params, String> {
        super::params(model, &serde_json::from_value(params).unwrap(), SHA256)
    }

    fn fleet(change: impl FnOnce(&mut settings::Model)) -> settings::Model {
        let mut model = settings::Model::default();
        change(&mut model);
        model
    }

    #[test]
    fn a_request_without_parameters_has_those_of_the_fleet() {
        assert_eq!(of(&fleet(|_| {}), serde_json::json!({})), Ok(Params::default()));
        let beams = fleet(|model| (model.num_beams, model.length_penalty, model.num_return_sequences) = (3, 2.0, 2));
        let params = of(&beams, serde_json::json!({})).unwrap();
        let search = BeamSearch { beams: 3, length_penalty: crate::caption::number(2.0) };
        assert_eq!((params.strategy, params.captions), (Strategy::Beam(search), 2));
        let drawn = fleet(|model| (model.do_sample, model.top_k, model.num_return_sequences) = (true, 50, 4));
        let params = of(&drawn, serde_json::json!({})).unwrap();
        assert!(matches!(params.strategy, Strategy::Sample(Sampling { top_k: 50, seed: 255, .. })), "{params:?}");
        assert_eq!(params.captions, 4);
    }

    #[test]
    fn a_request_that_asks_for_one_way_leaves_the_fleets_other_one() {
        let beams = fleet(|model| (model.num_beams, model.num_return_sequences) = (3, 3));
        assert_eq!(of(&beams, serde_json::json!({"num_beams": 1})), Ok(Params::default()));
        let params = of(&beams, serde_json::json!({"do_sample": true, "seed": 7})).unwrap();
        assert!(matches!(params.strategy, Strategy::Sample(Sampling { seed: 7, .. })), "{params:?}");
        assert_eq!(of(&beams, serde_json::json!({"num_beams": 2})).unwrap().captions, 2);
        let drawn = fleet(|model| model.do_sample = true);
        assert!(matches!(of(&drawn, serde_json::json!({"num_beams": 4})).unwrap().strategy, Strategy::Beam(_)));
        assert_eq!(of(&drawn, serde_json::json!({"do_sample": false})), Ok(Params::default()));
    }

    #[test]
    fn answers_have_the_defaults_of_their_own_section_and_neither_prompt_nor_siblings() {
        let captions = fleet(|model| {
            (model.prompt, model.do_sample, model.num_return_sequences) = (Some("a photo of".into()), true, 3);
            (model.max_new_tokens_limit, model.sequences_limit) = (50, 4);
        });
        let answerer = settings::Answerer { max_new_tokens: 10, num_beams: 3, ..settings::Answerer::default() };
        let model = answerer.generation(&captions);
        let with = |params: serde_json::Value| Request {
            prompt: Some("once".into()),
            params: serde_json::from_value(params).unwrap(),
            ..Request::of(ImageRef::File("a.jpg".into()))
        };
        let params = of_answers(&model, &with(serde_json::json!({"num_return_sequences": 3})), SHA256).unwrap();
        let search = BeamSearch { beams: 3, length_penalty: crate::caption::number(1.0) };
        let expected = Params { max_new_tokens: 10, strategy: Strategy::Beam(search), ..Params::default() };
        assert_eq!(params, expected);
        let params = of_answers(&model, &with(serde_json::json!({"num_beams": 1, "max_new_tokens": 20})), SHA256);
        assert_eq!(params, Ok(Params::default()));
        let error = of_answers(&model, &with(serde_json::json!({"max_new_tokens": 51})), SHA256).unwrap_err();
        assert!(error.contains("allows 1 to 50 (model.max_new_tokens_limit)"), "{error}");
    }

    #[test]
    fn what_makes_no_sense_is_told_by_its_name() {
        let refused = [
            (serde_json::json!({"max_new_tokens": 0}), "params.max_new_tokens is 0; this fleet allows 1 to 200"),
            (serde_json::json!({"num_beams": 0}), "params.num_beams is 0; this fleet allows 1 to 8"),
            (serde_json::json!({"num_beams": 9}), "(model.sequences_limit)"),
            (serde_json::json!({"do_sample": true, "num_return_sequences": 9}), "params.num_return_sequences is 9"),
            (serde_json::json!({"num_return_sequences": 2}), "params.num_return_sequences is 2, and one caption is"),
            (serde_json::json!({"num_beams": 2, "num_return_sequences": 3}), "no more captions than beams"),
            (serde_json::json!({"num_beams": 2, "do_sample": true}), "params.num_beams is 2 beside do_sample"),
            (serde_json::json!({"temperature": 0.5}), "params.temperature: has no effect without do_sample"),
            (serde_json::json!({"num_beams": 3, "seed": 1}), "params.seed: has no effect without do_sample"),
            (serde_json::json!({"length_penalty": 1.0}), "params.length_penalty: has no effect without num_beams"),
            (serde_json::json!({"do_sample": true, "temperature": 0.0}), "params.temperature is 0"),
            (serde_json::json!({"do_sample": true, "top_p": 1.5}), "params.top_p is 1.5: above 0, at most 1"),
            (serde_json::json!({"repetition_penalty": -1.0}), "params.repetition_penalty is -1: a number above 0"),
        ];
        for (params, why) in refused {
            let error = of(&fleet(|_| {}), params.clone()).unwrap_err();
            assert!(error.contains(why), "{params}: {error}");
        }
    }
}
