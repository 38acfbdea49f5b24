//! What the HTTP ports of the program have in common: listening until they are told to stop, and who may come in.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// A port that listens.
#[derive(Debug)]
pub struct Port {
    /// Where.
    pub address: SocketAddr,
    /// Ends after `stop` was cancelled and what was asked before is answered.
    pub task: tokio::task::JoinHandle<()>,
}

/// Serves `app` on an address, which the setting of the name `setting` holds, until `stop` is cancelled.
///
/// # Errors
/// The address is taken or may not be bound; the message names it.
pub async fn listen(
    address: SocketAddr,
    setting: &'static str,
    app: Router,
    stop: CancellationToken,
) -> anyhow::Result<Port> {
    let listener = TcpListener::bind(address).await.map_err(|error| {
        anyhow::anyhow!(
            "cannot listen on {address} ({setting}): {error}; choose another address, or port 0 for a free one"
        )
    })?;
    let address = listener.local_addr()?;
    let task = tokio::spawn(async move {
        let shutdown = stop.cancelled_owned();
        if let Err(error) = axum::serve(listener, app).with_graceful_shutdown(shutdown).await {
            tracing::error!(%error, setting, "the port stopped");
        }
    });
    Ok(Port { address, task })
}

/// Who may come in.
#[derive(Debug, Clone)]
pub struct Access {
    /// The token that is asked for, if one is.
    token: Option<Arc<str>>,
    /// The setting that holds it.
    setting: &'static str,
}

impl Access {
    /// Whoever has the token, or anybody where there is none.
    pub fn new(token: Option<String>, setting: &'static str) -> Self {
        Self { token: token.map(Into::into), setting }
    }
}

/// Lets in who may come in: a layer for routes that change something or cost something.
pub async fn authorise(State(access): State<Access>, request: Request, next: Next) -> Response {
    let (headers, setting) = (request.headers(), access.setting);
    let Some(token) = &access.token else {
        // A web page that is open in a browser of this machine can reach loopback, but not without saying who it is.
        if headers.contains_key(header::ORIGIN) {
            let text = format!("requests of web pages need a token: set {setting}\n");
            return (StatusCode::FORBIDDEN, text).into_response();
        }
        return next.run(request).await;
    };
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    if same(given.as_bytes(), token.as_bytes()) {
        return next.run(request).await;
    }
    let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
    let text = format!("this route needs the token of {setting}: Authorization: Bearer <token>\n");
    (StatusCode::UNAUTHORIZED, challenge, text).into_response()
}

/// Compares in a time that depends only on the lengths, so that a token cannot be guessed byte by byte.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differs, (x, y)| differs | (x ^ y)) == 0
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
