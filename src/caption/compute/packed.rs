//! Matrices in the orders in which products read them.

use std::ops::Range;

use half::bf16;

use super::lanes::{Isa, Lanes};

/// A number as a right factor keeps it.
pub(in crate::caption) trait Number: Copy + Send + Sync + 'static {
    /// The nearest one.
    fn narrow(x: f32) -> Self;

    /// The value.
    fn value(self) -> f32;

    /// Reads a register of them.
    ///
    /// # Safety
    /// As [`Lanes::load`].
    unsafe fn load<V: Lanes>(from: *const Self) -> V;
}

#[expect(clippy::inline_always, reason = "a part of hot loops")]
impl Number for f32 {
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn value(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const Self) -> V {
        // SAFETY: the caller's.
        unsafe { V::load(from) }
    }
}

#[expect(clippy::inline_always, reason = "a part of hot loops")]
impl Number for bf16 {
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }

    #[inline(always)]
    fn value(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const Self) -> V {
        // SAFETY: the caller's.
        unsafe { V::widen(from) }
    }
}

/// A matrix `[rows, width]` in memory, a row every `stride` numbers.
#[derive(Clone, Copy)]
pub(in crate::caption) struct Matrix<'a> {
    pub(super) values: &'a [f32],
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) width: usize,
}

impl<'a> Matrix<'a> {
    /// Begins at the first of `values`, which have to reach to the end of the last row.
    pub(in crate::caption) fn new(values: &'a [f32], stride: usize, rows: usize, width: usize) -> Self {
        assert!(rows == 0 || (width <= stride && values.len() >= (rows - 1) * stride + width), "a matrix is too small");
        Self { values, stride, rows, width }
    }

    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        &self.values[row * self.stride..][..self.width]
    }

    /// The rows of a range.
    pub(super) fn part(&self, rows: Range<usize>) -> Self {
        Self { values: &self.values[rows.start * self.stride..], rows: rows.len(), ..*self }
    }
}

/// How factors are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::caption) struct Packing {
    /// What they are multiplied with.
    pub(in crate::caption) isa: Isa,
    /// In bf16, not in f32.
    pub(in crate::caption) narrow: bool,
}

/// A right factor `[depth, width]` in panels of columns, `[panels, depth, columns]`; the last is filled up with zeros.
pub(in crate::caption) struct Packed<N> {
    pub(super) isa: Isa,
    pub(super) depth: usize,
    pub(super) width: usize,
    pub(super) panels: Vec<N>,
}

impl<N: Number> Packed<N> {
    /// An empty factor, to be filled by [`Self::take_rows`] or [`Self::take_columns`].
    pub(in crate::caption) fn empty(isa: Isa) -> Self {
        // What is packed for some instructions is multiplied with them.
        assert!(isa.is_here(), "this machine has no {isa:?}");
        Self { isa, depth: 0, width: 0, panels: Vec::new() }
    }

    /// From a matrix whose rows are the factor's rows.
    pub(in crate::caption) fn of_rows(isa: Isa, rows: Matrix<'_>) -> Self {
        let mut packed = Self::empty(isa);
        packed.take_rows(rows);
        packed
    }

    /// From a matrix whose rows are the factor's columns.
    pub(in crate::caption) fn of_columns(isa: Isa, columns: Matrix<'_>) -> Self {
        let mut packed = Self::empty(isa);
        packed.take_columns(columns);
        packed
    }

    /// See [`Self::of_rows`].
    pub(in crate::caption) fn take_rows(&mut self, rows: Matrix<'_>) {
        self.reserve(rows.rows, rows.width);
        let columns = self.isa.columns();
        for (panel, to) in self.panels.chunks_exact_mut((self.depth * columns).max(1)).enumerate() {
            let (first, real) = (panel * columns, columns.min(self.width - panel * columns));
            for (row, to) in to.chunks_exact_mut(columns).enumerate() {
                for (to, x) in to.iter_mut().zip(&rows.row(row)[first..first + real]) {
                    *to = N::narrow(*x);
                }
            }
        }
    }

    /// See [`Self::of_columns`].
    pub(in crate::caption) fn take_columns(&mut self, from: Matrix<'_>) {
        self.reserve(from.width, from.rows);
        let columns = self.isa.columns();
        for (panel, to) in self.panels.chunks_exact_mut((self.depth * columns).max(1)).enumerate() {
            let (first, real) = (panel * columns, columns.min(self.width - panel * columns));
            for column in 0..real {
                for (to, x) in to[column..].iter_mut().step_by(columns).zip(from.row(first + column)) {
                    *to = N::narrow(*x);
                }
            }
        }
    }

    fn reserve(&mut self, depth: usize, width: usize) {
        (self.depth, self.width) = (depth, width);
        let columns = self.isa.columns();
        let length = width.div_ceil(columns) * depth * columns;
        if self.panels.len() != length || !width.is_multiple_of(columns) {
            self.panels.clear();
            self.panels.resize(length, N::narrow(0.0));
        }
    }

    /// One column, as it is kept.
    pub(in crate::caption) fn column(&self, column: usize) -> impl Iterator<Item = f32> {
        let columns = self.isa.columns();
        let panel = &self.panels[column / columns * self.depth * columns..][..self.depth * columns];
        panel[column % columns..].iter().step_by(columns).map(|x| x.value())
    }

    /// Memory that it takes, in bytes.
    pub(in crate::caption) fn bytes(&self) -> usize {
        self.panels.len() * size_of::<N>()
    }
}
