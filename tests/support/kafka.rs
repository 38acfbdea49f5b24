//! Apache Kafka for tests: clusters of `ops/kafka/cluster`, or a broker of the user's own.
//!
//! Without Java and Maven there is no cluster: under `CI` that fails the test, elsewhere the test is skipped, and one
//! loud line says so. Where `BLIPSTREAM_TEST_BOOTSTRAP` names a broker, the tests that need no more than a broker use it.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use serde_json::Value;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/ops/kafka/cluster");
/// The script's exit code where Java, Maven or openssl is missing.
const MISSING: i32 = 69;
/// What `env` ends with when it does not find the script's language.
const NOT_FOUND: i32 = 127;
/// Names a broker that is used instead of a cluster.
const BOOTSTRAP: &str = "BLIPSTREAM_TEST_BOOTSTRAP";
/// How long an administrative request may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a cluster is made with.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// 1 or 3; 0 is 1.
    pub nodes: usize,
    /// TLS, SASL and access lists, with these users beside `admin`.
    pub secure: Option<Vec<&'static str>>,
    /// Further listeners, in plain text.
    pub listeners: Vec<String>,
    /// Listener, node and the port that this node advertises for it: a proxy's.
    pub advertise: Vec<(String, i32, u16)>,
    /// Lines of server.properties.
    pub properties: Vec<(String, String)>,
}

/// A cluster below a folder of its own. It is killed and removed when this is dropped, or when this process ends,
/// however it ends.
pub struct Cluster {
    info: Value,
    folder: String,
    /// Waits for the end of its standard input, which this process holds.
    guard: Child,
}

impl Cluster {
    /// Starts it and waits until it answers; `None` where the test is to be skipped.
    pub fn start(options: &Options) -> Option<Self> {
        let folder = tempfile::Builder::new().prefix("blipstream-kafka-").tempdir().unwrap().keep();
        let folder = folder.to_str().unwrap().to_owned();
        let guard = Command::new(SCRIPT).args([&folder, "guard"]).stdin(Stdio::piped()).stderr(Stdio::null()).spawn();
        let guard = guard.unwrap_or_else(|error| panic!("{SCRIPT}: {error}"));
        let mut cluster = Self { info: Value::Null, folder, guard };
        let mut arguments = vec!["start".to_owned(), "--nodes".into(), options.nodes.max(1).to_string()];
        let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        if let Some(users) = &options.secure {
            option("--users", users.join(","));
        }
        if !options.listeners.is_empty() {
            option("--listeners", options.listeners.join(","));
        }
        for (name, node, port) in &options.advertise {
            option("--advertise", format!("{name}={node}:{port}"));
        }
        for (key, value) in &options.properties {
            option("--property", format!("{key}={value}"));
        }
        arguments.extend(options.secure.iter().map(|_| "--secure".to_owned()));
        match cluster.script(&arguments) {
            Ok(_) => {}
            Err((Some(MISSING), error)) => return no_cluster(&error),
            Err((Some(NOT_FOUND), _)) => {
                return no_cluster("python3 is missing. On Debian and Ubuntu: apt-get install python3");
            }
            Err((_, error)) => panic!("{error}"),
        }
        cluster.info = serde_json::from_str(&cluster.run(&["info"])).unwrap();
        Some(cluster)
    }

    /// Runs a command of the script; returns what it printed.
    pub fn run(&self, arguments: &[&str]) -> String {
        self.script(arguments).unwrap_or_else(|(_, error)| panic!("{error}"))
    }

    fn script<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Result<String, (Option<i32>, String)> {
        let output = Command::new(SCRIPT).arg(&self.folder).args(arguments).stdin(Stdio::null()).output().unwrap();
        if output.status.success() {
            return Ok(String::from_utf8(output.stdout).unwrap());
        }
        Err((output.status.code(), String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }

    /// Bootstrap servers of the listener that the nodes themselves use: plain text, or SASL over plain text.
    pub fn bootstrap(&self) -> &str {
        self.listener(self.info["main_listener"].as_str().unwrap())
    }

    /// Bootstrap servers of a listener, e.g. `SASL_SSL`: the addresses it advertises.
    pub fn listener(&self, name: &str) -> &str {
        self.info["bootstrap"][name.to_uppercase()].as_str().expect("a listener of this name")
    }

    /// The port that a node listens on for a listener, behind any proxy.
    pub fn port(&self, listener: &str, node: usize) -> u16 {
        let port = &self.info["nodes"][node - 1]["listeners"][listener.to_uppercase()]["bind"];
        u16::try_from(port.as_u64().expect("a listener of this name")).unwrap()
    }

    /// SIGKILL.
    pub fn kill(&self, node: usize) {
        self.run(&["kill", &node.to_string()]);
    }

    /// Starts a node that was killed, or stops it in order and starts it; waits until it answers.
    pub fn restart(&self, node: usize) {
        self.run(&["restart", &node.to_string()]);
    }

    /// SIGSTOP.
    pub fn suspend(&self, node: usize) {
        self.run(&["suspend", &node.to_string()]);
    }

    /// SIGCONT.
    pub fn resume(&self, node: usize) {
        self.run(&["resume", &node.to_string()]);
    }

    /// A file of the secure mode: `ca`, `other_ca` (has signed nothing), `client_certificate` or `client_key`.
    pub fn tls(&self, name: &str) -> &Path {
        Path::new(self.info["tls"][name].as_str().expect("a file of the secure mode"))
    }

    /// Password of a user of the secure mode.
    pub fn password(&self, user: &str) -> &str {
        self.info["users"][user].as_str().expect("a user of the secure mode")
    }

    /// The file that the first node keeps the first records of a partition in.
    pub fn segment(&self, topic: &str, partition: i32) -> PathBuf {
        let data = Path::new(&self.folder).join("node-1/data");
        data.join(format!("{topic}-{partition}")).join("00000000000000000000.log")
    }

    /// Creates topics of `partitions` partitions.
    pub async fn create_topics(&self, topics: &[&str], partitions: i32) {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.bootstrap());
        if self.info["secure"] == true {
            config.set("security.protocol", "sasl_plaintext").set("sasl.mechanisms", "PLAIN");
            config.set("sasl.username", "admin").set("sasl.password", self.password("admin"));
        }
        create_topics(&config, topics, partitions).await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Its input ends, and so does the cluster.
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
        // Is there, and empty, only if the script could not run.
        let _ = std::fs::remove_dir(&self.folder);
    }
}

/// Creates topics and waits until they are there. Topics have as many replicas as the brokers think right.
async fn create_topics(config: &ClientConfig, topics: &[&str], partitions: i32) {
    let admin: AdminClient<DefaultClientContext> = config.create().unwrap();
    let new = topics.iter().map(|topic| NewTopic::new(topic, partitions, TopicReplication::Fixed(-1)));
    let new: Vec<_> = new.collect();
    let wait = AdminOptions::new().operation_timeout(Some(PATIENCE)).request_timeout(Some(PATIENCE));
    for created in admin.create_topics(&new, &wait).await.unwrap() {
        created.unwrap();
    }
}

/// Bootstrap servers of a broker in plain text: the user's own, or one that all tests of a program share; `None` where
/// the test is to be skipped.
pub fn broker() -> Option<&'static str> {
    // Statics are not dropped; the cluster's guard notices the end of the process.
    static SHARED: LazyLock<Result<String, Option<Cluster>>> = LazyLock::new(|| match std::env::var(BOOTSTRAP) {
        Ok(servers) if !servers.is_empty() => Ok(servers),
        _ => Err(Cluster::start(&Options::default())),
    });
    match &*SHARED {
        Ok(servers) => Some(servers),
        Err(cluster) => cluster.as_ref().map(Cluster::bootstrap),
    }
}

/// Topics on [`broker`], whose names nobody else has: `NAME` becomes `NAME.5f2a…`.
pub async fn new_topics<const N: usize>(servers: &str, names: [&str; N], partitions: i32) -> [String; N] {
    let suffix = format!("{:016x}", fastrand::u64(..));
    let topics = names.map(|name| format!("{name}.{suffix}"));
    let config = [("bootstrap.servers".to_owned(), servers.to_owned())].into_iter().collect();
    create_topics(&config, &topics.each_ref().map(String::as_str), partitions).await;
    topics
}

/// Something that `tests` need cannot be had: under `CI` that fails, elsewhere they are skipped. Says so once, around the
/// capture of the test harness, since a skipped test proves nothing.
pub fn skip<T>(tests: &'static str, why: &str) -> Option<T> {
    static SAID: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
    assert!(std::env::var_os("CI").is_none(), "CI must run {tests}: {why}");
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(tests) {
        let _ = writeln!(std::io::stderr(), "\n*** SKIPPED: {tests}. {why}\n");
    }
    None
}

fn no_cluster<T>(why: &str) -> Option<T> {
    skip("the tests on Apache Kafka", &format!("{why}\n*** Or name a broker of your own in {BOOTSTRAP}."))
}
