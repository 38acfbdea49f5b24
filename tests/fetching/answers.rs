//! What hosts answer, and what comes of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blipstream::budget::Limit;
use blipstream::disposition::{Code, Disposed};
use blipstream::message::ImageRef;
use blipstream::metrics::Metrics;

use super::support::images::{Answer, ImageServer, png};
use super::{PIXEL_BYTES, counted, failure_of, fetcher, pool, settings};

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
async fn a_host_is_reached_by_its_ipv6_address() {
    let body = png(200, 200, 1);
    let server = ImageServer::start_on_ipv6().await.with("/a.png", Answer::Body(body.clone()));
    let pool = pool();
    let url = server.url_at("[::1]", "/a.png");
    let (fetched, _) = fetcher(&settings(), &pool).fetch(&ImageRef::Http(url), None).await.unwrap();
    assert_eq!(&fetched[..], &body[..]);
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
        (Answer::Reset { declared: 1000, body: vec![1; 10] }, Code::Connect, 3),
        (Answer::Raw(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()), Code::Connect, 3),
        (Answer::Raw(b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n".to_vec()), Code::Connect, 3),
        (Answer::EndlessHead, Code::TooLarge, 1),
        (Answer::With(vec![("content-encoding", "gzip".into())], vec![0x1f, 0x8b]), Code::UnsupportedMedia, 1),
        (Answer::With(vec![("x-robots-tag", "noindex, noai".into())], png(8, 8, 1)), Code::RobotsOptout, 1),
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

#[tokio::test]
async fn what_the_owner_wants_can_be_passed_over_and_who_asks_says_whom_to_write_to() {
    let body = png(8, 8, 1);
    let server =
        ImageServer::start().await.with("/x", Answer::With(vec![("x-robots-tag", "noai".into())], body.clone()));
    let contact = Some("https://example.org/crawler".to_owned());
    let settings = settings::Fetch { robots_tag: false, contact, ..settings() };
    let (fetched, _) = fetcher(&settings, &pool()).fetch(&ImageRef::Http(server.url("/x")), None).await.unwrap();
    assert_eq!(fetched, body);
    let head = &server.seen().heads["/x"][0];
    assert!(head.contains("(+https://example.org/crawler)"), "{head}");
}

#[tokio::test]
async fn a_configured_proxy_is_asked_for_everything_and_for_nothing_that_is_refused() {
    let body = png(8, 8, 1);
    // To a proxy the whole address is the path.
    let proxy = ImageServer::start().await.with("http://pictures.example/x", Answer::Body(body.clone()));
    let through = Some(proxy.url_at("localhost", "/"));
    // The proxy's own name leads inside, and nobody opened that network.
    let settings = settings::Fetch { proxy: through, allow_networks: Vec::new(), ..settings() };
    let image = |text: &str| ImageRef::Http(text.parse().unwrap());
    let fetcher = fetcher(&settings, &pool());
    let (fetched, _) = fetcher.fetch(&image("http://pictures.example/x"), None).await.unwrap();
    assert_eq!(fetched, body);
    for refused in ["http://127.0.0.1/x", "http://10.0.0.1/x", "http://[::1]/x", "http://pictures.example:22/x"] {
        let failed = fetcher.fetch(&image(refused), None).await.unwrap_err();
        assert_eq!(failed.code(), Code::BlockedAddress, "{failed}");
    }
    assert_eq!(proxy.seen().total(), 1);
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
    let (pool, metrics) = (pool(), Arc::new(Metrics::new()));
    let settings = settings::Fetch { attempts: 5, ..settings() };
    let fetcher = counted(&settings, &pool, &metrics);
    let (fetched, permit) = fetcher.fetch(&ImageRef::Http(server.url("/x")), None).await.unwrap();
    assert_eq!(&fetched[..], &body[..]);
    assert_eq!((permit.bytes(), pool.used().items), (PIXEL_BYTES, 1));
    let counted = metrics.render();
    for expected in [
        "blipstream_retries_total{code=\"http_5xx\",stage=\"fetch\"} 1",
        "blipstream_retries_total{code=\"http_429\",stage=\"fetch\"} 1",
        "blipstream_retries_total{code=\"connect\",stage=\"fetch\"} 2",
        "blipstream_fetch_responses_total{class=\"5xx\"} 1",
        "blipstream_fetch_responses_total{class=\"4xx\"} 1",
        "blipstream_fetch_responses_total{class=\"none\"} 1",
        "blipstream_fetch_responses_total{class=\"2xx\"} 2",
        "blipstream_stage_duration_seconds_count{stage=\"fetch\"} 1",
        &format!("blipstream_fetch_bytes_total {}", 1 + body.len()),
    ] {
        assert!(counted.lines().any(|line| line == expected), "no {expected} in\n{counted}");
    }
    assert_eq!(counted.matches("blipstream_retries_total{").count(), 3);
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
