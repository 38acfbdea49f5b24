//! The caption decoder: BERT with causal self-attention and cross-attention to the image (`BlipTextLMHeadModel` of
//! transformers).

use candle_core::{Result, Tensor};

use super::compute::{Hidden, ImageProjection, LayerNorm, Linear, Packing, elements};
use super::config::{BlipConfig, TextConfig};
use super::load::LoadError;
use super::memory::{Block, ImageMemory, Memory, Sizes};
use super::weights::{Kept, Scope};

/// The caption decoder.
pub(super) struct TextDecoder {
    config: TextConfig,
    sizes: Sizes,
    words: Words,
    positions: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
    images: Images,
    head: Head,
}

/// The embedding of the words, `[vocabulary, width]`.
enum Words {
    Table(Tensor),
    /// The head's weight, of which there is no other copy.
    Head,
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

struct Head {
    dense: Linear,
    norm: LayerNorm,
    words: Linear,
    /// Whether its weight is the embedding of the words.
    tied: bool,
}

impl TextDecoder {
    /// Reads `bert` and `cls`.
    pub(super) fn load(scope: &Scope<'_>, config: &BlipConfig) -> std::result::Result<Self, LoadError> {
        let text = &config.text;
        let (width, eps) = (text.hidden_size, text.layer_norm_eps);
        let bert = scope.part("bert");
        let embeddings = bert.part("embeddings");
        let (words, head) = Head::load(scope, text)?;
        let mut layers = Vec::with_capacity(text.num_hidden_layers);
        let mut keys_values = Vec::with_capacity(2 * text.num_hidden_layers);
        for index in 0..text.num_hidden_layers {
            let scope = bert.part("encoder.layer").part(index);
            layers.push(Layer::load(&scope, text, config.vision.hidden_size)?);
            let attention = scope.part("crossattention.self");
            keys_values.extend(["key", "value"].map(|part| attention.part(part)));
        }
        let sizes = Sizes::of(config);
        let projection = || Linear::load_fused(&keys_values, config.vision.hidden_size, width);
        let images = match scope.kept() {
            kept @ Kept::Tensors { .. } if sizes.in_rows(kept) => Images::Rows(projection()?),
            Kept::Tensors { .. } => Images::Projected(projection()?),
            Kept::Packed(packing) => Images::Hidden(packing),
            Kept::OneDnn { .. } => unreachable!("the decoder is never kept for oneDNN"),
        };
        Ok(Self {
            config: text.clone(),
            sizes,
            words,
            positions: embeddings.tensor("position_embeddings.weight", &[text.max_position_embeddings, width])?,
            norm: LayerNorm::load(&embeddings.part("LayerNorm"), width, eps)?,
            layers,
            images,
            head,
        })
    }

    /// Whether the head's weight is the embedding of the words.
    pub(super) fn is_tied(&self) -> bool {
        self.head.tied
    }

    /// The memory of an image from its hidden states, `[tokens, image width]`.
    pub(super) fn remember(&self, image: &Tensor) -> Result<ImageMemory> {
        let Sizes { layers, heads, head, image_tokens, image_width } = self.sizes;
        match &self.images {
            Images::Projected(keys_values) => {
                let keys_values = keys_values.forward_transposed(image)?;
                Ok(ImageMemory::Projected(keys_values.reshape((layers, 2, heads, head, image_tokens))?))
            }
            Images::Rows(keys_values) => Ok(ImageMemory::Rows(keys_values.forward_parts(image, 2 * layers)?)),
            Images::Hidden(packing) => {
                let (storage, layout) = image.storage_and_layout();
                Ok(ImageMemory::Hidden(Hidden::new(elements(&storage, layout)?, image_width, *packing)))
            }
        }
    }

    /// The hidden states `[rows · width, hidden]` of a block of tokens, which `memory` remembers from then on.
    pub(super) fn forward(&self, tokens: &[u32], block: &Block, memory: &mut dyn Memory) -> Result<Tensor> {
        memory.begin(block)?;
        let device = self.positions.device();
        let last = self.config.max_position_embeddings - 1;
        let positions =
            block.starts.iter().flat_map(|start| (0..block.width).map(move |offset| (start + offset).min(last) as u32));
        let positions = self.positions.index_select(&Tensor::from_iter(positions, device)?, 0)?;
        let words = match &self.words {
            Words::Table(words) => words.index_select(&Tensor::new(tokens, device)?, 0)?,
            Words::Head => self.head.words.outputs(tokens)?,
        };
        let mut x = self.norm.forward(&(words + positions)?)?;
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(index, &x, memory)?;
        }
        Ok(x)
    }

    /// Scores of the whole vocabulary, `[rows, vocabulary]`, for hidden states `[rows, hidden]`.
    pub(super) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let x = self.head.norm.forward(&self.head.dense.forward_gelu(hidden)?)?;
        self.head.words.forward(&x)
    }
}

impl Head {
    /// Also returns the embedding of the words, which is the head's weight where a model ties them.
    ///
    /// As in the reference, a file that has only one of the two serves both; so does one that has both and equal.
    fn load(scope: &Scope<'_>, config: &TextConfig) -> std::result::Result<(Words, Self), LoadError> {
        const WORDS: &str = "bert.embeddings.word_embeddings.weight";
        const DECODER: &str = "cls.predictions.decoder.weight";
        let (width, vocabulary) = (config.hidden_size, config.vocab_size);
        let shape = [vocabulary, width];
        let fail = |error: candle_core::Error| scope.error(DECODER, &error);
        let (words, decoder, tied) = match (scope.contains(WORDS), scope.contains(DECODER)) {
            (false, true) => {
                let shared = scope.tensor(DECODER, &shape)?;
                (shared.clone(), shared, true)
            }
            (_, false) => {
                let shared = scope.tensor(WORDS, &shape)?;
                (shared.clone(), shared, true)
            }
            (true, true) => {
                let (words, decoder) = (scope.tensor(WORDS, &shape)?, scope.tensor(DECODER, &shape)?);
                if equal(&words, &decoder).map_err(fail)? {
                    (words.clone(), words, true)
                } else {
                    (words, decoder, false)
                }
            }
        };
        let predictions = scope.part("cls.predictions");
        let bias = if predictions.contains("decoder.bias") { "decoder.bias" } else { "bias" };
        let transform = predictions.part("transform");
        let head = Self {
            dense: Linear::load(&transform.part("dense"), width, width)?,
            norm: LayerNorm::load(&transform.part("LayerNorm"), width, config.layer_norm_eps)?,
            words: Linear::new(&decoder, &predictions.tensor(bias, &[vocabulary])?, scope.kept()).map_err(fail)?,
            tied,
        };
        Ok((if tied { Words::Head } else { Words::Table(words) }, head))
    }
}

fn equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(a.ne(b)?.flatten_all()?.max(0)?.to_scalar::<u8>()? == 0)
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

    fn forward(&self, index: usize, x: &Tensor, memory: &mut dyn Memory) -> Result<Tensor> {
        let context = memory.attend_text(index, &self.qkv.forward(x)?)?;
        let x = self.text_norm.forward(&self.text_out.forward_add(&context, x)?)?;
        let queries = self.image_query.forward(&x)?;
        let context = memory.attend_image(index, &queries, self.image.as_ref())?;
        let x = self.image_norm.forward(&self.image_out.forward_add(&context, &x)?)?;
        let inner = self.up.forward_gelu(&x)?;
        self.norm.forward(&self.down.forward_add(&inner, &x)?)
    }
}
