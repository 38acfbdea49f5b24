//! The permits of a flow, and the part of them that is set aside for rows that are answered directly.

use std::sync::{Arc, Mutex, PoisonError};

use bytesize::ByteSize;

use crate::budget::{Limit, Pool};
use crate::metrics::PoolName;
use crate::settings::{Fetch, Flow};

/// Permits of everything that is in flight.
#[derive(Debug, Clone)]
pub struct Budget {
    /// Consumed messages.
    pub messages: Pool,
    /// Bodies and pixels.
    pub images: Pool,
    /// What is set aside for rows that are answered directly, if there are any.
    pub endpoint: Option<Part>,
    /// The limits of messages and of images, before they are shared out.
    whole: Arc<Mutex<(Limit, Limit)>>,
}

impl Budget {
    /// Pools of the configured sizes.
    pub fn new(flow: &Flow) -> Self {
        let messages = Limit { items: flow.max_messages, bytes: flow.max_message_bytes.as_u64() as usize };
        let images = Limit { items: flow.max_images, bytes: flow.max_image_bytes.as_u64() as usize };
        let whole = Arc::new(Mutex::new((messages, images)));
        Self { messages: Pool::new(messages), images: Pool::new(images), endpoint: None, whole }
    }

    /// The same, of which a share is set aside for rows that are answered directly.
    #[must_use]
    pub fn with_endpoint(self, share: f64) -> Self {
        let (messages, images) = self.limits();
        let pool = || Pool::new(Limit::default());
        let budget = Self { endpoint: Some(Part { share, messages: pool(), images: pool() }), ..self };
        budget.set_limits(messages, images);
        budget
    }

    /// The pools by their names.
    pub(super) fn pools(&self) -> Vec<(PoolName, &Pool)> {
        let mut pools = vec![(PoolName::Messages, &self.messages), (PoolName::Images, &self.images)];
        if let Some(part) = &self.endpoint {
            pools.extend([(PoolName::EndpointMessages, &part.messages), (PoolName::EndpointImages, &part.images)]);
        }
        pools
    }

    /// Changes the limits of the consumed messages and of the images, each the sum of what the stream and the endpoint have.
    pub(super) fn set_limits(&self, messages: Limit, images: Limit) {
        *self.whole.lock().unwrap_or_else(PoisonError::into_inner) = (messages, images);
        let rest = |whole: Limit| self.endpoint.as_ref().map_or(whole, |part| part.rest(whole));
        self.messages.set_limit(rest(messages));
        self.images.set_limit(rest(images));
        if let Some(part) = &self.endpoint {
            part.messages.set_limit(part.own(messages));
            part.images.set_limit(part.own(images));
        }
    }

    /// The limits of the consumed messages and of the images, those of the endpoint included.
    pub(super) fn limits(&self) -> (Limit, Limit) {
        *self.whole.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the endpoint may use: a share of the budget, of the places in batches while it has rows, of the fetches and of the
/// decoders. The stream has the rest, and cannot be starved.
#[derive(Debug, Clone)]
pub struct Part {
    /// From 0 to 1.
    pub share: f64,
    /// Bodies of requests.
    pub messages: Pool,
    /// Bodies and pixels of images.
    pub images: Pool,
}

impl Part {
    /// A number shared out, see [`shares`].
    pub(super) fn split(&self, whole: usize) -> (usize, usize) {
        shares(whole, self.share)
    }

    /// How the stream's images are fetched, and how the endpoint's are.
    pub(super) fn split_fetch(&self, fetch: &Fetch) -> (Fetch, Fetch) {
        let (concurrency, per_host) = (self.split(fetch.concurrency), self.split(fetch.per_host));
        let of = |share: f64, concurrency: usize, per_host: usize| Fetch {
            concurrency,
            per_host,
            per_host_rate: fetch.per_host_rate * share,
            cache: ByteSize((fetch.cache.as_u64() as f64 * share) as u64),
            ..fetch.clone()
        };
        (of(1.0 - self.share, concurrency.0, per_host.0), of(self.share, concurrency.1, per_host.1))
    }

    fn own(&self, whole: Limit) -> Limit {
        let of = |whole: usize| ((whole as f64 * self.share) as usize).max(1);
        Limit { items: of(whole.items), bytes: of(whole.bytes) }
    }

    /// What is left of a whole to the stream.
    fn rest(&self, whole: Limit) -> Limit {
        let own = self.own(whole);
        let rest = |whole: usize, own: usize| whole.saturating_sub(own).max(1);
        Limit { items: rest(whole.items, own.items), bytes: rest(whole.bytes, own.bytes) }
    }
}

/// A number shared out: what is left to the stream, and what the endpoint has; each one at least.
pub fn shares(whole: usize, share: f64) -> (usize, usize) {
    let own = ((whole as f64 * share).round() as usize).max(1);
    (whole.saturating_sub(own).max(1), own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stream_and_endpoint_have_no_more_together_than_the_whole() {
        let flow = Flow::default();
        let budget = Budget::new(&flow).with_endpoint(0.25);
        let part = budget.endpoint.clone().unwrap();
        assert_eq!((budget.images.limit().items, part.images.limit().items), (384, 128));
        let images = Limit { items: 100, bytes: 1000 };
        budget.set_limits(budget.limits().0, images);
        assert_eq!(budget.limits().1, images);
        assert_eq!(part.images.limit(), Limit { items: 25, bytes: 250 });
        assert_eq!(budget.limits().0.items, flow.max_messages);
    }

    #[test]
    fn limits_that_are_not_named_stay_as_they_are_whatever_the_share() {
        for share in [0.001, 0.25, 1.0] {
            let budget = Budget::new(&Flow { max_messages: 3, ..Flow::default() }).with_endpoint(share);
            let before = budget.limits();
            for _ in 0..3 {
                let (messages, images) = budget.limits();
                budget.set_limits(messages, images);
            }
            assert_eq!(budget.limits(), before, "of a share of {share}");
        }
    }

    #[test]
    fn stream_and_endpoint_ask_no_more_of_hosts_and_memory_together_than_one_of_them_alone() {
        let fetch = Fetch { per_host: 10, per_host_rate: 8.0, cache: ByteSize::mib(8), ..Fetch::default() };
        let budget = Budget::new(&Flow::default()).with_endpoint(0.25);
        let part = budget.endpoint.unwrap();
        let (stream, endpoint) = part.split_fetch(&fetch);
        assert_eq!((stream.concurrency, endpoint.concurrency), (48, 16));
        assert_eq!((stream.per_host, endpoint.per_host), (7, 3));
        assert_eq!((stream.per_host_rate, endpoint.per_host_rate), (6.0, 2.0));
        assert_eq!((stream.cache, endpoint.cache), (ByteSize::mib(6), ByteSize::mib(2)));
        assert_eq!([part.split(8), part.split(1)], [(6, 2), (1, 1)], "each has one at least");
    }
}
