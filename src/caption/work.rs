//! What a caption costs at least, and what a machine can give: to judge a measurement by.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::Serialize;

use super::compute::{self, Isa};
use super::config::BlipConfig;
use super::weights::Kept;

/// How long each ceiling is looked for.
const LOOK: Duration = Duration::from_millis(1500);
/// Numbers that are read to find the memory's speed: more than the caches of most machines hold.
const NUMBERS: usize = 96 << 20;

/// Arithmetic and memory traffic of a model, from its sizes alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Operations to encode an image, a multiplication and an addition being two.
    pub encode: f64,
    /// Operations for one token of one caption, attention left out.
    pub token: f64,
    /// Weights that each step of the decoder reads, in numbers.
    pub step_weights: f64,
}

impl BlipConfig {
    /// What this model's captions cost at least; `folded` where the projections of an image's keys and values are folded
    /// into each step instead of being made once.
    pub(super) fn work(&self, folded: bool) -> Work {
        let (text, vision) = (&self.text, &self.vision);
        let [tokens, width, inner] = [vision.tokens(), vision.hidden_size, vision.intermediate_size].map(|x| x as f64);
        let patch = 3.0 * (vision.patch_size * vision.patch_size) as f64;
        let layer = tokens * (4.0 * width * width + 2.0 * width * inner) + 2.0 * tokens * tokens * width;
        let encode = vision.num_hidden_layers as f64 * layer + (tokens - 1.0) * patch * width;
        let image = if folded { 2.0 * width } else { 0.0 };
        let [width, inner, words] = [text.hidden_size, text.intermediate_size, text.vocab_size].map(|x| x as f64);
        let layer = 6.0 * width * width + image * width + 2.0 * width * inner;
        let step_weights = text.num_hidden_layers as f64 * layer + width * width + width * words;
        Work { encode: 2.0 * encode, token: 2.0 * step_weights, step_weights }
    }
}

/// The side of a GPU's product, and the numbers that it copies: large enough to be at its best, small beside its memory.
const DEVICE_SIZES: (usize, usize) = (8192, 256 << 20);

/// What a device can give, measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ceilings {
    /// Operations a second in f32 on numbers that stay in registers, with the best instructions that a CPU has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multiply_adds: Option<f64>,
    /// Operations a second of a product in the encoder's precision: on a CPU one as large as the encoder's, on its kernels,
    /// on a GPU a larger one.
    pub product: f64,
    /// Bytes a second read from memory, on a GPU read and written.
    pub memory: f64,
}

impl Ceilings {
    /// Measures a CPU on all cores, for a few seconds.
    pub(super) fn measure(encoder: Kept, dtype: DType) -> candle_core::Result<Self> {
        let numbers: Vec<f32> = (0..NUMBERS).into_par_iter().map(|x| x as f32).collect();
        let memory = best(|| {
            let sums = numbers.par_chunks(1 << 20).map(|part| {
                let mut lanes = [0f32; 32];
                for chunk in part.as_chunks::<32>().0 {
                    lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += x);
                }
                lanes.iter().sum::<f32>()
            });
            black_box(sums.sum::<f32>());
        });
        Ok(Self {
            multiply_adds: Some(best_of(compute::multiply_adds(Isa::detect()))),
            product: best_of(compute::large_product(encoder, dtype)?),
            memory: NUMBERS as f64 * size_of::<f32>() as f64 / memory.as_secs_f64(),
        })
    }
}

impl Ceilings {
    /// Measures a GPU, for a few seconds.
    pub(super) fn of_gpu(device: &Device, dtype: DType) -> candle_core::Result<Self> {
        Self::of_device(device, dtype, DEVICE_SIZES)
    }

    fn of_device(device: &Device, dtype: DType, (side, numbers): (usize, usize)) -> candle_core::Result<Self> {
        // Of random numbers, since zeros draw less power, and so are multiplied faster.
        let factor = || Tensor::rand(-1f32, 1f32, (side, side), device)?.to_dtype(dtype);
        let (a, b) = (factor()?, factor()?);
        let product = || a.matmul(&b).and_then(|_| device.synchronize());
        let (from, to) = (Tensor::zeros(numbers, dtype, device)?, Tensor::zeros(numbers, dtype, device)?);
        let copy = || to.slice_set(&from, 0, 0).and_then(|()| device.synchronize());
        // Once with what may fail, and to warm up.
        product()?;
        copy()?;
        let bytes = 2 * numbers * dtype.size_in_bytes();
        Ok(Self {
            multiply_adds: None,
            product: 2.0 * (side as f64).powi(3) / best(|| drop(product())).as_secs_f64(),
            memory: bytes as f64 / best(|| drop(copy())).as_secs_f64(),
        })
    }
}

fn best_of((operations, mut work): (f64, impl FnMut())) -> f64 {
    operations / best(&mut work).as_secs_f64()
}

/// The shortest time that it takes.
fn best(mut work: impl FnMut()) -> Duration {
    let (begun, mut best) = (Instant::now(), Duration::MAX);
    while begun.elapsed() < LOOK {
        let begun = Instant::now();
        work();
        best = best.min(begun.elapsed());
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_measured_by_a_product_and_a_copy() {
        let ceilings = Ceilings::of_device(&Device::Cpu, DType::F32, (64, 1 << 16)).unwrap();
        assert!(ceilings.multiply_adds.is_none() && ceilings.product > 1e7 && ceilings.memory > 1e7, "{ceilings:?}");
    }

    #[test]
    fn base_costs_what_is_known_of_it() {
        let work = BlipConfig::base().work(false);
        assert!((work.encode / 1e9 - 111.0).abs() < 1.0, "{work:?}");
        assert!((work.token / 1e9 - 0.25).abs() < 0.03, "{work:?}");
        let folded = BlipConfig::base().work(true);
        assert!(((folded.step_weights - work.step_weights) / 1e6 - 14.2).abs() < 0.1, "{folded:?}");
    }
}
