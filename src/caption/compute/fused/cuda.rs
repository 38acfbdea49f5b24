//! The kernels on a GPU.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};

use candle_core::backend::BackendStorage as _;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, DevicePtr as _, DeviceRepr, LaunchConfig, PushKernelArg as _,
};
use candle_core::cuda_backend::cudarc::nvrtc::sys::nvrtcVersion;
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::cuda_backend::{CudaStorageSlice, DeviceId, WrapErr as _};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Storage};
use libloading::Library;

use super::Step;
use super::launch::Args;

const SOURCE: &str = include_str!("kernels.cu");
const MODULE: &str = "blipstream-fused";

// SAFETY: plain numbers in C's order, as the kernels declare them.
unsafe impl DeviceRepr for Args {}

/// The kernels in the assembly of a compute capability, compiled once for each: a second of work.
fn assembly(device: &CudaDevice) -> Result<&'static str> {
    static COMPILED: Mutex<BTreeMap<(i32, i32), &str>> = Mutex::new(BTreeMap::new());
    let (major, minor) = device.cuda_stream().context().compute_capability().w()?;
    let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(assembly) = compiled.get(&(major, minor)) {
        return Ok(assembly);
    }
    open_builtins();
    let architecture = format!("--gpu-architecture=compute_{major}{minor}");
    let options = CompileOptions { options: vec![architecture], ..CompileOptions::default() };
    let assembly = compile_ptx_with_opts(SOURCE, options).map_err(candle_core::Error::wrap)?.to_src();
    // As many as there are kinds of GPUs in the machine.
    let assembly = String::leak(assembly);
    compiled.insert((major, minor), assembly);
    Ok(assembly)
}

/// Opens the file that NVRTC looks for by name alone, which finds it where it is open already: beside this program, whose
/// libraries are found by their place. Where there is none, NVRTC says so.
fn open_builtins() {
    static OPENED: OnceLock<Option<Library>> = OnceLock::new();
    OPENED.get_or_init(|| {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both are numbers that the call sets; the library only has data.
        unsafe {
            nvrtcVersion(&raw mut major, &raw mut minor).result().ok()?;
            Library::new(format!("libnvrtc-builtins.so.{major}.{minor}")).ok()
        }
    });
}

/// Where a contiguous tensor begins.
pub(super) fn address(storage: &CudaStorage, layout: &Layout) -> Result<u64> {
    let Some((from, _)) = layout.contiguous_offsets() else {
        candle_core::bail!("a fused step takes contiguous tensors")
    };
    let stream = storage.device.cuda_stream();
    // All work of an engine is on one stream, so that nothing has to be waited for or written down.
    let begin = match &storage.slice {
        CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::F16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::U32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::U8(slice) => slice.device_ptr(&stream).0,
        _ => candle_core::bail!("a fused step takes f32, bf16 and f16"),
    };
    Ok(begin + (from * storage.dtype().size_in_bytes()) as u64)
}

/// Room for so many numbers in the precision of a storage, undefined until written.
pub(super) fn empty_like(storage: &CudaStorage, count: usize) -> Result<CudaStorage> {
    let device = &storage.device;
    // SAFETY: the step that asks for it writes all of it before anybody reads.
    let slice = unsafe {
        match storage.dtype() {
            DType::F32 => CudaStorageSlice::F32(device.alloc(count)?),
            DType::BF16 => CudaStorageSlice::BF16(device.alloc(count)?),
            DType::F16 => CudaStorageSlice::F16(device.alloc(count)?),
            _ => candle_core::bail!("a fused step takes f32, bf16 and f16"),
        }
    };
    Ok(CudaStorage { slice, device: device.clone() })
}

/// A kernel of a device, looked up once: the driver takes longer for that than for starting it.
fn function(device: &CudaDevice, kernel: String) -> Result<CudaFunction> {
    static FOUND: LazyLock<Mutex<HashMap<(DeviceId, String), CudaFunction>>> = LazyLock::new(Mutex::default);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(match found.entry((device.id(), kernel)) {
        Entry::Occupied(entry) => entry.get().clone(),
        Entry::Vacant(entry) => {
            let function = device.get_or_load_custom_func(&entry.key().1, MODULE, assembly(device)?)?;
            entry.insert(function.into_cuda_function()).clone()
        }
    })
}

/// Runs a step's kernel on the device of `storage` and in its precision.
pub(super) fn run(step: &Step, args: Args, storage: &CudaStorage) -> Result<()> {
    let starts = step.starts.as_ref().map(|starts| {
        let (storage, layout) = starts.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { candle_core::bail!("the starts are on another device") };
        address(storage, layout)
    });
    let args = Args { starts: starts.transpose()?.unwrap_or_default(), ..args };
    let Some(launch) = step.kernel.launch(storage.dtype(), &args) else {
        candle_core::bail!("a fused step takes f32, bf16 and f16")
    };
    let function = function(&storage.device, launch.kernel)?;
    let config = LaunchConfig {
        grid_dim: (launch.blocks, 1, 1),
        block_dim: (launch.threads.0, launch.threads.1, 1),
        shared_mem_bytes: 0,
    };
    let stream = storage.device.cuda_stream();
    let mut builder = stream.launch_builder(&function);
    builder.arg(&args);
    // SAFETY: the kernel takes these arguments; the addresses are of tensors that the caller holds, as large as the sizes
    // say, and memory is given back in the order of the stream.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}
