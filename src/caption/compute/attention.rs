//! Attention in f32 on a CPU, a head at a time and in blocks of queries that stay in the second cache.

use half::bf16;
use rayon::prelude::*;

use super::finish::{AsIs, Shares};
use super::lanes::Isa;
use super::packed::{Matrix, Number, Packed, Packing};
use super::product::{Target, product, product_here};
use super::softmax::exponentials;

/// Queries whose scores are held at a time, by a thread.
const QUERIES: usize = 48;

/// What a thread needs for one head.
struct Scratch {
    keys: Packed<f32>,
    values: Packed<f32>,
    scores: Vec<f32>,
    shares: [f32; QUERIES],
}

/// The encoder's self-attention, see [`attend_image`](super::attend_image): `qkv` is `[images · tokens, 3 · width]`, the
/// result `[images · tokens, width]`.
pub(super) fn attend_self(isa: Isa, qkv: &[f32], images: usize, tokens: usize, heads: usize) -> Vec<f32> {
    let width = qkv.len() / (images * tokens * 3);
    let head = width / heads;
    let scale = 1.0 / (head as f32).sqrt();
    let mut contexts = Vec::with_capacity(images * tokens * width);
    let target = Target::new(contexts.as_mut_ptr(), width);
    // A head is work enough for a thread; where there are more threads than heads, a part of its queries is.
    let parts = (2 * rayon::current_num_threads()).div_ceil(images * heads).min(tokens.div_ceil(QUERIES));
    let scratch = || Scratch {
        keys: Packed::empty(isa),
        values: Packed::empty(isa),
        scores: vec![0.0; QUERIES * tokens],
        shares: [0.0; QUERIES],
    };
    (0..images * heads * parts).into_par_iter().for_each_init(scratch, |scratch, job| {
        let (image, which, part) = (job / parts / heads, job / parts % heads, job % parts);
        let of = |which: usize, rows: std::ops::Range<usize>| {
            Matrix::new(&qkv[(image * tokens + rows.start) * 3 * width + which..], 3 * width, rows.len(), head)
        };
        let Scratch { keys, values, scores, shares } = scratch;
        keys.take_columns(of(width + which * head, 0..tokens));
        values.take_rows(of(2 * width + which * head, 0..tokens));
        let end = tokens * (part + 1) / parts;
        for first in (tokens * part / parts..end).step_by(QUERIES) {
            let queries = first..end.min(first + QUERIES);
            let count = queries.len();
            let to = Target::new(scores.as_mut_ptr(), tokens);
            // SAFETY: the scores are this thread's, and have room for so many queries.
            unsafe { product_here(of(which * head, queries), keys, to, &AsIs) };
            let shares = &mut shares[..count];
            exponentials(isa, &mut scores[..count * tokens], tokens, scale, shares);
            let weights = Matrix::new(scores, tokens, count, tokens);
            // SAFETY: each job has queries and columns of its own in `contexts`, which has room for all of them.
            unsafe {
                let to = target.from(image * tokens + first, which * head);
                product_here(weights, values, to, &Shares(shares));
            }
        }
    });
    // SAFETY: the jobs have written all of it.
    unsafe { contexts.set_len(images * tokens * width) };
    contexts
}

/// An encoded image as the decoder attends to it: its hidden states `[tokens, width]`, once as keys and once as values,
/// for all layers; see [`Folded`].
pub(in crate::caption) enum Hidden {
    /// In f32.
    Full(Both<f32>),
    /// In bf16.
    Bf16(Both<bf16>),
}

/// See [`Hidden`].
pub(in crate::caption) struct Both<N> {
    keys: Packed<N>,
    values: Packed<N>,
}

impl<N: Number> Both<N> {
    fn new(isa: Isa, hidden: Matrix<'_>) -> Self {
        Self { keys: Packed::of_columns(isa, hidden), values: Packed::of_rows(isa, hidden) }
    }

    fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }

    /// On all cores.
    fn attend(&self, queries: Matrix<'_>, scale: f32) -> Vec<f32> {
        let mut scores = product(queries, &self.keys, &AsIs);
        let (rows, tokens) = (queries.rows, scores.len() / queries.rows);
        let mut shares = vec![0.0; rows];
        exponentials(self.keys.isa, &mut scores, tokens, scale, &mut shares);
        product(Matrix::new(&scores, tokens, rows, tokens), &self.values, &Shares(&shares))
    }

    /// On this thread.
    fn attend_here(
        &self,
        queries: Matrix<'_>,
        scale: f32,
        contexts: &mut [f32],
        (scores, shares): &mut (Vec<f32>, Vec<f32>),
    ) {
        let (rows, tokens) = (queries.rows, self.keys.width);
        scores.resize(rows * tokens, 0.0);
        // SAFETY: the scores are this thread's, and have the room.
        unsafe { product_here(queries, &self.keys, Target::new(scores.as_mut_ptr(), tokens), &AsIs) };
        shares.resize(rows, 0.0);
        exponentials(self.keys.isa, scores, tokens, scale, shares);
        let width = self.values.width;
        assert_eq!(contexts.len(), rows * width, "contexts are as many as queries");
        let to = Target::new(contexts.as_mut_ptr(), width);
        // SAFETY: `contexts` has the room.
        unsafe { product_here(Matrix::new(scores, tokens, rows, tokens), &self.values, to, &Shares(shares)) };
    }
}

impl Hidden {
    /// From hidden states `[tokens, width]`.
    pub(in crate::caption) fn new(hidden: &[f32], width: usize, Packing { isa, narrow }: Packing) -> Self {
        let hidden = Matrix::new(hidden, width, hidden.len() / width, width);
        if narrow { Self::Bf16(Both::new(isa, hidden)) } else { Self::Full(Both::new(isa, hidden)) }
    }

    /// Memory that it takes, in bytes.
    pub(in crate::caption) fn bytes(&self) -> usize {
        match self {
            Self::Full(both) => both.bytes(),
            Self::Bf16(both) => both.bytes(),
        }
    }

    /// What one of so many tokens takes, in bytes.
    pub(in crate::caption) fn bytes_for(tokens: usize, width: usize, Packing { isa, narrow }: Packing) -> usize {
        let columns = isa.columns();
        let numbers = tokens.next_multiple_of(columns) * width + width.next_multiple_of(columns) * tokens;
        numbers * if narrow { size_of::<bf16>() } else { size_of::<f32>() }
    }
}

/// Lets each row's queries attend to its image. A row has `each` folded queries of the images' width, and as many
/// contexts come of them; both are `[rows · each, width]`. `scale` is that of the heads.
pub(super) fn attend_hidden(images: &[&Hidden], queries: &[f32], each: usize, scale: f32) -> Vec<f32> {
    let size = queries.len() / images.len();
    let width = size / each;
    let of = |row: usize| Matrix::new(&queries[row * size..(row + 1) * size], width, each, width);
    if images.len() < rayon::current_num_threads() {
        let contexts = images.iter().enumerate().map(|(row, image)| match image {
            Hidden::Full(both) => both.attend(of(row), scale),
            Hidden::Bf16(both) => both.attend(of(row), scale),
        });
        return contexts.flatten().collect();
    }
    let mut contexts = vec![0.0; queries.len()];
    let rows = contexts.par_chunks_exact_mut(size).zip(images).enumerate();
    rows.for_each_init(Default::default, |scratch, (row, (contexts, image))| match image {
        Hidden::Full(both) => both.attend_here(of(row), scale, contexts, scratch),
        Hidden::Bf16(both) => both.attend_here(of(row), scale, contexts, scratch),
    });
    contexts
}

#[cfg(test)]
mod tests;
