//! oneDNN, Intel's library of kernels, as far as products with packed factors need it.
//!
//! The library is looked for at run time, so that neither building nor running needs it. Versions 2 and 3 differ in three
//! calls and agree in the rest, the numbers of its constants included (`dnnl_types.h` of 2.6 and of 3.13). Its own
//! threads are not used: each product is split over ours, and runs on one of them.

mod abi;
mod factor;
mod plan;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::{Mutex, OnceLock, PoisonError};

use self::abi::{
    ANY_FORMAT, CPU, DESCRIPTION, DESCRIPTOR, Functions, Handle, OPENMP, Own, SCRATCHPAD_OF_USER, SEQUENTIAL, SOURCE,
    Second, SetThreads, TARGET, Third, Version,
};
pub(in crate::caption) use self::factor::{Factor, Number};
use self::plan::{Aligned, Descriptor, Plan};

/// Oldest version: the first whose products on packed factors use AMX that was tried.
const OLDEST: (c_int, c_int) = (2, 6);
/// First version that is not known.
const UNKNOWN: c_int = 4;
/// Where the loader is asked to look, newest first.
const NAMES: [&str; 2] = ["libdnnl.so.3", "libdnnl.so.2"];
/// Why oneDNN cannot be used. The messages say what to do.
#[derive(Debug, thiserror::Error)]
pub(in crate::caption) enum OneDnnError {
    /// There is none.
    #[error(
        "oneDNN was not found ({0}): install it (Debian: libdnnl3 or libdnnl2; PyPI: onednn-cpu-gomp), or name the \
         library's file in model.onednn_library"
    )]
    Missing(String),
    /// The file is not the library.
    #[error("{file} is not oneDNN, or not a whole one: {reason}")]
    Foreign { file: String, reason: String },
    /// Too old, or newer than what is known.
    #[error("{file} is oneDNN {major}.{minor}, but 2.6 or newer of version 2, or version 3 is needed")]
    Version { file: String, major: c_int, minor: c_int },
    /// Built for threads that are not ours to command.
    #[error(
        "{file} brings threads that cannot be told to stay one: a build of oneDNN for OpenMP, or for one thread, is needed"
    )]
    Threads { file: String },
    /// It has nothing but slow general code for such a product.
    #[error("oneDNN {version} has no fast kernel for {what} on this CPU")]
    Slow { version: String, what: &'static str },
    /// A call failed.
    #[error("oneDNN failed at {call} with status {status}{}", explain(*.status))]
    Call { call: &'static str, status: c_int },
}

/// An error with what caused it.
fn told(error: &libloading::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn explain(status: c_int) -> &'static str {
    match status {
        1 => ": out of memory",
        2 => ": invalid arguments",
        3 => ": there is no such kernel for this CPU",
        _ => "",
    }
}

/// The library.
pub(in crate::caption) struct Library {
    functions: Functions,
    own: Own,
    engine: Handle,
    attributes: Handle,
    /// Of OpenMP; a build for one thread has none.
    set_threads: Option<SetThreads>,
    version: String,
    /// Of integers, found when it is first asked for.
    largest_weight: OnceLock<f32>,
}

// SAFETY: engine and attributes are only read after they were made, and the functions may be called on any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// Opens the library of this file, or else the newest that the system has. It stays open until the process ends.
    pub(in crate::caption) fn open(file: Option<&Path>) -> Result<&'static Self, OneDnnError> {
        static OPEN: Mutex<Vec<(Option<PathBuf>, &Library)>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, library)) = open.iter().find(|(of, _)| of.as_deref() == file) {
            return Ok(library);
        }
        let library: &'static Self = Box::leak(Box::new(Self::find(file)?));
        open.push((file.map(Into::into), library));
        Ok(library)
    }

    fn find(file: Option<&Path>) -> Result<Self, OneDnnError> {
        let names = match file {
            Some(file) => vec![file.to_owned()],
            None => NAMES.map(PathBuf::from).to_vec(),
        };
        let (mut reasons, mut unfit) = (Vec::new(), None);
        for name in &names {
            // SAFETY: whoever names a file as a library has it run its code, and so does who installs one.
            match unsafe { libloading::Library::new(name) } {
                Ok(library) => match Self::from(library, name.display().to_string()) {
                    Ok(library) => return Ok(library),
                    // An older one may still serve.
                    Err(error) => unfit = unfit.or(Some(error)),
                },
                Err(error) => reasons.push(told(&error)),
            }
        }
        Err(unfit.unwrap_or_else(|| OneDnnError::Missing(reasons.join("; "))))
    }

    fn from(library: libloading::Library, file: String) -> Result<Self, OneDnnError> {
        // Threads of the library's may outlive every use of it, so it is never closed.
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        let foreign = |error: libloading::Error| OneDnnError::Foreign { file: file.clone(), reason: told(&error) };
        // SAFETY: in all versions it takes nothing and returns a static structure that begins like ours.
        let version = unsafe {
            let version = library.get::<unsafe extern "C" fn() -> *const Version>("dnnl_version").map_err(foreign)?;
            &*version()
        };
        let Version { major, minor, patch, cpu_runtime, .. } = *version;
        if (major, minor) < OLDEST || major >= UNKNOWN {
            return Err(OneDnnError::Version { file, major, minor });
        }
        // SAFETY: OpenMP's function of this name has this type.
        let set_threads = unsafe { library.get::<SetThreads>("omp_set_num_threads") };
        let set_threads = match (cpu_runtime, set_threads) {
            (SEQUENTIAL, _) => None,
            (OPENMP, Ok(set_threads)) => Some(*set_threads),
            _ => return Err(OneDnnError::Threads { file }),
        };
        // SAFETY: it is oneDNN of that version.
        let (functions, own) = unsafe {
            let own =
                if major == 2 { Second::find(library).map(Own::Second) } else { Third::find(library).map(Own::Third) };
            (Functions::find(library).map_err(foreign)?, own.map_err(foreign)?)
        };
        let version = format!("{major}.{minor}.{patch}");
        let (engine, attributes, largest_weight) = (null_mut(), null_mut(), OnceLock::new());
        let mut new = Self { functions, own, engine, attributes, set_threads, version, largest_weight };
        // SAFETY: both write a handle, of objects that live as long as the process.
        unsafe {
            check("dnnl_engine_create", (new.functions.engine_create)(&raw mut new.engine, CPU, 0))?;
            check("dnnl_primitive_attr_create", (new.functions.primitive_attr_create)(&raw mut new.attributes))?;
            let set = (new.functions.primitive_attr_set_scratchpad_mode)(new.attributes, SCRATCHPAD_OF_USER);
            check("dnnl_primitive_attr_set_scratchpad_mode", set)?;
        }
        Ok(new)
    }

    /// Its version, `major.minor.patch`.
    pub(in crate::caption) fn version(&self) -> &str {
        &self.version
    }

    /// Has everything that this thread calls run on this thread.
    fn alone(&self) {
        thread_local! {
            // By the function that was called: two libraries may bring an OpenMP of their own each.
            static ALONE: Cell<Option<SetThreads>> = const { Cell::new(None) };
        }
        if let Some(set_threads) = self.set_threads
            && ALONE.replace(self.set_threads).is_none_or(|before| before as usize != set_threads as usize)
        {
            // SAFETY: it sets a number of this thread's.
            unsafe { set_threads(1) };
        }
    }

    /// Describes a matrix in memory by the numbers from one row, and from one column, to the next.
    fn describe(&'static self, dims: [usize; 2], kind: c_int, strides: [usize; 2]) -> Result<Descriptor, OneDnnError> {
        let (dims, strides) = (dims.map(|dim| dim as i64), strides.map(|stride| stride as i64));
        // SAFETY: dims and strides have two numbers each.
        unsafe {
            self.described(
                |own, to| (own.memory_desc_init_by_strides)(to, 2, dims.as_ptr(), kind, strides.as_ptr()),
                |own, to| (own.memory_desc_create_with_strides)(to, 2, dims.as_ptr(), kind, strides.as_ptr()),
            )
        }
    }

    /// Describes a matrix in whatever order is fastest.
    fn describe_any(&'static self, dims: [usize; 2], kind: c_int) -> Result<Descriptor, OneDnnError> {
        let dims = dims.map(|dim| dim as i64);
        // SAFETY: dims has two numbers.
        unsafe {
            self.described(
                |own, to| (own.memory_desc_init_by_tag)(to, 2, dims.as_ptr(), kind, ANY_FORMAT),
                |own, to| (own.memory_desc_create_with_tag)(to, 2, dims.as_ptr(), kind, ANY_FORMAT),
            )
        }
    }

    /// # Safety
    /// The calls must make a descriptor where they are told to.
    unsafe fn described(
        &'static self,
        second: impl FnOnce(&Second, *mut c_void) -> c_int,
        third: impl FnOnce(&Third, *mut Handle) -> c_int,
    ) -> Result<Descriptor, OneDnnError> {
        match &self.own {
            Own::Second(own) => {
                let mut plain = Box::new([0u64; DESCRIPTOR]);
                check("dnnl_memory_desc_init", second(own, plain.as_mut_ptr().cast()))?;
                Ok(Descriptor::Plain(plain))
            }
            Own::Third(own) => {
                let mut handle = null_mut();
                check("dnnl_memory_desc_create", third(own, &raw mut handle))?;
                Ok(Descriptor::Object(handle, own))
            }
        }
    }

    /// A product of matrices so described; `right` may be another's description of its weights.
    ///
    /// # Safety
    /// `right` must be a description.
    unsafe fn plan(
        &'static self,
        left: &Descriptor,
        right: *const c_void,
        target: &Descriptor,
    ) -> Result<Plan, OneDnnError> {
        self.alone();
        let (left, target, nothing) = (left.pointer(), target.pointer(), std::ptr::null());
        let mut plan = Plan { library: self, description: null_mut(), primitive: null_mut() };
        let to = &raw mut plan.description;
        // SAFETY: the descriptions are alive; a missing bias is null.
        unsafe {
            match &self.own {
                Own::Second(own) => {
                    let mut product = Box::new([0u64; DESCRIPTION]);
                    let product = product.as_mut_ptr().cast();
                    let status = (own.matmul_desc_init)(product, left, right, nothing, target);
                    check("dnnl_matmul_desc_init", status)?;
                    let status = (own.primitive_desc_create)(to, product, self.attributes, self.engine, null_mut());
                    check("dnnl_primitive_desc_create", status)?;
                }
                Own::Third(own) => {
                    let create = own.matmul_primitive_desc_create;
                    let status = create(to, self.engine, left, right, nothing, target, self.attributes);
                    check("dnnl_matmul_primitive_desc_create", status)?;
                }
            }
            plan.make()?;
        }
        Ok(plan)
    }

    /// Copies a matrix into the order that a plan wants.
    ///
    /// # Safety
    /// Both places must have what their descriptions say.
    unsafe fn reorder(
        &'static self,
        from: (*const c_void, *mut c_void),
        to: (*const c_void, *mut c_void),
    ) -> Result<(), OneDnnError> {
        self.alone();
        let mut plan = Plan { library: self, description: null_mut(), primitive: null_mut() };
        // SAFETY: the caller's.
        unsafe {
            let create = self.functions.reorder_primitive_desc_create;
            let status = create(&raw mut plan.description, from.0, self.engine, to.0, self.engine, self.attributes);
            check("dnnl_reorder_primitive_desc_create", status)?;
            plan.make()?;
            let mut scratchpad = Aligned::new(plan.scratchpad());
            plan.run(&[(SOURCE, from.0, from.1), (TARGET, to.0, to.1)], &mut scratchpad)
        }
    }
}

fn check(call: &'static str, status: c_int) -> Result<(), OneDnnError> {
    if status == 0 { Ok(()) } else { Err(OneDnnError::Call { call, status }) }
}
