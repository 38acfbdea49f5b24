//! The compute seam: everything that costs time in the model, as a few operations.
//!
//! Model code is written once in terms of [`Linear`], [`LayerNorm`], [`attend_image`] and the attention of
//! [`super::memory`]. Activations are matrices `[rows, width]`, a row being one token of one image or one caption. Behind
//! the seam stand candle's kernels, which run on any device in any precision, and our own for activations in f32 on a
//! CPU, where candle's products are slow for a few rows and its element-wise operations scalar: [`product`] with weights
//! that are [packed](packed) once, in f32 or bf16, or [`onednn`]'s, [`attention`] a head at a time, and the row kernels of
//! [`host`]. On a GPU what stands between candle's products is [`fused`].

mod attention;
mod finish;
pub(super) mod fused;
pub(super) mod host;
#[doc(hidden)]
pub mod kernels;
mod lanes;
mod linear;
mod onednn;
mod packed;
mod peak;
mod product;
mod softmax;

use candle_core::{CpuStorage, D, DType, Device, Layout, Result, Storage, Tensor};

pub(super) use self::attention::Hidden;
use self::fused::Follows;
pub use self::lanes::Isa;
use self::linear::{Folded, HostLinear};
pub(super) use self::onednn::{Factor, Library, Number, OneDnnError};
pub(super) use self::packed::Packing;
pub(super) use self::peak::multiply_adds;
pub(super) use self::softmax::log_sum_exp;
use super::load::LoadError;
use super::weights::{Kept, Scope};

/// Upper bound of attention scores held at a time on a device, in elements: large products are what is fast there.
const DEVICE_SCORES: usize = 1 << 29;

/// Whether the kernels of [`host`] apply.
pub(super) fn on_host(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == DType::F32
}

/// The numbers of a contiguous f32 tensor on a CPU.
pub(super) fn elements<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((from, to))) => Ok(&values[from..to]),
        _ => candle_core::bail!("a kernel of the host takes contiguous f32"),
    }
}

/// Makes rows of numbers of such rows.
fn on_elements(x: &Tensor, work: impl FnOnce(&[f32]) -> std::result::Result<Vec<f32>, OneDnnError>) -> Result<Tensor> {
    let rows = x.dim(0)?;
    let (storage, layout) = x.storage_and_layout();
    let y = work(elements(&storage, layout)?).map_err(candle_core::Error::wrap)?;
    let width = y.len() / rows.max(1);
    Tensor::from_vec(y, (rows, width), &Device::Cpu)
}

/// `x · weightᵀ + bias`, with what follows it in a transformer.
pub(super) enum Linear {
    /// On candle's products.
    Device {
        /// `[inputs, outputs]`.
        weight: Tensor,
        bias: Tensor,
        /// Whether what follows the product is [`fused`].
        fused: bool,
    },
    /// On packed weights: by our own products, or by oneDNN's.
    Host(HostLinear),
}

impl Linear {
    /// Reads `weight` and `bias`.
    pub(super) fn load(scope: &Scope<'_>, inputs: usize, outputs: usize) -> std::result::Result<Self, LoadError> {
        Self::load_fused(std::slice::from_ref(scope), inputs, outputs)
    }

    /// Several layers on the same input as one, their outputs side by side.
    pub(super) fn load_fused(
        scopes: &[Scope<'_>],
        inputs: usize,
        outputs: usize,
    ) -> std::result::Result<Self, LoadError> {
        let read = |name: &str, shape: &[usize]| {
            scopes.iter().map(|scope| scope.tensor(name, shape)).collect::<std::result::Result<Vec<_>, _>>()
        };
        let (weights, biases) = (read("weight", &[outputs, inputs])?, read("bias", &[outputs])?);
        let kept = scopes[0].kept();
        let fused = Tensor::cat(&weights, 0).and_then(|weight| Self::new(&weight, &Tensor::cat(&biases, 0)?, kept));
        fused.map_err(|error| scopes[0].error("weight", &error))
    }

    /// From `weight` `[outputs, inputs]` and `bias` `[outputs]`.
    pub(super) fn new(weight: &Tensor, bias: &Tensor, kept: Kept) -> Result<Self> {
        let (storage, layout) = weight.storage_and_layout();
        let linear = match kept {
            Kept::Tensors { fused } => return Ok(Self::Device { weight: weight.t()?, bias: bias.clone(), fused }),
            Kept::Packed(packing) => HostLinear::new(elements(&storage, layout)?, bias.to_vec1()?, packing),
            Kept::OneDnn { library, number } => {
                let weight = elements(&storage, layout)?;
                HostLinear::with_onednn(library, number, weight, bias.to_vec1()?).map_err(candle_core::Error::wrap)?
            }
        };
        Ok(Self::Host(linear))
    }

    /// `[rows, inputs]` to `[rows, outputs]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Host(linear) => on_elements(x, |x| linear.forward(x)),
            Self::Device { weight, bias, fused: true } => fused::finish(x.matmul(weight)?, bias, Follows::Bias),
            Self::Device { weight, bias, .. } => x.matmul(weight)?.broadcast_add(bias),
        }
    }

    /// With the exact (erf) GELU on top.
    pub(super) fn forward_gelu(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Host(linear) => on_elements(x, |x| linear.forward_gelu(x)),
            Self::Device { weight, bias, fused: true } => fused::finish(x.matmul(weight)?, bias, Follows::Gelu),
            Self::Device { weight, bias, .. } => x.matmul(weight)?.broadcast_add(bias)?.gelu_erf(),
        }
    }

    /// With `residual` `[rows, outputs]` added.
    pub(super) fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        match self {
            Self::Host(linear) => {
                let (storage, layout) = residual.storage_and_layout();
                let residual = elements(&storage, layout)?;
                on_elements(x, |x| linear.forward_add(x, residual))
            }
            Self::Device { weight, bias, fused: true } => fused::finish_add(x.matmul(weight)?, bias, residual),
            Self::Device { weight, bias, .. } => x.matmul(weight)?.broadcast_add(bias)? + residual,
        }
    }

    /// The transposed result, `[outputs, rows]`, without transposing: `weight · xᵀ + bias`.
    pub(super) fn forward_transposed(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Host(_) => candle_core::bail!("the host folds these layers, and transposes none"),
            Self::Device { weight, bias, .. } => weight.t()?.matmul(&x.t()?)?.broadcast_add(&bias.unsqueeze(1)?),
        }
    }

    /// The result with its outputs parted, `[parts, rows, outputs / parts]`.
    pub(super) fn forward_parts(&self, x: &Tensor, parts: usize) -> Result<Tensor> {
        match self {
            Self::Device { weight, bias, fused: true } => fused::split_parts(&x.matmul(weight)?, bias, parts),
            _ => candle_core::bail!("only fused layers part their outputs"),
        }
    }

    /// The weights of each of these outputs, `[outputs, inputs]`, as they are kept.
    pub(super) fn outputs(&self, outputs: &[u32]) -> Result<Tensor> {
        match self {
            Self::Host(linear) => {
                let rows: Option<Vec<_>> = outputs.iter().map(|output| linear.output(*output as usize)).collect();
                let Some(rows) = rows else { candle_core::bail!("oneDNN's packed weights cannot be read back") };
                let width = rows.first().map_or(0, Vec::len);
                Tensor::from_vec(rows.concat(), (outputs.len(), width), &Device::Cpu)
            }
            Self::Device { weight, .. } => weight.t()?.index_select(&Tensor::new(outputs, weight.device())?, 0),
        }
    }
}

/// The decoder's projections of an image's keys and values, where they are folded into queries and contexts; see
/// [`Folded`].
pub(super) struct ImageProjection(Folded);

impl ImageProjection {
    /// Reads `key` and `value`; `None` where they are not to be folded.
    pub(super) fn load(
        scope: &Scope<'_>,
        inputs: usize,
        outputs: usize,
        heads: usize,
    ) -> std::result::Result<Option<Self>, LoadError> {
        let Kept::Packed(packing) = scope.kept() else { return Ok(None) };
        let weight = |part: &str| scope.part(part).tensor("weight", &[outputs, inputs]);
        let (keys, values) = (weight("key")?, weight("value")?);
        let bias = scope.part("value").tensor("bias", &[outputs])?;
        let fold = || {
            let (keys, values) = (keys.storage_and_layout(), values.storage_and_layout());
            let (keys, values) = (elements(&keys.0, keys.1)?, elements(&values.0, values.1)?);
            Ok(Self(Folded::new(keys, values, bias.to_vec1()?, heads, packing)))
        };
        fold().map(Some).map_err(|error| scope.error("key.weight", &error))
    }

    /// Lets queries `[tokens, heads · head]` attend each to its image; the contexts are of the same shape.
    pub(super) fn attend(&self, queries: &[f32], images: &[&Hidden]) -> Vec<f32> {
        self.0.contexts(&attention::attend_hidden(images, &self.0.queries(queries), self.0.heads(), self.0.scale()))
    }
}

/// A product as large as those of an encoder, for finding the machine's ceiling: its operations, and the work.
pub(super) fn large_product(kept: Kept, dtype: DType) -> Result<(f64, impl FnMut())> {
    let (rows, inputs, outputs) = (1152, 768, 3072);
    let weight = Tensor::full(0.5f32, (outputs, inputs), &Device::Cpu)?.to_dtype(dtype)?;
    let layer = Linear::new(&weight, &Tensor::zeros(outputs, dtype, &Device::Cpu)?, kept)?;
    let x = Tensor::full(0.25f32, (rows, inputs), &Device::Cpu)?.to_dtype(dtype)?;
    layer.forward(&x)?;
    let work = move || drop(std::hint::black_box(layer.forward(&x)));
    Ok((2.0 * (rows * inputs * outputs) as f64, work))
}

/// Layer normalisation over the last dimension.
pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f32,
}

impl LayerNorm {
    /// Reads `weight` and `bias`.
    pub(super) fn load(scope: &Scope<'_>, width: usize, eps: f64) -> std::result::Result<Self, LoadError> {
        let weight = scope.tensor("weight", &[width])?;
        let bias = scope.tensor("bias", &[width])?;
        Ok(Self { weight, bias, eps: eps as f32 })
    }

    /// `[rows, width]` to the same shape.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if on_host(x) {
            let parameters = (self.weight.storage_and_layout(), self.bias.storage_and_layout());
            let (weight, bias) =
                (elements(&parameters.0.0, parameters.0.1)?, elements(&parameters.1.0, parameters.1.1)?);
            return on_elements(x, |x| Ok(host::layer_norm(x, weight, bias, self.eps)));
        }
        candle_nn::ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

/// The encoder's self-attention: every token of an image attends to all tokens of that image.
///
/// `project` makes of `x`, `[images · tokens, width]`, queries, keys and values side by side, each split over the heads.
/// The result is of the shape of `x`.
pub(super) fn self_attention(project: &Linear, x: &Tensor, images: usize, heads: usize, isa: Isa) -> Result<Tensor> {
    match project {
        Linear::Device { weight, bias, fused: true } if fused::fits(x.dim(0)? / images, x.dtype()) => {
            fused::attend(&x.matmul(weight)?, bias, images, heads)
        }
        _ => attend_image(&project.forward(x)?, images, heads, isa),
    }
}

/// The same of what is projected already, `[images · tokens, 3 · width]`.
fn attend_image(qkv: &Tensor, images: usize, heads: usize, isa: Isa) -> Result<Tensor> {
    let (rows, width) = qkv.dims2()?;
    let (tokens, width) = (rows / images, width / 3);
    let head = width / heads;
    let scale = 1.0 / (head as f64).sqrt();
    if on_host(qkv) {
        let (storage, layout) = qkv.storage_and_layout();
        let contexts = attention::attend_self(isa, elements(&storage, layout)?, images, tokens, heads);
        return Tensor::from_vec(contexts, (rows, width), &Device::Cpu);
    }
    let parts = qkv.reshape((images, tokens, 3, heads, head))?.permute((2, 0, 3, 1, 4))?;
    let group = (DEVICE_SCORES / (heads * tokens * tokens)).clamp(1, images);
    let mut contexts = Vec::with_capacity(images.div_ceil(group));
    for first in (0..images).step_by(group) {
        let part = |which: usize| {
            parts.narrow(0, which, 1)?.squeeze(0)?.narrow(0, first, group.min(images - first))?.contiguous()
        };
        let queries = (part(0)? * scale)?;
        let keys = part(1)?;
        let probabilities = candle_nn::ops::softmax_last_dim(&queries.matmul(&keys.transpose(2, 3)?)?)?;
        contexts.push(probabilities.matmul(&part(2)?)?);
    }
    Tensor::cat(&contexts, 0)?.transpose(1, 2)?.reshape((rows, width))
}

/// Attention of a few queries on remembered keys and values.
///
/// `queries` is `[rows, heads, tokens, head]`; `keys` and `values` are `[rows, heads, head, length]`, transposed as they
/// are stored; `mask`, `[rows, 1, tokens, length]`, is added to the scores. The result is `[rows, heads, tokens, head]`.
pub(super) fn attend_memory(queries: &Tensor, keys: &Tensor, values: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let scale = 1.0 / (queries.dim(D::Minus1)? as f64).sqrt();
    let mut scores = (queries * scale)?.matmul(keys)?;
    if let Some(mask) = mask {
        scores = scores.broadcast_add(mask)?;
    }
    candle_nn::ops::softmax_last_dim(&scores)?.matmul(&values.transpose(2, 3)?)
}
