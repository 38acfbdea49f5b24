//! Kernels on rows of f32 on a CPU: one pass over the data each, in loops that the compiler turns into vector
//! instructions.
//!
//! Baseline x86-64 has 4 lanes only, so each kernel is compiled for wider registers too and chosen at run time.

use half::bf16;
use rayon::prelude::*;

use super::lanes::Isa;
use super::softmax::softmax;

/// Independent partial sums of a reduction, so that it can be done in vector registers.
const LANES: usize = 16;
/// Elements that are worth handing to another thread.
const GRAIN: usize = 16 << 10;

/// Compiles a function for the widest registers that the machine may have.
macro_rules! wide {
    ($(#[$doc:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$doc])*
        $visibility fn $name($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn plain($($argument: $type),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f")]
                fn avx512($($argument: $type),*) $(-> $result)? { plain($($argument),*) }
                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $type),*) $(-> $result)? { plain($($argument),*) }
                if is_x86_feature_detected!("avx512f") {
                    // SAFETY: the machine has the instructions.
                    return unsafe { avx512($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the machine has the instructions.
                    return unsafe { avx2($($argument),*) };
                }
            }
            plain($($argument),*)
        }
    };
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "a part of hot loops")]
fn reduce(row: &[f32], start: f32, fold: impl Fn(f32, f32) -> f32, combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = fold(*lane, *x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = fold(*lane, *x);
    }
    lanes.into_iter().fold(start, combine)
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "a part of hot loops")]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

wide! {
    fn norm_row(to: &mut [f32], from: &[f32], weight: &[f32], bias: &[f32], eps: f32) {
        let count = from.len() as f32;
        let mean = reduce(from, 0.0, |sum, x| sum + x, |a, b| a + b) / count;
        let variance = reduce(from, 0.0, |sum, x| sum + (x - mean) * (x - mean), |a, b| a + b) / count;
        let scale = 1.0 / (variance + eps).sqrt();
        for (((y, x), w), b) in to.iter_mut().zip(from).zip(weight).zip(bias) {
            *y = (x - mean) * scale * w + b;
        }
    }
}

/// One head's attention of one query on `length` remembered keys and values, both stored `[head, stride]`: a key is a
/// column. `scores` is scratch of at least `length`.
pub(in crate::caption) struct Head<'a> {
    pub(in crate::caption) keys: &'a [f32],
    pub(in crate::caption) values: &'a [f32],
    pub(in crate::caption) stride: usize,
    pub(in crate::caption) length: usize,
}

impl Head<'_> {
    /// Writes the context of `query` to `context`, both of the head's width.
    pub(in crate::caption) fn attend(&self, query: &[f32], context: &mut [f32], scores: &mut [f32]) {
        let scores = &mut scores[..self.length];
        weighted_sum(scores, self.keys, self.stride, query);
        softmax(Isa::detect(), scores, 1.0 / (query.len() as f32).sqrt());
        dot_products(context, self.values, self.stride, scores);
    }
}

wide! {
    /// `sums[j] = Σ weights[i] · rows[i][j]`, where `rows` has a row every `stride` elements.
    fn weighted_sum(sums: &mut [f32], rows: &[f32], stride: usize, weights: &[f32]) {
        sums.fill(0.0);
        let length = sums.len();
        let row = |index: usize| &rows[index * stride..index * stride + length];
        let (fours, rest) = weights.as_chunks::<4>();
        for (index, w) in fours.iter().enumerate() {
            // Four rows at a time: the sums are read and written a quarter as often.
            let first = index * 4;
            let (a, b, c, d) = (row(first), row(first + 1), row(first + 2), row(first + 3));
            for ((((sum, a), b), c), d) in sums.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                *sum += w[0] * a + w[1] * b + w[2] * c + w[3] * d;
            }
        }
        for (index, w) in rest.iter().enumerate() {
            for (sum, x) in sums.iter_mut().zip(row(fours.len() * 4 + index)) {
                *sum += w * x;
            }
        }
    }
}

wide! {
    /// `products[i] = Σ rows[i][j] · vector[j]`, where `rows` has a row every `stride` elements.
    fn dot_products(products: &mut [f32], rows: &[f32], stride: usize, vector: &[f32]) {
        for (index, product) in products.iter_mut().enumerate() {
            let row = &rows[index * stride..index * stride + vector.len()];
            let mut lanes = [0.0; LANES];
            let (chunks, rest) = row.as_chunks::<LANES>();
            let (factors, last) = vector.as_chunks::<LANES>();
            for (chunk, factor) in chunks.iter().zip(factors) {
                for ((lane, x), y) in lanes.iter_mut().zip(chunk).zip(factor) {
                    *lane += x * y;
                }
            }
            for ((lane, x), y) in lanes.iter_mut().zip(rest).zip(last) {
                *lane += x * y;
            }
            *product = lanes.iter().sum();
        }
    }
}

wide! {
    /// Rounds to the nearest bf16, ties to even.
    pub(super) fn narrow_row(to: &mut [bf16], from: &[f32]) {
        for (to, x) in to.iter_mut().zip(from) {
            let bits = x.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
            // Rounding could make a number of what is none.
            *to = bf16::from_bits(if x.is_nan() { 0x7fc0 } else { rounded as u16 });
        }
    }
}

wide! {
    /// The nearest multiples of the scale that is returned, of which the largest becomes ±`most`, 127 or less. The scale of
    /// a row that has what is no number is none.
    pub(super) fn quantize_row(to: &mut [i8], from: &[f32], most: f32) -> f32 {
        let largest = reduce(from, 0.0, |top, x| larger(top, x.abs()), larger);
        let finite = reduce(from, 0.0, |sum, x| sum + x * 0.0, |a, b| a + b);
        let inverse = if largest > 0.0 { most / largest } else { 0.0 };
        for (to, x) in to.iter_mut().zip(from) {
            // Adding 1.5 · 2²³ rounds to an integer, which then stands in the lowest bits.
            *to = (x * inverse + 12_582_912.0).to_bits() as i8;
        }
        largest / most + finite
    }
}

/// Layer normalisation of each row of `x`, as wide as `weight` and `bias`. On all cores where it is worth it.
pub(super) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    let mut y = vec![0.0; x.len()];
    let rows = (GRAIN / width).max(1);
    y.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width)).for_each(|(y, x)| {
        for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            norm_row(y, x, weight, bias, eps);
        }
    });
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{D, Device, Tensor};

    fn values(count: usize, spread: f32) -> Vec<f32> {
        let mut state = 1u32;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((state >> 8) as f32 / (1u32 << 24) as f32 - 0.5) * 2.0 * spread
            })
            .collect()
    }

    fn tensor(shape: (usize, usize), spread: f32) -> Tensor {
        Tensor::from_vec(values(shape.0 * shape.1, spread), shape, &Device::Cpu).unwrap()
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn every_kernel_equals_candles_operations() {
        // An odd width, so that the ends of rows that do not fill a register are covered; more rows than one thread takes.
        let shape = (1031, 77);
        let (x, bias) = (tensor(shape, 3.0), tensor((1, 77), 1.0).squeeze(0).unwrap());
        let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let close = |ours: Vec<f32>, theirs: &Tensor| {
            let ours = Tensor::from_vec(ours, shape, &Device::Cpu).unwrap();
            assert!(largest_difference(&ours, theirs) < 5e-6);
        };
        let rows = |kernel: &dyn Fn(&mut [f32])| {
            let mut y = flat(&x);
            y.chunks_exact_mut(77).for_each(kernel);
            y
        };
        let theirs = candle_nn::ops::softmax(&(&x * 0.7).unwrap(), D::Minus1).unwrap();
        close(rows(&|row| softmax(Isa::detect(), row, 0.7)), &theirs);
        let weight = tensor((1, 77), 1.0).squeeze(0).unwrap();
        let theirs = candle_nn::ops::layer_norm_slow(&x, &weight, &bias, 1e-5).unwrap();
        close(layer_norm(&flat(&x), &flat(&weight), &flat(&bias), 1e-5), &theirs);
    }

    #[test]
    fn a_heads_attention_equals_the_formula() {
        let (head, stride, length) = (13, 40, 37);
        let (keys, values, query) = (tensor((head, stride), 2.0), tensor((head, stride), 1.0), tensor((1, head), 2.0));
        let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (mut context, mut scores) = (vec![0.0; head], vec![0.0; stride]);
        Head { keys: &flat(&keys), values: &flat(&values), stride, length }.attend(
            &flat(&query),
            &mut context,
            &mut scores,
        );
        let seen = |tensor: &Tensor| tensor.narrow(1, 0, length).unwrap().contiguous().unwrap();
        let theirs = (query.matmul(&seen(&keys)).unwrap() / (head as f64).sqrt()).unwrap();
        let theirs = candle_nn::ops::softmax(&theirs, D::Minus1).unwrap();
        let theirs = theirs.matmul(&seen(&values).t().unwrap()).unwrap();
        let ours = Tensor::from_vec(context, (1, head), &Device::Cpu).unwrap();
        assert!(largest_difference(&ours, &theirs) < 5e-6);
    }
}
