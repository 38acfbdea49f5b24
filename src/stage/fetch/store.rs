//! Images in object stores: S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage.
//!
//! The crate `object_store` finds credentials, signs, and knows the stores' ways; its requests go through a client of
//! ours. The operator opens buckets and says where a store is, so its address is not guarded; a reference names a key
//! in an open bucket and nothing else.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use jiff::Timestamp;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::{HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::{Attribute, ClientOptions, GetOptions, GetResult, ObjectStore, RetryConfig};
use reqwest::{Client, NoProxy, StatusCode};

use super::answer::retry_after;
use super::body::{Body, Incoming};
use super::clock::{Clock, Limits};
use super::error::{deepest, find};
use super::http::{IDLE_CONNECTION, Means, user_agent};
use super::{FetchError, SetupError};
use crate::budget::Permit;
use crate::message::{ObjectRef, ObjectRoot, StoreKind};
use crate::metrics::ResponseClass;
use crate::settings;

/// Where a machine is told who it is: never behind a proxy. The addresses of EC2, ECS, EKS and Azure, and Google's names.
const METADATA: &str =
    "169.254.169.254,169.254.170.2,169.254.170.23,fd00:ec2::254,fd00:ec2::23,metadata.google.internal,metadata";

/// Longest part of a store's own words that an error repeats, in characters.
const MAX_SAID: usize = 200;

/// The stores whose buckets are open.
#[derive(Debug)]
pub(super) struct Stores {
    open: Vec<(ObjectRoot, Arc<dyn ObjectStore>)>,
    limits: Limits,
}

impl Stores {
    /// Stores for `fetch.stores`; nothing is asked of them yet.
    pub(super) fn new(settings: &settings::Fetch) -> Result<Self, SetupError> {
        let wrong = |store: &str, cause: String| SetupError::Store { store: store.into(), cause };
        let options = &settings.store_options;
        let unknown = || "no store has it; their names begin with aws_, google_ or azure_".into();
        check_options(options).map_err(|name| wrong(&format!("the option {name:?}"), unknown()))?;
        let limits = Limits::of(settings);
        if settings.stores.is_empty() {
            return Ok(Self { open: Vec::new(), limits });
        }
        let client = client(settings).map_err(|error| SetupError::Client { cause: deepest(&error) })?;
        let open = settings.stores.iter().map(|text| {
            let root = ObjectRoot::parse(text).map_err(|cause| wrong(text, cause))?;
            let store = build(&root, options, &client).map_err(|error| wrong(text, error.to_string()))?;
            Ok((root, store))
        });
        Ok(Self { open: open.collect::<Result<_, _>>()?, limits })
    }

    /// One try. A body that breaks after it had to wait for room is asked for once more, with the room in hand.
    pub(super) async fn get(&self, object: &ObjectRef, means: &Means<'_>) -> Result<(Bytes, Permit), FetchError> {
        let opened = self.open.iter().find(|(root, _)| root.contains(object));
        let (_, store) = opened.ok_or(FetchError::StoreClosed)?;
        let path = Path::parse(&object.key).map_err(|error| FetchError::BadReference(error.to_string()))?;
        let mut clock = Clock::new(self.limits);
        let _slot = means.hosts.acquire(&object.store()).await;
        if !(means.may_begin)() {
            return Err(FetchError::Halted);
        }
        let mut room = None;
        loop {
            let result = self.answer(store.as_ref(), &path, &mut clock, means).await?;
            if let Some(coding) = result.attributes.get(&Attribute::ContentEncoding).filter(|coding| packs(coding)) {
                return Err(FetchError::Packed(coding.chars().take(20).collect()));
            }
            match self.incoming(result).read(&mut clock, room.take(), means).await? {
                Body::Whole(body, permit) => return Ok((body, permit)),
                Body::Broken(permit, error) => {
                    tracing::debug!(%object, %error, "a body broke after it had waited for room; it is asked for again");
                    room = Some(permit);
                    clock = Clock::new(self.limits);
                }
            }
        }
    }

    async fn answer(
        &self,
        store: &dyn ObjectStore,
        path: &Path,
        clock: &mut Clock,
        means: &Means<'_>,
    ) -> Result<GetResult, FetchError> {
        let note = Note::default();
        let mut options = GetOptions::default();
        options.extensions.insert(note.clone());
        let result = clock.bound(clock.head(), store.get_opts(path, options)).await;
        let heard = note.take();
        match (&heard, &result) {
            (Some(Heard::Answer { status, .. }), _) => means.metrics.response(ResponseClass::of(*status)),
            (Some(Heard::Nothing), _) | (None, Err(_)) => means.metrics.response(ResponseClass::None),
            (None, Ok(_)) => {}
        }
        result?.map_err(|error| self.error(&error, heard))
    }

    fn error(&self, error: &object_store::Error, heard: Option<Heard>) -> FetchError {
        match heard {
            Some(Heard::Answer { status, retry_after }) if !status.is_success() => {
                FetchError::Store { status, said: said(&error.to_string()), retry_after }
            }
            Some(_) => find::<reqwest::Error>(error).map_or_else(
                || FetchError::Connect(shortened(&error.to_string())),
                |client| FetchError::from_client(client, self.limits.connect),
            ),
            None => FetchError::NoCredentials(shortened(&error.to_string())),
        }
    }

    fn incoming(&self, result: GetResult) -> Incoming {
        let length = Some(usize::try_from(result.meta.size).unwrap_or(usize::MAX));
        let limits = self.limits;
        let pieces = result.into_stream().map(move |piece| {
            piece.map_err(|error| {
                let client = find::<reqwest::Error>(&error);
                let broken = || FetchError::Connect(shortened(&error.to_string()));
                client.map_or_else(broken, |client| FetchError::from_client(client, limits.connect))
            })
        });
        Incoming { length, pieces: pieces.boxed() }
    }
}

/// A client without a guard, for the operator's own addresses; no redirect leads elsewhere.
fn client(settings: &settings::Fetch) -> Result<Client, reqwest::Error> {
    let mut client = Client::builder()
        .user_agent(user_agent(settings))
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(settings.connect_timeout)
        .pool_idle_timeout(IDLE_CONNECTION)
        .pool_max_idle_per_host(settings.per_host);
    if let Some(proxy) = &settings.proxy {
        client = client.proxy(reqwest::Proxy::all(proxy.clone())?.no_proxy(NoProxy::from_string(METADATA)));
    }
    client.build()
}

fn build(
    root: &ObjectRoot,
    options: &BTreeMap<String, String>,
    client: &Client,
) -> Result<Arc<dyn ObjectStore>, object_store::Error> {
    // The fetcher tries again by itself.
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let connector = Telling(client.clone());
    let bucket = root.bucket.as_str();
    Ok(match root.kind {
        StoreKind::S3 => {
            let builder = AmazonS3Builder::from_env().with_retry(retry);
            let set = given::<AmazonS3ConfigKey>(options, root.kind);
            let builder = set.fold(builder, |builder, (key, value)| builder.with_config(key, value));
            Arc::new(builder.with_bucket_name(bucket).with_http_connector(connector).build()?)
        }
        StoreKind::Google => {
            let builder = GoogleCloudStorageBuilder::from_env().with_retry(retry);
            let set = given::<GoogleConfigKey>(options, root.kind);
            let builder = set.fold(builder, |builder, (key, value)| builder.with_config(key, value));
            Arc::new(builder.with_bucket_name(bucket).with_http_connector(connector).build()?)
        }
        StoreKind::Azure => {
            let builder = MicrosoftAzureBuilder::from_env().with_retry(retry);
            let set = given::<AzureConfigKey>(options, root.kind);
            let builder = set.fold(builder, |builder, (key, value)| builder.with_config(key, value));
            Arc::new(builder.with_container_name(bucket).with_http_connector(connector).build()?)
        }
    })
}

/// What the names of a store's options begin with.
fn prefix(kind: StoreKind) -> &'static str {
    match kind {
        StoreKind::S3 => "aws_",
        StoreKind::Google => "google_",
        StoreKind::Azure => "azure_",
    }
}

/// The options of one store. All of them can be read: [`check_options`].
fn given<K: FromStr>(options: &BTreeMap<String, String>, kind: StoreKind) -> impl Iterator<Item = (K, &String)> {
    let own = options.iter().filter(move |(name, _)| name.starts_with(prefix(kind)));
    own.filter_map(|(name, value)| Some((name.parse().ok()?, value)))
}

/// Whether every option is one of a store; else the one that is not.
fn check_options(options: &BTreeMap<String, String>) -> Result<(), &str> {
    for name in options.keys() {
        let known = match StoreKind::ALL.into_iter().find(|kind| name.starts_with(prefix(*kind))) {
            Some(StoreKind::S3) => name.parse::<AmazonS3ConfigKey>().is_ok(),
            Some(StoreKind::Google) => name.parse::<GoogleConfigKey>().is_ok(),
            Some(StoreKind::Azure) => name.parse::<AzureConfigKey>().is_ok(),
            None => false,
        };
        if !known {
            return Err(name);
        }
    }
    Ok(())
}

/// What a store's answer was, or that there was none.
enum Heard {
    Answer { status: StatusCode, retry_after: Option<std::time::Duration> },
    Nothing,
}

/// Travels with the request for an object, and comes back with what was heard. Empty where nothing was asked.
#[derive(Clone, Default)]
struct Note(Arc<Mutex<Option<Heard>>>);

impl Note {
    fn set(&self, heard: Heard) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(heard);
    }

    fn take(&self) -> Option<Heard> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The client, which tells the notes of requests how they went: the errors of `object_store` keep neither the status nor
/// `Retry-After`.
#[derive(Debug)]
struct Telling(Client);

impl HttpConnector for Telling {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Self(self.0.clone())))
    }
}

#[async_trait]
impl HttpService for Telling {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let note = request.extensions().get::<Note>().cloned();
        let result = self.0.call(request).await;
        if let Some(note) = note {
            note.set(result.as_ref().map_or(Heard::Nothing, |answer| Heard::Answer {
                status: answer.status(),
                retry_after: retry_after(answer.headers(), Timestamp::now()),
            }));
        }
        result
    }
}

fn packs(coding: &str) -> bool {
    !coding.is_empty() && !coding.eq_ignore_ascii_case("identity")
}

/// The code and the message of a store's answer, which is XML in all three; nothing where it has none.
fn said(answer: &str) -> String {
    let element = |name: &str| {
        let (_, rest) = answer.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(text, _)| text)
    };
    let Some(code) = element("Code") else { return String::new() };
    let text = element("Message").map_or_else(|| code.to_owned(), |message| format!("{code}: {message}"));
    shortened(text.trim_end_matches('.'))
}

fn shortened(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_SAID).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_store_says_is_its_code_and_message() {
        let answer = "Server returned non-2xx status code: 403 Forbidden: <?xml version=\"1.0\"?>\n\
            <Error><Code>SignatureDoesNotMatch</Code><Message>Check\nyour key.</Message></Error>";
        assert_eq!(said(answer), "SignatureDoesNotMatch: Check your key");
        assert_eq!(said("<Code>NoSuchKey</Code>"), "NoSuchKey");
        assert_eq!(said("<html>503</html>"), "");
        assert_eq!(said(&format!("<Code>{}</Code>", "x".repeat(1000))).len(), MAX_SAID);
    }

    #[test]
    fn an_option_that_no_store_has_is_refused() {
        let check = |name: &str| check_options(&BTreeMap::from([(name.to_owned(), String::new())])).is_ok();
        for name in ["aws_endpoint", "aws_region", "google_base_url", "azure_storage_account_name", "aws_allow_http"] {
            assert!(check(name), "{name}");
        }
        for name in ["aws_endpiont", "endpoint", "timeout", ""] {
            assert!(!check(name), "{name}");
        }
    }
}
