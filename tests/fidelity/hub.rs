//! Models from a hub, here a small server on loopback that answers as the hub does.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::{fs, thread};

use blipstream::caption::{DeviceSpec, DtypeSpec, HubSource, LoadOptions, ModelSource, caption, load};
use tempfile::TempDir;

use crate::fixture::Fixture;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const REPOSITORY: &str = "tiny/depths";
const TOKEN: &str = "hf_secret";

/// Serves one repository to those who have the token. It ends with the test's process.
struct Hub {
    endpoint: String,
    /// `METHOD path` of each request.
    requests: Arc<Mutex<Vec<String>>>,
}

type Files = BTreeMap<String, Vec<u8>>;

impl Hub {
    fn serve(files: Files) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        let files = Arc::new(files);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, log) = (Arc::clone(&files), Arc::clone(&log));
                thread::spawn(move || answer(stream, &files, &log));
            }
        });
        Self { endpoint, requests }
    }

    fn source(&self, cache: &Path) -> HubSource {
        HubSource {
            id: REPOSITORY.into(),
            revision: None,
            endpoint: Some(self.endpoint.clone()),
            token: Some(TOKEN.into()),
            cache: Some(cache.to_owned()),
        }
    }

    /// What was asked since the last call.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

fn answer(stream: TcpStream, files: &Files, log: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            match line.trim_end() {
                "" => break,
                line => lines.push(line.to_owned()),
            }
        }
        let path = lines[0].split(' ').nth(1).unwrap().to_owned();
        let header = |name: &str| {
            lines.iter().find_map(|line| {
                let (key, value) = line.split_once(": ")?;
                key.eq_ignore_ascii_case(name).then(|| value.to_owned())
            })
        };
        log.lock().unwrap().push(path.clone());
        let allowed = header("authorization").as_deref() == Some(&format!("Bearer {TOKEN}"));
        if respond(&stream, files, &path, allowed, header("range").as_deref()).is_err() {
            return;
        }
    }
}

fn respond(stream: &TcpStream, files: &Files, path: &str, allowed: bool, range: Option<&str>) -> std::io::Result<()> {
    if !allowed {
        return send(stream, "401 Unauthorized", "", b"{}");
    }
    let info = format!("/api/models/{REPOSITORY}/revision/");
    if let Some(revision) = path.strip_prefix(&info) {
        if !["main", "v1", COMMIT].contains(&revision) {
            return send(stream, "404 Not Found", "", b"{}");
        }
        let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let body = serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string();
        return send(stream, "200 OK", "", body.as_bytes());
    }
    let name = path.strip_prefix(&format!("/{REPOSITORY}/resolve/{COMMIT}/"));
    let Some((name, content)) = name.and_then(|name| Some((name, files.get(name)?))) else {
        return send(stream, "404 Not Found", "", b"{}");
    };
    let range = range.and_then(|range| range.strip_prefix("bytes=")).unwrap_or("0-");
    let (from, to) = range.split_once('-').unwrap();
    let from: usize = from.parse().unwrap();
    let to = to.parse().unwrap_or(content.len() - 1).min(content.len() - 1);
    let headers = format!(
        "etag: \"{name}-1\"\r\nx-repo-commit: {COMMIT}\r\ncontent-range: bytes {from}-{to}/{}\r\n",
        content.len()
    );
    send(stream, "206 Partial Content", &headers, &content[from..=to])
}

fn send(mut stream: &TcpStream, status: &str, headers: &str, body: &[u8]) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status}\r\n{headers}content-length: {}\r\n\r\n", body.len())?;
    stream.write_all(body)
}

/// The files of the fixture `depths`, as a repository would have them.
fn published() -> Files {
    let names =
        ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];
    let directory = Fixture::read("depths").directory();
    let mut files: Files = names.map(|name| (name.to_owned(), fs::read(directory.join(name)).unwrap())).into();
    files.insert("README.md".into(), b"not asked for".to_vec());
    files
}

fn options(source: HubSource) -> LoadOptions {
    LoadOptions { device: DeviceSpec::Cpu, dtype: DtypeSpec::F32, ..LoadOptions::new(ModelSource::Hub(source)) }
}

fn failure(source: HubSource) -> String {
    load(&options(source)).err().expect("the model should not load").to_string()
}

#[test]
fn a_model_is_fetched_once_and_then_comes_from_the_cache() {
    let hub = Hub::serve(published());
    let cache = TempDir::new().unwrap();
    let fixture = Fixture::read("depths");
    let mut engine = load(&options(hub.source(cache.path()))).unwrap();
    assert_eq!((engine.model().id.as_str(), engine.model().revision.as_deref()), (REPOSITORY, Some(COMMIT)));
    for (expected, caption) in fixture.captions.iter().zip(caption(&mut *engine, &fixture.items()).unwrap()) {
        expected.check(&caption.unwrap());
    }
    let asked = hub.asked();
    assert!(asked.iter().any(|path| path.ends_with("/model.safetensors")), "{asked:?}");
    assert!(!asked.iter().any(|path| path.ends_with("README.md") || path.contains("resolve/main")), "{asked:?}");

    load(&options(hub.source(cache.path()))).unwrap();
    assert_eq!(hub.asked(), [format!("/api/models/{REPOSITORY}/revision/main")]);
}

#[test]
fn who_only_asks_for_the_configuration_fetches_nothing_else() {
    let hub = Hub::serve(published());
    let cache = TempDir::new().unwrap();
    let source = hub.source(cache.path());
    assert_eq!(source.cached_config().unwrap(), None);
    assert!(hub.asked().is_empty());
    let path = source.fetch_config().unwrap();
    assert_eq!(fs::read(&path).unwrap(), published()["config.json"]);
    let asked = hub.asked();
    let files: Vec<_> = asked.iter().filter(|path| path.contains("/resolve/")).collect();
    assert!(!files.is_empty() && files.iter().all(|path| path.ends_with("/config.json")), "{asked:?}");
    assert_eq!((source.cached_config().unwrap(), source.fetch_config().unwrap()), (Some(path.clone()), path));
    assert!(hub.asked().is_empty());
    // Half a model does not pass for one.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let message = failure(HubSource { endpoint: Some(format!("http://{closed}")), ..source });
    assert!(message.contains("failed"), "{message}");
}

#[test]
fn the_cache_answers_when_the_hub_is_away() {
    let hub = Hub::serve(published());
    let cache = TempDir::new().unwrap();
    load(&options(hub.source(cache.path()))).unwrap();
    // A port on which nobody listens any more.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let away = HubSource { endpoint: Some(format!("http://{closed}")), ..hub.source(cache.path()) };
    let engine = load(&options(away.clone())).unwrap();
    assert_eq!(engine.model().revision.as_deref(), Some(COMMIT));
    let empty = TempDir::new().unwrap();
    let message = failure(HubSource { cache: Some(empty.path().to_owned()), ..away });
    assert!(message.contains(REPOSITORY) && message.contains("failed"), "{message}");
}

#[test]
fn a_revision_is_asked_for_by_its_name() {
    let hub = Hub::serve(published());
    let cache = TempDir::new().unwrap();
    let source = |revision: &str| HubSource { revision: Some(revision.into()), ..hub.source(cache.path()) };
    assert_eq!(load(&options(source("v1"))).unwrap().model().revision.as_deref(), Some(COMMIT));
    assert_eq!(hub.asked()[0], format!("/api/models/{REPOSITORY}/revision/v1"));
    let message = failure(source("v2"));
    assert!(message.contains("tiny/depths@v2") && message.contains("no such model, revision"), "{message}");
}

#[test]
fn the_hubs_refusals_are_explained() {
    let hub = Hub::serve(published());
    let cache = TempDir::new().unwrap();
    let nobody = HubSource { token: Some("wrong".into()), ..hub.source(cache.path()) };
    let message = failure(nobody.clone());
    assert!(message.contains("HF_TOKEN") && !message.contains("wrong"), "{message}");
    assert!(!format!("{nobody:?}").contains("wrong"), "a token must not be printed");
    let unknown = HubSource { id: "tiny/other".into(), ..hub.source(cache.path()) };
    let message = failure(unknown);
    assert!(message.contains("tiny/other") && message.contains("check the name"), "{message}");
}

#[test]
fn sharded_and_pickled_repositories_are_fetched_as_they_are() {
    let small = ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"];
    for (name, layout) in [("proportions", "proportions-sharded"), ("widths", "widths-pickle")] {
        let fixture = Fixture::read(name);
        let mut files: Files =
            small.map(|name| (name.to_owned(), fs::read(fixture.directory().join(name)).unwrap())).into();
        for entry in fs::read_dir(crate::fixture::directory(layout)).unwrap() {
            let path = entry.unwrap().path();
            files.insert(path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap());
        }
        let hub = Hub::serve(files);
        let cache = TempDir::new().unwrap();
        let mut engine = load(&options(hub.source(cache.path()))).unwrap();
        let captions = caption(&mut *engine, &fixture.items()[..1]).unwrap();
        fixture.captions[0].check(captions[0].as_ref().unwrap());
    }
}

#[test]
fn a_repository_without_weights_is_refused() {
    let mut files = published();
    files.remove("model.safetensors");
    let hub = Hub::serve(files);
    let cache = TempDir::new().unwrap();
    let message = failure(hub.source(cache.path()));
    assert!(message.contains("pytorch_model.bin"), "{message}");
}
