//! Matrix products in f32 on a CPU, with right factors that are packed once, in f32 or bf16, and with what follows a
//! product done while its numbers are still in registers.
//!
//! The scheme is Goto's and van de Geijn's (Anatomy of High-Performance Matrix Multiplication, 2008): the result is made
//! in tiles whose sums stay in registers, from panels of the right factor, two registers wide, and from tiles of the left
//! one, [`Lanes::ROWS`] high, both stored in the order in which they are read.

use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use super::finish::{Finish, finish_row};
use super::lanes::{self, FIRST_CACHE, Isa, Lanes, One, SECOND_CACHE, for_isa, prefetch};
use super::packed::{Matrix, Number, Packed};

/// Steps of the inner dimension after which sums go to memory: a panel's part then stays in the first cache.
const DEPTH: usize = 384;
/// Numbers of the left factor that one task reads again for each panel, from the second cache.
const LEFT: usize = 64 << 10;
/// Bytes that come from memory at once.
const LINE: usize = 64;
/// Columns of the widest panel.
const WIDEST: usize = 2 * lanes::WIDEST;

/// Where a product goes: a row every `stride` numbers.
#[derive(Clone, Copy)]
pub(in crate::caption) struct Target {
    to: *mut f32,
    stride: usize,
}

// SAFETY: whoever holds one writes numbers that no other holder touches.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    /// Begins at `to`.
    pub(in crate::caption) fn new(to: *mut f32, stride: usize) -> Self {
        Self { to, stride }
    }

    /// The same, from a row and a column on.
    ///
    /// # Safety
    /// They must lie in the same allocation.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "a part of hot loops")]
    pub(in crate::caption) unsafe fn from(self, row: usize, column: usize) -> Self {
        // SAFETY: the caller's.
        Self { to: unsafe { self.to.add(row * self.stride + column) }, stride: self.stride }
    }

    /// Where it begins.
    pub(in crate::caption) fn pointer(self) -> *mut f32 {
        self.to
    }
}

/// A left factor, as tiles read it.
trait Left: Sync {
    /// Whether a tile's rows stand in memory as the matrix has them, not number after number.
    const ROW_BY_ROW: bool;

    /// A tile's numbers from a row and a step of the inner dimension on, and how far apart its rows are, where they are.
    fn tile(&self, row: usize, height: usize, step: usize) -> (*const f32, usize);
}

/// Packed in tiles, `[tiles, depth, rows of the tile]`; only the last may be lower than the others.
struct Tiles<'a> {
    packed: &'a [f32],
    depth: usize,
}

#[expect(clippy::inline_always, reason = "a part of hot loops")]
impl Left for Tiles<'_> {
    const ROW_BY_ROW: bool = false;

    #[inline(always)]
    fn tile(&self, row: usize, height: usize, step: usize) -> (*const f32, usize) {
        (self.packed[row * self.depth + step * height..].as_ptr(), 1)
    }
}

#[expect(clippy::inline_always, reason = "a part of hot loops")]
impl Left for Matrix<'_> {
    const ROW_BY_ROW: bool = true;

    #[inline(always)]
    fn tile(&self, row: usize, _: usize, step: usize) -> (*const f32, usize) {
        (self.values[row * self.stride + step..].as_ptr(), self.stride)
    }
}

/// `left · right`, finished, row by row: `[rows, width]`. On all cores.
pub(in crate::caption) fn product<N: Number>(left: Matrix<'_>, right: &Packed<N>, finish: &impl Finish) -> Vec<f32> {
    assert_eq!(left.width, right.depth, "the factors of a product do not fit");
    let size = left.rows * right.width;
    if right.depth == 0 || size == 0 {
        let mut nothing = vec![0.0; size];
        for (row, y) in nothing.chunks_exact_mut(right.width.max(1)).enumerate() {
            // SAFETY: every machine has these instructions.
            unsafe { finish_row::<One>(finish, y, row, 0) };
        }
        return nothing;
    }
    let mut y = Vec::with_capacity(size);
    let (height, columns) = (right.isa.rows(), right.isa.columns());
    let block = (LEFT / right.depth.min(DEPTH) / height).max(1);
    let packed = pack_left_in_parts(right.isa, left, block * height);
    let (tiles, panels) = (left.rows.div_ceil(height), right.width.div_ceil(columns));
    let tile_groups = Groups { things: tiles, count: tiles.div_ceil(block) };
    let enough = (4 * rayon::current_num_threads()).div_ceil(tile_groups.count);
    let panel_groups = Groups { things: panels, count: enough.min(panels) };
    let (rows, target) = (left.rows, Target::new(y.as_mut_ptr(), right.width));
    (0..tile_groups.count * panel_groups.count).into_par_iter().for_each(|task| {
        let tiles = tile_groups.range(task % tile_groups.count);
        let panels = panel_groups.range(task / tile_groups.count);
        // SAFETY: tasks write different tiles of `y`, which has room for all of them.
        let left = Tiles { packed: &packed, depth: right.depth };
        unsafe { part(right.isa, &left, rows, right, target, tiles, panels, finish) };
    });
    // SAFETY: every tile was written.
    unsafe { y.set_len(size) };
    y
}

/// `left · right` on the calling thread, for a left factor that stays in the first or second cache: it is read as it is.
///
/// # Safety
/// Nobody else may touch the `[rows, width]` numbers of `target` meanwhile, and it must have room for them.
pub(in crate::caption) unsafe fn product_here<N: Number>(
    left: Matrix<'_>,
    right: &Packed<N>,
    target: Target,
    finish: &impl Finish,
) {
    assert_eq!(left.width, right.depth, "the factors of a product do not fit");
    assert!(right.depth > 0, "an empty product");
    let (tiles, panels) = (left.rows.div_ceil(right.isa.rows()), right.width.div_ceil(right.isa.columns()));
    // SAFETY: the caller's.
    unsafe { part(right.isa, &left, left.rows, right, target, 0..tiles, 0..panels, finish) };
}

/// Packs a left factor, see [`Tiles`].
fn pack_left(isa: Isa, left: Matrix<'_>, tiles: &mut [MaybeUninit<f32>]) {
    let height = isa.rows();
    for (tile, to) in tiles.chunks_mut(height * left.width).enumerate() {
        let rows = left.part(tile * height..tile * height + to.len() / left.width);
        match rows.rows {
            6 => pack_tile::<6>(rows, to),
            12 => pack_tile::<12>(rows, to),
            count => {
                for row in 0..count {
                    for (to, x) in to[row..].iter_mut().step_by(count).zip(rows.row(row)) {
                        to.write(*x);
                    }
                }
            }
        }
    }
}

/// Packs a tile of so many rows, in the order in which it is written.
fn pack_tile<const ROWS: usize>(left: Matrix<'_>, to: &mut [MaybeUninit<f32>]) {
    let (steps, _) = to.as_chunks_mut::<ROWS>();
    let rows: [&[f32]; ROWS] = std::array::from_fn(|row| &left.row(row)[..steps.len()]);
    for (step, to) in steps.iter_mut().enumerate() {
        for (row, to) in to.iter_mut().enumerate() {
            to.write(rows[row][step]);
        }
    }
}

/// The same on all cores, so many rows at a time.
fn pack_left_in_parts(isa: Isa, left: Matrix<'_>, rows: usize) -> Vec<f32> {
    let size = left.rows * left.width;
    let mut packed = Vec::with_capacity(size);
    packed.spare_capacity_mut()[..size].par_chunks_mut(rows * left.width).enumerate().for_each(|(index, to)| {
        let first = index * rows;
        pack_left(isa, left.part(first..first + to.len() / left.width), to);
    });
    // SAFETY: all parts were packed.
    unsafe { packed.set_len(size) };
    packed
}

/// So many things in groups of nearly equal size.
#[derive(Clone, Copy)]
struct Groups {
    things: usize,
    count: usize,
}

impl Groups {
    fn range(self, group: usize) -> Range<usize> {
        let start = |group: usize| self.things * group / self.count;
        start(group)..start(group + 1)
    }
}

for_isa! {
    /// Makes the tiles of some rows and panels.
    ///
    /// # Safety
    /// Nobody else may touch these tiles, `target` must have room for them, and the machine must have the instructions.
    unsafe fn part<V>[N: Number, L: Left, F: Finish](
        left: &L,
        rows: usize,
        right: &Packed<N>,
        target: Target,
        tiles: Range<usize>,
        panels: Range<usize>,
        finish: &F,
    ) {
        let (depth, columns) = (right.depth, 2 * V::COUNT);
        // A left factor this low is read from the first cache in any case, and a panel then best in one go.
        let step = if tiles.len() <= 2 { depth } else { DEPTH };
        for from in (0..depth).step_by(step) {
            let to = (from + step).min(depth);
            for panel in panels.clone() {
                let column = panel * columns;
                let real = columns.min(right.width - column);
                let panel = &right.panels[panel * depth * columns..][from * columns..to * columns];
                // The next panel comes to the second cache while the tiles of this one are made, some lines with each. One or
                // two tiles leave no time for it; past the last panel nothing is lost.
                let next = panel.as_ptr().wrapping_add(depth * columns);
                let lines = if tiles.len() <= 2 { 0 } else { size_of_val(panel).div_ceil(LINE) };
                let share = lines.div_ceil(tiles.len().max(1));
                for tile in tiles.clone() {
                    let begun = (tile - tiles.start) * share;
                    for line in begun..(begun + share).min(lines) {
                        prefetch::<SECOND_CACHE, _>(next.wrapping_byte_add(line * LINE));
                    }
                    let row = tile * V::ROWS;
                    let height = V::ROWS.min(rows - row);
                    let (left, apart) = left.tile(row, height, from);
                    let tile = Tile {
                        left,
                        apart,
                        panel: panel.as_ptr(),
                        depth: to - from,
                        // SAFETY: the caller has room for it.
                        target: unsafe { target.from(row, column) },
                        row,
                        column,
                        real,
                        first: from == 0,
                        last: to == depth,
                    };
                    // SAFETY: both factors have so many steps, and the tile is the caller's.
                    unsafe { tile.make_rows::<V, L, F>(height, finish) };
                }
            }
        }
    }
}

/// One tile of a product.
struct Tile<N> {
    left: *const f32,
    /// From one row to the next, where the left factor has them row by row.
    apart: usize,
    panel: *const N,
    depth: usize,
    target: Target,
    /// Where in the product it begins.
    row: usize,
    column: usize,
    /// Columns that are there; the rest of the panel fills up.
    real: usize,
    /// Whether nothing is there yet to be added to.
    first: bool,
    /// Whether nothing will be added any more.
    last: bool,
}

#[expect(clippy::inline_always, reason = "compiled for each set of instructions")]
impl<N: Number> Tile<N> {
    /// # Safety
    /// The pointers must have what the sizes say, and the tile be nobody else's.
    #[inline(always)]
    unsafe fn make_rows<V: Lanes, L: Left, F: Finish>(&self, rows: usize, finish: &F) {
        macro_rules! one_of {
            ($($rows:literal)*) => {
                match rows {
                    // SAFETY: the caller's.
                    $($rows => unsafe { self.make::<V, L, F, $rows>(finish) },)*
                    _ => unreachable!("a tile has {} rows at most", V::ROWS),
                }
            };
        }
        if V::ROWS <= 6 { one_of!(1 2 3 4 5 6) } else { one_of!(1 2 3 4 5 6 7 8 9 10 11 12) }
    }

    /// # Safety
    /// As [`Self::make_rows`].
    #[inline(always)]
    unsafe fn make<V: Lanes, L: Left, F: Finish, const ROWS: usize>(&self, finish: &F) {
        // Before the loop: there, builds that look for overflow would do so at each step.
        let offsets: [usize; ROWS] = std::array::from_fn(|row| if L::ROW_BY_ROW { row * self.apart } else { row });
        // SAFETY: the caller's.
        unsafe {
            if !self.first {
                for row in 0..ROWS {
                    prefetch::<FIRST_CACHE, _>(self.target.from(row, 0).to);
                }
            }
            let mut sums = [[V::zero(); 2]; ROWS];
            let (mut left, mut panel) = (self.left, self.panel);
            for _ in 0..self.depth {
                let right = [N::load::<V>(panel), N::load::<V>(panel.add(V::COUNT))];
                for (row, sums) in sums.iter_mut().enumerate() {
                    let x = V::splat(*left.add(offsets[row]));
                    sums[0] = x.mul_add(right[0], sums[0]);
                    sums[1] = x.mul_add(right[1], sums[1]);
                }
                left = left.add(if L::ROW_BY_ROW { 1 } else { ROWS });
                panel = panel.add(2 * V::COUNT);
            }
            // By index: to iterate over an array by value would move the sums through memory.
            #[expect(clippy::needless_range_loop, reason = "see above")]
            for row in 0..ROWS {
                let [low, high] = sums[row];
                if self.real == 2 * V::COUNT {
                    self.settle(low, row, 0, finish);
                    self.settle(high, row, V::COUNT, finish);
                } else {
                    self.settle_some([low, high], row, finish);
                }
            }
        }
    }

    /// Takes sums to their place, which is so far from the tile's first.
    ///
    /// # Safety
    /// The place must be the tile's.
    #[inline(always)]
    unsafe fn settle<V: Lanes, F: Finish>(&self, sums: V, row: usize, column: usize, finish: &F) {
        // SAFETY: the caller's.
        unsafe {
            let to = self.target.from(row, column).to;
            let y = if self.first { sums } else { sums.add(V::load(to)) };
            let y = if self.last { finish.finish(y, self.row + row, self.column + column) } else { y };
            y.store(to);
        }
    }

    /// The same for a row of the last panel, which is not full.
    ///
    /// # Safety
    /// As [`Self::settle`].
    #[inline(always)]
    unsafe fn settle_some<V: Lanes, F: Finish>(&self, sums: [V; 2], row: usize, finish: &F) {
        let mut whole = [0f32; WIDEST];
        // SAFETY: no panel is wider, and the caller's.
        unsafe {
            sums[0].store(whole.as_mut_ptr());
            sums[1].store(whole.as_mut_ptr().add(V::COUNT));
            for (column, sum) in whole.iter().enumerate().take(self.real) {
                self.settle(One::load(sum), row, column, finish);
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
