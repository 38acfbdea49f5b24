//! What follows and precedes the products of a transformer, fused: bias, GELU and residual in one pass, heads parted and
//! joined with nothing in between, rows filled up so that every product is one of aligned matrices.
//!
//! For GPUs, where candle's own operations are a pass over memory each and the strided ones several times slower than
//! that. The steps are custom operations of candle: on a CPU they are plain loops, to which the kernels
//! (`fused/kernels.cu`) are held, in tests as C++ and on every GPU before a model uses them ([`check`]).

mod check;
#[cfg(feature = "cuda")]
mod cuda;
mod launch;
mod plain;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, DType, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Result, Shape, Tensor};

pub(in crate::caption) use self::check::check;
use self::launch::{Args, FILL, Kernel};

/// Attention scores held at a time, in numbers: they stay in the second cache of a large GPU (50 MB and more).
const SCORES: usize = 1 << 24;

/// What follows a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Follows {
    Bias,
    Gelu,
}

/// `y + bias` and the exact GELU where asked for, in the place of `y`, which is `[rows, width]`.
pub(super) fn finish(y: Tensor, bias: &Tensor, follows: Follows) -> Result<Tensor> {
    let (rows, width) = y.dims2()?;
    let kernel = if follows == Follows::Gelu { Kernel::FinishGelu } else { Kernel::FinishBias };
    y.inplace_op2(bias, &Step { kernel, args: of_rows(rows, width), starts: None })?;
    Ok(y)
}

/// `y + bias + residual`, in the place of `y`; all but the bias are `[rows, width]`.
pub(super) fn finish_add(y: Tensor, bias: &Tensor, residual: &Tensor) -> Result<Tensor> {
    let (rows, width) = y.dims2()?;
    y.inplace_op3(bias, residual, &Step { kernel: Kernel::FinishAdd, args: of_rows(rows, width), starts: None })?;
    Ok(y)
}

fn of_rows(rows: usize, width: usize) -> Args {
    Args { rows: rows as u32, width: width as u32, ..Args::default() }
}

/// Whether [`attend`] takes images of so many tokens.
pub(super) fn fits(tokens: usize, dtype: DType) -> bool {
    tokens.next_multiple_of(FILL) <= launch::longest_softmax(dtype)
}

/// Lets every token of an image attend to all of that image: `qkv` `[images · tokens, 3 · width]`, to which `bias` is
/// still to be added, to `[images · tokens, width]`.
pub(super) fn attend(qkv: &Tensor, bias: &Tensor, images: usize, heads: usize) -> Result<Tensor> {
    let (rows, width) = qkv.dims2()?;
    let (tokens, width) = (rows / images, width / 3);
    let (padded, head) = (tokens.next_multiple_of(FILL), width / heads);
    let args = Args {
        width: width as u32,
        heads: heads as u32,
        head: head as u32,
        tokens: tokens as u32,
        padded: padded as u32,
        images: images as u32,
        scale: 1.0 / (head as f32).sqrt(),
        ..Args::default()
    };
    let step = |kernel, rows: usize| Step { kernel, args: Args { rows: rows as u32, ..args }, starts: None };
    let parts = qkv.apply_op2_no_bwd(bias, &step(Kernel::SplitHeads, images * padded))?;
    let contexts = Tensor::zeros((rows, width), qkv.dtype(), qkv.device())?;
    let group = (SCORES / (heads * padded * padded)).clamp(1, images);
    for first in (0..images).step_by(group) {
        let count = group.min(images - first);
        let part = |which: usize| parts.narrow(0, which, 1)?.squeeze(0)?.narrow(0, first, count);
        let scores = part(0)?.matmul(&part(1)?.transpose(2, 3)?)?;
        scores.inplace_op1(&step(Kernel::Softmax, count * heads * padded))?;
        let context = scores.matmul(&part(2)?)?;
        let to = contexts.narrow(0, first * tokens, count * tokens)?;
        to.inplace_op2(&context, &step(Kernel::JoinHeads, count * tokens))?;
    }
    Ok(contexts)
}

/// Keys and values of an image for all layers, `[tokens, parts · width]`, to which `bias` is still to be added, as
/// `[parts, tokens, width]`.
pub(in crate::caption) fn split_parts(projected: &Tensor, bias: &Tensor, parts: usize) -> Result<Tensor> {
    let (tokens, width) = projected.dims2()?;
    let args = Args { parts: parts as u32, tokens: tokens as u32, ..of_rows(tokens, width / parts) };
    projected.apply_op2_no_bwd(bias, &Step { kernel: Kernel::SplitParts, args, starts: None })
}

/// Whether heads of this width can attend by [`attend_rows`].
pub(in crate::caption) fn takes_heads_of(width: usize) -> bool {
    width <= launch::WIDEST_HEAD
}

/// New tokens of the decoder: so many for each row, the first of each at a column of its own.
pub(in crate::caption) struct NewTokens {
    pub(in crate::caption) block: usize,
    /// u32, `[rows]`.
    pub(in crate::caption) starts: Tensor,
}

/// Remembers the new tokens' keys and values, of `qkv` `[rows · block, 3 · width]`, in `memory`
/// `[slots, 2, columns, width]`.
pub(in crate::caption) fn append(memory: &Tensor, qkv: &Tensor, new: &NewTokens) -> Result<()> {
    let args = of_memory(memory, qkv.dim(0)?, new.block)?;
    memory.inplace_op2(qkv, &Step { kernel: Kernel::Append, args, starts: Some(new.starts.clone()) })
}

/// Lets new tokens attend to what is remembered of their rows, of themselves up to themselves, or, without `starts`, to
/// all of it. `queries` is `[rows · block, width or more]` and begins with them; the result is `[rows · block, width]`.
pub(in crate::caption) fn attend_rows(
    queries: &Tensor,
    memory: &Tensor,
    heads: usize,
    block: usize,
    starts: Option<&Tensor>,
) -> Result<Tensor> {
    let (rows, stride) = queries.dims2()?;
    let args = of_memory(memory, rows, block)?;
    let head = args.width / heads as u32;
    let scale = 1.0 / (head as f32).sqrt();
    let args = Args { heads: heads as u32, head, stride: stride as u32, tokens: args.columns, scale, ..args };
    queries.apply_op2_no_bwd(memory, &Step { kernel: Kernel::AttendRows, args, starts: starts.cloned() })
}

fn of_memory(memory: &Tensor, rows: usize, block: usize) -> Result<Args> {
    let (_, _, columns, width) = memory.dims4()?;
    Ok(Args { columns: columns as u32, block: block as u32, ..of_rows(rows, width) })
}

/// The patches of pictures, a row each in the order of the convolution's weights: `[images · grid · grid, 3 · patch · patch]`
/// in a precision, of bytes `[images, size, size, 3]`. `levels`, f32 `[3, 256]`, says what a byte of each channel becomes.
pub(in crate::caption) fn unfold(bytes: &Tensor, levels: &Tensor, patch: usize, dtype: DType) -> Result<Tensor> {
    let (images, size, _, _) = bytes.dims4()?;
    let (rows, width) = (images * (size / patch).pow(2), 3 * patch * patch);
    let patches = Tensor::zeros((rows, width), dtype, bytes.device())?;
    let args = Args { size: size as u32, patch: patch as u32, ..of_rows(rows, width) };
    patches.inplace_op3(bytes, levels, &Step { kernel: Kernel::Unfold, args, starts: None })?;
    Ok(patches)
}

/// The first of the highest of each row of `scores` `[rows, vocabulary]`, never `end` in rows that are held back, and the
/// logarithm of its share in the whole row's softmax.
pub(in crate::caption) fn choose(scores: &Tensor, held_back: &[bool], end: u32) -> Result<Vec<(u32, f32)>> {
    let (rows, width) = scores.dims2()?;
    let held_back = Tensor::from_iter(held_back.iter().map(|held| u32::from(*held)), scores.device())?;
    let choices = Tensor::zeros((rows, 2), DType::F32, scores.device())?;
    let args = Args { end, ..of_rows(rows, width) };
    choices.inplace_op2(scores, &Step { kernel: Kernel::Choose, args, starts: Some(held_back) })?;
    Ok(choices.to_vec2()?.into_iter().map(|choice: Vec<f32>| (choice[0] as u32, choice[1])).collect())
}

/// A kernel with the sizes of its tensors.
struct Step {
    kernel: Kernel,
    args: Args,
    starts: Option<Tensor>,
}

impl Step {
    /// The shape of what it makes anew.
    fn makes(&self) -> Shape {
        let Args { rows, width, images, heads, head, tokens, padded, parts, .. } = self.args;
        match self.kernel {
            Kernel::SplitHeads => [3, images, heads, padded, head].map(|size| size as usize).to_vec().into(),
            Kernel::SplitParts => [parts, tokens, width].map(|size| size as usize).to_vec().into(),
            _ => [rows, width].map(|size| size as usize).to_vec().into(),
        }
    }

    fn starts_here(&self) -> Result<Option<Vec<u32>>> {
        self.starts.as_ref().map(Tensor::to_vec1).transpose()
    }
}

impl InplaceOp1 for Step {
    fn name(&self) -> &'static str {
        "fused step"
    }

    fn cpu_fwd(&self, to: &mut CpuStorage, layout: &Layout) -> Result<()> {
        plain::change(to, layout, |to| plain::softmax(to, &self.args))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, to: &mut CudaStorage, layout: &Layout) -> Result<()> {
        cuda::run(self, Args { to: cuda::address(to, layout)?, ..self.args }, to)
    }
}

impl InplaceOp2 for Step {
    fn name(&self) -> &'static str {
        "fused step"
    }

    fn cpu_fwd(&self, to: &mut CpuStorage, layout: &Layout, more: &CpuStorage, of_more: &Layout) -> Result<()> {
        let (more, starts) = (plain::read(more, of_more)?, self.starts_here()?.unwrap_or_default());
        plain::change(to, layout, |to| match self.kernel {
            Kernel::JoinHeads => plain::join_heads(to, &more, &self.args),
            Kernel::Append => plain::append(to, &more, &starts, &self.args),
            Kernel::Choose => plain::choose(to, &more, &starts, &self.args),
            Kernel::FinishGelu => plain::finish(to, &more, |y, _| plain::gelu(y)),
            _ => plain::finish(to, &more, |y, _| y),
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, to: &mut CudaStorage, layout: &Layout, more: &CudaStorage, of_more: &Layout) -> Result<()> {
        // A bias, or what is taken over.
        let from = cuda::address(more, of_more)?;
        let args = Args { to: cuda::address(to, layout)?, bias: from, from, ..self.args };
        // Scores are in a precision, choices never.
        cuda::run(self, args, if self.kernel == Kernel::Choose { more } else { to })
    }
}

impl InplaceOp3 for Step {
    fn name(&self) -> &'static str {
        "fused step"
    }

    fn cpu_fwd(
        &self,
        to: &mut CpuStorage,
        layout: &Layout,
        first: &CpuStorage,
        of_first: &Layout,
        second: &CpuStorage,
        of_second: &Layout,
    ) -> Result<()> {
        let (first, second) = (plain::read(first, of_first)?, plain::read(second, of_second)?);
        plain::change(to, layout, |to| match self.kernel {
            Kernel::Unfold => plain::unfold(to, &first, &second, &self.args),
            _ => plain::finish(to, &first, |y, at| y + second[at]),
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        to: &mut CudaStorage,
        layout: &Layout,
        first: &CudaStorage,
        of_first: &Layout,
        second: &CudaStorage,
        of_second: &Layout,
    ) -> Result<()> {
        let (first, second) = (cuda::address(first, of_first)?, cuda::address(second, of_second)?);
        let args = match self.kernel {
            // Bytes, and what they become.
            Kernel::Unfold => Args { from: first, bias: second, ..self.args },
            _ => Args { bias: first, residual: second, ..self.args },
        };
        cuda::run(self, Args { to: cuda::address(to, layout)?, ..args }, to)
    }
}

impl CustomOp2 for Step {
    fn name(&self) -> &'static str {
        "fused step"
    }

    fn cpu_fwd(
        &self,
        from: &CpuStorage,
        of_from: &Layout,
        more: &CpuStorage,
        of_more: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (numbers, more) = (plain::read(from, of_from)?, plain::read(more, of_more)?);
        let made = match self.kernel {
            Kernel::SplitHeads => plain::split_heads(&numbers, &more, &self.args),
            Kernel::SplitParts => plain::split_parts(&numbers, &more, &self.args),
            _ => plain::attend_rows(&numbers, &more, self.starts_here()?.as_deref(), &self.args),
        };
        Ok((plain::like(from, &made)?, self.makes()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        from: &CudaStorage,
        of_from: &Layout,
        more: &CudaStorage,
        of_more: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let shape = self.makes();
        let made = cuda::empty_like(from, shape.elem_count())?;
        let to = cuda::address(&made, &Layout::contiguous(&shape))?;
        // A bias, or what is remembered.
        let more = cuda::address(more, of_more)?;
        cuda::run(
            self,
            Args { to, from: cuda::address(from, of_from)?, bias: more, memory: more, ..self.args },
            &made,
        )?;
        Ok((made, shape))
    }
}

#[cfg(test)]
mod tests;
