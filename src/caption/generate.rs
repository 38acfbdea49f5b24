//! The choice of the next token.

mod beams;
mod scores;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::compute::{elements, fused, log_sum_exp, on_host};
use super::params::Sampling;

pub(super) use beams::Beams;
pub(super) use scores::Rules;

/// A chosen token, and the logarithm of the probability that the model gives it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choice {
    pub(super) token: u32,
    pub(super) logprob: f32,
}

/// The model's scores of all tokens for the place after a sequence.
pub(super) struct Scored<'a> {
    scores: &'a [f32],
    /// The logarithm of the sum of their exponentials.
    normaliser: f32,
}

impl<'a> Scored<'a> {
    fn new(scores: &'a [f32]) -> Result<Self> {
        let normaliser = log_sum_exp(scores);
        if !normaliser.is_finite() {
            return Err(not_numbers());
        }
        Ok(Self { scores, normaliser })
    }

    /// Logarithms of the probabilities.
    fn logprobs(&self) -> Vec<f32> {
        self.scores.iter().map(|score| score - self.normaliser).collect()
    }

    fn choice(&self, token: u32) -> Choice {
        Choice { token, logprob: self.scores[token as usize] - self.normaliser }
    }

    /// The scores by the rules for the place after these tokens.
    fn ruled(&self, rules: Rules, tokens: &[u32]) -> Vec<f32> {
        let mut scores = self.scores.to_vec();
        rules.apply(&mut scores, tokens);
        scores
    }

    /// The likeliest token by the rules, the first of equals.
    pub(super) fn likeliest(&self, rules: Rules, tokens: &[u32]) -> Choice {
        self.choice(scores::best(&self.ruled(rules, tokens), 1).first().map_or(0, |(token, _)| *token))
    }

    /// The token that `share`, from 0 to below 1, of the probabilities by the rules and by `sampling` leads to.
    pub(super) fn draw(&self, rules: Rules, tokens: &[u32], sampling: &Sampling, share: f64) -> Choice {
        self.choice(scores::at(&scores::weights(&self.ruled(rules, tokens), sampling), share))
    }
}

fn not_numbers() -> candle_core::Error {
    candle_core::Error::Msg("the model's scores are not numbers: a weight or a precision is unfit".into())
}

/// Does `work` with the scores of some rows of `logits` `[rows, vocabulary]`, on this machine.
pub(super) fn on_rows<T>(logits: &Tensor, rows: &[usize], work: impl FnOnce(&[Scored<'_>]) -> T) -> Result<T> {
    let vocabulary = logits.dim(1)?;
    let (logits, rows) = if on_host(logits) {
        (logits.clone(), rows.to_vec())
    } else {
        // Only what is asked for is copied from a device.
        let wanted = Tensor::from_iter(rows.iter().map(|row| *row as u32), logits.device())?;
        let wanted = logits.index_select(&wanted, 0)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        (wanted, (0..rows.len()).collect())
    };
    let (storage, layout) = logits.storage_and_layout();
    let scores = elements(&storage, layout)?;
    let scored = rows.par_iter().map(|row| Scored::new(&scores[row * vocabulary..][..vocabulary]));
    Ok(work(&scored.collect::<Result<Vec<_>>>()?))
}

/// The likeliest token of each row of `logits` `[rows, vocabulary]`, the first of equals; never `end` where the row is
/// `held_back`. The probability is the model's own, also where a row is held back. One kernel does it all where steps are
/// `fused`.
pub(super) fn greedy(logits: &Tensor, held_back: &[bool], end: u32, fused: bool) -> Result<Vec<Choice>> {
    let choices = match fused {
        true => by_step(logits, held_back, end),
        false if on_host(logits) => host(logits, held_back, end),
        false => device(logits, held_back, end),
    }?;
    if choices.iter().any(|choice| !choice.logprob.is_finite()) {
        return Err(not_numbers());
    }
    Ok(choices)
}

fn host(logits: &Tensor, held_back: &[bool], end: u32) -> Result<Vec<Choice>> {
    let vocabulary = logits.dim(1)?;
    let (storage, layout) = logits.storage_and_layout();
    let rows = elements(&storage, layout)?.par_chunks_exact(vocabulary).zip(held_back);
    Ok(rows.map(|(row, &held_back)| best(row, held_back.then_some(end))).collect())
}

fn best(row: &[f32], except: Option<u32>) -> Choice {
    let mut token = 0;
    let mut top = f32::NEG_INFINITY;
    for (index, &score) in row.iter().enumerate() {
        if score > top && except != Some(index as u32) {
            (token, top) = (index as u32, score);
        }
    }
    Choice { token, logprob: top - log_sum_exp(row) }
}

fn by_step(logits: &Tensor, held_back: &[bool], end: u32) -> Result<Vec<Choice>> {
    let choices = fused::choose(logits, held_back, end)?;
    Ok(choices.into_iter().map(|(token, logprob)| Choice { token, logprob }).collect())
}

fn device(logits: &Tensor, held_back: &[bool], end: u32) -> Result<Vec<Choice>> {
    let logits = logits.to_dtype(DType::F32)?.contiguous()?;
    let normaliser = logits.log_sum_exp(1)?;
    if held_back.contains(&true) {
        let bars: Vec<f32> = held_back.iter().map(|&held| if held { f32::NEG_INFINITY } else { 0.0 }).collect();
        let bars = Tensor::from_vec(bars, (held_back.len(), 1), logits.device())?;
        let barred = (logits.narrow(1, end as usize, 1)? + bars)?;
        logits.slice_set(&barred, 1, end as usize)?;
    }
    let tokens = logits.argmax_keepdim(1)?;
    let scores = logits.gather(&tokens, 1)?.squeeze(1)?;
    let logprobs: Vec<f32> = (scores - normaliser)?.to_vec1()?;
    let tokens: Vec<u32> = tokens.squeeze(1)?.to_vec1()?;
    Ok(tokens.into_iter().zip(logprobs).map(|(token, logprob)| Choice { token, logprob }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ways_choose_alike_and_hold_the_end_back() {
        let logits = Tensor::new(&[[1f32, 3.0, 3.0, 5.0], [2.0, 0.0, 1.0, 4.0]], &Device::Cpu).unwrap();
        for held_back in [[false, false], [true, false], [true, true]] {
            let a = host(&logits, &held_back, 3).unwrap();
            let b = device(&logits.copy().unwrap(), &held_back, 3).unwrap();
            let c = by_step(&logits, &held_back, 3).unwrap();
            let tokens: Vec<_> = a.iter().map(|choice| choice.token).collect();
            let expected = held_back.iter().zip([1, 0]).map(|(&held, other)| if held { other } else { 3 });
            assert_eq!(tokens, expected.collect::<Vec<u32>>());
            for (a, other) in a.iter().zip(&b).chain(a.iter().zip(&c)) {
                assert_eq!(a.token, other.token);
                assert!((a.logprob - other.logprob).abs() < 1e-5);
            }
        }
        let total: f32 = [1f32, 3.0, 3.0, 5.0].iter().map(|x| x.exp()).sum();
        let expected = (5f32.exp() / total).ln();
        assert!((host(&logits, &[false, false], 3).unwrap()[0].logprob - expected).abs() < 1e-6);
    }

    #[test]
    fn scores_that_are_not_numbers_are_an_error() {
        let logits = Tensor::new(&[[1f32, f32::NAN]], &Device::Cpu).unwrap();
        for fused in [false, true] {
            assert!(greedy(&logits, &[false], 0, fused).is_err());
        }
    }
}
