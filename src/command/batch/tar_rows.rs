//! Shards of webdataset: the members of a sample follow one another and share their name up to its first dot.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;

use bytes::Bytes;
use serde_json::Value;
use tar::{Archive, Entry};

use super::cells::Cells;
use super::row::{Image, Problem, Row, Rows};
use super::sources::Emit;
use crate::command::input;
use crate::command::submit::request::Bad;
use crate::disposition::Code;

/// Longest text beside an image, in bytes; of a longer one nothing is passed through.
const LONGEST_TEXT: u64 = 1 << 20;
/// Members that are passed through as columns.
const TEXTS: [&str; 3] = ["txt", "json", "cls"];
/// Column of the image's name.
const IMAGE: &str = "image";

/// Whether it is an archive at all.
///
/// # Errors
/// Why not.
pub fn check(file: impl Read) -> Result<(), String> {
    let mut archive = Archive::new(file);
    let first = archive.entries().and_then(|mut entries| entries.next().transpose());
    match first {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err("an empty archive".into()),
        Err(error) => Err(format!("no tar archive: {error}")),
    }
}

/// Hands on a row for each sample.
pub fn read(argument: &str, rows: &Rows, emit: &mut Emit<'_>) -> ControlFlow<()> {
    match File::open(argument) {
        Ok(file) => read_from(BufReader::with_capacity(1 << 20, file), argument, rows, emit),
        Err(error) => emit(Err(Bad::unread(argument, format!("cannot be read: {error}")))),
    }
}

/// What was read of a sample so far.
#[derive(Default)]
struct Sample {
    key: String,
    /// Name of the image in the archive, and the image.
    image: Option<(String, Result<Bytes, Problem>)>,
    texts: [Option<Value>; TEXTS.len()],
}

fn read_from(file: impl Read, argument: &str, rows: &Rows, emit: &mut Emit<'_>) -> ControlFlow<()> {
    // What was read of a sample then is not whole.
    let broken = |error: io::Error| {
        let why = format!("cannot be read to its end, and the samples behind are missing: {error}");
        Err(Bad::of(argument, &error, why))
    };
    let mut archive = Archive::new(file);
    let entries = match archive.entries() {
        Ok(entries) => entries,
        Err(error) => return emit(broken(error)),
    };
    let mut sample: Option<Sample> = None;
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => return emit(broken(error)),
        };
        let Some((key, extension)) = name_of(&entry) else { continue };
        if sample.as_ref().is_none_or(|sample| sample.key != key)
            && let Some(before) = sample.replace(Sample { key, ..Sample::default() })
        {
            emit(Ok(before.row(argument, rows)))?;
        }
        if let Some(sample) = &mut sample
            && let Err(error) = sample.add(entry, &extension, rows.max_body)
        {
            return emit(broken(error));
        }
    }
    sample.map_or(ControlFlow::Continue(()), |last| emit(Ok(last.row(argument, rows))))
}

/// Key and extension of a regular file: the path up to the first dot of its last part, and what follows that.
fn name_of(entry: &Entry<'_, impl Read>) -> Option<(String, String)> {
    if !entry.header().entry_type().is_file() {
        return None;
    }
    let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
    let path = path.strip_prefix("./").unwrap_or(&path);
    let folder = path.rfind('/').map_or(0, |slash| slash + 1);
    let dot = path[folder..].find('.').filter(|dot| *dot > 0)?;
    let (key, extension) = path.split_at(folder + dot);
    Some((key.to_owned(), extension[1..].to_ascii_lowercase()))
}

impl Sample {
    fn add(&mut self, mut entry: Entry<'_, impl Read>, extension: &str, max_body: u64) -> io::Result<()> {
        let size = entry.size();
        if let Some(at) = TEXTS.iter().position(|text| *text == extension) {
            if size <= LONGEST_TEXT {
                let mut text = Vec::new();
                entry.read_to_end(&mut text)?;
                self.texts[at] = Some(value(extension, &text));
            }
        } else if self.image.is_none()
            && input::is_image(Path::new(&format!("x.{extension}")))
            && !extension.contains('.')
        {
            let image = if size > max_body {
                Err(Problem::new(Code::TooLarge, format!("{size} bytes, more than fetch.max_body")))
            } else {
                let mut bytes = Vec::with_capacity(size as usize);
                entry.read_to_end(&mut bytes)?;
                Ok(bytes.into())
            };
            self.image = Some((format!("{}.{extension}", self.key), image));
        }
        Ok(())
    }

    fn row(self, argument: &str, rows: &Rows) -> Row {
        let place = format!("{argument}/{}", self.key);
        let (name, image) = self.image.map_or((Value::Null, None), |(name, image)| (name.into(), Some(image)));
        let texts = TEXTS.iter().zip(self.texts).filter_map(|(name, text)| Some(((*name).to_owned(), text?)));
        let cells = Cells(std::iter::once((IMAGE.to_owned(), name)).chain(texts).collect());
        match image {
            Some(Ok(bytes)) => rows.row(&place, cells, 0, Image::Bytes(bytes), None),
            Some(Err(problem)) => Row { place, cells, request: Err(problem) },
            None => {
                let problem = Problem::new(Code::BadReference, "no image among the members of this sample");
                Row { place, cells, request: Err(problem) }
            }
        }
    }
}

fn value(extension: &str, text: &[u8]) -> Value {
    let plain = || Value::from(String::from_utf8_lossy(text).trim_end_matches(['\r', '\n']));
    match extension {
        "json" => serde_json::from_slice(text).unwrap_or_else(|_| plain()),
        "cls" => std::str::from_utf8(text)
            .ok()
            .and_then(|text| text.trim().parse::<i64>().ok())
            .map_or_else(plain, Value::from),
        _ => plain(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, data) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, *data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn rows() -> Rows {
        Rows { column: None, params: crate::message::RequestParams::default(), max_body: 100 }
    }

    fn read_all(archive: impl Read) -> Vec<Row> {
        read_results(archive).into_iter().map(|row| row.unwrap_or_else(Row::from)).collect()
    }

    fn read_results(archive: impl Read) -> Vec<Result<Row, Bad>> {
        let mut all = Vec::new();
        let _ = read_from(archive, "s.tar", &rows(), &mut |row| {
            all.push(row);
            ControlFlow::Continue(())
        });
        all
    }

    /// A disk that fails.
    struct Failing;

    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(libc::EIO))
        }
    }

    #[test]
    fn members_that_share_their_name_up_to_the_first_dot_are_one_sample() {
        let bytes = archive(&[
            ("a/000.seg.png", b"no image of the sample"),
            ("a/000.JPG", b"jpeg"),
            ("a/000.txt", b"a dog\n"),
            ("a/000.json", br#"{"b":1}"#),
            ("a/001.cls", b"7"),
            ("a/001.png", b"png"),
            ("b/001.webp", b"webp"),
            ("readme", b"has no extension"),
            ("c.txt", b"no image"),
        ]);
        let all = read_all(bytes.as_slice());
        let places: Vec<_> = all.iter().map(|row| row.place.as_str()).collect();
        assert_eq!(places, ["s.tar/a/000", "s.tar/a/001", "s.tar/b/001", "s.tar/c"]);
        let cells: Vec<_> = all.iter().map(|row| serde_json::to_string(&row.cells).unwrap()).collect();
        assert_eq!(cells[0], r#"{"image":"a/000.jpg","txt":"a dog","json":{"b":1}}"#);
        assert_eq!(cells[1], r#"{"image":"a/001.png","cls":7}"#);
        assert_eq!(cells[3], r#"{"image":null,"txt":"no image"}"#);
        let image = |row: &Row| row.request.clone().map(|request| request.image);
        let base64 = crate::message::ImageRef::Base64(Bytes::from_static(b"anBlZw=="));
        assert_eq!(image(&all[0]), Ok(base64));
        assert_eq!(all[3].request.as_ref().unwrap_err().code, Code::BadReference);
    }

    #[test]
    fn what_is_too_long_is_not_read_and_costs_only_itself() {
        let bytes =
            archive(&[("0.png", &[7; 101]), ("1.txt", &vec![b'x'; LONGEST_TEXT as usize + 1]), ("1.png", b"png")]);
        let all = read_all(bytes.as_slice());
        assert_eq!(all[0].request.as_ref().unwrap_err().code, Code::TooLarge);
        assert!(all[1].request.is_ok() && all[1].cells.get("txt").is_none());
    }

    #[test]
    fn a_torn_archive_gives_what_is_whole_and_says_that_more_is_missing() {
        let bytes = archive(&[("0.png", b"png"), ("1.png", &[7; 90]), ("1.txt", b"text")]);
        let all = read_all(&bytes[..1024 + 512 + 40]);
        assert_eq!(all.len(), 2);
        assert!(all[0].request.is_ok());
        assert!(all[1].request.as_ref().unwrap_err().message.contains("missing"), "{all:?}");
    }

    #[test]
    fn a_disk_that_fails_inside_of_a_member_costs_no_sample_before_it_and_is_no_row() {
        let bytes = archive(&[("0.png", b"png"), ("1.png", &[7; 90]), ("2.png", b"png")]);
        let all = read_results(bytes[..1024 + 512 + 40].chain(Failing));
        let [Ok(whole), Err(bad)] = &all[..] else { panic!("{all:?}") };
        assert!(whole.place == "s.tar/0" && whole.request.is_ok(), "{whole:?}");
        assert!(bad.unread && bad.why.contains("os error"), "{bad}");
    }
}
