//! The commands `submit`, `collect` and `check` against the embedded broker, as a person runs them.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use blipstream::disposition::{Code, Failure, Stage};
use blipstream::kafka::{self, EmbeddedBroker, NewRecord, ReadLimits};
use blipstream::message::{DeadLetter, Message, Origin, parse};
use blipstream::settings::Kafka;
use serde_json::{Value, json};
use tempfile::TempDir;

use self::ran::Ran;

#[path = "support/ran.rs"]
mod ran;

/// Far beyond what any command here needs, so that a command that hangs fails its test.
const LIMIT: Duration = Duration::from_secs(60);

fn cluster() -> (EmbeddedBroker, Client) {
    let mut topics = vec![("blipstream.requests", 2), ("blipstream.captions", 2), ("blipstream.dlq", 1)];
    topics.extend(["blipstream.retry.10s", "blipstream.retry.1m", "blipstream.retry.10m"].map(|topic| (topic, 1)));
    let broker = EmbeddedBroker::start(1, &topics).unwrap();
    let kafka = Kafka { bootstrap_servers: broker.bootstrap_servers().unwrap(), ..Kafka::default() };
    (broker, Client { kafka })
}

#[derive(Clone)]
struct Client {
    kafka: Kafka,
}

impl Client {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = blipstream(arguments);
        command.arg("--set").arg(format!("kafka.bootstrap_servers={}", self.kafka.bootstrap_servers));
        command
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        run(&mut self.command(arguments), "")
    }

    fn requests(&self) -> Vec<Value> {
        let mut values = Vec::new();
        let limits = ReadLimits { from: kafka::From::Beginning, timeout: LIMIT, stop_at_end: true };
        kafka::read_records(&self.kafka, "blipstream.requests", limits, |message| {
            values.push(serde_json::from_slice(&message.payload.unwrap()).unwrap());
            true
        })
        .unwrap();
        values
    }

    fn write(&self, topic: &str, record: NewRecord) {
        kafka::write_records(&self.kafka, topic, [record], LIMIT).unwrap();
    }

    fn caption(&self, origin: &Origin, index: usize, id: &str) {
        let schema = "blipstream.caption.v1";
        let record = json!({"schema": schema, "id": id, "index": index, "text": "a dog", "origin": origin});
        let value = Some(record.to_string().into_bytes());
        self.write("blipstream.captions", NewRecord { value, ..NewRecord::default() });
    }

    fn dead_letter(&self, message: &Message, index: Option<usize>) {
        let origin = Origin { index, ..message.origin() };
        let failure = Failure::with_message(Stage::Fetch, Code::NotFound, "the host says 404".into());
        let letter = DeadLetter::new(message, &origin, None, &failure, "fake", 1 << 20);
        let value = letter.value.map(|value| value.to_vec());
        self.write("blipstream.dlq", NewRecord { key: None, value, headers: letter.headers });
    }

    /// A worker that answers the first `count` requests as `answer` does.
    fn worker(&self, count: usize, answer: impl Fn(&Self, &Message) + Send + 'static) -> JoinHandle<()> {
        let client = self.clone();
        std::thread::spawn(move || {
            let limits = ReadLimits { from: kafka::From::Beginning, timeout: LIMIT, stop_at_end: false };
            let mut left = count;
            kafka::read_records(&client.kafka, "blipstream.requests", limits, |message| {
                answer(&client, &message);
                left -= 1;
                left > 0
            })
            .unwrap();
            assert_eq!(left, 0, "not every request came");
        })
    }
}

/// Answers a request of one row by a caption, twice, as a worker may do after a crash.
fn caption_twice(client: &Client, message: &Message) {
    let id = parse(message, 10).unwrap()[0].as_ref().unwrap().id.clone();
    for _ in 0..2 {
        client.caption(&message.origin(), 0, id.as_deref().unwrap_or_default());
    }
}

fn blipstream(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blipstream"));
    command.args(arguments).env_clear();
    command
}

fn run(command: &mut Command, input: &str) -> Ran {
    let mut child = start(command);
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    finish(child)
}

fn start(command: &mut Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn finish(child: Child) -> Ran {
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    Ran::of(receiver.recv_timeout(LIMIT).expect("the command hangs").unwrap())
}

/// As Ctrl-C does.
fn interrupt(child: &Child) {
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn submit_sends_every_form_of_input() {
    let (_broker, client) = cluster();
    let folder = TempDir::new().unwrap();
    let file = |name: &str, text: &str| {
        fs::write(folder.path().join(name), text).unwrap();
        folder.path().join(name).display().to_string()
    };
    fs::create_dir(folder.path().join("images")).unwrap();
    file("images/a.png", "not decoded");
    file("images/b.jpg", "b");
    let images = folder.path().join("images").display().to_string();
    let csv = file("list.csv", "id,image_url,album\nc,https://e.com/c.jpg,summer\n");
    let jsonl = file("list.jsonl", "{\"id\":\"d\",\"image\":\"https://e.com/d.jpg\"}\n\"https://e.com/e.jpg\"\n");
    let table = file("table.json", r#"{"input_data":{"columns":["image"],"data":[["https://e.com/f.jpg"]]}}"#);
    let txt = file("list.txt", "# a list\nhttps://e.com/g.jpg\n");
    let inputs = ["submit", "https://e.com/h.jpg", &images, &csv, &jsonl, &table, &txt, "-", "--meta", "run=1"];
    let ran = run(&mut client.command(&inputs), "https://e.com/i.jpg\n");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(ran.out, "");
    assert!(ran.err.contains("sent 9 requests to blipstream.requests in "), "{ran:?}");

    let requests = client.requests();
    assert_eq!(requests.len(), 9);
    let find = |field: &str, value: &str| requests.iter().find(|request| request[field] == value).unwrap();
    assert_eq!(find("id", &format!("{images}/a.png"))["image"], "bm90IGRlY29kZWQ=");
    assert_eq!(find("id", &format!("{images}/b.jpg"))["meta"], json!({"run": "1"}));
    assert_eq!(find("id", "c")["meta"], json!({"album": "summer", "run": "1"}));
    assert_eq!(find("id", "d"), &json!({"id": "d", "image": "https://e.com/d.jpg"}));
    for name in ["e", "g", "h", "i"] {
        assert_eq!(find("image", &format!("https://e.com/{name}.jpg"))["meta"], json!({"run": "1"}));
    }
    assert_eq!(requests.iter().filter(|request| request["input_data"].is_object()).count(), 1);
}

#[test]
fn submit_names_bad_lines_and_sends_the_rest() {
    let (_broker, client) = cluster();
    let list = "https://e.com/a.jpg\nnonsense here\n{\"imgae\":\"x\"}\nhttps://e.com/b.jpg\n";
    let ran = run(&mut client.command(&["submit", "-"]), list);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    for line in ["standard input:2: ", "standard input:3: ", "sent 2 requests", "2 inputs could not be sent"] {
        assert!(ran.err.contains(line), "{line}: {ran:?}");
    }
    let lenient = run(&mut client.command(&["submit", "-", "--max-failure-rate", "0.5", "--quiet"]), list);
    assert_eq!((lenient.code, lenient.err.lines().count()), (Some(0), 2), "{lenient:?}");
    let nothing = client.run(&["submit", "missing.csv", "missing.png", "--max-failure-rate", "1"]);
    assert_eq!(nothing.code, Some(1), "{nothing:?}");
    assert!(
        nothing.err.contains("missing.csv: cannot be read") && nothing.err.contains("nothing was sent"),
        "{nothing:?}"
    );
    assert_eq!(client.requests().len(), 4);
}

#[test]
fn submit_waits_for_captions_and_dead_letters_and_counts_each_origin_once() {
    let (_broker, client) = cluster();
    // An answer from before is nobody's business.
    client.caption(&"blipstream.requests/0/0".parse().unwrap(), 0, "before");
    let worker = client.worker(6, |client, message| {
        let rows = parse(message, 10).unwrap();
        let id = rows[0].as_ref().unwrap().id.clone().unwrap_or_default();
        // Requests of others, and of other topics, are answered all the time.
        client.caption(&"blipstream.requests/0/999".parse().unwrap(), 0, "another sender");
        client.caption(&format!("other/{}/{}", message.partition, message.offset).parse().unwrap(), 0, "another topic");
        if rows.len() == 3 {
            client.caption(&message.origin(), 2, "row 2");
            client.dead_letter(message, Some(1));
            client.caption(&message.origin(), 0, "row 0");
            client.dead_letter(message, Some(1));
        } else if id == "3" {
            client.dead_letter(message, None);
            client.dead_letter(message, None);
        } else {
            caption_twice(client, message);
        }
    });
    let native = (0..5).map(|id| format!("{{\"id\":\"{id}\",\"image\":\"https://e.com/{id}.jpg\"}}\n"));
    let table =
        r#"{"input_data":{"columns":["image"],"data":[["https://e.com/x"],["https://e.com/y"],["https://e.com/z"]]}}"#;
    let list = native.collect::<String>() + table;
    let ran = run(&mut client.command(&["submit", "-", "--wait", "--timeout", "30s"]), &list);
    worker.join().unwrap();
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert!(ran.err.contains("sent 6 requests") && ran.err.contains("6 captions, 2 dead letters"), "{ran:?}");

    let lines = ran.lines();
    assert_eq!(lines.len(), 8, "{ran:?}");
    let mut ids: Vec<_> = lines.iter().filter_map(|line| line["text"].as_str().and(line["id"].as_str())).collect();
    ids.sort_unstable();
    assert_eq!(ids, ["0", "1", "2", "4", "row 0", "row 2"]);
    let dead: Vec<_> = lines.iter().filter(|line| line.get("error").is_some()).collect();
    let error = json!({"code": "not_found", "stage": "fetch", "message": "the host says 404"});
    assert!(dead.iter().all(|line| line["error"] == error && line["origin"]["topic"] == "blipstream.requests"));
    assert!(dead.iter().any(|line| line["id"] == "3" && line["index"].is_null()), "{dead:?}");
    assert!(dead.iter().any(|line| line["index"] == 1), "{dead:?}");
}

#[test]
fn submit_writes_answers_to_a_file_and_allows_the_failures_it_was_told_to() {
    let (_broker, client) = cluster();
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("answers.jsonl").display().to_string();
    let worker = client.worker(4, |client, message| match &parse(message, 1).unwrap()[0].as_ref().unwrap().id {
        Some(id) if id == "bad" => client.dead_letter(message, None),
        _ => caption_twice(client, message),
    });
    let list =
        ["a", "b", "c", "bad"].map(|id| format!("{{\"id\":\"{id}\",\"image\":\"https://e.com/a.jpg\"}}\n")).concat();
    let options = ["submit", "-", "--wait", "--timeout", "30s", "--output", &output, "--max-failure-rate", "0.25"];
    let ran = run(&mut client.command(&options), &list);
    worker.join().unwrap();
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), ""), "{ran:?}");
    assert_eq!(fs::read_to_string(output).unwrap().lines().count(), 4);
}

#[test]
fn submit_names_what_is_missing_when_no_answer_comes() {
    let (_broker, client) = cluster();
    let worker = client.worker(3, |client, message| match &parse(message, 1).unwrap()[0].as_ref().unwrap().id {
        Some(id) if id == "lost" => {}
        _ => caption_twice(client, message),
    });
    let list = ["a", "lost", "c"].map(|id| format!("{{\"id\":\"{id}\",\"image\":\"https://e.com/a.jpg\"}}\n")).concat();
    let ran = run(&mut client.command(&["submit", "-", "--wait", "--timeout", "3s"]), &list);
    worker.join().unwrap();
    assert_eq!((ran.code, ran.lines().len()), (Some(1), 2), "{ran:?}");
    let told = "no answer for 3s: 1 of 3 images are missing: standard input:2 (blipstream.requests/";
    assert!(ran.err.contains(told), "{ran:?}");
    assert!(ran.err.contains("2 captions, 0 dead letters, 1 missing"), "{ran:?}");
}

#[test]
fn submit_ends_with_a_summary_at_ctrl_c() {
    let (_broker, client) = cluster();
    let worker = client.worker(1, caption_twice);
    let mut child = start(&mut client.command(&["submit", "-", "--wait"]));
    // Standard input stays open: without the interruption this would wait for ever.
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"https://e.com/a.jpg\n").unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut String::new()).unwrap();
    worker.join().unwrap();
    interrupt(&child);
    let ran = finish(child);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.err.contains("interrupted") && ran.err.contains("sent 1 request to"), "{ran:?}");
    drop(stdin);
}

#[test]
fn submit_says_at_once_that_a_topic_or_the_broker_is_missing() {
    let (broker, client) = cluster();
    let ran = client.run(&["submit", "https://e.com/a.jpg", "--topic", "missing"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.err.contains("the topic `missing` does not exist"), "{ran:?}");
    broker.down().unwrap();
    let ran = client.run(&["submit", "https://e.com/a.jpg", "--timeout", "500ms"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.err.contains("no Kafka broker answers"), "{ran:?}");
}

#[test]
fn submit_sends_long_lists_through_a_bounded_window() {
    let (_broker, client) = cluster();
    let list = (0..20_000).map(|n| format!("https://e.com/{n}.jpg")).collect::<Vec<_>>().join("\n");
    let ran = run(&mut client.command(&["submit", "-", "--key", "none"]), &list);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.err.contains("sent 20,000 requests"), "{ran:?}");
    let mut images: Vec<_> = client.requests().iter().map(|request| request["image"].to_string()).collect();
    images.sort_unstable();
    images.dedup();
    assert_eq!(images.len(), 20_000);
}

#[test]
fn collect_prints_captions_and_dead_letters_and_stops_at_count_or_idle() {
    let (_broker, client) = cluster();
    let worker = client.worker(3, |client, message| match &parse(message, 1).unwrap()[0].as_ref().unwrap().id {
        Some(id) if id == "bad" => client.dead_letter(message, None),
        Some(id) => client.caption(&message.origin(), 0, id),
        None => panic!("a request without an id"),
    });
    let list =
        ["a", "b\\u001b[31m", "bad"].map(|id| format!("{{\"id\":\"{id}\",\"image\":\"https://e.com/a.jpg\"}}\n"));
    assert_eq!(run(&mut client.command(&["submit", "-"]), &list.concat()).code, Some(0));
    worker.join().unwrap();

    let text = client.run(&["collect", "--count", "3", "--idle", "30s"]);
    assert_eq!(text.code, Some(0), "{text:?}");
    let mut lines: Vec<_> = text.out.lines().collect();
    lines.sort_unstable();
    // A control character would reach the terminal.
    assert_eq!(lines, ["a\ta dog", "b [31m\ta dog"]);
    assert_eq!(text.err, "bad: not_found: the host says 404\n");

    let letters = client.run(&["collect", "--dead-letters-only", "--count", "1"]);
    assert_eq!((letters.code, letters.out.as_str()), (Some(0), "bad\tnot_found: the host says 404\n"), "{letters:?}");
    let captions = client.run(&["collect", "--captions-only", "--output", "jsonl", "--idle", "1s"]);
    assert_eq!(captions.code, Some(0), "{captions:?}");
    assert!(captions.lines().len() == 2 && captions.lines().iter().all(|line| line["text"] == "a dog"), "{captions:?}");
    let all = client.run(&["collect", "--output", "jsonl", "--count", "9", "--idle", "1s"]);
    assert_eq!((all.code, all.lines().len()), (Some(1), 3), "{all:?}");
    assert!(all.err.contains("3 of 9 came"), "{all:?}");
    let now = client.run(&["collect", "--from", "now", "--idle", "1s"]);
    assert_eq!((now.code, now.out.as_str()), (Some(0), ""), "{now:?}");
}

#[test]
fn collect_ends_at_ctrl_c() {
    let (_broker, client) = cluster();
    client.caption(&"blipstream.requests/0/0".parse().unwrap(), 0, "a");
    let mut child = start(&mut client.command(&["collect"]));
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "a\ta dog\n");
    interrupt(&child);
    assert_eq!(finish(child).code, Some(0));
}

/// A check with a model and a port that are there; what is given later wins.
fn check(client: &Client, more: &[&str]) -> (Ran, Value) {
    let fine = ["check", "--json", "--set", "model.source=random-base", "--set", "admin.listen=127.0.0.1:0"];
    let mut command = client.command(&[fine.as_slice(), &["--timeout", "3s"]].concat());
    let ran = run(command.args(more), "");
    let report = serde_json::from_str(&ran.out).unwrap_or(Value::Null);
    (ran, report)
}

fn failed(report: &Value) -> Vec<(&str, &str)> {
    let items = report["items"].as_array().unwrap().iter();
    let failed = items.filter(|item| item["state"] == "failed");
    failed.map(|item| (item["name"].as_str().unwrap(), item["text"].as_str().unwrap())).collect()
}

#[test]
fn check_finds_nothing_wrong_where_nothing_is() {
    let (_broker, client) = cluster();
    let (ran, report) = check(&client, &[]);
    assert_eq!((ran.code, &report["ok"]), (Some(0), &json!(true)), "{ran:?}");
    let text = report.to_string();
    for words in [
        "blipstream.requests (2 partitions)",
        "group blipstream",
        "blipstream.dlq",
        " at most: 64.0 MiB of messages",
        " of weights",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let mut plain =
        client.command(&["check", "--set", "model.source=random-base", "--set", "admin.listen=127.0.0.1:0"]);
    let plain = run(&mut plain, "");
    assert_eq!(plain.code, Some(0), "{plain:?}");
    assert!(plain.out.contains("ok   broker: reached at 127.0.0.1:"), "{plain:?}");
    assert!(plain.out.contains("A worker would start"), "{plain:?}");
}

#[test]
fn check_tells_that_no_broker_answers() {
    let (broker, client) = cluster();
    broker.down().unwrap();
    let (ran, report) = check(&client, &[]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let wrong = failed(&report);
    assert!(wrong.len() == 1 && wrong[0].0 == "broker", "{wrong:?}");
    assert!(wrong[0].1.contains("kafka.bootstrap_servers"), "{wrong:?}");
}

#[test]
fn check_tells_every_topic_that_is_missing() {
    let (_broker, client) = cluster();
    let topics =
        ["--set", "kafka.captions_topic=missing.captions", "--set", "kafka.inputs=blipstream.requests,missing"];
    let (ran, report) = check(&client, &topics);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let wrong = failed(&report);
    assert_eq!(wrong.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["requests", "captions"]);
    assert!(wrong[1].1.contains("`missing.captions` does not exist") && wrong[1].1.contains("kafka.captions_topic"));
}

#[test]
fn check_tells_that_the_model_is_missing_or_incomplete() {
    let (_broker, client) = cluster();
    let (ran, report) = check(&client, &["--set", "model.source=/nowhere/model", "--load-model"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(matches!(failed(&report)[..], [("model", why)] if why.contains("/nowhere/model")), "{report}");
    let folder = TempDir::new().unwrap();
    let (ran, report) = check(&client, &["--set", &format!("model.source={}", folder.path().display())]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(matches!(failed(&report)[..], [("model", why)] if why.contains("config.json")), "{report}");
    let (ran, report) = check(&client, &["--set", "model.source=org/name", "--offline"]);
    assert_eq!((ran.code, failed(&report)), (Some(0), vec![]), "{ran:?}");
}

#[test]
fn a_wrong_configuration_ends_with_2() {
    for command in [&["check"][..], &["collect"], &["submit", "https://e.com/a.jpg"]] {
        let ran = run(blipstream(command).args(["--set", "kafka.topic=x", "--set", "flow.max_rows=0"]), "");
        assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""), "{ran:?}");
        assert!(ran.err.contains("kafka.topic") && ran.err.contains("flow.max_rows"), "{ran:?}");
    }
    let ran = run(&mut blipstream(&["submit", "-", "--max-failure-rate", "7"]), "");
    assert_eq!(ran.code, Some(2), "{ran:?}");
}

#[test]
fn a_worker_that_is_told_to_stop_while_its_model_warms_up_ends_with_0() {
    for wait in (0..60).step_by(5) {
        let mut worker = blipstream(&["worker", "--set", "model.source=demo", "--set", "admin.listen=127.0.0.1:0"]);
        // No broker: it is still looking for one when the model is there.
        let mut child = start(worker.args(["--set", "kafka.bootstrap_servers=127.0.0.1:1"]));
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("model loaded") {
            line.clear();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "it ended before its model was loaded");
        }
        std::thread::sleep(Duration::from_millis(wait));
        interrupt(&child);
        let ran = finish(child);
        let mut rest = String::new();
        log.read_to_string(&mut rest).unwrap();
        assert_eq!(ran.code, Some(0), "after {wait} ms: {rest}");
    }
}
