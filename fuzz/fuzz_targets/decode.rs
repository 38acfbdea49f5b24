//! An image of any format: no file makes a decoder panic or take more than its limits allow.

#![no_main]

use std::alloc::System;
use std::panic;
use std::sync::LazyLock;

use blipstream::caption::preprocess::{DecodeError, Limits, Picture, TurboJpeg, decode, decode_at_least};
use cap::Cap;
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits { max_pixels: 128 * 128, max_side: 512, max_memory: 1 << 20 };
/// Small enough for tiny pictures to be decoded at an eighth of their size.
const LEAST: u32 = 8;

/// What a decoder may hold in truth: what the limits allow, tables, metadata, and the 16 MB that a WebP may announce for
/// each part of a frame.
const ROOM: usize = 32 << 20;

/// An allocation beyond its limit fails, which ends the process.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, ROOM);

static TURBO: LazyLock<Option<TurboJpeg>> = LazyLock::new(|| TurboJpeg::open().ok());

fuzz_target!(init: unlimited_panics(), |bytes: &[u8]| {
    MEMORY.set_limit(ROOM).expect("nothing is left of the last image");
    check(decode(bytes, &LIMITS));
    if bytes.starts_with(&[0xFF, 0xD8])
        && let Some(turbo) = &*TURBO
    {
        check(decode_at_least(bytes, &LIMITS, LEAST, turbo));
    }
});

/// The trace of a panic takes more memory than a picture.
fn unlimited_panics() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        let _ = MEMORY.set_limit(usize::MAX);
        report(panic);
    }));
}

fn check(decoded: Result<Picture, DecodeError>) {
    let Ok(picture) = decoded else { return };
    let (width, height) = picture.full_size;
    assert!(width.max(height) <= LIMITS.max_side, "{picture:?}");
    assert!(u64::from(width) * u64::from(height) <= LIMITS.max_pixels, "{picture:?}");
    assert!((1..=width).contains(&picture.width) && (1..=height).contains(&picture.height), "{picture:?}");
    assert_eq!(picture.rgb.len(), picture.width as usize * picture.height as usize * 3, "{picture:?}");
}
