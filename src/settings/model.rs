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
