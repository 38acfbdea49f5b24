//! What a request for an object heard.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use jiff::Timestamp;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
};
use reqwest::{Client, StatusCode};

use super::super::answer::retry_after;

/// Most bytes that are read of an answer that is no object: a few hundred say what is wrong.
const MAX_REFUSAL: usize = 64 * 1024;

/// What a store's answer was, or that there was none.
pub(super) enum Heard {
    Answer { status: StatusCode, retry_after: Option<Duration> },
    Nothing,
}

/// Travels with the request for an object, and comes back with what was heard. Empty where nothing was asked.
#[derive(Clone, Default)]
pub(super) struct Note(Arc<Mutex<Option<Heard>>>);

impl Note {
    fn set(&self, heard: Heard) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(heard);
    }

    pub(super) fn take(&self) -> Option<Heard> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The client, which tells the notes of requests how they went: the errors of `object_store` keep neither the status nor
/// `Retry-After`.
#[derive(Debug)]
pub(super) struct Telling(pub(super) Client);

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
        let result = match result {
            Ok(answer) if !answer.status().is_success() => Ok(shortened(answer).await),
            other => other,
        };
        if let Some(note) = note {
            note.set(result.as_ref().map_or(Heard::Nothing, |answer| Heard::Answer {
                status: answer.status(),
                retry_after: retry_after(answer.headers(), Timestamp::now()),
            }));
        }
        result
    }
}

/// An answer that is no object, with no more of its body than says what is wrong: the crate reads all of it.
async fn shortened(answer: HttpResponse) -> HttpResponse {
    let (parts, body) = answer.into_parts();
    let (mut pieces, mut begin) = (body.bytes_stream(), BytesMut::new());
    while let Some(Ok(piece)) = pieces.next().await {
        begin.extend_from_slice(&piece[..piece.len().min(MAX_REFUSAL - begin.len())]);
        if begin.len() == MAX_REFUSAL {
            break;
        }
    }
    HttpResponse::from_parts(parts, HttpResponseBody::from(Bytes::from(begin)))
}
