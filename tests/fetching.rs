//! The fetch stage against a local web server that breaks every rule.

mod support;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use blipstream::budget::{Limit, Pool};
use blipstream::disposition::{Code, Disposed, Disposition};
use blipstream::message::ImageRef;
use blipstream::settings;
use blipstream::stage::fetch::{FailedFetch, FetchError, Fetcher, Observer, ResponseClass, SetupError};
use bytes::Bytes;
use bytesize::ByteSize;
use futures::future::join_all;
use support::images::{Answer, ImageServer, png};
use url::Url;

/// Pixels of a small model: 96 × 96 × 3.
const PIXEL_BYTES: usize = 96 * 96 * 3;

/// Loopback is open, and nothing takes long.
fn settings() -> settings::Fetch {
    settings::Fetch {
        allow_networks: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
        attempts: 3,
        backoff: Duration::from_millis(1),
        max_backoff: Duration::from_millis(5),
        max_body: ByteSize::kib(256),
        ..settings::Fetch::default()
    }
}

fn pool() -> Pool {
    Pool::new(Limit { items: 64, bytes: 64 << 20 })
}

fn fetcher(settings: &settings::Fetch, pool: &Pool) -> Fetcher {
    Fetcher::new(settings, pool.clone(), PIXEL_BYTES).unwrap()
}

/// Fetches one URL and expects a failure that leaves no permit behind.
async fn failure_of(settings: &settings::Fetch, url: Url) -> FailedFetch {
    let pool = pool();
    let result = fetcher(settings, &pool).fetch(&ImageRef::Http(url.clone()), None).await;
    assert_eq!(pool.used(), Limit::default(), "{url} left a permit behind");
    match result {
        Ok((body, _)) => panic!("{url} was fetched: {} bytes", body.len()),
        Err(error) => error,
    }
}

#[tokio::test]
async fn fetches_an_image_and_hands_over_a_permit_for_it() {
    let small = png(8, 8, 1);
    let large = vec![7; 200_000];
    let server = ImageServer::start()
        .await
        .with("/small.png", Answer::Body(small.clone()))
        .with("/large", Answer::Body(large.clone()))
        .with("/chunked", Answer::Chunked(large.clone()));
    let pool = pool();
    let fetcher = fetcher(&settings(), &pool);
    for (path, body, bytes) in
        [("/small.png", &small, PIXEL_BYTES), ("/large", &large, 200_000), ("/chunked", &large, 200_000)]
    {
        let (fetched, permit) = fetcher.fetch(&ImageRef::Http(server.url(path)), None).await.unwrap();
        assert_eq!(&fetched[..], &body[..]);
        assert_eq!((permit.bytes(), pool.used()), (bytes, Limit { items: 1, bytes }), "{path}");
    }
    assert_eq!(pool.used(), Limit::default());
    let head = &server.seen().heads["/small.png"][0].to_lowercase();
    assert!(head.contains("user-agent: blipstream/") && head.contains("accept: image/jpeg"), "{head}");
    assert!(!head.contains("accept-encoding"), "{head}");
}

#[tokio::test]
async fn every_bad_answer_ends_under_its_code_after_as_many_tries_as_it_deserves() {
    let short = Answer::Lying { declared: 1000, body: vec![1; 10] };
    let huge = Answer::Lying { declared: 300_000, body: vec![1; 10] };
    for (answer, code, attempts) in [
        (Answer::status(404), Code::NotFound, 1),
        (Answer::status(410), Code::NotFound, 1),
        (Answer::status(401), Code::AccessDenied, 1),
        (Answer::status(403), Code::AccessDenied, 1),
        (Answer::status(418), Code::Http4xx, 1),
        (Answer::status(304), Code::Http4xx, 1),
        (Answer::status(302), Code::Http4xx, 1),
        (Answer::redirect("http://[bad"), Code::Http4xx, 1),
        (Answer::redirect("file:///etc/passwd"), Code::BlockedAddress, 1),
        (Answer::status(408), Code::Timeout, 3),
        (Answer::status(429), Code::Http429, 3),
        (Answer::status(500), Code::Http5xx, 3),
        (Answer::status(503), Code::Http5xx, 3),
        (Answer::status(204), Code::UnsupportedMedia, 1),
        (Answer::Body(Vec::new()), Code::UnsupportedMedia, 1),
        (Answer::Chunked(Vec::new()), Code::UnsupportedMedia, 1),
        (Answer::Closed, Code::Connect, 3),
        (short, Code::Connect, 3),
        (huge, Code::TooLarge, 1),
        (Answer::Endless, Code::TooLarge, 1),
    ] {
        let server = ImageServer::start().await.with("/x", answer.clone());
        let failed = failure_of(&settings(), server.url("/x")).await;
        assert_eq!((failed.code(), failed.attempts), (code, attempts), "{answer:?}: {failed}");
        assert_eq!(server.seen().requests("/x"), attempts as usize, "{answer:?}");
        let failure = failed.failure();
        assert_eq!((failure.code, failure.attempts), (code, attempts));
        assert!(failure.message.contains("/x: "), "{}", failure.message);
    }
}

#[derive(Default)]
struct Counts {
    retries: Mutex<Vec<Code>>,
    responses: Mutex<Vec<ResponseClass>>,
    bytes: AtomicUsize,
    finished: AtomicUsize,
}

impl Observer for Counts {
    fn response(&self, class: ResponseClass) {
        self.responses.lock().unwrap().push(class);
    }
    fn bytes(&self, length: usize) {
        self.bytes.fetch_add(length, Ordering::Relaxed);
    }
    fn retry(&self, code: Code) {
        self.retries.lock().unwrap().push(code);
    }
    fn finished(&self, _took: Duration) {
        self.finished.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn transient_failures_are_tried_again_until_the_image_comes() {
    let body = png(8, 8, 1);
    let answers = vec![
        Answer::status(500),
        Answer::Status(429, vec![("retry-after", "0".into())]),
        Answer::Closed,
        Answer::Lying { declared: 50, body: vec![1] },
        Answer::Body(body.clone()),
    ];
    let server = ImageServer::start().await.with_all("/x", answers);
    let (pool, counts) = (pool(), Arc::new(Counts::default()));
    let settings = settings::Fetch { attempts: 5, ..settings() };
    let fetcher = fetcher(&settings, &pool).with_observer(counts.clone());
    let (fetched, permit) = fetcher.fetch(&ImageRef::Http(server.url("/x")), None).await.unwrap();
    assert_eq!(&fetched[..], &body[..]);
    assert_eq!((permit.bytes(), pool.used().items), (PIXEL_BYTES, 1));
    assert_eq!(*counts.retries.lock().unwrap(), [Code::Http5xx, Code::Http429, Code::Connect, Code::Connect]);
    let classes: Vec<&str> = counts.responses.lock().unwrap().iter().map(|class| class.as_str()).collect();
    assert_eq!(classes, ["5xx", "4xx", "none", "2xx", "2xx"]);
    assert_eq!(counts.bytes.load(Ordering::Relaxed), body.len());
    assert_eq!(counts.finished.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_host_that_asks_for_a_wait_gets_it_up_to_the_limit() {
    let answers = vec![Answer::Status(429, vec![("retry-after", "3600".into())]), Answer::Body(png(8, 8, 1))];
    let server = ImageServer::start().await.with_all("/x", answers);
    let settings = settings::Fetch { max_backoff: Duration::from_millis(60), ..settings() };
    let started = Instant::now();
    let result = fetcher(&settings, &pool()).fetch(&ImageRef::Http(server.url("/x")), None).await;
    assert!(result.is_ok());
    assert!(started.elapsed() >= Duration::from_millis(60), "{:?}", started.elapsed());
}

#[tokio::test]
async fn redirects_are_followed_up_to_the_limit_and_carry_no_secrets() {
    let mut server = ImageServer::start().await.with("/5", Answer::Body(png(8, 8, 1)));
    for hop in 0..5 {
        let headers = vec![("location", format!("/{}?hop", hop + 1)), ("set-cookie", "a=b".into())];
        server = server.with(&format!("/{hop}"), Answer::Status(302, headers));
    }
    let there = server.url_at("localhost", "/5").to_string();
    server = server.with("/away", Answer::redirect(there)).with("/loop", Answer::redirect("/loop"));
    let pool = pool();
    let fetcher = fetcher(&settings(), &pool);

    let mut url = server.url("/0");
    url.set_username("user").unwrap();
    url.set_password(Some("pw")).unwrap();
    assert!(fetcher.fetch(&ImageRef::Http(url.clone()), None).await.is_ok());
    let head = server.seen().heads["/5"][0].to_lowercase();
    assert!(head.contains("authorization: basic"), "the same origin keeps the user-info: {head}");
    assert!(!head.contains("cookie") && !head.contains("referer"), "{head}");

    url.set_path("/away");
    assert!(fetcher.fetch(&ImageRef::Http(url), None).await.is_ok());
    let head = server.seen().heads["/5"][1].to_lowercase();
    assert!(!head.contains("authorization") && !head.contains("referer"), "another origin got secrets: {head}");

    let failed = failure_of(&settings(), server.url("/loop")).await;
    assert_eq!((failed.code(), failed.attempts), (Code::Http4xx, 1), "{failed}");
    assert_eq!(server.seen().requests("/loop"), 6, "the first request and five redirects");
}

#[tokio::test]
async fn by_default_nothing_of_this_machine_is_reached() {
    let server = ImageServer::start().await.with("/x", Answer::Body(png(8, 8, 1)));
    let closed = settings::Fetch { allow_networks: Vec::new(), ..settings() };
    for host in [
        "127.0.0.1",
        "127.0.0.2",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0",
        "localhost",
        "LOCALHOST",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::]",
        "[64:ff9b::7f00:1]",
    ] {
        let failed = failure_of(&closed, server.url_at(host, "/x")).await;
        assert_eq!((failed.code(), failed.attempts), (Code::BlockedAddress, 1), "{host}: {failed}");
        assert!(failed.to_string().contains("fetch.allow_networks"), "{failed}");
    }
    assert_eq!(server.seen().connections, 0);
}

#[tokio::test]
async fn a_redirect_opens_no_address_that_the_url_could_not() {
    let server = ImageServer::start().await.with("/secret", Answer::Body(png(8, 8, 1)));
    let inside = server.url_at("127.0.0.2", "/secret").to_string();
    let server =
        server.with("/inside", Answer::redirect(inside)).with("/meta", Answer::redirect("http://169.254.169.254/"));
    let one = settings::Fetch { allow_networks: vec!["127.0.0.1/32".parse().unwrap()], ..settings() };
    for path in ["/inside", "/meta"] {
        let failed = failure_of(&one, server.url(path)).await;
        assert_eq!((failed.code(), failed.attempts), (Code::BlockedAddress, 1), "{failed}");
    }
    assert_eq!(server.seen().requests("/secret"), 0);
    assert_eq!(server.seen().connections, 2, "one for each redirect, none for what it led to");
}

#[tokio::test]
async fn every_wait_for_a_host_has_an_end() {
    let ms = Duration::from_millis;
    let impatient = settings::Fetch { attempts: 2, connect_timeout: ms(400), read_timeout: ms(40), ..settings() };
    let short = settings::Fetch { attempts: 1, total_timeout: ms(150), ..settings() };
    let drip = Answer::Drip { body: vec![1; 10_000], every: ms(10) };
    for (answer, settings, named) in [
        (Answer::Silence, &impatient, "fetch.read_timeout"),
        (Answer::Stalled, &impatient, "fetch.read_timeout"),
        (Answer::Silence, &short, "fetch.total_timeout"),
        (drip, &short, "fetch.total_timeout"),
    ] {
        let server = ImageServer::start().await.with("/x", answer.clone());
        let failed = failure_of(settings, server.url("/x")).await;
        assert_eq!((failed.code(), failed.attempts), (Code::Timeout, settings.attempts), "{answer:?}: {failed}");
        assert!(failed.to_string().contains(named), "{failed}");
        assert!(matches!(failed.disposition(), Disposition::Transient { .. }));
    }
}

#[tokio::test]
async fn the_deadline_bounds_all_tries_and_waits() {
    let server = ImageServer::start()
        .await
        .with("/silent", Answer::Silence)
        .with("/busy", Answer::Status(503, vec![("retry-after", "3600".into())]));
    let slow = settings::Fetch { max_backoff: Duration::from_secs(3600), ..settings() };
    let pool = pool();
    let fetcher = fetcher(&slow, &pool);
    let soon = || Some(Instant::now() + Duration::from_millis(80));

    let silent = fetcher.fetch(&ImageRef::Http(server.url("/silent")), soon()).await.unwrap_err();
    assert_eq!((silent.code(), silent.attempts), (Code::Deadline, 1), "{silent}");

    let far = Some(Instant::now() + Duration::from_secs(60));
    let busy = fetcher.fetch(&ImageRef::Http(server.url("/busy")), far).await.unwrap_err();
    assert_eq!((busy.code(), busy.attempts), (Code::Deadline, 1), "no wait that ends behind the deadline is begun");
    assert!(busy.to_string().contains("503"), "{busy}");

    let before = server.seen().total();
    let past = Instant::now().checked_sub(Duration::from_millis(1));
    let late = fetcher.fetch(&ImageRef::Http(server.url("/silent")), past).await.unwrap_err();
    assert_eq!((late.code(), late.attempts), (Code::Deadline, 0));
    assert_eq!(server.seen().total(), before);

    let _all = pool.acquire(pool.limit().bytes).await;
    let starved = fetcher.fetch(&ImageRef::Base64(Bytes::from_static(b"AAAA")), soon()).await.unwrap_err();
    assert_eq!(starved.code(), Code::Deadline, "the wait for a permit counts too");
}

#[tokio::test]
async fn no_more_than_the_limits_are_fetched_at_once() {
    for (concurrency, per_host, expected) in [(64, 3, 3), (4, 64, 4)] {
        let held = Answer::Held(Box::new(Answer::Body(png(8, 8, 1))));
        let server = ImageServer::start().await.with("/x", held);
        let pool = pool();
        let fetcher = fetcher(&settings::Fetch { concurrency, per_host, ..settings() }, &pool);
        let image = ImageRef::Http(server.url("/x"));
        let all = join_all((0..20).map(|_| fetcher.fetch(&image, None)));
        let gate = async {
            server.until(|seen| seen.active == expected).await;
            // Time for a request too many to arrive; none is on its way if the limit holds.
            tokio::time::sleep(Duration::from_millis(50)).await;
            server.open_gate();
        };
        let (results, ()) = tokio::join!(all, gate);
        assert!(results.iter().all(Result::is_ok));
        assert_eq!(server.seen().peak, expected);
    }
}

#[tokio::test]
async fn a_hanging_host_does_not_delay_the_rows_of_another() {
    let image = png(8, 8, 1);
    let server = ImageServer::start()
        .await
        .with("/hangs", Answer::Held(Box::new(Answer::Body(image.clone()))))
        .with("/good", Answer::Body(image));
    let pool = pool();
    let fetcher = fetcher(&settings::Fetch { concurrency: 3, per_host: 2, ..settings() }, &pool);
    let (slow, good) = (ImageRef::Http(server.url("/hangs")), ImageRef::Http(server.url_at("localhost", "/good")));
    let hanging = join_all((0..20).map(|_| fetcher.fetch(&slow, None)));
    let others = async {
        server.until(|seen| seen.active == 2).await;
        let results = join_all((0..10).map(|_| fetcher.fetch(&good, None))).await;
        assert!(results.iter().all(Result::is_ok));
        assert_eq!(server.seen().requests("/hangs"), 2, "the hanging host has its two slots and no more");
        server.open_gate();
    };
    let (results, ()) = tokio::join!(hanging, others);
    assert!(results.iter().all(Result::is_ok));
}

/// Looks at the pool whenever something happens.
struct PoolWatch(Pool, AtomicUsize);

impl PoolWatch {
    fn look(&self) {
        let (used, limit) = (self.0.used(), self.0.limit());
        assert!(used.items <= limit.items && used.bytes <= limit.bytes, "{used:?} of {limit:?}");
        self.1.fetch_max(used.items, Ordering::Relaxed);
    }
}

impl Observer for PoolWatch {
    fn response(&self, _class: ResponseClass) {
        self.look();
    }
    fn bytes(&self, _length: usize) {
        self.look();
    }
}

#[tokio::test]
async fn bodies_wait_for_room_and_never_take_more_than_the_pool() {
    let server = ImageServer::start()
        .await
        .with("/chunked", Answer::Chunked(vec![1; 100_000]))
        .with("/sized", Answer::Body(vec![2; 100_000]))
        .with("/short", Answer::Lying { declared: 100_000, body: vec![3; 50_000] });
    // Room for two bodies of unknown length.
    let pool = Pool::new(Limit { items: 8, bytes: 600 * 1024 });
    let watch = Arc::new(PoolWatch(pool.clone(), AtomicUsize::new(0)));
    let fetcher = fetcher(&settings(), &pool).with_observer(watch.clone());
    let paths = ["/chunked", "/sized", "/short"];
    let images: Vec<_> = (0..60).map(|n| ImageRef::Http(server.url(paths[n % 3]))).collect();
    let results = join_all(images.iter().map(async |image| fetcher.fetch(image, None).await.is_ok())).await;
    assert_eq!(results.iter().filter(|ok| **ok).count(), 40);
    assert!(watch.1.load(Ordering::Relaxed) >= 2);
    assert_eq!(pool.used(), Limit::default());

    // A body that is over the whole pool goes alone, and a spent pool is waited for.
    let all = pool.acquire(600 * 1024).await;
    let sized = &images[1];
    let mut waiting = Box::pin(fetcher.fetch(sized, None));
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut waiting).await.is_err(), "there was no room");
    drop(all);
    assert_eq!(waiting.await.unwrap().1.bytes(), 100_000);
}

#[tokio::test]
async fn inline_data_is_decoded_under_a_permit() {
    let body = png(300, 300, 1);
    let pool = pool();
    let fetcher = fetcher(&settings(), &pool);
    let base64 = ImageRef::Base64(BASE64_STANDARD.encode(&body).into());
    let percent: String = body.iter().map(|byte| format!("%{byte:02X}")).collect();
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
    let error = Fetcher::new(&settings, pool(), PIXEL_BYTES).err().unwrap();
    assert!(matches!(error, SetupError::Root { .. }));
    assert!(error.to_string().contains("/no/such/folder"), "{error}");
}

#[tokio::test]
async fn no_message_contains_a_secret_of_the_reference() {
    let server = ImageServer::start()
        .await
        .with("/closed", Answer::Closed)
        .with("/lying", Answer::Lying { declared: 9, body: vec![1] })
        .with("/silent", Answer::Silence)
        .with("/away", Answer::redirect("http://hunter2:hunter2@169.254.169.254/?hunter2"))
        .with("/scheme", Answer::redirect("ftp://hunter2:hunter2@x/?hunter2"));
    let free = ImageServer::start().await.url("/refused");
    let quick = Duration::from_millis(20);
    let settings = settings::Fetch { attempts: 1, connect_timeout: quick, read_timeout: quick, ..settings() };
    let mut urls: Vec<Url> = ["/404", "/closed", "/lying", "/silent", "/away", "/scheme"].map(|p| server.url(p)).into();
    urls.extend([
        free,
        server.url_at("10.0.0.1", "/x"),
        Url::parse(&format!("https://127.0.0.1:{}/", server.port())).unwrap(),
    ]);
    for mut url in urls {
        url.set_username("hunter2").unwrap();
        url.set_password(Some("hunter2")).unwrap();
        url.set_query(Some("token=hunter2"));
        url.set_fragment(Some("hunter2"));
        let failed = failure_of(&settings, url.clone()).await;
        let message = failed.failure().message;
        assert!(!message.contains("hunter2"), "{message}");
        assert!(message.contains(url.host_str().unwrap()), "it names no host: {message}");
    }
}

#[tokio::test]
async fn an_over_long_reference_leaves_room_for_the_reason() {
    let server = ImageServer::start().await;
    let failed = failure_of(&settings(), server.url(&format!("/{}", "ä".repeat(1000)))).await;
    assert!(failed.failure().message.contains("404"), "{failed}");
}

/// A TLS server that nobody has reason to trust; each connection ends after its handshake.
fn self_signed_server() -> std::net::SocketAddr {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let pem = include_bytes!("support/self_signed.pem");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(pem).unwrap()],
            PrivateKeyDer::from_pem_slice(pem).unwrap(),
        )
        .unwrap();
    let config = Arc::new(config);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().take(1) {
            let mut connection = rustls::ServerConnection::new(config.clone()).unwrap();
            // The client hangs up: that is the test.
            let _ = connection.complete_io(&mut stream.unwrap());
        }
    });
    address
}

#[tokio::test]
async fn a_certificate_that_nobody_signed_is_refused_for_good() {
    let url = Url::parse(&format!("https://localhost:{}/x", self_signed_server().port())).unwrap();
    let failed = failure_of(&settings(), url).await;
    assert_eq!((failed.code(), failed.attempts), (Code::Tls, 1), "{failed}");
    assert!(matches!(failed.error, FetchError::Tls { certificate: true, .. }));
}

#[tokio::test]
async fn a_failed_handshake_is_tried_again() {
    let server = ImageServer::start().await;
    let url = Url::parse(&format!("https://127.0.0.1:{}/x", server.port())).unwrap();
    let failed = failure_of(&settings(), url).await;
    assert_eq!(failed.attempts, 3, "{failed}");
    assert!(matches!(failed.code(), Code::Tls | Code::Connect), "{failed}");
}
