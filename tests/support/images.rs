//! A local web server for images, good and bad. It speaks raw HTTP/1.1, so that it can break every rule of it, and it
//! counts what reaches it.

use std::collections::HashMap;
use std::io::Cursor;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use image::{ImageFormat, Rgb, RgbImage};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use url::Url;

/// How long [`ImageServer::until`] waits before it fails its test.
const PATIENCE: Duration = Duration::from_secs(20);

/// Longest request head, in bytes.
const MAX_HEAD: u64 = 16 * 1024;

/// What a path answers.
#[derive(Debug, Clone)]
pub enum Answer {
    /// 200 with a Content-Length.
    Body(Vec<u8>),
    /// 200, chunked, of unannounced length.
    Chunked(Vec<u8>),
    /// 200 that announces `declared` bytes, sends `body` and closes the connection.
    Lying { declared: usize, body: Vec<u8> },
    /// 200, chunked, without end.
    Endless,
    /// 200 with a Content-Length, a byte at a time.
    Drip { body: Vec<u8>, every: Duration },
    /// 200 that announces a body and sends none of it.
    Stalled,
    /// 200 that announces a body, sends none of it, and closes the connection after this time.
    Impatient(Duration),
    /// 200 with headers and a body.
    With(Vec<(&'static str, String)>, Vec<u8>),
    /// These bytes and nothing else, then the end of the connection.
    Raw(Vec<u8>),
    /// A head that never ends.
    EndlessHead,
    /// A 200 of so many bytes that is cut by a reset of the connection, so many of them sent.
    Reset { declared: usize, body: Vec<u8> },
    /// These bytes, and then a reset of the connection.
    Cut(Vec<u8>),
    /// Any other status, with headers and no body.
    Status(u16, Vec<(&'static str, String)>),
    /// Closes the connection without an answer.
    Closed,
    /// Nothing, until the client gives up.
    Silence,
    /// The answer inside, once the test opens the gate.
    Held(Box<Answer>),
}

impl Answer {
    /// 302 to `location`.
    pub fn redirect(location: impl Into<String>) -> Self {
        Self::Status(302, vec![("location", location.into())])
    }

    /// A status without headers.
    pub fn status(status: u16) -> Self {
        Self::Status(status, Vec::new())
    }
}

/// What the server has seen.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Connections accepted.
    pub connections: usize,
    /// Requests under way.
    pub active: usize,
    /// Most requests under way at once.
    pub peak: usize,
    /// Heads of the requests, by path, in their order.
    pub heads: HashMap<String, Vec<String>>,
}

impl Seen {
    /// Requests of a path.
    pub fn requests(&self, path: &str) -> usize {
        self.heads.get(path).map_or(0, Vec::len)
    }

    /// Requests in all.
    pub fn total(&self) -> usize {
        self.heads.values().map(Vec::len).sum()
    }
}

/// The server; it ends when it is dropped.
pub struct ImageServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    listener: JoinHandle<()>,
}

struct Shared {
    routes: Mutex<HashMap<String, Vec<Answer>>>,
    seen: watch::Sender<Seen>,
    gate: watch::Sender<bool>,
}

impl ImageServer {
    /// A server without paths on a free port of 127.0.0.1.
    pub async fn start() -> Self {
        Self::start_on(Ipv4Addr::LOCALHOST).await
    }

    /// The same on all of 127.0.0.0/8, which makes as many hosts of it as a test wants: see [`Self::url_at`].
    pub async fn start_everywhere() -> Self {
        Self::start_on(Ipv4Addr::UNSPECIFIED).await
    }

    /// On the loopback address of IPv6.
    pub async fn start_on_ipv6() -> Self {
        Self::start_on(Ipv6Addr::LOCALHOST).await
    }

    async fn start_on(address: impl Into<IpAddr>) -> Self {
        let listener = TcpListener::bind((address.into(), 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let shared = Arc::new(Shared {
            routes: Mutex::default(),
            seen: watch::Sender::default(),
            gate: watch::Sender::new(false),
        });
        let listener = tokio::spawn(listen(listener, shared.clone()));
        Self { address, shared, listener }
    }

    /// One whose `/good.png` is a picture, `/gone.png` is missing, `/shaky.png` fails twice before it is one, and `/down.png`
    /// always fails.
    pub async fn of_all_kinds() -> Self {
        let picture = |seed| Answer::Body(png(24, 24, seed));
        Self::start()
            .await
            .with("/good.png", picture(1))
            .with("/gone.png", Answer::status(404))
            .with_all("/shaky.png", vec![Answer::status(503), Answer::status(503), picture(2)])
            .with("/down.png", Answer::status(503))
    }

    /// Gives a path its answer.
    #[must_use]
    pub fn with(self, path: &str, answer: Answer) -> Self {
        self.set(path, answer);
        self
    }

    /// The same while requests come.
    pub fn set(&self, path: &str, answer: Answer) {
        self.shared.routes.lock().unwrap().insert(path.to_owned(), vec![answer]);
    }

    /// Gives a path its answers, one a request; the last one stays.
    #[must_use]
    pub fn with_all(self, path: &str, answers: Vec<Answer>) -> Self {
        assert!(!answers.is_empty(), "a path without an answer");
        self.shared.routes.lock().unwrap().insert(path.to_owned(), answers);
        self
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// The address of a path.
    pub fn url(&self, path: &str) -> Url {
        self.url_at("127.0.0.1", path)
    }

    /// The address of a path, under another name of this host.
    pub fn url_at(&self, host: &str, path: &str) -> Url {
        Url::parse(&format!("http://{host}:{}{path}", self.port())).expect("a URL")
    }

    /// What it has seen so far.
    pub fn seen(&self) -> Seen {
        self.shared.seen.borrow().clone()
    }

    /// Waits until it has seen something.
    pub async fn until(&self, mut condition: impl FnMut(&Seen) -> bool) {
        let mut seen = self.shared.seen.subscribe();
        let result = tokio::time::timeout(PATIENCE, seen.wait_for(|seen| condition(seen))).await;
        assert!(matches!(result, Ok(Ok(_))), "the server never saw that: {:?}", self.seen());
    }

    /// Lets the held answers go, now and from now on.
    pub fn open_gate(&self) {
        self.shared.gate.send_replace(true);
    }
}

impl Drop for ImageServer {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    // Aborted together with this task.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        // Head and body are written apart; without this the body would wait for a delayed acknowledgement.
        let _ = stream.set_nodelay(true);
        shared.seen.send_modify(|seen| seen.connections += 1);
        connections.spawn(serve(stream, shared.clone()));
    }
}

/// Counts a request as under way.
struct Active<'a>(&'a Shared);

impl<'a> Active<'a> {
    fn enter(shared: &'a Shared, path: &str, head: String) -> Self {
        shared.seen.send_modify(|seen| {
            seen.heads.entry(path.to_owned()).or_default().push(head);
            seen.active += 1;
            seen.peak = seen.peak.max(seen.active);
        });
        Self(shared)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.seen.send_modify(|seen| seen.active -= 1);
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    while let Some((path, head)) = read_head(&mut reader).await {
        let _active = Active::enter(&shared, &path, head);
        let answer = {
            let mut routes = shared.routes.lock().unwrap();
            match routes.get_mut(&path) {
                Some(answers) if answers.len() > 1 => answers.remove(0),
                Some(answers) => answers[0].clone(),
                None => Answer::status(404),
            }
        };
        let answer = match answer {
            Answer::Held(inner) => {
                let mut gate = shared.gate.subscribe();
                // The client may give up first.
                tokio::select! {
                    _ = gate.wait_for(|open| *open) => *inner,
                    _ = reader.read_u8() => return,
                }
            }
            other => other,
        };
        if matches!(answer, Answer::Silence) {
            let _ = reader.read_u8().await;
            return;
        }
        if matches!(answer, Answer::Reset { .. } | Answer::Cut(_)) {
            let _ = writer.as_ref().set_zero_linger();
        }
        // A client that gave up closes its side: the write fails, or the read of a stalled one returns.
        let stays = tokio::select! {
            kept = write(&mut writer, answer) => kept.unwrap_or(false),
            _ = reader.read_u8() => false,
        };
        if !stays {
            return;
        }
    }
}

async fn read_head(reader: &mut (impl AsyncBufReadExt + Unpin)) -> Option<(String, String)> {
    let mut reader = reader.take(MAX_HEAD);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    let path = head.split(' ').nth(1)?.split('?').next()?.to_owned();
    Some((path, head))
}

/// Writes an answer; tells whether the connection goes on.
async fn write(to: &mut (impl AsyncWriteExt + Unpin), answer: Answer) -> std::io::Result<bool> {
    match answer {
        Answer::Body(body) => {
            to.write_all(head(200, &[], &format!("content-length: {}", body.len())).as_bytes()).await?;
            to.write_all(&body).await?;
            return Ok(true);
        }
        Answer::Status(status, headers) => {
            // 204 and 304 have no body, and may not say that they have none.
            let length = if matches!(status, 204 | 304) { "x: y" } else { "content-length: 0" };
            to.write_all(head(status, &headers, length).as_bytes()).await?;
            return Ok(true);
        }
        Answer::With(headers, body) => {
            to.write_all(head(200, &headers, &format!("content-length: {}", body.len())).as_bytes()).await?;
            to.write_all(&body).await?;
            return Ok(true);
        }
        Answer::Raw(bytes) | Answer::Cut(bytes) => to.write_all(&bytes).await?,
        Answer::EndlessHead => {
            to.write_all(b"HTTP/1.1 200 OK\r\n").await?;
            loop {
                to.write_all(format!("x-filler: {}\r\n", "a".repeat(1000)).as_bytes()).await?;
            }
        }
        Answer::Chunked(body) => {
            to.write_all(head(200, &[], "transfer-encoding: chunked").as_bytes()).await?;
            for piece in body.chunks(1000) {
                to.write_all(&chunk(piece)).await?;
            }
            to.write_all(b"0\r\n\r\n").await?;
            return Ok(true);
        }
        Answer::Lying { declared, body } | Answer::Reset { declared, body } => {
            to.write_all(head(200, &[], &format!("content-length: {declared}")).as_bytes()).await?;
            to.write_all(&body).await?;
        }
        Answer::Endless => {
            to.write_all(head(200, &[], "transfer-encoding: chunked").as_bytes()).await?;
            loop {
                to.write_all(&chunk(&[0; 4096])).await?;
            }
        }
        Answer::Drip { body, every } => {
            to.write_all(head(200, &[], &format!("content-length: {}", body.len())).as_bytes()).await?;
            for byte in body {
                tokio::time::sleep(every).await;
                to.write_all(&[byte]).await?;
            }
        }
        Answer::Stalled => {
            to.write_all(head(200, &[], "content-length: 1000").as_bytes()).await?;
            std::future::pending::<()>().await;
        }
        Answer::Impatient(patience) => {
            to.write_all(head(200, &[], "content-length: 1000").as_bytes()).await?;
            tokio::time::sleep(patience).await;
        }
        Answer::Closed | Answer::Silence | Answer::Held(_) => {}
    }
    Ok(false)
}

fn head(status: u16, headers: &[(&str, String)], last: &str) -> String {
    let mut lines = vec![format!("HTTP/1.1 {status} Status"), "content-type: image/png".into()];
    lines.extend(headers.iter().map(|(name, value)| format!("{name}: {value}")));
    lines.push(format!("{last}\r\n\r\n"));
    lines.join("\r\n")
}

fn chunk(piece: &[u8]) -> Vec<u8> {
    let mut chunk = format!("{:x}\r\n", piece.len()).into_bytes();
    chunk.extend_from_slice(piece);
    chunk.extend_from_slice(b"\r\n");
    chunk
}

/// A PNG of a colour gradient; another `seed` is another picture.
pub fn png(width: u32, height: u32, seed: u8) -> Vec<u8> {
    encode(width, height, seed, ImageFormat::Png)
}

/// The same as a JPEG.
pub fn jpeg(width: u32, height: u32, seed: u8) -> Vec<u8> {
    encode(width, height, seed, ImageFormat::Jpeg)
}

fn encode(width: u32, height: u32, seed: u8, format: ImageFormat) -> Vec<u8> {
    let picture = RgbImage::from_fn(width, height, |x, y| Rgb([(x % 256) as u8, (y % 256) as u8, seed]));
    let mut out = Cursor::new(Vec::new());
    picture.write_to(&mut out, format).expect("an encoded picture");
    out.into_inner()
}

/// A PNG whose header claims this size, with an empty stream of pixels.
pub fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut chunk = b"IHDR".to_vec();
    chunk.extend(width.to_be_bytes());
    chunk.extend(height.to_be_bytes());
    chunk.extend([8, 2, 0, 0, 0]);
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    file.extend(13u32.to_be_bytes());
    file.extend(&chunk);
    file.extend(crc(&chunk).to_be_bytes());
    let data = b"IDAT\x78\x9c\x03\x00\x00\x00\x00\x01";
    file.extend(8u32.to_be_bytes());
    file.extend(data);
    file.extend(crc(data).to_be_bytes());
    file
}

/// CRC-32 of ISO 3309, as PNG's appendix D gives it.
fn crc(bytes: &[u8]) -> u32 {
    let table = |mut c: u32| {
        (0..8).for_each(|_| c = if c & 1 == 1 { 0xEDB8_8320 ^ (c >> 1) } else { c >> 1 });
        c
    };
    !bytes.iter().fold(!0, |c, byte| table((c ^ u32::from(*byte)) & 0xFF) ^ (c >> 8))
}
