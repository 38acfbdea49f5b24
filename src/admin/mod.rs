//! The HTTP port for health, metrics and control.
//!
//! `/livez`, `/readyz`, `/metrics`, `/status` and `GET /admin/models` read; `POST /admin/pause|resume|drain|models` and
//! `PUT /admin/limits` change the worker. All below `/admin` need a bearer token where one is configured. Loopback needs none.

use std::net::SocketAddr;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::pipeline::{Control, Limits, Refused, Wanted};
use crate::web::{self, Access, Port};

/// Largest body of a request to this port: limits are a handful of numbers.
const MAX_BODY: usize = 16 * 1024;

/// Serves the port until `stop` is cancelled.
///
/// # Errors
/// The address is taken or may not be bound; the message names it.
pub async fn serve(
    listen: SocketAddr,
    token: Option<String>,
    control: Control,
    stop: CancellationToken,
) -> anyhow::Result<Port> {
    web::listen(listen, "admin.listen", router(control, Access::new(token, "admin.token")), stop).await
}

fn router(admin: Control, access: Access) -> Router {
    let control = Router::new()
        .route("/admin/pause", post(pause))
        .route("/admin/resume", post(resume))
        .route("/admin/drain", post(drain))
        .route("/admin/limits", put(limits))
        .route("/admin/models", get(models).post(exchange))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn_with_state(access, web::authorise));
    Router::new()
        .route("/", get(index))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .merge(control)
        .with_state(admin)
}

async fn index() -> &'static str {
    "blipstream\n\nGET  /livez /readyz /metrics /status\nPOST /admin/pause /admin/resume /admin/drain\nPUT  /admin/limits\nGET, POST /admin/models\n"
}

/// The process and its device threads are alive. A full queue or a pause is no reason to be restarted.
async fn livez(State(control): State<Control>) -> Response {
    if control.alive() {
        (StatusCode::OK, "ok\n").into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "no device is left: see the log and /status\n").into_response()
    }
}

async fn readyz(State(control): State<Control>) -> Response {
    let readiness = control.readiness();
    let code = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(readiness)).into_response()
}

async fn metrics(State(control): State<Control>) -> Response {
    let format = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (format, control.render_metrics()).into_response()
}

async fn status(State(control): State<Control>) -> Response {
    Json(control.status()).into_response()
}

async fn pause(State(control): State<Control>) -> Response {
    control.pause();
    Json(json!({"state": control.state().as_str()})).into_response()
}

async fn resume(State(control): State<Control>) -> Response {
    control.resume();
    Json(json!({"state": control.state().as_str()})).into_response()
}

async fn drain(State(control): State<Control>) -> Response {
    control.drain("an operator asked for it (POST /admin/drain)");
    (StatusCode::ACCEPTED, Json(json!({"state": control.state().as_str()}))).into_response()
}

async fn limits(State(control): State<Control>, body: String) -> Response {
    // Read by hand rather than by the Json extractor, so that an error says what this port knows.
    match serde_json::from_str::<Limits>(&body)
        .map_err(|error| error.to_string())
        .and_then(|limits| control.set_limits(limits))
    {
        Ok(now) => Json(now).into_response(),
        Err(error) => (StatusCode::UNPROCESSABLE_ENTITY, Json(json!({"error": error}))).into_response(),
    }
}

/// A page that says that models are being loaded for the first time.
fn loading() -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"error": "the models are being loaded: try again in a moment"})))
        .into_response()
}

async fn models(State(control): State<Control>) -> Response {
    control.models().map_or_else(loading, |models| Json(models.now()).into_response())
}

/// Answers when the models are exchanged, which may take minutes. Who does not wait does not stop it.
async fn exchange(State(control): State<Control>, body: String) -> Response {
    let refused = |status: StatusCode, error: String| (status, Json(json!({"error": error}))).into_response();
    let wanted: Wanted = match serde_json::from_str(&body) {
        Ok(wanted) => wanted,
        Err(error) => return refused(StatusCode::UNPROCESSABLE_ENTITY, error.to_string()),
    };
    let exchange = move || control.models().map(|models| models.exchange(&wanted));
    match tokio::task::spawn_blocking(exchange).await {
        Ok(Some(Ok(now))) => Json(now).into_response(),
        Ok(Some(Err(error))) => {
            let status = match error {
                Refused::UnderWay => StatusCode::CONFLICT,
                Refused::NotNow(_) => StatusCode::SERVICE_UNAVAILABLE,
                Refused::Order(_) | Refused::Load(_) => StatusCode::UNPROCESSABLE_ENTITY,
            };
            refused(status, error.to_string())
        }
        Ok(None) => loading(),
        Err(_) => refused(StatusCode::INTERNAL_SERVER_ERROR, "the loading panicked; the log says more".into()),
    }
}
