//! Weights by name, from the layouts in which models are published.

mod stored;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::error::Error;
use std::path::{Path, PathBuf};

use candle_core::pickle::PthTensors;
use candle_core::safetensors::{Load, SliceSafetensors};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use sha2::Sha256;

use self::stored::Stored;

use super::compute::{Isa, Library, Number, Packing};
use super::encoder;
use super::files::ModelFiles;
use super::load::LoadError;
use super::random::RandomWeights;

/// All weights in one file.
pub(super) const SINGLE: &str = "model.safetensors";
/// Names the files over which the weights are spread.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// What `torch.save` wrote.
pub(super) const PICKLE: &str = "pytorch_model.bin";

/// Tensors by name, on the CPU and in the precision in which they are stored.
pub(super) enum Weights {
    Stored(Stored),
    Memory(HashMap<String, Tensor>),
    Pickle(PthTensors),
    Random(RandomWeights),
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Weights {
    /// Opens the first that is there: `model.safetensors`, its sharded form, `pytorch_model.bin`.
    pub(super) fn open(files: &ModelFiles) -> Result<Self, LoadError> {
        match files {
            ModelFiles::Dir(directory) => Self::open_directory(directory),
            ModelFiles::Memory { id, files } => match (files.get(SINGLE), files.get(INDEX)) {
                (Some(bytes), _) => Self::from_buffers([(SINGLE, &**bytes)]),
                (None, Some(index)) => {
                    let names = shard_names(index)?;
                    let named = |name| files.get(name).map(|bytes| (name, &**bytes)).ok_or_else(|| missing(id));
                    Self::from_buffers(names.iter().map(String::as_str).map(named).collect::<Result<Vec<_>, _>>()?)
                }
                (None, None) => Err(missing(id)),
            },
        }
    }

    fn open_directory(directory: &Path) -> Result<Self, LoadError> {
        let single = directory.join(SINGLE);
        let pickle = directory.join(PICKLE);
        if single.is_file() {
            Self::stored(&[single])
        } else if directory.join(INDEX).is_file() {
            Self::stored(&shards(directory)?)
        } else if pickle.is_file() {
            Self::unpickle(&pickle)
        } else {
            Err(missing(&directory.display().to_string()))
        }
    }

    fn stored(paths: &[PathBuf]) -> Result<Self, LoadError> {
        let opened = Stored::open(paths);
        opened.map(Self::Stored).map_err(|(path, error)| unreadable(path.display().to_string(), error))
    }

    /// Files in memory; where two have a tensor of one name, the later one counts.
    fn from_buffers<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Result<Self, LoadError> {
        let mut tensors = HashMap::new();
        for (name, bytes) in files {
            let mut load = || -> candle_core::Result<()> {
                for (name, view) in SliceSafetensors::new(bytes)?.tensors() {
                    tensors.insert(name, view.load(&Device::Cpu)?);
                }
                Ok(())
            };
            load().map_err(|error| unreadable(name, error))?;
        }
        Ok(Self::Memory(tensors))
    }

    fn unpickle(path: &Path) -> Result<Self, LoadError> {
        let file = path.display().to_string();
        let tensors = PthTensors::new(path, None).map_err(|error| unreadable(&file, error))?;
        if tensors.tensor_infos().is_empty() {
            let reason = "no tensors were found in it; it is expected to be a state dict saved by torch 1.6 or newer; \
                          saving the model as model.safetensors avoids the question";
            return Err(LoadError::Invalid { file, reason: reason.into() });
        }
        Ok(Self::Pickle(tensors))
    }

    /// The tensor of that name; `shape` matters to random weights only.
    fn find(&self, name: &str, shape: &[usize]) -> Result<Option<Tensor>, LoadError> {
        let tensor = match self {
            Self::Stored(stored) => stored.find(name),
            Self::Memory(tensors) => Ok(tensors.get(name).cloned()),
            Self::Pickle(tensors) => tensors.get(name),
            Self::Random(random) => random.tensor(name, shape).map(Some),
        };
        tensor.map_err(|error| LoadError::Tensor { name: name.into(), reason: error.to_string() })
    }

    /// Whether there is a tensor of that name.
    fn contains(&self, name: &str) -> bool {
        match self {
            Self::Stored(stored) => stored.contains(name),
            Self::Memory(tensors) => tensors.contains_key(name),
            Self::Pickle(tensors) => tensors.tensor_infos().contains_key(name),
            Self::Random(random) => random.contains(name),
        }
    }
}

/// The files that an index names, each once, all of them in the directory itself.
fn shards(directory: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let json = ModelFiles::Dir(directory.to_owned()).require(INDEX, "")?;
    let names = shard_names(&json)?;
    let paths: Vec<PathBuf> = names.iter().map(|name| directory.join(name)).collect();
    match paths.iter().zip(&names).find(|(path, _)| !path.is_file()) {
        None => Ok(paths),
        Some((_, name)) => Err(LoadError::MissingFile {
            place: directory.display().to_string(),
            file: name.clone(),
            hint: format!(", which {INDEX} names: is the download complete?"),
        }),
    }
}

/// The file names of an index, sorted.
pub(super) fn shard_names(json: &[u8]) -> Result<Vec<String>, LoadError> {
    let invalid = |reason: String| LoadError::Invalid { file: INDEX.into(), reason };
    let index: Index = serde_json::from_slice(json).map_err(|error| invalid(error.to_string()))?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    match names.iter().find(|name| name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.')) {
        Some(name) => Err(invalid(format!("{name:?} is not the name of a file beside it"))),
        None if names.is_empty() => Err(invalid("weight_map is empty".into())),
        None => Ok(names.into_iter().collect()),
    }
}

fn missing(place: &str) -> LoadError {
    LoadError::MissingFile {
        place: place.into(),
        file: format!("{SINGLE}, {INDEX} or {PICKLE}"),
        hint: ": the weights are missing".into(),
    }
}

fn unreadable(file: impl Into<String>, error: impl Into<Box<dyn Error + Send + Sync>>) -> LoadError {
    LoadError::Unreadable { file: file.into(), source: error.into() }
}

/// How linear layers keep their weights. Everything else is in f32 where they are not tensors.
#[derive(Clone, Copy)]
pub(super) enum Kept {
    /// As tensors; what stands between the products may be fused.
    Tensors { fused: bool },
    /// Packed for our own products.
    Packed(Packing),
    /// Packed for oneDNN's.
    OneDnn { library: &'static Library, number: Number },
}

impl Kept {
    /// Whether they are tensors.
    pub(super) fn are_tensors(self) -> bool {
        matches!(self, Self::Tensors { .. })
    }

    /// Whether what stands between the products is fused.
    pub(super) fn is_fused(self) -> bool {
        matches!(self, Self::Tensors { fused: true })
    }

    /// What the kernels beside the products run on.
    pub(super) fn isa(self) -> Isa {
        if let Self::Packed(packing) = self { packing.isa } else { Isa::detect() }
    }

    /// Bytes of a packed weight.
    pub(super) fn bytes(self) -> Option<usize> {
        match self {
            Self::Tensors { .. } => None,
            Self::Packed(packing) => Some(if packing.narrow { 2 } else { 4 }),
            Self::OneDnn { number, .. } => Some(number.bytes()),
        }
    }
}

/// Weights below a prefix, on their way to a device and a precision.
#[derive(Clone)]
pub(super) struct Scope<'a> {
    weights: &'a Weights,
    device: &'a Device,
    /// Of tensors.
    dtype: DType,
    kept: Kept,
    prefix: String,
    /// What tells the weights that were read from others, if that is asked for.
    digest: Option<&'a RefCell<Sha256>>,
}

impl<'a> Scope<'a> {
    pub(super) fn root(weights: &'a Weights, device: &'a Device, dtype: DType, kept: Kept) -> Self {
        let dtype = if kept.are_tensors() { dtype } else { DType::F32 };
        Self { weights, device, dtype, kept, prefix: String::new(), digest: None }
    }

    pub(super) fn kept(&self) -> Kept {
        self.kept
    }

    /// The same, with linear layers kept in another way.
    pub(super) fn keeping(&self, kept: Kept) -> Self {
        Self { kept, ..self.clone() }
    }

    /// The same; what is read of it is added to `digest`.
    pub(super) fn digested(&self, digest: &'a RefCell<Sha256>) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }

    /// The scope of a part: `scope.part("encoder").part("layers.0")`.
    pub(super) fn part(&self, name: impl std::fmt::Display) -> Self {
        let prefix = if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) };
        Self { prefix, ..self.clone() }
    }

    pub(super) fn device(&self) -> &'a Device {
        self.device
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.weights.contains(&self.name(name))
    }

    /// A tensor that must be there, in the shape that the configuration gives it.
    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        let name = self.name(name);
        let fail = |reason: String| LoadError::Tensor { name: name.clone(), reason };
        let tensor = self
            .weights
            .find(&name, shape)?
            .ok_or_else(|| fail("is missing: the weights are of another kind of model, or incomplete".into()))?;
        if tensor.dims() != shape {
            return Err(fail(format!("has the shape {:?}, but config.json asks for {shape:?}", tensor.dims())));
        }
        // Converted before it moves, so that a GPU never holds both.
        let tensor = tensor.to_dtype(self.dtype).map_err(|error| fail(error.to_string()))?;
        if let Some(digest) = self.digest {
            encoder::digest(digest, &name, &tensor);
        }
        let moved = tensor.to_device(self.device).and_then(|tensor| tensor.contiguous());
        moved.map_err(|error| fail(error.to_string()))
    }

    /// An error about a tensor of this scope.
    pub(super) fn error(&self, name: &str, error: &candle_core::Error) -> LoadError {
        LoadError::Tensor { name: self.name(name), reason: error.to_string() }
    }

    fn name(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}
