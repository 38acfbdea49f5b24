//! The filter of CapFilt.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which model judges captions and texts that were found with images, and embeds both, and what is kept. It runs on the devices, in the
/// precision and on the kernels of the captioner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    /// A local folder in the published layout of `BlipForImageTextRetrieval`, or a hub id; without one, requests that ask for
    /// the filter or for embeddings end as dead letters.
    pub source: Option<String>,
    /// A text is kept if the filter gives at least this probability to its matching the image, 0 to 1.
    pub threshold: f64,
    /// The most texts that a request may have judged beside its captions, or embedded.
    pub texts_limit: usize,
}

impl Default for Filter {
    fn default() -> Self {
        Self { source: None, threshold: 0.5, texts_limit: 16 }
    }
}
