//! The HTTP endpoint that answers while its clients wait: the model card's table of images at `/score`, and the Open
//! Inference Protocol below `/v2`. What it takes goes through the flow beside the stream ([`crate::pipeline::Endpoint`]).

mod body;
mod document;
mod inference;
mod problem;
mod score;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Router, middleware};
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use self::body::Unread;
use self::problem::Problem;
use crate::disposition::{Failure, Stage};
use crate::gate::Reason;
use crate::message::{Message, ParsedRow, Request};
use crate::metrics::Route;
use crate::pipeline::endpoint::{Admitted, Answer, Refused};
use crate::pipeline::{Control, Endpoint};
use crate::settings;
use crate::web::{self, Access, Port};

/// The address of `blipstream serve` where none is configured.
pub const LISTEN: std::net::SocketAddr =
    std::net::SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8080);
/// How long a client that was refused in a pause should wait.
const PAUSED: Duration = Duration::from_secs(5);

/// What the routes share.
#[derive(Clone)]
struct Desk {
    control: Control,
    settings: Arc<settings::Endpoint>,
}

/// Serves the endpoint until `stop` is cancelled; requests are answered from when the flow is wired.
///
/// # Errors
/// The address is taken or may not be bound; the message names it.
pub async fn serve(settings: &settings::Endpoint, control: Control, stop: CancellationToken) -> anyhow::Result<Port> {
    let access = Access::new(settings.token.clone(), "endpoint.token");
    let desk = Desk { control, settings: Arc::new(settings.clone()) };
    web::listen(settings.listen.unwrap_or(LISTEN), "endpoint.listen", router(desk, access), stop).await
}

/// The routes that the document describes, and whether they cost something: those ask for the token.
fn routes() -> [(&'static str, MethodRouter<Desk>, bool); 7] {
    [
        ("/score", post(score::score), true),
        ("/v2", get(inference::server), false),
        ("/v2/health/live", get(inference::live), false),
        ("/v2/health/ready", get(inference::ready), false),
        ("/v2/models/{name}", get(inference::model), true),
        ("/v2/models/{name}/infer", post(inference::infer), true),
        ("/v2/models/{name}/ready", get(inference::model_ready), true),
    ]
}

fn router(desk: Desk, access: Access) -> Router {
    let authorise = middleware::from_fn_with_state(access, web::authorise);
    let mut router = Router::new().route("/", get(index)).route("/openapi.json", get(document::document));
    for (path, route, costs) in routes() {
        router = router.route(path, if costs { route.layer(authorise.clone()) } else { route });
    }
    router.with_state(desk)
}

async fn index() -> &'static str {
    "blipstream: image captions while you wait\n\n\
     POST /score                    {\"input_data\": {\"columns\": [\"image\"], \"data\": [[\"https://…\"]]}}\n\
     GET  /v2 /v2/health/live /v2/health/ready /v2/models/caption\n\
     POST /v2/models/caption/infer  Open Inference Protocol\n\
     GET  /openapi.json             all of it, for programs\n"
}

impl Desk {
    fn endpoint(&self) -> Result<&Endpoint, Problem> {
        // The flow may take rows for a moment more.
        if self.control.draining().is_cancelled() {
            return Err(Refused::Draining.into());
        }
        if self.control.gate().reasons().contains(&Reason::Operator) {
            return Err(Problem::busy("an operator has paused this worker", PAUSED));
        }
        self.control.endpoint().ok_or_else(Problem::loading)
    }

    /// Reads a body, for which there must be room before its first byte.
    async fn read(&self, headers: &HeaderMap, body: Body) -> Result<(Admitted, Bytes), Problem> {
        let limit = self.settings.max_body.as_u64() as usize;
        let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        let too_long = || {
            let text = format!(
                "the body is longer than {} (endpoint.max_body); send addresses instead of images, or fewer rows",
                self.settings.max_body
            );
            Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", text)
        };
        if length.is_some_and(|length: usize| length > limit) {
            return Err(too_long());
        }
        let mut admitted = self.endpoint()?.admit(length)?;
        let body = body::read(body, limit, length, self.settings.timeout).await.map_err(|error| match error {
            Unread::TooLong => too_long(),
            Unread::TooSlow => Problem::new(StatusCode::REQUEST_TIMEOUT, "timeout", error.to_string()),
            Unread::BrokeOff => Problem::unreadable(error.to_string()),
        })?;
        admitted.shrink(body.len());
        Ok((admitted, body))
    }

    /// The answers to rows, in their order: those that are no requests have their error.
    async fn ask(&self, admitted: Admitted, rows: Vec<ParsedRow>) -> Result<Vec<Answer>, Problem> {
        let mut requests: Vec<Request> = Vec::new();
        let mut answers: Vec<Option<Failure>> = Vec::with_capacity(rows.len());
        for row in rows {
            match row {
                Ok(request) => {
                    requests.push(request);
                    answers.push(None);
                }
                Err((error, _)) => answers.push(Some(Failure::new(Stage::Parse, &error))),
            }
        }
        let message = Message::empty("", 0, 0);
        let mut asked = self.endpoint()?.ask(admitted, message, requests).await?.into_iter();
        // The flow counts its own.
        answers.iter().flatten().for_each(|failure| self.control.metrics().row_answered(Some(failure.code)));
        let lost = || Problem::from(Refused::Lost);
        answers.into_iter().map(|failure| failure.map(Err).or_else(|| asked.next()).ok_or_else(lost)).collect()
    }

    /// Counts an answer to a request, and makes it one of HTTP.
    fn answer(&self, route: Route, begun: Instant, answer: Result<Response, Problem>) -> Response {
        let (status, took, response) = match answer {
            Ok(response) => (response.status(), Some(begun.elapsed()), response),
            Err(problem) => {
                let took = (problem.status != StatusCode::TOO_MANY_REQUESTS).then(|| begun.elapsed());
                let response = match route {
                    Route::Score => problem.into_response(),
                    Route::Infer => inference::error(problem),
                };
                (response.status(), took, response)
            }
        };
        self.control.metrics().asked(route, status.as_u16(), took);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_names_every_route() {
        let document = document::openapi(1, true);
        let named: Vec<_> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(named, routes().map(|(path, ..)| path));
        for (path, _, costs) in routes() {
            let route = document["paths"][path].as_object().unwrap();
            let (method, operation) = route.iter().find(|(name, _)| *name != "parameters").unwrap();
            let open = operation["security"].as_array().is_some_and(Vec::is_empty);
            assert_ne!(open, costs, "{method} {path}");
        }
    }
}
