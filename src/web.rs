//! What the HTTP ports of the program have in common: listening until they are told to stop, and who may come in.

use std::io::ErrorKind::{ConnectionAborted, ConnectionReset};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Most connections of a port; who comes beyond waits until one ends.
const MOST_CONNECTIONS: usize = 1024;
/// How long the head of a request may take, and a connection may stay open without one.
const LONGEST_HEAD: Duration = Duration::from_secs(30);
/// The wait after a connection that could not be accepted: the system is short of something.
const SHORT_OF_SOMETHING: Duration = Duration::from_secs(1);

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
    let bounds = Bounds { connections: MOST_CONNECTIONS, head: LONGEST_HEAD };
    Ok(Port { address, task: tokio::spawn(serve(listener, setting, app, bounds, stop)) })
}

/// What strangers may take of a port.
#[derive(Clone, Copy)]
struct Bounds {
    connections: usize,
    head: Duration,
}

/// Takes connections until `stop` is cancelled, and ends when the last one has.
async fn serve(listener: TcpListener, setting: &'static str, app: Router, bounds: Bounds, stop: CancellationToken) {
    let (places, open) = (Arc::new(Semaphore::new(bounds.connections)), TaskTracker::new());
    let next = async || (places.clone().acquire_owned().await, listener.accept().await);
    while let Some((place, accepted)) = stop.run_until_cancelled(next()).await {
        match accepted {
            Ok((stream, _)) => {
                open.spawn(converse(stream, place.ok(), app.clone(), bounds.head, stop.clone()));
            }
            // The client has gone already.
            Err(error) if matches!(error.kind(), ConnectionAborted | ConnectionReset) => {}
            Err(error) => {
                tracing::warn!(%error, setting, "a connection could not be accepted");
                tokio::time::sleep(SHORT_OF_SOMETHING).await;
            }
        }
    }
    drop(listener);
    open.close();
    open.wait().await;
}

/// Answers the requests of a connection; once `stop` is cancelled, only the one that is under way.
async fn converse(
    stream: TcpStream,
    _place: Option<OwnedSemaphorePermit>,
    app: Router,
    head: Duration,
    stop: CancellationToken,
) {
    // Answers are written whole: nothing is gained by waiting for more.
    let _ = stream.set_nodelay(true);
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(head);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app)));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    // A client that leaves, or says nothing that is HTTP, is no news.
    if let Err(error) = ended {
        tracing::trace!(%error, "a connection broke off");
    }
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
    let given = given.and_then(|value| value.split_once(' ')).filter(|(kind, _)| kind.eq_ignore_ascii_case("Bearer"));
    let given = given.map_or("", |(_, token)| token.trim_start());
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A port that says "well", and takes so many connections.
    async fn port(connections: usize, head: Duration) -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let app = Router::new().route("/", axum::routing::get(async || "well"));
        let task = tokio::spawn(serve(listener, "test", app, Bounds { connections, head }, stop.clone()));
        (address, stop, task)
    }

    async fn said(mut stream: TcpStream) -> String {
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text).await;
        text
    }

    async fn ask(at: SocketAddr) -> String {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").await.unwrap();
        said(stream).await
    }

    #[tokio::test]
    async fn who_sends_no_request_is_not_waited_for_and_keeps_nobody_out() {
        let (at, stop, task) = port(2, Duration::from_millis(100)).await;
        let silent = TcpStream::connect(at).await.unwrap();
        let mut slow = TcpStream::connect(at).await.unwrap();
        slow.write_all(b"GET / HTTP/1.1\r\nhost").await.unwrap();
        // There is no room beside them until they are sent away.
        assert!(ask(at).await.ends_with("well"));
        assert!(!said(silent).await.contains("well"));
        assert!(!said(slow).await.contains("well"));
        // And one that has been answered.
        let mut idle = TcpStream::connect(at).await.unwrap();
        idle.write_all(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n").await.unwrap();
        assert!(said(idle).await.ends_with("well"));
        stop.cancel();
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_port_that_stops_waits_for_the_answers_under_way_and_for_no_idle_connection() {
        let (at, stop, task) = port(9, Duration::from_secs(600)).await;
        let idle = TcpStream::connect(at).await.unwrap();
        assert!(ask(at).await.ends_with("well"));
        stop.cancel();
        task.await.unwrap();
        assert_eq!(said(idle).await, "");
    }

    #[test]
    fn a_token_equals_only_itself() {
        assert!(same(b"secret", b"secret"));
        assert!(!same(b"secreT", b"secret"));
        assert!(!same(b"", b"secret"));
    }
}
