//! The model that answers questions.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Model;

/// Which model answers questions about images, and how. It runs on the devices, in the precision and on the kernels of the
/// captioner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Answerer {
    /// A local folder in the published layout of `BlipForQuestionAnswering`, or a hub id; without one, requests that ask for
    /// answers end as dead letters.
    pub source: Option<String>,
    /// The most questions that a request may ask.
    pub questions_limit: usize,
    /// Most tokens of an answer, unless a request says otherwise.
    pub max_new_tokens: usize,
    /// How many answers are searched at a time for the likeliest one, unless a request says otherwise; 1 takes the likeliest
    /// token each time.
    pub num_beams: usize,
}

impl Default for Answerer {
    fn default() -> Self {
        let Model { max_new_tokens, num_beams, .. } = Model::default();
        Self { source: None, questions_limit: 16, max_new_tokens, num_beams }
    }
}

impl Answerer {
    /// The defaults of an answer's parameters, with the limits that captions have: what is not said here is not done.
    pub fn generation(&self, limits: &Model) -> Model {
        Model {
            max_new_tokens: self.max_new_tokens,
            num_beams: self.num_beams,
            max_new_tokens_limit: limits.max_new_tokens_limit,
            sequences_limit: limits.sequences_limit,
            ..Model::default()
        }
    }
}
