//! The language model of BLIP in all its parts: BERT with cross-attention to an image, causal where it writes and both ways
//! where it reads (`BlipTextModel` of transformers). Where answers are written, a question that was read stands for the image.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::compute::{Hidden, ImageProjection, Isa, LayerNorm, Linear, Packing, elements, self_attention};
use super::config::TextConfig;
use super::load::LoadError;
use super::memory::{ImageMemory, Memory, Sizes};
use super::weights::{Kept, Scope};

/// Embeddings and layers, but for the table of the words.
pub(super) struct Bert {
    sizes: Sizes,
    /// What attention runs on, on a CPU.
    isa: Isa,
    positions: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
    images: Images,
}

/// What is remembered of an image.
enum Images {
    /// Its keys and values for all layers, `[layers · 2 · width, image width]`.
    Projected(Linear),
    /// The same, a token a row.
    Rows(Linear),
    /// Its hidden states, in bf16 or in f32: each layer folds its projections into queries and contexts.
    Hidden(Packing),
}

struct Layer {
    qkv: Linear,
    text_out: Linear,
    text_norm: LayerNorm,
    image_query: Linear,
    /// Where images are remembered by their hidden states.
    image: Option<ImageProjection>,
    image_out: Linear,
    image_norm: LayerNorm,
    up: Linear,
    down: Linear,
    norm: LayerNorm,
}

/// What tokens attend to.
pub(super) enum Attention<'m> {
    /// Those before them and themselves, and their row's image; the block was announced to the memory.
    Causal(&'m mut dyn Memory),
    /// All tokens of their text, of so many texts of one length.
    Whole(usize),
    /// The same, and their text's image: a text is a row of the memory, to which its tokens were announced.
    WholeAndImage(usize, &'m mut dyn Memory),
}

impl Bert {
    /// Reads `embeddings` and `encoder`; `sizes` are those of what it looks at, too.
    pub(super) fn load(scope: &Scope<'_>, text: &TextConfig, sizes: Sizes) -> std::result::Result<Self, LoadError> {
        let (width, eps) = (text.hidden_size, text.layer_norm_eps);
        let embeddings = scope.part("embeddings");
        let mut layers = Vec::with_capacity(text.num_hidden_layers);
        let mut keys_values = Vec::with_capacity(2 * text.num_hidden_layers);
        for index in 0..text.num_hidden_layers {
            let scope = scope.part("encoder.layer").part(index);
            layers.push(Layer::load(&scope, text, sizes.image_width)?);
            let attention = scope.part("crossattention.self");
            keys_values.extend(["key", "value"].map(|part| attention.part(part)));
        }
        let projection = || Linear::load_fused(&keys_values, sizes.image_width, width);
        let images = match scope.kept() {
            kept @ Kept::Tensors { .. } if sizes.in_rows(kept) => Images::Rows(projection()?),
            Kept::Tensors { .. } => Images::Projected(projection()?),
            Kept::Packed(packing) => Images::Hidden(packing),
            Kept::OneDnn { .. } => unreachable!("the language model is never kept for oneDNN"),
        };
        Ok(Self {
            sizes,
            isa: scope.kept().isa(),
            positions: embeddings.tensor("position_embeddings.weight", &[text.max_position_embeddings, width])?,
            norm: LayerNorm::load(&embeddings.part("LayerNorm"), width, eps)?,
            layers,
            images,
        })
    }

    /// The memories of images from their hidden states, `[images · each, image width]`, in their order.
    pub(super) fn remember(&self, hidden: &Tensor, each: usize) -> Result<Vec<ImageMemory>> {
        let images = hidden.dim(0)? / each;
        let remember = |image| self.remember_one(&hidden.narrow(0, image * each, each)?);
        // On a GPU calls are only given to it, one after the other.
        if self.positions.device().is_cpu() {
            (0..images).into_par_iter().map(remember).collect()
        } else {
            (0..images).map(remember).collect()
        }
    }

    fn remember_one(&self, image: &Tensor) -> Result<ImageMemory> {
        let Sizes { layers, heads, head, image_width, .. } = self.sizes;
        match &self.images {
            Images::Projected(keys_values) => {
                let keys_values = keys_values.forward_transposed(image)?;
                Ok(ImageMemory::Projected(keys_values.reshape((layers, 2, heads, head, image.dim(0)?))?))
            }
            Images::Rows(keys_values) => Ok(ImageMemory::Rows(keys_values.forward_parts(image, 2 * layers)?)),
            Images::Hidden(packing) => {
                let (storage, layout) = image.storage_and_layout();
                Ok(ImageMemory::Hidden(Hidden::new(elements(&storage, layout)?, image_width, *packing)))
            }
        }
    }

    /// The hidden states of tokens from their `words` `[tokens, hidden]` and their positions.
    pub(super) fn forward(
        &self,
        words: &Tensor,
        positions: impl IntoIterator<Item = usize>,
        mut attention: Attention<'_>,
    ) -> Result<Tensor> {
        let last = self.positions.dim(0)? - 1;
        let positions = positions.into_iter().map(|position| position.min(last) as u32);
        let positions = Tensor::from_iter(positions, self.positions.device())?;
        let mut x = self.norm.forward(&(words + self.positions.index_select(&positions, 0)?)?)?;
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(index, &x, &mut attention, self.sizes.heads, self.isa)?;
        }
        Ok(x)
    }
}

impl Layer {
    fn load(scope: &Scope<'_>, config: &TextConfig, image_width: usize) -> std::result::Result<Self, LoadError> {
        let (width, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let image = scope.part("crossattention.self");
        let square = |name: &str| Linear::load(&scope.part(name), width, width);
        let norm = |name: &str| LayerNorm::load(&scope.part(name), width, eps);
        let parts = ["query", "key", "value"].map(|part| scope.part(format!("attention.self.{part}")));
        Ok(Self {
            qkv: Linear::load_fused(&parts, width, width)?,
            text_out: square("attention.output.dense")?,
            text_norm: norm("attention.output.LayerNorm")?,
            image_query: square("crossattention.self.query")?,
            image: ImageProjection::load(&image, image_width, width, config.num_attention_heads)?,
            image_out: square("crossattention.output.dense")?,
            image_norm: norm("crossattention.output.LayerNorm")?,
            up: Linear::load(&scope.part("intermediate.dense"), width, inner)?,
            down: Linear::load(&scope.part("output.dense"), inner, width)?,
            norm: norm("output.LayerNorm")?,
        })
    }

    fn forward(
        &self,
        index: usize,
        x: &Tensor,
        attention: &mut Attention<'_>,
        heads: usize,
        isa: Isa,
    ) -> Result<Tensor> {
        let (context, memory) = match attention {
            Attention::Causal(memory) => (memory.attend_text(index, &self.qkv.forward(x)?)?, Some(memory)),
            Attention::Whole(texts) => (self_attention(&self.qkv, x, *texts, heads, isa)?, None),
            Attention::WholeAndImage(texts, memory) => {
                (self_attention(&self.qkv, x, *texts, heads, isa)?, Some(memory))
            }
        };
        let mut x = self.text_norm.forward(&self.text_out.forward_add(&context, x)?)?;
        if let Some(memory) = memory {
            let queries = self.image_query.forward(&x)?;
            let context = memory.attend_image(index, &queries, self.image.as_ref())?;
            x = self.image_norm.forward(&self.image_out.forward_add(&context, &x)?)?;
        }
        let inner = self.up.forward_gelu(&x)?;
        self.norm.forward(&self.down.forward_add(&inner, &x)?)
    }
}
