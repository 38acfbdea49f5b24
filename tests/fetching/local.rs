//! Images that need no network.

use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use blipstream::budget::Limit;
use blipstream::disposition::{Code, Disposed};
use blipstream::message::ImageRef;
use blipstream::stage::fetch::{Fetcher, SetupError};
use bytes::Bytes;

use super::support::images::png;
use super::{PIXEL_BYTES, fetcher, pool, settings};

#[tokio::test]
async fn inline_data_is_decoded_under_a_permit() {
    let body = png(300, 300, 1);
    let pool = pool();
    let fetcher = fetcher(&settings(), &pool);
    let base64 = ImageRef::Base64(BASE64_STANDARD.encode(&body).into());
    let percent = body.iter().map(|byte| format!("%{byte:02X}")).collect::<Vec<_>>().concat();
    for image in [base64, ImageRef::Percent(percent.into())] {
        let (fetched, permit) = fetcher.fetch(&image, None).await.unwrap();
        assert_eq!(&fetched[..], &body[..]);
        assert_eq!(permit.bytes(), body.len().max(PIXEL_BYTES));
    }
    let too_long = Bytes::from(BASE64_STANDARD.encode(vec![1; 300_000]));
    for (image, code) in [
        (ImageRef::Base64("not base64!".into()), Code::BadReference),
        (ImageRef::Base64("".into()), Code::UnsupportedMedia),
        (ImageRef::Percent("%GG".into()), Code::BadReference),
        (ImageRef::Percent("".into()), Code::UnsupportedMedia),
        (ImageRef::Base64(too_long.clone()), Code::TooLarge),
        (ImageRef::Percent(too_long), Code::TooLarge),
    ] {
        let failed = fetcher.fetch(&image, None).await.unwrap_err();
        assert_eq!((failed.code(), failed.attempts), (code, 1), "{failed}");
        assert!(failed.reference.starts_with("inline image ("), "inline data is never echoed: {failed}");
    }
    assert_eq!(pool.used(), Limit::default());
}

#[cfg(unix)]
#[tokio::test]
async fn files_are_read_below_their_root_and_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    let (root, outside) = (folder.path().join("root"), folder.path().join("outside.png"));
    let body = png(200, 200, 1);
    std::fs::create_dir_all(root.join("sub")).unwrap();
    std::fs::write(&outside, &body).unwrap();
    std::fs::write(root.join("sub/good.png"), &body).unwrap();
    std::fs::write(root.join("empty"), b"").unwrap();
    std::fs::write(root.join("huge"), vec![1; 300_000]).unwrap();
    std::os::unix::fs::symlink(root.join("sub/good.png"), root.join("inside-link")).unwrap();
    std::os::unix::fs::symlink(&outside, root.join("outside-link")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    // The root may itself be reached through a link.
    let alias = folder.path().join("alias");
    std::os::unix::fs::symlink(&root, &alias).unwrap();

    let pool = pool();
    let open = fetcher(&settings::Fetch { file_roots: vec![alias.clone()], ..settings() }, &pool);
    for path in [alias.join("sub/good.png"), root.join("sub/good.png"), root.join("inside-link")] {
        let (fetched, permit) = open.fetch(&ImageRef::File(path), None).await.unwrap();
        assert_eq!((&fetched[..], permit.bytes()), (&body[..], body.len().max(PIXEL_BYTES)));
    }
    for (path, code) in [
        (root.join("missing"), Code::NotFound),
        (alias.join("missing"), Code::NotFound),
        (root.join("sub"), Code::AccessDenied),
        (root.join("socket"), Code::AccessDenied),
        (root.join("outside-link"), Code::AccessDenied),
        (root.join("../outside.png"), Code::AccessDenied),
        (outside, Code::AccessDenied),
        (folder.path().join("missing"), Code::AccessDenied),
        (PathBuf::from("/etc/passwd"), Code::AccessDenied),
        (PathBuf::from("root/sub/good.png"), Code::AccessDenied),
        (root.join("empty"), Code::UnsupportedMedia),
        (root.join("huge"), Code::TooLarge),
    ] {
        let failed = open.fetch(&ImageRef::File(path), None).await.unwrap_err();
        assert_eq!((failed.code(), failed.attempts), (code, 1), "{failed}");
    }
    let shut = fetcher(&settings(), &pool);
    let failed = shut.fetch(&ImageRef::File(root.join("sub/good.png")), None).await.unwrap_err();
    assert_eq!(failed.code(), Code::AccessDenied);
    assert!(failed.to_string().contains("fetch.file_roots"), "{failed}");
    assert_eq!(pool.used(), Limit::default());
}

#[test]
fn a_root_that_is_not_there_is_named_at_the_start() {
    let settings = settings::Fetch { file_roots: vec!["/no/such/folder".into()], ..settings() };
    let error = Fetcher::new(&settings, pool(), PIXEL_BYTES, Arc::default()).err().unwrap();
    assert!(matches!(error, SetupError::Root { .. }));
    assert!(error.to_string().contains("/no/such/folder"), "{error}");
}
