//! Other people's clients: what they write is captioned, and what a worker writes they read as it was written.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::{Command, Stdio};

use blipstream::caption::fake::FakeOptions;
use blipstream::message::{Message, ORIGIN_HEADER};
use serde_json::{Value, json};

use crate::support::flow::Flow;
use crate::support::kafka::skip;
use crate::support::promises::inline;

const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kafka/interop");
/// The exit code of `clients` where packages cannot be had.
const MISSING: i32 = 69;

const PARTITIONS: i32 = 5;

/// Keys of Apache Kafka's own test of its hash (`UtilsTest.testMurmur2`), with what Java computes for them.
const KEYS: [(&str, i32); 6] = [
    ("21", -973_932_308),
    ("foobar", -790_332_482),
    ("a-little-bit-long-string", -985_981_536),
    ("a-little-bit-longer-string", -1_486_304_829),
    ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
    (FAILING, 479_470_107),
];
/// The request with this key cannot be captioned.
const FAILING: &str = "abc";

const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// The partition that Java clients choose: `Utils.toPositive(Utils.murmur2(key)) % partitions`.
fn of_java(key: &str) -> i32 {
    let (_, hash) = KEYS.iter().find(|(known, _)| *known == key).unwrap();
    (hash & i32::MAX) % PARTITIONS
}

/// The other clients.
struct Clients {
    servers: String,
    python: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Client {
    Kcat,
    KafkaPython,
    Confluent,
}

const CLIENTS: [Client; 3] = [Client::Kcat, Client::KafkaPython, Client::Confluent];

impl Clients {
    /// `None` where the test is to be skipped.
    fn find(servers: &str) -> Option<Self> {
        let tests = "the test with other clients of Kafka";
        if Command::new("kcat").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            return skip(tests, "kcat is missing. On Debian and Ubuntu: apt-get install kcat");
        }
        let made = Command::new(format!("{SCRIPTS}/clients")).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&made.stderr).into_owned();
        match made.status.code() {
            Some(0) => {}
            Some(MISSING) => return skip(tests, &said),
            _ => panic!("{said}"),
        }
        let python = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        Some(Self { servers: servers.to_owned(), python })
    }

    fn script(&self, name: &str) -> Command {
        let mut command = Command::new(&self.python);
        command.arg(format!("{SCRIPTS}/{name}.py")).arg(&self.servers);
        command
    }

    fn kcat(&self) -> Command {
        let mut command = Command::new("kcat");
        command.args(["-q", "-b", &self.servers, "-X", "message.timeout.ms=30000"]);
        command
    }

    /// Writes records, each with the same headers.
    fn write(&self, client: Client, topic: &str, records: &[(String, String)], timestamp: i64) {
        let mut headers = vec![("traceparent", Some(TRACE)), ("twice", Some("1")), ("twice", Some("2"))];
        if client == Client::KafkaPython {
            // It cannot write a header without a value, and the others can.
            headers.push(("none", Some("")));
        } else {
            headers.push(("none", None));
        }
        let mut input = String::new();
        let mut command = match client {
            Client::Kcat => {
                input.extend(records.iter().map(|(key, value)| format!("{key}|{value}\n")));
                let mut kcat = self.kcat();
                for (name, value) in &headers {
                    kcat.args(["-H", &value.map_or_else(|| (*name).to_owned(), |value| format!("{name}={value}"))]);
                }
                kcat.args(["-P", "-t", topic, "-K", "|"]);
                kcat
            }
            Client::KafkaPython | Client::Confluent => {
                input.extend(records.iter().map(|(key, value)| {
                    json!({"key": key, "value": value, "headers": headers, "timestamp": timestamp}).to_string() + "\n"
                }));
                let mut script = self.script(client.script());
                script.args(["write", topic]);
                script
            }
        };
        run(client, &mut command, &input);
    }

    /// Reads the `count` records of a topic, in the order of their places.
    fn read(&self, client: Client, topic: &str, count: usize) -> Vec<Value> {
        let mut command = match client {
            Client::Kcat => {
                let mut kcat = self.kcat();
                kcat.args(["-C", "-t", topic, "-o", "beginning", "-e", "-J"]);
                kcat
            }
            Client::KafkaPython | Client::Confluent => {
                let mut script = self.script(client.script());
                script.args(["read", topic, &count.to_string()]);
                script
            }
        };
        let read = run(client, &mut command, "");
        let records = read.lines().map(|line| serde_json::from_str(line).unwrap());
        let mut records: Vec<_> = records.map(|record| client.normal(record)).collect();
        records.sort_by_key(|record| (record["partition"].as_i64(), record["offset"].as_i64()));
        records
    }
}

impl Client {
    fn script(self) -> &'static str {
        match self {
            Self::Kcat => "",
            Self::KafkaPython => "kafka_python",
            Self::Confluent => "confluent",
        }
    }

    /// A record in the form of the scripts.
    fn normal(self, record: Value) -> Value {
        if self != Self::Kcat {
            return record;
        }
        let headers: Vec<_> = record["headers"].as_array().unwrap().chunks(2).map(|pair| json!(pair)).collect();
        json!({"partition": record["partition"], "offset": record["offset"], "timestamp": record["ts"],
               "key": record["key"], "value": record["payload"], "headers": headers})
    }
}

/// Runs a client to its end; returns what it printed.
fn run(client: Client, command: &mut Command, input: &str) -> String {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{client:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A message of ours in the form of the scripts.
fn as_read(message: &Message) -> Value {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let headers: Vec<_> = message.headers.iter().map(|(name, value)| (name, value.as_deref().map(text))).collect();
    json!({"partition": message.partition, "offset": message.offset, "timestamp": message.timestamp_ms,
           "key": message.key.as_deref().map(text), "value": message.payload.as_deref().map(text), "headers": headers})
}

fn id_of(message: &Message) -> String {
    let value: Value = serde_json::from_slice(message.payload.as_deref().unwrap()).unwrap();
    value["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn other_clients_write_requests_and_read_captions_and_dead_letters_with_all_that_belongs_to_them() {
    let Some(flow) = Flow::on_kafka(PARTITIONS).await else { return };
    let kafka = &flow.settings.kafka;
    let Some(clients) = Clients::find(&kafka.bootstrap_servers) else { return };
    let past = jiff::Timestamp::now().as_millisecond() - 3_600_123;
    for client in CLIENTS {
        let record = |(number, (key, _)): (usize, &(&str, i32))| {
            let image = if *key == FAILING { "ftp://example.com/a.png".to_owned() } else { inline(number) };
            ((*key).to_owned(), json!({"id": format!("{client:?} {key}"), "image": image}).to_string())
        };
        clients.write(client, flow.requests(), &KEYS.iter().enumerate().map(record).collect::<Vec<_>>(), past);
    }
    let worker = flow.worker(FakeOptions::default());
    flow.until_answered(CLIENTS.len() * KEYS.len());
    assert!(worker.stop().await.clean());

    let requests: BTreeMap<String, Message> =
        flow.read(flow.requests()).into_iter().map(|message| (id_of(&message), message)).collect();
    assert_eq!(requests.len(), CLIENTS.len() * KEYS.len());
    for (id, request) in &requests {
        let key = std::str::from_utf8(request.key.as_deref().unwrap()).unwrap();
        // kcat cannot say a time, and has librdkafka's own partitioner.
        if !id.starts_with("Kcat") {
            assert_eq!((request.partition, request.timestamp_ms), (of_java(key), Some(past)), "{id}");
        }
    }

    let captions = flow.read(&kafka.captions_topic);
    assert_eq!(captions.len(), CLIENTS.len() * (KEYS.len() - 1));
    for caption in &captions {
        let (id, key) = (id_of(caption), caption.key.as_deref().unwrap());
        let request = &requests[&id];
        assert_eq!(Some(key), request.key.as_deref(), "{id}");
        assert_eq!(caption.partition, of_java(std::str::from_utf8(key).unwrap()), "{id}");
        assert_eq!(caption.timestamp_ms, request.timestamp_ms, "{id}");
        let mut headers = request.headers.clone();
        headers.push((ORIGIN_HEADER.into(), Some(request.origin().to_string().into())));
        assert_eq!(caption.headers, headers, "{id}");
    }
    let letters = flow.read(&kafka.dead_letter_topic);
    assert_eq!(letters.len(), CLIENTS.len());
    for letter in &letters {
        let request = &requests[&id_of(letter)];
        assert_eq!((&letter.key, &letter.payload), (&request.key, &request.payload));
        assert_eq!(letter.partition, of_java(FAILING));
        assert!(letter.headers.starts_with(&request.headers), "{:?}", letter.headers);
        assert_eq!(letter.header("blipstream-error-code"), Some("bad_reference"));
    }

    for (topic, written) in [(&kafka.captions_topic, captions), (&kafka.dead_letter_topic, letters)] {
        let mut written: Vec<_> = written.iter().map(as_read).collect();
        written.sort_by_key(|record| (record["partition"].as_i64(), record["offset"].as_i64()));
        for client in CLIENTS {
            assert_eq!(clients.read(client, topic, written.len()), written, "{client:?} reads {topic}");
        }
    }
}
