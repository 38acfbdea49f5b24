//! Tensors in safetensors files, read one at a time.
//!
//! Mapped files would count to the memory of the process until all is loaded, and a file that is cut off meanwhile would
//! end it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::safetensors::Load;
use candle_core::{Device, Tensor};
use safetensors::tensor::{Metadata, TensorInfo, TensorView};

/// The longest header that the format allows, in bytes.
const LONGEST_HEADER: u64 = 100_000_000;
/// Bytes of the header's length.
const LENGTH: u64 = 8;

/// The tensors of one file or several.
pub(in crate::caption) struct Stored {
    tensors: HashMap<String, Place>,
}

struct Place {
    file: PathBuf,
    /// Of its numbers in the file, in bytes.
    start: u64,
    info: TensorInfo,
}

impl Stored {
    /// Reads the headers. A name that several files have is the last one's.
    pub(in crate::caption) fn open(files: &[PathBuf]) -> Result<Self, (PathBuf, io::Error)> {
        let mut tensors = HashMap::new();
        for file in files {
            let (begin, header) = header(file).map_err(|error| (file.clone(), error))?;
            for (name, info) in header.tensors() {
                let (file, start) = (file.clone(), begin + info.data_offsets.0 as u64);
                tensors.insert(name, Place { file, start, info: info.clone() });
            }
        }
        Ok(Self { tensors })
    }

    /// Whether there is a tensor of that name.
    pub(in crate::caption) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Reads the tensor of that name.
    pub(in crate::caption) fn find(&self, name: &str) -> candle_core::Result<Option<Tensor>> {
        let Some(Place { file, start, info }) = self.tensors.get(name) else { return Ok(None) };
        let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
        let mut file = File::open(file)?;
        file.seek(SeekFrom::Start(*start))?;
        file.read_exact(&mut bytes)?;
        let view = TensorView::new(info.dtype, info.shape.clone(), &bytes).map_err(candle_core::Error::wrap)?;
        view.load(&Device::Cpu).map(Some)
    }
}

/// A file's header, and where its numbers begin.
fn header(file: &Path) -> io::Result<(u64, Metadata)> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let mut file = File::open(file)?;
    let size = file.metadata()?.len();
    let mut length = [0; LENGTH as usize];
    file.read_exact(&mut length)
        .map_err(|_| invalid(format!("it has {size} bytes only: is the download complete?")))?;
    let length = u64::from_le_bytes(length);
    if length > LONGEST_HEADER || length > size {
        return Err(invalid("it does not begin with a header: it is no safetensors file".into()));
    }
    let mut json = vec![0; length as usize];
    file.read_exact(&mut json)?;
    // Also checks that the tensors lie one behind the other, as large as their shapes say.
    let header: Metadata = serde_json::from_slice(&json).map_err(|error| invalid(format!("its header: {error}")))?;
    let (begin, told) = (LENGTH + length, header.data_len() as u64);
    if begin + told != size {
        let there = size - begin.min(size);
        return Err(invalid(format!("it has {there} of {told} bytes of tensors: is the download complete?")));
    }
    Ok((begin, header))
}
