//! What the command line names: files, folders, URLs, or a list on standard input.

use std::io::{self, BufRead};
use std::path::Path;

use crate::message::{ImageRef, ParseError};

/// Extensions of the formats that are decoded; a folder's other files are passed over.
const EXTENSIONS: [&str; 9] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jfif"];

/// Every image that the arguments name, in their order, read as they are needed: a folder gives its images (and its
/// folders') sorted by name, `-` one image for each line of standard input.
pub fn images(arguments: Vec<String>) -> impl Iterator<Item = io::Result<String>> + Send {
    arguments.into_iter().flat_map(|argument| -> Box<dyn Iterator<Item = io::Result<String>> + Send> {
        if argument == "-" {
            return Box::new(lines(io::BufReader::new(io::stdin())));
        }
        let path = Path::new(&argument);
        if !path.is_dir() {
            return Box::new(std::iter::once(Ok(argument)));
        }
        match folder(path) {
            Ok(images) => Box::new(images.into_iter().map(Ok)),
            Err(error) => Box::new(std::iter::once(Err(error))),
        }
    })
}

/// The lines that say something; `#` begins a comment.
pub fn lines(reader: impl BufRead) -> impl Iterator<Item = io::Result<String>> {
    let trimmed = reader.lines().map(|line| line.map(|line| line.trim().to_owned()));
    trimmed.filter(|line| line.as_ref().map_or(true, |line| !line.is_empty() && !line.starts_with('#')))
}

/// The images below a folder, sorted.
fn folder(path: &Path) -> io::Result<Vec<String>> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let mut entries = std::fs::read_dir(path).map_err(named)?.collect::<io::Result<Vec<_>>>().map_err(named)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    let mut images = Vec::new();
    for entry in entries {
        let path = entry.path();
        // A link to a folder is not followed: it may lead back here.
        if entry.file_type()?.is_dir() {
            images.extend(folder(&path)?);
        } else if is_image(&path) {
            images.push(path.to_string_lossy().into_owned());
        }
    }
    Ok(images)
}

/// Whether a file's name says that it is an image.
pub fn is_image(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension.as_str()))
}

/// What an argument refers to: a file that exists, else whatever a request's `image` may be. A path that does not exist
/// is still taken for a path where it looks like one, so that the error says that the file is missing.
pub fn reference(argument: &str) -> Result<ImageRef, ParseError> {
    let path = Path::new(argument);
    let is_path = path.exists() || is_image(path) && !argument.contains("://") && !argument.starts_with("data:");
    if is_path {
        let absolute =
            std::path::absolute(path).map_err(|error| ParseError::Reference(format!("{argument}: {error}")))?;
        return Ok(ImageRef::File(absolute));
    }
    ImageRef::parse(argument)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_gives_its_images_and_its_folders_images_sorted() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("b")).unwrap();
        for name in ["c.JPG", "a.png", "b/x.webp", "notes.txt"] {
            std::fs::write(root.path().join(name), b"").unwrap();
        }
        let all: Vec<_> = images(vec![root.path().display().to_string()]).map(Result::unwrap).collect();
        let names: Vec<_> =
            all.iter().map(|p| p.strip_prefix(&format!("{}/", root.path().display())).unwrap()).collect();
        assert_eq!(names, ["a.png", "b/x.webp", "c.JPG"]);
    }

    #[test]
    fn a_list_has_comments_and_empty_lines() {
        let text = "# pictures\n\n http://a/b.jpg \nc.png\n";
        let all: Vec<_> = lines(text.as_bytes()).map(Result::unwrap).collect();
        assert_eq!(all, ["http://a/b.jpg", "c.png"]);
    }

    #[test]
    fn a_missing_file_is_a_path_and_not_base64() {
        assert!(matches!(reference("missing.jpg"), Ok(ImageRef::File(_))));
        assert!(matches!(reference("https://example.com/a.jpg"), Ok(ImageRef::Http(_))));
    }
}
