//! Time, concurrency and room: every wait ends and nothing takes more than its share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blipstream::budget::{Limit, Pool};
use blipstream::disposition::{Code, Disposed, Disposition, Stage};
use blipstream::message::ImageRef;
use blipstream::metrics::Metrics;
use blipstream::stage::fetch::FetchError;
use bytes::Bytes;
use futures::future::join_all;

use super::support::images::{Answer, ImageServer, png};
use super::{counted, failure_of, fetcher, pool, settings};

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
async fn an_address_that_many_ask_for_at_once_is_fetched_once_and_counts_for_each() {
    let held = |answer| Answer::Held(Box::new(answer));
    let server = ImageServer::start()
        .await
        .with("/x", held(Answer::Body(png(8, 8, 1))))
        .with("/gone", held(Answer::status(404)));
    let (pool, metrics) = (pool(), Arc::new(Metrics::new()));
    let fetcher = counted(&settings::Fetch { share: true, ..settings() }, &pool, &metrics);
    let images = ["/x", "/gone"].map(|path| ImageRef::Http(server.url(path)));
    let soon = Some(Instant::now() + Duration::from_millis(100));
    let all = join_all((0..20).map(|n| fetcher.fetch(&images[n % 2], None)));
    let late = fetcher.fetch(&images[0], soon);
    let gate = async {
        server.until(|seen| seen.active == 2).await;
        tokio::time::sleep(Duration::from_millis(150)).await;
        server.open_gate();
    };
    let (results, late, ()) = tokio::join!(all, late, gate);
    assert_eq!(late.unwrap_err().code(), Code::Deadline, "each has its own deadline");
    for (n, result) in results.iter().enumerate() {
        match result {
            Ok((body, permit)) => {
                assert_eq!((n % 2, &body[..], permit.bytes()), (0, &png(8, 8, 1)[..], super::PIXEL_BYTES));
            }
            Err(failed) => assert_eq!((n % 2, failed.code(), failed.attempts), (1, Code::NotFound, 1)),
        }
    }
    assert_eq!((server.seen().requests("/x"), server.seen().requests("/gone")), (1, 1));
    assert_eq!(pool.used().items, 10, "a permit for each");
    assert!(metrics.render().contains("blipstream_fetch_shared_total 9"), "{}", metrics.render());
    drop(results);
    assert_eq!(pool.used(), Limit::default());
    // Those that come later fetch anew.
    assert!(fetcher.fetch(&images[0], None).await.is_ok());
    assert_eq!(server.seen().requests("/x"), 2);
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

/// Looks at the pool whenever anything else has had its turn; gives the most items that it has seen.
async fn watch(pool: &Pool, until: impl Future) -> usize {
    let mut until = std::pin::pin!(until);
    let mut most = 0;
    loop {
        let (used, limit) = (pool.used(), pool.limit());
        assert!(used.items <= limit.items && used.bytes <= limit.bytes, "{used:?} of {limit:?}");
        most = most.max(used.items);
        tokio::select! {
            biased;
            _ = &mut until => return most,
            () = tokio::task::yield_now() => {}
        }
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
    let metrics = Arc::new(Metrics::new());
    let fetcher = counted(&settings(), &pool, &metrics);
    let paths = ["/chunked", "/sized", "/short"];
    let images: Vec<_> = (0..60).map(|n| ImageRef::Http(server.url(paths[n % 3]))).collect();
    let mut fetched = 0;
    let all = async {
        let results = join_all(images.iter().map(async |image| fetcher.fetch(image, None).await.is_ok())).await;
        fetched = results.into_iter().filter(|ok| *ok).count();
    };
    assert!(watch(&pool, all).await >= 2);
    assert_eq!(fetched, 40);
    assert_eq!(pool.used(), Limit::default());

    // A body that is over the whole pool goes alone, and a spent pool is waited for.
    let all = pool.acquire(600 * 1024).await;
    let (sized, blocked) = (&images[1], metrics.blocked_so_far(Stage::Fetch));
    let mut waiting = Box::pin(fetcher.fetch(sized, None));
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut waiting).await.is_err(), "there was no room");
    assert!(metrics.blocked_so_far(Stage::Fetch) > blocked, "the wait counts while it lasts");
    drop(all);
    assert_eq!(waiting.await.unwrap().1.bytes(), 100_000);
}

#[tokio::test]
async fn a_host_that_gives_up_while_the_body_waits_for_room_is_asked_again_at_no_cost() {
    let gives_up = Answer::Impatient(Duration::from_millis(100));
    let image = png(8, 8, 1);
    let server = ImageServer::start()
        .await
        .with_all("/once", vec![gives_up.clone(), Answer::Body(image.clone())])
        .with("/always", gives_up.clone())
        .with_all("/gone", vec![gives_up.clone(), Answer::status(404)])
        .with_all("/moved", vec![gives_up, Answer::redirect("/good")])
        .with("/good", Answer::Body(image.clone()));
    let pool = pool();
    let fetcher = fetcher(&settings::Fetch { attempts: 1, per_host: 1, ..settings() }, &pool);
    let starved = async |path: &str| {
        let all = pool.acquire(pool.limit().bytes).await;
        let reference = ImageRef::Http(server.url(path));
        let release = async {
            server.until(|seen| seen.requests(path) == 1).await;
            // The connection is closed, and nobody reads it yet.
            server.until(|seen| seen.active == 0).await;
            drop(all);
        };
        let (result, ()) = tokio::join!(fetcher.fetch(&reference, None), release);
        result.map(|(body, _)| body)
    };
    assert_eq!(starved("/once").await.unwrap(), image);
    assert_eq!(starved("/moved").await.unwrap(), image);
    for (path, code) in [("/always", Code::Connect), ("/gone", Code::NotFound)] {
        let failed = starved(path).await.unwrap_err();
        assert_eq!((failed.code(), failed.attempts), (code, 1), "{failed}");
        assert_eq!(server.seen().requests(path), 2, "{path}: once for the room, once with it");
    }
    assert_eq!(pool.used(), Limit::default());

    // Nothing was waited for: that it breaks is the host's affair.
    let unstarved = fetcher.fetch(&ImageRef::Http(server.url("/always")), None).await.unwrap_err();
    assert_eq!((unstarved.code(), server.seen().requests("/always")), (Code::Connect, 3));
}

#[tokio::test]
async fn every_byte_that_a_host_sends_is_counted_also_of_bodies_that_fail() {
    let server = ImageServer::start()
        .await
        .with("/good", Answer::Body(vec![1; 1000]))
        .with("/short", Answer::Lying { declared: 1000, body: vec![2; 300] });
    let (pool, metrics) = (pool(), Arc::default());
    let fetcher = counted(&settings::Fetch { attempts: 2, ..settings() }, &pool, &metrics);
    drop(fetcher.fetch(&ImageRef::Http(server.url("/good")), None).await.unwrap());
    fetcher.fetch(&ImageRef::Http(server.url("/short")), None).await.unwrap_err();
    drop(fetcher.fetch(&ImageRef::Base64(Bytes::from_static(b"AAAA")), None).await.unwrap());
    assert!(metrics.render().contains("blipstream_fetch_bytes_total 1600"), "{}", metrics.render());
}

#[tokio::test]
async fn hosts_that_redirect_to_each_other_do_not_lock_each_other_up() {
    let server = ImageServer::start().await.with("/good", Answer::Body(png(8, 8, 1)));
    let (here, there) = (server.url("/good").to_string(), server.url_at("localhost", "/good").to_string());
    let server = server.with("/there", Answer::redirect(there)).with("/here", Answer::redirect(here));
    let pool = pool();
    let fetcher = fetcher(&settings::Fetch { concurrency: 2, per_host: 1, ..settings() }, &pool);
    let images = [server.url("/there"), server.url_at("localhost", "/here")].map(ImageRef::Http);
    let all = join_all((0..20).map(|n| fetcher.fetch(&images[n % 2], None)));
    let results = tokio::time::timeout(Duration::from_secs(20), all).await.expect("they wait for each other");
    assert!(results.iter().all(Result::is_ok));
}

#[tokio::test]
async fn a_dead_host_behind_a_redirect_is_left_alone_and_the_one_that_leads_there_is_not() {
    let body = png(200, 200, 1);
    let server = ImageServer::start_everywhere().await.with("/good.png", Answer::Body(body.clone()));
    let (dead, leads) = (server.url_at("127.0.0.12", "/dead.png"), |path: &str| server.url_at("127.0.0.11", path));
    server.set("/dead.png", Answer::Closed);
    server.set("/to-dead.png", Answer::redirect(dead.as_str()));
    server.set("/to-good.png", Answer::redirect(server.url_at("127.0.0.13", "/good.png").as_str()));
    let settings = settings::Fetch { attempts: 1, breaker_failures: 3, ..settings() };
    let pool = pool();
    let fetcher = fetcher(&settings, &pool).leaving_failing_hosts_alone(&settings, "last");
    let fetch = async |path: &str| fetcher.fetch(&ImageRef::Http(leads(path)), None).await.map(|(body, _)| body);
    for _ in 0..3 {
        assert!(matches!(fetch("/to-dead.png").await.unwrap_err().error, FetchError::Connect(_)));
    }
    assert_eq!(server.seen().requests("/dead.png"), 3);
    for _ in 0..3 {
        let failed = fetch("/to-dead.png").await.unwrap_err();
        assert!(matches!(failed.error, FetchError::LeftAlone { .. }), "{failed}");
        assert_eq!(fetch("/to-good.png").await.unwrap(), body, "the host that leads to both is as good as any");
    }
    assert_eq!(server.seen().requests("/dead.png"), 3, "the dead one was not asked again");
    let failed = fetcher.fetch(&ImageRef::Http(dead), None).await.unwrap_err();
    assert!(matches!(failed.error, FetchError::LeftAlone { .. }), "{failed}");
    assert_eq!(pool.used(), Limit::default());
}

#[tokio::test]
async fn a_host_that_leads_to_itself_and_fails_there_is_left_alone() {
    let server = ImageServer::start_everywhere().await;
    let url = server.url_at("127.0.0.14", "/a.png");
    server.set("/a.png", Answer::redirect("/b.png"));
    server.set("/b.png", Answer::Closed);
    let settings = settings::Fetch { attempts: 1, breaker_failures: 3, ..settings() };
    let fetcher = fetcher(&settings, &pool()).leaving_failing_hosts_alone(&settings, "last");
    for _ in 0..3 {
        let failed = fetcher.fetch(&ImageRef::Http(url.clone()), None).await.unwrap_err();
        assert!(matches!(failed.error, FetchError::Connect(_)), "{failed}");
    }
    let failed = fetcher.fetch(&ImageRef::Http(url), None).await.unwrap_err();
    assert!(matches!(failed.error, FetchError::LeftAlone { .. }), "{failed}");
    assert_eq!(server.seen().requests("/a.png"), 3);
}
