//! The fetch stage against a local web server that breaks every rule.

mod answers;
mod guard;
mod kept;
mod limits;
mod local;
mod ssrf;
mod stage;
mod stores;
#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;
use std::time::Duration;

use blipstream::budget::{Limit, Pool};
use blipstream::message::ImageRef;
use blipstream::metrics::Metrics;
use blipstream::settings;
use blipstream::stage::fetch::{FailedFetch, Fetcher};
use bytesize::ByteSize;
use url::Url;

/// Pixels of a small model: 96 × 96 × 3.
const PIXEL_BYTES: usize = 96 * 96 * 3;

/// Loopback is open, and nothing takes long.
fn settings() -> settings::Fetch {
    settings::Fetch {
        allow_networks: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
        attempts: 3,
        backoff: Duration::from_millis(1),
        max_backoff: Duration::from_millis(5),
        max_body: ByteSize::kib(256),
        // What is counted is what each fetch does.
        share: false,
        ..settings::Fetch::default()
    }
}

fn pool() -> Pool {
    Pool::new(Limit { items: 64, bytes: 64 << 20 })
}

fn fetcher(settings: &settings::Fetch, pool: &Pool) -> Fetcher {
    counted(settings, pool, &Arc::default())
}

/// A fetcher that counts in `metrics`.
fn counted(settings: &settings::Fetch, pool: &Pool, metrics: &Arc<Metrics>) -> Fetcher {
    Fetcher::new(settings, pool.clone(), PIXEL_BYTES, metrics.clone()).unwrap()
}

/// Fetches one URL and expects a failure that leaves no permit behind.
async fn failure_of(settings: &settings::Fetch, url: Url) -> FailedFetch {
    let pool = pool();
    let result = fetcher(settings, &pool).fetch(&ImageRef::Http(url.clone()), None).await;
    assert_eq!(pool.used(), Limit::default(), "{url} left a permit behind");
    match result {
        Ok((body, _)) => panic!("{url} was fetched: {} bytes", body.len()),
        Err(error) => error,
    }
}
