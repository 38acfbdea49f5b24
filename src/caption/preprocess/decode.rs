//! Encoded bytes to RGB, as `Image.open(f).convert("RGB")` of Pillow, under limits.

use std::fmt;
use std::io::Cursor;

use image::{ColorType, DynamicImage, ExtendedColorType, ImageDecoder, ImageError, ImageFormat, ImageReader};

use super::{TurboJpeg, bmp, gif, jpeg, png, tiff, webp};

/// Scans of a JPEG with as many pixels as are allowed: usual progressive ones have ten. Smaller pictures may have more.
const SCANS: u32 = 16;

/// What a stranger's image may cost. All are checked from the header, before any pixel is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most pixels, width times height.
    pub max_pixels: u64,
    /// Largest width or height, in pixels.
    pub max_side: u32,
    /// Most memory that decoding may take, in bytes: the decoder's own, and the pixels before and after conversion.
    pub max_memory: u64,
}

impl Limits {
    /// Checks the size of a picture that takes `pixel_bytes` bytes of memory a pixel while it is decoded.
    pub(super) fn check(&self, width: u32, height: u32, pixel_bytes: u64) -> Result<(), DecodeError> {
        if width == 0 || height == 0 {
            return Err(DecodeError::Broken(format!("it has no pixels: its size is {width}x{height}")));
        }
        if width.max(height) > self.max_side {
            return Err(DecodeError::TooLongSide { width, height, limit: self.max_side });
        }
        let pixels = u64::from(width) * u64::from(height);
        if pixels > self.max_pixels {
            return Err(DecodeError::TooManyPixels { width, height, limit: self.max_pixels });
        }
        if pixels.saturating_mul(pixel_bytes) > self.max_memory {
            return Err(DecodeError::TooMuchMemory { limit: self.max_memory });
        }
        Ok(())
    }

    /// Checks how often a JPEG goes over its pixels: a scan of a few bytes costs as much time as all of them.
    pub(super) fn check_scans(&self, width: u32, height: u32, scans: u32) -> Result<(), DecodeError> {
        let pixels = u64::from(width) * u64::from(height);
        if pixels.saturating_mul(scans.into()) > self.max_pixels.saturating_mul(SCANS.into()) {
            return Err(DecodeError::TooManyScans { width, height, scans });
        }
        Ok(())
    }
}

/// The formats that are read. A file's content decides, not its name or declared type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Format {
    Jpeg,
    Png,
    WebP,
    Gif,
    Bmp,
    Tiff,
}

impl Format {
    /// Lower-case name, as caption records have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Jpeg => "jpeg",
            Self::Png => "png",
            Self::WebP => "webp",
            Self::Gif => "gif",
            Self::Bmp => "bmp",
            Self::Tiff => "tiff",
        }
    }

    fn of(format: ImageFormat) -> Option<Self> {
        match format {
            ImageFormat::Jpeg => Some(Self::Jpeg),
            ImageFormat::Png => Some(Self::Png),
            ImageFormat::WebP => Some(Self::WebP),
            ImageFormat::Gif => Some(Self::Gif),
            ImageFormat::Bmp => Some(Self::Bmp),
            ImageFormat::Tiff => Some(Self::Tiff),
            _ => None,
        }
    }
}

/// A decoded picture.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Its size in the file, width and height: larger where it was decoded at a part of it.
    pub full_size: (u32, u32),
    /// How it was encoded.
    pub format: Format,
    /// Row after row, R, G and B of each pixel: `width * height * 3` bytes.
    pub rgb: Vec<u8>,
}

impl Picture {
    /// One in its own size.
    pub(super) fn whole(width: u32, height: u32, format: Format, rgb: Vec<u8>) -> Self {
        Self { width, height, full_size: (width, height), format, rgb }
    }
}

impl fmt::Debug for Picture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Picture({} {}x{})", self.format.as_str(), self.width, self.height)
    }
}

/// Why an image can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not an image, or one of a kind that is not read.
    #[error("{0}; supported are JPEG, PNG, WebP, GIF, BMP and TIFF")]
    UnsupportedMedia(String),
    /// Width times height is over the limit.
    #[error("the image has {width}x{height} pixels, more than {limit} in all; `decode.max_pixels` sets the limit")]
    TooManyPixels {
        /// Its width.
        width: u32,
        /// Its height.
        height: u32,
        /// [`Limits::max_pixels`].
        limit: u64,
    },
    /// It is gone over too often.
    #[error(
        "the JPEG goes over its {width}x{height} pixels {scans} times, which takes too long; `decode.max_pixels` sets the \
         limit"
    )]
    TooManyScans {
        /// Its width.
        width: u32,
        /// Its height.
        height: u32,
        /// How often.
        scans: u32,
    },
    /// Width or height is over the limit.
    #[error("the image has {width}x{height} pixels, and a side over {limit}; `decode.max_side` sets the limit")]
    TooLongSide {
        /// Its width.
        width: u32,
        /// Its height.
        height: u32,
        /// [`Limits::max_side`].
        limit: u32,
    },
    /// Decoding it would take too much memory.
    #[error("decoding the image takes more than {limit} bytes of memory; `decode.max_memory` sets the limit")]
    TooMuchMemory {
        /// [`Limits::max_memory`].
        limit: u64,
    },
    /// It is truncated or corrupt.
    #[error("the image is broken: {0}")]
    Broken(String),
}

/// Decodes an image to RGB, 8 bits a channel, as Pillow's `Image.open(f).convert("RGB")` does.
///
/// Grey is repeated, alpha is dropped (not blended), palettes are resolved, inks of a TIFF are subtracted from white
/// without regard to its profile, channels of fewer than 8 bits are widened, and 16-bit channels keep their high byte
/// (16-bit grey too, which Pillow clips to white). Of an animation the first frame is taken, on its whole screen. EXIF
/// orientation is ignored, as `Image.open` ignores it.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Picture, DecodeError> {
    let guessed = image::guess_format(bytes).ok();
    let Some((guessed, format)) = guessed.and_then(|guessed| Some((guessed, Format::of(guessed)?))) else {
        return Err(DecodeError::UnsupportedMedia(what_instead(bytes, guessed)));
    };
    match format {
        Format::Gif => gif::first_frame(bytes, limits),
        _ => decode_with(guessed, format, bytes, limits),
    }
}

/// Decodes as [`decode`] does, but a large JPEG at a half, a quarter or an eighth of its size: the smallest of them with
/// at least `least` pixels on both sides. The limits are for the whole picture all the same.
pub fn decode_at_least(bytes: &[u8], limits: &Limits, least: u32, turbo: &TurboJpeg) -> Result<Picture, DecodeError> {
    if image::guess_format(bytes).ok() == Some(ImageFormat::Jpeg)
        && let Some(picture) = turbo.decode(bytes, limits, least)?
    {
        return Ok(picture);
    }
    decode(bytes, limits)
}

fn decode_with(guessed: ImageFormat, format: Format, bytes: &[u8], limits: &Limits) -> Result<Picture, DecodeError> {
    let explain = |error| explain(error, format, limits);
    let mut decoder_limits = image::Limits::no_limits();
    decoder_limits.max_alloc = Some(limits.max_memory);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), guessed);
    reader.limits(decoder_limits);
    let survey = (format == Format::Jpeg).then(|| jpeg::survey(bytes));
    if let Some(jpeg::Survey { bits, .. }) = survey
        && bits != 8
    {
        return Err(DecodeError::UnsupportedMedia(format!("the JPEG has {bits} bits a channel, and only 8 are read")));
    }
    if format == Format::Png && png::has_torn_palette(bytes) {
        return Err(DecodeError::Broken("its palette ends within a colour".into()));
    }
    let directory = (format == Format::Tiff).then(|| tiff::Directory::of(bytes));
    if let Some(directory) = &directory {
        check_directory(directory, limits)?;
    }
    let decoder = reader.into_decoder().map_err(explain)?;
    let (width, height) = decoder.dimensions();
    let color = decoder.color_type();
    let converted = if color == ColorType::Rgb8 { 0 } else { 3 };
    let mut pixel_bytes = u64::from(color.bytes_per_pixel()) + converted;
    let mut complete = true;
    let inks = format == Format::Tiff && decoder.original_color_type() == ExtendedColorType::Cmyk8;
    if let Some(survey) = survey {
        pixel_bytes += survey.coefficient_bytes();
        complete = survey.complete;
        limits.check_scans(width, height, survey.scans)?;
    }
    if let Some(directory) = directory {
        pixel_bytes += if inks { 4 } else { 0 };
        // A strip of it may be all of the picture.
        pixel_bytes += if directory.holds_jpegs() { 3 + jpeg::COEFFICIENTS } else { 0 };
    }
    if format == Format::WebP {
        // Its decoder works in RGBA.
        pixel_bytes += 4;
        webp::lossy_frames(bytes).try_for_each(|(width, height)| limits.check(width, height, pixel_bytes))?;
    }
    limits.check(width, height, pixel_bytes)?;
    if !complete {
        return Err(jpeg::truncated());
    }
    if inks {
        return Ok(Picture::whole(width, height, format, tiff::cmyk_to_rgb(bytes, limits)?));
    }
    let mut rgb = to_rgb(DynamicImage::from_decoder(decoder).map_err(explain)?);
    if format == Format::Bmp {
        bmp::widen_as_pillow(bytes, &mut rgb);
    }
    Ok(Picture::whole(width, height, format, rgb))
}

/// What the decoder would do before it hears of the limits, or without regard to them.
fn check_directory(directory: &tiff::Directory<'_>, limits: &Limits) -> Result<(), DecodeError> {
    if directory.bytes_of_lists() > limits.max_memory {
        return Err(DecodeError::TooMuchMemory { limit: limits.max_memory });
    }
    if directory.has_tiles_of_planes() {
        return Err(DecodeError::UnsupportedMedia("the tiff has a set of tiles for each colour".into()));
    }
    if directory.holds_jpegs() && !directory.jpegs_fit() {
        return Err(DecodeError::Broken("a JPEG in the tiff is not of the size of its strip or tile".into()));
    }
    Ok(())
}

fn to_rgb(image: DynamicImage) -> Vec<u8> {
    match image {
        DynamicImage::ImageLuma16(image) => high_bytes::<1>(&image, [0, 0, 0]),
        DynamicImage::ImageLumaA16(image) => high_bytes::<2>(&image, [0, 0, 0]),
        DynamicImage::ImageRgb16(image) => high_bytes::<3>(&image, [0, 1, 2]),
        DynamicImage::ImageRgba16(image) => high_bytes::<4>(&image, [0, 1, 2]),
        image => image.into_rgb8().into_raw(),
    }
}

/// The high bytes of the samples at `rgb` in each pixel of `CHANNELS` samples.
fn high_bytes<const CHANNELS: usize>(samples: &[u16], rgb: [usize; 3]) -> Vec<u8> {
    let pixels = samples.chunks_exact(CHANNELS);
    pixels.flat_map(|pixel| rgb.map(|channel| (pixel[channel] >> 8) as u8)).collect()
}

fn explain(error: ImageError, format: Format, limits: &Limits) -> DecodeError {
    match error {
        ImageError::Unsupported(error) => {
            DecodeError::UnsupportedMedia(format!("the {} is of an unusual kind ({error})", format.as_str()))
        }
        ImageError::Limits(_) => DecodeError::TooMuchMemory { limit: limits.max_memory },
        error => DecodeError::Broken(error.to_string()),
    }
}

/// What the bytes are, where they are no image that is read.
fn what_instead(bytes: &[u8], guessed: Option<ImageFormat>) -> String {
    /// Enough for the prologue of a page.
    const PROLOGUE: usize = 512;
    let start = &bytes[..bytes.len().min(PROLOGUE)];
    let text = String::from_utf8_lossy(start).to_ascii_lowercase();
    let readable = !text.chars().any(|c| c == char::REPLACEMENT_CHARACTER || (c.is_control() && !c.is_whitespace()));
    match guessed {
        _ if bytes.is_empty() => "the body is empty".into(),
        Some(format) => format!("the body is of the format {format:?}"),
        None if text.contains("<html") || text.contains("<!doctype html") => "the body is an HTML page".into(),
        None if text.contains("<svg") => "the body is an SVG drawing".into(),
        None if readable => "the body is text".into(),
        None => "the body is of no known image format".into(),
    }
}
