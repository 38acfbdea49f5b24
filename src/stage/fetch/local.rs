//! Images that need no network: inline data and files.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use tokio::time::timeout;

use super::FetchError;
use super::host::Slot;
use super::intake::{Buffer, Intake};
use crate::budget::Permit;

/// As the `data:` URL standard decodes (WHATWG "forgiving-base64"): padding is optional, left-over bits are ignored.
const FORGIVING: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::RequireNone),
);

/// Symbols decoded at once; a multiple of four, so that blocks end where bytes end.
const BLOCK: usize = 4096;

/// How the text of inline data is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Base64.
    Base64,
    /// Percent-encoding.
    Percent,
}

/// Decodes inline data, on a blocking thread since it may be megabytes.
pub async fn inline(text: Bytes, encoding: Encoding, intake: &Intake) -> Result<(Bytes, Permit), FetchError> {
    // Percent-encoding and blanks only make the text longer, so this is an upper bound.
    let most = match encoding {
        Encoding::Base64 => text.len() / 4 * 3 + 3,
        Encoding::Percent => text.len(),
    };
    let most = most.min(intake.max_body);
    let permit = intake.reserve(Some(most)).await;
    let intake = intake.clone();
    blocking(move || {
        let mut buffer = intake.buffer(Some(most));
        match encoding {
            Encoding::Base64 => decode_base64(&text, &mut buffer)?,
            Encoding::Percent => decode_percent(&text, &mut buffer)?,
        }
        intake.settle(buffer, permit)
    })
    .await
}

/// Work on a blocking thread. It owns its permits, so that they are not given back before the work ends, even where
/// nobody waits for it any more.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FetchError> + Send + 'static,
) -> Result<T, FetchError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(FetchError::FileBroken("the worker is stopping".into())),
    }
}

fn broken(problem: &str) -> FetchError {
    FetchError::BadReference(problem.into())
}

/// The bytes of a percent-encoded text.
fn percent_decoded(text: &[u8]) -> impl Iterator<Item = Result<u8, FetchError>> {
    let digit = |byte: Option<&u8>| byte.and_then(|b| char::from(*b).to_digit(16)).map(|value| value as u8);
    let mut rest = text.iter();
    std::iter::from_fn(move || match rest.next()? {
        b'%' => {
            let pair = digit(rest.next()).zip(digit(rest.next()));
            Some(pair.map(|(high, low)| high << 4 | low).ok_or_else(|| broken("a % is not followed by two hex digits")))
        }
        byte => Some(Ok(*byte)),
    })
}

fn decode_percent(text: &[u8], out: &mut Buffer) -> Result<(), FetchError> {
    let mut block = Vec::with_capacity(BLOCK);
    for byte in percent_decoded(text) {
        block.push(byte?);
        if block.len() == BLOCK {
            out.push(&block)?;
            block.clear();
        }
    }
    out.push(&block)
}

/// Decodes base64 in either alphabet, block by block, so that blanks and percent-encoding cost no second copy.
fn decode_base64(text: &[u8], out: &mut Buffer) -> Result<(), FetchError> {
    let text = decode_plain_blocks(text, out)?;
    let mut block = Vec::with_capacity(BLOCK);
    let mut padding = 0;
    for byte in percent_decoded(text) {
        let symbol = match byte? {
            b if b.is_ascii_whitespace() => continue,
            b'=' => {
                padding += 1;
                continue;
            }
            _ if padding > 0 => return Err(broken("the base64 text goes on after its padding")),
            b'-' => b'+',
            b'_' => b'/',
            other => other,
        };
        block.push(symbol);
        if block.len() == BLOCK {
            decode_block(&mut block, out)?;
        }
    }
    if padding > 2 {
        return Err(broken("the base64 text has more than two padding characters"));
    }
    decode_block(&mut block, out)
}

/// Decodes whole blocks of the standard alphabet, the usual case, and returns the text from the first other block on.
fn decode_plain_blocks<'a>(mut text: &'a [u8], out: &mut Buffer) -> Result<&'a [u8], FetchError> {
    let mut decoded = [0; BLOCK / 4 * 3];
    while let Some((block, rest)) = text.split_at_checked(BLOCK) {
        let Ok(length) = FORGIVING.decode_slice(block, &mut decoded) else { break };
        out.push(&decoded[..length])?;
        text = rest;
    }
    Ok(text)
}

fn decode_block(block: &mut Vec<u8>, out: &mut Buffer) -> Result<(), FetchError> {
    let mut decoded = [0; BLOCK / 4 * 3];
    let length = FORGIVING.decode_slice(&block, &mut decoded).map_err(|error| match error {
        base64::DecodeSliceError::DecodeError(base64::DecodeError::InvalidLength(_)) => {
            broken("the base64 text is cut off: its length leaves one symbol over")
        }
        _ => broken("the text is not base64"),
    })?;
    block.clear();
    out.push(&decoded[..length])
}

/// Files below the configured folders. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Files {
    roots: Arc<[PathBuf]>,
    limit: Duration,
}

impl Files {
    /// The folders, each as it is written and in its real place. A disk (a network file system, say) may take `limit`
    /// to open a file, and as long to read it.
    pub fn new(folders: &[PathBuf], limit: Duration) -> Result<Self, (PathBuf, io::Error)> {
        let real = |folder: &PathBuf| folder.canonicalize().map_err(|error| (folder.clone(), error));
        let real: Vec<PathBuf> = folders.iter().map(real).collect::<Result<_, _>>()?;
        Ok(Self { roots: real.into_iter().chain(folders.iter().cloned()).collect(), limit })
    }

    /// Reads a file, on blocking threads.
    pub async fn fetch(&self, path: &Path, intake: &Intake, slot: Slot) -> Result<(Bytes, Permit), FetchError> {
        let (files, path) = (self.clone(), path.to_owned());
        let opened = blocking(move || files.open(&path).map(|(file, length)| (slot, file, length)));
        let (slot, file, length) = self.in_time(opened).await?;
        if length > intake.max_body {
            return Err(FetchError::TooLarge { limit: intake.max_body });
        }
        let permit = intake.reserve(Some(length)).await;
        let intake = intake.clone();
        let body = blocking(move || {
            let _slot = slot;
            let buffer = read(file, length, intake.buffer(Some(length)))?;
            intake.settle(buffer, permit)
        });
        self.in_time(body).await
    }

    async fn in_time<T>(&self, work: impl Future<Output = Result<T, FetchError>>) -> Result<T, FetchError> {
        let late = |_| FetchError::Timeout { setting: "fetch.total_timeout", limit: self.limit };
        timeout(self.limit, work).await.map_err(late)?
    }

    fn contain(&self, path: &Path) -> bool {
        self.roots.iter().any(|root| path.starts_with(root))
    }

    /// Opens a file below a root and tells its length.
    fn open(&self, path: &Path) -> Result<(File, usize), FetchError> {
        if self.roots.is_empty() {
            return Err(FetchError::FileDenied("no folder is open to file: references; set fetch.file_roots"));
        }
        let outside = FetchError::FileDenied("it lies outside the folders of fetch.file_roots");
        if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
            return Err(outside);
        }
        let real = match path.canonicalize() {
            Ok(real) => real,
            // Whether a file exists elsewhere is nobody's business.
            Err(error) if self.contain(path) => return Err(from_io(&error)),
            Err(_) => return Err(outside),
        };
        if !self.contain(&real) {
            return Err(outside);
        }
        // Before it is opened: opening a named pipe waits for its writer.
        if !real.metadata().map_err(|error| from_io(&error))?.is_file() {
            return Err(FetchError::FileDenied("it is not a regular file"));
        }
        let file = File::open(&real).map_err(|error| from_io(&error))?;
        let length = file.metadata().map_err(|error| from_io(&error))?.len();
        Ok((file, usize::try_from(length).unwrap_or(usize::MAX)))
    }
}

fn from_io(error: &io::Error) -> FetchError {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => FetchError::NoFile,
        io::ErrorKind::PermissionDenied => FetchError::FileDenied("the worker has no permission to read it"),
        _ => FetchError::FileBroken(error.to_string()),
    }
}

/// Reads `length` bytes, which the permit covers; a file of another length by now is being written.
fn read(mut file: impl Read, length: usize, mut buffer: Buffer) -> Result<Buffer, FetchError> {
    let changed = || FetchError::FileBroken("its length changes while it is read".into());
    let mut piece = [0; 16 * 1024];
    let mut left = length;
    loop {
        let count = match file.read(&mut piece) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other.map_err(|error| from_io(&error))?,
        };
        match count {
            0 if left == 0 => return Ok(buffer),
            0 => return Err(changed()),
            _ => left = left.checked_sub(count).ok_or_else(changed)?,
        }
        buffer.push(&piece[..count])?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::{Limit, Pool};
    use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
    use proptest::prelude::*;

    fn intake() -> Intake {
        let pool = Pool::new(Limit { items: 4, bytes: 1 << 20 });
        Intake { pool, pixel_bytes: 0, max_body: 1 << 16, metrics: Arc::default() }
    }

    fn base64(text: &[u8]) -> Result<Vec<u8>, FetchError> {
        let intake = intake();
        let mut buffer = intake.buffer(None);
        decode_base64(text, &mut buffer)?;
        let permit = intake.pool.try_acquire(0).unwrap();
        intake.settle(buffer, permit).map(|(bytes, _)| bytes.to_vec())
    }

    proptest! {
        #[test]
        fn base64_is_read_in_every_usual_spelling(
            data in proptest::collection::vec(any::<u8>(), 1..9000), line in 1usize..80
        ) {
            let standard = BASE64_STANDARD.encode(&data);
            let lines: Vec<&str> = standard.as_bytes().chunks(line).map(|l| std::str::from_utf8(l).unwrap()).collect();
            let escaped = standard.replace('+', "%2B").replace('/', "%2f").replace('=', "%3D");
            let spellings = [
                standard.trim_end_matches('=').to_owned(),
                BASE64_URL_SAFE_NO_PAD.encode(&data),
                lines.join("\r\n"),
                escaped,
                standard,
            ];
            for text in spellings {
                prop_assert_eq!(base64(text.as_bytes()), Ok(data.clone()));
            }
        }

        #[test]
        fn junk_is_no_base64_and_no_panic(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Err(error) = base64(&text) {
                prop_assert!(matches!(error, FetchError::BadReference(_) | FetchError::Empty));
            }
        }
    }

    #[test]
    fn broken_base64_is_refused() {
        for text in ["A", "AAAAA", "AA=A", "AAA===", "AA!A", "AA%", "AA%2", "Ã¼Ã¼"] {
            assert!(matches!(base64(text.as_bytes()), Err(FetchError::BadReference(_))), "{text}");
        }
    }

    #[test]
    fn a_file_that_changes_while_it_is_read_is_read_again_later() {
        for length in [9, 11] {
            let result = read(&[7; 10][..], length, intake().buffer(None));
            assert!(matches!(result, Err(FetchError::FileBroken(_))), "{length}");
        }
        assert!(read(&[7; 10][..], 10, intake().buffer(None)).is_ok());
    }
}
