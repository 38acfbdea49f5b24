//! Which kernel does a step, on how many threads, and what it is told: all that a GPU and the tests need to know alike.

#![cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "without a GPU nothing is launched"))]

use candle_core::DType;

/// Threads of a warp.
const WARP: u32 = 32;

/// Rows that a block of the softmax does, a warp each.
const SOFTMAX_ROWS: u32 = 8;

/// Warps of a block that chooses a token: `WARPS` of `choose` in `kernels.cu`.
const CHOICE_WARPS: u32 = 8;

/// Warps of a block of the attention of rows: 32 groups of eight lanes.
const ATTENTION_WARPS: u32 = 8;

/// The widest head that the attention of rows takes: `WIDEST_HEAD` of `kernels.cu`.
pub(super) const WIDEST_HEAD: usize = 128;

/// Packs of a row that a thread of the softmax keeps in registers: `READS` of `kernels.cu`.
const SOFTMAX_READS: usize = 8;

/// As `Args` in `kernels.cu`. Places are addresses in the memory of the device.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Args {
    pub(super) to: u64,
    pub(super) from: u64,
    pub(super) bias: u64,
    pub(super) residual: u64,
    pub(super) memory: u64,
    pub(super) starts: u64,
    pub(super) rows: u32,
    pub(super) width: u32,
    pub(super) heads: u32,
    pub(super) head: u32,
    pub(super) tokens: u32,
    pub(super) padded: u32,
    pub(super) images: u32,
    pub(super) parts: u32,
    pub(super) columns: u32,
    pub(super) block: u32,
    pub(super) stride: u32,
    pub(super) size: u32,
    pub(super) patch: u32,
    pub(super) end: u32,
    pub(super) scale: f32,
}

/// What a kernel does; its name without precision and width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    FinishBias,
    FinishGelu,
    FinishAdd,
    SplitHeads,
    JoinHeads,
    SplitParts,
    Append,
    AttendRows,
    Softmax,
    Unfold,
    Choose,
}

/// A kernel to run: its name, the blocks, and the threads of a block in two dimensions.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Launch {
    pub(super) kernel: String,
    pub(super) blocks: u32,
    pub(super) threads: (u32, u32),
}

impl Kernel {
    fn name(self) -> &'static str {
        match self {
            Self::FinishBias => "finish_bias",
            Self::FinishGelu => "finish_gelu",
            Self::FinishAdd => "finish_add",
            Self::SplitHeads => "split_heads",
            Self::JoinHeads => "join_heads",
            Self::SplitParts => "split_parts",
            Self::Append => "append",
            Self::AttendRows => "attend_rows",
            Self::Softmax => "softmax",
            Self::Unfold => "unfold",
            Self::Choose => "choose",
        }
    }

    /// How to run it with these sizes; `None` for a precision that it has not.
    pub(super) fn launch(self, dtype: DType, args: &Args) -> Option<Launch> {
        let (suffix, widest) = match dtype {
            DType::F32 => ("f32", 4),
            DType::BF16 => ("bf16", 8),
            DType::F16 => ("f16", 8),
            _ => return None,
        };
        // Where 16 bytes at a time would cross from one row, head or filling to another, one number at a time.
        let whole = match self {
            Self::SplitHeads | Self::JoinHeads | Self::AttendRows => args.head,
            Self::Softmax => args.padded,
            Self::Unfold => args.patch,
            _ => args.width,
        };
        let pack = if whole.is_multiple_of(widest) { widest } else { 1 };
        let row = |width: u32| (width.div_ceil(pack).next_multiple_of(WARP).clamp(WARP, 256), 1);
        let (blocks, threads) = match self {
            Self::SplitHeads => (args.rows, row(3 * args.width)),
            Self::SplitParts => (args.rows, row(args.parts * args.width)),
            Self::Append => (args.rows, row(2 * args.width)),
            Self::AttendRows => (args.rows * args.heads, (WARP, ATTENTION_WARPS)),
            Self::Softmax => (args.rows.div_ceil(SOFTMAX_ROWS), (WARP, SOFTMAX_ROWS)),
            Self::Choose => (args.rows, (WARP, CHOICE_WARPS)),
            _ => (args.rows, row(args.width)),
        };
        Some(Launch { kernel: format!("{}_{suffix}_{pack}", self.name()), blocks, threads })
    }
}

/// The longest row that the softmax takes, in numbers of this precision, if it is filled up to [`FILL`].
pub(super) fn longest_softmax(dtype: DType) -> usize {
    SOFTMAX_READS * WARP as usize * if dtype == DType::F32 { 4 } else { 8 }
}

/// Tokens are filled up to a multiple of this: 16 bytes in half precision, which products want of a row's length.
pub(super) const FILL: usize = 8;
