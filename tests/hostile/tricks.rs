//! What a hostile image server can do, and what has to come of it.

use std::io::Cursor;
use std::net::SocketAddr;
use std::time::Duration;

use image::{GrayImage, ImageFormat};

use crate::support::images::{Answer, ImageServer, jpeg, png, png_header};
use crate::support::tls::{OTHER_NAME, SELF_SIGNED, tls_server};

/// The address that the tricks are played from; others are elsewhere.
pub const HOST: &str = "127.0.0.66";

/// Requests of a storm.
const STORM: usize = 100;

/// A trick, as some messages see it.
pub struct Trick {
    pub what: &'static str,
    /// What the messages refer to.
    pub images: Vec<String>,
    /// The code of their dead letters; without one they are captioned.
    pub code: Option<&'static str>,
}

/// Sets up every trick.
pub fn all(server: &ImageServer) -> Vec<Trick> {
    let mut tricks = Vec::new();
    let mut one = |what, code, answer: Answer| {
        let path = format!("/trick-{}", tricks.len());
        server.set(&path, answer);
        tricks.push(Trick { what, images: vec![server.url_at(HOST, &path).into()], code });
    };
    let picture = png(300, 200, 1);
    let drip = Answer::Drip { body: picture.clone(), every: Duration::from_millis(100) };
    one("a body that drips, 10 bytes a second", Some("timeout"), drip);
    one("no answer", Some("timeout"), Answer::Silence);
    one("a head, and no body", Some("timeout"), Answer::Stalled);
    one("a head without end", Some("too_large"), Answer::EndlessHead);
    one("a body without end", Some("too_large"), Answer::Endless);
    one("a body announced with 1 TiB", Some("too_large"), Answer::Lying { declared: 1 << 40, body: vec![1; 10] });
    one("a body shorter than announced", Some("connect"), Answer::Lying { declared: 9999, body: picture.clone() });
    let longer = [b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n", &picture[..]].concat();
    one("a body longer than announced", Some("decode"), Answer::Raw(longer));
    let zeros = Answer::With(vec![("content-encoding", "gzip".into())], b"\x1f\x8b\x08\0\0\0\0\0\0\x03".to_vec());
    one("a body packed with gzip, though none was asked for", Some("unsupported_media"), zeros);
    let page = b"<!doctype html><html><body>Not an image</body></html>".to_vec();
    one("an HTML page with the type of an image", Some("unsupported_media"), Answer::Body(page));
    one("another protocol", Some("connect"), Answer::Raw(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()));
    let half = |mut body: Vec<u8>| {
        body.truncate(body.len() / 2);
        Answer::Body(body)
    };
    one("half a JPEG", Some("decode"), half(jpeg(640, 480, 2)));
    one("half a PNG", Some("decode"), half(png(640, 480, 2)));
    one("a PNG of 30,000 × 30,000 pixels", Some("too_many_pixels"), Answer::Body(png_header(30_000, 30_000)));
    one("a PNG of 8,000 × 8,000 black pixels, which is allowed", None, Answer::Body(black(8_000)));
    one("a redirect to itself", Some("http_4xx"), Answer::redirect("/trick-15"));
    one("a redirect to the metadata of a cloud", Some("blocked_address"), Answer::redirect("http://169.254.169.254/"));
    one("a redirect into the private network", Some("blocked_address"), Answer::redirect("http://[::ffff:10.0.0.1]/"));
    one("a redirect to a file", Some("blocked_address"), Answer::redirect("file:///etc/passwd"));

    let secure = |address: SocketAddr| vec![format!("https://127.0.0.1:{}/a.png", address.port())];
    let images = secure(tls_server(OTHER_NAME));
    tricks.push(Trick { what: "TLS with the certificate of another name", images, code: Some("tls") });
    let images = secure(tls_server(SELF_SIGNED));
    tricks.push(Trick { what: "TLS with a certificate that nobody signed", images, code: Some("tls") });

    // Cut before the last byte at the latest.
    let small = png(8, 8, 3);
    let whole = [format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", small.len()).into_bytes(), small].concat();
    let cut = |length: usize| {
        let path = format!("/cut-{length}");
        server.set(&path, Answer::Cut(whole[..length].to_vec()));
        server.url_at(HOST, &path).into()
    };
    let images = (0..whole.len()).map(cut).collect();
    tricks.push(Trick { what: "a connection that is reset, at each byte of an answer", images, code: Some("connect") });

    let mut storm = |what, code, path: &str, answer: Answer| {
        server.set(path, answer);
        // Each its own address, so that none is fetched for another.
        let url = |number: usize| format!("{}?{number}", server.url_at(HOST, path));
        tricks.push(Trick { what, images: (0..STORM).map(url).collect(), code: Some(code) });
    };
    storm("a storm of 100 answers 500", "http_5xx", "/storm-500", Answer::status(500));
    let wait = |status: u16, seconds: &str| Answer::Status(status, vec![("retry-after", seconds.to_owned())]);
    storm("a storm of 100 answers 503, Retry-After 1 s", "http_5xx", "/storm-503", wait(503, "1"));
    storm("a storm of 100 answers 429, Retry-After 1 s", "http_429", "/storm-429", wait(429, "1"));
    storm("a storm of 100 answers 429, Retry-After 1 day", "http_429", "/storm-day", wait(429, "86400"));
    tricks
}

fn black(side: u32) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    GrayImage::new(side, side).write_to(&mut file, ImageFormat::Png).unwrap();
    file.into_inner()
}
