//! Where a model runs and in which precision, as a user names it.

use std::fmt;
use std::str::FromStr;

mod gpu;

use candle_core::Device;

pub(super) use self::gpu::Gpu;
use super::load::LoadError;

/// `auto`, `cpu` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DeviceSpec {
    /// The first GPU where the build and the machine have one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU, by its number.
    Cuda(usize),
}

impl FromStr for DeviceSpec {
    type Err = LoadError;

    fn from_str(text: &str) -> Result<Self, LoadError> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", number)) if number.parse::<usize>().is_ok() => {
                Ok(Self::Cuda(number.parse().unwrap_or_default()))
            }
            _ => Err(LoadError::Device(format!("unknown device {text:?}: write auto, cpu or cuda:0"))),
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl DeviceSpec {
    /// Every GPU of this machine, in the order of their numbers.
    ///
    /// # Errors
    /// This build has no GPU support, or the driver does not answer.
    pub fn gpus() -> Result<Vec<Self>, LoadError> {
        Ok((0..count_gpus()?).map(Self::Cuda).collect())
    }

    /// Opens the device; also says what `auto` became.
    pub(super) fn open(self) -> Result<(Self, Device), LoadError> {
        match self {
            Self::Cpu => Ok((Self::Cpu, Device::Cpu)),
            Self::Cuda(number) => Ok((self, open_suited(number)?)),
            Self::Auto => match open_suited(0) {
                Ok(device) => Ok((Self::Cuda(0), device)),
                Err(reason) => {
                    if cfg!(feature = "cuda") {
                        tracing::warn!(%reason, "no GPU can be used, captions are made on the CPU");
                    }
                    Ok((Self::Cpu, Device::Cpu))
                }
            },
        }
    }
}

/// Opens a GPU that runs this program.
fn open_suited(number: usize) -> Result<Device, LoadError> {
    let device = open_cuda(number)?;
    if let Some(gpu) = Gpu::of(&device)? {
        gpu.runs_this_program()?;
    }
    Ok(device)
}

#[cfg(feature = "cuda")]
fn open_cuda(number: usize) -> Result<Device, LoadError> {
    // A stream of its own, so that engines on several threads do not wait for each other on the default stream.
    let opened = Device::new_cuda_with_stream(number)
        .map_err(|error| LoadError::Device(format!("cuda:{number} cannot be opened: {error}")))?;
    if let Device::Cuda(device) = &opened {
        // SAFETY: a model and all that its engines make are on this one stream, in whose order memory is given back.
        unsafe { device.disable_event_tracking() };
        keep_memory(device).map_err(|error| LoadError::Device(format!("cuda:{number} has no memory pool: {error}")))?;
    }
    Ok(opened)
}

/// Keeps memory that is given back for what comes next. Without that the driver takes it away at every wait for the device,
/// which is after every batch.
#[cfg(feature = "cuda")]
fn keep_memory(device: &candle_core::CudaDevice) -> Result<(), Box<dyn std::error::Error>> {
    use candle_core::cuda_backend::cudarc::driver::result::{device, mem_pool};
    use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute;
    let mut all = u64::MAX;
    // SAFETY: the device is open, and the attribute is a number of 64 bits, which is only read.
    unsafe {
        let pool = device::get_default_mem_pool(device.cuda_stream().context().cu_device())?;
        let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        mem_pool::set_attribute(pool, threshold, (&raw mut all).cast())?;
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn count_gpus() -> Result<usize, LoadError> {
    let count = candle_core::cuda_backend::cudarc::driver::CudaContext::device_count();
    let count = count.map_err(|error| LoadError::Device(format!("the GPU driver does not answer: {error}")))?;
    Ok(usize::try_from(count).unwrap_or_default())
}

#[cfg(not(feature = "cuda"))]
fn count_gpus() -> Result<usize, LoadError> {
    Err(LoadError::Device("this build has no GPU support: build with `--features cuda`".into()))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(number: usize) -> Result<Device, LoadError> {
    Err(LoadError::Device(format!(
        "cuda:{number} was asked for, but this build has no GPU support: build with `--features cuda`, or choose cpu"
    )))
}

/// `auto`, `f32`, `bf16`, `f16` or `int8`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DtypeSpec {
    /// bf16 where the device multiplies it much faster: on a GPU, and on a CPU that does, with oneDNN. On other CPUs f32,
    /// on GPUs older than Ampere f16.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// 8-bit integers in the image encoder, the rest as bf16; on CPUs.
    Int8,
}

impl FromStr for DtypeSpec {
    type Err = LoadError;

    fn from_str(text: &str) -> Result<Self, LoadError> {
        match text {
            "auto" => Ok(Self::Auto),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            "int8" => Ok(Self::Int8),
            _ => Err(LoadError::Device(format!("unknown dtype {text:?}: write auto, f32, bf16, f16 or int8"))),
        }
    }
}

impl fmt::Display for DtypeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_as_they_are_written() {
        for name in ["auto", "cpu", "cuda:0", "cuda:3"] {
            assert_eq!(name.parse::<DeviceSpec>().unwrap().to_string(), name);
        }
        for name in ["auto", "f32", "bf16", "f16", "int8"] {
            assert_eq!(name.parse::<DtypeSpec>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        assert!("gpu".parse::<DeviceSpec>().unwrap_err().to_string().contains("cuda:0"));
        assert!("cuda:x".parse::<DeviceSpec>().unwrap_err().to_string().contains("cuda:x"));
        assert!("fp8".parse::<DtypeSpec>().unwrap_err().to_string().contains("bf16"));
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_gpu_asked_of_a_build_without_gpus_is_an_error_that_says_so() {
        let message = DeviceSpec::Cuda(1).open().unwrap_err().to_string();
        assert!(message.contains("--features cuda"), "{message}");
        assert_eq!(DeviceSpec::Auto.open().unwrap().0, DeviceSpec::Cpu);
        let message = DeviceSpec::gpus().unwrap_err().to_string();
        assert!(message.contains("--features cuda"), "{message}");
    }
}
