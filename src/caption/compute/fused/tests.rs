//! The kernels themselves, compiled as C++, against the plain loops.

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use candle_core::{CpuStorage, DType, Device, Layout, Shape, Tensor};
use half::{bf16, f16};
use libloading::Library;

use super::launch::{Args, Kernel};
use super::{check, plain};

const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// The kernels as a library of this machine.
static LIBRARY: LazyLock<Library> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/caption/compute/fused");
    let library = folder.path().join("kernels.so");
    let mut compiler = Command::new("c++");
    compiler.args(["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-DSHIM", "-Wno-unknown-pragmas", "-x", "c++"]);
    let output = compiler.arg(sources.join("kernels.cu")).arg("-o").arg(&library).output();
    let output = output.expect("a C++ compiler, which the build needs anyway");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: the library does nothing when it is opened or closed.
    unsafe { Library::new(library) }.unwrap()
});

/// Numbers in a precision, where 16 bytes at a time can be read.
struct Memory {
    dtype: DType,
    words: Vec<u128>,
    count: usize,
}

impl Memory {
    fn new(dtype: DType, numbers: &[f32]) -> Self {
        let bytes: Vec<u8> = match dtype {
            DType::F32 => numbers.iter().flat_map(|number| number.to_le_bytes()).collect(),
            DType::BF16 => numbers.iter().flat_map(|number| bf16::from_f32(*number).to_le_bytes()).collect(),
            _ => numbers.iter().flat_map(|number| f16::from_f32(*number).to_le_bytes()).collect(),
        };
        let word = |bytes: &[u8]| {
            let mut word = [0; 16];
            word[..bytes.len()].copy_from_slice(bytes);
            u128::from_le_bytes(word)
        };
        Self { dtype, words: bytes.chunks(16).map(word).collect(), count: numbers.len() }
    }

    fn place(&self) -> u64 {
        self.words.as_ptr() as u64
    }

    fn numbers(&self) -> Vec<f32> {
        let bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let numbers: Vec<f32> = match self.dtype {
            DType::F32 => bytes.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect(),
            DType::BF16 => {
                bytes.chunks(2).map(|bytes| bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32()).collect()
            }
            _ => bytes.chunks(2).map(|bytes| f16::from_le_bytes(bytes.try_into().unwrap()).to_f32()).collect(),
        };
        numbers[..self.count].to_vec()
    }
}

fn run(kernel: Kernel, dtype: DType, args: &Args) {
    type Run = unsafe extern "C" fn(*const u8, *const Args, u32, u32, u32);
    let launch = kernel.launch(dtype, args).unwrap();
    // SAFETY: the kernels and `run` are declared so in `kernels.cu` and `shim.h`; the sizes are those of the memory.
    unsafe {
        let run = LIBRARY.get::<Run>("run").unwrap();
        let kernel = LIBRARY.get::<*const u8>(&launch.kernel).unwrap();
        run(*kernel, args, launch.blocks, launch.threads.0, launch.threads.1);
    }
}

/// Numbers from -2 to 2, as the precision has them.
fn numbers(dtype: DType, count: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    let numbers: Vec<f32> = (0..count).map(|_| random.f32() * 4.0 - 2.0).collect();
    Memory::new(dtype, &numbers).numbers()
}

fn assert_close(name: &str, dtype: DType, found: &Memory, expected: &[f32]) {
    let found = found.numbers();
    assert_eq!(found.len(), expected.len());
    // A unit in the last place or two, of half precision; of f32 what sums that cancel lose.
    let unit = match dtype {
        DType::F32 => 2e-4,
        DType::BF16 => 1.0 / 128.0,
        _ => 1.0 / 1024.0,
    };
    for (at, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= unit * b.abs().max(0.01), "{name} in {dtype:?}: {a} at {at}, not {b}");
    }
}

#[test]
fn every_kernel_does_what_the_plain_loops_do() {
    // Sizes for 16 bytes at a time, and for a number at a time; more columns than threads.
    for (width, heads, tokens, padded) in [(64, 4, 13, 16), (12, 2, 5, 8), (2304, 3, 2, 9)] {
        for dtype in DTYPES {
            let (images, head) = (2, width / heads);
            let rows = images * tokens;
            let sizes = Args {
                width: width as u32,
                heads: heads as u32,
                head: head as u32,
                tokens: tokens as u32,
                padded: padded as u32,
                images: images as u32,
                scale: 0.25,
                ..Args::default()
            };
            let (x, bias) = (numbers(dtype, rows * width, 1), numbers(dtype, 3 * width, 2));
            let residual = numbers(dtype, rows * width, 3);
            let (of_bias, of_residual) = (Memory::new(dtype, &bias), Memory::new(dtype, &residual));

            let in_place = |kernel, expected: &dyn Fn(&mut [f32])| {
                let to = Memory::new(dtype, &x);
                let places = (to.place(), of_bias.place(), of_residual.place());
                let args = Args { to: places.0, bias: places.1, residual: places.2, rows: rows as u32, ..sizes };
                run(kernel, dtype, &args);
                let mut numbers = x.clone();
                expected(&mut numbers);
                assert_close(&format!("{kernel:?}"), dtype, &to, &numbers);
            };
            let short = &bias[..width];
            in_place(Kernel::FinishBias, &|to| plain::finish(to, short, |y, _| y));
            in_place(Kernel::FinishGelu, &|to| plain::finish(to, short, |y, _| plain::gelu(y)));
            in_place(Kernel::FinishAdd, &|to| plain::finish(to, short, |y, at| y + residual[at]));

            let qkv = numbers(dtype, rows * 3 * width, 5);
            let from = Memory::new(dtype, &qkv);
            let parts = Memory::new(dtype, &vec![f32::NAN; 3 * images * padded * width]);
            let args = Args { to: parts.place(), from: from.place(), bias: of_bias.place(), ..sizes };
            run(Kernel::SplitHeads, dtype, &Args { rows: (images * padded) as u32, ..args });
            assert_close("SplitHeads", dtype, &parts, &plain::split_heads(&qkv, &bias, &sizes));

            let parts = Memory::new(dtype, &vec![f32::NAN; rows * 3 * width]);
            let of_parts = Args { parts: 3, tokens: rows as u32, rows: rows as u32, ..args };
            run(Kernel::SplitParts, dtype, &Args { to: parts.place(), ..of_parts });
            assert_close("SplitParts", dtype, &parts, &plain::split_parts(&qkv, &bias, &of_parts));

            let contexts = numbers(dtype, images * padded * width, 6);
            let from = Memory::new(dtype, &contexts);
            let joined = Memory::new(dtype, &vec![f32::NAN; rows * width]);
            let args = Args { to: joined.place(), from: from.place(), rows: rows as u32, ..sizes };
            run(Kernel::JoinHeads, dtype, &args);
            let mut expected = vec![0.0; rows * width];
            plain::join_heads(&mut expected, &contexts, &sizes);
            assert_close("JoinHeads", dtype, &joined, &expected);
        }
    }
}

#[test]
fn new_tokens_are_remembered_and_attend_to_their_row_up_to_themselves() {
    // Heads for 16 bytes at a time, for a number at a time, the widest one, and one of BLIP's.
    for (heads, head, block, columns) in [(2, 16, 2, 40), (2, 6, 3, 9), (1, 128, 1, 33), (1, 64, 1, 70)] {
        for dtype in DTYPES {
            let (slots, width) = (2, heads * head);
            let starts = [columns as u32 - block, 5];
            let sizes = Args {
                width: width as u32,
                heads: heads as u32,
                head: head as u32,
                columns: columns as u32,
                tokens: columns as u32,
                block,
                stride: 3 * width as u32,
                scale: 0.3,
                rows: slots * block,
                ..Args::default()
            };
            let count = slots as usize * 2 * columns * width;
            let (mut remembered, qkv) = (numbers(dtype, count, 1), numbers(dtype, sizes.rows as usize * 3 * width, 2));
            let (memory, from) = (Memory::new(dtype, &remembered), Memory::new(dtype, &qkv));
            let args = Args { from: from.place(), starts: starts.as_ptr() as u64, ..sizes };
            run(Kernel::Append, dtype, &Args { to: memory.place(), ..args });
            plain::append(&mut remembered, &qkv, &starts, &sizes);
            assert_eq!(memory.numbers(), remembered);

            for starts in [Some(&starts), None] {
                let to = Memory::new(dtype, &vec![f32::NAN; sizes.rows as usize * width]);
                let place = starts.map_or(0, |starts| starts.as_ptr() as u64);
                let args = Args { to: to.place(), memory: memory.place(), starts: place, ..args };
                run(Kernel::AttendRows, dtype, &args);
                let expected = plain::attend_rows(&qkv, &remembered, starts.map(|starts| &starts[..]), &sizes);
                assert_close(&format!("attention of {head} in {columns}"), dtype, &to, &expected);
            }
        }
    }
}

#[test]
fn the_softmax_takes_rows_of_any_length_that_fits_and_clears_what_fills_up() {
    for dtype in DTYPES {
        for (tokens, padded, rows) in [(577, 584, 3), (5, 8, 11), (13, 15, 2), (1, 1, 9), (1000, 1024, 1)] {
            let mut scores = numbers(dtype, rows * padded, 7);
            // What fills up holds anything; a row may be far from zero, with one score above all.
            scores[padded - 1] = if tokens < padded { f32::NAN } else { scores[padded - 1] };
            scores[0] = Memory::new(dtype, &[-500.0]).numbers()[0];
            let args = Args { tokens: tokens as u32, padded: padded as u32, rows: rows as u32, ..Args::default() };
            let to = Memory::new(dtype, &scores);
            run(Kernel::Softmax, dtype, &Args { to: to.place(), ..args });
            plain::softmax(&mut scores, &args);
            assert_close(&format!("softmax of {tokens}"), dtype, &to, &scores);
        }
    }
}

#[test]
fn pictures_become_patches_without_what_fills_none() {
    // Sides of patches for 16 bytes at a time and for one number, pixels over, more columns than threads.
    for (images, size, patch) in [(2, 16, 8), (2, 11, 3), (1, 40, 16)] {
        for dtype in DTYPES {
            let mut random = fastrand::Rng::with_seed(11);
            let bytes: Vec<u8> = (0..images * size * size * 3).map(|_| random.u8(..)).collect();
            let levels = numbers(DType::F32, 3 * 256, 12);
            let (rows, width) = (images * (size / patch) * (size / patch), 3 * patch * patch);
            let sizes = Args {
                rows: rows as u32,
                width: width as u32,
                size: size as u32,
                patch: patch as u32,
                ..Args::default()
            };
            let to = Memory::new(dtype, &vec![f32::NAN; rows * width]);
            let places = (to.place(), bytes.as_ptr() as u64, levels.as_ptr() as u64);
            run(Kernel::Unfold, dtype, &Args { to: places.0, from: places.1, bias: places.2, ..sizes });
            let mut expected = vec![0.0; rows * width];
            let bytes: Vec<f32> = bytes.iter().map(|byte| f32::from(*byte)).collect();
            plain::unfold(&mut expected, &bytes, &levels, &sizes);
            assert_close(&format!("patches of {patch}"), dtype, &to, &expected);
        }
    }
}

#[test]
fn the_first_of_the_highest_is_chosen_and_never_the_end_where_it_is_held_back() {
    for width in [1, 5, 24, 3000] {
        for dtype in DTYPES {
            let mut scores = numbers(dtype, 4 * width, 13);
            // Equals far apart; and scores far below all others, which have no share.
            for row in scores.chunks_exact_mut(width) {
                (row[width / 2], row[width - 1]) = (3.0, 3.0);
                row[0] = if width > 1 { -60000.0 } else { row[0] };
            }
            for (end, held_back) in [(width as u32 / 2, [0, 1, 0, 1]), (width as u32 - 1, [1, 1, 0, 0])] {
                // A row of one score has nothing else to choose.
                let held_back = if width == 1 { [0; 4] } else { held_back };
                let sizes = Args { rows: 4, width: width as u32, end, ..Args::default() };
                let (to, from) = (Memory::new(DType::F32, &[f32::NAN; 8]), Memory::new(dtype, &scores));
                let starts = held_back.as_ptr() as u64;
                run(Kernel::Choose, dtype, &Args { to: to.place(), from: from.place(), starts, ..sizes });
                let mut expected = [0.0; 8];
                plain::choose(&mut expected, &scores, &held_back, &sizes);
                assert_close(&format!("choice of {width}"), DType::F32, &to, &expected);
                let tokens: Vec<u32> = to.numbers().chunks(2).map(|choice| choice[0] as u32).collect();
                assert!(tokens.iter().zip(held_back).all(|(token, held)| held == 0 || *token != end), "{tokens:?}");
            }
        }
    }
}

#[test]
fn scores_that_are_not_numbers_get_no_probability() {
    for scores in [[1.0, f32::NAN, 0.0], [f32::NAN; 3], [f32::NEG_INFINITY; 3], [1.0, f32::INFINITY, 0.0]] {
        let (to, from) = (Memory::new(DType::F32, &[0.0; 2]), Memory::new(DType::F32, &scores));
        let sizes = Args { rows: 1, width: 3, ..Args::default() };
        let args = Args { to: to.place(), from: from.place(), starts: [0u32].as_ptr() as u64, ..sizes };
        run(Kernel::Choose, DType::F32, &args);
        let mut plainly = [0.0; 2];
        plain::choose(&mut plainly, &scores, &[0], &sizes);
        assert!(!to.numbers()[1].is_finite() && !plainly[1].is_finite(), "{scores:?}: {:?} {plainly:?}", to.numbers());
    }
}

#[test]
fn the_check_passes_where_a_device_does_as_it_should() {
    for dtype in DTYPES {
        check(&Device::Cpu, dtype).unwrap();
    }
}

#[test]
fn attention_with_rows_filled_up_is_attention() {
    let (images, heads, tokens, head) = (2, 2, 5, 4);
    let width = heads * head;
    let qkv = Tensor::from_vec(
        numbers(DType::F32, images * tokens * 3 * width, 8),
        (images * tokens, 3 * width),
        &Device::Cpu,
    );
    let bias = Tensor::from_vec(numbers(DType::F32, 3 * width, 9), 3 * width, &Device::Cpu).unwrap();
    let qkv = qkv.unwrap();
    let found = super::attend(&qkv, &bias, images, heads).unwrap();
    let whole = qkv.broadcast_add(&bias).unwrap();
    let expected = crate::caption::compute::attend_image(&whole, images, heads, crate::caption::compute::Isa::detect());
    let gap = (found - expected.unwrap()).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(gap < 1e-5, "{gap}");
}

#[test]
fn tensors_with_gaps_are_refused() {
    let storage = CpuStorage::F32(vec![0.0; 6]);
    let transposed = Layout::contiguous(Shape::from((2, 3))).transpose(0, 1).unwrap();
    assert!(plain::read(&storage, &transposed).is_err());
}
