//! Loading: from a name and a few choices to an engine.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::error::Error;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use super::answerer::Answerer;
use super::backend::{Backend, Chosen};
use super::config::{Architecture, BlipConfig};
use super::device::{DeviceSpec, DtypeSpec, Gpu};
use super::encoder::{self, Encoder, Encoders};
use super::engine::BlipEngine;
use super::files::ModelFiles;
use super::hub::{self, HubSource};
use super::matcher::Matcher;
use super::model::Model;
use super::preprocess::Preprocessor;
use super::random;
use super::tokenizer::CaptionTokenizer;
use super::weights::{Kept, Scope, Weights};
use super::{Engine, ModelInfo};

/// Where a model comes from.
#[derive(Clone, Debug)]
pub enum ModelSource {
    /// A directory in the published layout.
    Dir(PathBuf),
    /// A repository of the Hugging Face hub, or of a server that speaks its API.
    Hub(HubSource),
    /// Files in memory, such as those compiled into a program.
    Memory {
        /// What [`super::ModelInfo::id`] says.
        id: String,
        /// The files of a model directory, by name.
        files: BTreeMap<String, Cow<'static, [u8]>>,
    },
    /// Random weights in given sizes, for measuring speed; its captions are numbered words.
    Random {
        /// What [`super::ModelInfo::id`] says.
        id: String,
        /// The sizes.
        config: BlipConfig,
        /// Equal seeds give equal weights.
        seed: u64,
    },
}

impl FromStr for ModelSource {
    type Err = Infallible;

    /// A directory that exists; `random-base` or `random-large`; else a repository, `org/name` or `org/name@revision`.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        let path = PathBuf::from(text);
        let random = |config| Self::Random { id: text.to_owned(), config, seed: 0 };
        Ok(match text {
            _ if path.is_dir() => Self::Dir(path),
            "random-base" => random(BlipConfig::base()),
            "random-large" => random(BlipConfig::large()),
            _ => Self::Hub(HubSource::named(text)),
        })
    }
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dir(path) => path.display().fmt(f),
            Self::Hub(hub) => hub.fmt(f),
            Self::Memory { id, .. } | Self::Random { id, .. } => f.write_str(id),
        }
    }
}

/// Which model to load, and where to run it.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where the model comes from.
    pub source: ModelSource,
    /// Where it runs.
    pub device: DeviceSpec,
    /// In which precision.
    pub dtype: DtypeSpec,
    /// On which kernels.
    pub backend: Backend,
    /// oneDNN's file, where it is not the system's.
    pub onednn_library: Option<PathBuf>,
}

impl LoadOptions {
    /// The best device, precision and kernels of this machine.
    pub fn new(source: ModelSource) -> Self {
        Self { source, device: DeviceSpec::Auto, dtype: DtypeSpec::Auto, backend: Backend::Auto, onednn_library: None }
    }
}

/// Why a model could not be loaded. The messages name the file or key, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file of the published layout is not there.
    #[error("{place} has no {file}{hint}")]
    MissingFile {
        /// The directory or repository.
        place: String,
        /// The file, or the alternatives.
        file: String,
        /// What it is good for, or where to get it; empty, or begins with a separator.
        hint: String,
    },
    /// A file is there, but reading it failed.
    #[error("{file} cannot be read")]
    Unreadable {
        /// The file.
        file: String,
        /// What the system or the decoder said.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A file's content is not what it should be.
    #[error("{file}: {reason}")]
    Invalid {
        /// The file.
        file: String,
        /// The key and what is wrong with it.
        reason: String,
    },
    /// A weight is missing, or does not have the shape that `config.json` gives it.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// Its name in the file.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The device or the precision cannot be had.
    #[error("{0}")]
    Device(String),
    /// The hub did not give what was asked for.
    #[error("{id}: {reason}")]
    Hub {
        /// The repository.
        id: String,
        /// What happened, and what to do.
        reason: String,
    },
}

/// Loads a model and makes one engine of it.
pub fn load(options: &LoadOptions) -> Result<Box<dyn Engine>, LoadError> {
    Ok(Box::new(BlipEngine::new(load_model(options)?)))
}

/// Loads a captioner whose weights several engines may share; see [`BlipEngine::new`].
pub fn load_model(options: &LoadOptions) -> Result<Arc<Model>, LoadError> {
    load_as(options, None, Architecture::Captioner, Model::build, Model::info).map(Arc::new)
}

/// Loads a model that judges images and texts.
pub fn load_matcher(options: &LoadOptions) -> Result<Arc<Matcher>, LoadError> {
    load_as(options, None, Architecture::Matcher, Matcher::build, Matcher::info).map(Arc::new)
}

/// Loads a model that answers questions about images.
///
/// # Errors
/// A file is missing or wrong, or is of another kind of model, which the message names; the device or precision cannot be had.
pub fn load_answerer(options: &LoadOptions) -> Result<Arc<Answerer>, LoadError> {
    load_as(options, None, Architecture::Answerer, Answerer::build, Answerer::info).map(Arc::new)
}

impl Encoders {
    /// As [`load_model`], with the image encoder shared.
    ///
    /// # Errors
    /// As there.
    pub fn load_model(&mut self, options: &LoadOptions) -> Result<Arc<Model>, LoadError> {
        load_as(options, Some(self), Architecture::Captioner, Model::build, Model::info).map(Arc::new)
    }

    /// As [`load_matcher`], with the image encoder shared.
    ///
    /// # Errors
    /// As there.
    pub fn load_matcher(&mut self, options: &LoadOptions) -> Result<Arc<Matcher>, LoadError> {
        load_as(options, Some(self), Architecture::Matcher, Matcher::build, Matcher::info).map(Arc::new)
    }

    /// As [`load_answerer`], with the image encoder shared.
    ///
    /// # Errors
    /// As there.
    pub fn load_answerer(&mut self, options: &LoadOptions) -> Result<Arc<Answerer>, LoadError> {
        load_as(options, Some(self), Architecture::Answerer, Answerer::build, Answerer::info).map(Arc::new)
    }
}

fn load_as<T>(
    options: &LoadOptions,
    encoders: Option<&mut Encoders>,
    architecture: Architecture,
    build: impl FnOnce(Built<'_>) -> Result<T, LoadError>,
    info: impl FnOnce(&T) -> &ModelInfo,
) -> Result<T, LoadError> {
    let (spec, device) = options.device.open()?;
    let chosen = options.backend.choose(options.dtype, &device, options.onednn_library.as_deref())?;
    let mut identity = Identity {
        id: options.source.to_string(),
        revision: None,
        device: spec.to_string(),
        dtype: chosen.dtype.to_string(),
        backend: chosen.name(),
    };
    let parts = match &options.source {
        ModelSource::Random { config, seed, .. } => random::parts(config, *seed),
        ModelSource::Dir(path) => Parts::read(&ModelFiles::Dir(path.clone()))?,
        ModelSource::Memory { id, files } => Parts::read(&ModelFiles::Memory { id: id.clone(), files: files.clone() })?,
        ModelSource::Hub(hub) => {
            let snapshot = hub::fetch(hub)?;
            identity.id.clone_from(&hub.id);
            identity.revision = Some(snapshot.revision);
            Parts::read(&ModelFiles::Dir(snapshot.path))?
        }
    };
    parts.config.is(architecture)?;
    if let Some(gpu) = Gpu::of(&device)? {
        gpu.holds(&identity.id, parts.config.parameters_of(architecture) * chosen.tensors.size_in_bytes() as u64)?;
    }
    let started = std::time::Instant::now();
    let Chosen { tensors, encoder, decoder, .. } = chosen;
    let Parts { config, preprocessor, tokenizer, weights } = parts;
    let scope = Scope::root(&weights, &device, tensors, decoder);
    let images = scope.part("vision_model").keeping(encoder);
    let vision = match encoders {
        None => encoder::load_alone(&images, &config.vision, &preprocessor.normalize())?,
        Some(encoders) => encoders.load(&images, &config.vision, preprocessor.normalize(), identity.place())?,
    };
    let built = build(Built { config, preprocessor, tokenizer, scope, vision, encoder, identity })?;
    let seconds = started.elapsed().as_secs_f32();
    let info = info(&built);
    tracing::info!(model = %info.id, device = %info.device, dtype = %info.dtype, backend = %info.backend, parameters = info.parameters, seconds, "model loaded");
    Ok(built)
}

/// How a loaded model is called.
pub(super) struct Identity {
    id: String,
    revision: Option<String>,
    device: String,
    dtype: String,
    backend: String,
}

impl Identity {
    /// Device, precision, kernels.
    fn place(&self) -> [String; 3] {
        [self.device.clone(), self.dtype.clone(), self.backend.clone()]
    }

    /// What is known of a model of so many parameters.
    pub(super) fn info(self, config: &BlipConfig, parameters: u64) -> ModelInfo {
        ModelInfo {
            id: self.id,
            revision: self.revision,
            dtype: self.dtype,
            device: self.device,
            backend: self.backend,
            image_size: config.vision.image_size,
            parameters,
            context_length: config.text.max_position_embeddings,
        }
    }
}

/// What a model of any kind is built from: its image encoder, its files, read, and where its weights go. The linear layers of
/// the image encoder are kept as `encoder` says.
pub(super) struct Built<'a> {
    pub(super) config: BlipConfig,
    pub(super) preprocessor: Preprocessor,
    pub(super) tokenizer: CaptionTokenizer,
    pub(super) scope: Scope<'a>,
    pub(super) vision: Encoder,
    pub(super) encoder: Kept,
    pub(super) identity: Identity,
}

/// File of the image processor's settings; without it, BLIP's own are taken.
const PREPROCESSOR: &str = "preprocessor_config.json";

/// Reads the image processor's settings, which must make images of the size that the model takes.
fn preprocessor(json: &[u8], image_size: usize) -> Result<Preprocessor, LoadError> {
    let invalid = |reason: String| LoadError::Invalid { file: PREPROCESSOR.into(), reason };
    let text = std::str::from_utf8(json).map_err(|error| invalid(error.to_string()))?;
    let preprocessor = Preprocessor::from_json(text).map_err(|error| invalid(error.to_string()))?;
    if preprocessor.size() != image_size {
        let size = preprocessor.size();
        return Err(invalid(format!("size is {size}, but vision_config.image_size of config.json is {image_size}")));
    }
    Ok(preprocessor)
}

/// What a model is built from.
pub(super) struct Parts {
    pub(super) config: BlipConfig,
    pub(super) preprocessor: Preprocessor,
    pub(super) tokenizer: CaptionTokenizer,
    pub(super) weights: Weights,
}

impl Parts {
    fn read(files: &ModelFiles) -> Result<Self, LoadError> {
        let config = BlipConfig::from_json(&files.require("config.json", ": is this a model directory?")?)?;
        let preprocessor = match files.read(PREPROCESSOR)? {
            Some(json) => preprocessor(&json, config.vision.image_size)?,
            None => Preprocessor::blip(config.vision.image_size),
        };
        let tokenizer = CaptionTokenizer::read(files)?;
        let weights = Weights::open(files)?;
        Ok(Self { config, preprocessor, tokenizer, weights })
    }
}
