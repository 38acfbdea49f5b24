//! From encoded bytes to pixels at the model's size, on threads of its own.
//!
//! Decoding is the only code that meets a stranger's bytes at length, so it alone runs under `catch_unwind`: a panic
//! of a decoder is a dead letter of its image.

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use async_channel::{Receiver, Sender};
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use url::Url;

use super::{Answers, Fetched, Finished, Ready, Recalled, failed, panic_text, send_blocking};
use crate::caption::Pixels;
use crate::caption::preprocess::{self, Limits, Preprocessor, Resizer, TurboJpeg, Turn};
use crate::disposition::{Code, Disposed, Disposition, Failure, Stage};
use crate::message::{ImageInfo, ImageRef, Request, Timing, redact_url};
use crate::metrics::Metrics;
use crate::settings;
use crate::tracked::Tracked;

/// Why a row does not become pixels. All of it fails again with the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The image can't be used.
    #[error(transparent)]
    Image(#[from] preprocess::DecodeError),
    /// The decoder panicked.
    #[error("the decoder failed on this image: {0}")]
    Panic(String),
    /// The request's deadline passed before its image was decoded.
    #[error("the deadline {0} passed before the image was decoded")]
    Deadline(Timestamp),
}

impl Disposed for DecodeError {
    fn disposition(&self) -> Disposition {
        Disposition::Permanent
    }

    fn code(&self) -> Code {
        use preprocess::DecodeError as Image;
        match self {
            Self::Image(Image::UnsupportedMedia(_)) => Code::UnsupportedMedia,
            Self::Image(
                Image::TooManyPixels { .. }
                | Image::TooManyScans { .. }
                | Image::TooLongSide { .. }
                | Image::TooMuchMemory { .. },
            ) => Code::TooManyPixels,
            Self::Image(Image::Broken(_)) | Self::Panic(_) => Code::Decode,
            Self::Deadline(_) => Code::Deadline,
        }
    }
}

/// How images are decoded.
#[derive(Debug, Clone)]
pub struct Config {
    /// What the model wants.
    pub preprocessor: Preprocessor,
    /// What an image may cost.
    pub limits: Limits,
    /// The fewest pixels on a side that a large JPEG may be decoded at; none decodes it whole.
    pub jpeg_least: Option<u32>,
    /// Whether pictures are turned as their EXIF says.
    pub exif_orientation: bool,
    /// Threads; at least one.
    pub threads: usize,
    /// Whether records keep user-info and query of an image's address.
    pub full_url: bool,
}

impl Config {
    /// From the settings; no number of threads means one for each core. Where JPEGs cannot be decoded at a part of their
    /// size, that is logged, and they are decoded whole.
    pub fn new(preprocessor: Preprocessor, decode: &settings::Decode, output: &settings::Output) -> Self {
        let cores = || thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            jpeg_least: jpeg_least(decode.jpeg_reducing_gap, preprocessor.size()),
            preprocessor,
            limits: Limits {
                max_pixels: decode.max_pixels,
                max_side: decode.max_side,
                max_memory: decode.max_memory.as_u64(),
            },
            exif_orientation: decode.exif_orientation,
            threads: if decode.threads == 0 { cores() } else { decode.threads },
            full_url: output.full_url,
        }
    }

    /// From bodies to the model's pixels; each thread has one of its own.
    pub fn decoder(&self) -> impl FnMut(&[u8]) -> Result<Decoded, preprocess::DecodeError> + use<> {
        let (preprocessor, limits, exif_orientation) = (self.preprocessor.clone(), self.limits, self.exif_orientation);
        let scaling = self.jpeg_least.and_then(|least| Some((least, TurboJpeg::open().ok()?)));
        let mut resizer = Resizer::new();
        move |body| {
            let picture = match &scaling {
                Some((least, turbo)) => preprocess::decode_at_least(body, &limits, *least, turbo)?,
                None => preprocess::decode(body, &limits)?,
            };
            let mut pixels = preprocessor.resize(&picture, &mut resizer)?;
            let (mut width, mut height) = picture.full_size;
            if exif_orientation {
                let turn = Turn::of(body);
                pixels = turn.apply(pixels);
                (width, height) = turn.size((width, height));
            }
            Ok(Decoded { pixels, width, height, format: picture.format.as_str() })
        }
    }
}

fn jpeg_least(gap: f64, size: usize) -> Option<u32> {
    if gap <= 0.0 {
        return None;
    }
    match TurboJpeg::open() {
        Ok(_) => Some((size as f64 * gap).ceil() as u32),
        Err(error) => {
            tracing::warn!("decode.jpeg_reducing_gap has no effect, JPEGs are decoded whole: {error}");
            None
        }
    }
}

/// Takes a decoded row: waits while the queue for devices is full, gives the row back when it is closed.
pub type PushReady = dyn Fn(Tracked<Ready>) -> Result<(), Tracked<Ready>> + Send + Sync;

/// Where rows go.
#[derive(Clone)]
pub struct Outputs {
    /// Decoded rows.
    pub ready: Arc<PushReady>,
    /// Rows that failed, or whose caption is known.
    pub finished: Sender<Finished>,
    /// Captions of pictures that were captioned before; `None` where nobody remembers any.
    pub answers: Option<Arc<Answers>>,
    /// Counts how long each image took, good or bad, and how long the next stages were waited for.
    pub metrics: Arc<Metrics>,
}

/// Starts the threads. Each ends when the input is closed and empty, or when an output is closed, and drops its ends
/// of the channels then.
///
/// # Errors
/// The system has no thread to give.
pub fn spawn(
    config: &Config,
    input: &Receiver<Tracked<Fetched>>,
    outputs: &Outputs,
) -> std::io::Result<Vec<JoinHandle<()>>> {
    spawn_with(config, input, outputs, Config::decoder)
}

/// What a decoder makes of a body.
pub struct Decoded {
    /// The picture at the model's size.
    pub pixels: Pixels,
    /// Width in pixels, as encoded.
    pub width: u32,
    /// Height in pixels, as encoded.
    pub height: u32,
    /// How it was encoded.
    pub format: &'static str,
}

/// The threads, with a decoder of their own for each: the tests bring worse ones.
fn spawn_with<D>(
    config: &Config,
    input: &Receiver<Tracked<Fetched>>,
    outputs: &Outputs,
    decoder: impl Fn(&Config) -> D + Clone + Send + 'static,
) -> std::io::Result<Vec<JoinHandle<()>>>
where
    D: FnMut(&[u8]) -> Result<Decoded, preprocess::DecodeError>,
{
    let start = |index| {
        let (config, input, outputs, decoder) = (config.clone(), input.clone(), outputs.clone(), decoder.clone());
        thread::Builder::new().name(format!("decode-{index}")).spawn(move || run(&config, &input, &outputs, decoder))
    };
    (0..config.threads.max(1)).map(start).collect()
}

fn run<D>(config: &Config, input: &Receiver<Tracked<Fetched>>, outputs: &Outputs, new_decoder: impl Fn(&Config) -> D)
where
    D: FnMut(&[u8]) -> Result<Decoded, preprocess::DecodeError>,
{
    let mut decoder = new_decoder(config);
    while let Ok(fetched) = input.recv_blocking() {
        outputs.metrics.bytes_taken(Stage::Decode, fetched.value.body.len());
        let started = Instant::now();
        let sent = if let Err(error) = check_deadline(&fetched.value.row.request, Timestamp::now()) {
            reject(fetched, &error, started, outputs)
        } else {
            let image = about(&fetched.value, config.full_url);
            if let Some(recalled) = recall(&fetched.value, &image, outputs) {
                answer(fetched, image, recalled, started, outputs)
            } else {
                let result = guarded(|| decoder(&fetched.value.body));
                if matches!(result, Err(DecodeError::Panic(_))) {
                    // Its scratch memory may be half-written.
                    decoder = new_decoder(config);
                }
                match result {
                    Ok(decoded) => pass_on(fetched, decoded, image, started, outputs),
                    Err(error) => reject(fetched, &error, started, outputs),
                }
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

/// An output is closed: the worker is going down, and what is left is read again by the next one.
struct Closed;

fn pass_on(
    fetched: Tracked<Fetched>,
    decoded: Decoded,
    mut image: ImageInfo,
    started: Instant,
    outputs: &Outputs,
) -> Result<(), Closed> {
    let Decoded { pixels, width, height, format } = decoded;
    let bytes = pixels.data().len();
    (image.width, image.height, image.format) = (width, height, format.to_owned());
    let mut ready = fetched.map(|Fetched { mut row, .. }| {
        row.timing.decode = Timing::ms(started.elapsed());
        Ready { row, pixels, image }
    });
    ready.shrink_image(bytes);
    outputs.metrics.stage(Stage::Decode, started.elapsed());
    let _blocked = outputs.metrics.blocked(Stage::Decode);
    (outputs.ready)(ready).map_err(|row| {
        let origin = &row.value.row.origin;
        tracing::error!(%origin, "the queue for devices is closed; this image is left for the next worker");
        Closed
    })
}

fn reject(fetched: Tracked<Fetched>, error: &DecodeError, started: Instant, outputs: &Outputs) -> Result<(), Closed> {
    let origin = fetched.value.row.origin.clone();
    if matches!(error, DecodeError::Panic(_)) {
        tracing::error!(%origin, "{error}; please report it as a bug, with the image if it is public");
    }
    let mut row = fetched.map(|fetched| fetched.row);
    row.value.timing.decode = Timing::ms(started.elapsed());
    finish(failed(row, Failure::new(Stage::Decode, error)), started, outputs)
}

fn recall(fetched: &Fetched, image: &ImageInfo, outputs: &Outputs) -> Option<Recalled> {
    outputs.answers.as_ref()?.known(&fetched.row.request, &image.sha256)
}

fn answer(
    fetched: Tracked<Fetched>,
    image: ImageInfo,
    recalled: Recalled,
    started: Instant,
    outputs: &Outputs,
) -> Result<(), Closed> {
    let finished = fetched.map(|Fetched { mut row, .. }| {
        row.timing.decode = Timing::ms(started.elapsed());
        recalled.answer(row, image)
    });
    finish(finished, started, outputs)
}

/// Sends on a row that needs no device. Its image is not needed any more.
fn finish(mut finished: Finished, started: Instant, outputs: &Outputs) -> Result<(), Closed> {
    finished.release_image();
    outputs.metrics.stage(Stage::Decode, started.elapsed());
    send_blocking(&outputs.finished, finished, Stage::Decode, &outputs.metrics).map_err(|closed| {
        let row = closed.into_inner();
        let (partition, offset) = (row.partition(), row.offset());
        tracing::error!(?partition, offset, "the publisher is gone; this image is left for the next worker");
        Closed
    })
}

/// What is known of an image before it is decoded.
fn about(fetched: &Fetched, full_url: bool) -> ImageInfo {
    let Fetched { row, body } = fetched;
    let url = address(&row.request.image, full_url);
    ImageInfo { url, sha256: sha256(body), bytes: body.len(), ..ImageInfo::default() }
}

fn check_deadline(request: &Request, now: Timestamp) -> Result<(), DecodeError> {
    match request.deadline {
        Some(deadline) if deadline <= now => Err(DecodeError::Deadline(deadline)),
        _ => Ok(()),
    }
}

fn guarded<T>(work: impl FnOnce() -> Result<T, preprocess::DecodeError>) -> Result<T, DecodeError> {
    // After a panic the decoder is thrown away, so that nobody sees it half-changed.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(DecodeError::Image),
        Err(panic) => Err(DecodeError::Panic(panic_text(panic.as_ref()))),
    }
}

/// The address of an image as records show it; inline data has none.
fn address(image: &ImageRef, full_url: bool) -> Option<String> {
    match image {
        ImageRef::Http(url) if full_url => Some(url.to_string()),
        ImageRef::Http(url) => Some(redact_url(url)),
        ImageRef::File(path) => Url::from_file_path(path).ok().map(String::from),
        ImageRef::Object(object) => Some(object.to_string()),
        ImageRef::Base64(_) | ImageRef::Percent(_) => None,
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests;
