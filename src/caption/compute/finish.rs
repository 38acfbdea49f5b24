//! What is done with the numbers of a product as soon as they are whole, while they are still in registers.

use super::lanes::{Lanes, One};

/// What is done with the numbers of a finished product.
pub(in crate::caption) trait Finish: Sync {
    /// Finishes `y`, the numbers of `row` from `column` on.
    ///
    /// # Safety
    /// As the functions of [`Lanes`].
    unsafe fn finish<V: Lanes>(&self, y: V, row: usize, column: usize) -> V;
}

/// Nothing is done with them.
pub(in crate::caption) struct AsIs;
/// Adds the bias.
pub(super) struct Bias<'a>(pub(super) &'a [f32]);
/// Adds the bias and applies the exact GELU.
pub(super) struct BiasGelu<'a>(pub(super) &'a [f32]);
/// Adds the bias and a matrix of the result's shape.
pub(super) struct BiasAdd<'a>(pub(super) &'a [f32], pub(super) &'a [f32]);
/// Multiplies each row by its share.
pub(super) struct Shares<'a>(pub(super) &'a [f32]);

#[expect(clippy::inline_always, reason = "a part of hot loops")]
impl Finish for AsIs {
    #[inline(always)]
    unsafe fn finish<V: Lanes>(&self, y: V, _: usize, _: usize) -> V {
        y
    }
}

#[expect(clippy::inline_always, reason = "a part of hot loops")]
impl Finish for Bias<'_> {
    #[inline(always)]
    unsafe fn finish<V: Lanes>(&self, y: V, _: usize, column: usize) -> V {
        // SAFETY: the caller's.
        unsafe { y.add(from(self.0, column)) }
    }
}

#[expect(clippy::inline_always, reason = "a part of hot loops")]
impl Finish for BiasGelu<'_> {
    #[inline(always)]
    unsafe fn finish<V: Lanes>(&self, y: V, _: usize, column: usize) -> V {
        // SAFETY: the caller's.
        unsafe { gelu(y.add(from(self.0, column))) }
    }
}

#[expect(clippy::inline_always, reason = "a part of hot loops")]
impl Finish for BiasAdd<'_> {
    #[inline(always)]
    unsafe fn finish<V: Lanes>(&self, y: V, row: usize, column: usize) -> V {
        // SAFETY: the caller's.
        unsafe { y.add(from(self.0, column)).add(from(self.1, row * self.0.len() + column)) }
    }
}

#[expect(clippy::inline_always, reason = "a part of hot loops")]
impl Finish for Shares<'_> {
    #[inline(always)]
    unsafe fn finish<V: Lanes>(&self, y: V, row: usize, _: usize) -> V {
        // SAFETY: the caller's.
        unsafe { y.mul(V::splat(self.0[row])) }
    }
}

/// Finishes numbers in memory.
///
/// # Safety
/// As the functions of [`Lanes`].
#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled for each set of instructions")]
pub(super) unsafe fn finish_row<V: Lanes>(finish: &impl Finish, y: &mut [f32], row: usize, column: usize) {
    let (to, whole) = (y.as_mut_ptr(), y.len() / V::COUNT * V::COUNT);
    // SAFETY: the numbers are there.
    unsafe {
        for at in (0..whole).step_by(V::COUNT) {
            finish.finish(V::load(to.add(at)), row, column + at).store(to.add(at));
        }
        for at in whole..y.len() {
            finish.finish(One::load(to.add(at)), row, column + at).store(to.add(at));
        }
    }
}

/// Numbers of a slice.
#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled for each set of instructions")]
unsafe fn from<V: Lanes>(numbers: &[f32], first: usize) -> V {
    // SAFETY: the slice has them.
    unsafe { V::load(numbers[first..first + V::COUNT].as_ptr()) }
}

/// The exact GELU, x · (1 + erf(x / √2)) / 2.
#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled for each set of instructions")]
unsafe fn gelu<V: Lanes>(x: V) -> V {
    // SAFETY: the caller's.
    unsafe {
        let half = x.mul(V::splat(0.5));
        erf(x.mul(V::splat(std::f32::consts::FRAC_1_SQRT_2))).mul_add(half, half)
    }
}

/// erf x to within 1e-6: the rational approximation of Eigen (`generic_fast_erf_float`) on [−4, 4], beyond which erf is
/// ±1 in f32.
#[inline(always)]
#[expect(clippy::excessive_precision, clippy::inline_always, reason = "constants as published; a part of hot loops")]
unsafe fn erf<V: Lanes>(x: V) -> V {
    // SAFETY: the caller's.
    unsafe {
        let number = |x: f32| V::splat(x);
        // In this order what is no number stays so.
        let x = number(4.0).min(number(-4.0).max(x));
        let square = x.mul(x);
        let above = number(-2.726_142_258_013_06e-10);
        let above = above.mul_add(square, number(2.770_681_424_959_02e-8));
        let above = above.mul_add(square, number(-2.101_024_020_825_08e-6));
        let above = above.mul_add(square, number(-5.692_506_394_623_46e-5));
        let above = above.mul_add(square, number(-7.349_906_303_268_55e-4));
        let above = above.mul_add(square, number(-2.954_599_808_540_25e-3));
        let above = above.mul_add(square, number(-1.609_603_332_624_15e-2));
        let below = number(-1.456_607_184_649_96e-5);
        let below = below.mul_add(square, number(-2.133_740_552_789_05e-4));
        let below = below.mul_add(square, number(-1.682_826_974_382_03e-3));
        let below = below.mul_add(square, number(-7.373_329_167_204_68e-3));
        let below = below.mul_add(square, number(-1.426_473_905_141_89e-2));
        x.mul(above).div(below)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::super::lanes::{Isa, for_isa};
    use super::*;

    for_isa! {
        unsafe fn finish_here<V>[F: Finish](finish: &F, y: &mut [f32], row: usize, column: usize) {
            // SAFETY: the machine has the instructions.
            unsafe { finish_row::<V>(finish, y, row, column) };
        }
    }

    /// A row whose end fills no register is finished with every set of instructions that is here.
    fn assert_finished(
        finish: &impl Finish,
        (row, width): (usize, usize),
        error: f32,
        expected: impl Fn(&Tensor) -> Tensor,
    ) {
        let mut random = fastrand::Rng::with_seed(7);
        let x: Vec<f32> = (0..width).map(|_| random.f32() * 12.0 - 6.0).collect();
        let expected: Vec<f32> = expected(&Tensor::new(&*x, &Device::Cpu).unwrap()).to_vec1().unwrap();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
            let mut y = x.clone();
            // SAFETY: the machine has the instructions.
            unsafe { finish_here(isa, finish, &mut y, row, 0) };
            for (index, (y, expected)) in y.iter().zip(&expected).enumerate() {
                assert!((y - expected).abs() < error, "{isa:?}: {y} is not {expected}, of {}", x[index]);
            }
        }
    }

    /// Nothing but the error function.
    struct Erf;

    impl Finish for Erf {
        unsafe fn finish<V: Lanes>(&self, y: V, _: usize, _: usize) -> V {
            // SAFETY: the caller's.
            unsafe { erf(y) }
        }
    }

    #[test]
    fn every_finish_equals_candles_operations() {
        let bias: Vec<f32> = (0..1031_u16).map(|x| f32::from(x % 17) / 8.0 - 1.0).collect();
        let residual: Vec<f32> = (0..3 * 1031_u16).map(|x| f32::from(x % 23) / 7.0).collect();
        let added = |x: &Tensor| (x + Tensor::new(&*bias, &Device::Cpu).unwrap()).unwrap();
        let third = Tensor::new(&residual[2 * 1031..], &Device::Cpu).unwrap();
        assert_finished(&Erf, (0, 100_003), 1e-6, |x| x.erf().unwrap());
        assert_finished(&AsIs, (0, 1031), f32::MIN_POSITIVE, Tensor::clone);
        assert_finished(&Bias(&bias), (1, 1031), 1e-6, added);
        assert_finished(&BiasGelu(&bias), (1, 1031), 5e-6, |x| added(x).gelu_erf().unwrap());
        assert_finished(&BiasAdd(&bias, &residual), (2, 1031), 2e-6, |x| (added(x) + &third).unwrap());
        assert_finished(&Shares(&[0.0, 0.5]), (1, 1031), 1e-6, |x| (x * 0.5).unwrap());
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let mut y = [f32::NAN; 9];
        // SAFETY: every machine has these instructions.
        unsafe { finish_row::<One>(&BiasGelu(&[0.0; 9]), &mut y, 0, 0) };
        assert!(y.iter().all(|y| y.is_nan()));
        // SAFETY: the machine has what was detected.
        unsafe { finish_here(Isa::detect(), &BiasGelu(&[0.0; 9]), &mut y, 0, 0) };
        assert!(y.iter().all(|y| y.is_nan()));
    }
}
