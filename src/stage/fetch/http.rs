//! One try over HTTP: every hop checked, every wait bounded, every byte counted.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};
use reqwest::{Client, Request, Response, StatusCode};
use url::Url;

use super::FetchError;
use super::answer::{leads_to, may_be_used};
use super::body::{Body, Incoming};
use super::clock::{Clock, Limits};
use super::guard::{Guard, GuardedResolver};
use super::host::Hosts;
use super::intake::Intake;
use super::kept::{Kept, Known, Policy};
use crate::budget::Permit;
use crate::metrics::{FetchCache, Metrics, ResponseClass};
use crate::settings;

/// What the decoder reads; hosts that negotiate would otherwise send their newest format.
const ACCEPTED: &str = "image/jpeg, image/png, image/webp, image/gif, image/bmp, image/tiff, image/*;q=0.5, */*;q=0.1";

/// Idle connections are closed after this long: images come from very many hosts, and each one is an open socket.
pub(super) const IDLE_CONNECTION: Duration = Duration::from_secs(5);

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
    /// Whether owners' wishes are kept to.
    robots: bool,
    kept: Kept,
}

/// What a try uses beside the client.
pub struct Means<'a> {
    /// Slots.
    pub hosts: &'a Hosts,
    /// Room for the body.
    pub intake: &'a Intake,
    /// Who counts.
    pub metrics: &'a Metrics,
    /// Asked with each host when it is its turn: whether to go on, or to give up for now ([`FetchError::Halted`],
    /// [`FetchError::LeftAlone`]).
    pub may_begin: &'a (dyn Fn(&str) -> Result<(), FetchError> + Sync),
}

impl Http {
    /// A client that goes where the guard lets it, follows nothing by itself and takes nothing from the environment.
    pub fn new(settings: &settings::Fetch) -> Result<Self, reqwest::Error> {
        // Fails where a provider is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let guard = Guard::new(settings);
        let mut client = Client::builder()
            .user_agent(user_agent(settings))
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
            .http2_max_header_list_size(HTTP2_MAX_HEADERS);
        if let Some(proxy) = &settings.proxy {
            client = client.proxy(reqwest::Proxy::all(proxy.clone())?);
        }
        let kept = Kept::new(settings.cache.as_u64(), settings.max_body.as_u64());
        Ok(Self { client: client.build()?, guard, limits: Limits::of(settings), robots: settings.robots_tag, kept })
    }

    /// One try: follows redirects to a body and reads it. Each hop takes a slot of its own host.
    ///
    /// A body that breaks after it had to wait for room is asked for once more, with the room in hand: the host may
    /// have given up on a reader that did not read, and that is not its fault.
    pub async fn get(&self, url: &Url, means: &Means<'_>) -> Result<(Bytes, Permit), FetchError> {
        let mut clock = Clock::new(self.limits);
        let mut target = url.clone();
        for hop in 0..=self.limits.redirects {
            // Before the slot: a blocked address needs none, and neither does a body that is there.
            self.guard.check_url(&target)?;
            if hop > 0
                && let Some(kept) = self.fresh(&target, means.intake, means.metrics).await
            {
                return Ok(kept);
            }
            // Kept while a body is asked for again: whoever waited for a slot with room in hand would wait for those
            // who have a slot and wait for room.
            let host = target.host_str().unwrap_or_default();
            let _slot = means.hosts.acquire(host).await;
            // After the slot, for which it may have waited long.
            (means.may_begin)(host)?;
            clock.bound(clock.head(), self.guard.check_name(&target)).await??;
            let mut room = None;
            target = loop {
                let mut request = self.request(&target)?;
                let known = self.kept.of(&target, request.headers());
                if let Known::Stale(headers, _) = &known {
                    request.headers_mut().clone_from(headers);
                }
                let asked = request.headers().clone();
                let response = self.answer(request, &mut clock, means.metrics).await?;
                if let Known::Stale(_, entry) = known
                    && response.status() == StatusCode::NOT_MODIFIED
                {
                    may_be_used(response.headers(), self.robots)?;
                    let Some(body) = self.kept.confirmed(&target, &entry, &asked, &response) else { continue };
                    drop(entry);
                    match self.admit(body, &target, room.take(), means).await {
                        Ok(confirmed) => return Ok(confirmed),
                        Err(permit) => {
                            room = Some(permit);
                            clock.restart();
                            continue;
                        }
                    }
                }
                if let Some(next) = leads_to(&response, &target, url, self.robots)? {
                    break next;
                }
                let policy = self.kept.policy(&asked, &response);
                match self.incoming(response).read(&mut clock, room.take(), means).await? {
                    Body::Whole(body, permit) => {
                        self.remember(&target, policy, &body, means.metrics);
                        return Ok((body, permit));
                    }
                    Body::Broken(permit, error) => {
                        let host = target.host_str();
                        tracing::debug!(host, %error, "a body broke after it had waited for room; it is asked for again");
                        room = Some(permit);
                        clock.restart();
                    }
                }
            };
        }
        Err(FetchError::Redirect(format!("more than {}, the limit of fetch.max_redirects", self.limits.redirects)))
    }

    /// A body of which its host has just said that it is still right, and room for it. Whoever waits for room holds no body, so
    /// it may be gone by then: the room, in which it may be fetched anew.
    async fn admit(
        &self,
        body: Bytes,
        url: &Url,
        room: Option<Permit>,
        means: &Means<'_>,
    ) -> Result<(Bytes, Permit), Permit> {
        let length = body.len();
        let (body, permit) = if let Some(permit) = means.intake.fitting(length, room) {
            (Some(body), permit)
        } else {
            drop(body);
            let permit = means.intake.reserve(Some(length)).await;
            (self.kept.body(url, length), permit)
        };
        let Some(body) = body else { return Err(permit) };
        means.metrics.fetch_looked_up(FetchCache::Confirmed);
        Ok((body, permit))
    }

    /// A body that was fetched before and is as good as new, so that nobody is asked for it. It is looked up once more when there
    /// is room: whoever waits holds none.
    pub async fn fresh(&self, url: &Url, intake: &Intake, metrics: &Metrics) -> Option<(Bytes, Permit)> {
        let look_up = || match self.kept.of(url, self.request(url).ok()?.headers()) {
            Known::Fresh(body) => Some(body),
            Known::Stale(..) | Known::Nothing => None,
        };
        if !self.kept.is_on() {
            return None;
        }
        let length = look_up()?.len();
        let permit = intake.reserve(Some(length)).await;
        let body = look_up().filter(|body| body.len() == length)?;
        metrics.fetch_looked_up(FetchCache::Fresh);
        Some((body, permit))
    }

    fn request(&self, url: &Url) -> Result<Request, FetchError> {
        self.client.get(url.clone()).build().map_err(|error| self.error(&error))
    }

    fn remember(&self, url: &Url, policy: Option<Policy>, body: &Bytes, metrics: &Metrics) {
        if self.kept.is_on() {
            metrics.fetch_looked_up(FetchCache::Missed);
        }
        if let Some(policy) = policy {
            self.kept.keep(url, policy, body.clone());
        }
    }

    /// The head of the answer of one hop.
    async fn answer(&self, request: Request, clock: &mut Clock, metrics: &Metrics) -> Result<Response, FetchError> {
        let sent = self.client.execute(request);
        let response = match clock.bound(clock.head(), sent).await.and_then(|sent| sent.map_err(|e| self.error(&e))) {
            Ok(response) => response,
            Err(error) => {
                metrics.response(ResponseClass::None);
                return Err(error);
            }
        };
        metrics.response(ResponseClass::of(response.status()));
        let peer = response.remote_addr().ok_or_else(|| FetchError::Connect("its peer is unknown".into()))?;
        self.guard.check_peer(peer.ip())?;
        Ok(response)
    }

    fn incoming(&self, response: Response) -> Incoming {
        let length = response.content_length().map(|length| usize::try_from(length).unwrap_or(usize::MAX));
        let connect = self.limits.connect;
        let pieces = response.bytes_stream().map(move |piece| piece.map_err(|e| FetchError::from_client(&e, connect)));
        Incoming { length, pieces: pieces.boxed() }
    }

    fn error(&self, error: &reqwest::Error) -> FetchError {
        FetchError::from_client(error, self.limits.connect)
    }
}

/// `blipstream/0.1.0 (+contact)`: who asks, and whom to write to.
pub(super) fn user_agent(settings: &settings::Fetch) -> String {
    let settings::Fetch { user_agent, contact, .. } = settings;
    contact.as_ref().map_or_else(|| user_agent.clone(), |contact| format!("{user_agent} (+{contact})"))
}

impl ResponseClass {
    pub(super) fn of(status: StatusCode) -> Self {
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
    use super::super::guard::Refused;
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
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
        let (result, _stream) = tokio::join!(http.answer(http.request(&target).unwrap(), &mut clock, &metrics), host);
        assert!(matches!(result, Err(FetchError::Blocked(Refused::NotPublic(_)))), "{result:?}");
    }
}
