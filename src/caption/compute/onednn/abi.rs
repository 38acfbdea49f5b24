//! oneDNN's functions and numbers, as its headers have them (`dnnl.h`, `dnnl_types.h`).

use std::ffi::{c_char, c_int, c_uint, c_void};

/// A descriptor's size in version 2 is 696 bytes, that of a product's description 2800.
pub(super) const DESCRIPTOR: usize = 1024 / size_of::<u64>();
pub(super) const DESCRIPTION: usize = 4096 / size_of::<u64>();

pub(super) type Handle = *mut c_void;
pub(super) type Dims = *const i64;
pub(super) type SetThreads = unsafe extern "C" fn(c_int);

// Of `dnnl_types.h`.
pub(super) const CPU: c_int = 1;
pub(super) const ANY_FORMAT: c_int = 1;
pub(super) const QUERY_IMPLEMENTATION: c_int = 8;
pub(super) const QUERY_WEIGHTS: c_int = 131;
pub(super) const QUERY_SOURCE: c_int = 129;
pub(super) const QUERY_TARGET: c_int = 133;
pub(super) const QUERY_SCRATCHPAD: c_int = 136;
pub(super) const SOURCE: c_int = 1;
pub(super) const TARGET: c_int = 17;
pub(super) const WEIGHTS: c_int = 33;
pub(super) const SCRATCHPAD: c_int = 80;
pub(super) const SCRATCHPAD_OF_USER: c_int = 1;
pub(super) const IN_ORDER: c_uint = 1;
pub(super) const SEQUENTIAL: c_uint = 1;
pub(super) const OPENMP: c_uint = 2;

macro_rules! functions {
    ($(#[$doc:meta])* $group:ident { $($name:ident($($argument:ty),*) -> $result:ty;)* }) => {
        $(#[$doc])*
        pub(super) struct $group {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }
        impl $group {
            /// # Safety
            /// The library must be oneDNN of the version that has these functions.
            pub(super) unsafe fn find(library: &libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of the headers.
                unsafe { Ok(Self { $($name: *library.get(concat!("dnnl_", stringify!($name)))?,)* }) }
            }
        }
    };
}

functions! {
    /// What both versions have.
    Functions {
        engine_create(*mut Handle, c_int, usize) -> c_int;
        stream_create(*mut Handle, Handle, c_uint) -> c_int;
        stream_destroy(Handle) -> c_int;
        memory_create(*mut Handle, *const c_void, Handle, *mut c_void) -> c_int;
        memory_destroy(Handle) -> c_int;
        memory_desc_get_size(*const c_void) -> usize;
        primitive_attr_create(*mut Handle) -> c_int;
        primitive_attr_set_scratchpad_mode(Handle, c_int) -> c_int;
        primitive_desc_query(Handle, c_int, c_int, *mut c_void) -> c_int;
        primitive_desc_query_md(Handle, c_int, c_int) -> *const c_void;
        primitive_desc_destroy(Handle) -> c_int;
        reorder_primitive_desc_create(*mut Handle, *const c_void, Handle, *const c_void, Handle, Handle) -> c_int;
        primitive_create(*mut Handle, Handle) -> c_int;
        primitive_execute(Handle, Handle, c_int, *const Argument) -> c_int;
        primitive_destroy(Handle) -> c_int;
    }
}

functions! {
    /// What only version 2 has, whose descriptors are plain memory of the caller's.
    Second {
        memory_desc_init_by_strides(*mut c_void, c_int, Dims, c_int, Dims) -> c_int;
        memory_desc_init_by_tag(*mut c_void, c_int, Dims, c_int, c_int) -> c_int;
        matmul_desc_init(*mut c_void, *const c_void, *const c_void, *const c_void, *const c_void) -> c_int;
        primitive_desc_create(*mut Handle, *const c_void, Handle, Handle, Handle) -> c_int;
    }
}

functions! {
    /// What only version 3 has.
    Third {
        memory_desc_create_with_strides(*mut Handle, c_int, Dims, c_int, Dims) -> c_int;
        memory_desc_create_with_tag(*mut Handle, c_int, Dims, c_int, c_int) -> c_int;
        memory_desc_destroy(Handle) -> c_int;
        matmul_primitive_desc_create(
            *mut Handle, Handle, *const c_void, *const c_void, *const c_void, *const c_void, Handle
        ) -> c_int;
    }
}

pub(super) enum Own {
    Second(Second),
    Third(Third),
}

#[repr(C)]
pub(super) struct Version {
    pub(super) major: c_int,
    pub(super) minor: c_int,
    pub(super) patch: c_int,
    hash: *const c_char,
    pub(super) cpu_runtime: c_uint,
    gpu_runtime: c_uint,
}

/// An argument of a primitive: which, and the memory.
#[repr(C)]
pub(super) struct Argument(pub(super) c_int, pub(super) Handle);
