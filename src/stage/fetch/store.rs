//! Images in object stores: S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage.
//!
//! The crate `object_store` finds credentials, signs, and knows the stores' ways; its requests go through a client of
//! ours. The operator opens buckets and says where a store is, so its address is not guarded; a reference names a key
//! in an open bucket and nothing else.

mod build;
mod note;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use object_store::{Attribute, GetOptions, GetResult, ObjectStore};

use self::note::{Heard, Note};
use super::answer::check_unpacked;
use super::body::{Body, Incoming};
use super::clock::{Clock, Limits};
use super::error::{deepest, find};
use super::http::Means;
use super::{FetchError, SetupError};
use crate::budget::Permit;
use crate::message::{ObjectRef, ObjectRoot, without_controls};
use crate::metrics::ResponseClass;
use crate::settings;

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
        let limits = Limits::of(settings);
        if settings.stores.is_empty() {
            return Ok(Self { open: Vec::new(), limits });
        }
        let client = build::client(settings).map_err(|error| SetupError::Client { cause: deepest(&error) })?;
        let open = settings.stores.iter().map(|text| {
            let root = ObjectRoot::parse(text).map_err(|cause| wrong(text, cause))?;
            let store = build::build(&root, &settings.store_options, &client).map_err(|cause| wrong(text, cause))?;
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
        let host = object.store();
        let _slot = means.hosts.acquire(&host).await;
        (means.may_begin)(&host)?;
        let mut room = None;
        loop {
            let result = self.answer(store.as_ref(), &path, &mut clock, means).await?;
            let coding = result.attributes.get(&Attribute::ContentEncoding);
            check_unpacked(coding.into_iter().map(|coding| coding.as_bytes()))?;
            match self.incoming(result).read(&mut clock, room.take(), means).await? {
                Body::Whole(body, permit) => return Ok((body, permit)),
                Body::Broken(permit, error) => {
                    tracing::debug!(%object, %error, "a body broke after it had waited for room; it is asked for again");
                    room = Some(permit);
                    clock.restart();
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
        // What it takes from the environment may make it panic where it signs.
        let asked = AssertUnwindSafe(store.get_opts(path, options)).catch_unwind();
        let result = clock.bound(clock.head(), asked).await;
        let heard = note.take();
        match (&heard, &result) {
            (Some(Heard::Answer { status, .. }), _) => means.metrics.response(ResponseClass::of(*status)),
            (Some(Heard::Nothing), _) | (None, Err(_)) => means.metrics.response(ResponseClass::None),
            (None, Ok(_)) => {}
        }
        match result? {
            Ok(result) => result.map_err(|error| self.error(&error, heard)),
            Err(_) => Err(FetchError::NoCredentials("no request can be made with what the environment says".into())),
        }
    }

    fn error(&self, error: &object_store::Error, heard: Option<Heard>) -> FetchError {
        match heard {
            Some(Heard::Answer { status, retry_after }) if !status.is_success() => {
                FetchError::Store { status, said: said(&error.to_string()), retry_after }
            }
            Some(_) => client_error(error, self.limits, FetchError::StoreAnswer),
            None => FetchError::NoCredentials(shortened(&error.to_string())),
        }
    }

    fn incoming(&self, result: GetResult) -> Incoming {
        let length = Some(usize::try_from(result.meta.size).unwrap_or(usize::MAX));
        let limits = self.limits;
        let broken = move |error| client_error(&error, limits, FetchError::Connect);
        let pieces = result.into_stream().map(move |piece| piece.map_err(broken));
        Incoming { length, pieces: pieces.boxed() }
    }
}

/// What the client says is wrong; where it is not the client that fails, what the crate says.
fn client_error(error: &object_store::Error, limits: Limits, other: impl FnOnce(String) -> FetchError) -> FetchError {
    match find::<reqwest::Error>(error) {
        Some(client) => FetchError::from_client(client, limits.connect),
        None => other(shortened(&error.to_string())),
    }
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
    without_controls(text).chars().take(MAX_SAID).collect()
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
}
