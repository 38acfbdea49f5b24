//! Why a request as a whole has no answer, in the words of HTTP.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::disposition::{Code, Disposed};
use crate::message::ParseError;
use crate::pipeline::endpoint::Refused;

/// How long a client that was refused while the model is loaded should wait.
const LOADING: Duration = Duration::from_secs(5);

/// A refusal with its status, a code and a text.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    pub(super) code: &'static str,
    pub(super) message: String,
    pub(super) retry_after: Option<Duration>,
}

impl Problem {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), retry_after: None }
    }

    /// The request cannot be read.
    pub(super) fn unreadable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Code::BadMessage.as_str(), message)
    }

    pub(super) fn loading() -> Self {
        let code = Code::ModelUnavailable.as_str();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, code, "the model is being loaded").retry(LOADING)
    }

    pub(super) fn busy(message: impl Into<String>, after: Duration) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "busy", message).retry(after)
    }

    pub(super) fn retry(self, after: Duration) -> Self {
        Self { retry_after: Some(after), ..self }
    }

    /// Puts the time to come again on an answer.
    pub(super) fn headers(&self, mut response: Response) -> Response {
        if let Some(after) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        response
    }
}

/// The status of a request whose only row failed with this code.
pub(super) fn status_of(code: Code) -> StatusCode {
    match code {
        Code::Dns
        | Code::Connect
        | Code::Tls
        | Code::Timeout
        | Code::NotFound
        | Code::AccessDenied
        | Code::Http4xx
        | Code::Http429
        | Code::Http5xx
        | Code::RobotsOptout => StatusCode::BAD_GATEWAY,
        Code::Deadline => StatusCode::GATEWAY_TIMEOUT,
        Code::Inference => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::BAD_REQUEST,
    }
}

impl From<ParseError> for Problem {
    fn from(error: ParseError) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error.code().as_str(), error.to_string())
    }
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        let message = refused.to_string();
        match refused {
            Refused::Busy { after, .. } => Self::busy(message, after),
            Refused::Draining => Self::new(StatusCode::SERVICE_UNAVAILABLE, "draining", message),
            Refused::Lost => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = json!({"error": {"code": self.code, "message": self.message}});
        self.headers((self.status, Json(body)).into_response())
    }
}
