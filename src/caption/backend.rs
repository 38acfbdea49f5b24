//! What a model's arithmetic runs on, as a user names it and as the machine has it.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use candle_core::{DType, Device, Tensor};

use super::compute::{Factor, Isa, Library, Number, OneDnnError, Packing, fused};
use super::device::{DtypeSpec, Gpu};
use super::load::LoadError;
use super::weights::Kept;

/// `auto`, `native`, `native:avx512` and its like, `onednn`, `candle` or `fused`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Backend {
    /// The fastest that the machine has for the precision.
    #[default]
    Auto,
    /// Our own kernels for CPUs, with the best instructions of the machine or with these.
    Native(Option<Isa>),
    /// Intel's library, for the image encoder on a CPU; the decoder stays on our own kernels.
    OneDnn,
    /// Candle's kernels, on any device.
    Candle,
    /// Candle's products, and kernels of our own for what stands between them, on a GPU. On a CPU these are plain loops, to
    /// which the kernels are held.
    Fused,
}

impl Backend {
    /// All that can be named.
    pub fn all() -> impl Iterator<Item = Self> {
        let native = Isa::ALL.map(|isa| Self::Native(Some(isa)));
        [Self::Auto, Self::Native(None)].into_iter().chain(native).chain([Self::OneDnn, Self::Fused, Self::Candle])
    }
}

impl FromStr for Backend {
    type Err = LoadError;

    fn from_str(text: &str) -> Result<Self, LoadError> {
        let unknown =
            || LoadError::Device(format!("unknown backend {text:?}: write auto, native, onednn, candle or fused"));
        let isa = |name: &str| Isa::ALL.into_iter().find(|isa| isa.name() == name);
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "native" => Ok(Self::Native(None)),
            None if text == "onednn" => Ok(Self::OneDnn),
            None if text == "candle" => Ok(Self::Candle),
            None if text == "fused" => Ok(Self::Fused),
            Some(("native", name)) => isa(name).map(|isa| Self::Native(Some(isa))).ok_or_else(|| {
                let names = Isa::ALL.map(Isa::name).join(", ");
                LoadError::Device(format!("unknown instructions {name:?} in the backend {text:?}: known are {names}"))
            }),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Native(None) => f.write_str("native"),
            Self::Native(Some(isa)) => write!(f, "native:{}", isa.name()),
            Self::OneDnn => f.write_str("onednn"),
            Self::Candle => f.write_str("candle"),
            Self::Fused => f.write_str("fused"),
        }
    }
}

/// A backend and a precision that go together on a device.
#[derive(Clone, Copy)]
pub(super) struct Chosen {
    pub(super) dtype: DtypeSpec,
    /// Of tensors.
    pub(super) tensors: DType,
    pub(super) encoder: Kept,
    pub(super) decoder: Kept,
}

impl Chosen {
    /// What it is called: `native avx2`, `onednn 3.2.0`, `candle`.
    pub(super) fn name(&self) -> String {
        match self.encoder {
            Kept::Tensors { fused: false } => "candle".into(),
            Kept::Tensors { fused: true } => "fused".into(),
            Kept::Packed(packing) => format!("native {}", packing.isa.name()),
            Kept::OneDnn { library, .. } => format!("onednn {}", library.version()),
        }
    }

    fn candle(dtype: DtypeSpec, tensors: DType) -> Self {
        let kept = Kept::Tensors { fused: false };
        Self { dtype, tensors, encoder: kept, decoder: kept }
    }

    fn fused(self) -> Self {
        let kept = Kept::Tensors { fused: true };
        Self { encoder: kept, decoder: kept, ..self }
    }

    fn native(dtype: DtypeSpec, isa: Isa) -> Self {
        let kept = Kept::Packed(Packing { isa, narrow: dtype != DtypeSpec::F32 });
        Self { dtype, tensors: DType::F32, encoder: kept, decoder: kept }
    }

    fn onednn(dtype: DtypeSpec, library: &'static Library, number: Number) -> Self {
        Self { encoder: Kept::OneDnn { library, number }, ..Self::native(dtype, Isa::detect()) }
    }
}

impl Backend {
    /// What a device and a precision become with it. `library` is oneDNN's file, where it is not the system's.
    ///
    /// An asked-for backend that cannot be had is an error; `auto` says in the log why a faster one is not taken.
    pub(super) fn choose(self, dtype: DtypeSpec, device: &Device, library: Option<&Path>) -> Result<Chosen, LoadError> {
        if !device.is_cpu() {
            return self.on_gpu(dtype, device);
        }
        match self {
            Self::Auto => auto(dtype, library),
            Self::Native(isa) => native(self, dtype, isa.unwrap_or_else(Isa::detect)),
            Self::OneDnn => onednn(dtype, library),
            Self::Fused => Self::Candle.choose(dtype, device, library).map(Chosen::fused),
            Self::Candle => match dtype {
                DtypeSpec::Auto | DtypeSpec::F32 => Ok(Chosen::candle(DtypeSpec::F32, DType::F32)),
                DtypeSpec::Bf16 => Ok(Chosen::candle(dtype, DType::BF16)),
                DtypeSpec::F16 => Ok(Chosen::candle(dtype, DType::F16)),
                DtypeSpec::Int8 => Err(wrong(self, dtype, "int8 runs on onednn")),
            },
        }
    }

    fn on_gpu(self, dtype: DtypeSpec, device: &Device) -> Result<Chosen, LoadError> {
        if let Self::Native(_) | Self::OneDnn = self {
            return Err(LoadError::Device(format!(
                "the backend {self} is for CPUs: choose auto, fused or candle on a GPU"
            )));
        }
        let Some(gpu) = Gpu::of(device)? else {
            return Err(LoadError::Device("the device is neither a CPU nor an NVIDIA GPU".into()));
        };
        let (dtype, tensors) = gpu.dtype(dtype)?;
        let candle = Chosen::candle(dtype, tensors);
        if self == Self::Candle {
            return Ok(candle);
        }
        match fused::check(device, tensors) {
            Ok(()) => Ok(candle.fused()),
            Err(error) if self == Self::Fused => {
                Err(LoadError::Device(format!("the backend fused does not work on this GPU: {error}. Choose candle")))
            }
            // After some faults of a kernel the driver refuses everything more to this process.
            Err(error) if Tensor::zeros(1, tensors, device).and_then(|_| device.synchronize()).is_err() => {
                Err(LoadError::Device(format!(
                    "the backend fused does not work on this GPU, and has left it unusable to this process: {error}. Set \
                     model.backend = \"candle\", which is slower, and start again"
                )))
            }
            Err(error) => {
                tracing::warn!(%error, "the fused kernels do not work on this GPU; candle's are taken, which are slower");
                Ok(candle)
            }
        }
    }
}

fn wrong(backend: Backend, dtype: DtypeSpec, hint: &str) -> LoadError {
    LoadError::Device(format!("the backend {backend} has no {dtype}: {hint}"))
}

fn native(backend: Backend, dtype: DtypeSpec, isa: Isa) -> Result<Chosen, LoadError> {
    if !isa.is_here() {
        let best = Isa::detect().name();
        let name = isa.name();
        return Err(LoadError::Device(format!(
            "this CPU has no {name}: {best} is the best it has (backend native takes it by itself)"
        )));
    }
    match dtype {
        DtypeSpec::Auto | DtypeSpec::F32 => Ok(Chosen::native(DtypeSpec::F32, isa)),
        DtypeSpec::Bf16 => Ok(Chosen::native(dtype, isa)),
        DtypeSpec::F16 => Err(wrong(backend, dtype, "on a CPU it runs on candle, slowly; choose f32 or bf16")),
        DtypeSpec::Int8 => Err(wrong(backend, dtype, "int8 runs on onednn")),
    }
}

fn onednn(dtype: DtypeSpec, library: Option<&Path>) -> Result<Chosen, LoadError> {
    let open = || Library::open(library).map_err(|error| LoadError::Device(error.to_string()));
    match dtype {
        DtypeSpec::F32 => Ok(Chosen::onednn(dtype, open()?, Number::F32)),
        DtypeSpec::Int8 => Ok(Chosen::onednn(dtype, open()?, Number::Int8)),
        DtypeSpec::Bf16 if has_bf16() => Ok(Chosen::onednn(dtype, open()?, Number::Bf16)),
        DtypeSpec::Bf16 => Err(wrong(
            Backend::OneDnn,
            dtype,
            "this CPU multiplies no bf16 (that takes AVX-512 BF16 or AMX); choose f32 or int8, or the backend native",
        )),
        DtypeSpec::Auto if has_bf16() => Ok(Chosen::onednn(DtypeSpec::Bf16, open()?, Number::Bf16)),
        DtypeSpec::Auto => Ok(Chosen::onednn(DtypeSpec::F32, open()?, Number::F32)),
        DtypeSpec::F16 => Err(wrong(Backend::OneDnn, dtype, "choose f32, bf16 or int8")),
    }
}

/// bf16 on oneDNN where the CPU multiplies it, which is several times as fast as anything else; else our own kernels.
fn auto(dtype: DtypeSpec, library: Option<&Path>) -> Result<Chosen, LoadError> {
    match dtype {
        DtypeSpec::F16 => Backend::Candle.choose(dtype, &Device::Cpu, library),
        DtypeSpec::Int8 => onednn(dtype, library),
        DtypeSpec::Auto | DtypeSpec::Bf16 if has_bf16() => match Library::open(library).and_then(multiplies_bf16) {
            Ok(library) => Ok(Chosen::onednn(DtypeSpec::Bf16, library, Number::Bf16)),
            Err(error) => {
                let chosen = native(Backend::Native(None), dtype, Isa::detect())?;
                says_why(&error, &chosen);
                Ok(chosen)
            }
        },
        _ => native(Backend::Native(None), dtype, Isa::detect()),
    }
}

/// Whether it really does, on this CPU and with its own settings.
fn multiplies_bf16(library: &'static Library) -> Result<&'static Library, OneDnnError> {
    Factor::of_columns(library, Number::Bf16, &[0.0; 64 * 64], 64).map(|_| library)
}

fn says_why(error: &OneDnnError, chosen: &Chosen) {
    let (backend, dtype) = (chosen.name(), chosen.dtype);
    tracing::warn!(%error, backend, %dtype, "this CPU multiplies bf16 several times as fast with oneDNN, which cannot be used");
}

/// Whether the CPU multiplies bf16: AVX-512 BF16, which all CPUs with AMX have, too.
pub(super) fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(backend: &str, dtype: DtypeSpec) -> Result<Chosen, String> {
        let backend: Backend = backend.parse().unwrap();
        backend.choose(dtype, &Device::Cpu, Some(Path::new("nowhere/libdnnl.so"))).map_err(|error| error.to_string())
    }

    #[test]
    fn names_read_back_as_they_are_written() {
        for backend in Backend::all() {
            assert_eq!(backend.to_string().parse::<Backend>().unwrap(), backend);
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let message = |text: &str| text.parse::<Backend>().unwrap_err().to_string();
        assert!(message("mkl").contains("auto, native, onednn, candle or fused"));
        assert!(message("native:neon9").contains("plain, avx2, avx512"));
    }

    #[test]
    fn a_missing_library_is_named_with_what_to_do() {
        let message = choose("onednn", DtypeSpec::F32).err().unwrap();
        assert!(message.contains("nowhere/libdnnl.so") && message.contains("model.onednn_library"), "{message}");
    }

    #[test]
    fn precisions_that_a_backend_does_not_have_are_refused_with_one_that_has_them() {
        for (backend, dtype, hint) in [
            ("native", DtypeSpec::F16, "candle"),
            ("native", DtypeSpec::Int8, "onednn"),
            ("candle", DtypeSpec::Int8, "onednn"),
            ("onednn", DtypeSpec::F16, "bf16"),
        ] {
            let message = choose(backend, dtype).err().unwrap();
            assert!(message.contains(&dtype.to_string()) && message.contains(hint), "{message}");
        }
    }

    #[test]
    fn what_every_machine_has_can_be_chosen_and_is_named() {
        assert_eq!(choose("native:plain", DtypeSpec::Bf16).unwrap().name(), "native plain");
        assert_eq!(choose("candle", DtypeSpec::F16).unwrap().name(), "candle");
        let best = format!("native {}", Isa::detect().name());
        assert_eq!(choose("auto", DtypeSpec::F32).unwrap().name(), best);
    }

    #[test]
    fn instructions_that_the_cpu_has_not_are_refused_with_those_it_has() {
        for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_here()) {
            let message = choose(&format!("native:{}", isa.name()), DtypeSpec::F32).err().unwrap();
            assert!(message.contains(isa.name()) && message.contains(Isa::detect().name()), "{message}");
        }
    }
}
