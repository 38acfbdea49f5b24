//! Flags for the parameters of captions, named as in a request's `params`. What is not given is as the configuration of who
//! captions says.

use std::num::NonZeroUsize;

use crate::message::RequestParams;
use crate::settings;

/// How captions are generated.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Generation")]
pub struct GenerationOptions {
    /// Most tokens of a caption
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<NonZeroUsize>,
    /// Least tokens of a caption
    #[arg(long, value_name = "N")]
    min_new_tokens: Option<usize>,
    /// Above 1, tokens that are there already become less likely
    #[arg(long, value_name = "NUMBER")]
    repetition_penalty: Option<f64>,
    /// Search the likeliest caption with so many at a time
    #[arg(long, value_name = "N")]
    num_beams: Option<NonZeroUsize>,
    /// With beams: above 0 longer captions win more often
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    length_penalty: Option<f64>,
    /// Draw tokens by their probabilities
    #[arg(long)]
    do_sample: bool,
    /// Of drawn tokens: below 1 the likely ones become likelier
    #[arg(long, value_name = "NUMBER")]
    temperature: Option<f64>,
    /// Draw from so many of the likeliest tokens
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Draw from the likeliest tokens that together are this probable
    #[arg(long, value_name = "SHARE")]
    top_p: Option<f64>,
    /// Equal seeds draw equal captions; else equal pictures do
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Captions of each image: drawn ones, or the best of the beams
    #[arg(long, value_name = "N")]
    num_return_sequences: Option<NonZeroUsize>,
}

impl GenerationOptions {
    /// What is asked for.
    pub fn params(&self) -> RequestParams {
        RequestParams {
            max_new_tokens: self.max_new_tokens.map(NonZeroUsize::get),
            min_new_tokens: self.min_new_tokens,
            repetition_penalty: self.repetition_penalty,
            num_beams: self.num_beams.map(NonZeroUsize::get),
            length_penalty: self.length_penalty,
            do_sample: self.do_sample.then_some(true),
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
            num_return_sequences: self.num_return_sequences.map(NonZeroUsize::get),
        }
    }

    /// Lifts the limits that are for what strangers ask.
    pub fn permit(&self, model: &mut settings::Model) {
        let lift =
            |limit: &mut usize, asked: Option<NonZeroUsize>| *limit = asked.map_or(*limit, |n| n.get().max(*limit));
        lift(&mut model.max_new_tokens_limit, self.max_new_tokens);
        lift(&mut model.sequences_limit, self.num_beams);
        lift(&mut model.sequences_limit, self.num_return_sequences);
    }
}
