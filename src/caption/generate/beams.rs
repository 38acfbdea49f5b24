//! Beam search as the reference does it (`GenerationMixin._beam_search` in transformers, `early_stopping=False`).

use super::scores::{Rules, best};
use super::{Choice, Scored};
use crate::caption::params::BeamSearch;
use crate::caption::search::{Done, Ends, Next, Sequence};

/// The beams of one image. Their sequences are with the engine.
pub(in crate::caption) struct Beams {
    search: BeamSearch,
    /// Of each beam that is followed, best first: the sum of its tokens' logarithms of probabilities, by the
    /// [`Rules`].
    running: Vec<f32>,
    /// The best captions so far, best first.
    finished: Vec<Hypothesis>,
}

struct Hypothesis {
    score: f32,
    done: Done,
}

/// A beam, and a token that it may go on with.
struct Candidate {
    beam: usize,
    choice: Choice,
    total: f32,
}

impl Beams {
    /// One beam, at the end of the prompt.
    pub(in crate::caption) fn new(search: BeamSearch) -> Self {
        Self { search, running: vec![0.0], finished: Vec::new() }
    }

    /// How the beams go on, given the scores after each: `None` where none can become better than what is finished.
    pub(in crate::caption) fn advance(
        &mut self,
        beams: &[&Sequence],
        scores: &[Scored<'_>],
        rules: Rules,
        ends: &Ends,
    ) -> Option<Vec<Next>> {
        let width = self.search.beams;
        let candidates = self.candidates(beams, scores, rules);
        let length = beams.first().map_or(0, |beam| ends.generated(&beam.tokens)) + 1;
        // What the sum of a caption of this length is divided by.
        let divisor = (length as f64).powf(f64::from(*self.search.length_penalty)) as f32;
        let mut next = Vec::with_capacity(width);
        self.running.clear();
        for (rank, candidate) in candidates.iter().enumerate() {
            let sequence = beams[candidate.beam];
            match ends.finish(&sequence.tokens, candidate.choice.token) {
                // What is not among the best goes on at most, so that there are always beams enough.
                Some(finish) if rank < width => {
                    let done = sequence.done(candidate.choice, finish);
                    self.finished.push(Hypothesis { score: candidate.total / divisor, done });
                }
                None if next.len() < width => {
                    self.running.push(candidate.total);
                    next.push(Next { parent: candidate.beam, rank: next.len(), choice: candidate.choice });
                }
                Some(_) | None => {}
            }
        }
        // Stable: of equals the earlier one stays.
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(width);
        let hopeful = self.running.first().is_some_and(|best| {
            self.finished.len() < width || self.finished.last().is_some_and(|worst| best / divisor > worst.score)
        });
        hopeful.then_some(next)
    }

    /// Twice as many as there are beams, best first: were all the best to end, as many would go on.
    fn candidates(&self, beams: &[&Sequence], scores: &[Scored<'_>], rules: Rules) -> Vec<Candidate> {
        let count = 2 * self.search.beams;
        let mut candidates = Vec::with_capacity(beams.len() * count);
        for (beam, ((sequence, scores), running)) in beams.iter().zip(scores).zip(&self.running).enumerate() {
            let mut logprobs = scores.logprobs();
            rules.apply(&mut logprobs, &sequence.tokens);
            for (token, logprob) in best(&logprobs, count) {
                candidates.push(Candidate { beam, choice: scores.choice(token), total: running + logprob });
            }
        }
        candidates.sort_by(|a, b| b.total.total_cmp(&a.total));
        candidates.truncate(count);
        candidates
    }

    /// The best `count` captions that were found, best first.
    pub(in crate::caption) fn best(self, count: usize) -> Vec<Done> {
        self.finished.into_iter().take(count).map(|hypothesis| hypothesis.done).collect()
    }
}
