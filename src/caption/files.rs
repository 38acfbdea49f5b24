//! The files of a model, in a directory or in memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::{fs, io};

use super::load::LoadError;

/// Configuration files are small; a larger one is not what it claims to be.
const MAX_TEXT_FILE: u64 = 64 << 20;

/// Where the files of a model are.
pub(super) enum ModelFiles {
    Dir(PathBuf),
    Memory { id: String, files: BTreeMap<String, Cow<'static, [u8]>> },
}

impl ModelFiles {
    /// The directory or the model's name, for messages.
    pub(super) fn place(&self) -> String {
        match self {
            Self::Dir(path) => path.display().to_string(),
            Self::Memory { id, .. } => id.clone(),
        }
    }

    /// The content of a small file, if there is one of that name.
    pub(super) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, LoadError> {
        match self {
            Self::Memory { files, .. } => Ok(files.get(name).map(|bytes| bytes.to_vec())),
            Self::Dir(directory) => {
                let path = directory.join(name);
                let unreadable = |error: io::Error| LoadError::Unreadable {
                    file: path.display().to_string(),
                    source: Box::new(error),
                };
                match fs::metadata(&path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(unreadable(error)),
                    Ok(metadata) if metadata.len() > MAX_TEXT_FILE => Err(LoadError::Invalid {
                        file: path.display().to_string(),
                        reason: format!("{} bytes are too many for a configuration file", metadata.len()),
                    }),
                    Ok(_) => fs::read(&path).map(Some).map_err(unreadable),
                }
            }
        }
    }

    /// The content of a small file that must be there; `hint` ends the message when it is not.
    pub(super) fn require(&self, name: &str, hint: &str) -> Result<Vec<u8>, LoadError> {
        self.read(name)?.ok_or_else(|| LoadError::MissingFile {
            place: self.place(),
            file: name.into(),
            hint: hint.into(),
        })
    }
}
