//! The kernels of the host one by one, on numbers that do not matter, for benchmarks. They run where the engine runs them,
//! on a thread of the pool.

use std::hint::black_box;

use candle_core::{Device, Result, Tensor};

use super::softmax::exponentials;
use super::{Isa, LayerNorm, Linear, attend_image};
use crate::caption::backend::Backend;
use crate::caption::device::DtypeSpec;

fn matrix(rows: usize, width: usize) -> Result<Tensor> {
    let mut random = fastrand::Rng::with_seed(1);
    Tensor::from_iter((0..rows * width).map(|_| random.f32() * 2.0 - 1.0), &Device::Cpu)?.reshape((rows, width))
}

/// A linear layer with GELU of `inputs` to `outputs` on so many rows, on a backend and in a precision.
pub fn linear(
    backend: Backend,
    dtype: DtypeSpec,
    rows: usize,
    inputs: usize,
    outputs: usize,
) -> std::result::Result<impl FnMut(), Box<dyn std::error::Error>> {
    let chosen = backend.choose(dtype, &Device::Cpu, None)?;
    let (x, bias) = (matrix(rows, inputs)?, matrix(1, outputs)?.squeeze(0)?);
    let layer = Linear::new(&matrix(outputs, inputs)?, &bias, chosen.encoder)?;
    Ok(move || drop(black_box(rayon::scope(|_| layer.forward_gelu(&x)).unwrap())))
}

/// The encoder's attention among the tokens of each image, in f32.
pub fn attention(images: usize, tokens: usize, heads: usize, head: usize) -> Result<impl FnMut()> {
    let qkv = matrix(images * tokens, 3 * heads * head)?;
    Ok(move || drop(black_box(rayon::scope(|_| attend_image(&qkv, images, heads, Isa::detect())).unwrap())))
}

/// The exponentials of the softmax of each row, on one thread.
pub fn softmax(rows: usize, width: usize) -> impl FnMut() {
    let scores = vec![0.5; rows * width];
    let (mut room, mut shares) = (scores.clone(), vec![0.0; rows]);
    move || {
        room.copy_from_slice(&scores);
        exponentials(Isa::detect(), &mut room, width, 0.125, &mut shares);
        black_box((&room, &shares));
    }
}

/// Layer normalisation of each row.
pub fn layer_norm(rows: usize, width: usize) -> Result<impl FnMut()> {
    let (x, one) = (matrix(rows, width)?, matrix(1, width)?.squeeze(0)?);
    let norm = LayerNorm { weight: one.clone(), bias: one, eps: 1e-5 };
    Ok(move || drop(black_box(rayon::scope(|_| norm.forward(&x)).unwrap())))
}
