//! What a caller may ask of the captions of one image.

use ordered_float::NotNan;

use super::EngineError;

/// How many tokens a caption gets when nothing is asked for.
///
/// The reference implementation generates 20 new tokens when neither the caller nor the model's configuration gives a
/// length (`_prepare_generated_length` in transformers), and the published captioning models were tuned to that length.
pub const DEFAULT_MAX_NEW_TOKENS: usize = 20;

/// What a caller may ask of the captions of one image. The parameters are those of the reference implementation
/// (`GenerationConfig` in transformers) and mean what they mean there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Params {
    /// Text that the captions continue; a caption's text contains it.
    pub prompt: Option<String>,
    /// Upper bound of generated tokens, the end token included, the prompt not.
    pub max_new_tokens: usize,
    /// The end token is held back until this many tokens are generated.
    pub min_new_tokens: usize,
    /// Makes tokens that are there already, those of the prompt among them, less likely (above 1) or more (below).
    pub repetition_penalty: Number,
    /// How the tokens are chosen.
    pub strategy: Strategy,
    /// How many captions are made of the image: samples, or the best of the beams.
    pub captions: usize,
}

/// A number that is one.
pub type Number = NotNan<f32>;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// The likeliest token, each time.
    #[default]
    Greedy,
    /// Drawn by their probabilities.
    Sample(Sampling),
    /// The likeliest captions that a search of some width finds.
    Beam(BeamSearch),
}

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sampling {
    /// Divides the scores: below 1 the likely tokens become likelier.
    pub temperature: Number,
    /// Only this many of the likeliest tokens are drawn from, and what is as likely as the last of them; 0 is no bound.
    pub top_k: usize,
    /// Only the likeliest tokens that together are this probable are drawn from; 1 is no bound.
    pub top_p: Number,
    /// Equal seeds draw equal captions, whatever else is in the batch.
    pub seed: u64,
}

/// How beams are searched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BeamSearch {
    /// How many captions are followed at a time.
    pub beams: usize,
    /// The score of a finished caption is divided by its length to this power: above 0 longer captions win more often.
    pub length_penalty: Number,
}

/// A number that is written down in code.
///
/// # Panics
/// It is none.
#[must_use]
pub fn number(value: f32) -> Number {
    NotNan::new(value).expect("a number")
}

impl Default for Params {
    fn default() -> Self {
        Self {
            prompt: None,
            max_new_tokens: DEFAULT_MAX_NEW_TOKENS,
            min_new_tokens: 0,
            repetition_penalty: number(1.0),
            strategy: Strategy::Greedy,
            captions: 1,
        }
    }
}

impl Params {
    /// How many rows of the running batch the image takes at most.
    pub fn rows(&self) -> usize {
        match self.strategy {
            Strategy::Beam(search) => search.beams.max(1),
            Strategy::Greedy | Strategy::Sample(_) => self.captions.max(1),
        }
    }

    /// Whether each token is the likeliest by the model's own scores.
    pub(super) fn is_plain(&self) -> bool {
        self.strategy == Strategy::Greedy && self.repetition_penalty == number(1.0)
    }

    /// # Errors
    /// What cannot be done, in the names that people use for it.
    pub fn check(&self) -> Result<(), EngineError> {
        let wrong = self.wrong_lengths().or_else(|| self.wrong_penalty()).or_else(|| self.wrong_strategy());
        wrong.map_or(Ok(()), |wrong| Err(EngineError::bad_params(wrong)))
    }

    fn wrong_lengths(&self) -> Option<String> {
        let (most, least) = (self.max_new_tokens, self.min_new_tokens);
        (most == 0 || least > most).then(|| {
            format!(
                "max_new_tokens is {most} and min_new_tokens {least}: at least one token, and no more than the most"
            )
        })
    }

    fn wrong_penalty(&self) -> Option<String> {
        let penalty = self.repetition_penalty;
        not_positive(penalty).then(|| format!("repetition_penalty is {penalty}: a number above 0"))
    }

    fn wrong_strategy(&self) -> Option<String> {
        let captions = self.captions;
        if captions == 0 {
            return Some("num_return_sequences is 0: at least one caption".into());
        }
        match self.strategy {
            Strategy::Greedy => (captions > 1).then(|| {
                format!("num_return_sequences is {captions}, and one caption is the likeliest: do_sample, or num_beams")
            }),
            Strategy::Sample(Sampling { temperature, .. }) if not_positive(temperature) => {
                Some(format!("temperature is {temperature}: a number above 0"))
            }
            Strategy::Sample(Sampling { top_p, .. }) => {
                (*top_p <= 0.0 || *top_p > 1.0).then(|| format!("top_p is {top_p}: above 0, at most 1"))
            }
            Strategy::Beam(BeamSearch { beams, .. }) if captions > beams => {
                Some(format!("num_return_sequences is {captions}, and num_beams {beams}: no more captions than beams"))
            }
            Strategy::Beam(BeamSearch { length_penalty, .. }) => {
                (!length_penalty.is_finite()).then(|| format!("length_penalty is {length_penalty}: a finite number"))
            }
        }
    }
}

fn not_positive(number: Number) -> bool {
    !number.is_finite() || *number <= 0.0
}
