//! Who is reached, who is trusted, and what is told of it.

use std::time::Duration;

use blipstream::disposition::{Code, Disposed};
use blipstream::stage::fetch::FetchError;
use url::Url;

use super::support::images::{Answer, ImageServer, png};
use super::support::tls::{SELF_SIGNED, tls_server};
use super::{failure_of, settings};

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
async fn a_certificate_that_nobody_signed_is_refused_for_good() {
    let url = Url::parse(&format!("https://localhost:{}/x", tls_server(SELF_SIGNED).port())).unwrap();
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
