//! What fetching counts.

use super::{FetchCache, Metrics, ResponseClass};

impl Metrics {
    /// An image host answered.
    pub fn response(&self, class: ResponseClass) {
        self.fetch_responses.with_label_values(&[class.as_str()]).inc();
    }

    /// Bytes of a body came in over HTTP.
    pub fn fetched_bytes(&self, bytes: usize) {
        self.fetch_bytes.inc_by(bytes as u64);
    }

    /// A fetch was not tried, since its host is left alone.
    pub fn put_off(&self) {
        self.fetch_put_off.inc();
    }

    /// So many hosts are left alone.
    pub fn hosts_left_alone(&self, hosts: usize) {
        self.fetch_hosts_left_alone.set(hosts as i64);
    }

    /// An image came with the fetch of another row.
    pub fn shared_fetch(&self) {
        self.fetch_shared.inc();
    }

    /// A body was looked for among those that are kept.
    pub fn fetch_looked_up(&self, result: FetchCache) {
        self.fetch_cache.with_label_values(&[result.as_str()]).inc();
    }
}
