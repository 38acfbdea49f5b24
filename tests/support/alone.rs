//! What tests of commands that need no Kafka have in common.

use std::process::Command;

use blipstream::caption::Pixels;
use blipstream::caption::preprocess::{Limits, Preprocessor, Resizer, decode};

use super::ran::Ran;

/// Runs the program in the folder of its sources: its exit code, its output, and what it said beside.
pub fn blipstream(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blipstream"));
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments).output().unwrap();
    let Ran { code, out, err } = Ran::of(output);
    (code, out, err)
}

/// What a model sees of an encoded picture.
pub fn pixels(preprocessor: &Preprocessor, bytes: &[u8]) -> Pixels {
    let limits = Limits { max_pixels: 1 << 24, max_side: 1 << 14, max_memory: 1 << 28 };
    preprocessor.resize(&decode(bytes, &limits).unwrap(), &mut Resizer::new()).unwrap()
}
