//! One try over HTTP: every hop checked, every wait bounded, every byte counted.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode};
use tokio::time::{Instant, timeout};
use url::Url;

use super::FetchError;
use super::address::{Guard, GuardedResolver};
use super::host::Hosts;
use super::intake::{Buffer, Intake};
use crate::budget::Permit;
use crate::metrics::{Metrics, ResponseClass};
use crate::settings;

/// What the decoder reads; hosts that negotiate would otherwise send their newest format.
const ACCEPTED: &str = "image/jpeg, image/png, image/webp, image/gif, image/bmp, image/tiff, image/*;q=0.5, */*;q=0.1";

/// Idle connections are closed after this long: images come from very many hosts, and each one is an open socket.
const IDLE_CONNECTION: Duration = Duration::from_secs(5);

/// What an HTTP/2 host may send ahead of being read, for one body and for one connection. These bytes arrive before
/// their permit, so they are kept few; a window of this size still fills 20 Mbit/s over a round trip of 100 ms.
const HTTP2_STREAM_WINDOW: u32 = 256 * 1024;
const HTTP2_CONNECTION_WINDOW: u32 = 1024 * 1024;

/// Longest header list of an HTTP/2 answer.
const HTTP2_MAX_HEADERS: u32 = 64 * 1024;

/// The HTTP side of the fetcher.
#[derive(Debug)]
pub struct Http {
    client: Client,
    guard: Guard,
    limits: Limits,
}

/// How long each part of one try may take, and how far it may lead.
#[derive(Debug, Clone, Copy)]
struct Limits {
    connect: Duration,
    read: Duration,
    total: Duration,
    redirects: usize,
}

/// What a try uses beside the client.
pub struct Means<'a> {
    /// Slots.
    pub hosts: &'a Hosts,
    /// Room for the body.
    pub intake: &'a Intake,
    /// Who counts.
    pub metrics: &'a Metrics,
    /// Asked when it is the try's turn: whether to go on, or to give up for now ([`FetchError::Halted`]).
    pub may_begin: &'a (dyn Fn() -> bool + Sync),
}

impl Http {
    /// A client that goes where the guard lets it, follows nothing by itself and takes nothing from the environment.
    pub fn new(settings: &settings::Fetch) -> Result<Self, reqwest::Error> {
        // Fails where a provider is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let guard = Guard::new(&settings.allow_networks);
        let client = Client::builder()
            .user_agent(&settings.user_agent)
            .default_headers(HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(ACCEPTED))]))
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .dns_resolver(Arc::new(GuardedResolver(guard.clone())))
            .connect_timeout(settings.connect_timeout)
            .pool_idle_timeout(IDLE_CONNECTION)
            .pool_max_idle_per_host(settings.per_host)
            .http2_initial_stream_window_size(HTTP2_STREAM_WINDOW)
            .http2_initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
            .http2_max_header_list_size(HTTP2_MAX_HEADERS)
            .build()?;
        let limits = Limits {
            connect: settings.connect_timeout,
            read: settings.read_timeout,
            total: settings.total_timeout,
            redirects: settings.max_redirects,
        };
        Ok(Self { client, guard, limits })
    }

    /// One try: follows redirects to a body and reads it. Each hop takes a slot of its own host.
    ///
    /// A body that breaks after it had to wait for room is asked for once more, with the room in hand: the host may
    /// have given up on a reader that did not read, and that is not its fault.
    pub async fn get(&self, url: &Url, means: &Means<'_>) -> Result<(Bytes, Permit), FetchError> {
        let mut clock = Clock::new(self.limits);
        let mut target = url.clone();
        for _ in 0..=self.limits.redirects {
            // Before the slot: a blocked address needs none.
            self.guard.check_url(&target)?;
            // Kept while a body is asked for again: whoever waited for a slot with room in hand would wait for those
            // who have a slot and wait for room.
            let _slot = means.hosts.acquire(target.host_str().unwrap_or_default()).await;
            // After the slot, for which it may have waited long.
            if !(means.may_begin)() {
                return Err(FetchError::Halted);
            }
            let mut room = None;
            target = loop {
                let response = self.answer(&target, &mut clock, means.metrics).await?;
                if let Some(next) = redirect(&response, &target, url)? {
                    break next;
                }
                match self.body(response, &mut clock, room.take(), means).await? {
                    Body::Whole(body, permit) => return Ok((body, permit)),
                    Body::Broken(permit, error) => {
                        let host = target.host_str();
                        tracing::debug!(host, %error, "a body broke after it had waited for room; it is asked for again");
                        room = Some(permit);
                        clock = Clock::new(self.limits);
                    }
                }
            };
        }
        Err(FetchError::Redirect(format!("more than {}, the limit of fetch.max_redirects", self.limits.redirects)))
    }

    /// The head of the answer of one hop.
    async fn answer(&self, url: &Url, clock: &mut Clock, metrics: &Metrics) -> Result<Response, FetchError> {
        let sent = self.client.get(url.clone()).send();
        let response = match clock.bound(clock.head(), sent).await.and_then(|sent| sent.map_err(|e| self.error(&e))) {
            Ok(response) => response,
            Err(error) => {
                metrics.response(ResponseClass::None);
                return Err(error);
            }
        };
        metrics.response(ResponseClass::of(response.status()));
        let peer = response.remote_addr().ok_or_else(|| FetchError::Connect("its peer is unknown".into()))?;
        self.guard.check(peer.ip())?;
        Ok(response)
    }

    /// Reads a body, into `room` if there is some that it fits into.
    async fn body(
        &self,
        response: Response,
        clock: &mut Clock,
        room: Option<Permit>,
        means: &Means<'_>,
    ) -> Result<Body, FetchError> {
        let intake = means.intake;
        let declared = response.content_length().map(|length| usize::try_from(length).unwrap_or(usize::MAX));
        match declared {
            Some(0) => return Err(FetchError::Empty),
            Some(length) if length > intake.max_body => return Err(FetchError::TooLarge { limit: intake.max_body }),
            _ => {}
        }
        // What is too small goes back first: who waits for room holds none.
        let room = room.filter(|permit| permit.bytes() >= intake.needed(declared));
        let (permit, waited) = match room.or_else(|| intake.try_reserve(declared)) {
            Some(permit) => (permit, false),
            // Outside the clock: that the worker is busy is not the host's fault.
            None => (intake.reserve(declared).await, true),
        };
        match self.read(response, clock, intake.buffer(declared), means.metrics).await {
            Ok(buffer) => intake.settle(buffer, permit).map(|(body, permit)| Body::Whole(body, permit)),
            Err(error @ (FetchError::Connect(_) | FetchError::Timeout { .. })) if waited => {
                Ok(Body::Broken(permit, error))
            }
            Err(error) => Err(error),
        }
    }

    async fn read(
        &self,
        mut response: Response,
        clock: &mut Clock,
        mut buffer: Buffer,
        metrics: &Metrics,
    ) -> Result<Buffer, FetchError> {
        while let Some(piece) = clock.bound(clock.read(), response.chunk()).await?.map_err(|e| self.error(&e))? {
            metrics.fetched_bytes(piece.len());
            buffer.push(&piece)?;
        }
        Ok(buffer)
    }

    fn error(&self, error: &reqwest::Error) -> FetchError {
        FetchError::from_client(error, self.limits.connect)
    }
}

/// What came of reading a body.
enum Body {
    Whole(Bytes, Permit),
    /// It had to wait for room, which it has now, and then it broke.
    Broken(Permit, FetchError),
}

/// The time a try has left. It runs only while the host is waited for.
struct Clock {
    limits: Limits,
    left: Duration,
}

impl Clock {
    fn new(limits: Limits) -> Self {
        Self { limits, left: limits.total }
    }

    /// Bound of the wait for a head: a connection, then one read.
    fn head(&self) -> (Duration, &'static str) {
        (self.limits.connect.saturating_add(self.limits.read), "fetch.connect_timeout and fetch.read_timeout")
    }

    fn read(&self) -> (Duration, &'static str) {
        (self.limits.read, "fetch.read_timeout")
    }

    async fn bound<T>(
        &mut self,
        (idle, setting): (Duration, &'static str),
        work: impl Future<Output = T>,
    ) -> Result<T, FetchError> {
        let started = Instant::now();
        let result = timeout(idle.min(self.left), work).await;
        let late = if idle <= self.left {
            FetchError::Timeout { setting, limit: idle }
        } else {
            FetchError::Timeout { setting: "fetch.total_timeout", limit: self.limits.total }
        };
        self.left = self.left.saturating_sub(started.elapsed());
        result.map_err(|_| late)
    }
}

/// Where an answer leads: nowhere else if it is a body, or to another address; everything but those is an error.
fn redirect(response: &Response, here: &Url, first: &Url) -> Result<Option<Url>, FetchError> {
    let status = response.status();
    if status.is_success() {
        return Ok(None);
    }
    if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Err(FetchError::Status { status, retry_after: retry_after(response, Timestamp::now()) });
    }
    let location = response.headers().get(LOCATION).ok_or_else(|| FetchError::Redirect("no Location".into()))?;
    let location = std::str::from_utf8(location.as_bytes()).ok();
    let location = location.ok_or_else(|| FetchError::Redirect("the Location is not text".into()))?;
    next_hop(here, first, location).map(Some)
}

/// The address that `location` names, seen from `here`. Like curl, a redirect may lead from https to http. User-info
/// goes along only to the origin (scheme, host, port) that it was written for, and none is taken from a host.
fn next_hop(here: &Url, first: &Url, location: &str) -> Result<Url, FetchError> {
    let mut next = here.join(location).map_err(|error| FetchError::Redirect(format!("a bad Location: {error}")))?;
    if !matches!(next.scheme(), "http" | "https") {
        return Err(FetchError::BlockedScheme(next.scheme().chars().take(20).collect()));
    }
    let (name, password) =
        if next.origin() == first.origin() { (first.username(), first.password()) } else { ("", None) };
    // These fail only for URLs without a host, which http URLs have.
    let _ = next.set_username(name);
    let _ = next.set_password(password);
    Ok(next)
}

/// The wait that a host asks for, in seconds or until a date (RFC 9110, 10.2.3).
fn retry_after(response: &Response, now: Timestamp) -> Option<Duration> {
    parse_retry_after(response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim(), now)
}

fn parse_retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(value).ok()?;
    Some(Duration::try_from(date.duration_since(now)).unwrap_or_default())
}

impl ResponseClass {
    fn of(status: StatusCode) -> Self {
        match status.as_u16() / 100 {
            2 => Self::Success,
            3 => Self::Redirect,
            4 => Self::ClientError,
            5 => Self::ServerError,
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn user_info_goes_only_where_it_was_written_for() {
        let first = url("https://user:pw@a.example/x?y");
        let hop = |here: &str, location: &str| next_hop(&url(here), &first, location).unwrap().to_string();
        assert_eq!(hop("https://user:pw@a.example/x", "/z"), "https://user:pw@a.example/z");
        assert_eq!(hop("https://user:pw@a.example/x", "https://b.example/"), "https://b.example/");
        assert_eq!(hop("https://user:pw@a.example/x", "http://a.example/"), "http://a.example/");
        assert_eq!(hop("https://user:pw@a.example/x", "//a.example:444/"), "https://a.example:444/");
        assert_eq!(hop("https://user:pw@a.example/x", "https://eve:1@b.example/"), "https://b.example/");
        assert_eq!(hop("https://b.example/", "https://a.example/q"), "https://user:pw@a.example/q");
    }

    #[test]
    fn a_redirect_to_another_scheme_is_refused() {
        let here = url("https://a.example/");
        for location in ["file:///etc/passwd", "ftp://a.example/", "data:,x", "gopher://a"] {
            let error = next_hop(&here, &here, location).unwrap_err();
            assert!(matches!(error, FetchError::BlockedScheme(_)), "{location}");
        }
        assert!(matches!(next_hop(&here, &here, "http://[bad"), Err(FetchError::Redirect(_))));
    }

    #[test]
    fn retry_after_is_read_in_both_its_forms() {
        let now: Timestamp = "2026-11-06T08:49:00Z".parse().unwrap();
        for (value, wait) in [
            ("0", Some(0)),
            ("120", Some(120)),
            ("Fri, 06 Nov 2026 08:49:37 GMT", Some(37)),
            ("Fri, 06 Nov 2026 08:48:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
            ("", None),
        ] {
            assert_eq!(parse_retry_after(value, now), wait.map(Duration::from_secs), "{value:?}");
        }
    }

    #[tokio::test]
    async fn a_peer_that_is_not_public_is_refused_however_it_was_reached() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = url(&format!("http://{}/", listener.local_addr().unwrap()));
        let (http, metrics) = (Http::new(&settings::Fetch::default()).unwrap(), Metrics::new());
        let mut clock = Clock::new(http.limits);
        // Neither the URL nor a name is looked at here: the peer's address alone has to stop it.
        let host = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1000]).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx").await.unwrap();
            stream
        };
        let (result, _stream) = tokio::join!(http.answer(&target, &mut clock, &metrics), host);
        assert!(matches!(result, Err(FetchError::Blocked(_))), "{result:?}");
    }
}
