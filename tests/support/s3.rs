//! An S3-compatible server for tests: `ops/s3/server`, which checks signatures. Without Java and Maven there is none: under
//! `CI` that fails the test, elsewhere the test is skipped, and a loud line says so.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::kafka::skip;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/ops/s3/server");
/// The script's exit code where Java or Maven is missing.
const MISSING: i32 = 69;
/// What `env` ends with when it does not find the script's language.
const NOT_FOUND: i32 = 127;
/// How long it may take to start, Maven's first download included.
const PATIENCE: Duration = Duration::from_secs(180);

/// The key that the server knows.
pub const KEY: &str = "test-key";
/// Its secret.
pub const SECRET: &str = "test-secret";

/// The server. It is killed when this is dropped, or when this process ends.
pub struct S3 {
    folder: TempDir,
    port: u16,
    process: Child,
}

impl S3 {
    /// Starts it and waits until it answers; `None` where the test is to be skipped.
    pub fn start() -> Option<Self> {
        let begun = Instant::now();
        loop {
            let mut server = Self::spawn();
            loop {
                if let Some(status) = server.process.try_wait().unwrap() {
                    if matches!(status.code(), Some(MISSING | NOT_FOUND)) {
                        return skip("the tests on an S3 server", "Java 17, Maven or python3 is missing");
                    }
                    // Somebody else has taken its port meanwhile, maybe: with another one, then.
                    break;
                }
                if server.answers() {
                    return Some(server);
                }
                assert!(begun.elapsed() < PATIENCE, "{SCRIPT} does not answer");
                std::thread::sleep(Duration::from_millis(50));
            }
            assert!(begun.elapsed() < PATIENCE, "{SCRIPT} ends again and again");
        }
    }

    fn spawn() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let process = Command::new(SCRIPT)
            .arg(folder.path())
            .arg(port.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{SCRIPT}: {error}"));
        Self { folder, port, process }
    }

    /// Whether a server is there that speaks XML, as no other of the tests does.
    fn answers(&self) -> bool {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /nothing HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        ask().is_ok_and(|answer| answer.contains("<?xml"))
    }

    /// Its address.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Puts an object, which nobody may read without a signature.
    pub fn put(&self, bucket: &str, key: &str, body: &[u8]) {
        let path: PathBuf = self.folder.path().join("buckets").join(bucket).join(key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, body).unwrap();
        // What everybody may read on the disk is public to the server.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
