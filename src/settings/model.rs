//! The captioner.

use std::path::PathBuf;

use bytesize::ByteSize;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which model captions them, and on what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// A local folder in the published layout, a hub id (`org/name` or `org/name@revision`), or `demo`.
    pub source: String,
    /// `auto`, `all`, or a list like `["cpu"]`, `["cuda:0", "cuda:1"]`; `auto` takes every GPU, or the CPU where there is
    /// none, and `all` every GPU.
    pub devices: Vec<String>,
    /// Copies of the model on each device; more than one is of use on a CPU only in tests.
    pub replicas: usize,
    /// `auto`, `f32`, `bf16`, `f16` or `int8`.
    pub dtype: String,
    /// `auto`, `native` (or `native:avx512`, `native:avx2`, `native:plain`), `onednn`, `fused` or `candle`.
    pub backend: String,
    /// oneDNN's file, where it is not the system's `libdnnl.so.3` or `libdnnl.so.2`.
    pub onednn_library: Option<PathBuf>,
    /// Address of the hub, when it is not the public one.
    pub hub_endpoint: Option<String>,
    /// File that holds the hub's token.
    pub hub_token_file: Option<PathBuf>,
    /// Text that captions begin with, unless a request has its own `prompt`.
    pub prompt: Option<String>,
    /// Most tokens generated, unless a request says otherwise.
    pub max_new_tokens: usize,
    /// Least tokens generated, unless a request says otherwise.
    pub min_new_tokens: usize,
    /// The most that a request may ask for.
    pub max_new_tokens_limit: usize,
    /// Above 1, tokens that are there already become less likely, those of the prompt among them; below 1 likelier.
    pub repetition_penalty: f64,
    /// How many captions are searched at a time for the likeliest one; 1 takes the likeliest token each time.
    pub num_beams: usize,
    /// With beams: a caption's score is divided by its length to this power, so that above 0 longer ones win more often.
    pub length_penalty: f64,
    /// Whether tokens are drawn by their probabilities instead. A request's `seed`, or else its picture, says what is drawn.
    pub do_sample: bool,
    /// Of drawn tokens: below 1 the likely ones become likelier, above 1 the others.
    pub temperature: f64,
    /// Of how many of the likeliest tokens is drawn; 0 is no bound.
    pub top_k: usize,
    /// How probable the tokens that are drawn from are together; 1 is no bound.
    pub top_p: f64,
    /// How many captions are made of an image: drawn ones, or the best that the beams find.
    pub num_return_sequences: usize,
    /// The most beams, and the most captions of an image, that a request may ask for.
    pub sequences_limit: usize,
    /// Memory for captions of pictures that were captioned before: an equal picture, asked for in the same way, gets its
    /// caption from there. 0 captions every one anew.
    #[schemars(with = "String")]
    pub caption_cache: ByteSize,
    /// Memory for what the decoder remembers of the rows that a device is at work on; its batches are cut to what fits,
    /// one row at least. By default 1 GiB for the CPU and 16 GiB for a GPU.
    #[schemars(with = "Option<String>")]
    pub max_state: Option<ByteSize>,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            source: "Salesforce/blip-image-captioning-base".into(),
            devices: vec!["auto".into()],
            replicas: 1,
            dtype: "auto".into(),
            backend: "auto".into(),
            onednn_library: None,
            hub_endpoint: None,
            hub_token_file: None,
            prompt: None,
            max_new_tokens: 20,
            min_new_tokens: 0,
            max_new_tokens_limit: 200,
            repetition_penalty: 1.0,
            num_beams: 1,
            length_penalty: 1.0,
            do_sample: false,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            num_return_sequences: 1,
            sequences_limit: 8,
            caption_cache: ByteSize::mib(32),
            max_state: None,
        }
    }
}

impl Model {
    /// `max_state`, or its default for the kind of device.
    pub fn state_limit(&self, gpu: bool) -> ByteSize {
        self.max_state.unwrap_or(if gpu { ByteSize::gib(16) } else { ByteSize::gib(1) })
    }
}
