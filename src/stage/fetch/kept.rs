//! Bodies that were fetched before, as far as their hosts let a shared cache keep them (RFC 9111, by the crate
//! `http-cache-semantics`): bounded in bytes, those that are asked for again kept longest (S3-FIFO, in `quick_cache`).

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use http::{Method, Uri};
use http_cache_semantics::{AfterResponse, BeforeRequest, CacheOptions, CachePolicy, RequestLike, ResponseLike};
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use reqwest::header::{ETAG, HeaderMap, LAST_MODIFIED};
use reqwest::{Request, Response, StatusCode};
use url::Url;

/// Bytes that an entry takes beside its body, estimated: the headers of the question and of the answer.
const ENTRY: usize = 2048;
/// A usual image, to size the table.
const USUAL: u64 = 64 * 1024;

/// A body and what its host said of it.
#[derive(Debug)]
pub(super) struct Entry {
    policy: CachePolicy,
    body: Bytes,
}

#[derive(Debug, Clone)]
struct Weight;

impl Weighter<Url, Arc<Entry>> for Weight {
    fn weight(&self, url: &Url, entry: &Arc<Entry>) -> u64 {
        (ENTRY + url.as_str().len() + entry.body.len()) as u64
    }
}

/// What is kept of an address.
pub(super) enum Known {
    /// As good as new.
    Fresh(Bytes),
    /// The host is to be asked, with these headers, whether it is still right.
    Stale(HeaderMap, Arc<Entry>),
    Nothing,
}

/// The bodies. With no room it keeps none, and knows nothing.
#[derive(Debug)]
pub(super) struct Kept(Option<Cache<Url, Arc<Entry>, Weight>>);

impl Kept {
    /// Room for about so many bytes.
    pub(super) fn new(bytes: u64) -> Self {
        let usual = usize::try_from(bytes / USUAL).unwrap_or(usize::MAX).max(16);
        Self((bytes > 0).then(|| Cache::with_weighter(usual, bytes, Weight)))
    }

    /// Whether anything is kept at all.
    pub(super) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// What is known of an address, for a request of it.
    pub(super) fn of(&self, url: &Url, request: &Request) -> Known {
        let Some(entry) = self.0.as_ref().and_then(|kept| kept.get(url)) else { return Known::Nothing };
        match entry.policy.before_request(&Question(request), SystemTime::now()) {
            BeforeRequest::Fresh(_) => Known::Fresh(entry.body.clone()),
            BeforeRequest::Stale { request, matches: true } => Known::Stale(request.headers, entry),
            // The host varies its answers by a header that was another one.
            BeforeRequest::Stale { .. } => Known::Nothing,
        }
    }

    /// The body whose host answers that it is still right; `None`, and it is forgotten, where the answer speaks of
    /// another one.
    pub(super) fn confirmed(&self, url: &Url, entry: &Entry, request: &Request, answer: &Response) -> Option<Bytes> {
        let kept = self.0.as_ref()?;
        let after = entry.policy.after_response(&Question(request), &Answer(answer), SystemTime::now());
        let AfterResponse::NotModified(policy, _) = after else {
            kept.remove(url);
            return None;
        };
        let body = entry.body.clone();
        kept.insert(url.clone(), Arc::new(Entry { policy, body: body.clone() }));
        Some(body)
    }

    /// How an answer may be kept; `None` where it may not, or where that would be of no use.
    pub(super) fn policy(&self, request: &Request, answer: &Response) -> Option<CachePolicy> {
        let now = SystemTime::now();
        if !self.is_on() || answer.status() != StatusCode::OK {
            return None;
        }
        let policy = CachePolicy::new_options(&Question(request), &Answer(answer), now, CacheOptions::default());
        let can_be_asked_about = [ETAG, LAST_MODIFIED].iter().any(|name| answer.headers().contains_key(name));
        (policy.is_storable() && (can_be_asked_about || !policy.is_stale(now))).then_some(policy)
    }

    /// Keeps a body.
    pub(super) fn keep(&self, url: &Url, policy: CachePolicy, body: Bytes) {
        if let Some(kept) = &self.0 {
            kept.insert(url.clone(), Arc::new(Entry { policy, body }));
        }
    }
}

/// A request for the crate, which only has to know its method and headers: entries are found by their address.
struct Question<'a>(&'a Request);

impl RequestLike for Question<'_> {
    fn uri(&self) -> Uri {
        Uri::default()
    }

    fn is_same_uri(&self, _: &Uri) -> bool {
        true
    }

    fn method(&self) -> &Method {
        self.0.method()
    }

    fn headers(&self) -> &HeaderMap {
        self.0.headers()
    }
}

struct Answer<'a>(&'a Response);

impl ResponseLike for Answer<'_> {
    fn status(&self) -> StatusCode {
        self.0.status()
    }

    fn headers(&self) -> &HeaderMap {
        self.0.headers()
    }
}
