//! The compute seam: everything that costs time in the model, as four operations.
//!
//! Model code is written once in terms of [`Linear`], [`LayerNorm`], [`ImageAttention`](attend_image) and the
//! attention of [`super::memory`]. Activations are matrices `[rows, width]`, a row being one token of one image or one
//! caption. Behind the seam stand candle's kernels, which run on any device in any precision, and [`host`]'s for f32 on
//! a CPU, where candle's element-wise operations are scalar or pass over the data once more for each step.

pub(super) mod host;

use candle_core::{D, DType, Result, Tensor};

use super::load::LoadError;
use super::weights::Scope;

/// Upper bound of attention scores held at a time on a CPU, in elements: enough to keep all cores busy, little enough
/// to stay in the caches.
const HOST_SCORES: usize = 1 << 20;
/// The same on a GPU, where large products are what is fast.
const DEVICE_SCORES: usize = 1 << 29;

/// Whether the kernels of [`host`] apply.
pub(super) fn on_host(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == DType::F32
}

/// `x · weightᵀ + bias`, with what follows it in a transformer.
pub(super) struct Linear {
    /// `[inputs, outputs]`.
    weight: Tensor,
    bias: Tensor,
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
        let fused = Tensor::cat(&weights, 0).and_then(|weight| Self::new(&weight, Tensor::cat(&biases, 0)?));
        fused.map_err(|error| scopes[0].error("weight", &error))
    }

    /// From `weight` `[outputs, inputs]` and `bias` `[outputs]`.
    pub(super) fn new(weight: &Tensor, bias: Tensor) -> Result<Self> {
        let transposed = weight.t()?;
        // On a CPU a view would be repacked element by element at each call, which takes longer than the product
        // itself when the batch is small.
        let weight = if on_host(weight) { transposed.contiguous()? } else { transposed };
        Ok(Self { weight, bias })
    }

    /// `[rows, inputs]` to `[rows, outputs]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight)?;
        if on_host(&y) {
            host::add_bias(&y, &self.bias)?;
            return Ok(y);
        }
        y.broadcast_add(&self.bias)
    }

    /// With the exact (erf) GELU on top.
    pub(super) fn forward_gelu(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight)?;
        if on_host(&y) {
            host::add_bias_gelu(&y, &self.bias)?;
            return Ok(y);
        }
        y.broadcast_add(&self.bias)?.gelu_erf()
    }

    /// With `residual` `[rows, outputs]` added.
    pub(super) fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight)?;
        if on_host(&y) {
            host::add_bias_residual(&y, &self.bias, residual)?;
            return Ok(y);
        }
        y.broadcast_add(&self.bias)? + residual
    }

    /// The transposed result, `[outputs, rows]`, without transposing: `weight · xᵀ + bias`.
    pub(super) fn forward_transposed(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.weight.t()?.matmul(&x.t()?)?;
        if on_host(&y) {
            host::add_bias_to_columns(&y, &self.bias)?;
            return Ok(y);
        }
        y.broadcast_add(&self.bias.unsqueeze(1)?)
    }
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
            return host::layer_norm(x, &self.weight, &self.bias, self.eps);
        }
        candle_nn::ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

/// The encoder's self-attention: every token of an image attends to all tokens of that image.
///
/// `qkv` is `[images · tokens, 3 · width]`, queries, keys and values side by side, each split over the heads. The
/// result is `[images · tokens, width]`.
pub(super) fn attend_image(qkv: &Tensor, images: usize, heads: usize) -> Result<Tensor> {
    let (rows, width) = qkv.dims2()?;
    let (tokens, width) = (rows / images, width / 3);
    let head = width / heads;
    let scale = 1.0 / (head as f64).sqrt();
    if on_host(qkv) {
        // One image and a few heads at a time: views suffice, and the scores stay in the caches.
        let group = (HOST_SCORES / (tokens * tokens)).clamp(1, heads);
        let mut contexts = Vec::with_capacity(images);
        for image in 0..images {
            let parts =
                qkv.narrow(0, image * tokens, tokens)?.reshape((tokens, 3, heads, head))?.permute((1, 2, 0, 3))?;
            let mut groups = Vec::with_capacity(heads.div_ceil(group));
            for first in (0..heads).step_by(group) {
                let part =
                    |which: usize| parts.narrow(0, which, 1)?.squeeze(0)?.narrow(0, first, group.min(heads - first));
                let scores = part(0)?.matmul(&part(1)?.transpose(1, 2)?)?;
                host::softmax_scaled(&scores, scale as f32)?;
                groups.push(scores.matmul(&part(2)?)?);
            }
            contexts.push(Tensor::cat(&groups, 0)?.transpose(0, 1)?.reshape((tokens, width))?);
        }
        return Tensor::cat(&contexts, 0);
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
