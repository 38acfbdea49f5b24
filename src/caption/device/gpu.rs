//! Whether a GPU takes this program and a model, asked before anything goes there: what the driver says later, in the
//! middle of loading, tells nobody what to do.

use candle_core::{DType, Device};

use super::super::load::LoadError;
use super::DtypeSpec;

/// The compute capability that the kernels were compiled for, as in `CUDA_COMPUTE_CAP`: `90` is 9.0. Unknown where the
/// build asked the GPU that it found.
const BUILT_FOR: Option<&str> = option_env!("CUDA_COMPUTE_CAP");

/// bf16 arithmetic came with this compute capability.
const HAS_BF16: (u32, u32) = (8, 0);

/// An NVIDIA GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::caption) struct Gpu {
    /// `cuda:0`.
    pub(in crate::caption) name: String,
    /// Compute capability.
    pub(in crate::caption) capability: (u32, u32),
    /// Memory that nobody holds, in bytes.
    pub(in crate::caption) free: u64,
    /// All of its memory, in bytes.
    pub(in crate::caption) total: u64,
}

impl Gpu {
    /// What an opened device is; `None` where it is no GPU.
    #[cfg(feature = "cuda")]
    pub(in crate::caption) fn of(device: &Device) -> Result<Option<Self>, LoadError> {
        let Device::Cuda(device) = device else { return Ok(None) };
        let stream = device.cuda_stream();
        let (context, name) = (stream.context(), format!("cuda:{}", stream.context().ordinal()));
        let known = context.compute_capability().and_then(|capability| Ok((capability, context.mem_get_info()?)));
        let ((major, minor), (free, total)) =
            known.map_err(|error| LoadError::Device(format!("{name} does not say what it is: {error}")))?;
        let capability = (major.unsigned_abs(), minor.unsigned_abs());
        Ok(Some(Self { name, capability, free: free as u64, total: total as u64 }))
    }

    #[cfg(not(feature = "cuda"))]
    #[expect(clippy::unnecessary_wraps, reason = "with GPUs the driver is asked")]
    pub(in crate::caption) fn of(_device: &Device) -> Result<Option<Self>, LoadError> {
        Ok(None)
    }

    /// Whether it runs the kernels of this program.
    pub(in crate::caption) fn runs_this_program(&self) -> Result<(), LoadError> {
        self.runs_kernels_for(BUILT_FOR)
    }

    fn runs_kernels_for(&self, built_for: Option<&str>) -> Result<(), LoadError> {
        let Some(least) = built_for.and_then(capability) else { return Ok(()) };
        if self.capability >= least {
            return Ok(());
        }
        let (name, (major, minor)) = (&self.name, self.capability);
        Err(LoadError::Device(format!(
            "{name} has the compute capability {major}.{minor}, and this program was built for {}.{} and newer GPUs: build \
             it for this one with `CUDA_COMPUTE_CAP={major}{minor} make cuda`, or choose cpu",
            least.0, least.1
        )))
    }

    /// The precision of tensors on it; also says what `auto` becomes.
    pub(in crate::caption) fn dtype(&self, dtype: DtypeSpec) -> Result<(DtypeSpec, DType), LoadError> {
        let has_bf16 = self.capability >= HAS_BF16;
        match dtype {
            DtypeSpec::F32 => Ok((dtype, DType::F32)),
            DtypeSpec::F16 => Ok((dtype, DType::F16)),
            DtypeSpec::Auto | DtypeSpec::Bf16 if has_bf16 => Ok((DtypeSpec::Bf16, DType::BF16)),
            DtypeSpec::Auto => Ok((DtypeSpec::F16, DType::F16)),
            DtypeSpec::Bf16 => {
                let (name, (major, minor)) = (&self.name, self.capability);
                Err(LoadError::Device(format!(
                    "{name} computes no bf16: that came with the compute capability 8.0, and it has {major}.{minor}. Choose \
                     f16 or f32"
                )))
            }
            DtypeSpec::Int8 => Err(LoadError::Device("int8 is for CPUs: choose bf16, f16 or f32 on a GPU".into())),
        }
    }

    /// Whether it has room for a model's weights, in bytes. What a batch takes comes on top, and has its own remedy: smaller
    /// batches.
    pub(in crate::caption) fn holds(&self, model: &str, weights: u64) -> Result<(), LoadError> {
        if weights <= self.free {
            return Ok(());
        }
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let (name, free, total) = (&self.name, self.free >> 20, mib(self.total));
        Err(LoadError::Device(format!(
            "{name} has {free} MiB free of {total} MiB, and the weights of {model} alone take {} MiB: end what else runs on \
             it, choose a narrower precision (bf16, f16) or another device",
            mib(weights)
        )))
    }
}

/// `90` is 9.0, `120` is 12.0.
fn capability(text: &str) -> Option<(u32, u32)> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let number: u32 = digits.parse().ok()?;
    Some((number / 10, number % 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(capability: (u32, u32)) -> Gpu {
        Gpu { name: "cuda:1".into(), capability, free: 300 << 20, total: 24 << 30 }
    }

    #[test]
    fn a_gpu_older_than_the_build_is_refused_with_how_to_build_for_it() {
        for built_for in [None, Some("80"), Some("86"), Some("native")] {
            gpu((8, 6)).runs_kernels_for(built_for).unwrap();
        }
        gpu((12, 0)).runs_kernels_for(Some("90a")).unwrap();
        let message = gpu((8, 6)).runs_kernels_for(Some("90")).unwrap_err().to_string();
        for part in ["cuda:1", "8.6", "9.0", "CUDA_COMPUTE_CAP=86 make cuda"] {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert!(gpu((9, 0)).runs_kernels_for(Some("120")).is_err());
    }

    #[test]
    fn a_gpu_without_bf16_gets_f16_and_says_so_where_bf16_was_asked_for() {
        assert_eq!(gpu((8, 0)).dtype(DtypeSpec::Auto).unwrap(), (DtypeSpec::Bf16, DType::BF16));
        assert_eq!(gpu((7, 5)).dtype(DtypeSpec::Auto).unwrap(), (DtypeSpec::F16, DType::F16));
        let message = gpu((7, 5)).dtype(DtypeSpec::Bf16).unwrap_err().to_string();
        assert!(message.contains("cuda:1") && message.contains("7.5") && message.contains("f16"), "{message}");
        assert!(gpu((9, 0)).dtype(DtypeSpec::Int8).unwrap_err().to_string().contains("bf16"));
    }

    #[test]
    fn a_model_that_does_not_fit_is_refused_with_what_there_is_and_what_to_do() {
        gpu((9, 0)).holds("random-base", 300 << 20).unwrap();
        let message = gpu((9, 0)).holds("random-large", (894 << 20) - 1).unwrap_err().to_string();
        for part in ["cuda:1", "300 MiB free of 24576 MiB", "random-large", "894 MiB", "bf16"] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
}
