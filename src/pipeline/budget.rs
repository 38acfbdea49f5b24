//! The permits of a flow, and the part of them that is set aside for rows that are answered directly.

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
}

impl Budget {
    /// Pools of the configured sizes.
    pub fn new(flow: &Flow) -> Self {
        let messages = Limit { items: flow.max_messages, bytes: flow.max_message_bytes.as_u64() as usize };
        let images = Limit { items: flow.max_images, bytes: flow.max_image_bytes.as_u64() as usize };
        Self { messages: Pool::new(messages), images: Pool::new(images), endpoint: None }
    }

    /// The same, of which a share is set aside for rows that are answered directly.
    #[must_use]
    pub fn with_endpoint(self, share: f64) -> Self {
        let part = Part::new(share, self.messages.limit(), self.images.limit());
        part.leave_to(&self.messages, self.messages.limit());
        part.leave_to(&self.images, self.images.limit());
        Self { endpoint: Some(part), ..self }
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
        match &self.endpoint {
            None => {
                self.messages.set_limit(messages);
                self.images.set_limit(images);
            }
            Some(part) => {
                part.set_limits(messages, images);
                part.leave_to(&self.messages, messages);
                part.leave_to(&self.images, images);
            }
        }
    }

    /// The limits of the consumed messages and of the images, those of the endpoint included.
    pub(super) fn limits(&self) -> (Limit, Limit) {
        let (messages, images) = (self.messages.limit(), self.images.limit());
        match &self.endpoint {
            None => (messages, images),
            Some(part) => part.limits(messages, images),
        }
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
    fn new(share: f64, messages: Limit, images: Limit) -> Self {
        let pool = |whole| Pool::new(part(whole, share));
        Self { share, messages: pool(messages), images: pool(images) }
    }

    /// A part of a number, one at least.
    pub(super) fn of(&self, whole: usize) -> usize {
        ((whole as f64 * self.share).round() as usize).max(1)
    }

    /// How the endpoint's images are fetched.
    pub(super) fn fetch(&self, fetch: &Fetch) -> Fetch {
        Fetch { concurrency: self.of(fetch.concurrency), per_host: self.of(fetch.per_host), ..fetch.clone() }
    }

    fn set_limits(&self, messages: Limit, images: Limit) {
        self.messages.set_limit(part(messages, self.share));
        self.images.set_limit(part(images, self.share));
    }

    /// Leaves the rest of a budget to the stream's pool.
    fn leave_to(&self, stream: &Pool, whole: Limit) {
        let own = part(whole, self.share);
        let rest = |whole: usize, own: usize| whole.saturating_sub(own).max(1);
        stream.set_limit(Limit { items: rest(whole.items, own.items), bytes: rest(whole.bytes, own.bytes) });
    }

    fn limits(&self, messages: Limit, images: Limit) -> (Limit, Limit) {
        let sum = |a: Limit, b: Limit| Limit { items: a.items + b.items, bytes: a.bytes + b.bytes };
        (sum(messages, self.messages.limit()), sum(images, self.images.limit()))
    }
}

fn part(whole: Limit, share: f64) -> Limit {
    let of = |whole: usize| ((whole as f64 * share) as usize).max(1);
    Limit { items: of(whole.items), bytes: of(whole.bytes) }
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
}
