//! Bodies that were fetched before, as far as their hosts let a shared cache keep them (RFC 9111, by the crate
//! `http-cache-semantics`): bounded in bytes, those that are asked for again kept longest (S3-FIFO, in `quick_cache`).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use http::header::{AGE, CACHE_CONTROL, DATE, ETAG, EXPIRES, LAST_MODIFIED, PRAGMA, SET_COOKIE, VARY};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use http_cache_semantics::{AfterResponse, BeforeRequest, CacheOptions, CachePolicy, RequestLike, ResponseLike};
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};
use reqwest::{Response, StatusCode};
use url::Url;

/// Bytes that an entry takes beside its body and headers, estimated: two maps of headers, the structures, its place.
const ENTRY: usize = 1024;
/// Most bytes of headers that say how an answer may be kept; one with more is not.
const MAX_HEADERS: usize = 4 * 1024;
/// A usual image, to size the table.
const USUAL: u64 = 64 * 1024;
/// Parts of the memory, each locked by itself; each has room for half as many of the largest bodies at least.
const LARGEST_A_PART: u64 = 4;
const MOST_PARTS: u64 = 64;

/// How an answer may be kept.
#[derive(Debug)]
pub(super) struct Policy {
    rules: CachePolicy,
    /// What its host can be asked about it with.
    validators: HeaderMap,
    /// Bytes of its headers.
    headers: usize,
}

/// A body and what its host said of it.
#[derive(Debug)]
pub(super) struct Entry {
    policy: Policy,
    body: Bytes,
}

#[derive(Debug, Clone)]
struct Weight;

impl Weighter<Url, Arc<Entry>> for Weight {
    fn weight(&self, url: &Url, entry: &Arc<Entry>) -> u64 {
        (ENTRY + 2 * url.as_str().len() + 2 * entry.policy.headers + entry.body.len()) as u64
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
    /// Room for about so many bytes; a body has `largest` at most.
    pub(super) fn new(bytes: u64, largest: u64) -> Self {
        let usual = usize::try_from(bytes / USUAL).unwrap_or(usize::MAX).max(1);
        let parts = (bytes / LARGEST_A_PART.saturating_mul(largest).max(1)).clamp(1, MOST_PARTS);
        let mut options = OptionsBuilder::new();
        options.estimated_items_capacity(usual).weight_capacity(bytes).shards(parts as usize);
        let options = options.build().ok().filter(|_| bytes > 0);
        Self(options.map(|options| {
            Cache::with_options(options, Weight, DefaultHashBuilder::default(), DefaultLifecycle::default())
        }))
    }

    /// Whether anything is kept at all.
    pub(super) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// What is known of an address, for a request with these headers.
    pub(super) fn of(&self, url: &Url, request: &HeaderMap) -> Known {
        let Some(entry) = self.0.as_ref().and_then(|kept| kept.get(url)) else { return Known::Nothing };
        match guarded(|| entry.policy.rules.before_request(&Question(request), SystemTime::now())) {
            Some(BeforeRequest::Fresh(_)) => Known::Fresh(entry.body.clone()),
            Some(BeforeRequest::Stale { request, matches: true }) => Known::Stale(request.headers, entry),
            // The host varies its answers by a header that was another one.
            Some(BeforeRequest::Stale { .. }) | None => Known::Nothing,
        }
    }

    /// The body of an address, if it has this length.
    pub(super) fn body(&self, url: &Url, length: usize) -> Option<Bytes> {
        let entry = self.0.as_ref()?.get(url)?;
        (entry.body.len() == length).then(|| entry.body.clone())
    }

    /// The body whose host answers that it is still right; `None`, and it is forgotten, where the answer speaks of
    /// another one.
    pub(super) fn confirmed(&self, url: &Url, entry: &Entry, request: &HeaderMap, answer: &Response) -> Option<Bytes> {
        let kept = self.0.as_ref()?;
        let after = Answer::of(answer).and_then(|(mut answer, headers)| {
            // It was asked about this body and no other, so an answer that names none means it.
            if answer.validators().is_empty() {
                answer.headers.extend(entry.policy.validators.clone());
            }
            let after = guarded(|| entry.policy.rules.after_response(&Question(request), &answer, SystemTime::now()))?;
            Some((after, headers))
        });
        let Some((AfterResponse::NotModified(rules, _), headers)) = after else {
            kept.remove(url);
            return None;
        };
        let headers = headers.max(entry.policy.headers);
        let policy = Policy { rules, validators: entry.policy.validators.clone(), headers };
        self.keep(url, policy, entry.body.clone());
        Some(entry.body.clone())
    }

    /// How an answer may be kept; `None` where it may not, or where that would be of no use.
    pub(super) fn policy(&self, request: &HeaderMap, answer: &Response) -> Option<Policy> {
        if !self.is_on() || answer.status() != StatusCode::OK {
            return None;
        }
        let (answer, headers) = Answer::of(answer)?;
        let validators = answer.validators();
        guarded(|| {
            let now = SystemTime::now();
            let rules = CachePolicy::new_options(&Question(request), &answer, now, CacheOptions::default());
            let useful = rules.is_storable() && (!validators.is_empty() || !rules.is_stale(now));
            useful.then_some(Policy { rules, validators, headers })
        })?
    }

    /// Keeps a body.
    pub(super) fn keep(&self, url: &Url, policy: Policy, body: Bytes) {
        if let Some(kept) = &self.0 {
            kept.insert(url.clone(), Arc::new(Entry { policy, body }));
        }
    }
}

/// The crate computes with numbers of strangers, and may panic on absurd ones; such an answer is not kept.
fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}

/// The headers of a request, which are all that the crate has to know of it: entries are found by their address.
struct Question<'a>(&'a HeaderMap);

impl RequestLike for Question<'_> {
    fn uri(&self) -> Uri {
        Uri::default()
    }

    fn is_same_uri(&self, _: &Uri) -> bool {
        true
    }

    fn method(&self) -> &Method {
        &Method::GET
    }

    fn headers(&self) -> &HeaderMap {
        self.0
    }
}

/// An answer for the crate: copies of the headers that matter to it. Those of the client hold on to all that was read with them.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
}

impl Answer {
    /// And the bytes of its headers; `None` where there are too many.
    fn of(answer: &Response) -> Option<(Self, usize)> {
        const READ: [HeaderName; 8] = [AGE, CACHE_CONTROL, DATE, ETAG, EXPIRES, LAST_MODIFIED, PRAGMA, VARY];
        let (mut headers, mut bytes) = (HeaderMap::new(), 0);
        for name in READ {
            for value in answer.headers().get_all(&name) {
                bytes += name.as_str().len() + value.len();
                if bytes > MAX_HEADERS {
                    return None;
                }
                // An age that is none would make it overflow.
                let absurd = name == AGE && value.to_str().ok().is_none_or(|age| age.trim().parse::<u32>().is_err());
                if !absurd {
                    headers.append(&name, HeaderValue::from_bytes(value.as_bytes()).ok()?);
                }
            }
        }
        if answer.headers().contains_key(SET_COOKIE) {
            // That there is one counts, not what it says.
            headers.insert(SET_COOKIE, HeaderValue::from_static("some"));
        }
        Some((Self { status: answer.status(), headers }, bytes))
    }

    /// The headers by which a body can be asked about.
    fn validators(&self) -> HeaderMap {
        let found = |name: HeaderName| self.headers.get(&name).cloned().map(|value| (name, value));
        [ETAG, LAST_MODIFIED].into_iter().filter_map(found).collect()
    }
}

impl ResponseLike for Answer {
    fn status(&self) -> StatusCode {
        self.status
    }

    fn headers(&self) -> &HeaderMap {
        &self.headers
    }
}
