//! What librdkafka gives out and wants back, for the calls that rdkafka does not have.

/// Something of librdkafka's, and how it is freed.
pub(super) struct Owned<T>(pub(super) *mut T, pub(super) unsafe extern "C" fn(*mut T));

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: it came from librdkafka, is freed by its own function, and nothing refers to it any more.
            unsafe { (self.1)(self.0) }
        }
    }
}

/// # Safety
/// `start` is null, or points at `length` values that live as long as what is returned.
pub(super) unsafe fn slice<'a, T>(start: *const T, length: usize) -> &'a [T] {
    if start.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(start, length) }
}
