//! Image references: what kind of address a text is, or whether it is the image itself.

use std::borrow::Cow;
use std::path::{Component, PathBuf};

use bytes::Bytes;
use url::Url;

use super::object::{ObjectRef, StoreKind};
use super::{ImageRef, ParseError};
use crate::message::redact::quote;

/// Shortest text that is taken for bare base64: anything shorter is more likely a slip than a picture, and no image
/// format has a file of six bytes.
pub(super) const MIN_BARE_BASE64: usize = 8;

/// What may stand in `image`, for errors.
const SUPPORTED: &str = "supported are http, https, s3, gs, az, file and data addresses, and base64";

/// Classifies a reference. What is inline is a slice of `source` wherever `text` is a part of it.
pub(super) fn read(source: &Bytes, text: &str, place: &str) -> Result<ImageRef, ParseError> {
    let text = text.trim();
    let found = if let Some(rest) = strip_scheme(text, "data:") {
        data(source, rest)
    } else if let Some(rest) = strip_scheme(text, "file:") {
        file(text, rest)
    } else if let Some((scheme, rest)) = text.split_once("://") {
        match StoreKind::of(scheme) {
            Some(kind) => ObjectRef::read(kind, rest).map(ImageRef::Object),
            None => http(text, scheme),
        }
    } else if text.len() < MIN_BARE_BASE64 {
        Err(format!("neither an address nor base64 ({SUPPORTED})"))
    } else {
        base64(source, text).ok_or_else(|| format!("neither an address nor base64 ({SUPPORTED})"))
    };
    found.map_err(|why| ParseError::Reference(format!("{place}image: {} is {why}", quote(text))))
}

/// What follows `scheme` (with its colon, lower case), in any case of letters.
fn strip_scheme<'t>(text: &'t str, scheme: &str) -> Option<&'t str> {
    let (head, rest) = text.split_at_checked(scheme.len())?;
    head.eq_ignore_ascii_case(scheme).then_some(rest)
}

fn http(text: &str, scheme: &str) -> Result<ImageRef, String> {
    let lower = scheme.to_ascii_lowercase();
    if lower != "http" && lower != "https" {
        let is_scheme = lower.starts_with(|c: char| c.is_ascii_lowercase())
            && lower.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
        return Err(if is_scheme {
            format!("of the unsupported scheme {} ({SUPPORTED})", quote(scheme))
        } else {
            format!("neither an address nor base64 ({SUPPORTED})")
        });
    }
    match Url::parse(text) {
        Ok(url) if url.has_host() => Ok(ImageRef::Http(url)),
        Ok(_) => Err("an address without a host".into()),
        Err(error) => Err(format!("not a valid address: {error}")),
    }
}

fn file(text: &str, rest: &str) -> Result<ImageRef, String> {
    if !rest.starts_with('/') {
        return Err("a file address without an absolute path (file:///folder/image.jpg)".into());
    }
    let url = Url::parse(text).map_err(|error| format!("not a valid address: {error}"))?;
    if url.host().is_some() {
        return Err("a file address of another host; only local files are read".into());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("a file address with a query or a fragment; write `?` as %3F and `#` as %23".into());
    }
    let path = url.to_file_path().map_err(|()| "not a local path".to_owned())?;
    // `%2F..%2F` survives the address parser, and a NUL ends a path early for the operating system.
    if path.components().any(|part| part == Component::ParentDir) || path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err("a file address whose path contains `..` or NUL".into());
    }
    Ok(ImageRef::File(path))
}

/// `[mediatype][;base64],payload` (RFC 2397); the media type is not believed, the decoder looks for itself.
fn data(source: &Bytes, rest: &str) -> Result<ImageRef, String> {
    let Some((head, payload)) = rest.split_once(',') else {
        return Err("a data address without a comma before its data".into());
    };
    if payload.is_empty() {
        return Err("a data address without data".into());
    }
    let encoding = head.rsplit_once(';').map(|(_, encoding)| encoding.trim());
    if !encoding.is_some_and(|encoding| encoding.eq_ignore_ascii_case("base64")) {
        return Ok(ImageRef::Percent(share(source, payload)));
    }
    let found = match unescape(payload) {
        Some(Cow::Borrowed(payload)) => base64(source, payload),
        Some(Cow::Owned(payload)) => base64(source, &payload),
        None => None,
    };
    found.ok_or_else(|| "a data address whose data is not base64".into())
}

/// Base64 in the standard or the URL-safe alphabet, padding optional. Line breaks are dropped: `base64` and Python's
/// `encodebytes` break lines. Spaces are not: words would be base64.
fn base64(source: &Bytes, text: &str) -> Option<ImageRef> {
    if text.contains('\n') || text.contains('\r') {
        let text: String = text.split(['\r', '\n']).collect();
        return is_base64(&text).then(|| ImageRef::Base64(text.into()));
    }
    is_base64(text).then(|| ImageRef::Base64(share(source, text)))
}

fn is_base64(text: &str) -> bool {
    let digits = text.trim_end_matches('=');
    let padding = text.len() - digits.len();
    let length_fits = match padding {
        0 => digits.len() % 4 != 1,
        1 | 2 => text.len().is_multiple_of(4),
        _ => false,
    };
    let kinds = digits.bytes().fold(0, |kinds, digit| kinds | KINDS[usize::from(digit)]);
    length_fits && matches!(kinds, EITHER | STANDARD | URL_SAFE)
}

/// Digits of both alphabets of base64, and, beside them, of one; every kind contains the bit of those before it.
const EITHER: u8 = 1;
const STANDARD: u8 = EITHER | 2;
const URL_SAFE: u8 = EITHER | 4;

/// The kind of every byte: inline images have millions of digits, and a look-up takes a fraction of comparisons.
static KINDS: [u8; 256] = {
    let mut kinds = [u8::MAX; 256];
    let mut byte = 0u8;
    while byte < 128 {
        kinds[byte as usize] = match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => EITHER,
            b'+' | b'/' => STANDARD,
            b'-' | b'_' => URL_SAFE,
            _ => u8::MAX,
        };
        byte += 1;
    }
    kinds
};

/// Percent-decoding for base64 inside a data address, where `+`, `/` and `=` are often escaped.
fn unescape(text: &str) -> Option<Cow<'_, str>> {
    if !text.contains('%') {
        return Some(Cow::Borrowed(text));
    }
    let mut parts = text.split('%');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (code, rest) = part.split_at_checked(2)?;
        let byte = u8::from_str_radix(code, 16).ok().filter(u8::is_ascii)?;
        plain.push(char::from(byte));
        plain.push_str(rest);
    }
    Some(Cow::Owned(plain))
}

/// The bytes of `part`: a slice of `source` where it is a part of it, else a copy.
fn share(source: &Bytes, part: &str) -> Bytes {
    let (whole, part) = (source.as_ptr_range(), part.as_bytes());
    let inside = part.as_ptr_range();
    if whole.start <= inside.start && inside.end <= whole.end {
        source.slice_ref(part)
    } else {
        Bytes::copy_from_slice(part)
    }
}

impl ImageRef {
    /// Reads a reference as a request's `image` is read.
    ///
    /// # Errors
    /// It is unreadable or of an unknown scheme.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        read(&Bytes::copy_from_slice(text.as_bytes()), text, "")
    }

    /// Whom it asks: the host of an address, or the bucket of an object. What is local asks nobody.
    pub fn host(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::Http(url) => url.host_str().map(Cow::Borrowed),
            Self::Object(object) => Some(Cow::Owned(object.store())),
            Self::File(_) | Self::Base64(_) | Self::Percent(_) => None,
        }
    }

    /// The reference as text that reads back as the same reference.
    pub(super) fn to_text(&self) -> Cow<'_, str> {
        match self {
            Self::Http(url) => Cow::Borrowed(url.as_str()),
            Self::File(path) => Cow::Owned(file_address(path)),
            Self::Object(object) => Cow::Owned(object.to_string()),
            Self::Base64(text) if text.len() >= MIN_BARE_BASE64 => String::from_utf8_lossy(text),
            Self::Base64(text) => Cow::Owned(format!("data:;base64,{}", String::from_utf8_lossy(text))),
            Self::Percent(text) => Cow::Owned(format!("data:,{}", String::from_utf8_lossy(text))),
        }
    }
}

fn file_address(path: &PathBuf) -> String {
    Url::from_file_path(path).map_or_else(|()| format!("file://{}", path.display()), String::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn classify(text: &str) -> Result<ImageRef, String> {
        read(&Bytes::new(), text, "").map_err(|error| error.to_string())
    }

    fn base64_of(text: &'static str) -> ImageRef {
        ImageRef::Base64(Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn every_supported_kind_is_told_apart() {
        let http = |text: &str| ImageRef::Http(Url::parse(text).unwrap());
        for (text, expected) in [
            ("https://h.example/p.jpg?a=b", http("https://h.example/p.jpg?a=b")),
            ("  HTTP://user:pass@h.example:81/p  ", http("http://user:pass@h.example:81/p")),
            ("http://bücher.example/ä.jpg", http("http://xn--bcher-kva.example/%C3%A4.jpg")),
            ("http://[2001:DB8::1]:8080/p", http("http://[2001:db8::1]:8080/p")),
            ("file:///data/a%20b.jpg", ImageRef::File("/data/a b.jpg".into())),
            ("FILE://localhost/data/a.jpg", ImageRef::File("/data/a.jpg".into())),
            ("file:/data/a.jpg", ImageRef::File("/data/a.jpg".into())),
            (" S3://photos/a.jpg ", ImageRef::Object(ObjectRef::read(StoreKind::S3, "photos/a.jpg").unwrap())),
            ("data:image/png;base64,iVBO", base64_of("iVBO")),
            ("DATA:image/png;charset=x;BASE64,iVBO", base64_of("iVBO")),
            ("data:;base64,a%2Bb%2F", base64_of("a+b/")),
            ("data:image/png;base64,iV\nBO\r\n", base64_of("iVBO")),
            ("data:image/svg+xml,%3Csvg", ImageRef::Percent(Bytes::from_static(b"%3Csvg"))),
            ("data:,a,b", ImageRef::Percent(Bytes::from_static(b"a,b"))),
            ("iVBORw0KGgo=", base64_of("iVBORw0KGgo=")),
            ("iVBO\nRw0K\nGgo=\n", base64_of("iVBORw0KGgo=")),
            ("_9j_4AAQSkZJ", base64_of("_9j_4AAQSkZJ")),
            ("/9j/4AAQSkZJRg", base64_of("/9j/4AAQSkZJRg")),
        ] {
            assert_eq!(classify(text), Ok(expected), "of {text:?}");
        }
    }

    #[test]
    fn what_is_refused_is_named_with_the_reason() {
        for (text, why) in [
            ("", "neither an address nor base64"),
            ("AAAA", "neither an address nor base64"),
            ("cat.jpg", "neither an address nor base64"),
            ("two words", "neither an address nor base64"),
            ("AAAAAAAAA", "neither an address nor base64"),
            ("AAAAAAA===", "neither an address nor base64"),
            ("AAAA+AA_", "neither an address nor base64"),
            ("s3://bucket", "without a key"),
            ("s3a://bucket/key.jpg", "unsupported scheme `s3a`"),
            ("ftp://h.example/p.jpg", "unsupported scheme `ftp`"),
            ("a b://c", "neither an address nor base64"),
            ("http://", "not a valid address: empty host"),
            ("https://h.example:99999/", "not a valid address"),
            ("file:relative.jpg", "without an absolute path"),
            ("file://server/share/a.jpg", "of another host"),
            ("file:///a.jpg?x", "with a query"),
            ("file:///a%2F..%2F..%2Fetc", "contains `..` or NUL"),
            ("file:///a%00.jpg", "contains `..` or NUL"),
            ("data:image/png;base64", "without a comma"),
            ("data:image/png;base64,", "without data"),
            ("data:image/png;base64,a*b=", "not base64"),
            ("data:image/png;base64,%zz", "not base64"),
        ] {
            let error = classify(text).unwrap_err();
            assert!(error.contains(why), "{text:?} gave: {error}");
        }
    }

    #[test]
    fn an_error_shows_neither_credentials_nor_megabytes() {
        let error = classify("s3://key:S3CRET@bucket/p?sig=T0KEN").unwrap_err();
        assert!(!error.contains("S3CRET") && !error.contains("T0KEN"), "{error}");
        assert!(classify(&"*".repeat(1 << 20)).unwrap_err().len() < 300);
    }

    #[test]
    fn inline_data_is_a_slice_of_its_message() {
        let source = Bytes::from_static(b"data:image/png;base64,iVBORw0KGgo=");
        let text = std::str::from_utf8(&source).unwrap();
        let ImageRef::Base64(slice) = read(&source, text, "").unwrap() else { panic!("not base64") };
        assert_eq!(slice.as_ptr(), source[22..].as_ptr());
    }

    proptest! {
        #[test]
        fn any_text_is_classified_without_panic_and_survives_being_written(
            text in prop_oneof![
                ".{0,60}", "data:.{0,40}", "file://.{0,40}", "https?://.{0,40}", "(s3|gs|az)://[a-z]{3}/.{0,20}", "[A-Za-z0-9+/=_-]{0,40}"
            ]
        ) {
            if let Ok(image) = classify(&text) {
                prop_assert_eq!(classify(&image.to_text()), Ok(image.clone()), "written as {}", image.to_text());
            }
        }
    }
}
