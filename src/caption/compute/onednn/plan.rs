//! Descriptions, and kernels that are ready to run.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;

use super::abi::{
    Argument, DESCRIPTOR, Functions, Handle, IN_ORDER, QUERY_IMPLEMENTATION, QUERY_SCRATCHPAD, SCRATCHPAD, Third,
};
use super::{Library, OneDnnError, check};

/// Memory in a matrix's order.
pub(super) enum Descriptor {
    Plain(Box<[u64; DESCRIPTOR]>),
    Object(Handle, &'static Third),
}

impl Descriptor {
    pub(super) fn pointer(&self) -> *const c_void {
        match self {
            Self::Plain(plain) => plain.as_ptr().cast(),
            Self::Object(handle, _) => *handle,
        }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if let Self::Object(handle, own) = self {
            // SAFETY: it was made and is nobody else's.
            unsafe { (own.memory_desc_destroy)(*handle) };
        }
    }
}

/// A kernel that is ready to run, on several threads at once if they bring memory of their own.
pub(super) struct Plan {
    pub(super) library: &'static Library,
    pub(super) description: Handle,
    pub(super) primitive: Handle,
}

// SAFETY: it is not changed after it was made, and has no scratchpad of its own.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl Plan {
    /// # Safety
    /// The description must be there.
    pub(super) unsafe fn make(&mut self) -> Result<(), OneDnnError> {
        // SAFETY: the caller's.
        let status = unsafe { (self.library.functions.primitive_create)(&raw mut self.primitive, self.description) };
        check("dnnl_primitive_create", status)
    }

    /// How it describes one of its matrices; lives as long as the plan.
    pub(super) fn description_of(&self, which: c_int) -> *const c_void {
        // SAFETY: the description is there.
        unsafe { (self.library.functions.primitive_desc_query_md)(self.description, which, 0) }
    }

    /// Bytes of the matrix.
    pub(super) fn bytes_of(&self, which: c_int) -> usize {
        // SAFETY: the plan's own description.
        unsafe { (self.library.functions.memory_desc_get_size)(self.description_of(which)) }
    }

    /// Bytes of scratch that it needs.
    pub(super) fn scratchpad(&self) -> usize {
        self.bytes_of(QUERY_SCRATCHPAD)
    }

    /// What the library calls its kernel.
    pub(super) fn implementation(&self) -> String {
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: the query writes a pointer to a string of the plan's.
        unsafe {
            let query = self.library.functions.primitive_desc_query;
            let status = query(self.description, QUERY_IMPLEMENTATION, 0, (&raw mut name).cast());
            if status != 0 || name.is_null() {
                return String::new();
            }
            CStr::from_ptr(name).to_string_lossy().into_owned()
        }
    }

    /// Runs on this thread.
    ///
    /// # Safety
    /// The memory must be as described, what is written nobody else's, and the scratchpad large enough.
    pub(super) unsafe fn run(
        &self,
        memory: &[(c_int, *const c_void, *mut c_void)],
        scratchpad: &mut Aligned,
    ) -> Result<(), OneDnnError> {
        self.library.alone();
        let Library { functions, engine, .. } = self.library;
        let scratchpad = (SCRATCHPAD, self.description_of(QUERY_SCRATCHPAD), scratchpad.pointer());
        let mut run = Run { functions, stream: null_mut(), arguments: Vec::with_capacity(memory.len() + 1) };
        // SAFETY: the caller's; what is made here is dropped with `run`.
        unsafe {
            check("dnnl_stream_create", (functions.stream_create)(&raw mut run.stream, *engine, IN_ORDER))?;
            for (which, description, place) in memory.iter().copied().chain([scratchpad]) {
                let mut handle = null_mut();
                check("dnnl_memory_create", (functions.memory_create)(&raw mut handle, description, *engine, place))?;
                run.arguments.push(Argument(which, handle));
            }
            let (count, arguments) = (run.arguments.len() as c_int, run.arguments.as_ptr());
            check("dnnl_primitive_execute", (functions.primitive_execute)(self.primitive, run.stream, count, arguments))
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: they are nobody else's; null is nothing to destroy.
        unsafe {
            if !self.primitive.is_null() {
                (self.library.functions.primitive_destroy)(self.primitive);
            }
            if !self.description.is_null() {
                (self.library.functions.primitive_desc_destroy)(self.description);
            }
        }
    }
}

/// What one run of a plan takes.
pub(super) struct Run<'a> {
    functions: &'a Functions,
    stream: Handle,
    arguments: Vec<Argument>,
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        // SAFETY: they were made for this run.
        unsafe {
            for Argument(_, memory) in &self.arguments {
                (self.functions.memory_destroy)(*memory);
            }
            if !self.stream.is_null() {
                (self.functions.stream_destroy)(self.stream);
            }
        }
    }
}

/// Bytes that begin at a cache line.
#[derive(Default)]
pub(super) struct Aligned(pub(super) Vec<Line>);

#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line(#[expect(dead_code, reason = "room")] [u8; 64]);

impl Aligned {
    pub(super) fn new(bytes: usize) -> Self {
        Self(vec![Line([0; 64]); bytes.div_ceil(64)])
    }

    /// Has room for so many bytes.
    pub(super) fn at_least(&mut self, bytes: usize) {
        if self.0.len() * 64 < bytes {
            *self = Self::new(bytes);
        }
    }

    pub(super) fn pointer(&mut self) -> *mut c_void {
        self.0.as_mut_ptr().cast()
    }
}
