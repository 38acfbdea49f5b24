//! The canary.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which model captions a share of the stream's images once more, so that its captions can be compared before it takes the
/// captioner's place. It runs on the devices, in the precision and on the kernels of the captioner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Canary {
    /// A local folder or a hub id, as for `model.source`, of a captioner that takes the same pixels; what it writes goes to
    /// `kafka.canary_topic`. Without one no image is captioned twice.
    pub source: Option<String>,
    /// The share of the images that are captioned twice, more than 0 and at most 1. Each worker chooses the same, by the
    /// SHA-256 of the image.
    pub share: f64,
}

impl Default for Canary {
    fn default() -> Self {
        Self { source: None, share: 0.05 }
    }
}
