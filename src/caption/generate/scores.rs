//! The changes to a row's scores before a token is chosen, in the order and by the rules of the reference (`logits_process`
//! in transformers): repeated tokens, the end that is held back, and then, where tokens are drawn, temperature, top-k and
//! top-p.

use crate::caption::params::{Number, Sampling, number};

/// What holds for each choice of a caption.
#[derive(Clone, Copy, Debug)]
pub(in crate::caption) struct Rules {
    pub(in crate::caption) repetition_penalty: Number,
    /// The token that may not be chosen now, if any.
    pub(in crate::caption) barred: Option<u32>,
}

impl Rules {
    /// Applies them to the scores after the sequence `tokens`; scores of any kind, of which more is better.
    pub(in crate::caption) fn apply(&self, scores: &mut [f32], tokens: &[u32]) {
        if self.repetition_penalty != number(1.0) {
            let penalty = *self.repetition_penalty;
            let mut seen: Vec<u32> = tokens.to_vec();
            seen.sort_unstable();
            seen.dedup();
            for token in seen {
                if let Some(score) = scores.get_mut(token as usize) {
                    *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
                }
            }
        }
        if let Some(score) = self.barred.and_then(|token| scores.get_mut(token as usize)) {
            *score = f32::NEG_INFINITY;
        }
    }
}

/// A token and its weight, which is proportional to its probability.
type Weighed = (u32, f32);

/// Of how many tokens top-p looks at first: seldom more make up a usual `top_p`.
const LIKELY: usize = 256;

/// The tokens to draw from.
pub(super) fn weights(scores: &[f32], sampling: &Sampling) -> Vec<Weighed> {
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |score: f32| ((score - top) / *sampling.temperature).exp();
    let mut tokens: Vec<Weighed> = scores.iter().zip(0..).map(|(score, token)| (token, weight(*score))).collect();
    if (1..tokens.len()).contains(&sampling.top_k) {
        // Of a copy, since what is drawn must not depend on the order that a selection leaves.
        let (_, &mut (_, least), _) = tokens.clone().select_nth_unstable_by(sampling.top_k - 1, heavier_first);
        tokens.retain(|(_, weight)| *weight >= least);
    }
    if *sampling.top_p < 1.0 {
        keep_mass(&mut tokens, f64::from(*sampling.top_p));
    }
    tokens
}

/// The heaviest tokens that together have at least `share` of the weight of all: a token stays as long as those before it
/// have less.
fn keep_mass(tokens: &mut Vec<Weighed>, share: f64) {
    let wanted = share * total(tokens);
    if tokens.len() > LIKELY {
        tokens.select_nth_unstable_by(LIKELY - 1, heavier_first);
        if total(&tokens[..LIKELY]) >= wanted {
            tokens.truncate(LIKELY);
        }
    }
    tokens.sort_unstable_by(heavier_first);
    let mut before = 0.0;
    let kept = tokens.iter().take_while(|(_, weight)| {
        let stays = before < wanted;
        before += f64::from(*weight);
        stays
    });
    let kept = kept.count().max(1);
    tokens.truncate(kept);
}

/// What `share`, from 0 to below 1, of the way through the weights is.
pub(super) fn at(tokens: &[Weighed], share: f64) -> u32 {
    let wanted = share * total(tokens);
    let mut before = 0.0;
    for (token, weight) in tokens {
        before += f64::from(*weight);
        if before > wanted {
            return *token;
        }
    }
    // Rounding only: the last one that can be drawn.
    tokens.iter().rev().find(|(_, weight)| *weight > 0.0).map_or(0, |(token, _)| *token)
}

/// The best `count` of the scores that are more than minus infinity, best first and of equals the first.
pub(super) fn best(scores: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (token, &score) in (0..).zip(scores) {
        let least = if best.len() < count { f32::NEG_INFINITY } else { best[count - 1].1 };
        if score > least {
            let place = best.partition_point(|(_, better)| *better >= score);
            best.insert(place, (token, score));
            best.truncate(count);
        }
    }
    best
}

fn total(tokens: &[Weighed]) -> f64 {
    tokens.iter().map(|(_, weight)| f64::from(*weight)).sum()
}

/// Of equals the first.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "as sorts call it")]
fn heavier_first(a: &Weighed, b: &Weighed) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f32, top_k: usize, top_p: f32) -> Sampling {
        Sampling { temperature: number(temperature), top_k, top_p: number(top_p), seed: 0 }
    }

    fn tokens(scores: &[f32], sampling: &Sampling) -> Vec<u32> {
        let mut tokens: Vec<u32> = weights(scores, sampling).into_iter().map(|(token, _)| token).collect();
        tokens.sort_unstable();
        tokens
    }

    #[test]
    fn top_k_keeps_what_is_as_likely_as_the_last_and_top_p_the_fewest_that_are_probable_enough() {
        // Probabilities 0.1, 0.4, 0.2, 0.2, 0.1.
        let scores = [0.1f32, 0.4, 0.2, 0.2, 0.1].map(f32::ln);
        assert_eq!(tokens(&scores, &sampling(1.0, 0, 1.0)), [0, 1, 2, 3, 4]);
        assert_eq!(tokens(&scores, &sampling(1.0, 1, 1.0)), [1]);
        assert_eq!(tokens(&scores, &sampling(1.0, 2, 1.0)), [1, 2, 3], "equals are kept together");
        assert_eq!(tokens(&scores, &sampling(1.0, 9, 1.0)), [0, 1, 2, 3, 4]);
        assert_eq!(tokens(&scores, &sampling(1.0, 0, 0.39)), [1]);
        assert_eq!(tokens(&scores, &sampling(1.0, 0, 0.59)), [1, 2], "of equals the first");
        assert_eq!(tokens(&scores, &sampling(1.0, 0, 0.61)), [1, 2, 3]);
        assert_eq!(tokens(&scores, &sampling(1.0, 0, 1e-9)), [1], "one at least");
        // Of 0.4, 0.2, 0.2, after top-k.
        assert_eq!(tokens(&scores, &sampling(1.0, 3, 0.49)), [1]);
        assert_eq!(tokens(&scores, &sampling(0.1, 0, 0.99)), [1], "colder");
    }

    #[test]
    fn many_tokens_are_bounded_as_few_are() {
        let scores: Vec<f32> = (0..5_000).map(|n| ((n * 7919 % 5_000) as f32 / 5_000.0).ln_1p()).collect();
        let sorted = {
            let mut all = weights(&scores, &sampling(1.0, 0, 1.0));
            all.sort_by(heavier_first);
            all
        };
        for share in [0.01, 0.1, 0.5, 0.97] {
            let (mut before, wanted) = (0.0, f64::from(share as f32) * total(&sorted));
            let expected = sorted.iter().take_while(|(_, weight)| {
                let stays = before < wanted;
                before += f64::from(*weight);
                stays
            });
            let expected: Vec<u32> = expected.map(|(token, _)| *token).collect();
            let kept: Vec<u32> =
                weights(&scores, &sampling(1.0, 0, share as f32)).iter().map(|(token, _)| *token).collect();
            assert_eq!(kept, expected, "{share}");
        }
    }

    #[test]
    fn a_share_of_the_probabilities_leads_to_its_token() {
        let weights = [(7, 1.0), (3, 0.0), (5, 3.0)];
        let at = |share| at(&weights, share);
        assert_eq!([at(0.0), at(0.249), at(0.25), at(0.999), at(1.0 - f64::EPSILON / 2.0)], [7, 7, 5, 5, 5]);
    }

    #[test]
    fn the_best_are_in_order_and_of_equals_the_first() {
        let scores = [1.0, f32::NEG_INFINITY, 3.0, 2.0, 3.0];
        assert_eq!(best(&scores, 3), [(2, 3.0), (4, 3.0), (3, 2.0)]);
        assert_eq!(best(&scores, 9).len(), 4, "what is barred is not among them");
    }

    #[test]
    fn what_is_repeated_is_less_likely_once_and_what_is_barred_is_not_chosen() {
        let mut scores = [2.0, -2.0, 1.0, 0.5];
        Rules { repetition_penalty: number(2.0), barred: Some(3) }.apply(&mut scores, &[0, 1, 0, 99]);
        assert_eq!(scores.map(f32::to_bits), [1.0, -4.0, 1.0, f32::NEG_INFINITY].map(f32::to_bits));
    }
}
