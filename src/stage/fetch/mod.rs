//! From a reference to bytes: http(s), object stores, files, inline data.
//!
//! [`Fetcher`] is the core and knows no Kafka; [`run`] is the stage on top of it. Who may be reached is decided in
//! `guard`, how much at once in `host`, how many bytes in `intake`, and what happens to rows in an outage of our own
//! surroundings in `outage` and `hold`. The tries of one fetch are in `tries`.

pub mod address;
mod answer;
mod body;
mod breaker;
mod clock;
mod error;
mod flights;
pub mod guard;
mod hold;
mod host;
mod http;
mod intake;
mod kept;
mod local;
mod outage;
mod store;
mod tries;

use std::borrow::Cow;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};
use bytes::Bytes;
use jiff::Timestamp;
use tokio::task::{JoinError, JoinSet};

pub use error::{FailedFetch, FetchError};
pub use hold::Surroundings;

use self::breaker::Breakers;
use self::flights::{Flights, Turn};
use self::hold::Hold;
use self::host::Hosts;
use self::http::Http;
use self::intake::Intake;
use self::local::Files;
use self::outage::Outage;
use self::store::Stores;
use self::tries::{Order, within};
use super::{Fetched, Finished, failed, send};
use crate::budget::{Permit, Pool};
use crate::disposition::Stage;
use crate::message::{ImageRef, Row, Timing, redact_url};
use crate::metrics::Metrics;
use crate::offsets::Outcome;
use crate::retry::Backoff;
use crate::settings;
use crate::tracked::Tracked;

/// Rows that may wait for each fetch that may run. With the default concurrency this is about `flow.max_messages`: a
/// slow host then holds back other hosts only when it fills the message pool.
const WAITING_PER_SLOT: usize = 32;

/// Most characters of a reference in a message, so that what went wrong still fits behind it.
const MAX_REFERENCE_CHARS: usize = 300;

/// The name under which files take their slots; no host is called so.
const FILES: &str = "file:";

/// The settings do not make a fetcher.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The HTTP client cannot be built.
    #[error(
        "the HTTP client cannot be set up: {cause}. Check fetch.user_agent, and that CA certificates are installed"
    )]
    Client {
        /// What the client says.
        cause: String,
    },
    /// A root is not there.
    #[error("the folder {path} of fetch.file_roots cannot be opened: {source}. Create it, or take it out")]
    Root {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A store is described wrongly.
    #[error(
        "{store} cannot be set up: {cause}. See fetch.stores, fetch.store_options and the environment of the worker"
    )]
    Store {
        /// The entry of `fetch.stores`, or the option.
        store: String,
        /// What is wrong.
        cause: String,
    },
}

/// Fetches images, with every limit of the settings. Shared by all who fetch in a process.
pub struct Fetcher {
    http: Http,
    hosts: Hosts,
    intake: Intake,
    files: Files,
    stores: Stores,
    backoff: Backoff,
    waiting: usize,
    metrics: Arc<Metrics>,
    /// Rows that wait for the end of an outage; `None` where nobody looks for one.
    hold: Option<Arc<Hold>>,
    /// Hosts that are left alone; `None` where messages cannot be put off.
    breakers: Option<Breakers>,
    /// The topic whose messages cannot be put off once more.
    last_topic: Option<Arc<str>>,
    /// Fetches under way, for others who want the same; `None` where each fetches for itself.
    flights: Option<Flights>,
}

impl Fetcher {
    /// A fetcher that takes its permits from `pool` (the image pool), none smaller than `pixel_bytes`: the bytes of an
    /// image at the model's size (side² × 3), so that decoding only shrinks them.
    ///
    /// # Errors
    /// The HTTP client cannot be built, or a folder of `fetch.file_roots` cannot be opened.
    pub fn new(
        settings: &settings::Fetch,
        pool: Pool,
        pixel_bytes: usize,
        metrics: Arc<Metrics>,
    ) -> Result<Self, SetupError> {
        let http = Http::new(settings).map_err(|error| SetupError::Client { cause: error::deepest(&error) })?;
        let files = Files::new(&settings.file_roots, settings.total_timeout)
            .map_err(|(path, source)| SetupError::Root { path, source })?;
        let stores = Stores::new(settings)?;
        let max_body = usize::try_from(settings.max_body.as_u64()).unwrap_or(usize::MAX);
        Ok(Self {
            http,
            hosts: Hosts::new(settings.concurrency, settings.per_host, settings.per_host_rate),
            intake: Intake { pool, pixel_bytes, max_body, metrics: metrics.clone() },
            files,
            stores,
            backoff: Backoff { attempts: settings.attempts, base: settings.backoff, max: settings.max_backoff },
            waiting: settings.concurrency.max(1).saturating_mul(WAITING_PER_SLOT),
            metrics,
            hold: None,
            breakers: None,
            last_topic: None,
            flights: settings.share.then(Flights::default),
        })
    }

    /// The same fetcher, which leaves hosts alone that keep failing, for use where their messages can be put off: all but those
    /// of `last_topic`.
    #[must_use]
    pub fn leaving_failing_hosts_alone(mut self, settings: &settings::Fetch, last_topic: &str) -> Self {
        self.last_topic = Some(last_topic.into());
        let failures = settings.breaker_failures;
        self.breakers = (failures > 0).then(|| Breakers::new(failures, settings.breaker_wait));
        self
    }

    /// The same fetcher, whose stage looks for outages over `window` and holds its rows in one; a window of 0 does not.
    #[must_use]
    pub fn looking_for_outages(mut self, settings: &settings::Fetch, around: Surroundings) -> Self {
        let outage = Outage::new(settings.outage_window, settings.concurrency);
        self.hold = (!settings.outage_window.is_zero()).then(|| Hold::new(outage, around));
        self
    }

    /// The encoded image and its permit of the image pool: max(length, `pixel_bytes`). Transient errors are tried again;
    /// `deadline` bounds everything, the waits for slots and permits included.
    pub async fn fetch(&self, reference: &ImageRef, deadline: Option<Instant>) -> Result<(Bytes, Permit), FailedFetch> {
        self.fetch_for(Order { reference, deadline, watch: None, may_put_off: true }).await
    }

    /// Fetches, or takes what another row's fetch brings that is under way for the same address.
    async fn fetch_for(&self, order: Order<'_>) -> Result<(Bytes, Permit), FailedFetch> {
        let Some(flights) = &self.flights else { return self.fetch_alone(order).await };
        let address = match order.reference {
            ImageRef::Http(url) => Cow::Borrowed(url.as_str()),
            ImageRef::Object(object) => Cow::Owned(object.to_string()),
            ImageRef::File(_) | ImageRef::Base64(_) | ImageRef::Percent(_) => return self.fetch_alone(order).await,
        };
        let started = Instant::now();
        let shared = loop {
            match within(order.deadline, flights.join(&address)).await {
                Some(Turn::Fly(flight)) => {
                    let result = self.fetch_alone(order).await;
                    flight.land(result.as_ref().map(|(body, _)| body.clone()).map_err(Clone::clone));
                    return result;
                }
                Some(Turn::Share(Some(shared))) => break Some(shared?),
                Some(Turn::Share(None)) => {}
                None => break None,
            }
        };
        let Some(body) = shared else {
            self.metrics.stage(Stage::Fetch, started.elapsed());
            return Err(FailedFetch {
                reference: describe(order.reference),
                error: FetchError::Deadline(None),
                attempts: 0,
                first_failed_at: Timestamp::now(),
            });
        };
        let Some(permit) = self.intake.try_reserve(Some(body.len())) else {
            // Whoever waits for room has no bytes yet.
            drop(body);
            return self.fetch_alone(order).await;
        };
        self.metrics.shared_fetch();
        self.metrics.stage(Stage::Fetch, started.elapsed());
        Ok((body, permit))
    }
}

/// A reference as messages and logs may show it.
fn describe(reference: &ImageRef) -> String {
    let text = match reference {
        ImageRef::Http(url) => redact_url(url),
        ImageRef::File(path) => format!("file {}", path.display()),
        ImageRef::Object(object) => object.to_string(),
        ImageRef::Base64(text) | ImageRef::Percent(text) => format!("inline image ({} characters)", text.len()),
    };
    match text.char_indices().nth(MAX_REFERENCE_CHARS) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}

/// The stage: fetches every row of `input`, on to `fetched`, or to `finished` where that failed. Returns when the input
/// is closed and every row is done.
///
/// # Panics
/// When fetching a row panicked, after all other rows are done.
pub async fn run(
    fetcher: Arc<Fetcher>,
    input: Receiver<Tracked<Row>>,
    fetched: Sender<Tracked<Fetched>>,
    finished: Sender<Finished>,
) {
    let mut rows = JoinSet::new();
    let mut panicked = None;
    let mut hold = pin!(drive(fetcher.hold.clone()));
    loop {
        tokio::select! {
            // Ended rows first: they make room for the next.
            biased;
            Some(ended) = rows.join_next() => note_panic(ended, &mut panicked),
            () = &mut hold => {}
            row = input.recv(), if rows.len() < fetcher.waiting => match row {
                Ok(row) => {
                    rows.spawn(fetch_row(fetcher.clone(), row, fetched.clone(), finished.clone()));
                }
                Err(_) => break,
            },
        }
    }
    loop {
        tokio::select! {
            ended = rows.join_next() => match ended {
                Some(ended) => note_panic(ended, &mut panicked),
                None => break,
            },
            () = &mut hold => {}
        }
    }
    if let Some(panic) = panicked {
        std::panic::resume_unwind(panic);
    }
}

/// Hands turns to the rows that are held, for ever.
async fn drive(hold: Option<Arc<Hold>>) {
    match hold {
        Some(hold) => hold.drive().await,
        None => std::future::pending().await,
    }
}

type Panic = Box<dyn std::any::Any + Send>;

fn note_panic(ended: Result<(), JoinError>, panicked: &mut Option<Panic>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        panicked.get_or_insert_with(|| error.into_panic());
    }
}

async fn fetch_row(
    fetcher: Arc<Fetcher>,
    mut row: Tracked<Row>,
    fetched: Sender<Tracked<Fetched>>,
    finished: Sender<Finished>,
) {
    let started = Instant::now();
    let deadline = row.value.request.deadline.and_then(|deadline| instant_of(deadline, Timestamp::now(), started));
    let result = fetch_tracked(&fetcher, &row, deadline).await;
    row.value.timing.fetch = Timing::ms(started.elapsed());
    let delivered = match result {
        Ok((body, permit)) => {
            let row = row.map(|row| Fetched { row, body }).with_image(permit);
            // Before it is in the queue, so that it is never taken before it is counted.
            fetcher.metrics.bytes_queued(Stage::Decode, row.value.body.len());
            send(&fetched, row, Stage::Fetch, &fetcher.metrics).await.is_ok()
        }
        Err(FailedFetch { error: FetchError::Halted, .. }) => {
            if row.current() {
                row.abandon();
            } else {
                row.resolve(Outcome::Discarded);
            }
            true
        }
        Err(error) => send(&finished, failed(row, error.failure()), Stage::Fetch, &fetcher.metrics).await.is_ok(),
    };
    // The row is dropped with its ticket, and the ledger reports it.
    if !delivered {
        tracing::error!("the stage behind the fetches ended before them; a row is lost and will be consumed again");
    }
}

async fn fetch_tracked(
    fetcher: &Fetcher,
    row: &Tracked<Row>,
    deadline: Option<Instant>,
) -> Result<(Bytes, Permit), FailedFetch> {
    let reference = &row.value.request.image;
    let current = || row.current();
    let watch = match (&fetcher.hold, reference.host()) {
        (Some(hold), Some(host)) => Some(hold.watch(&host, &current)),
        _ => None,
    };
    // What came back for the last time is tried in any case.
    let may_put_off = Some(&row.value.message.topic) != fetcher.last_topic.as_ref();
    let result = fetcher.fetch_for(Order { reference, deadline, watch: watch.as_ref(), may_put_off }).await;
    if let Err(FailedFetch { error: FetchError::LeftAlone { .. }, .. }) = result {
        fetcher.metrics.put_off();
    }
    result
}

/// A moment of the calendar on the clock of this process; `None` where it is too far off to matter.
fn instant_of(moment: Timestamp, now: Timestamp, clock: Instant) -> Option<Instant> {
    clock.checked_add(Duration::try_from(moment.duration_since(now)).unwrap_or_default())
}
