//! A tiny model, its images, and what the reference makes of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blipstream::caption::{
    Backend, BlipEngine, Caption, DeviceSpec, DtypeSpec, Finish, LoadError, LoadOptions, Model, ModelSource, Params,
    Pixels, load_model,
};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

/// How far a number may be from the reference's, in f32.
pub const TOLERANCE: f32 = 1e-3;

pub struct Fixture {
    pub name: &'static str,
    pub images: Vec<Pixels>,
    /// Of each image, `[tokens · width]`.
    pub hidden_states: Vec<Vec<f32>>,
    /// For the first images: a sequence, and the scores after each of its tokens.
    pub forced: Vec<(Vec<u32>, Vec<Vec<f32>>)>,
    pub captions: Vec<Expected>,
    pub parameters: u64,
}

/// A caption of the reference.
#[derive(Deserialize)]
pub struct Expected {
    pub image: usize,
    pub prompt: Option<String>,
    pub max_new_tokens: usize,
    pub min_new_tokens: usize,
    /// `[DEC]`, the prompt, and `token_ids`.
    pub sequence: Vec<u32>,
    pub token_ids: Vec<u32>,
    pub text: String,
    pub logprob: f32,
    pub finish: Finish,
}

#[derive(Deserialize)]
struct ExpectedFile {
    parameters: u64,
    captions: Vec<Expected>,
}

impl Expected {
    pub fn params(&self) -> Params {
        Params {
            prompt: self.prompt.clone(),
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            ..Params::default()
        }
    }

    /// Whether it was made without a prompt and with default lengths.
    pub fn is_free(&self) -> bool {
        self.params() == Params::default()
    }

    pub fn check(&self, caption: &Caption) {
        assert_eq!(caption.token_ids, self.token_ids, "image {} with {:?}", self.image, self.params());
        assert_eq!((&caption.text, caption.finish), (&self.text, self.finish));
        assert_eq!(caption.tokens, self.token_ids.len());
        assert!((caption.logprob - self.logprob).abs() < TOLERANCE, "{} and {}", caption.logprob, self.logprob);
    }
}

impl Fixture {
    pub fn all() -> Vec<Self> {
        ["proportions", "widths", "depths"].map(Self::read).into()
    }

    pub fn read(name: &'static str) -> Self {
        let directory = directory(name);
        let json = std::fs::read(directory.join("expected.json")).unwrap();
        let file: ExpectedFile = serde_json::from_slice(&json).unwrap();
        let tensors = candle_core::safetensors::load(directory.join("expected.safetensors"), &Device::Cpu).unwrap();
        let images = &tensors["images"];
        let size = images.dim(1).unwrap();
        let images = rows(images).into_iter().map(|bytes: Vec<u8>| Pixels::new(size, bytes).unwrap()).collect();
        let forced = (0..2).map(|image| {
            let ids = tensors[&format!("forced_ids.{image}")].to_dtype(DType::U32).unwrap();
            (ids.to_vec1().unwrap(), rows(&tensors[&format!("logits.{image}")]))
        });
        Self {
            name,
            images,
            hidden_states: rows(&tensors["hidden_states"]),
            forced: forced.collect(),
            captions: file.captions,
            parameters: file.parameters,
        }
    }

    pub fn directory(&self) -> PathBuf {
        directory(self.name)
    }

    pub fn model(&self) -> Arc<Model> {
        load_from(&self.directory(), DtypeSpec::F32)
    }

    pub fn engine(&self) -> BlipEngine {
        BlipEngine::new(self.model())
    }

    /// The captions' images and parameters, in their order.
    pub fn items(&self) -> Vec<(Pixels, Params)> {
        self.captions.iter().map(|expected| (self.images[expected.image].clone(), expected.params())).collect()
    }
}

pub fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reference").join(name)
}

pub fn load_from(directory: &Path, dtype: DtypeSpec) -> Arc<Model> {
    load_on(directory, dtype, Backend::Native(None)).unwrap()
}

pub fn load_on(directory: &Path, dtype: DtypeSpec, backend: Backend) -> Result<Arc<Model>, LoadError> {
    let source = ModelSource::Dir(directory.to_owned());
    load_model(&LoadOptions { device: DeviceSpec::Cpu, dtype, backend, ..LoadOptions::new(source) })
}

/// The same, unless this machine lacks what it takes; where that is a library that `make test-setup` gets, `CI` has it.
pub fn load_if_here(directory: &Path, dtype: DtypeSpec, backend: Backend) -> Option<Arc<Model>> {
    match load_on(directory, dtype, backend) {
        Ok(model) => Some(model),
        Err(error) => {
            let told = error.to_string();
            let library = ["oneDNN was not found", "is needed"].iter().any(|part| told.contains(part));
            let cpu = ["this CPU has no", "this CPU multiplies no"].iter().any(|part| told.contains(part));
            assert!(cpu || library && std::env::var_os("CI").is_none(), "{told}");
            report(&format!("left out: {told}"));
            None
        }
    }
}

/// A tensor as one vector for each index of its first dimension.
fn rows<T: candle_core::WithDType>(tensor: &Tensor) -> Vec<Vec<T>> {
    tensor.flatten_from(1).unwrap().to_vec2().unwrap()
}

pub fn largest_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let rows = a.iter().zip(b).inspect(|(a, b)| assert_eq!(a.len(), b.len()));
    rows.flat_map(|(a, b)| a.iter().zip(b)).map(|(a, b)| (a - b).abs()).fold(0.0, |largest, difference| {
        assert!(!difference.is_nan());
        largest.max(difference)
    })
}

#[expect(clippy::print_stdout, reason = "figures to quote, shown with --nocapture")]
pub fn report(line: &str) {
    println!("{line}");
}

/// What the reference made of a model: `expected.json`, and the images of `expected.safetensors`.
pub fn expected<T: serde::de::DeserializeOwned>(directory: &Path) -> (T, Vec<Pixels>) {
    let expected = serde_json::from_slice(&std::fs::read(directory.join("expected.json")).unwrap()).unwrap();
    let tensors = candle_core::safetensors::load(directory.join("expected.safetensors"), &Device::Cpu).unwrap();
    let bytes: Vec<Vec<u8>> = tensors["images"].flatten_from(1).unwrap().to_vec2().unwrap();
    let size = tensors["images"].dim(1).unwrap();
    (expected, bytes.into_iter().map(|bytes| Pixels::new(size, bytes).unwrap()).collect())
}
