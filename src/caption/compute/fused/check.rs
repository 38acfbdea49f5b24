//! Whether the kernels of a GPU do what the plain loops do, on that GPU.

use candle_core::{DType, Device, Result, Tensor};

use super::{Follows, NewTokens, append, attend, attend_rows, choose, finish, finish_add, split_parts, unfold};

/// Widths, heads and tokens of an image: sizes for 16 bytes at a time, for one number, and heads like those of BLIP with more
/// tokens than a warp or a group does in one turn.
const SIZES: [(usize, usize, usize); 3] = [(64, 4, 13), (12, 2, 5), (128, 2, 300)];

/// Images of each.
const IMAGES: usize = 3;

/// Tries every step on a device in a precision, against the same on the CPU. Some milliseconds, and a second for compiling.
///
/// # Errors
/// What went wrong: no compiler, a kernel that does not start, or a result that differs.
pub(in crate::caption) fn check(device: &Device, dtype: DType) -> Result<()> {
    for (width, heads, tokens) in SIZES {
        let (here, there) =
            (steps(&Device::Cpu, dtype, width, heads, tokens)?, steps(device, dtype, width, heads, tokens)?);
        for ((name, expected), (_, found)) in here.into_iter().zip(there) {
            let expected: Vec<f32> = expected.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
            let found: Vec<f32> = found.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
            let pairs = expected.iter().zip(&found);
            let gap = pairs
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, |most: f32, gap| if gap > most || gap.is_nan() { gap } else { most });
            if expected.len() != found.len() || gap.is_nan() || gap > tolerance(dtype) {
                candle_core::bail!("{name} of width {width} differs by {gap} from what it must be");
            }
        }
    }
    Ok(())
}

/// Some units in the last place of numbers around 2.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 1e-4,
        DType::F16 => 6e-3,
        _ => 5e-2,
    }
}

type Named = (&'static str, Tensor);

fn steps(device: &Device, dtype: DType, width: usize, heads: usize, tokens: usize) -> Result<Vec<Named>> {
    let rows = IMAGES * tokens;
    // Numbers from -1 to 1 without a pattern, the same everywhere: scores stay small, and no rounding decides between two.
    let numbers = |shape: (usize, usize), seed: u64| {
        let mut random = fastrand::Rng::with_seed(seed);
        let numbers: Vec<f32> = (0..shape.0 * shape.1).map(|_| random.f32() * 2.0 - 1.0).collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
    };
    let x = || numbers((rows, width), 1);
    let mut steps = Vec::new();

    // Patches of 16 bytes at a time, of one number, and pixels over.
    let patch = if width == 12 { 3 } else { 8 };
    let mut random = fastrand::Rng::with_seed(10);
    let bytes: Vec<u8> = (0..IMAGES * 26 * 26 * 3).map(|_| random.u8(..)).collect();
    let bytes = Tensor::from_vec(bytes, (IMAGES, 26, 26, 3), device)?;
    let levels: Vec<f32> = (0..3 * 256).map(|_| random.f32() * 2.0 - 1.0).collect();
    steps.push(("patches", unfold(&bytes, &Tensor::from_vec(levels, (3, 256), device)?, patch, dtype)?));
    for held_back in [false, true] {
        // The end is what would be chosen.
        let scores = x()?;
        let end = choose(&scores, &vec![false; rows], 0)?[0].0;
        let choices = choose(&scores, &vec![held_back; rows], end)?;
        let (tokens, logprobs): (Vec<_>, Vec<_>) =
            choices.into_iter().map(|(token, share)| (token as f32, share)).unzip();
        steps.push(("choice", Tensor::new(tokens, &Device::Cpu)?));
        steps.push(("probability", Tensor::new(logprobs, &Device::Cpu)?));
    }

    let bias = numbers((1, 3 * width), 2)?.flatten_all()?;
    let short = bias.narrow(0, 0, width)?.contiguous()?;
    for (name, follows) in [("bias", Follows::Bias), ("GELU", Follows::Gelu)] {
        steps.push((name, finish(x()?, &short, follows)?));
    }
    steps.push(("residual", finish_add(x()?, &short, &numbers((rows, width), 3)?)?));
    let qkv = numbers((rows, 3 * width), 5)?;
    steps.push(("attention", attend(&qkv, &bias, IMAGES, heads)?));

    // A decoder of two rows, which have 4 and 9 tokens, and get `tokens` more.
    let wide = numbers((tokens, 6 * width), 6)?;
    let parts = split_parts(&wide, &numbers((1, 6 * width), 7)?.flatten_all()?, 6)?;
    steps.push(("parted outputs", parts));
    let (slots, columns) = (2, 9 + tokens);
    let memory = numbers((slots * 2 * columns, width), 8)?.reshape((slots, 2, columns, width))?;
    let new = NewTokens { block: tokens, starts: Tensor::new(&[4u32, 9], device)? };
    let qkv = qkv.narrow(0, 0, slots * tokens)?.contiguous()?;
    append(&memory, &qkv, &new)?;
    steps.push(("appended tokens", memory.copy()?));
    steps.push(("attention of rows", attend_rows(&qkv, &memory, heads, tokens, Some(&new.starts))?));
    let queries = numbers((slots * tokens, width), 9)?;
    steps.push(("attention to images", attend_rows(&queries, &memory, heads, tokens, None)?));
    Ok(steps)
}
