//! The link to the brokers: TLS and SASL work, and what is wrong is told by the name of its setting, before anything is
//! consumed.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blipstream::caption::fake::FakeOptions;
use blipstream::settings::{Delivery, RetryTopic, SecurityProtocol, Settings};
use tokio::sync::OnceCell;

use crate::support::flow::{Flow, request, settings};
use crate::support::images::png;
use crate::support::kafka::{Cluster, Options};

/// Beyond what any of these commands needs.
const LIMIT: Duration = Duration::from_secs(30);

const TOPICS: [&str; 3] = ["ok.requests", "ok.captions", "ok.dlq"];

/// A secure cluster, its topics and what its users may do. Everybody may use what begins with `ok.`, except that the
/// name of a user says what is missing.
async fn secure() -> Option<&'static Cluster> {
    static CLUSTER: OnceCell<Option<Cluster>> = OnceCell::const_new();
    let start = || async {
        let users = vec!["worker", "noread", "nowrite", "nogroup"];
        let cluster = Cluster::start(&Options { secure: Some(users), ..Options::default() })?;
        cluster.create_topics(&[&TOPICS[..], &["writeonly.retry"]].concat(), 1).await;
        let allow = |principals: &[&str], operation: &str, resource: [&str; 2]| {
            let principals = principals.iter().flat_map(|name| ["--allow-principal", name]);
            let mut arguments = vec!["tool", "acls", "--add", "--resource-pattern-type", "prefixed"];
            arguments.extend(principals.chain(["--operation", operation]).chain(resource));
            cluster.run(&arguments);
        };
        let all = ["User:worker", "User:CN=client", "User:ANONYMOUS"];
        let (noread, nowrite, nogroup) = (["User:noread"], ["User:nowrite"], ["User:nogroup"]);
        let topic = ["--topic", "ok."];
        // Each is a program of its own.
        std::thread::scope(|scope| {
            scope.spawn(|| allow(&all, "All", topic));
            scope.spawn(|| allow(&all, "Write", ["--topic", "writeonly."]));
            scope.spawn(|| allow(&[nowrite, nogroup].concat(), "Read", topic));
            scope.spawn(|| allow(&[noread, nogroup].concat(), "Write", topic));
            scope.spawn(|| allow(&[&all[..], &noread, &nowrite].concat(), "Read", ["--group", "ok."]));
        });
        Some(cluster)
    };
    CLUSTER.get_or_init(start).await.as_ref()
}

/// How somebody gets in.
struct Login {
    protocol: SecurityProtocol,
    /// User, password, mechanism.
    sasl: Option<(&'static str, String, &'static str)>,
    ca: &'static str,
    certificate: bool,
}

impl Login {
    fn sasl(cluster: &Cluster, user: &'static str, mechanism: &'static str) -> Self {
        let sasl = Some((user, cluster.password(user).to_owned(), mechanism));
        Self { protocol: SecurityProtocol::SaslSsl, sasl, ca: "ca", certificate: false }
    }

    fn tls(certificate: bool) -> Self {
        Self { protocol: SecurityProtocol::Ssl, sasl: None, ca: "ca", certificate }
    }

    /// Settings of a worker; the file holds the password.
    fn settings(&self, cluster: &Cluster, topics: [String; 3], group: &str) -> (Settings, tempfile::NamedTempFile) {
        let servers = cluster.listener(self.protocol.as_str()).to_owned();
        let mut settings = settings(servers, group.to_owned(), topics);
        let file = tempfile::NamedTempFile::new().unwrap();
        settings.kafka.security_protocol = self.protocol;
        settings.kafka.ssl_ca_file = Some(cluster.tls(self.ca).to_owned());
        if self.certificate {
            settings.kafka.ssl_certificate_file = Some(cluster.tls("client_certificate").to_owned());
            settings.kafka.ssl_key_file = Some(cluster.tls("client_key").to_owned());
        }
        if let Some((user, password, mechanism)) = &self.sasl {
            std::fs::write(file.path(), format!("{password}\n")).unwrap();
            settings.kafka.sasl_username = Some((*user).to_owned());
            settings.kafka.sasl_password_file = Some(file.path().to_owned());
            settings.kafka.sasl_mechanism = Some((*mechanism).to_owned());
        }
        (settings, file)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_captions_over_tls_and_over_every_sasl_mechanism() {
    let Some(cluster) = secure().await else { return };
    let logins = [
        Login::tls(false),
        Login::tls(true),
        Login::sasl(cluster, "worker", "PLAIN"),
        Login::sasl(cluster, "worker", "SCRAM-SHA-256"),
        Login::sasl(cluster, "worker", "SCRAM-SHA-512"),
        Login { protocol: SecurityProtocol::SaslPlaintext, ..Login::sasl(cluster, "worker", "PLAIN") },
    ];
    // All at once: mostly they wait for the brokers.
    let captioning = logins.into_iter().enumerate().map(|(n, login)| {
        tokio::spawn(async move {
            let topics = ["requests", "captions", "dlq"].map(|topic| format!("ok.{n}.{topic}"));
            cluster.create_topics(&topics.each_ref().map(String::as_str), 1).await;
            let (mut settings, _file) = login.settings(cluster, topics, &format!("ok.{n}"));
            // What the configuration reads from the file; the other tests here give the file to a command.
            settings.kafka.sasl_password = login.sasl.as_ref().map(|(_, password, _)| password.clone());
            let flow = Flow { broker: None, settings };
            flow.write((0..10).map(|id| request(id, STANDARD.encode(png(12, 9, 1)))));
            let worker = flow.worker(FakeOptions::default());
            let answers = tokio::task::block_in_place(|| flow.until_answered(10));
            assert!(worker.stop().await.clean());
            assert_eq!(answers.captioned_ids().len(), 10, "{:?}", login.protocol);
        })
    });
    for captioned in captioning.collect::<Vec<_>>() {
        captioned.await.unwrap();
    }
}

/// Runs a command with these settings; returns its exit code and what it said.
pub fn run(command: &str, settings: &Settings) -> (Option<i32>, String) {
    let file = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
    std::fs::write(file.path(), toml::to_string(settings).unwrap()).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_blipstream"))
        .args([command, "--set", "model.source=demo", "--set", "admin.listen=127.0.0.1:0", "--config"])
        .arg(file.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() && begun.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(20));
    }
    // It has ended already, unless it hangs: then what it said is in the failure.
    let _ = child.kill();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code(), said)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_the_link_is_told_by_its_setting_by_the_check_and_by_the_worker() {
    let Some(cluster) = secure().await else { return };
    let login = |user| Login::sasl(cluster, user, "SCRAM-SHA-512");
    let wrong_password = |mechanism| Login {
        sasl: Some(("worker", "not this one".into(), mechanism)),
        ..Login::sasl(cluster, "worker", mechanism)
    };
    let elsewhere = |change: fn(&mut Settings)| (login("worker"), "ok.fleet", change);
    let as_it_is: fn(&mut Settings) = |_| {};
    let cases = [
        ("wrong CA", (Login { ca: "other_ca", ..login("worker") }, "ok.fleet", as_it_is), vec!["kafka.ssl_ca_file"]),
        ("wrong password", (wrong_password("PLAIN"), "ok.fleet", as_it_is), vec!["kafka.sasl_password_file"]),
        ("wrong password", (wrong_password("SCRAM-SHA-256"), "ok.fleet", as_it_is), vec!["kafka.sasl_password_file"]),
        ("topic read", (login("noread"), "ok.fleet", as_it_is), vec!["kafka.inputs", "Read", "ok.requests"]),
        ("topic write", (login("nowrite"), "ok.fleet", as_it_is), vec!["kafka.captions_topic", "Write", "ok.captions"]),
        ("group", (login("nogroup"), "ok.fleet", as_it_is), vec!["kafka.group_id", "Read", "ok.fleet"]),
        (
            "dead letters",
            elsewhere(|settings| settings.kafka.dead_letter_topic = "not.permitted".into()),
            vec!["kafka.dead_letter_topic", "Write", "not.permitted"],
        ),
        (
            "a retry topic is read, too",
            elsewhere(|settings| {
                let topic = "writeonly.retry".into();
                settings.kafka.retry_topics = vec![RetryTopic { topic, delay: Duration::from_secs(1) }];
            }),
            vec!["kafka.retry_topics", "Read", "writeonly.retry"],
        ),
        (
            "transactional id",
            elsewhere(|settings| settings.kafka.delivery = Delivery::ExactlyOnce),
            vec!["kafka.transactional_id", "kafka.delivery", "--operation Write", "--transactional-id blipstream-"],
        ),
        (
            "unknown topic",
            elsewhere(|settings| settings.kafka.captions_topic = "ok.misspelt".into()),
            vec!["kafka.captions_topic", "ok.misspelt", "does not exist"],
        ),
    ];
    for (what, (login, group, change), words) in cases {
        let topics = TOPICS.map(str::to_owned);
        let (mut settings, _file) = login.settings(cluster, topics, group);
        change(&mut settings);
        for command in ["check", "worker"] {
            let begun = Instant::now();
            let (code, said) = run(command, &settings);
            assert_eq!(code, Some(1), "{what}, {command}, after {:?}: {said}", begun.elapsed());
            for word in &words {
                assert!(said.contains(word), "{what}, {command} does not say {word}: {said}");
            }
            assert!(!said.contains("not this one"), "{what}, {command} tells the password: {said}");
        }
    }
}
