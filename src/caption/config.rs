//! A model's sizes, read from `config.json` and `preprocessor_config.json` as the reference implementation reads them.
//!
//! A key that a file leaves out has the default of transformers' `BlipTextConfig`, `BlipVisionConfig` and
//! `BlipImageProcessor`.

mod architecture;

use serde::Deserialize;

use super::load::LoadError;

pub use architecture::Architecture;

/// `config.json`, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct BlipConfig {
    /// The caption decoder.
    pub text: TextConfig,
    /// The image encoder.
    pub vision: VisionConfig,
    /// Numbers of an embedding, where images and texts have one space.
    pub shared_width: usize,
    /// What kind of model it is, where the file says so.
    pub architecture: Option<Architecture>,
}

/// Sizes and special tokens of the caption decoder.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    /// Rows of the token embedding and of the language-model head.
    pub vocab_size: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Attention heads of each layer.
    pub num_attention_heads: usize,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// Activation of the feed-forward layers and the head.
    pub hidden_act: String,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
    /// `[DEC]`: the first token of every sequence.
    pub bos_token_id: u32,
    /// Fills short rows; its value never reaches a caption.
    pub pad_token_id: u32,
    /// `[SEP]`: ends a caption.
    pub sep_token_id: u32,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30_524,
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 512,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-12,
            bos_token_id: 30_522,
            pad_token_id: 0,
            sep_token_id: 102,
        }
    }
}

/// Sizes of the image encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Attention heads of each layer.
    pub num_attention_heads: usize,
    /// Side of the square image, in pixels.
    pub image_size: usize,
    /// Side of a patch, in pixels. A remainder at the right and lower edge is not looked at.
    pub patch_size: usize,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
}

/// As the file has it: sizes may be a number or a pair.
#[derive(Deserialize)]
#[serde(default)]
struct RawVision {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    image_size: Side,
    patch_size: Side,
    hidden_act: String,
    layer_norm_eps: f64,
}

impl Default for RawVision {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: Side::One(384),
            patch_size: Side::One(16),
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-5,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Side {
    One(usize),
    Pair([usize; 2]),
}

impl Side {
    fn of_square(&self, key: &str) -> Result<usize, LoadError> {
        match *self {
            Side::One(side) => Ok(side),
            Side::Pair([height, width]) if height == width => Ok(height),
            Side::Pair(pair) => {
                Err(invalid(key, format!("{pair:?} is not a square, and only square images are taken")))
            }
        }
    }
}

#[derive(Deserialize)]
struct RawConfig {
    model_type: Option<String>,
    #[serde(default)]
    text_config: Option<TextConfig>,
    #[serde(default)]
    vision_config: Option<RawVision>,
    #[serde(default)]
    image_text_hidden_size: Option<usize>,
    #[serde(default)]
    architectures: Option<Vec<String>>,
}

const FILE: &str = "config.json";
/// `image_text_hidden_size` where a file leaves it out.
const SHARED_WIDTH: usize = 256;

fn invalid(key: &str, reason: impl std::fmt::Display) -> LoadError {
    LoadError::Invalid { file: FILE.into(), reason: format!("{key}: {reason}") }
}

impl BlipConfig {
    /// Parses `config.json` and checks that its sizes fit together.
    pub fn from_json(json: &[u8]) -> Result<Self, LoadError> {
        let raw: RawConfig = serde_json::from_slice(json)
            .map_err(|error| LoadError::Invalid { file: FILE.into(), reason: error.to_string() })?;
        match raw.model_type.as_deref() {
            Some("blip") => {}
            Some(other) => return Err(invalid("model_type", format!("is {other:?}, and only \"blip\" is known"))),
            None => return Err(invalid("model_type", "is missing; is this the configuration of a BLIP model?")),
        }
        let architecture = Architecture::named(&raw.architectures.unwrap_or_default());
        let shared_width = raw.image_text_hidden_size.unwrap_or(SHARED_WIDTH);
        let text = raw.text_config.unwrap_or_default();
        let raw = raw.vision_config.unwrap_or_default();
        if raw.hidden_act != "gelu" {
            return Err(invalid("vision_config.hidden_act", not_gelu(&raw.hidden_act)));
        }
        let vision = VisionConfig {
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: raw.num_attention_heads,
            image_size: raw.image_size.of_square("vision_config.image_size")?,
            patch_size: raw.patch_size.of_square("vision_config.patch_size")?,
            layer_norm_eps: raw.layer_norm_eps,
        };
        let config = Self { text, vision, shared_width, architecture };
        config.check()?;
        Ok(config)
    }

    /// The published `blip-image-captioning-base`.
    pub fn base() -> Self {
        let text = TextConfig { num_attention_heads: 12, ..TextConfig::default() };
        let vision = VisionConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 384,
            patch_size: 16,
            layer_norm_eps: 1e-5,
        };
        Self { text, vision, shared_width: SHARED_WIDTH, architecture: None }
    }

    /// The published `blip-image-captioning-large`: a larger encoder in front of the decoder of base.
    pub fn large() -> Self {
        let base = Self::base();
        let vision = VisionConfig {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            ..base.vision
        };
        Self { vision, ..base }
    }

    /// How many parameters a captioner has, with the head's weight shared with the embedding.
    pub fn parameters(&self) -> u64 {
        self.image_encoder() + self.language_model(self.vision.hidden_size) + self.language_head()
    }

    /// How many parameters a matcher has.
    pub fn matcher_parameters(&self) -> u64 {
        let projections =
            linear(self.vision.hidden_size, self.shared_width) + linear(self.text.hidden_size, self.shared_width);
        let reader = self.language_model(self.vision.hidden_size);
        self.image_encoder() + reader + (projections + linear(self.text.hidden_size, 2)) as u64
    }

    /// How many parameters an answerer has, with the head's weight shared with its decoder's embedding.
    pub fn answerer_parameters(&self) -> u64 {
        let reader = self.language_model(self.vision.hidden_size);
        self.image_encoder() + reader + self.language_model(self.text.hidden_size) + self.language_head()
    }

    fn image_encoder(&self) -> u64 {
        let vision = &self.vision;
        let (width, norm) = (vision.hidden_size, 2 * vision.hidden_size);
        let layer =
            linear(width, 3 * width) + linear(width, width) + feed_forward(width, vision.intermediate_size) + 2 * norm;
        let embeddings = linear(3 * vision.patch_size * vision.patch_size, width) + (1 + vision.tokens()) * width;
        (embeddings + vision.num_hidden_layers * layer + norm) as u64
    }

    /// Without a head; it looks at hidden states of width `seen`.
    fn language_model(&self, seen: usize) -> u64 {
        let text = &self.text;
        let (width, norm) = (text.hidden_size, 2 * text.hidden_size);
        let attention = 6 * linear(width, width) + 2 * linear(seen, width);
        let layer = attention + feed_forward(width, text.intermediate_size) + 3 * norm;
        let embeddings = (text.vocab_size + text.max_position_embeddings) * width + norm;
        (embeddings + text.num_hidden_layers * layer) as u64
    }

    fn language_head(&self) -> u64 {
        let width = self.text.hidden_size;
        (linear(width, width) + 2 * width + self.text.vocab_size) as u64
    }

    fn check(&self) -> Result<(), LoadError> {
        let (text, vision) = (&self.text, &self.vision);
        if text.hidden_act != "gelu" {
            return Err(invalid("text_config.hidden_act", not_gelu(&text.hidden_act)));
        }
        let sizes = [
            ("text_config.vocab_size", text.vocab_size),
            ("text_config.hidden_size", text.hidden_size),
            ("text_config.intermediate_size", text.intermediate_size),
            ("text_config.num_hidden_layers", text.num_hidden_layers),
            ("text_config.num_attention_heads", text.num_attention_heads),
            ("text_config.max_position_embeddings", text.max_position_embeddings),
            ("vision_config.hidden_size", vision.hidden_size),
            ("vision_config.intermediate_size", vision.intermediate_size),
            ("vision_config.num_hidden_layers", vision.num_hidden_layers),
            ("vision_config.num_attention_heads", vision.num_attention_heads),
            ("vision_config.image_size", vision.image_size),
            ("vision_config.patch_size", vision.patch_size),
            ("image_text_hidden_size", self.shared_width),
        ];
        for (key, size) in sizes {
            // No published model comes near the upper bound; it keeps products of sizes far from overflow.
            if size == 0 || size > 1 << 20 {
                return Err(invalid(key, format!("{size} is not a usable size")));
            }
        }
        let heads = [
            ("text_config", text.hidden_size, text.num_attention_heads),
            ("vision_config", vision.hidden_size, vision.num_attention_heads),
        ];
        for (part, width, heads) in heads {
            if width % heads != 0 {
                let key = format!("{part}.num_attention_heads");
                return Err(invalid(&key, format!("{heads} heads do not divide a hidden size of {width}")));
            }
        }
        if vision.patch_size > vision.image_size {
            return Err(invalid("vision_config.patch_size", "a patch is larger than the image"));
        }
        let tokens = [
            ("text_config.bos_token_id", text.bos_token_id),
            ("text_config.pad_token_id", text.pad_token_id),
            ("text_config.sep_token_id", text.sep_token_id),
        ];
        for (key, token) in tokens {
            if token as usize >= text.vocab_size {
                return Err(invalid(key, format!("{token} is outside the vocabulary of {}", text.vocab_size)));
            }
        }
        Ok(())
    }
}

/// Parameters of a linear layer.
fn linear(inputs: usize, outputs: usize) -> usize {
    inputs * outputs + outputs
}

fn feed_forward(width: usize, inner: usize) -> usize {
    linear(width, inner) + linear(inner, width)
}

fn not_gelu(activation: &str) -> String {
    format!("is {activation:?}, and only \"gelu\" is known")
}

impl VisionConfig {
    /// Patches along one side of the image.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Length of the encoded sequence: the class token and every patch.
    pub fn tokens(&self) -> usize {
        self.grid() * self.grid() + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_keys_have_the_defaults_of_the_reference() {
        let config = BlipConfig::from_json(br#"{"model_type":"blip","text_config":{"hidden_size":64}}"#).unwrap();
        assert_eq!(config.text, TextConfig { hidden_size: 64, ..TextConfig::default() });
        assert_eq!(config.vision, BlipConfig::base().vision);
    }

    #[test]
    fn a_configuration_that_cannot_work_is_refused_by_key() {
        let refuse = |json: &str, key: &str| {
            let message = BlipConfig::from_json(json.as_bytes()).unwrap_err().to_string();
            assert!(message.contains("config.json") && message.contains(key), "{message}");
        };
        refuse(r#"{"model_type":"clip"}"#, "model_type");
        refuse("{}", "model_type");
        refuse(r#"{"model_type":"blip","text_config":{"num_attention_heads":7}}"#, "text_config.num_attention_heads");
        refuse(r#"{"model_type":"blip","vision_config":{"image_size":[2,3]}}"#, "vision_config.image_size");
        refuse(r#"{"model_type":"blip","vision_config":{"hidden_act":"relu"}}"#, "vision_config.hidden_act");
        refuse(r#"{"model_type":"blip","text_config":{"vocab_size":100}}"#, "text_config.bos_token_id");
        refuse(r#"{"model_type":"blip","text_config":{"hidden_size":0}}"#, "text_config.hidden_size");
        refuse("{", "EOF");
    }
}
