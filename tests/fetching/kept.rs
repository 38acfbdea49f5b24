//! What hosts let be kept is not fetched twice.

use std::sync::Arc;
use std::time::Duration;

use blipstream::budget::Limit;
use blipstream::disposition::{Code, Disposed};
use blipstream::message::ImageRef;
use blipstream::metrics::Metrics;
use blipstream::settings::Fetch;
use blipstream::stage::fetch::Fetcher;
use bytes::Bytes;
use bytesize::ByteSize;

use super::support::images::{Answer, ImageServer, png};
use super::{PIXEL_BYTES, counted, fetcher, pool, settings};

fn keeping() -> Fetch {
    Fetch { cache: ByteSize::mib(1), ..settings() }
}

fn with(headers: &[(&'static str, &str)], body: &[u8]) -> Answer {
    Answer::With(headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect(), body.to_vec())
}

async fn get(fetcher: &Fetcher, server: &ImageServer, path: &str) -> Bytes {
    let (body, permit) = fetcher.fetch(&ImageRef::Http(server.url(path)), None).await.unwrap();
    assert_eq!(permit.bytes(), body.len().max(PIXEL_BYTES), "a body that was kept needs its room, too");
    body
}

#[tokio::test]
async fn a_body_that_is_fresh_costs_no_request_and_one_that_may_not_be_kept_is_fetched_again() {
    let (first, second) = (png(200, 200, 1), png(200, 200, 2));
    for (headers, requests) in [
        (&[("cache-control", "max-age=60")][..], 1),
        (&[("cache-control", "public, max-age=60"), ("vary", "accept")], 1),
        (&[("cache-control", "no-store, max-age=60")], 2),
        (&[("cache-control", "private, max-age=60")], 2),
        (&[("cache-control", "max-age=60"), ("vary", "*")], 2),
        (&[], 2),
    ] {
        let answers = vec![with(headers, &first), with(headers, &second)];
        let server = ImageServer::start().await.with_all("/a.png", answers);
        let (pool, metrics) = (pool(), Arc::new(Metrics::new()));
        let fetcher = counted(&keeping(), &pool, &metrics);
        assert_eq!(get(&fetcher, &server, "/a.png").await, first);
        assert_eq!(get(&fetcher, &server, "/a.png").await, if requests == 1 { &first[..] } else { &second[..] });
        assert_eq!(server.seen().requests("/a.png"), requests, "{headers:?}");
        assert!(!server.seen().heads["/a.png"][requests - 1].to_lowercase().contains("if-"), "nothing to ask about");
        assert_eq!(pool.used(), Limit::default());
        let kept = format!("blipstream_fetch_cache_total{{result=\"fresh\"}} {}", 2 - requests);
        assert!(metrics.render().contains(&kept), "{headers:?}");
    }
}

#[tokio::test]
async fn a_body_that_is_stale_is_asked_about_and_taken_only_if_its_host_says_so() {
    let (first, second) = (png(200, 200, 1), png(200, 200, 2));
    let etag = |tag: &str, body: &[u8]| with(&[("cache-control", "no-cache"), ("etag", tag)], body);
    let date = "Fri, 06 Nov 2026 08:49:37 GMT";
    let same = Answer::Status(304, vec![("etag", "\"1\"".into())]);
    let server = ImageServer::start()
        .await
        .with_all("/a.png", vec![etag("\"1\"", &first), same, etag("\"2\"", &second)])
        .with_all(
            "/dated.png",
            vec![
                with(&[("cache-control", "no-cache"), ("last-modified", date)], &first),
                Answer::Status(304, vec![("last-modified", date.into())]),
                // Some hosts name nothing.
                Answer::Status(304, Vec::new()),
            ],
        )
        .with_all(
            "/odd.png",
            vec![etag("\"1\"", &first), Answer::Status(304, vec![("etag", "\"9\"".into())]), etag("\"9\"", &second)],
        )
        .with_all(
            "/shy.png",
            vec![
                etag("\"1\"", &first),
                Answer::Status(304, vec![("etag", "\"1\"".into()), ("x-robots-tag", "noai".into())]),
            ],
        );
    let (pool, metrics) = (pool(), Arc::new(Metrics::new()));
    let fetcher = counted(&keeping(), &pool, &metrics);
    for (path, expected) in [
        ("/a.png", &first),
        ("/a.png", &first),
        ("/a.png", &second),
        ("/dated.png", &first),
        ("/dated.png", &first),
        ("/dated.png", &first),
        ("/odd.png", &first),
        // It speaks of a body that nobody has, so it is asked again without a condition.
        ("/odd.png", &second),
        ("/shy.png", &first),
    ] {
        assert_eq!(&get(&fetcher, &server, path).await, expected, "{path}");
    }
    let heads = server.seen().heads;
    let asked = |path: &str, number: usize, header: &str| heads[path][number].to_lowercase().contains(header);
    assert!(asked("/a.png", 1, "if-none-match: \"1\"") && asked("/a.png", 2, "if-none-match: \"1\""));
    assert!(asked("/a.png", 1, "accept: image/jpeg") && asked("/a.png", 1, "user-agent: blipstream"));
    assert!(asked("/dated.png", 1, "if-modified-since: fri, 06 nov 2026"));
    assert!(!asked("/odd.png", 2, "if-none-match"));
    assert!(metrics.render().contains("blipstream_fetch_cache_total{result=\"confirmed\"} 3"), "{}", metrics.render());
    // The owner has changed their mind.
    let refused = fetcher.fetch(&ImageRef::Http(server.url("/shy.png")), None).await.unwrap_err();
    assert_eq!(refused.code(), Code::RobotsOptout);
}

#[tokio::test]
async fn without_room_nothing_is_kept_and_with_little_room_little() {
    let body = vec![7; 100_000];
    let kept = |body: &[u8]| with(&[("cache-control", "max-age=60"), ("etag", "\"1\"")], body);
    let paths: Vec<_> = (0..40).map(|number| format!("/{number}.png")).collect();
    let mut server = ImageServer::start().await;
    for path in &paths {
        server = server.with(path, kept(&body));
    }
    let pool = pool();
    let none = fetcher(&settings(), &pool);
    for _ in 0..2 {
        get(&none, &server, &paths[0]).await;
    }
    assert_eq!(server.seen().requests(&paths[0]), 2);
    assert!(!server.seen().heads[&paths[0]][1].to_lowercase().contains("if-none-match"));
    // Ten bodies fit: five are kept, and of forty in turn no more than ten.
    let few = fetcher(&keeping(), &pool);
    for path in paths[..5].iter().chain(&paths[..5]) {
        assert_eq!(get(&few, &server, path).await, body);
    }
    assert_eq!(server.seen().total(), 2 + 5);
    for path in paths.iter().chain(&paths) {
        assert_eq!(get(&few, &server, path).await, body);
    }
    let saved = 2 + 5 + 2 * paths.len() - server.seen().total();
    assert!(saved <= 2 * 11, "{saved} bodies were kept");
    assert_eq!(pool.used(), Limit::default());
}

#[tokio::test]
async fn a_redirect_leads_to_what_is_kept() {
    let body = png(200, 200, 1);
    let server = ImageServer::start()
        .await
        .with("/old.png", Answer::redirect("/new.png"))
        .with("/new.png", with(&[("cache-control", "max-age=60")], &body));
    let pool = pool();
    let fetcher = fetcher(&Fetch { total_timeout: Duration::from_secs(5), ..keeping() }, &pool);
    for _ in 0..3 {
        assert_eq!(get(&fetcher, &server, "/old.png").await, body);
    }
    assert_eq!((server.seen().requests("/old.png"), server.seen().requests("/new.png")), (3, 1));
}

#[tokio::test]
async fn headers_that_are_absurd_or_many_keep_nothing_and_harm_nothing() {
    let body = png(200, 200, 1);
    let many = "x".repeat(5000);
    for (headers, requests) in [
        (&[("etag", "\"1\""), ("age", "18446744073709551615")][..], 3),
        (&[("cache-control", "max-age=18446744073709551615"), ("age", "4294967295")], 3),
        (&[("cache-control", "max-age=99999999999999999999999"), ("etag", "\"1\"")], 3),
        (&[("cache-control", "max-age=60"), ("etag", many.as_str())], 3),
        (&[("date", "Fri, 31 Dec 9999 23:59:59 GMT"), ("expires", "Fri, 01 Jan 0000 00:00:00 GMT")], 3),
    ] {
        let server = ImageServer::start().await.with("/a.png", with(headers, &body));
        let pool = pool();
        let fetcher = fetcher(&keeping(), &pool);
        for _ in 0..3 {
            assert_eq!(get(&fetcher, &server, "/a.png").await, body, "{headers:?}");
            // Ages are counted in seconds.
            tokio::time::sleep(Duration::from_millis(if requests == 3 { 600 } else { 0 })).await;
        }
        assert!(server.seen().requests("/a.png") <= requests, "{headers:?}");
        assert_eq!(pool.used(), Limit::default());
    }
}

#[tokio::test]
async fn what_was_sent_to_one_who_knows_a_password_is_for_nobody_else() {
    let (secret, open) = (png(200, 200, 1), png(200, 200, 2));
    let headers = &[("cache-control", "max-age=60")][..];
    let server = ImageServer::start().await.with_all("/a.png", vec![with(headers, &secret), with(headers, &open)]);
    let pool = pool();
    let fetcher = fetcher(&keeping(), &pool);
    let mut url = server.url("/a.png");
    url.set_username("user").unwrap();
    url.set_password(Some("pw")).unwrap();
    let (body, _) = fetcher.fetch(&ImageRef::Http(url), None).await.unwrap();
    assert_eq!(body, secret);
    assert_eq!(get(&fetcher, &server, "/a.png").await, open);
    assert!(server.seen().heads["/a.png"][0].to_lowercase().contains("authorization: basic"));
}
