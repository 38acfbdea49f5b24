//! Models of any size without files: random weights and numbered words, for measuring speed.

use candle_core::{Device, Tensor};

use super::config::BlipConfig;
use super::load::Parts;
use super::preprocess::Preprocessor;
use super::tokenizer::CaptionTokenizer;
use super::weights::Weights;

/// Standard deviation of the reference's initial weights (`initializer_range`).
const SPREAD: f32 = 0.02;

/// The parts of a model of random weights.
pub(super) fn parts(config: &BlipConfig, seed: u64) -> Parts {
    Parts {
        config: config.clone(),
        preprocessor: Preprocessor::blip(config.vision.image_size),
        tokenizer: CaptionTokenizer::numbered(config.text.vocab_size),
        weights: Weights::Random(RandomWeights { seed }),
    }
}

/// Makes a tensor when it is asked for; equal seeds and names give equal values.
pub(super) struct RandomWeights {
    seed: u64,
}

impl RandomWeights {
    /// Biases are zero and layer-norm weights one; all else is uniform, with the spread of the reference's start.
    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> candle_core::Result<Tensor> {
        let norm = name.contains("LayerNorm") || name.contains("layer_norm") || name.contains("layernorm");
        let count: usize = shape.iter().product();
        let values = if name.ends_with("bias") {
            vec![0.0; count]
        } else if norm {
            vec![1.0; count]
        } else {
            self.uniform(name, count)
        };
        Tensor::from_vec(values, shape, &Device::Cpu)
    }

    /// The head shares the embedding, as in the published models.
    #[expect(clippy::unused_self, reason = "one of several sources of weights")]
    pub(super) fn contains(&self, name: &str) -> bool {
        !name.contains("cls.predictions.decoder")
    }

    fn uniform(&self, name: &str, count: usize) -> Vec<f32> {
        let mut state = name.bytes().fold(self.seed, |state, byte| mix(state ^ u64::from(byte)));
        // A uniform distribution of this half-width has the standard deviation `SPREAD`.
        let half_width = SPREAD * 3f32.sqrt();
        (0..count)
            .map(|_| {
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let unit = (mix(state) >> 40) as f32 / (1u64 << 24) as f32;
                (unit * 2.0 - 1.0) * half_width
            })
            .collect()
    }
}

/// The finaliser of splitmix64 (Steele, Lea and Flood, 2014).
fn mix(mut state: u64) -> u64 {
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}
