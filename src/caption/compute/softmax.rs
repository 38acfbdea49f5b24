//! Exponentials of rows of scores, in f32 on a CPU.

use super::lanes::{Isa, Lanes, WIDEST, for_isa};

/// Replaces each number x of a row by e^(scale · x − the row's largest); `shares` gets what makes the sum of a row 1.
/// A row that has what is no number becomes none.
pub(super) fn exponentials(isa: Isa, rows: &mut [f32], width: usize, scale: f32, shares: &mut [f32]) {
    assert!(isa.is_here() && rows.len() == width * shares.len(), "rows of exponentials");
    // SAFETY: the machine has the instructions.
    unsafe { exponentials_of_rows(isa, rows, width, scale, shares) };
}

/// The softmax of `scale · row`, in place.
pub(super) fn softmax(isa: Isa, row: &mut [f32], scale: f32) {
    let (width, mut share) = (row.len(), [0.0]);
    exponentials(isa, row, width, scale, &mut share);
    for x in row {
        *x *= share[0];
    }
}

/// The logarithm of the sum of the exponentials of `row`.
pub(in crate::caption) fn log_sum_exp(row: &[f32]) -> f32 {
    let mut sum = [0.0; 2];
    // SAFETY: the machine has what was detected.
    unsafe { top_and_sum(Isa::detect(), row, &mut sum) };
    sum[0] + sum[1].ln()
}

for_isa! {
    unsafe fn exponentials_of_rows<V>[](rows: &mut [f32], width: usize, scale: f32, shares: &mut [f32]) {
        for (row, share) in rows.chunks_exact_mut(width).zip(shares) {
            let to = row.as_mut_ptr();
            // SAFETY: the row is as long as it says, and what is read is written at the same place only.
            *share = unsafe { 1.0 / sum_of::<V>(to, width, scale, top_of::<V>(to, width) * scale, Some(to)) };
        }
    }
}

for_isa! {
    unsafe fn top_and_sum<V>[](row: &[f32], result: &mut [f32; 2]) {
        // SAFETY: the row is as long as it says.
        unsafe {
            result[0] = top_of::<V>(row.as_ptr(), row.len());
            result[1] = sum_of::<V>(row.as_ptr(), row.len(), 1.0, result[0], None);
        }
    }
}

/// The largest number. What is none loses every comparison; it comes back in the exponentials.
#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled for each set of instructions")]
unsafe fn top_of<V: Lanes>(row: *const f32, length: usize) -> f32 {
    // SAFETY: the caller has so many numbers there.
    unsafe {
        let mut top = V::splat(f32::NEG_INFINITY);
        let whole = length / V::COUNT * V::COUNT;
        for at in (0..whole).step_by(V::COUNT) {
            top = V::load(row.add(at)).max(top);
        }
        top = end::<V>(row.add(whole), length - whole, f32::NEG_INFINITY).max(top);
        lanes(top).into_iter().take(V::COUNT).fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
}

/// The sum of e^(scale · x − top), which are also stored where there is a place for them.
#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled for each set of instructions")]
unsafe fn sum_of<V: Lanes>(row: *const f32, length: usize, scale: f32, top: f32, to: Option<*mut f32>) -> f32 {
    // SAFETY: the caller has so many numbers there, and room for as many.
    unsafe {
        let (scale, below) = (V::splat(scale), V::splat(-top));
        let mut sum = V::zero();
        let whole = length / V::COUNT * V::COUNT;
        for at in (0..whole).step_by(V::COUNT) {
            let y = exp(V::load(row.add(at)).mul_add(scale, below));
            sum = sum.add(y);
            if let Some(to) = to {
                y.store(to.add(at));
            }
        }
        let mut sum: f32 = lanes(sum).into_iter().take(V::COUNT).sum();
        let last = lanes(exp(end::<V>(row.add(whole), length - whole, 0.0).mul_add(scale, below)));
        for (index, y) in last.into_iter().enumerate().take(length - whole) {
            sum += y;
            if let Some(to) = to {
                to.add(whole + index).write(y);
            }
        }
        sum
    }
}

/// The numbers at the end of a row that do not fill a register, filled up.
#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled for each set of instructions")]
unsafe fn end<V: Lanes>(from: *const f32, count: usize, filler: f32) -> V {
    let mut whole = [filler; WIDEST];
    // SAFETY: the caller has so many numbers there, fewer than a register holds.
    unsafe {
        std::ptr::copy_nonoverlapping(from, whole.as_mut_ptr(), count);
        V::load(whole.as_ptr())
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled for each set of instructions")]
unsafe fn lanes<V: Lanes>(x: V) -> [f32; WIDEST] {
    let mut lanes = [0.0; WIDEST];
    // SAFETY: no register is wider.
    unsafe { x.store(lanes.as_mut_ptr()) };
    lanes
}

/// eˣ to within 2 units in the last place (Cephes `expf`): 2ⁿ times a polynomial on [−ln 2 / 2, ln 2 / 2].
#[inline(always)]
#[expect(clippy::excessive_precision, reason = "constants as published")]
unsafe fn exp<V: Lanes>(x: V) -> V {
    // Adding 1.5 · 2²³ rounds to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // SAFETY: the caller's.
    unsafe {
        let number = |x: f32| V::splat(x);
        // In this order what is no number stays so.
        let x = number(88.3).min(number(-87.3).max(x));
        let shifted = x.mul_add(number(std::f32::consts::LOG2_E), number(ROUND));
        let twos = shifted.add(number(-ROUND));
        let r = twos.mul_add(number(-0.693_359_375), x);
        let r = twos.mul_add(number(2.121_944_4e-4), r);
        let p = number(1.987_569_15e-4);
        let p = p.mul_add(r, number(1.398_199_95e-3));
        let p = p.mul_add(r, number(8.333_451_9e-3));
        let p = p.mul_add(r, number(4.166_579_6e-2));
        let p = p.mul_add(r, number(1.666_666_55e-1));
        let p = p.mul_add(r, number(5.000_000_1e-1));
        let y = p.mul_add(r.mul(r), r.add(number(1.0)));
        y.mul(shifted.power_of_two())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scores of both signs, far and near, in rows that do and do not fill registers.
    fn scores(width: usize) -> Vec<f32> {
        let mut random = fastrand::Rng::with_seed(width as u64);
        (0..width).map(|_| (random.f32() - 0.5) * if random.bool() { 160.0 } else { 4.0 }).collect()
    }

    #[test]
    fn exponentials_are_as_near_as_they_say_on_every_machine() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
            for width in [1, 3, 8, 17, 577] {
                let before = scores(3 * width);
                let (mut rows, mut shares) = (before.clone(), [0.0; 3]);
                exponentials(isa, &mut rows, width, 0.5, &mut shares);
                for ((before, row), share) in before.chunks(width).zip(rows.chunks(width)).zip(shares) {
                    let top = before.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let exact: Vec<f64> = before.iter().map(|x| f64::from(x - top).mul_add(0.5, 0.0).exp()).collect();
                    for (x, exact) in row.iter().zip(&exact) {
                        // The argument, of 80 at most, is rounded to f32.
                        assert!((f64::from(*x) - exact).abs() < 1e-5 * exact + 1e-37, "{isa:?}: {x} is not {exact}");
                    }
                    let sum: f64 = exact.iter().sum();
                    assert!((f64::from(share) * sum - 1.0).abs() < 1e-5, "{isa:?}");
                }
            }
        }
    }

    #[test]
    fn a_single_exponential_is_within_two_units_in_the_last_place() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
            for x in (0..8_700).map(|x| x as f32 * -0.01) {
                let (mut row, mut share) = ([0.0, x], [0.0]);
                exponentials(isa, &mut row, 2, 1.0, &mut share);
                assert!((f64::from(row[1]) / f64::from(x).exp() - 1.0).abs() < 3e-7, "{isa:?}: {x}");
            }
        }
    }

    #[test]
    fn a_row_with_what_is_no_number_becomes_none_and_others_do_not() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
            for at in [0, 7, 16] {
                let mut rows = vec![0.5; 34];
                rows[at] = f32::NAN;
                let mut shares = [0.0; 2];
                exponentials(isa, &mut rows, 17, 1.0, &mut shares);
                assert!(rows[at].is_nan() && shares[0].is_nan(), "{isa:?}");
                assert!((shares[1] - 1.0 / 17.0).abs() < 1e-7, "{isa:?}");
            }
        }
        assert!(log_sum_exp(&[0.0, f32::NAN]).is_nan());
    }

    #[test]
    fn the_logarithm_of_a_sum_survives_large_scores() {
        assert!((log_sum_exp(&[1000.0, 1000.0]) - (1000.0 + 2f32.ln())).abs() < 1e-4);
        assert!((log_sum_exp(&[-1e9, 3.0]) - 3.0).abs() < 1e-6);
    }
}
