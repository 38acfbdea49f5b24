//! The tries of one fetch: when the next one is made, and when there is none.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use jiff::Timestamp;

use super::breaker::LeftAlone;
use super::hold::{After, Watch};
use super::http::Means;
use super::local::{self, Encoding};
use super::{FILES, FailedFetch, FetchError, Fetcher, describe};
use crate::budget::Permit;
use crate::disposition::{Disposed, Disposition, Stage};
use crate::message::ImageRef;

/// What is to be fetched, and what is known about who wants it.
#[derive(Clone, Copy)]
pub(super) struct Order<'a> {
    pub(super) reference: &'a ImageRef,
    /// Bounds everything, the waits for slots and permits included.
    pub(super) deadline: Option<Instant>,
    /// The look-out for outages, where somebody keeps one.
    pub(super) watch: Option<&'a Watch<'a>>,
    /// Whether a host that is left alone lets it be put off.
    pub(super) may_put_off: bool,
}

/// What became of the tries so far.
#[derive(Debug, Default)]
struct Tries {
    made: u32,
    first_failed_at: Option<Timestamp>,
    last: Option<FetchError>,
}

impl Fetcher {
    /// Tries until it is done, or is given up.
    pub(super) async fn fetch_alone(&self, order: Order<'_>) -> Result<(Bytes, Permit), FailedFetch> {
        let started = Instant::now();
        let mut tries = Tries::default();
        let result = if order.deadline.is_some_and(|deadline| deadline <= started) {
            Err(FetchError::Deadline(None))
        } else {
            let work = async {
                // Before the look-out and the breaker: it tells them nothing.
                if let ImageRef::Http(url) = order.reference
                    && let Some(kept) = self.http.fresh(url, &self.intake, &self.metrics).await
                {
                    return Ok(kept);
                }
                self.try_until_done(order, &mut tries).await
            };
            let bounded = within(order.deadline, work).await;
            bounded.unwrap_or_else(|| Err(FetchError::Deadline(tries.last.take().map(Box::new))))
        };
        self.metrics.stage(Stage::Fetch, started.elapsed());
        match result {
            Ok(done) => Ok(done),
            Err(error) => Err(FailedFetch {
                reference: describe(order.reference),
                error,
                attempts: tries.made,
                first_failed_at: tries.first_failed_at.unwrap_or_else(Timestamp::now),
            }),
        }
    }

    async fn try_until_done(&self, order: Order<'_>, tries: &mut Tries) -> Result<(Bytes, Permit), FetchError> {
        let Order { reference, deadline, watch, may_put_off } = order;
        // Tries since it was held last: those of an outage are not the host's fault.
        let mut in_a_row = 0;
        loop {
            let probe = match watch {
                Some(watch) => watch.turn().await?,
                None => None,
            };
            // A probe of an outage asks hosts whatever they did in it.
            let may_be_refused = probe.is_none() && may_put_off;
            if may_be_refused
                && let Some(host) = reference.host()
                && let Err(error) = self.may_ask(&host)
            {
                in_a_row = 0;
                match refused(watch, &host, error) {
                    Some(error) => return Err(error),
                    None => continue,
                }
            }
            tries.made += 1;
            in_a_row += 1;
            let asked = Mutex::default();
            let may_begin = |host: &str| {
                if probe.is_none() && !watch.is_none_or(Watch::may_begin) {
                    return Err(FetchError::Halted);
                }
                // The one that says no is the last one, too.
                lock(&asked).push(host.to_owned());
                if may_be_refused { self.may_ask(host) } else { Ok(()) }
            };
            let result = self.try_once(reference, &may_begin).await;
            let asked: Vec<String> = std::mem::take(&mut *lock(&asked));
            let result = match result {
                Err(FetchError::Halted) => {
                    tries.made -= u32::from(asked.is_empty());
                    in_a_row = 0;
                    continue;
                }
                // By a host that another one led to, or since a moment ago.
                Err(error @ FetchError::LeftAlone { .. }) => {
                    tries.made -= u32::from(asked.len() == 1);
                    in_a_row = 0;
                    self.answered_before(&asked);
                    match refused(watch, asked.last().map_or("", String::as_str), error) {
                        Some(error) => return Err(error),
                        None => continue,
                    }
                }
                other => other,
            };
            let at = asked.last().filter(|_| result.is_err()).map(String::as_str);
            let after = watch.map_or(After::AsEver, |watch| watch.ended(probe, at, &result));
            let left_alone = after == After::AsEver && self.note(&asked, &result);
            let error = match result {
                Ok(done) => return Ok(done),
                Err(error) if left_alone => return Err(error),
                Err(error) => error,
            };
            tries.first_failed_at.get_or_insert_with(Timestamp::now);
            match after {
                After::AsEver => {}
                After::LetGo => return Err(error),
                After::Hold => {
                    self.metrics.retried(Stage::Fetch, error.code());
                    tries.last = Some(error);
                    in_a_row = 0;
                    continue;
                }
            }
            let Disposition::Transient { retry_after } = error.disposition() else { return Err(error) };
            let now = Instant::now();
            let Some(wait) = self.backoff.wait(in_a_row, retry_after, now, deadline, fastrand::f64()) else {
                let spent = in_a_row >= self.backoff.attempts;
                return Err(if spent { error } else { FetchError::Deadline(Some(Box::new(error))) });
            };
            tracing::debug!(reference = describe(reference), %error, ?wait, "a fetch failed and is tried again");
            self.metrics.retried(Stage::Fetch, error.code());
            tries.last = Some(error);
            tokio::time::sleep(wait).await;
        }
    }

    async fn try_once(
        &self,
        reference: &ImageRef,
        may_begin: &(dyn Fn(&str) -> Result<(), FetchError> + Sync),
    ) -> Result<(Bytes, Permit), FetchError> {
        let means = Means { hosts: &self.hosts, intake: &self.intake, metrics: &self.metrics, may_begin };
        match reference {
            ImageRef::Http(url) => self.http.get(url, &means).await,
            ImageRef::Object(object) => self.stores.get(object, &means).await,
            ImageRef::File(path) => {
                let slot = self.hosts.acquire(FILES).await;
                self.files.fetch(path, &self.intake, slot).await
            }
            ImageRef::Base64(text) => local::inline(text.clone(), Encoding::Base64, &self.intake).await,
            ImageRef::Percent(text) => local::inline(text.clone(), Encoding::Percent, &self.intake).await,
        }
    }

    /// Whether a host is asked at all now.
    fn may_ask(&self, host: &str) -> Result<(), FetchError> {
        let Some(breakers) = &self.breakers else { return Ok(()) };
        let asked = breakers.may_try(host, Instant::now());
        asked.map_err(|LeftAlone { left, last }| FetchError::LeftAlone { left, last })
    }

    /// Tells the breakers of the hosts that led to the last one that they answered.
    fn answered_before(&self, asked: &[String]) {
        let (Some(breakers), Some((last, before))) = (&self.breakers, asked.split_last()) else { return };
        for host in before.iter().filter(|host| *host != last) {
            breakers.succeeded(host);
        }
    }

    /// Tells the breakers of the hosts that a try asked how it went. Says whether the last one is left alone now.
    fn note(&self, asked: &[String], result: &Result<(Bytes, Permit), FetchError>) -> bool {
        self.answered_before(asked);
        let (Some(breakers), Some(last)) = (&self.breakers, asked.last()) else { return false };
        if result.as_ref().is_err_and(FetchError::came_unasked) {
            return false;
        }
        let outcome = result.as_ref().map_err(|error| (error.code(), error.disposition()));
        let left_alone = if let Err((code, Disposition::Transient { retry_after })) = outcome {
            // A shorter wait is waited for in process.
            let asked = retry_after.filter(|wait| *wait > self.backoff.max);
            breakers.failed(last, code, asked, Instant::now())
        } else {
            breakers.succeeded(last);
            false
        };
        self.metrics.hosts_left_alone(breakers.open(Instant::now()));
        left_alone
    }
}

/// A try that was not made, since a host is left alone: it tells of an outage like a try that was, since what fails everywhere is
/// held and not put off. `None` where it is held.
fn refused(watch: Option<&Watch<'_>>, host: &str, error: FetchError) -> Option<FetchError> {
    let result: Result<(), _> = Err(error);
    match watch.map_or(After::AsEver, |watch| watch.ended(None, Some(host), &result)) {
        After::Hold => None,
        After::AsEver | After::LetGo => result.err(),
    }
}

fn lock(asked: &Mutex<Vec<String>>) -> MutexGuard<'_, Vec<String>> {
    asked.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the work gives, if it ends before the deadline.
pub(super) async fn within<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline.into(), work).await.ok(),
        None => Some(work.await),
    }
}
