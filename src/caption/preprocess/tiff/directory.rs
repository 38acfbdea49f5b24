//! The first directory of a TIFF, as far as it has to be looked at before the decoder reads it: it takes more memory, or panics,
//! where a file says odd things. A directory is a count and entries of a tag, a type, a count and a value (TIFF 6.0; BigTIFF has
//! the same in wider numbers).

use super::super::jpeg;

/// The last of the tags that say how pixels are stored; metadata has higher numbers.
const LAST_OF_PIXELS: u64 = 532;

// Tags.
const WIDTH: u64 = 256;
const HEIGHT: u64 = 257;
const COMPRESSION: u64 = 259;
const STRIPS: u64 = 273;
const ROWS_OF_STRIP: u64 = 278;
/// Whether the colours of a pixel are together (1) or apart (2).
const PLANAR_CONFIGURATION: u64 = 284;
const TILE_WIDTH: u64 = 322;
const TILE_HEIGHT: u64 = 323;
const TILES: u64 = 324;
const JPEG_TABLES: u64 = 347;

/// JPEGs in strips or tiles.
const MODERN_JPEG: u64 = 7;
/// Sides of a JPEG may be those of its strip or tile, filled up to whole blocks of four components.
const BLOCK: u64 = 16;
/// Most strips or tiles of JPEGs: each costs a decoder of its own.
const MOST_JPEGS: u64 = 1 << 16;

/// The first directory of a file.
pub(in crate::caption::preprocess) struct Directory<'a> {
    file: File<'a>,
    entries: Vec<Entry>,
}

/// A file's numbers, in its order of bytes.
#[derive(Clone, Copy)]
struct File<'a> {
    bytes: &'a [u8],
    little: bool,
}

struct Entry {
    tag: u64,
    /// What its numbers are.
    kind: u64,
    /// How many numbers it has.
    count: u64,
    /// Where the numbers are.
    at: u64,
}

impl File<'_> {
    fn number(&self, at: u64, width: u64) -> Option<u64> {
        let digits = self.part(at, width)?.iter().map(|digit| u64::from(*digit));
        let join = |number: u64, digit: u64| number << 8 | digit;
        Some(if self.little { digits.rev().fold(0, join) } else { digits.fold(0, join) })
    }

    fn part(&self, at: u64, length: u64) -> Option<&[u8]> {
        let (from, to) = (usize::try_from(at).ok()?, usize::try_from(at.checked_add(length)?).ok()?);
        self.bytes.get(from..to)
    }
}

impl<'a> Directory<'a> {
    /// As much of it as is there.
    pub(in crate::caption::preprocess) fn of(bytes: &'a [u8]) -> Self {
        let file = File { bytes, little: bytes.starts_with(b"II") };
        Self { file, entries: entries(file).unwrap_or_default() }
    }

    /// Memory that the decoder takes for its lists before it knows a limit: 32 bytes a number (tiff 0.11, which has its own
    /// limit of 256 MiB).
    pub(in crate::caption::preprocess) fn bytes_of_lists(&self) -> u64 {
        /// A value in the decoder's memory.
        const VALUE: u64 = 32;
        // A number that is alone in its entry takes no list.
        let read = self.entries.iter().filter(|entry| entry.count > 1 && entry.tag <= LAST_OF_PIXELS);
        read.fold(0, |sum: u64, entry| sum.saturating_add(entry.count)).saturating_mul(VALUE)
    }

    /// Whether it has tiles of single colours, on which the decoder panics (image 0.25.10).
    pub(in crate::caption::preprocess) fn has_tiles_of_planes(&self) -> bool {
        self.value(PLANAR_CONFIGURATION) == Some(2) && self.find(TILE_WIDTH).is_some()
    }

    /// Whether strips or tiles are JPEGs.
    pub(in crate::caption::preprocess) fn holds_jpegs(&self) -> bool {
        self.value(COMPRESSION) == Some(MODERN_JPEG)
    }

    /// Whether the JPEGs in its strips or tiles are as large as these: the decoder takes memory and time for what each says
    /// of itself (tiff 0.11). Also `false` where that cannot be told.
    pub(in crate::caption::preprocess) fn jpegs_fit(&self) -> bool {
        self.jpegs_fit_or_are_odd().unwrap_or(false)
    }

    fn jpegs_fit_or_are_odd(&self) -> Option<bool> {
        let (width, height) = (self.value(WIDTH)?, self.value(HEIGHT)?);
        let (width, height, offsets) = match self.find(TILE_WIDTH) {
            Some(_) => (self.value(TILE_WIDTH)?, self.value(TILE_HEIGHT)?, self.find(TILES)?),
            None => (width, self.value(ROWS_OF_STRIP).unwrap_or(height).min(height), self.find(STRIPS)?),
        };
        let most = [width, height].map(|side| side.saturating_add(BLOCK - 1) / BLOCK * BLOCK);
        if let Some(tables) = self.find(JPEG_TABLES) {
            let tables = self.file.part(tables.at, tables.count)?;
            if !jpeg::frames(tables, &mut self.steps())?.is_empty() {
                return Some(false);
            }
        }
        if offsets.count > MOST_JPEGS {
            return Some(false);
        }
        let mut steps = self.steps();
        for index in 0..offsets.count {
            let at = usize::try_from(self.number(offsets, index)?).ok()?;
            let frames = jpeg::frames(self.file.bytes.get(at..)?, &mut steps)?;
            if frames.iter().any(|sides| sides[0] > most[0] || sides[1] > most[1]) {
                return Some(false);
            }
        }
        Some(true)
    }

    /// Segments of JPEGs that are looked at: an honest file has no more of them than bytes.
    fn steps(&self) -> usize {
        self.file.bytes.len()
    }

    /// The last one counts, as for the decoder.
    fn find(&self, tag: u64) -> Option<&Entry> {
        self.entries.iter().rfind(|entry| entry.tag == tag)
    }

    fn value(&self, tag: u64) -> Option<u64> {
        self.number(self.find(tag)?, 0)
    }

    fn number(&self, entry: &Entry, index: u64) -> Option<u64> {
        let width = width_of(entry.kind)?;
        self.file.number(entry.at.checked_add(index.checked_mul(width)?)?, width)
    }
}

/// Bytes of a number: of whole ones without a sign, and of bytes that mean nothing by themselves.
fn width_of(kind: u64) -> Option<u64> {
    match kind {
        1 | 7 => Some(1),
        3 => Some(2),
        4 | 13 => Some(4),
        16 | 18 => Some(8),
        _ => None,
    }
}

fn entries(file: File<'_>) -> Option<Vec<Entry>> {
    // Widths of the number of entries, of a count and of an entry.
    let (first, head, wide, length) = match file.number(2, 2)? {
        43 => (file.number(8, 8)?, 8, 8, 20),
        _ => (file.number(4, 4)?, 2, 4, 12),
    };
    let count = file.number(first, head)?;
    let begin = first.checked_add(head)?;
    let entries = (0..count).map_while(|index| {
        let at = begin.checked_add(index.checked_mul(length)?)?;
        let (tag, kind, count) = (file.number(at, 2)?, file.number(at + 2, 2)?, file.number(at + 4, wide)?);
        let here = at + 4 + wide;
        // What does not fit into the entry is elsewhere.
        let fits = width_of(kind).and_then(|width| width.checked_mul(count)).is_some_and(|bytes| bytes <= wide);
        let at = if fits { here } else { file.number(here, wide)? };
        Some(Entry { tag, kind, count, at })
    });
    Some(entries.collect())
}
