//! The HTTP port for health, metrics and control.
//!
//! `/livez`, `/readyz`, `/metrics` and `/status` read; `POST /admin/pause|resume|drain` and `PUT /admin/limits` change
//! the worker, and need a bearer token where one is configured. Loopback needs none.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::pipeline::{Control, Limits};

/// Largest body of a request to this port: limits are a handful of numbers.
const MAX_BODY: usize = 16 * 1024;

#[derive(Clone)]
struct Admin {
    control: Control,
    token: Option<Arc<str>>,
}

/// Serves the port until `stop` is cancelled.
///
/// # Errors
/// The address is taken or may not be bound; the message names it.
pub async fn serve(
    listen: SocketAddr,
    token: Option<String>,
    control: Control,
    stop: CancellationToken,
) -> anyhow::Result<(SocketAddr, tokio::task::JoinHandle<()>)> {
    let listener = TcpListener::bind(listen).await.map_err(|error| {
        anyhow::anyhow!(
            "cannot listen on {listen} (admin.listen): {error}; choose another address, or port 0 for a free one"
        )
    })?;
    let address = listener.local_addr()?;
    let app = router(Admin { control, token: token.map(Into::into) });
    let task = tokio::spawn(async move {
        let shutdown = stop.cancelled_owned();
        if let Err(error) = axum::serve(listener, app).with_graceful_shutdown(shutdown).await {
            tracing::error!(%error, "the admin port stopped");
        }
    });
    Ok((address, task))
}

fn router(admin: Admin) -> Router {
    let control = Router::new()
        .route("/admin/pause", post(pause))
        .route("/admin/resume", post(resume))
        .route("/admin/drain", post(drain))
        .route("/admin/limits", put(limits))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn_with_state(admin.clone(), authorise));
    Router::new()
        .route("/", get(index))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .merge(control)
        .with_state(admin)
}

async fn authorise(State(admin): State<Admin>, headers: HeaderMap, request: Request, next: Next) -> Response {
    let Some(token) = &admin.token else {
        // A web page that is open in a browser of this machine can reach loopback, but not without saying who it is.
        if headers.contains_key(header::ORIGIN) {
            return (StatusCode::FORBIDDEN, "requests of web pages need a token: set admin.token\n").into_response();
        }
        return next.run(request).await;
    };
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    if same(given.as_bytes(), token.as_bytes()) {
        return next.run(request).await;
    }
    let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
    (StatusCode::UNAUTHORIZED, challenge, "this route needs the token of admin.token: Authorization: Bearer <token>\n")
        .into_response()
}

/// Compares in a time that depends only on the lengths, so that a token cannot be guessed byte by byte.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differs, (x, y)| differs | (x ^ y)) == 0
}

async fn index() -> &'static str {
    "blipstream\n\nGET  /livez /readyz /metrics /status\nPOST /admin/pause /admin/resume /admin/drain\nPUT  /admin/limits\n"
}

/// The process and its device threads are alive. A full queue or a pause is no reason to be restarted.
async fn livez(State(admin): State<Admin>) -> Response {
    if admin.control.alive() {
        (StatusCode::OK, "ok\n").into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "no device is left: see the log and /status\n").into_response()
    }
}

async fn readyz(State(admin): State<Admin>) -> Response {
    let readiness = admin.control.readiness();
    let code = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(readiness)).into_response()
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let format = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (format, admin.control.render_metrics()).into_response()
}

async fn status(State(admin): State<Admin>) -> Response {
    Json(admin.control.status()).into_response()
}

async fn pause(State(admin): State<Admin>) -> Response {
    admin.control.pause();
    Json(json!({"state": admin.control.state().as_str()})).into_response()
}

async fn resume(State(admin): State<Admin>) -> Response {
    admin.control.resume();
    Json(json!({"state": admin.control.state().as_str()})).into_response()
}

async fn drain(State(admin): State<Admin>) -> Response {
    admin.control.drain("an operator asked for it (POST /admin/drain)");
    (StatusCode::ACCEPTED, Json(json!({"state": admin.control.state().as_str()}))).into_response()
}

async fn limits(State(admin): State<Admin>, body: String) -> Response {
    // Read by hand rather than by the Json extractor, so that an error says what this port knows.
    match serde_json::from_str::<Limits>(&body)
        .map_err(|error| error.to_string())
        .and_then(|limits| admin.control.set_limits(limits))
    {
        Ok(now) => Json(now).into_response(),
        Err(error) => (StatusCode::UNPROCESSABLE_ENTITY, Json(json!({"error": error}))).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_equals_only_itself() {
        assert!(same(b"secret", b"secret"));
        assert!(!same(b"secreT", b"secret"));
        assert!(!same(b"", b"secret"));
    }
}
