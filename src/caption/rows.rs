//! Rows of captions in the making, whatever they look at: how they join, go on token by token, and leave.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::Tensor;
use rayon::prelude::*;

use super::generate::{greedy, on_rows};
use super::memory::{Block, ImageMemory, Memory};
use super::search::{Done, Next, Said, Search, Sequence};
use super::writer::Writer;
use super::{Caption, EngineError, Params, RowId};

/// The rows of a running batch. All calls are for one [`Writer`].
pub(super) struct Rows {
    memory: Box<dyn Memory>,
    /// What each row searches for.
    searches: BTreeMap<RowId, Search>,
    /// The sequences of all rows, in the order of the memory's.
    sequences: Vec<Sequence>,
    next_row: u64,
}

impl Rows {
    /// No rows, in an empty memory.
    pub(super) fn new(memory: Box<dyn Memory>) -> Self {
        Self { memory, searches: BTreeMap::new(), sequences: Vec::new(), next_row: 0 }
    }

    /// Adds a row that looks at `seen`.
    ///
    /// # Errors
    /// The parameters are unsound or ask for more tokens than the model can see, or the device fails.
    pub(super) fn admit(
        &mut self,
        writer: &Writer,
        seen: &Arc<ImageMemory>,
        params: &Params,
    ) -> Result<RowId, EngineError> {
        params.check()?;
        let most = params.max_new_tokens;
        let prompt = prompt(writer, params)?;
        let (length, limit) = (prompt.len(), writer.config.max_position_embeddings);
        if length.saturating_add(most) > limit {
            return Err(EngineError::bad_params(format!(
                "a prompt of {length} tokens and max_new_tokens of {most} are more than the {limit} tokens that the \
                 model can see"
            )));
        }
        // The last token of a caption is never fed back.
        self.memory.admit(seen, length + most - 1)?;
        let id = RowId(self.next_row);
        self.next_row += 1;
        self.searches.insert(id, Search::new(length, writer.config.sep_token_id, params));
        self.sequences.push(Sequence::new(id, prompt));
        Ok(id)
    }

    /// Generates one token for every sequence, and returns the rows that finished by it.
    ///
    /// # Errors
    /// The device fails; the rows are undefined then.
    pub(super) fn step(&mut self, writer: &Writer) -> Result<Vec<(RowId, Caption)>, EngineError> {
        let logits = self.forward(writer)?;
        let next = self.choose(writer, &logits)?;
        self.go_on(next)?;
        self.finished(writer)
    }

    /// How many rows are unfinished.
    pub(super) fn active(&self) -> usize {
        self.searches.len()
    }

    /// How many sequences the next step is for.
    pub(super) fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// See [`Memory::bytes_for`].
    pub(super) fn bytes_for(&self, rows: usize, tokens: usize) -> usize {
        self.memory.bytes_for(rows, tokens)
    }

    /// Forgets all rows.
    pub(super) fn clear(&mut self) {
        self.searches.clear();
        self.sequences.clear();
        self.memory.clear();
    }

    /// The tokens that each sequence has to feed next: its prompt, or its latest token; short ones are filled up.
    fn next_block(&self, filler: u32) -> (Vec<u32>, Block) {
        let starts: Vec<usize> = self.sequences.iter().map(|one| one.remembered).collect();
        let counts: Vec<usize> = self.sequences.iter().map(|one| one.tokens.len() - one.remembered).collect();
        let width = counts.iter().copied().max().unwrap_or(0);
        let tokens = self.sequences.iter().flat_map(|one| {
            let new = one.tokens[one.remembered..].iter().copied();
            new.chain(std::iter::repeat(filler)).take(width)
        });
        (tokens.collect(), Block { width, starts, counts })
    }

    /// Scores for the token after each sequence's last, `[sequences, vocabulary]`.
    fn forward(&mut self, writer: &Writer) -> candle_core::Result<Tensor> {
        let (tokens, block) = self.next_block(writer.config.pad_token_id);
        let hidden = writer.text.forward(&tokens, &block, &mut *self.memory)?;
        let last = if block.width == 1 {
            hidden
        } else {
            let last = block.counts.iter().enumerate().map(|(row, count)| (row * block.width + count - 1) as u32);
            hidden.index_select(&Tensor::from_iter(last, hidden.device())?, 0)?
        };
        writer.text.logits(&last)
    }

    /// How all rows go on: sequences that are named as nobody's parent end here.
    fn choose(&mut self, writer: &Writer, logits: &Tensor) -> candle_core::Result<Vec<Next>> {
        let sequences = &self.sequences;
        let mut by_row: BTreeMap<RowId, Vec<usize>> = BTreeMap::new();
        for (index, sequence) in sequences.iter().enumerate() {
            by_row.entry(sequence.row).or_default().push(index);
        }
        let rows = self.searches.iter_mut().map(|(row, search)| {
            let mut own = by_row.remove(row).unwrap_or_default();
            own.sort_by_key(|index| sequences[*index].rank);
            (search, own)
        });
        let (plain, mut scored): (Vec<_>, Vec<_>) = rows.partition(|(search, _)| search.is_plain());
        let mut next = Vec::with_capacity(sequences.len());
        // First, since the plain choice may bar an end in place.
        if !scored.is_empty() {
            let wanted: Vec<usize> = scored.iter().flat_map(|(_, own)| own).copied().collect();
            let chosen = on_rows(logits, &wanted, |mut scores| {
                let with_scores = scored.iter_mut().map(|(search, own)| {
                    let (first, rest) = scores.split_at(own.len());
                    scores = rest;
                    (search, own, first)
                });
                let with_scores: Vec<_> = with_scores.collect();
                let chosen = with_scores.into_par_iter().map(|(search, own, scores)| {
                    let live: Vec<&Sequence> = own.iter().map(|index| &sequences[*index]).collect();
                    let next = search.advance(&live, &Said::Scores(scores)).into_iter();
                    next.map(|next| Next { parent: own[next.parent], ..next }).collect::<Vec<_>>()
                });
                chosen.collect::<Vec<_>>()
            })?;
            next.extend(chosen.into_iter().flatten());
        }
        if !plain.is_empty() {
            let mut held_back = vec![false; sequences.len()];
            for (search, own) in &plain {
                for &index in own {
                    held_back[index] = search.holds_back_the_end(&sequences[index]);
                }
            }
            let choices = greedy(logits, &held_back, writer.config.sep_token_id, writer.kept.is_fused())?;
            for (search, own) in plain {
                for index in own {
                    let said = Said::Choice(choices[index]);
                    let went_on = search.advance(&[&sequences[index]], &said).into_iter();
                    next.extend(went_on.map(|next| Next { parent: index, ..next }));
                }
            }
        }
        Ok(next)
    }

    /// Gives each sequence its next token, several copies of it where it goes on in several ways, and forgets those that
    /// go on in none.
    fn go_on(&mut self, next: Vec<Next>) -> candle_core::Result<()> {
        let mut children: Vec<Vec<Next>> = self.sequences.iter().map(|_| Vec::new()).collect();
        for next in next {
            children[next.parent].push(next);
        }
        let (mut forks, mut vacant) = (Vec::new(), Vec::new());
        for (index, children) in children.into_iter().enumerate() {
            let sequence = &mut self.sequences[index];
            let mut children = children.into_iter();
            let first = children.next();
            forks.extend(children.map(|next| {
                let mut fork = sequence.clone();
                fork.go_on(&next);
                (index, fork)
            }));
            match first {
                Some(next) => sequence.go_on(&next),
                None => vacant.push(index),
            }
        }
        for (parent, sequence) in forks {
            let place = vacant.pop().unwrap_or(self.sequences.len());
            self.memory.fork(parent, place)?;
            if place == self.sequences.len() {
                self.sequences.push(sequence);
            } else {
                self.sequences[place] = sequence;
            }
        }
        // Backwards, since the last takes the place of one that leaves.
        for place in vacant.into_iter().rev() {
            self.sequences.swap_remove(place);
            self.memory.swap_remove(place)?;
        }
        Ok(())
    }

    /// The captions of rows of which no sequence goes on.
    fn finished(&mut self, writer: &Writer) -> Result<Vec<(RowId, Caption)>, EngineError> {
        let live: BTreeSet<RowId> = self.sequences.iter().map(|one| one.row).collect();
        let ended: Vec<RowId> = self.searches.keys().filter(|row| !live.contains(row)).copied().collect();
        let mut finished = Vec::with_capacity(ended.len());
        for row in ended {
            if let Some(search) = self.searches.remove(&row) {
                finished.push((row, caption(writer, search)?));
            }
        }
        Ok(finished)
    }
}

/// The first token and the prompt.
fn prompt(writer: &Writer, params: &Params) -> Result<Vec<u32>, EngineError> {
    let mut tokens = vec![writer.config.bos_token_id];
    if let Some(prompt) = &params.prompt {
        tokens.extend(writer.tokenizer.encode(prompt)?);
    }
    if tokens.iter().any(|&token| token as usize >= writer.config.vocab_size) {
        return Err(EngineError::bad_params("the prompt has a token that the model does not know"));
    }
    Ok(tokens)
}

fn caption(writer: &Writer, search: Search) -> Result<Caption, EngineError> {
    let prompt = search.prompt();
    let captions = search.captions().into_iter().map(|Done { tokens, logprob, finish }| {
        let text = writer.tokenizer.decode(&tokens)?;
        let token_ids = tokens[prompt..].to_vec();
        Ok(Caption { text, tokens: token_ids.len(), token_ids, logprob, finish, more: Vec::new() })
    });
    let mut captions = captions.collect::<Result<Vec<_>, EngineError>>()?.into_iter();
    let first = captions.next().ok_or_else(|| EngineError::internal("a search ended without a caption"))?;
    Ok(Caption { more: captions.collect(), ..first })
}
