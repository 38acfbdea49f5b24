//! The demo model and its images, compiled in, so that `blipstream demo` needs nothing but the program.

use std::borrow::Cow;
use std::collections::BTreeMap;

use include_dir::{Dir, include_dir};

use crate::caption::ModelSource;
use crate::caption::config::Architecture;

/// Name of the demo model wherever a model is named.
pub const DEMO_MODEL: &str = "demo";

static IMAGES: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/models/demo/images");

/// The weights of the demo filter: its image encoder is the captioner's, and only the rest has a file of its own.
const FILTER_INDEX: &str =
    r#"{"weight_map": {"vision_model": "captioner.safetensors", "text_encoder": "reader.safetensors"}}"#;

macro_rules! file {
    ($name:literal) => {
        Cow::Borrowed(&include_bytes!(concat!("../../models/demo/", $name))[..])
    };
}

static WEIGHTS: &[u8] = include_bytes!("../../models/demo/model.safetensors");

/// The demo model: its captioner, or its filter. It answers no questions, which the loading of an answerer says.
pub fn model(architecture: Architecture) -> ModelSource {
    let (id, more) = match architecture {
        Architecture::Captioner | Architecture::Answerer => {
            let files = [("config.json", file!("config.json")), ("model.safetensors", Cow::Borrowed(WEIGHTS))];
            ("blipstream-demo", files.to_vec())
        }
        Architecture::Matcher => {
            let files = [
                ("config.json", file!("filter/config.json")),
                ("model.safetensors.index.json", Cow::Borrowed(FILTER_INDEX.as_bytes())),
                ("captioner.safetensors", Cow::Borrowed(WEIGHTS)),
                ("reader.safetensors", file!("filter/reader.safetensors")),
            ];
            ("blipstream-demo-filter", files.to_vec())
        }
    };
    let common =
        [("preprocessor_config.json", file!("preprocessor_config.json")), ("tokenizer.json", file!("tokenizer.json"))];
    let files = common.into_iter().chain(more).map(|(name, bytes)| (name.to_owned(), bytes));
    ModelSource::Memory { id: id.into(), files: files.collect::<BTreeMap<_, _>>() }
}

/// What pages might say beside the demo images, by the images' names: some of it is true.
pub fn alt_texts() -> BTreeMap<String, String> {
    let file = IMAGES.get_file("alt-texts.json").map_or(&b"{}"[..], include_dir::File::contents);
    serde_json::from_slice(file).expect("the texts are compiled in, and a test reads them")
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
