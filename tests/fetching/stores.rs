//! Objects of stores: S3 against a real server that checks signatures, the others against one that shows what it was asked.

use std::collections::BTreeMap;
use std::time::Duration;

use blipstream::budget::Limit;
use blipstream::disposition::{Code, Disposed};
use blipstream::message::ImageRef;
use blipstream::settings::{self, Fetch};
use blipstream::stage::fetch::{FailedFetch, Fetcher};
use bytesize::ByteSize;
use object_store::aws::AmazonS3Builder;
use object_store::signer::Signer;
use reqwest::Method;

use super::support::images::{Answer, ImageServer, png};
use super::support::s3::{KEY, S3, SECRET};
use super::{PIXEL_BYTES, fetcher, pool};

/// Settings for stores only: not even loopback is open to addresses.
fn stores(open: &[&str], options: &[(&str, &str)]) -> Fetch {
    let text = |text: &&str| (*text).to_owned();
    Fetch {
        allow_networks: Vec::new(),
        stores: open.iter().map(text).collect(),
        store_options: options.iter().map(|(name, value)| (text(name), text(value))).collect(),
        ..super::settings()
    }
}

fn with_key(server: &S3, open: &[&str], secret: &str) -> Fetch {
    let endpoint = server.endpoint();
    let key = [("aws_endpoint", endpoint.as_str()), ("aws_access_key_id", KEY), ("aws_secret_access_key", secret)];
    stores(open, &key)
}

fn reference(text: &str) -> ImageRef {
    ImageRef::parse(text).unwrap()
}

async fn failure(settings: &Fetch, text: &str) -> FailedFetch {
    let pool = pool();
    let result = fetcher(settings, &pool).fetch(&reference(text), None).await;
    assert_eq!(pool.used(), Limit::default(), "{text} left a permit behind");
    result.map(|(body, _)| body.len()).expect_err(text)
}

#[tokio::test]
async fn objects_of_s3_are_read_from_open_buckets_with_the_workers_signature() {
    let Some(server) = S3::start() else { return };
    let body = png(200, 200, 1);
    // Keys are meant as they are written.
    let keys = ["a.png", "2024/06/a b.png", "100%25 + é & ü?x=1#y.png", "deep/a/b/c=d/e.png"];
    for key in keys {
        server.put("photos", key, &body);
    }
    server.put("private", "a.png", &body);
    server.put("photos", "huge.png", &vec![1; 300_000]);
    server.put("photos", "empty.png", b"");
    let settings = with_key(&server, &["s3://photos"], SECRET);
    let pool = pool();
    let fetcher = fetcher(&settings, &pool);
    for key in keys {
        let (fetched, permit) = fetcher.fetch(&reference(&format!("s3://photos/{key}")), None).await.unwrap();
        assert_eq!(&fetched[..], &body[..], "{key}");
        assert_eq!(permit.bytes(), body.len().max(PIXEL_BYTES));
    }
    for (text, code, tells) in [
        ("s3://photos/missing.png", Code::NotFound, "NoSuchKey"),
        ("s3://photos/huge.png", Code::TooLarge, "fetch.max_body"),
        ("s3://photos/empty.png", Code::UnsupportedMedia, "empty"),
        ("s3://private/a.png", Code::AccessDenied, "fetch.stores"),
        ("gs://photos/a.png", Code::AccessDenied, "fetch.stores"),
    ] {
        let failed = failure(&settings, text).await;
        assert_eq!((failed.code(), failed.attempts), (code, 1), "{failed}");
        let message = failed.to_string();
        assert!(message.starts_with(text) && message.contains(tells), "{message}");
    }
    // A folder opens no other one, however it is called.
    server.put("photos", "2024-private/a.png", &body);
    let narrow = with_key(&server, &["s3://photos/2024/"], SECRET);
    assert_eq!(failure(&narrow, "s3://photos/2024-private/a.png").await.code(), Code::AccessDenied);
}

#[tokio::test]
async fn credentials_that_are_not_accepted_are_no_fault_of_the_message() {
    let Some(server) = S3::start() else { return };
    server.put("photos", "a.png", &png(200, 200, 1));
    let failed = failure(&with_key(&server, &["s3://photos"], "wrong"), "s3://photos/a.png").await;
    assert_eq!((failed.code(), failed.attempts), (Code::Connect, 3), "tried again, so it can be put off: {failed}");
    let message = failed.to_string();
    assert!(message.contains("SignatureDoesNotMatch") && message.contains("its credentials"), "{message}");
    assert!(!message.contains("wrong") && !message.contains(&server.endpoint()), "{message}");
}

#[tokio::test]
async fn a_signed_address_opens_what_is_closed_to_everybody() {
    let Some(server) = S3::start() else { return };
    let body = png(200, 200, 1);
    server.put("photos", "2024/a b.png", &body);
    let signer = AmazonS3Builder::new()
        .with_bucket_name("photos")
        .with_endpoint(server.endpoint())
        .with_allow_http(true)
        .with_access_key_id(KEY)
        .with_secret_access_key(SECRET)
        .build()
        .unwrap();
    let path = object_store::path::Path::parse("2024/a b.png").unwrap();
    let signed = signer.signed_url(Method::GET, &path, Duration::from_secs(60)).await.unwrap();
    let pool = pool();
    let fetcher = fetcher(&super::settings(), &pool);
    let (fetched, _) = fetcher.fetch(&reference(signed.as_str()), None).await.unwrap();
    assert_eq!(&fetched[..], &body[..]);
    let mut unsigned = signed.clone();
    unsigned.set_query(None);
    let failed = fetcher.fetch(&reference(unsigned.as_str()), None).await.unwrap_err();
    // Which of the two, stores do not agree on.
    assert!(matches!(failed.code(), Code::AccessDenied | Code::NotFound), "{failed}");
    let mut forged = signed.to_string();
    let last = if forged.ends_with('0') { "1" } else { "0" };
    forged.replace_range(forged.len() - 1.., last);
    let failed = fetcher.fetch(&reference(&forged), None).await.unwrap_err();
    assert_eq!(failed.code(), Code::AccessDenied);
    assert!(!failed.to_string().contains("Signature="), "{failed}");
}

#[tokio::test]
async fn objects_of_google_and_azure_are_asked_for_in_their_own_ways() {
    let body = png(200, 200, 1);
    let coded = |coding: &str| {
        let date = "Fri, 06 Nov 2026 08:49:37 GMT";
        let headers = [("etag", "\"1\""), ("last-modified", date), ("content-encoding", coding)];
        Answer::With(headers.map(|(name, value)| (name, value.to_owned())).to_vec(), body.clone())
    };
    let server = ImageServer::start()
        .await
        // Google takes a key as one part of a path.
        .with("/scans/2024%2Fa%20b%2Epng", coded("identity"))
        .with("/account/scans/2024/a%20b.png", coded("identity"))
        .with("/scans/packed%2Epng", coded("gzip"));
    let base = server.url("/").to_string();
    let base = base.trim_end_matches('/');
    let account = format!("{base}/account");
    let settings = stores(
        &["gs://scans/", "az://scans/2024"],
        &[
            ("google_base_url", base),
            ("google_bearer_token", "T0KEN"),
            ("azure_storage_account_name", "account"),
            ("azure_storage_account_key", "c2VjcmV0"),
            ("azure_endpoint", &account),
            ("azure_allow_http", "true"),
        ],
    );
    let pool = pool();
    let fetcher = fetcher(&settings, &pool);
    for (text, path, signed) in [
        ("gs://scans/2024/a b.png", "/scans/2024%2Fa%20b%2Epng", "authorization: bearer t0ken"),
        ("az://scans/2024/a b.png", "/account/scans/2024/a%20b.png", "authorization: sharedkey account:"),
    ] {
        let (fetched, _) = fetcher.fetch(&reference(text), None).await.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(&fetched[..], &body[..]);
        let head = server.seen().heads[path][0].to_lowercase();
        assert!(head.contains(signed) && head.contains("user-agent: blipstream/"), "{head}");
    }
    assert_eq!(failure(&settings, "gs://scans/packed.png").await.code(), Code::UnsupportedMedia);
    let failed = failure(&settings, "az://scans/a.png").await;
    assert_eq!(failed.code(), Code::AccessDenied, "outside the folder: {failed}");
}

#[tokio::test]
async fn a_store_that_fails_is_asked_again_and_waited_for_as_it_wants() {
    let slow_down = Answer::Status(503, vec![("retry-after", "0".into())]);
    let body = png(200, 200, 1);
    let server = ImageServer::start()
        .await
        .with_all("/photos/a.png", vec![slow_down, Answer::Closed, Answer::Body(body.clone())])
        .with("/photos/down.png", Answer::status(500))
        .with("/photos/elsewhere.png", Answer::Status(301, vec![("x-amz-bucket-region", "eu-west-1".into())]))
        .with("/photos/away.png", Answer::redirect(format!("http://127.0.0.1:{}/photos/a.png", 9)))
        .with("/photos/short.png", Answer::Lying { declared: 1000, body: vec![1; 10] })
        .with("/photos/late.png", Answer::Silence);
    let endpoint = server.url("/").to_string();
    let options = [
        ("aws_endpoint", endpoint.trim_end_matches('/')),
        ("aws_access_key_id", KEY),
        ("aws_secret_access_key", SECRET),
    ];
    let settings = stores(&["s3://photos"], &options);
    let hasty = Fetch {
        connect_timeout: Duration::from_millis(100),
        read_timeout: Duration::from_millis(100),
        ..settings.clone()
    };
    let pool = pool();
    let (fetched, _) = fetcher(&settings, &pool).fetch(&reference("s3://photos/a.png"), None).await.unwrap();
    assert_eq!(&fetched[..], &body[..]);
    for (key, code, attempts) in [
        ("down.png", Code::Http5xx, 3),
        ("elsewhere.png", Code::Connect, 3),
        ("away.png", Code::Connect, 3),
        ("short.png", Code::Connect, 3),
        ("late.png", Code::Timeout, 3),
    ] {
        let settings = if code == Code::Timeout { &hasty } else { &settings };
        let failed = failure(settings, &format!("s3://photos/{key}")).await;
        assert_eq!((failed.code(), failed.attempts), (code, attempts), "{failed}");
        assert_eq!(server.seen().requests(&format!("/photos/{key}")), attempts as usize, "{key}");
    }
}

#[tokio::test]
async fn a_store_that_is_described_wrongly_is_told_before_anything_is_fetched() {
    let setup = |settings: &settings::Fetch| {
        let fetcher = Fetcher::new(settings, pool(), PIXEL_BYTES, std::sync::Arc::default());
        fetcher.map(|_| ()).unwrap_err().to_string()
    };
    for (open, options, tells) in [
        ("s3://photos", BTreeMap::from([("aws_endpiont".to_owned(), String::new())]), "aws_endpiont"),
        ("az://photos", BTreeMap::new(), "ccount"),
        ("photos", BTreeMap::new(), "no address of a bucket"),
    ] {
        let settings =
            Fetch { stores: vec![open.into()], store_options: options, max_body: ByteSize::kib(1), ..stores(&[], &[]) };
        let message = setup(&settings);
        assert!(message.contains(tells) && message.contains("fetch.store"), "{message}");
    }
}
