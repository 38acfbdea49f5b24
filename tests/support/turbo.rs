//! libjpeg-turbo for tests, which are left out where it is not installed.

use blipstream::caption::preprocess::TurboJpeg;

/// The library; `None`, with a word on standard error, where it is missing, which CI does not take.
#[allow(clippy::print_stderr)] // for whoever runs the tests
pub fn turbo() -> Option<TurboJpeg> {
    match TurboJpeg::open() {
        Ok(turbo) => Some(turbo),
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "{error}");
            eprintln!("left out: {error}");
            None
        }
    }
}
