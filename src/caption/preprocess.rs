//! Images of any size and kind to pixels at the model's size, as the reference's image processor does it.
//!
//! The reference is `BlipImageProcessorPil` of HF transformers: Pillow opens the file, converts it to RGB and
//! stretches it to a square with its bicubic filter. Pixels of lossless images equal Pillow's bit for bit; those of
//! JPEGs differ by the rounding of the decoders. Rescaling and normalisation follow in the engine, from the 8-bit
//! pixels and the values of [`Normalize`].
//!
//! ```text
//!  encoded bytes ──decode(Limits)──► Picture ──Preprocessor::resize──► Pixels
//! ```
//!
//! [`decode_at_least`] takes less time and memory for large JPEGs, at some cost of that likeness.

mod bmp;
mod config;
mod decode;
mod gif;
mod jpeg;
mod orientation;
mod png;
mod resize;
mod tiff;
mod turbojpeg;
mod webp;

pub use config::{ConfigError, Filter, Normalize, Preprocessor};
pub use decode::{DecodeError, Format, Limits, Picture, decode, decode_at_least};
pub use orientation::Turn;
pub use resize::Resizer;
pub use turbojpeg::{TurboJpeg, TurboJpegError};
