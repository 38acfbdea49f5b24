//! JPEGs at a part of their size, by libjpeg-turbo, if it is installed: a transform of fewer points gives fewer pixels of
//! each block at once, without the full picture in between. Pillow's `draft` does the same with the same library.

use std::ffi::{c_int, c_uchar, c_ulong, c_void};

use libloading::Library;

use super::jpeg::{survey, truncated};
use super::{DecodeError, Format, Limits, Picture};

/// The library's name, in versions 2 and 3.
const NAME: &str = "libturbojpeg.so.0";
/// Points of a block's transform, of its eight. For other numbers the library has no fast kernels.
const POINTS: [u32; 3] = [1, 2, 4];

// Of `turbojpeg.h`.
const RGB: c_int = 0;
const CMYK_OR_YCCK: [c_int; 2] = [3, 4];
const STOP_ON_WARNING: c_int = 8192;
/// Against progressive JPEGs of very many scans.
const LIMIT_SCANS: c_int = 32768;

type Handle = *mut c_void;
type Header = unsafe extern "C" fn(
    Handle,
    *const c_uchar,
    c_ulong,
    width: *mut c_int,
    height: *mut c_int,
    sampling: *mut c_int,
    colours: *mut c_int,
) -> c_int;
type Decompress = unsafe extern "C" fn(
    Handle,
    *const c_uchar,
    c_ulong,
    to: *mut c_uchar,
    width: c_int,
    pitch: c_int,
    height: c_int,
    pixel_format: c_int,
    flags: c_int,
) -> c_int;

/// Why JPEGs can't be decoded at a part of their size.
#[derive(Debug, thiserror::Error)]
pub enum TurboJpegError {
    /// There is none.
    #[error(
        "{NAME} was not found ({0}): install libjpeg-turbo, which Debian has as libturbojpeg0 and Ubuntu as libturbojpeg"
    )]
    Missing(libloading::Error),
    /// It lacks a function.
    #[error("{NAME} is not of version 2 or 3 ({0})")]
    Version(libloading::Error),
}

/// libjpeg-turbo. It starts no threads, and remembers nothing of one picture when it decodes the next.
#[derive(Debug)]
pub struct TurboJpeg {
    init: unsafe extern "C" fn() -> Handle,
    header: Header,
    decompress: Decompress,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    /// The functions are its own.
    _library: Library,
}

impl TurboJpeg {
    /// Loads the library.
    pub fn open() -> Result<Self, TurboJpegError> {
        // SAFETY: what loading this library runs has no conditions.
        let library = unsafe { Library::new(NAME) }.map_err(TurboJpegError::Missing)?;
        // SAFETY: the types are those of its header.
        let found = unsafe {
            (|| {
                let init: unsafe extern "C" fn() -> Handle = *library.get("tjInitDecompress")?;
                let header: Header = *library.get("tjDecompressHeader3")?;
                let decompress: Decompress = *library.get("tjDecompress2")?;
                Ok((init, header, decompress, *library.get("tjDestroy")?))
            })()
        };
        let (init, header, decompress, destroy) = found.map_err(TurboJpegError::Version)?;
        Ok(Self { init, header, decompress, destroy, _library: library })
    }

    /// A JPEG at the smallest of an eighth, a quarter and a half of its size that has at least `least` pixels on both
    /// sides. `None` where there is no such size, or where the file is one for the other decoder: of a rare kind, or
    /// damaged; or where there is no memory for a decoder.
    ///
    /// # Errors
    /// The file is truncated, or the whole picture is over the limits.
    pub(super) fn decode(&self, bytes: &[u8], limits: &Limits, least: u32) -> Result<Option<Picture>, DecodeError> {
        let Some(mut decoder) = Decoder::new(self) else { return Ok(None) };
        // The header first: to walk the markers is to read the whole file, for nothing where no size fits.
        let Some(full_size) = decoder.size(bytes) else { return Ok(None) };
        let scaled = |points: u32| [full_size.0, full_size.1].map(|side| (side * points).div_ceil(8));
        let fitting = POINTS.map(scaled).into_iter().find(|sides| sides.iter().all(|side| *side >= least));
        let Some([width, height]) = fitting else { return Ok(None) };
        let survey = survey(bytes);
        // The library does not scale lossless ones: it would write the whole picture.
        if !survey.usual {
            return Ok(None);
        }
        limits.check(full_size.0, full_size.1, 3 + survey.coefficient_bytes())?;
        limits.check_scans(full_size.0, full_size.1, survey.scans)?;
        if !survey.complete {
            return Err(truncated());
        }
        let mut rgb = vec![0; width as usize * height as usize * 3];
        // SAFETY: the bytes are there, and the library writes no more than `height` rows of `width` pixels.
        let failed = unsafe {
            (self.decompress)(
                decoder.handle,
                bytes.as_ptr(),
                bytes.len() as c_ulong,
                rgb.as_mut_ptr(),
                width as c_int,
                3 * width as c_int,
                height as c_int,
                RGB,
                STOP_ON_WARNING | LIMIT_SCANS,
            )
        };
        Ok((failed == 0).then_some(Picture { width, height, full_size, format: Format::Jpeg, rgb }))
    }
}

/// A decoder for one picture. Another one would meet what is left of this one where its header is broken: version 2 then
/// fails on every later file, and version 3 may answer with the size of an earlier one.
struct Decoder<'a> {
    handle: Handle,
    library: &'a TurboJpeg,
}

impl<'a> Decoder<'a> {
    fn new(library: &'a TurboJpeg) -> Option<Self> {
        // SAFETY: it takes nothing.
        let handle = unsafe { (library.init)() };
        (!handle.is_null()).then(|| Self { handle, library })
    }

    /// Width and height in the file; `None` where it cannot be read, or is not of brightness and colours.
    fn size(&mut self, bytes: &[u8]) -> Option<(u32, u32)> {
        let (mut width, mut height, mut sampling, mut colours) = (0, 0, 0, 0);
        // SAFETY: the bytes are there, and so are the numbers that are written.
        let failed = unsafe {
            (self.library.header)(
                self.handle,
                bytes.as_ptr(),
                bytes.len() as c_ulong,
                &raw mut width,
                &raw mut height,
                &raw mut sampling,
                &raw mut colours,
            )
        };
        // The sides of a JPEG are 16-bit.
        let side = |side: c_int| u16::try_from(side).ok().filter(|side| *side > 0).map(u32::from);
        if failed != 0 || CMYK_OR_YCCK.contains(&colours) { None } else { Some((side(width)?, side(height)?)) }
    }
}

impl Drop for Decoder<'_> {
    fn drop(&mut self) {
        // SAFETY: nobody else has the handle, and nobody will.
        unsafe { (self.library.destroy)(self.handle) };
    }
}
