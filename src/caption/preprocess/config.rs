//! `preprocessor_config.json`: how the model wants its images.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{DecodeError, Picture, Resizer};
use crate::caption::Pixels;

/// How 8-bit channels become the model's input: `(value * scale - mean) / std`, for R, G and B.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalize {
    /// Subtracted, after scaling.
    pub mean: [f32; 3],
    /// Divided by, after the mean is subtracted.
    pub std: [f32; 3],
    /// Multiplied with first.
    pub scale: f32,
}

impl Default for Normalize {
    /// BLIP's, which are CLIP's (`OPENAI_CLIP_MEAN` and `OPENAI_CLIP_STD` in transformers, to the precision of f32),
    /// after a scale of 1/255.
    fn default() -> Self {
        Self {
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
            scale: 1.0 / 255.0,
        }
    }
}

/// Filter of the resize. Pillow's numbers of the same filters are what the file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Triangle, Pillow's 2.
    Bilinear,
    /// Cubic with a = −0.5, Pillow's 3.
    Bicubic,
}

/// What is done to an image before the model sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Preprocessor {
    size: usize,
    filter: Filter,
    normalize: Normalize,
}

/// Why a `preprocessor_config.json` can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The text is not JSON, or a value has the wrong type.
    #[error("preprocessor_config.json is not readable: {0}")]
    Json(#[from] serde_json::Error),
    /// A value asks for something that is not done here.
    #[error("`{key}` in preprocessor_config.json {problem}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong with its value, and what would be right.
        problem: String,
    },
}

/// The file, as far as it matters; unknown keys say nothing about the pixels, or only name the processor.
#[derive(Deserialize)]
struct Raw {
    size: Option<Size>,
    do_resize: Option<bool>,
    resample: Option<i64>,
    do_center_crop: Option<bool>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f32>,
    do_normalize: Option<bool>,
    image_mean: Option<Channels>,
    image_std: Option<Channels>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Size {
    Side(usize),
    Named { height: Option<usize>, width: Option<usize>, shortest_edge: Option<usize> },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Channels {
    Each([f32; 3]),
    All(f32),
}

impl Channels {
    fn each(self) -> [f32; 3] {
        match self {
            Self::Each(values) => values,
            Self::All(value) => [value; 3],
        }
    }
}

/// Side of BLIP's images when nothing is said; that of all published captioning models.
const DEFAULT_SIZE: usize = 384;

/// Larger squares than any vision transformer takes; a bound, so that a broken file can't ask for terabytes.
const MAX_SIZE: usize = 4096;

fn refused<T>(key: &'static str, problem: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Value { key, problem: problem.into() })
}

impl Preprocessor {
    /// BLIP's preprocessing to squares of `size` pixels: for models that come without a file.
    pub fn blip(size: usize) -> Self {
        Self { size, filter: Filter::Bicubic, normalize: Normalize::default() }
    }

    /// Reads a `preprocessor_config.json`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::from_json(&text)
    }

    /// Reads the text of a `preprocessor_config.json`. What it does not say is as in BLIP; images are converted to
    /// RGB whether or not `do_convert_rgb` says so, since the model takes nothing else.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let raw: Raw = serde_json::from_str(text)?;
        if raw.do_resize == Some(false) {
            return refused("do_resize", "is false, but the model takes images of one size only; set it to true");
        }
        if raw.do_center_crop == Some(true) {
            return refused("do_center_crop", "is true, which is not supported: BLIP stretches images to a square");
        }
        let filter = match raw.resample {
            None | Some(3) => Filter::Bicubic,
            Some(2) => Filter::Bilinear,
            Some(other) => {
                return refused("resample", format!("is {other}; supported are 2 (bilinear) and 3 (bicubic)"));
            }
        };
        let size = raw.size.map_or(Ok(DEFAULT_SIZE), side)?;
        let blip = Normalize::default();
        let scale = if raw.do_rescale == Some(false) { 1.0 } else { raw.rescale_factor.unwrap_or(blip.scale) };
        let (mean, std) = match raw.do_normalize {
            Some(false) => ([0.0; 3], [1.0; 3]),
            _ => (raw.image_mean.map_or(blip.mean, Channels::each), raw.image_std.map_or(blip.std, Channels::each)),
        };
        if std.contains(&0.0) {
            return refused("image_std", "contains 0, and the pixels are divided by it");
        }
        Ok(Self { size, filter, normalize: Normalize { mean, std, scale } })
    }

    /// Side of the square that images become, in pixels.
    pub fn size(&self) -> usize {
        self.size
    }

    /// What the engine does to the pixels first.
    pub fn normalize(&self) -> Normalize {
        self.normalize
    }

    /// Stretches a picture to the model's square. `resizer` is scratch memory, worth keeping from image to image.
    pub fn resize(&self, picture: &Picture, resizer: &mut Resizer) -> Result<Pixels, DecodeError> {
        resizer.stretch(picture, self.size, self.filter)
    }
}

fn side(size: Size) -> Result<usize, ConfigError> {
    let side = match size {
        Size::Side(side) => side,
        Size::Named { height: Some(height), width: Some(width), .. } if height == width => height,
        Size::Named { height: Some(height), width: Some(width), .. } => {
            return refused("size", format!("is {height}x{width}, but the model takes squares"));
        }
        Size::Named { shortest_edge: Some(_), .. } => {
            return refused("size", "has a `shortest_edge`, which keeps the shape; give `height` and `width`");
        }
        Size::Named { .. } => return refused("size", "needs `height` and `width`"),
    };
    if side == 0 || side > MAX_SIZE {
        return refused("size", format!("is {side} pixels; it must lie between 1 and {MAX_SIZE}"));
    }
    Ok(side)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> String {
        Preprocessor::from_json(text).unwrap_err().to_string()
    }

    #[test]
    fn reads_the_published_file() {
        let text = r#"{"do_normalize": true, "do_pad": true, "do_rescale": true, "do_resize": true,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_processor_type": "BlipImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711], "processor_class": "BlipProcessor", "resample": 3,
            "rescale_factor": 0.00392156862745098, "size": {"height": 384, "width": 384}, "size_divisor": 32}"#;
        assert_eq!(Preprocessor::from_json(text).unwrap(), Preprocessor::blip(384));
        assert_eq!(Preprocessor::from_json("{}").unwrap(), Preprocessor::blip(384));
    }

    #[test]
    fn size_may_be_one_number() {
        assert_eq!(Preprocessor::from_json(r#"{"size": 96}"#).unwrap().size(), 96);
    }

    #[test]
    fn steps_that_are_switched_off_change_nothing() {
        let read = Preprocessor::from_json(r#"{"do_rescale": false, "do_normalize": false, "resample": 2}"#).unwrap();
        assert_eq!(read.normalize(), Normalize { mean: [0.0; 3], std: [1.0; 3], scale: 1.0 });
        assert_eq!(read.filter, Filter::Bilinear);
        let read = Preprocessor::from_json(r#"{"image_mean": 0.5, "image_std": 0.25}"#).unwrap();
        assert_eq!((read.normalize().mean, read.normalize().std), ([0.5; 3], [0.25; 3]));
    }

    #[test]
    fn what_is_not_done_here_is_refused_by_name() {
        assert!(problem(r#"{"resample": 1}"#).contains("`resample` in preprocessor_config.json is 1"));
        assert!(problem(r#"{"do_resize": false}"#).contains("do_resize"));
        assert!(problem(r#"{"do_center_crop": true}"#).contains("do_center_crop"));
        assert!(problem(r#"{"size": {"height": 384, "width": 224}}"#).contains("384x224"));
        assert!(problem(r#"{"size": {"shortest_edge": 384}}"#).contains("shortest_edge"));
        assert!(problem(r#"{"size": {}}"#).contains("`height` and `width`"));
        assert!(problem(r#"{"size": 0}"#).contains("between 1 and"));
        assert!(problem(r#"{"image_std": [1, 0, 1]}"#).contains("image_std"));
        assert!(problem("<html>").contains("not readable"));
    }
}
