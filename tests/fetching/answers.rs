//! What hosts answer, and what comes of it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blipstream::budget::Limit;
use blipstream::disposition::{Code, Disposed};
use blipstream::message::ImageRef;
use blipstream::metrics::ResponseClass;
use blipstream::stage::fetch::Observer;

use super::support::images::{Answer, ImageServer, png};
use super::{PIXEL_BYTES, failure_of, fetcher, pool, settings};

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
async fn an_over_long_reference_leaves_room_for_the_reason() {
    let server = ImageServer::start().await;
    let failed = failure_of(&settings(), server.url(&format!("/{}", "ä".repeat(1000)))).await;
    assert!(failed.failure().message.contains("404"), "{failed}");
}
