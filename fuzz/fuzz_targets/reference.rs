//! The reference to an image. What is read survives being written and read again.

#![no_main]

use std::path::Component;

use blipstream::message::{ImageRef, Message, Request, parse, redact_text, redact_url};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    redact_text(text);
    let Ok(image) = ImageRef::parse(text) else { return };
    match &image {
        ImageRef::Http(url) => {
            assert!(matches!(url.scheme(), "http" | "https") && url.has_host());
            let shown = redact_url(url);
            assert!(!shown.contains(['@', '?', '#']) || url.path().contains('@'), "{shown}");
        }
        ImageRef::File(path) => {
            assert!(path.is_absolute() && path.components().all(|part| part != Component::ParentDir), "{path:?}");
        }
        ImageRef::Object(object) => {
            assert!(object.bucket.len() >= 3 && !object.bucket.contains(['/', '@', ':']), "{object}");
            assert!(object.key.split('/').all(|part| !matches!(part, "" | "." | "..")), "{object}");
        }
        ImageRef::Base64(text) | ImageRef::Percent(text) => assert!(!text.is_empty()),
    }
    let request = Request::of(image);
    let written = Message { payload: Some(request.to_native()), ..Message::empty("requests", 0, 0) };
    assert_eq!(parse(&written, 1), Ok(vec![Ok(request)]));
});
