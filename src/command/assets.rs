//! The demo model and its images, compiled in, so that `blipstream demo` needs nothing but the program.

use std::borrow::Cow;
use std::collections::BTreeMap;

use include_dir::{Dir, include_dir};

use crate::caption::ModelSource;

/// Name of the demo model wherever a model is named.
pub const DEMO_MODEL: &str = "demo";

static IMAGES: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/models/demo/images");

/// The demo model.
pub fn model() -> ModelSource {
    macro_rules! file {
        ($name:literal) => {
            ($name.to_owned(), Cow::Borrowed(&include_bytes!(concat!("../../models/demo/", $name))[..]))
        };
    }
    let files =
        [file!("config.json"), file!("preprocessor_config.json"), file!("tokenizer.json"), file!("model.safetensors")];
    ModelSource::Memory { id: "blipstream-demo".into(), files: BTreeMap::from(files) }
}

/// The demo images by name, sorted.
pub fn images() -> Vec<(&'static str, &'static [u8])> {
    let mut images: Vec<_> = IMAGES
        .files()
        .filter(|file| file.path().extension().is_some_and(|extension| extension != "json"))
        .filter_map(|file| Some((file.path().to_str()?, file.contents())))
        .collect();
    images.sort_unstable();
    images
}
