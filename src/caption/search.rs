//! One image's way from the scores of its sequences to its captions.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};

use super::generate::{Beams, Choice, Rules, Scored};
use super::params::{Number, Params, Sampling, Strategy};
use super::{Finish, RowId};

/// A caption in the making.
#[derive(Clone)]
pub(super) struct Sequence {
    /// Whose it is.
    pub(super) row: RowId,
    /// Which of the row's sequences it is: numbers of their own for samples, the place for beams.
    pub(super) rank: usize,
    /// `[DEC]`, the prompt and what was generated.
    pub(super) tokens: Vec<u32>,
    /// How many tokens the memory has.
    pub(super) remembered: usize,
    /// Of the generated tokens, by the model.
    pub(super) logprob: f32,
}

/// A caption that is finished.
pub(super) struct Done {
    /// `[DEC]`, the prompt and what was generated.
    pub(super) tokens: Vec<u32>,
    pub(super) logprob: f32,
    pub(super) finish: Finish,
}

/// The token that a sequence goes on with.
pub(super) struct Next {
    /// Which of the sequences it continues.
    pub(super) parent: usize,
    /// Its own rank.
    pub(super) rank: usize,
    pub(super) choice: Choice,
}

/// When captions end.
pub(super) struct Ends {
    /// Tokens of the prompt.
    pub(super) prompt: usize,
    /// The token that ends a caption.
    pub(super) end: u32,
    pub(super) most: usize,
    pub(super) least: usize,
}

/// What the model says of the next token of a row's sequences.
pub(super) enum Said<'a> {
    /// The likeliest one; there is one sequence.
    Choice(Choice),
    /// The scores of all tokens, for each sequence.
    Scores(&'a [Scored<'a>]),
}

/// One image's way to its captions.
pub(super) struct Search {
    ends: Ends,
    repetition_penalty: Number,
    captions: usize,
    way: Way,
    /// By rank.
    done: Vec<Option<Done>>,
}

enum Way {
    /// Also with a penalty.
    Greedy {
        plain: bool,
    },
    /// With the dice of each caption.
    Sample(Sampling, Vec<ChaCha8Rng>),
    Beam(Beams),
}

impl Search {
    /// A search from the end of a prompt of so many tokens; the parameters are sound.
    pub(super) fn new(prompt: usize, end: u32, params: &Params) -> Self {
        let way = match params.strategy {
            Strategy::Greedy => Way::Greedy { plain: params.is_plain() },
            Strategy::Sample(sampling) => {
                Way::Sample(sampling, (0..params.captions as u64).map(|stream| dice(sampling.seed, stream)).collect())
            }
            Strategy::Beam(search) => Way::Beam(Beams::new(search)),
        };
        Self {
            ends: Ends { prompt, end, most: params.max_new_tokens, least: params.min_new_tokens },
            repetition_penalty: params.repetition_penalty,
            captions: params.captions,
            way,
            done: (0..params.captions).map(|_| None).collect(),
        }
    }

    /// Whether the likeliest token is all that it asks for.
    pub(super) fn is_plain(&self) -> bool {
        matches!(self.way, Way::Greedy { plain: true })
    }

    /// Whether the sequence may not end yet.
    pub(super) fn holds_back_the_end(&self, sequence: &Sequence) -> bool {
        self.ends.generated(&sequence.tokens) < self.ends.least
    }

    /// How its `live` sequences, in the order of their ranks, go on.
    pub(super) fn advance(&mut self, live: &[&Sequence], said: &Said<'_>) -> Vec<Next> {
        let Some(first) = live.first() else { return Vec::new() };
        let barred = self.holds_back_the_end(first).then_some(self.ends.end);
        let rules = Rules { repetition_penalty: self.repetition_penalty, barred };
        let (ends, done) = (&self.ends, &mut self.done);
        let mut next = Vec::with_capacity(live.len());
        let mut go_on = |parent: usize, rank: usize, choice: Choice| {
            let sequence = live[parent];
            match ends.finish(&sequence.tokens, choice.token) {
                Some(finish) => done[rank] = Some(sequence.done(choice, finish)),
                None => next.push(Next { parent, rank, choice }),
            }
        };
        match (&mut self.way, said) {
            (Way::Greedy { .. }, Said::Choice(choice)) => go_on(0, 0, *choice),
            (Way::Greedy { .. }, Said::Scores(scores)) => go_on(0, 0, scores[0].likeliest(rules, &first.tokens)),
            (Way::Sample(sampling, dice), Said::Scores(scores)) => {
                // All captions begin at the end of the prompt.
                let fresh = ends.generated(&first.tokens) == 0;
                for (rank, dice) in dice.iter_mut().enumerate() {
                    let parent = if fresh { Some(0) } else { live.iter().position(|one| one.rank == rank) };
                    if let Some(parent) = parent {
                        let tokens = &live[parent].tokens;
                        go_on(parent, rank, scores[parent].draw(rules, tokens, sampling, share(dice)));
                    }
                }
            }
            (Way::Beam(beams), Said::Scores(scores)) => {
                if let Some(beams) = beams.advance(live, scores, rules, ends) {
                    return beams;
                }
            }
            (Way::Sample(..) | Way::Beam(_), Said::Choice(_)) => unreachable!("they ask for scores"),
        }
        next
    }

    /// Tokens of the prompt.
    pub(super) fn prompt(&self) -> usize {
        self.ends.prompt
    }

    /// Its captions, once no sequence goes on: samples in the order of their drawing, beams best first.
    pub(super) fn captions(self) -> Vec<Done> {
        match self.way {
            Way::Beam(beams) => beams.best(self.captions),
            Way::Greedy { .. } | Way::Sample(..) => self.done.into_iter().flatten().collect(),
        }
    }
}

impl Sequence {
    /// The prompt of a row, which the memory does not have yet.
    pub(super) fn new(row: RowId, prompt: Vec<u32>) -> Self {
        Self { row, rank: 0, tokens: prompt, remembered: 0, logprob: 0.0 }
    }

    /// Takes the next token; the memory has all before it.
    pub(super) fn go_on(&mut self, next: &Next) {
        self.rank = next.rank;
        self.remembered = self.tokens.len();
        self.tokens.push(next.choice.token);
        self.logprob += next.choice.logprob;
    }

    /// The caption that it is with one more token, its last.
    pub(super) fn done(&self, last: Choice, finish: Finish) -> Done {
        let tokens = self.tokens.iter().copied().chain([last.token]).collect();
        Done { tokens, logprob: self.logprob + last.logprob, finish }
    }
}

impl Ends {
    /// How many of the tokens were generated.
    pub(super) fn generated(&self, tokens: &[u32]) -> usize {
        tokens.len() - self.prompt
    }

    /// Why a sequence ends with this token after those, if it does.
    pub(super) fn finish(&self, tokens: &[u32], last: u32) -> Option<Finish> {
        if last == self.end {
            Some(Finish::Stop)
        } else if self.generated(tokens) + 1 >= self.most {
            Some(Finish::Length)
        } else {
            None
        }
    }
}

/// Random numbers of their own for each caption: the same for equal seeds, on every machine and in every version.
fn dice(seed: u64, caption: u64) -> ChaCha8Rng {
    let mut dice = ChaCha8Rng::seed_from_u64(seed);
    dice.set_stream(caption);
    dice
}

/// A number from 0 to below 1.
fn share(dice: &mut ChaCha8Rng) -> f64 {
    // 53 bits are what a double holds.
    (dice.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}
