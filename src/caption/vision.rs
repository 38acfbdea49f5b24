//! The image encoder: a vision transformer (`BlipVisionModel` of transformers).

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::Pixels;
use super::compute::{Isa, LayerNorm, Linear, fused, on_host, self_attention};
use super::config::VisionConfig;
use super::load::LoadError;
use super::preprocess::Normalize;
use super::weights::Scope;

/// The image encoder.
pub(super) struct VisionEncoder {
    config: VisionConfig,
    /// What attention runs on, on a CPU.
    isa: Isa,
    /// The encoder's input for each of the 256 values of a byte, in red, green and blue.
    levels: [[f32; 256]; 3],
    /// The same where patches are made by a fused step, `[3, 256]`.
    fused_levels: Option<Tensor>,
    patch: Linear,
    class: Tensor,
    position: Tensor,
    layers: Vec<Layer>,
    norm: LayerNorm,
}

struct Layer {
    norm1: LayerNorm,
    qkv: Linear,
    projection: Linear,
    norm2: LayerNorm,
    up: Linear,
    down: Linear,
}

impl VisionEncoder {
    /// Reads `embeddings`, `encoder` and `post_layernorm`.
    pub(super) fn load(
        scope: &Scope<'_>,
        config: &VisionConfig,
        normalize: &Normalize,
    ) -> std::result::Result<Self, LoadError> {
        let width = config.hidden_size;
        let embeddings = scope.part("embeddings");
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::load(&scope.part("encoder.layers").part(index), config))
            .collect::<std::result::Result<_, _>>()?;
        let levels = levels(normalize);
        let on_device = || Tensor::from_slice(levels.as_flattened(), (3, 256), scope.device());
        let fused_levels = scope.kept().is_fused().then(on_device).transpose();
        Ok(Self {
            levels,
            fused_levels: fused_levels.map_err(|error| LoadError::Device(error.to_string()))?,
            patch: load_patch(&embeddings.part("patch_embedding"), config)?,
            class: embeddings.tensor("class_embedding", &[1, 1, width])?,
            position: embeddings.tensor("position_embedding", &[1, config.tokens(), width])?,
            layers,
            norm: LayerNorm::load(&scope.part("post_layernorm"), width, config.layer_norm_eps)?,
            isa: scope.kept().isa(),
            config: config.clone(),
        })
    }

    /// Images of the model's size to hidden states, `[images · tokens, width]`.
    pub(super) fn forward(&self, images: &[Pixels]) -> Result<Tensor> {
        let mut x = self.embed(images)?;
        for layer in &self.layers {
            x = layer.forward(&x, images.len(), self.config.num_attention_heads, self.isa)?;
        }
        self.norm.forward(&x)
    }

    fn embed(&self, images: &[Pixels]) -> Result<Tensor> {
        let (tokens, width) = (self.config.tokens(), self.config.hidden_size);
        let patches = match &self.fused_levels {
            Some(levels) => fused::unfold(&self.upload(images)?, levels, self.config.patch_size, self.class.dtype())?,
            None if on_host(&self.class) => self.unfold(images)?,
            None => self.unfold_on_device(images)?,
        };
        let patches = self.patch.forward(&patches)?.reshape((images.len(), tokens - 1, width))?;
        let class = self.class.broadcast_as((images.len(), 1, width))?;
        let x = Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.position)?;
        x.reshape((images.len() * tokens, width))
    }

    /// A patch a row, `[images · grid · grid, 3 · patch · patch]`, in the order of the convolution's weights: channel,
    /// row, column. On all cores.
    fn unfold(&self, images: &[Pixels]) -> Result<Tensor> {
        let (grid, patch) = (self.config.grid(), self.config.patch_size);
        let size = 3 * patch * patch;
        let mut values = vec![0.0; images.len() * grid * grid * size];
        values.par_chunks_exact_mut(grid * size).enumerate().for_each(|(index, to)| {
            let (image, top) = (&images[index / grid], index % grid * patch);
            let stride = image.size() * 3;
            let mut rows = to.chunks_exact_mut(patch);
            for left in (0..grid).map(|column| column * patch) {
                for (channel, levels) in self.levels.iter().enumerate() {
                    for (row, to) in (top..top + patch).zip(&mut rows) {
                        let from = row * stride + left * 3;
                        let pixels = image.data()[from..from + patch * 3].chunks_exact(3);
                        to.iter_mut().zip(pixels).for_each(|(to, pixel)| *to = levels[usize::from(pixel[channel])]);
                    }
                }
            }
        });
        Tensor::from_vec(values, (images.len() * grid * grid, size), &Device::Cpu)
    }

    /// The pixels as bytes on the device, `[images, size, size, 3]`.
    fn upload(&self, images: &[Pixels]) -> Result<Tensor> {
        let size = self.config.image_size;
        let bytes: Vec<&[u8]> = images.iter().map(Pixels::data).collect();
        Tensor::from_vec(bytes.concat(), (images.len(), size, size, 3), self.class.device())
    }

    /// The patches on a device, by operations of candle.
    fn unfold_on_device(&self, images: &[Pixels]) -> Result<Tensor> {
        let (grid, patch, device) = (self.config.grid(), self.config.patch_size, self.class.device());
        let (bytes, side) = (self.upload(images)?, grid * patch);
        // Pixels at the edge that fill no patch are left out.
        let bytes =
            bytes.narrow(1, 0, side)?.narrow(2, 0, side)?.reshape((images.len(), grid, patch, grid, patch, 3))?;
        let patches = bytes.permute((0, 1, 3, 5, 2, 4))?.contiguous()?;
        let patches = patches.reshape((images.len() * grid * grid, 3, patch * patch))?.to_dtype(DType::F32)?;
        // What the first byte becomes, and what each further one adds.
        let first = self.levels.map(|levels| levels[0]);
        let step = self.levels.map(|levels| (levels[255] - levels[0]) / 255.0);
        let of_channels = |values: [f32; 3]| Tensor::new(&values, device)?.reshape((3, 1));
        let patches = patches.broadcast_mul(&of_channels(step)?)?.broadcast_add(&of_channels(first)?)?;
        patches.to_dtype(self.class.dtype())?.reshape((images.len() * grid * grid, 3 * patch * patch))
    }
}

fn levels(normalize: &Normalize) -> [[f32; 256]; 3] {
    let Normalize { scale, mean, std } = normalize;
    std::array::from_fn(|channel| std::array::from_fn(|value| (value as f32 * scale - mean[channel]) / std[channel]))
}

/// The convolution that embeds patches, whose steps are as long as its kernel, as a linear layer on unfolded patches.
fn load_patch(scope: &Scope<'_>, config: &VisionConfig) -> std::result::Result<Linear, LoadError> {
    let (width, side) = (config.hidden_size, config.patch_size);
    let kernel = scope.tensor("weight", &[width, 3, side, side])?;
    let bias = scope.tensor("bias", &[width])?;
    let linear = kernel.reshape((width, 3 * side * side)).and_then(|weight| Linear::new(&weight, &bias, scope.kept()));
    linear.map_err(|error| scope.error("weight", &error))
}

impl Layer {
    fn load(scope: &Scope<'_>, config: &VisionConfig) -> std::result::Result<Self, LoadError> {
        let (width, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        Ok(Self {
            norm1: LayerNorm::load(&scope.part("layer_norm1"), width, eps)?,
            qkv: Linear::load(&scope.part("self_attn.qkv"), width, 3 * width)?,
            projection: Linear::load(&scope.part("self_attn.projection"), width, width)?,
            norm2: LayerNorm::load(&scope.part("layer_norm2"), width, eps)?,
            up: Linear::load(&scope.part("mlp.fc1"), width, inner)?,
            down: Linear::load(&scope.part("mlp.fc2"), inner, width)?,
        })
    }

    fn forward(&self, x: &Tensor, images: usize, heads: usize, isa: Isa) -> Result<Tensor> {
        let context = self_attention(&self.qkv, &self.norm1.forward(x)?, images, heads, isa)?;
        let x = self.projection.forward_add(&context, x)?;
        let inner = self.up.forward_gelu(&self.norm2.forward(&x)?)?;
        self.down.forward_add(&inner, &x)
    }
}
