//! The captioner: pixels in, captions out; no Kafka, no async, nothing else of this crate.
//!
//! An [`Engine`] is stepwise, so that rows join and leave a running batch and one encoding can serve several rows:
//!
//! ```text
//!  Pixels ──encode──► Encoded ──admit(Params)──► a row ──step, step, …──► Caption
//! ```
//!
//! [`caption()`] runs a batch from start to end on top of it.

mod answerer;
mod backend;
mod bert;
mod compute;
pub mod config;
mod device;
mod embeddings;
mod encoder;
mod engine;
mod error;
pub mod fake;
mod files;
mod filter;
mod generate;
mod hub;
mod load;
mod matcher;
mod memory;
mod model;
mod none;
mod params;
#[doc(hidden)]
pub mod pictures;
pub mod preprocess;
mod questions;
mod random;
mod reader;
mod respondent;
mod rows;
mod search;
mod task;
mod text;
mod tokenizer;
mod viewer;
mod vision;
mod weights;
mod work;
mod writer;

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use answerer::Answerer;
pub use backend::Backend;
pub use compute::Isa;
#[doc(hidden)]
pub use compute::kernels;
pub use device::{DeviceSpec, DtypeSpec};
pub use embeddings::Embeddings;
pub use encoder::{EncoderId, Encoders, Sight};
pub use engine::BlipEngine;
pub use error::{EngineError, ErrorKind};
pub use filter::Filter;
pub use hub::HubSource;
pub use load::{LoadError, LoadOptions, ModelSource, load, load_answerer, load_matcher, load_model};
pub use matcher::{Match, Matcher};
pub use model::Model;
pub use none::NoCaptioner;
pub use params::{BeamSearch, DEFAULT_MAX_NEW_TOKENS, Number, Params, Sampling, Strategy, number};
pub use respondent::Respondent;
pub use task::{Ask, Told, probe, tell};
pub use viewer::Viewer;
pub use work::{Ceilings, Work};

/// An image at the model's size: RGB, 8 bits a channel, row-major, `size * size * 3` bytes. The engine normalises it.
#[derive(Clone, PartialEq, Eq)]
pub struct Pixels {
    size: usize,
    data: Arc<[u8]>,
}

impl Pixels {
    /// Takes `size * size * 3` bytes; any other length is a [`ErrorKind::BadInput`].
    pub fn new(size: usize, data: impl Into<Arc<[u8]>>) -> Result<Self, EngineError> {
        let data = data.into();
        let expected = size.checked_mul(size).and_then(|n| n.checked_mul(3));
        if size == 0 || expected != Some(data.len()) {
            return Err(EngineError::bad_input(format!(
                "{} bytes of pixels do not make a square RGB image of side {size}",
                data.len()
            )));
        }
        Ok(Self { size, data })
    }

    /// Side of the square, in pixels.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The bytes: row after row, three a pixel.
    pub fn data(&self) -> &[u8] {
        &self.data
    }
}

impl fmt::Debug for Pixels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pixels({0}x{0})", self.size)
    }
}

/// Why a caption ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model produced its end token.
    Stop,
    /// `max_new_tokens` was reached.
    Length,
}

/// A finished caption, or the first of several of one image.
#[derive(Clone, Debug, PartialEq)]
pub struct Caption {
    /// Prompt and generated tokens as text, special tokens left out.
    pub text: String,
    /// The generated tokens, the end token included where there is one.
    pub token_ids: Vec<u32>,
    /// Natural logarithm of the probability that the model gives `token_ids`, the end token included.
    pub logprob: f32,
    /// How many tokens were generated: the length of `token_ids`.
    pub tokens: usize,
    /// Why it ended.
    pub finish: Finish,
    /// Further captions of the image, where more than one was asked for: samples in the order of their drawing, beams
    /// from the second best on. They have none themselves.
    pub more: Vec<Caption>,
}

impl Caption {
    /// All captions of the image, this one first.
    pub fn all(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(&self.more)
    }

    /// Their texts.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.all().map(|caption| caption.text.as_str())
    }
}

/// What is known of a loaded model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModelInfo {
    /// Repository name, or directory path, as it was given.
    pub id: String,
    /// The commit of the repository, where it is known.
    pub revision: Option<String>,
    /// `f32`, `bf16`, `f16` or `int8`.
    pub dtype: String,
    /// The kernels it runs on: `native avx2`, `onednn 3.2.0`, `candle`.
    pub backend: String,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Side of the square images that [`Engine::encode`] takes, in pixels.
    pub image_size: usize,
    /// How many parameters the model has, tied ones counted once.
    pub parameters: u64,
    /// Longest prompt and caption together, in tokens.
    pub context_length: usize,
}

/// An encoded image, ready to be captioned any number of times by the engine that made it. Cheap to clone.
#[derive(Clone)]
pub struct Encoded {
    state: Arc<dyn Any + Send + Sync>,
    bytes: usize,
}

impl Encoded {
    /// Wraps an engine's own state, which occupies `bytes` of device memory.
    pub fn new(state: impl Any + Send + Sync, bytes: usize) -> Self {
        Self { state: Arc::new(state), bytes }
    }

    /// Device memory that it holds until the last clone is dropped, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The engine's own state, where `T` is its type.
    pub fn state<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        Arc::clone(&self.state).downcast().ok()
    }
}

/// Names a row of the running batch. Never used twice by one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId(pub u64);

/// Time spent in each phase, and the work it was spent on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phases {
    /// The vision encoder.
    pub encode: Duration,
    /// What the decoder needs of the encoded images: their keys and values, or their hidden states in its own order.
    pub cross_kv: Duration,
    /// Decoder steps.
    pub decode: Duration,
    /// Images encoded.
    pub images: usize,
    /// Decoder steps taken, each over all active rows.
    pub steps: usize,
    /// Tokens generated.
    pub tokens: usize,
}

/// Captions images with one model on one device. Its owner is one thread.
pub trait Engine: Send {
    /// The model and where it runs.
    fn model(&self) -> &ModelInfo;

    /// Encodes images of the model's size; the result is in the order of `images`. An error concerns the whole call:
    /// with [`ErrorKind::OutOfMemory`] a smaller batch may succeed.
    fn encode(&mut self, images: &[Pixels]) -> Result<Vec<Encoded>, EngineError> {
        let sights = self.see(images)?;
        self.remember(&sights)
    }

    /// Names its image encoder, which another model may have, too.
    fn encoder(&self) -> EncoderId;

    /// The first half of [`Engine::encode`]: what every model with this image encoder can look at.
    fn see(&mut self, images: &[Pixels]) -> Result<Vec<Sight>, EngineError>;

    /// The second half: what captions look at, of images that its image encoder saw, be it for another model.
    fn remember(&mut self, sights: &[Sight]) -> Result<Vec<Encoded>, EngineError>;

    /// Adds a row that captions `image`. An error of kind [`ErrorKind::BadParams`] or [`ErrorKind::BadInput`]
    /// concerns this row only and leaves the others as they were.
    fn admit(&mut self, image: &Encoded, params: &Params) -> Result<RowId, EngineError>;

    /// Generates one token for every active row, and returns the rows that finished by it. After an error the state
    /// of the rows is undefined: call [`Engine::clear`].
    fn step(&mut self) -> Result<Vec<(RowId, Caption)>, EngineError>;

    /// How many rows are unfinished.
    fn active(&self) -> usize;

    /// Device memory that `rows` rows take at most, each of `tokens` tokens of prompt and caption together, in bytes:
    /// what it remembers of their images and of their text. Weights, and the activations of a call, come on top.
    fn state_bytes(&self, rows: usize, tokens: usize) -> usize;

    /// Forgets all rows.
    fn clear(&mut self);

    /// What was spent in each phase since the last call.
    fn take_phases(&mut self) -> Phases;
}

/// Encodes and decodes a batch to its end. The results are in the order of `items`, each row's own errors (bad params)
/// in its place; an error of the call as a whole leaves the engine empty. The engine must have no active rows.
pub fn caption(
    engine: &mut dyn Engine,
    items: &[(Pixels, Params)],
) -> Result<Vec<Result<Caption, EngineError>>, EngineError> {
    let images: Vec<Pixels> = items.iter().map(|(pixels, _)| pixels.clone()).collect();
    let encoded = engine.encode(&images)?;
    write(engine, encoded.into_iter().zip(items.iter().map(|(_, params)| params)).collect())
}

/// The second half of [`caption()`], for images that the engine encoded.
fn write(
    engine: &mut dyn Engine,
    items: Vec<(Encoded, &Params)>,
) -> Result<Vec<Result<Caption, EngineError>>, EngineError> {
    if engine.active() > 0 {
        return Err(EngineError::internal("a batch was started on an engine that has active rows"));
    }
    let results = write_rows(engine, items);
    if results.is_err() {
        engine.clear();
    }
    results
}

fn write_rows(
    engine: &mut dyn Engine,
    items: Vec<(Encoded, &Params)>,
) -> Result<Vec<Result<Caption, EngineError>>, EngineError> {
    let mut results: Vec<Option<Result<Caption, EngineError>>> = Vec::with_capacity(items.len());
    let mut rows = Vec::with_capacity(items.len());
    for (index, (image, params)) in items.iter().enumerate() {
        match engine.admit(image, params) {
            Ok(row) => {
                rows.push((row, index));
                results.push(None);
            }
            Err(error) if error.is_of_one_row() => results.push(Some(Err(error))),
            Err(error) => return Err(error),
        }
    }
    drop(items);
    while engine.active() > 0 {
        for (row, caption) in engine.step()? {
            if let Some(&(_, index)) = rows.iter().find(|(id, _)| *id == row) {
                results[index] = Some(Ok(caption));
            }
        }
    }
    let lost = || EngineError::internal("the engine lost a row");
    results.into_iter().map(|result| result.ok_or_else(lost)).collect()
}
