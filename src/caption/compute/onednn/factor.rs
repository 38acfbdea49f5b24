//! Products with right factors that oneDNN has packed.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;
use rayon::prelude::*;

use super::super::finish::{AsIs, Finish, finish_row};
use super::super::host::{narrow_row, quantize_row};
use super::super::lanes::{Isa, for_isa};
use super::super::packed::Matrix;
use super::super::product::Target;
use super::abi::{QUERY_SOURCE, QUERY_TARGET, QUERY_WEIGHTS, SOURCE, TARGET, WEIGHTS};
use super::plan::{Aligned, Descriptor, Plan};
use super::{Library, OneDnnError};

/// Tiles of a task, at most: with its columns they stay in the second cache.
const TILES: usize = 12;
/// Rows of a tile of AMX. Left factors are filled up to a multiple of them, and to two: so kernels are needed for a few
/// numbers of rows only, none of them for so few that they do not go with factors packed for many.
const TILE: usize = 16;
/// Numbers of the right factor of a task, at most, for the same reason.
const NUMBERS: usize = 256 << 10;
/// A task has at least so many columns, and a multiple of them.
pub(super) const COLUMNS: usize = 64;

/// The largest integer of activations.
const INT8: f32 = 127.0;

/// The largest integer of weights where sums of two products are held in 16 bits meanwhile (`vpmaddubsw`, on CPUs without
/// VNNI): an unsigned byte times it, twice, does not overflow.
const CAREFUL: f32 = 63.0;

impl Library {
    /// The largest integer of weights with which this library's sums are right on this CPU.
    pub(super) fn largest_weight(&'static self) -> Result<f32, OneDnnError> {
        if let Some(largest) = self.largest_weight.get() {
            return Ok(*largest);
        }
        let ones = [1.0; 64 * 64];
        let factor = Factor::pack(self, Number::Int8, &ones, 64, INT8)?;
        let sums = factor.product(Matrix::new(&ones, 64, 64, 64), &AsIs)?;
        let right = sums.iter().all(|sum| (sum - 64.0).abs() < 1e-3);
        Ok(*self.largest_weight.get_or_init(|| if right { INT8 } else { CAREFUL }))
    }
}

/// What both factors of a product are made of; their products are summed in 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::caption) enum Number {
    F32,
    Bf16,
    /// 8-bit integers: a scale for each column of the right factor, and one for each row of the left, found as it comes.
    Int8,
}

impl Number {
    /// Of `dnnl_types.h`: the factors', and the result's.
    fn kinds(self) -> (c_int, c_int) {
        match self {
            Self::F32 => (3, 3),
            Self::Bf16 => (2, 3),
            Self::Int8 => (5, 4),
        }
    }

    /// Bytes of one.
    pub(in crate::caption) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::F32 => "products of f32",
            Self::Bf16 => "products of bf16",
            Self::Int8 => "products of 8-bit integers",
        }
    }
}

/// A right factor `[depth, width]`.
pub(in crate::caption) struct Factor {
    library: &'static Library,
    number: Number,
    depth: usize,
    width: usize,
    chunks: Vec<Chunk>,
    /// Of each column, for integers.
    scales: Vec<f32>,
    /// By the rows and columns of a task.
    plans: Mutex<HashMap<(usize, usize), Arc<Plan>>>,
}

/// Cuts columns into tasks of so many. A small rest goes with the last of them: AMX has no kernel for integers of very few
/// columns.
pub(super) fn chunks(width: usize, columns: usize) -> impl Iterator<Item = Range<usize>> {
    let small_rest = width > columns && width % columns < COLUMNS;
    let count = if small_rest { width / columns } else { width.div_ceil(columns) };
    (0..count).map(move |index| index * columns..if index + 1 == count { width } else { (index + 1) * columns })
}

/// Some columns, packed.
struct Chunk {
    columns: Range<usize>,
    values: Aligned,
    /// Describes the values.
    packed_for: Arc<Plan>,
}

impl Factor {
    /// From a matrix whose rows are the factor's columns, as `weight` `[outputs, inputs]` is, without gaps.
    pub(in crate::caption) fn of_columns(
        library: &'static Library,
        number: Number,
        weight: &[f32],
        depth: usize,
    ) -> Result<Self, OneDnnError> {
        let most = if number == Number::Int8 { library.largest_weight()? } else { 0.0 };
        Self::pack(library, number, weight, depth, most)
    }

    /// The same; `most` is the largest integer of weights.
    fn pack(
        library: &'static Library,
        number: Number,
        weight: &[f32],
        depth: usize,
        most: f32,
    ) -> Result<Self, OneDnnError> {
        let width = weight.len() / depth;
        let plans = Mutex::default();
        let mut new = Self { library, number, depth, width, chunks: Vec::new(), scales: Vec::new(), plans };
        let (integers, kind): (Vec<i8>, _) = if number == Number::Int8 {
            let mut integers = vec![0; weight.len()];
            let rows = integers.chunks_exact_mut(depth).zip(weight.chunks_exact(depth));
            new.scales = rows.map(|(to, from)| quantize_row(to, from, most)).collect();
            (integers, number.kinds().0)
        } else {
            (Vec::new(), Number::F32.kinds().0)
        };
        let columns = (NUMBERS / depth / COLUMNS * COLUMNS).max(COLUMNS);
        for columns in chunks(width, columns) {
            let first = columns.start;
            let from: *const c_void = match number {
                Number::Int8 => integers[first * depth..].as_ptr().cast(),
                _ => weight[first * depth..].as_ptr().cast(),
            };
            let plain = library.describe([depth, columns.len()], kind, [1, depth])?;
            let plan = new.plan(TILES * TILE, columns.len())?;
            let mut values = Aligned::new(plan.bytes_of(QUERY_WEIGHTS));
            // SAFETY: the weight has these columns, and `values` has the size that the plan names.
            unsafe {
                let to = (plan.description_of(QUERY_WEIGHTS), values.pointer());
                library.reorder((plain.pointer(), from.cast_mut()), to)?;
            }
            new.chunks.push(Chunk { columns, values, packed_for: plan });
            // The fewest rows, so that a kernel that does not go with the packed ones is met here.
            new.plan(2 * TILE, new.chunks[new.chunks.len() - 1].columns.len())?;
        }
        Ok(new)
    }

    /// The kernel for tasks of this size.
    fn plan(&self, rows: usize, columns: usize) -> Result<Arc<Plan>, OneDnnError> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&(rows, columns)) {
            return Ok(Arc::clone(plan));
        }
        let (library, depth, (kind, result)) = (self.library, self.depth, self.number.kinds());
        let left = library.describe([rows, depth], kind, [depth, 1])?;
        // Without gaps: versions before 3.6 have a kernel for packed factors for such results only.
        let target = library.describe([rows, columns], result, [columns, 1])?;
        let any: Descriptor;
        let packed = self.chunks.iter().find(|chunk| chunk.columns.len() == columns);
        let right = if let Some(chunk) = packed {
            chunk.packed_for.description_of(QUERY_WEIGHTS)
        } else {
            any = library.describe_any([depth, columns], kind)?;
            any.pointer()
        };
        // SAFETY: `right` is a description, of a plan that is kept or of here.
        let plan = Arc::new(unsafe { library.plan(&left, right, &target)? });
        if plan.implementation().starts_with("ref") {
            return Err(OneDnnError::Slow { version: library.version().into(), what: self.number.name() });
        }
        plans.insert((rows, columns), Arc::clone(&plan));
        Ok(plan)
    }

    /// `left · self`, finished, row by row: `[rows, width]`. On all cores. `left` has no gaps.
    pub(in crate::caption) fn product(&self, left: Matrix<'_>, finish: &impl Finish) -> Result<Vec<f32>, OneDnnError> {
        assert_eq!((left.width, left.stride), (self.depth, self.depth), "the factors of a product do not fit");
        let rows = left.rows;
        let tiles = rows.div_ceil(TILE).max(2);
        let narrowed = Left::of(left, tiles * TILE, self.number);
        let blocks = tiles.div_ceil(TILES);
        let start = |block: usize| tiles * block / blocks * TILE;
        let mut y = Vec::with_capacity(rows * self.width);
        let target = Target::new(y.as_mut_ptr(), self.width);
        (0..blocks * self.chunks.len()).into_par_iter().try_for_each_init(Scratch::default, |scratch, task| {
            let (block, chunk) = (task % blocks, &self.chunks[task / blocks]);
            let (first, end, columns) = (start(block), start(block + 1), chunk.columns.clone());
            let plan = self.plan(end - first, columns.len())?;
            scratch.library.at_least(plan.scratchpad());
            scratch.result.at_least((end - first) * columns.len() * size_of::<f32>());
            let right: *const c_void = chunk.values.0.as_ptr().cast();
            let memory = [
                (SOURCE, plan.description_of(QUERY_SOURCE), narrowed.from(first).cast_mut()),
                (WEIGHTS, plan.description_of(QUERY_WEIGHTS), right.cast_mut()),
                (TARGET, plan.description_of(QUERY_TARGET), scratch.result.pointer()),
            ];
            let scales = narrowed.scales().map(|scales| (scales, &*self.scales));
            // SAFETY: factors are only read, and the scratch is this thread's; each task has numbers of its own in `y`,
            // which has room for all of them.
            unsafe {
                plan.run(&memory, &mut scratch.library)?;
                let result = scratch.result.pointer().cast_const().cast();
                finish_part(Isa::detect(), result, target, first..end.min(rows), columns, scales, finish);
            }
            Ok(())
        })?;
        // SAFETY: the tasks have written all of it.
        unsafe { y.set_len(rows * self.width) };
        Ok(y)
    }
}

/// What a thread needs for a task.
#[derive(Default)]
struct Scratch {
    library: Aligned,
    result: Aligned,
}

/// A left factor, in the numbers of the right one, filled up to some number of rows.
enum Left {
    F32(Vec<f32>, usize),
    Bf16(Vec<bf16>, usize),
    /// And the scale of each row.
    Int8(Vec<i8>, Vec<f32>, usize),
}

impl Left {
    fn of(left: Matrix<'_>, rows: usize, number: Number) -> Self {
        fn fill<T: Copy + Send>(to: &mut [T], left: Matrix<'_>, convert: impl Fn(&mut [T], &[f32]) + Sync) {
            let to = to.par_chunks_exact_mut(left.width).take(left.rows).enumerate();
            to.for_each(|(row, to)| convert(to, left.row(row)));
        }
        let width = left.width;
        match number {
            Number::F32 => {
                let mut same = vec![0.0; rows * width];
                fill(&mut same, left, |to, from| to.copy_from_slice(from));
                Self::F32(same, width)
            }
            Number::Bf16 => {
                let mut narrow = vec![bf16::ZERO; rows * width];
                fill(&mut narrow, left, narrow_row);
                Self::Bf16(narrow, width)
            }
            Number::Int8 => {
                let (mut integers, mut scales) = (vec![0; rows * width], vec![0.0; rows]);
                let to = integers.par_chunks_exact_mut(width).zip(&mut scales).take(left.rows).enumerate();
                to.for_each(|(row, (to, scale))| *scale = quantize_row(to, left.row(row), INT8));
                Self::Int8(integers, scales, width)
            }
        }
    }

    /// Its numbers from a row on.
    fn from(&self, row: usize) -> *const c_void {
        match self {
            Self::F32(same, width) => same[row * width..].as_ptr().cast(),
            Self::Bf16(narrow, width) => narrow[row * width..].as_ptr().cast(),
            Self::Int8(integers, _, width) => integers[row * width..].as_ptr().cast(),
        }
    }

    fn scales(&self) -> Option<&[f32]> {
        if let Self::Int8(_, scales, _) = self { Some(scales) } else { None }
    }
}

for_isa! {
    /// Takes a part of a product to its place, scales sums of integers by their row and column, and does what follows.
    ///
    /// # Safety
    /// `result` must have the part's numbers without gaps, nobody else may touch this part of `target`, which must have
    /// room for it, and the machine must have the instructions.
    unsafe fn finish_part<V>[F: Finish](
        result: *const f32,
        target: Target,
        rows: Range<usize>,
        columns: Range<usize>,
        scales: Option<(&[f32], &[f32])>,
        finish: &F,
    ) {
        for (index, row) in rows.enumerate() {
            // SAFETY: the caller's; the part is written before it is borrowed.
            let y = unsafe {
                let to = target.from(row, columns.start).pointer();
                std::ptr::copy_nonoverlapping(result.add(index * columns.len()), to, columns.len());
                std::slice::from_raw_parts_mut(to, columns.len())
            };
            if let Some((of_rows, of_columns)) = scales {
                for (y, scale) in y.iter_mut().zip(&of_columns[columns.clone()]) {
                    *y = y.to_bits().cast_signed() as f32 * (of_rows[row] * scale);
                }
            }
            // SAFETY: the caller's.
            unsafe { finish_row::<V>(finish, y, row, columns.start) };
        }
    }
}
