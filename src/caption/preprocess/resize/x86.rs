//! The passes in vector instructions of x86-64: what the kernels have in common.
//!
//! A kernel of the horizontal pass first splits four rows into groups of four pixels with their channels apart, once,
//! since each pixel is a neighbour of several; the sums then run over aligned registers. A kernel of the vertical pass
//! takes a register of columns and interleaves four rows of it.
//!
//! Their inner loops do without `zip` and `map`, which stay calls where the profile has no link-time optimisation.

pub(super) mod avx2;
pub(super) mod vnni;

use std::arch::x86_64::{__m128i, _mm_cvtsi32_si128, _mm_cvtsi64_si128, _mm_unpacklo_epi64};

use super::weights::{GROUP, Weights};

/// Rows that the horizontal pass takes at a time.
const ROWS: usize = 4;

/// Bytes of a group of pixels.
const BYTES: usize = GROUP * 3;

/// The windows of a pass, in groups of neighbours, with weights as a kernel wants them.
struct Windows<W> {
    /// First neighbour of each pixel of the result, as in [`Weights`].
    starts: Vec<usize>,
    /// Groups of each pixel.
    groups: usize,
    /// `groups` weights of each pixel.
    weights: Vec<W>,
}

impl<W> Windows<W> {
    /// `weights` must be in groups.
    fn new(weights: &Weights, split: impl Fn(&[i32; GROUP]) -> W) -> Self {
        let split = weights.values.as_chunks().0.iter().map(split).collect();
        Self { starts: weights.starts.clone(), groups: weights.taps / GROUP, weights: split }
    }

    /// First neighbour and weights of each pixel.
    fn iter(&self) -> impl Iterator<Item = (usize, &[W])> {
        self.starts.iter().copied().zip(self.weights.chunks_exact(self.groups))
    }

    /// Groups of a row of `width` pixels, and of what the windows take beyond it.
    fn groups_of_row(&self, width: usize) -> usize {
        let beyond = self.starts.iter().max().map_or(0, |start| start / GROUP + self.groups);
        width.div_ceil(GROUP).max(beyond)
    }
}

/// Four rows of a picture, in groups of pixels.
struct Rows<'a> {
    whole: [&'a [[u8; BYTES]]; ROWS],
    /// What is left of each row, followed by 0s.
    last: [[u8; BYTES]; ROWS],
}

impl<'a> Rows<'a> {
    /// The first rows of `width` pixels; the last one is repeated where there are fewer than four.
    fn new(source: &'a [u8], width: usize) -> Self {
        let length = width * 3;
        let end = source.len() / length - 1;
        let mut rows = Self { whole: [&[]; ROWS], last: [[0; BYTES]; ROWS] };
        for i in 0..ROWS {
            let (whole, rest) = source[i.min(end) * length..][..length].as_chunks();
            rows.whole[i] = whole;
            rows.last[i][..rest.len()].copy_from_slice(rest);
        }
        rows
    }
}

/// A group in the lower bytes of a register.
#[target_feature(enable = "avx2")]
#[inline]
fn load(group: &[u8; BYTES]) -> __m128i {
    let (low, rest) = group.split_at(8);
    let low = i64::from_le_bytes(low.try_into().expect("8 of 12 bytes"));
    let rest = i32::from_le_bytes(rest.try_into().expect("4 of 12 bytes"));
    _mm_unpacklo_epi64(_mm_cvtsi64_si128(low), _mm_cvtsi32_si128(rest))
}

/// Writes a group of pixels into each of four rows of `width` pixels, as far as rows and pixels exist.
fn put(pixels: &[[u8; 16]; ROWS], rows: &mut [u8], width: usize, group: usize) {
    for (i, row) in rows.chunks_exact_mut(width * 3).enumerate() {
        let (row, pixels) = (&mut row[group * BYTES..], &pixels[i]);
        match (row.first_chunk_mut::<BYTES>(), pixels.first_chunk()) {
            (Some(row), Some(pixels)) => *row = *pixels,
            _ => put_part(row, pixels),
        }
    }
}

/// Apart, since one copy for both cases would be a call of `memcpy`.
#[cold]
#[inline(never)]
fn put_part(row: &mut [u8], pixels: &[u8]) {
    row.copy_from_slice(&pixels[..row.len()]);
}
