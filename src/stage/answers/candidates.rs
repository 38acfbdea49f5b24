//! The texts of a record: what was written for the image and what was found with it, and the best of them.

use super::generated;
use crate::caption::{Caption, Match, Told};
use crate::message::{Candidate, Generated, Judged, TextSource};

/// Captions first, then the texts that were found; judged where there is a threshold, a probability from 0 to 1.
pub(super) fn of(told: &Told, texts: &[String], threshold: Option<f64>) -> Vec<Candidate> {
    let judged = |found: Option<&Result<Match, String>>| {
        threshold.zip(found).map(|(threshold, found)| match found {
            Ok(Match { itm, itc, .. }) => {
                Judged { itm: Some(*itm), itc: Some(*itc), kept: f64::from(*itm) >= threshold, error: None }
            }
            Err(why) => Judged { itm: None, itc: None, kept: false, error: Some(why.clone()) },
        })
    };
    let captions = told.caption.iter().flat_map(Caption::all).enumerate().map(|(at, caption)| Candidate {
        text: caption.text.clone(),
        source: TextSource::Generated,
        generated: generated(caption),
        judged: judged(told.generated.get(at)),
    });
    let found = texts.iter().enumerate().map(|(at, text)| Candidate {
        text: text.clone(),
        source: TextSource::Found,
        generated: Generated::default(),
        judged: judged(told.found.get(at)),
    });
    // Texts that nobody judges are not of the answer.
    captions.chain(found.take_while(|_| threshold.is_some())).collect()
}

/// The likeliest to match, the first of equals; the first where none was judged.
pub(super) fn best(candidates: &[Candidate]) -> Option<&Candidate> {
    let probability = |one: &Candidate| one.judged.as_ref().and_then(|judged| judged.itm).unwrap_or(-1.0);
    candidates.iter().reduce(|best, one| if probability(one) > probability(best) { one } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::Finish;

    fn caption(text: &str, more: Vec<Caption>) -> Caption {
        Caption { text: text.into(), token_ids: vec![1], logprob: -1.0, tokens: 1, finish: Finish::Stop, more }
    }

    fn judgement(itm: f32) -> Match {
        Match { itm, logits: [0.0, 0.0], itc: itm / 2.0 }
    }

    #[test]
    fn what_matches_best_is_kept_whoever_wrote_it() {
        let told = Told {
            caption: Some(caption("first", vec![caption("second", Vec::new())])),
            generated: vec![Ok(judgement(0.4)), Err("no words".into())],
            found: vec![Ok(judgement(0.9)), Ok(judgement(0.9)), Ok(judgement(0.5))],
            ..Told::default()
        };
        let texts = ["third", "fourth", "fifth"].map(String::from);
        let candidates = of(&told, &texts, Some(0.5));
        let seen: Vec<_> = candidates
            .iter()
            .map(|one| (one.text.as_str(), one.source.as_str(), one.judged.as_ref().unwrap().kept))
            .collect();
        let expected = [
            ("first", "generated", false),
            ("second", "generated", false),
            ("third", "found", true),
            ("fourth", "found", true),
            ("fifth", "found", true),
        ];
        assert_eq!(seen, expected);
        assert_eq!(best(&candidates).unwrap().text, "third", "of equals the first");
        assert_eq!(
            (candidates[1].judged.as_ref().unwrap().error.as_deref(), candidates[2].generated),
            (Some("no words"), Generated::default())
        );
    }

    #[test]
    fn without_a_judge_the_first_caption_is_the_answer() {
        let told = Told { caption: Some(caption("first", vec![caption("second", Vec::new())])), ..Told::default() };
        let candidates = of(&told, &["found".into()], None);
        assert_eq!(candidates.iter().map(|one| one.text.as_str()).collect::<Vec<_>>(), ["first", "second"]);
        assert_eq!(best(&candidates).unwrap().text, "first");
        assert!(candidates.iter().all(|one| one.judged.is_none()));
    }
}
