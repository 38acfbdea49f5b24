//! The steps as plain loops over numbers in f32: what the kernels are held to.

use candle_core::{CpuStorage, Layout, Result};
use half::{bf16, f16};

use super::launch::Args;
use crate::caption::compute::log_sum_exp;

/// The numbers of a contiguous tensor.
pub(super) fn read(storage: &CpuStorage, layout: &Layout) -> Result<Vec<f32>> {
    let Some((from, to)) = layout.contiguous_offsets() else {
        candle_core::bail!("a fused step takes contiguous tensors")
    };
    match storage {
        CpuStorage::F32(numbers) => Ok(numbers[from..to].to_vec()),
        CpuStorage::BF16(numbers) => Ok(numbers[from..to].iter().map(|number| number.to_f32()).collect()),
        CpuStorage::F16(numbers) => Ok(numbers[from..to].iter().map(|number| number.to_f32()).collect()),
        CpuStorage::U8(bytes) => Ok(bytes[from..to].iter().map(|byte| f32::from(*byte)).collect()),
        _ => candle_core::bail!("a fused step takes f32, bf16 and f16"),
    }
}

/// Numbers in the precision of a storage.
pub(super) fn like(storage: &CpuStorage, numbers: &[f32]) -> Result<CpuStorage> {
    match storage {
        CpuStorage::F32(_) => Ok(CpuStorage::F32(numbers.to_vec())),
        CpuStorage::BF16(_) => Ok(CpuStorage::BF16(numbers.iter().map(|number| bf16::from_f32(*number)).collect())),
        CpuStorage::F16(_) => Ok(CpuStorage::F16(numbers.iter().map(|number| f16::from_f32(*number)).collect())),
        _ => candle_core::bail!("a fused step takes f32, bf16 and f16"),
    }
}

/// Changes the numbers of a contiguous tensor.
pub(super) fn change(storage: &mut CpuStorage, layout: &Layout, change: impl FnOnce(&mut [f32])) -> Result<()> {
    let mut numbers = read(storage, layout)?;
    change(&mut numbers);
    let Some((from, to)) = layout.contiguous_offsets() else { return Ok(()) };
    match (like(storage, &numbers)?, storage) {
        (CpuStorage::F32(changed), CpuStorage::F32(numbers)) => numbers[from..to].copy_from_slice(&changed),
        (CpuStorage::BF16(changed), CpuStorage::BF16(numbers)) => numbers[from..to].copy_from_slice(&changed),
        (CpuStorage::F16(changed), CpuStorage::F16(numbers)) => numbers[from..to].copy_from_slice(&changed),
        _ => {}
    }
    Ok(())
}

/// Adds the bias to each row, and does to each sum what follows; that is told the number's place.
pub(super) fn finish(to: &mut [f32], bias: &[f32], follows: impl Fn(f32, usize) -> f32) {
    for (row, numbers) in to.chunks_exact_mut(bias.len()).enumerate() {
        let first = row * bias.len();
        for (column, (number, bias)) in numbers.iter_mut().zip(bias).enumerate() {
            *number = follows(*number + bias, first + column);
        }
    }
}

/// The exact GELU.
pub(super) fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    (x * 0.5 * (1.0 + candle_core::cpu::erf::erf_f64(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
}

/// The sizes of [`Args`] that count heads and tokens.
struct Sizes {
    width: usize,
    heads: usize,
    head: usize,
    tokens: usize,
    padded: usize,
    images: usize,
}

impl From<&Args> for Sizes {
    fn from(args: &Args) -> Self {
        Self {
            width: args.width as usize,
            heads: args.heads as usize,
            head: args.head as usize,
            tokens: args.tokens as usize,
            padded: args.padded as usize,
            images: args.images as usize,
        }
    }
}

/// See `split_heads` in `kernels.cu`.
pub(super) fn split_heads(from: &[f32], bias: &[f32], args: &Args) -> Vec<f32> {
    let Sizes { width, heads, head, tokens, padded, images } = args.into();
    let mut parts = vec![0.0; 3 * images * heads * padded * head];
    for (row, numbers) in from.chunks_exact(3 * width).enumerate() {
        let (image, token) = (row / tokens, row % tokens);
        for (column, (number, bias)) in numbers.iter().zip(bias).enumerate() {
            let (part, which, inner) = (column / width, column % width / head, column % head);
            let scale = if part == 0 { args.scale } else { 1.0 };
            parts[(((part * images + image) * heads + which) * padded + token) * head + inner] =
                (number + bias) * scale;
        }
    }
    parts
}

/// See `join_heads` in `kernels.cu`.
pub(super) fn join_heads(to: &mut [f32], from: &[f32], args: &Args) {
    let Sizes { width, heads, head, tokens, padded, .. } = args.into();
    for (row, numbers) in to.chunks_exact_mut(width).enumerate() {
        let (image, token) = (row / tokens, row % tokens);
        for (column, number) in numbers.iter_mut().enumerate() {
            *number = from[((image * heads + column / head) * padded + token) * head + column % head];
        }
    }
}

/// See `softmax` in `kernels.cu`.
pub(super) fn softmax(to: &mut [f32], args: &Args) {
    for row in to.chunks_exact_mut(args.padded as usize) {
        let (scores, fill) = row.split_at_mut(args.tokens as usize);
        let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for score in &mut *scores {
            *score = (*score - top).exp();
            sum += *score;
        }
        for score in scores {
            *score /= sum;
        }
        fill.fill(0.0);
    }
}

/// See `split_parts` in `kernels.cu`.
pub(super) fn split_parts(from: &[f32], bias: &[f32], args: &Args) -> Vec<f32> {
    let (width, tokens) = (args.width as usize, args.tokens as usize);
    let mut parts = vec![0.0; from.len()];
    for (token, numbers) in from.chunks_exact(bias.len()).enumerate() {
        for (column, (number, bias)) in numbers.iter().zip(bias).enumerate() {
            parts[(column / width * tokens + token) * width + column % width] = number + bias;
        }
    }
    parts
}

/// Where a column of what is remembered begins.
fn column(args: &Args, row: usize, part: usize, column: usize) -> usize {
    ((row * 2 + part) * args.columns as usize + column) * args.width as usize
}

/// See `append` in `kernels.cu`.
pub(super) fn append(to: &mut [f32], from: &[f32], starts: &[u32], args: &Args) {
    let (width, block) = (args.width as usize, args.block as usize);
    for (token, numbers) in from.chunks_exact(3 * width).enumerate() {
        let (row, at) = (token / block, starts[token / block] as usize + token % block);
        for (part, numbers) in numbers[width..].chunks_exact(width).enumerate() {
            let to = &mut to[column(args, row, part, at)..][..width];
            to.copy_from_slice(numbers);
        }
    }
}

/// See `attend_rows` in `kernels.cu`.
pub(super) fn attend_rows(from: &[f32], memory: &[f32], starts: Option<&[u32]>, args: &Args) -> Vec<f32> {
    let (width, block, head) = (args.width as usize, args.block as usize, args.head as usize);
    let mut contexts = vec![0.0; args.rows as usize * width];
    for (token, numbers) in from.chunks_exact(args.stride as usize).enumerate() {
        let row = token / block;
        let length = starts.map_or(args.tokens as usize, |starts| starts[row] as usize + token % block + 1);
        for first in (0..width).step_by(head) {
            let of = |part: usize, at: usize| &memory[column(args, row, part, at) + first..][..head];
            let query = &numbers[first..][..head];
            let score = |key: &[f32]| query.iter().zip(key).map(|(a, b)| a * b).sum::<f32>() * args.scale;
            let mut scores: Vec<f32> = (0..length).map(|at| score(of(0, at))).collect();
            softmax(&mut scores, &Args { padded: length as u32, tokens: length as u32, ..*args });
            let context = &mut contexts[token * width + first..][..head];
            for (at, share) in scores.into_iter().enumerate() {
                context.iter_mut().zip(of(1, at)).for_each(|(to, value)| *to += share * value);
            }
        }
    }
    contexts
}

/// See `unfold` in `kernels.cu`.
pub(super) fn unfold(to: &mut [f32], bytes: &[f32], levels: &[f32], args: &Args) {
    let (size, patch) = (args.size as usize, args.patch as usize);
    let grid = size / patch;
    for (row, numbers) in to.chunks_exact_mut(args.width as usize).enumerate() {
        let (image, top, left) = (row / (grid * grid), row / grid % grid * patch, row % grid * patch);
        for (column, number) in numbers.iter_mut().enumerate() {
            let (channel, y, x) = (column / (patch * patch), top + column / patch % patch, left + column % patch);
            let byte = bytes[((image * size + y) * size + x) * 3 + channel];
            *number = levels[channel * 256 + byte as usize];
        }
    }
}

/// See `choose` in `kernels.cu`.
pub(super) fn choose(to: &mut [f32], scores: &[f32], held_back: &[u32], args: &Args) {
    let rows = scores.chunks_exact(args.width as usize);
    for ((scores, held_back), to) in rows.zip(held_back).zip(to.chunks_exact_mut(2)) {
        let end = (*held_back != 0).then_some(args.end as usize);
        let scored = scores.iter().copied().enumerate().filter(|(token, _)| Some(*token) != end);
        let (token, best) = scored.fold((0, f32::MIN), |best, next| if next.1 > best.1 { next } else { best });
        to.copy_from_slice(&[token as f32, best - log_sum_exp(scores)]);
    }
}
