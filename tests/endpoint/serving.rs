//! `blipstream serve` as a process of its own.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::support::http::http;

/// How long the program may take to load its models.
const PATIENCE: Duration = Duration::from_secs(60);

/// The process; killed when dropped.
pub struct Serving {
    child: Child,
    pub at: SocketAddr,
}

impl Serving {
    /// Starts it with these options, and waits until it is ready.
    pub async fn start(options: &[&str]) -> Self {
        // A port that was free a moment ago.
        let at = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_blipstream"));
        command.current_dir(env!("CARGO_MANIFEST_DIR")).args(["serve", "--listen", &at.to_string()]).args(options);
        command.args(["--set", "admin.listen=127.0.0.1:0", "--set", "batch.max_size=4"]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let serving = Self { child, at };
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < PATIENCE, "the program is not ready");
            let connected = tokio::net::TcpStream::connect(at).await.is_ok();
            if connected && http(at, "GET /v2/health/ready", "").await.status == 200 {
                return serving;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
