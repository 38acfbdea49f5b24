//! `blipstream dlq` on the dead letters of real workers, as a person runs it.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use blipstream::caption::fake::FakeOptions;
use blipstream::disposition::{Code, Failure, Stage};
use blipstream::kafka::{NewRecord, Snapshot, TopicCheck, write_records};
use blipstream::message::{DeadLetter, Message};
use serde_json::json;

use self::support::client::PATIENCE;
use self::support::flow::{CAPTIONS, DEAD_LETTERS, Flow, REQUESTS, request};
use self::support::images::{Answer, ImageServer, jpeg};
use self::support::ran::Ran;

mod support;

/// Commands on the brokers of a flow.
struct Commands {
    config: tempfile::NamedTempFile,
}

impl Commands {
    fn of(flow: &Flow) -> Self {
        let config = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
        std::fs::write(config.path(), toml::to_string(&flow.settings).unwrap()).unwrap();
        Self { config }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blipstream"));
        command.arg("dlq").args(arguments).arg("--config").arg(self.config.path()).env_clear().stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        Ran::of(self.command(arguments).output().unwrap())
    }

    /// The ids of the dead letters that are listed, in alphabetical order.
    fn ids(&self, arguments: &[&str]) -> Vec<String> {
        let ran = self.run(&[&["ls", "--output", "jsonl"], arguments].concat());
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let mut ids: Vec<_> = ran.lines().iter().map(|line| line["id"].as_str().unwrap().to_owned()).collect();
        ids.sort_unstable();
        ids
    }
}

/// A worker's dead letters: `gone` (404 until it is asked for the second time), `page` (no image), `ftp` (another
/// scheme and host), and row 1 of a table.
async fn worker_failed(flow: &Flow) -> ImageServer {
    let late = vec![Answer::status(404), Answer::Body(jpeg(12, 9, 1))];
    let server = ImageServer::start().await.with_all("/gone.jpg", late).with("/page", Answer::Body(b"<html>".into()));
    let gone = request("gone", format!("{}?sig=SECRET", server.url("/gone.jpg")));
    let traced = NewRecord { headers: vec![("traceparent".into(), Some("00-1".into()))], ..gone };
    let table = json!({"input_data": {"columns": ["image"], "data": [["AAAAAAAA"], [server.url("/missing.jpg")]]}});
    flow.write([
        traced,
        request("page", server.url("/page")),
        request("ftp", "ftp://images.example/a.jpg"),
        NewRecord { value: Some(table.to_string().into_bytes()), ..NewRecord::default() },
    ]);
    let worker = flow.worker(FakeOptions::default());
    flow.until_answered(5);
    worker.stop().await;
    server
}

fn place(commands: &Commands, id: &str) -> String {
    let ran = commands.run(&["ls", "--output", "jsonl", "--id", id]);
    let lines = ran.lines();
    assert_eq!(lines.len(), 1, "{ran:?}");
    lines[0]["place"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_listed_by_code_time_host_id_and_origin() {
    let flow = Flow::start(2);
    let _server = worker_failed(&flow).await;
    let commands = Commands::of(&flow);
    let all = commands.run(&["ls", "--output", "jsonl"]).lines();
    let of = |id: &str| all.iter().find(|line| line["id"] == id).unwrap();
    let row = all.iter().find(|line| line["index"] == 1).unwrap();
    let (origin, row_id) = (&row["origin"], row["id"].as_str().unwrap());
    assert_eq!(all.len(), 5);
    assert_eq!(of("gone")["error"]["code"], "not_found");
    assert_eq!(of("gone")["host"], "127.0.0.1");
    assert_eq!((&of("page")["error"]["stage"], &of("page")["attempts"]), (&json!("decode"), &json!(1)));

    let time = of("gone")["time"].as_str().unwrap();
    let origin = format!("{}/{}/{}", origin["topic"].as_str().unwrap(), origin["partition"], origin["offset"]);
    assert_eq!(commands.ids(&["--code", "unsupported_media,bad_reference", "--id", "page"]), ["page"]);
    assert_eq!(commands.ids(&["--host", "Images.Example"]), ["ftp"]);
    assert_eq!(commands.ids(&["--id", "gone", "--id", "ftp"]), ["ftp", "gone"]);
    assert_eq!(commands.ids(&["--origin", &format!("{origin}/1")]), [row_id]);
    assert_eq!(commands.ids(&["--origin", &origin]).len(), 2);
    assert_eq!(commands.ids(&["--since", "1h"]).len(), 5);
    assert_eq!(commands.ids(&["--until", "1h ago"]), [""; 0]);
    assert!(commands.ids(&["--since", time]).contains(&"gone".to_owned()));
    assert!(!commands.ids(&["--until", time]).contains(&"gone".to_owned()));
    assert_eq!(commands.ids(&["--limit", "3"]).len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_has_a_line_each_and_no_query_string_and_kinds_are_counted() {
    let flow = Flow::start(1);
    let _server = worker_failed(&flow).await;
    let commands = Commands::of(&flow);
    let table = commands.run(&["ls"]);
    assert_eq!((table.code, table.err.as_str()), (Some(0), ""), "{table:?}");
    assert!(table.out.starts_with("PLACE ") && table.out.lines().count() == 6, "{table:?}");
    let gone = table.out.lines().find(|line| line.contains(" gone ")).unwrap();
    assert!(gone.contains(" not_found ") && gone.contains(" fetch ") && gone.contains(" 127.0.0.1 "), "{gone}");
    assert!(!table.out.contains("SECRET"), "{table:?}");

    let counted = commands.run(&["ls", "--count-by", "host", "--code", "not_found,bad_reference"]);
    assert_eq!(counted.out, "         2  127.0.0.1\n         1  images.example\n", "{counted:?}");
    let counted = commands.run(&["ls", "--count-by", "code", "--output", "jsonl"]).lines();
    assert_eq!(counted[0], json!({"code": "not_found", "count": 2}));
    let none = commands.run(&["ls", "--code", "quarantined"]);
    assert_eq!((none.code, none.out.as_str()), (Some(0), ""), "{none:?}");
    assert!(none.err.contains("none of the 5 dead letters of dlq matches"), "{none:?}");

    let unknown = commands.run(&["ls", "--code", "not_fond"]);
    assert_eq!(unknown.code, Some(2), "{unknown:?}");
    assert!(unknown.err.contains("not_found") && unknown.err.contains("quarantined"), "{unknown:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_shown_whole_by_place_and_by_id() {
    let flow = Flow::start(2);
    let server = worker_failed(&flow).await;
    let commands = Commands::of(&flow);
    let value = json!({"id": "gone", "image": format!("{}?sig=SECRET", server.url("/gone.jpg"))}).to_string();
    let gone = place(&commands, "gone");
    let by_place = commands.run(&["show", &gone]);
    assert_eq!(by_place.code, Some(0), "{by_place:?}");
    assert_eq!(by_place.out, commands.run(&["show", "--id", "gone"]).out);
    for part in [
        &*format!("dead letter {gone} of dlq, "),
        "not_found: 404 or 410, or no such file\n",
        "what to do: Replay once the image is there",
        "key: gone\n",
        "header traceparent: 00-1\n",
        "header blipstream-origin: requests/",
        "?sig=SECRET\"\n}\n",
    ] {
        assert!(by_place.out.contains(part), "{part}: {by_place:?}");
    }
    assert_eq!(commands.run(&["show", &gone, "--raw"]).out, value);

    let missing = commands.run(&["show", &gone, "0/99", "7/0"]);
    assert_eq!((missing.code, missing.out), (Some(1), by_place.out), "{}", missing.err);
    assert!(missing.err.contains("no dead letter at 0/99 of dlq") && missing.err.contains("at 7/0"), "{}", missing.err);
    let unknown = commands.run(&["show", "--id", "nobody"]);
    assert!(unknown.code == Some(1) && unknown.err.contains("no dead letter of the id `nobody`"), "{unknown:?}");
    assert_eq!(commands.run(&["show"]).code, Some(2));
    assert_eq!(commands.run(&["show", "gone"]).code, Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_writes_nothing_and_a_replay_is_captioned_under_the_first_origin() {
    let flow = Flow::start(2);
    let _server = worker_failed(&flow).await;
    let commands = Commands::of(&flow);
    let before = flow.read(REQUESTS);
    let first = before.iter().find(|message| message.header("traceparent").is_some()).unwrap();
    let origin = first.origin().to_string();

    let dry = commands.run(&["replay", "--code", "not_found", "--id", "gone", "--dry-run"]);
    assert_eq!((dry.code, dry.out.lines().count()), (Some(0), 1), "{dry:?}");
    assert!(dry.out.contains(&format!(" to requests: id gone, blipstream-origin {origin}, key gone")), "{dry:?}");
    assert!(dry.err.starts_with("would replay 1 dead letter, wrote nothing"), "{dry:?}");
    let whole = commands.run(&["replay", "--id", "gone", "--dry-run", "--output", "jsonl"]).lines();
    assert_eq!(whole[0]["value"].as_str().unwrap().as_bytes(), &first.payload.as_ref().unwrap()[..]);
    assert_eq!(flow.read(REQUESTS).len(), before.len());

    let ran = commands.run(&["replay", &place(&commands, "gone"), &place(&commands, "page")]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), ""), "{ran:?}");
    assert!(ran.err.starts_with("replayed 2 dead letters in ") && ran.err.contains("(2 to requests)"), "{ran:?}");
    let requests = flow.read(REQUESTS);
    assert_eq!(requests.len(), before.len() + 2);
    let again = requests.iter().rfind(|message| message.header("traceparent").is_some()).unwrap();
    assert_ne!((again.partition, again.offset), (first.partition, first.offset));
    assert_eq!((&again.key, &again.payload, again.partition), (&first.key, &first.payload, first.partition));
    let names: Vec<_> = again.headers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["traceparent", "blipstream-origin", "blipstream-attempts", "blipstream-first-failed-at"]);

    let worker = flow.worker(FakeOptions::default());
    let answers = flow.until_answered(7);
    worker.stop().await;
    assert_eq!(answers.captions.keys().collect::<Vec<_>>(), [&origin]);
    let caption = flow.read(CAPTIONS).remove(0);
    assert_eq!((&caption.key, caption.header("traceparent")), (&first.key, Some("00-1")));
    // What failed twice has its tries added up, and its first failure kept.
    let twice: Vec<_> = answers.dead_letters.values().filter(|letters| letters.len() == 2).flatten().collect();
    let mut tries: Vec<_> = twice.iter().map(|letter| letter.header("blipstream-attempts").unwrap()).collect();
    tries.sort_unstable();
    assert_eq!(tries, ["1", "2"]);
    let first_failed = |letter: &Message| letter.header("blipstream-first-failed-at").unwrap().to_owned();
    assert_eq!(first_failed(twice[0]), first_failed(twice[1]));
    let once = commands.run(&["replay", "--id", "page", "--dry-run"]);
    assert_eq!(once.out.lines().count(), 1, "an origin is replayed once a run: {once:?}");
    assert!(once.err.contains("1 left out, since their origin came before"), "{once:?}");
}

/// Dead letters that no worker has to make.
fn write_letters(flow: &Flow, count: usize, max_bytes: usize) {
    let letter = |n: usize| {
        let value = json!({"id": n.to_string(), "image": "x".repeat(1000)}).to_string();
        let message = Message {
            topic: "elsewhere".into(),
            partition: 0,
            offset: n as i64,
            timestamp_ms: None,
            key: None,
            payload: Some(value.into()),
            headers: Vec::new(),
            received: Instant::now(),
        };
        let failure = Failure::with_message(Stage::Decode, Code::Decode, "broken".into());
        let letter = DeadLetter::new(&message, &message.origin(), None, &failure, "fake", max_bytes);
        // A key each, so that they are spread over the partitions.
        let key = Some(n.to_string().into_bytes());
        NewRecord { key, value: letter.value.map(|value| value.to_vec()), headers: letter.headers }
    };
    write_records(&flow.settings.kafka, DEAD_LETTERS, (0..count).map(letter), PATIENCE).unwrap();
}

#[test]
fn pointers_are_named_and_counted_and_the_rest_is_replayed() {
    let flow = Flow::start(1);
    write_letters(&flow, 1, 1000);
    write_letters(&flow, 3, 1 << 20);
    let commands = Commands::of(&flow);
    let foreign = NewRecord { value: Some("hello".into()), ..NewRecord::default() };
    write_records(&flow.settings.kafka, DEAD_LETTERS, [foreign], PATIENCE).unwrap();
    let ran = commands.run(&["replay", "--all"]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(3), ""), "{ran:?}");
    assert!(ran.err.contains("0/0 cannot be replayed: its value was too long"), "{ran:?}");
    assert!(ran.err.contains("dlq/0/4: no dead letter: no header blipstream-error-code"), "{ran:?}");
    assert!(ran.err.contains("(3 to requests), 1 cannot be replayed; 5 records read"), "{ran:?}");
    assert_eq!(flow.read(REQUESTS).len(), 3);
    // To another topic, and only what was asked for.
    let ran = commands.run(&["replay", "--origin", "elsewhere/0/1", "--topic", CAPTIONS]);
    assert!(ran.code == Some(0) && ran.err.contains("(1 to captions)"), "{ran:?}");
    assert_eq!(flow.read(CAPTIONS)[0].header("blipstream-origin"), Some("elsewhere/0/1"));
}

#[test]
fn replay_wants_to_know_which_and_to_where() {
    let flow = Flow::start(1);
    let commands = Commands::of(&flow);
    for (arguments, told) in [
        (&["replay"][..], "--all"),
        (&["replay", "--limit", "3"], "--all"),
        (&["replay", "--all", "--code", "dns"], "contradict"),
        (&["replay", "--all", "--topic", "dlq"], "the topic of the dead letters"),
        (&["replay", "--since", "1h", "--until", "2h"], "--until"),
        (&["replay", "--all", "--rate", "0"], "--rate"),
    ] {
        let ran = commands.run(arguments);
        assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""), "{ran:?}");
        assert!(ran.err.contains(told), "{ran:?}");
    }
    let ran = commands.run(&["replay", "--all", "--topic", "missing"]);
    assert!(ran.code == Some(1) && ran.err.contains("the topic `missing` does not exist"), "{ran:?}");
    let ran = commands.run(&["replay", "--all"]);
    assert!(ran.code == Some(0) && ran.err.contains("replayed 0 dead letters"), "{ran:?}");
    let ran = commands.run(&["ls"]);
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), "dlq has no dead letters\n"), "{ran:?}");
    flow.embedded().down().unwrap();
    let ran = commands.run(&["ls", "--timeout", "500ms"]);
    assert!(ran.code == Some(1) && ran.err.contains("no Kafka broker answers"), "{ran:?}");
}

#[test]
fn a_replay_keeps_to_its_rate_and_ends_with_a_summary_at_ctrl_c() {
    let flow = Flow::start(1);
    write_letters(&flow, 200, 1 << 20);
    let commands = Commands::of(&flow);
    let begun = Instant::now();
    assert_eq!(commands.run(&["replay", "--all", "--limit", "10", "--rate", "20"]).code, Some(0));
    assert!(begun.elapsed() > Duration::from_millis(400), "{:?}", begun.elapsed());
    assert_eq!(flow.read(REQUESTS).len(), 10);

    let mut command = commands.command(&["replay", "--all", "--rate", "20"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    while flow.read(REQUESTS).len() < 12 {
        assert!(begun.elapsed() < PATIENCE);
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let written = flow.read(REQUESTS).len() - 10;
    assert!(written < 200, "the signal came too late to prove anything");
    assert!(ran.err.contains(&format!("interrupted\nreplayed {written} dead letters")), "{ran:?}");
}

#[test]
fn a_snapshot_ends_where_its_topic_ended_at_the_start() {
    let flow = Flow::start(3);
    let topic = TopicCheck { topic: DEAD_LETTERS.into(), setting: "kafka.dead_letter_topic" };
    let read = |mut snapshot: Snapshot| {
        let mut places = Vec::new();
        while !snapshot.is_over() {
            if let Some(message) = snapshot.next(Duration::from_millis(50)).unwrap() {
                places.push((message.partition, message.offset));
            }
        }
        places
    };
    let open = |only| Snapshot::open(&flow.settings.kafka, &topic, only, PATIENCE).unwrap();
    assert_eq!(read(open(None)), [], "an empty topic is over at once");
    write_letters(&flow, 500, 1 << 20);
    let snapshot = open(None);
    write_letters(&flow, 500, 1 << 20);
    assert_eq!((snapshot.offsets(), read(snapshot).len()), (500, 500));

    let total = open(None).offsets();
    assert_eq!(total, 1000);
    let only = [(0, 3..=5), (2, 7..=i64::MAX), (9, 0..=1)].into();
    let mut some = read(open(Some(&only)));
    some.sort_unstable();
    assert_eq!(some[..4], [(0, 3), (0, 4), (0, 5), (2, 7)]);
    assert!(some.iter().all(|(partition, _)| *partition != 1));
}
