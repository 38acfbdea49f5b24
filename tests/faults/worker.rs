//! A worker as a process of its own: what `blipstream worker` runs, on a fake captioner.

use std::io::Read as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blipstream::caption::fake::{FakeEngine, FakeOptions};
use blipstream::caption::preprocess::Preprocessor;
use blipstream::command;
use blipstream::pipeline::{Loaded, Parts};
use blipstream::settings::Settings;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// First argument of a process that is a worker.
pub const WORKER: &str = "--be-a-worker";
/// How long a batch takes.
const BATCH: Duration = Duration::from_millis(20);
/// Images of a batch.
const BATCH_SIZE: usize = 8;
/// Side of the pictures, in pixels.
const SIDE: usize = 8;
/// The longest that a question to the admin port may take.
const ASKING: Duration = Duration::from_millis(500);
/// The longest that a worker may take to open its admin port or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the worker that the settings in `file` describe.
pub fn run(file: &Path) -> ! {
    let settings: Settings = toml::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    tracing_subscriber::fmt().json().flatten_event(true).with_writer(std::io::stderr).init();
    // Ends with the process that has started it, however that ends.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        command::leave(1);
    });
    let load = |settings: &Settings| {
        let engine = FakeEngine::new(FakeOptions { image_size: SIDE, encode_delay: BATCH, ..FakeOptions::default() });
        Ok(Parts {
            engines: vec![Loaded {
                engine: Box::new(engine),
                filter: None,
                answerer: None,
                canary: None,
                batch_size: BATCH_SIZE,
                replica: None,
            }],
            preprocessor: Preprocessor::blip(SIDE),
            flag_terms: Vec::new(),
            worker: settings.kafka.bootstrap_servers.clone(),
            load: None,
        })
    };
    match command::worker::serve(settings, load) {
        Ok(exit) => command::leave(exit.code()),
        Err(error) => {
            command::report(&error);
            command::leave(1)
        }
    }
}

/// The handle of a worker; it is killed when this is dropped.
pub struct Worker {
    child: Child,
    log: PathBuf,
    admin: SocketAddr,
}

impl Worker {
    /// Starts one that logs to `NAME.log` in `folder`, and waits for its admin port.
    pub fn start(settings: &Settings, folder: &Path, name: &str) -> Self {
        let (file, log) = (folder.join(format!("{name}.toml")), folder.join(format!("{name}.log")));
        std::fs::write(&file, toml::to_string(settings).unwrap()).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .arg(WORKER)
            .arg(&file)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut worker = Self { child, log, admin: SocketAddr::from(([127, 0, 0, 1], 0)) };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let lines = worker.lines();
            if let Some(address) = lines.iter().find_map(|line| line["address"].as_str()?.parse().ok()) {
                worker.admin = address;
                return worker;
            }
            let ended = worker.child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "no admin port: see {}", worker.log.display());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn lines(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Where its admin port listens.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Sends a signal.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.id().to_string()]).status().unwrap();
        assert!(sent.success(), "SIG{name} to a worker that is gone");
    }

    /// Its exit code, if it has ended. A signal has none, and counts as -1.
    pub fn ended(&mut self) -> Option<i32> {
        self.child.try_wait().unwrap().map(|status| status.code().unwrap_or(-1))
    }

    /// Waits for its end; returns the exit code.
    pub async fn end(mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(code) = self.ended() {
                return Some(code);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        None
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It has ended already, unless it was to be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The body that a path of an admin port answers; `None` where there is no answer in time.
pub async fn ask(admin: SocketAddr, method: &str, path: &str) -> Option<String> {
    let asking = async {
        let mut stream = TcpStream::connect(admin).await.ok()?;
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: {admin}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.starts_with("HTTP/1.1 2").then(|| body.to_owned())
    };
    tokio::time::timeout(ASKING, asking).await.ok().flatten()
}
