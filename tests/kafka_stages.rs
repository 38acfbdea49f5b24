//! Consume, commit and publish against the embedded broker: the real protocol over loopback.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_channel::Receiver;
use blipstream::budget::{Limit, Pool};
use blipstream::disposition::{Code, Failure, Stage};
use blipstream::gate::{Gate, Reason};
use blipstream::kafka::{
    Class, Consumer, EmbeddedBroker, Error, Event, Fault, From, NewRecord, ReadLimits, Start, TopicCheck, check_topics,
    group_offsets, read_records, write_records,
};
use blipstream::message::{CaptionRecord, ImageInfo, Message, ModelRef, SCHEMA, Timing};
use blipstream::offsets::{Ledger, Outcome};
use blipstream::settings::{self, Input};
use blipstream::stage::commit::Watermarks;
use blipstream::stage::consume::{self, Consume};
use blipstream::stage::publish::{self, Observer, Summary};
use blipstream::stage::{Finished, Output};
use blipstream::tracked::Tracked;
use bytesize::ByteSize;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const IN: &str = "in";
const CAPTIONS: &str = "captions";
const DEAD: &str = "dead";

/// No test waits longer than this for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// For tests with more than one rebalance: the embedded broker draws each out until the session's time-out less a
/// second.
const SHORT_SESSION: Duration = Duration::from_millis(1500);

/// A broker and what it takes to talk to it.
struct Bench {
    broker: EmbeddedBroker,
    kafka: settings::Kafka,
    flow: settings::Flow,
}

impl Bench {
    fn new(partitions: i32) -> Self {
        let broker = EmbeddedBroker::start(1, &[(IN, partitions), (CAPTIONS, 1), (DEAD, 1)]).unwrap();
        let options = [
            ("heartbeat.interval.ms", "100"),
            ("fetch.wait.max.ms", "10"),
            ("fetch.error.backoff.ms", "10"),
            ("reconnect.backoff.ms", "10"),
            ("reconnect.backoff.max.ms", "100"),
            ("retry.backoff.ms", "10"),
            ("retry.backoff.max.ms", "100"),
        ];
        let kafka = settings::Kafka {
            bootstrap_servers: broker.bootstrap_servers().unwrap(),
            group_id: "fleet".into(),
            inputs: vec![Input { topic: IN.into(), weight: 1 }],
            captions_topic: CAPTIONS.into(),
            dead_letter_topic: DEAD.into(),
            session_timeout: Duration::from_secs(6),
            commit_interval: Duration::from_millis(20),
            linger: Duration::from_millis(1),
            options: options.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            ..settings::Kafka::default()
        };
        Self { broker, kafka, flow: settings::Flow::default() }
    }

    fn write(&self, topic: &str, records: impl IntoIterator<Item = NewRecord>) {
        write_records(&self.kafka, topic, records, PATIENCE).unwrap();
    }

    fn write_numbers(&self, numbers: std::ops::Range<usize>) {
        self.write(IN, numbers.map(numbered));
    }

    fn read(&self, topic: &str) -> Vec<Message> {
        let mut messages = Vec::new();
        let limits = ReadLimits { from: From::Beginning, timeout: PATIENCE, stop_at_end: true };
        read_records(&self.kafka, topic, limits, |message| {
            messages.push(message);
            true
        })
        .unwrap();
        messages
    }

    fn committed(&self) -> Vec<Option<i64>> {
        group_offsets(&self.kafka, IN, PATIENCE).unwrap()
    }

    fn member(&self) -> Member {
        Member::start(self, Limit { items: self.flow.max_messages, bytes: 64 << 20 }, 1024)
    }
}

fn numbered(number: usize) -> NewRecord {
    let text = number.to_string().into_bytes();
    NewRecord { key: Some(text.clone()), value: Some(text), ..NewRecord::default() }
}

fn number(message: &Message) -> usize {
    std::str::from_utf8(message.payload.as_ref().unwrap()).unwrap().parse().unwrap()
}

/// A running consumer and everything around it.
struct Member {
    consume: Consume,
    ledger: Ledger,
    messages: Pool,
    gate: Gate,
    output: Receiver<Tracked<Message>>,
}

impl Member {
    fn start(bench: &Bench, pool: Limit, queue: usize) -> Self {
        let (ledger, messages, gate) = (Ledger::new(), Pool::new(pool), Gate::new());
        let (sender, output) = async_channel::bounded(queue);
        let setup = consume::Setup {
            kafka: bench.kafka.clone(),
            flow: bench.flow.clone(),
            ledger: ledger.clone(),
            messages: messages.clone(),
            images: Pool::new(Limit { items: 100, bytes: 1 << 20 }),
            gate: gate.clone(),
            committer: Box::new(Watermarks::new(ledger.clone())),
        };
        let consume = consume::start(setup, sender).unwrap();
        Self { consume, ledger, messages, gate, output }
    }

    async fn next(&self) -> Tracked<Message> {
        tokio::time::timeout(PATIENCE, self.output.recv()).await.expect("a message in time").unwrap()
    }

    async fn take(&self, count: usize) -> Vec<Tracked<Message>> {
        let mut taken = Vec::new();
        for _ in 0..count {
            taken.push(self.next().await);
        }
        taken
    }

    fn paused(&self) -> usize {
        let status = self.consume.view().status();
        status.partitions.iter().filter(|partition| partition.paused).count()
    }

    async fn close(self) -> Result<(), Error> {
        self.consume.stop();
        tokio::time::timeout(PATIENCE, self.consume.close()).await.expect("an end in time")
    }
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Nothing happens for as long as it would take many times over.
async fn quiet() {
    tokio::time::sleep(Duration::from_millis(300)).await;
}

fn caption(message: &Message) -> Output {
    let record = CaptionRecord {
        schema: SCHEMA,
        id: message.origin().to_string(),
        index: 0,
        text: format!("a caption of {}", number(message)),
        logprob: -1.0,
        tokens: 3,
        finish: "stop",
        flags: Vec::new(),
        model: ModelRef { id: "fake".into(), revision: None, dtype: "f32".into() },
        image: ImageInfo::default(),
        timing_ms: Timing::default(),
        origin: message.origin(),
        worker: "test".into(),
        meta: serde_json::Map::new(),
    };
    Output::Caption(Box::new(record), Arc::new(message.clone()))
}

fn failure(message: &Message) -> Output {
    let failure = Failure::with_message(Stage::Parse, Code::BadMessage, "not a request".into());
    Output::FailedMessage { message: Arc::new(message.clone()), index: None, native: None, failure }
}

#[derive(Default)]
struct Counter {
    delivered: Mutex<Vec<Option<Code>>>,
    refused: Mutex<Vec<Class>>,
    too_large: Mutex<usize>,
}

impl Observer for Counter {
    fn delivered(&self, _: &Output, code: Option<Code>, _: Duration) {
        self.delivered.lock().unwrap().push(code);
    }
    fn refused(&self, class: Class) {
        self.refused.lock().unwrap().push(class);
    }
    fn too_large(&self) {
        *self.too_large.lock().unwrap() += 1;
    }
}

/// A running publisher.
struct Publishing {
    input: async_channel::Sender<Finished>,
    give_up: CancellationToken,
    counter: Arc<Counter>,
    task: JoinHandle<Result<Summary, Error>>,
}

impl Publishing {
    fn start(bench: &Bench) -> Self {
        let (input, receiver) = async_channel::bounded(16);
        let (give_up, counter) = (CancellationToken::new(), Arc::new(Counter::default()));
        let task = tokio::spawn(publish::run(publish::Setup {
            kafka: bench.kafka.clone(),
            worker: "test".into(),
            input: receiver,
            give_up: give_up.clone(),
            failed: CancellationToken::new(),
            observer: counter.clone(),
        }));
        Self { input, give_up, counter, task }
    }

    async fn send(&self, finished: Finished) {
        tokio::time::timeout(PATIENCE, self.input.send(finished)).await.expect("room in time").unwrap();
    }

    async fn end(self) -> Summary {
        drop(self.input);
        tokio::time::timeout(PATIENCE, self.task).await.expect("an end in time").unwrap().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_message_becomes_one_acknowledged_caption_and_is_committed() {
    let bench = Bench::new(3);
    bench.write_numbers(0..200);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    for _ in 0..200 {
        let message = member.next().await;
        let output = caption(&message.value);
        publishing.send(message.map(|_| output)).await;
    }
    eventually("caught up", async || member.consume.view().caught_up()).await;
    assert_eq!(publishing.end().await, Summary { published: 200, abandoned: 0 });
    member.close().await.unwrap();
    assert_eq!(bench.committed().into_iter().map(Option::unwrap_or_default).sum::<i64>(), 200);
    let texts: BTreeSet<String> = bench.read(CAPTIONS).iter().map(text).collect();
    assert_eq!(texts, (0..200).map(|number| format!("a caption of {number}")).collect());
    assert_eq!(bench.read(CAPTIONS).len(), 200);
}

fn text(message: &Message) -> String {
    let record: serde_json::Value = serde_json::from_slice(message.payload.as_ref().unwrap()).unwrap();
    record["text"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_never_passes_an_unresolved_message() {
    let bench = Bench::new(1);
    bench.write_numbers(0..10);
    let member = bench.member();
    let mut taken = member.take(10).await;
    let third = taken.remove(3);
    // Newest first: completion is out of order.
    for message in taken.into_iter().rev() {
        message.resolve(Outcome::Published);
    }
    eventually("three are committed", async || bench.committed() == [Some(3)]).await;
    quiet().await;
    assert_eq!(bench.committed(), [Some(3)]);
    third.resolve(Outcome::Published);
    eventually("all are committed", async || bench.committed() == [Some(10)]).await;
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_resolved_is_delivered_again_to_the_next_worker() {
    let mut bench = Bench::new(1);
    bench.kafka.session_timeout = SHORT_SESSION;
    bench.write_numbers(0..10);
    let member = bench.member();
    let mut taken = member.take(10).await;
    let rest = taken.split_off(4);
    for message in taken {
        message.resolve(Outcome::Published);
    }
    member.close().await.unwrap();
    for message in rest {
        // The deadline of the drain has passed.
        message.abandon();
    }
    assert_eq!(bench.committed(), [Some(4)]);
    let next = bench.member();
    let numbers: Vec<usize> = next.take(6).await.into_iter().map(|m| number(&m.resolve(Outcome::Published))).collect();
    assert_eq!(numbers, (4..10).collect::<Vec<_>>());
    next.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(10)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn pausing_for_a_spent_pool_loses_and_repeats_nothing() {
    let bench = Bench::new(2);
    bench.write_numbers(0..400);
    let limit = Limit { items: 10, bytes: 64 << 20 };
    let member = Member::start(&bench, limit, 100);
    eventually("everything is paused", async || member.paused() == 2).await;
    assert!(member.gate.reasons().contains(&Reason::Messages));
    let mut seen = Vec::new();
    while seen.len() < 400 {
        assert!(member.messages.used().items <= limit.items);
        let message = member.next().await;
        seen.push(number(&message.resolve(Outcome::Published)));
    }
    eventually("caught up", async || member.consume.view().caught_up()).await;
    assert_eq!(member.paused(), 0);
    seen.sort_unstable();
    assert_eq!(seen, (0..400).collect::<Vec<_>>());
    assert!(member.output.is_empty());
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_loses_and_repeats_nothing() {
    let bench = Bench::new(2);
    bench.write_numbers(0..300);
    let member = Member::start(&bench, Limit { items: 1000, bytes: 64 << 20 }, 2);
    eventually("everything is paused", async || member.paused() == 2).await;
    let mut seen: Vec<usize> = Vec::new();
    while seen.len() < 300 {
        seen.push(number(&member.next().await.resolve(Outcome::Published)));
    }
    eventually("caught up", async || member.consume.view().caught_up()).await;
    seen.sort_unstable();
    assert_eq!(seen, (0..300).collect::<Vec<_>>());
    member.close().await.unwrap();
    assert_eq!(bench.committed().into_iter().map(Option::unwrap_or_default).sum::<i64>(), 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shut_gate_stops_delivery_and_keeps_the_membership() {
    let mut bench = Bench::new(2);
    bench.kafka.max_poll_interval = Duration::from_secs(6);
    let member = bench.member();
    eventually("joined", async || member.consume.view().status().partitions.len() == 2).await;
    member.gate.shut(Reason::Operator);
    eventually("everything is paused", async || member.paused() == 2).await;
    bench.write_numbers(0..20);
    quiet().await;
    assert!(member.output.is_empty());
    assert_eq!(member.consume.view().status().partitions.len(), 2);
    member.gate.clear(Reason::Operator);
    for message in member.take(20).await {
        message.resolve(Outcome::Published);
    }
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_that_is_too_long_pauses_its_partition_until_the_oldest_is_resolved() {
    let mut bench = Bench::new(1);
    bench.flow.max_span = 20;
    bench.write_numbers(0..100);
    let member = bench.member();
    let oldest = member.next().await;
    for message in member.take(19).await {
        message.resolve(Outcome::Published);
    }
    eventually("the partition is paused", async || member.paused() == 1).await;
    quiet().await;
    assert!(member.output.is_empty());
    oldest.resolve(Outcome::Published);
    for expected in 20..100 {
        assert_eq!(number(&member.next().await.resolve(Outcome::Published)), expected);
    }
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(100)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_drain_close_commits_everything_that_was_taken() {
    let bench = Bench::new(2);
    bench.write_numbers(0..50);
    let member = bench.member();
    let first = member.take(50).await;
    member.consume.stop();
    eventually("the channel is closed", async || member.output.is_closed()).await;
    bench.write_numbers(50..60);
    quiet().await;
    assert!(member.output.is_empty());
    assert_eq!(member.consume.view().status().partitions.len(), 2, "still a member while draining");
    for message in first {
        message.resolve(Outcome::Published);
    }
    member.close().await.unwrap();
    assert_eq!(bench.committed().into_iter().map(Option::unwrap_or_default).sum::<i64>(), 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_joins_and_leaves_loses_and_repeats_nothing() {
    let mut bench = Bench::new(4);
    bench.kafka.session_timeout = SHORT_SESSION;
    let seen: Arc<Mutex<BTreeMap<usize, usize>>> = Arc::default();
    let echo = |member: &Member| {
        let (output, seen) = (member.output.clone(), seen.clone());
        tokio::spawn(async move {
            while let Ok(message) = output.recv().await {
                // Rows take their time, so that some are open whenever partitions move.
                tokio::time::sleep(Duration::from_millis(1)).await;
                *seen.lock().unwrap().entry(number(&message.value)).or_default() += 1;
                message.resolve(Outcome::Published);
            }
        })
    };
    let first = bench.member();
    let first_echo = echo(&first);
    bench.write_numbers(0..200);
    eventually("the first works", async || seen.lock().unwrap().len() > 20).await;
    let second = bench.member();
    let second_echo = echo(&second);
    bench.write_numbers(200..400);
    let shares = async || {
        let count = |member: &Member| member.consume.view().status().partitions.len();
        (count(&first), count(&second))
    };
    eventually("they share", async || shares().await == (2, 2)).await;
    bench.write_numbers(400..600);
    eventually("both work", async || seen.lock().unwrap().len() > 420).await;
    // Stop, drain, close: the echo ends when the channel is closed and empty.
    second.consume.stop();
    second_echo.await.unwrap();
    second.close().await.unwrap();
    bench.write_numbers(600..700);
    eventually("the first has all partitions", async || first.consume.view().status().partitions.len() == 4).await;
    eventually("all is done", async || seen.lock().unwrap().len() == 700 && first.consume.view().caught_up()).await;
    first.close().await.unwrap();
    first_echo.await.unwrap();
    let repeated: Vec<_> = seen.lock().unwrap().iter().filter(|(_, times)| **times > 1).map(|(n, _)| *n).collect();
    assert_eq!(repeated, Vec::<usize>::new());
    assert_eq!(bench.committed().into_iter().map(Option::unwrap_or_default).sum::<i64>(), 700);
}

#[tokio::test(flavor = "multi_thread")]
async fn brokers_that_are_away_stall_the_publisher_within_its_bounds_and_lose_nothing() {
    let bench = Bench::new(1);
    bench.write_numbers(0..100);
    let limit = Limit { items: 30, bytes: 64 << 20 };
    let member = Member::start(&bench, limit, 10);
    let publishing = Publishing::start(&bench);
    bench.broker.fail(&[Fault::ProduceDisconnect]).unwrap();
    for _ in 0..5 {
        let message = member.next().await;
        let output = caption(&message.value);
        publishing.send(message.map(|_| output)).await;
    }
    eventually("the first are out", async || publishing.counter.delivered.lock().unwrap().len() == 5).await;
    bench.broker.down().unwrap();
    let (output, input) = (member.output.clone(), publishing.input.clone());
    let feeding = tokio::spawn(async move {
        for _ in 5..100 {
            let message = output.recv().await.unwrap();
            let caption = caption(&message.value);
            input.send(message.map(|_| caption)).await.unwrap();
        }
    });
    quiet().await;
    assert_eq!(publishing.counter.delivered.lock().unwrap().len(), 5);
    assert!(member.messages.used().items <= limit.items);
    assert!(!feeding.is_finished());
    bench.broker.up().unwrap();
    tokio::time::timeout(PATIENCE, feeding).await.expect("recovery in time").unwrap();
    assert_eq!(publishing.end().await, Summary { published: 100, abandoned: 0 });
    assert_eq!(bench.read(CAPTIONS).len(), 100);
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(100)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_deadline_what_is_not_acknowledged_is_given_up_and_not_reported_as_lost() {
    let bench = Bench::new(1);
    bench.write_numbers(0..10);
    let member = bench.member();
    let taken = member.take(10).await;
    let publishing = Publishing::start(&bench);
    bench.broker.down().unwrap();
    for message in taken {
        let output = caption(&message.value);
        publishing.send(message.map(|_| output)).await;
    }
    publishing.give_up.cancel();
    assert_eq!(publishing.end().await, Summary { published: 0, abandoned: 10 });
    assert_eq!(member.ledger.take_lost(), None);
    assert_eq!(member.messages.used(), Limit::default());
    bench.broker.up().unwrap();
    member.close().await.unwrap();
    assert_eq!(bench.committed().into_iter().map(Option::unwrap_or_default).sum::<i64>(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_headers_pass_through() {
    let bench = Bench::new(1);
    let headers = vec![
        ("traceparent".to_owned(), Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into())),
        ("twice".to_owned(), Some("a".into())),
        ("twice".to_owned(), Some("b".into())),
        ("null".to_owned(), None),
        ("empty".to_owned(), Some("".into())),
    ];
    let record = NewRecord { key: Some(b"k\0\xff".into()), value: Some(b"7".into()), headers: headers.clone() };
    bench.write(IN, [record.clone(), NewRecord { key: None, ..record }]);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    for _ in 0..2 {
        let message = member.next().await;
        let output = caption(&message.value);
        publishing.send(message.map(|_| output)).await;
    }
    assert_eq!(publishing.end().await.published, 2);
    member.close().await.unwrap();
    let captions = bench.read(CAPTIONS);
    for (offset, caption) in captions.iter().enumerate() {
        let mut expected = headers.clone();
        expected.push(("blipstream-origin".into(), Some(format!("in/0/{offset}").into())));
        assert_eq!(caption.headers, expected);
    }
    let keys: Vec<_> = captions.iter().map(|caption| caption.key.as_deref()).collect();
    assert_eq!(keys, [Some(&b"k\0\xff"[..]), None]);
}

#[tokio::test(flavor = "multi_thread")]
async fn records_go_to_the_partition_that_java_clients_choose() {
    const PARTITIONS: i32 = 97;
    // murmur2 as Apache Kafka's Java client computes it; the vectors are those of librdkafka's unit tests.
    let hashes: [(&str, u32); 8] = [
        ("kafka", 0xd067_cf64),
        ("giberish123456789", 0x8f55_2b0c),
        ("1234", 0x9fc9_7b14),
        ("234", 0xe7c0_09ca),
        ("34", 0x8739_30da),
        ("4", 0x5a4b_5ca1),
        ("PreAmbleWillBeRemoved,ThePrePartThatIs", 0x7842_4f1c),
        ("reAmbleWillBeRemoved,ThePrePartThatIs", 0x4a62_b377),
    ];
    let bench = Bench::new(PARTITIONS);
    bench.write(IN, hashes.map(|(key, _)| NewRecord { key: Some(key.into()), ..numbered(1) }));
    let found: BTreeMap<String, i32> = bench
        .read(IN)
        .iter()
        .map(|message| (String::from_utf8_lossy(message.key.as_ref().unwrap()).into_owned(), message.partition))
        .collect();
    let expected = hashes.map(|(key, hash)| (key.to_owned(), ((hash & 0x7fff_ffff) % PARTITIONS as u32) as i32));
    assert_eq!(found, expected.into());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caption_that_its_topic_refuses_as_too_long_becomes_a_dead_letter() {
    let bench = Bench::new(1);
    bench.write_numbers(0..1);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    // In its batch, and once more alone.
    bench.broker.fail(&[Fault::ProduceTooLarge, Fault::ProduceTooLarge]).unwrap();
    let message = member.next().await;
    let output = caption(&message.value);
    publishing.send(message.map(|_| output)).await;
    let counter = publishing.counter.clone();
    assert_eq!(publishing.end().await.published, 1);
    assert_eq!(*counter.delivered.lock().unwrap(), [Some(Code::OutputTooLarge)]);
    assert_eq!(*counter.too_large.lock().unwrap(), 1);
    assert!(bench.read(CAPTIONS).is_empty());
    assert_eq!(bench.read(DEAD)[0].key.as_deref(), Some(&b"0"[..]));
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_batch_blames_no_record_that_the_topic_takes_alone() {
    let bench = Bench::new(1);
    bench.write_numbers(0..20);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    let taken = member.take(20).await;
    bench.broker.fail(&[Fault::ProduceTooLarge]).unwrap();
    for message in taken {
        let output = caption(&message.value);
        publishing.send(message.map(|_| output)).await;
    }
    let counter = publishing.counter.clone();
    assert_eq!(publishing.end().await.published, 20);
    assert_eq!(*counter.too_large.lock().unwrap(), 0);
    assert_eq!(bench.read(CAPTIONS).len(), 20);
    assert!(bench.read(DEAD).is_empty());
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caption_over_the_configured_size_becomes_a_dead_letter() {
    let mut bench = Bench::new(1);
    bench.kafka.max_message_size = ByteSize::kib(10);
    bench.write_numbers(0..1);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    let message = member.next().await;
    let Output::Caption(mut record, source) = caption(&message.value) else { panic!("not a caption") };
    record.text = "long ".repeat(50_000);
    publishing.send(message.map(|_| Output::Caption(record, source))).await;
    let counter = publishing.counter.clone();
    assert_eq!(publishing.end().await.published, 1);
    assert_eq!(*counter.delivered.lock().unwrap(), [Some(Code::OutputTooLarge)]);
    assert_eq!(bench.read(DEAD).len(), 1);
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_that_its_topic_refuses_as_too_long_is_sent_as_a_pointer() {
    let bench = Bench::new(1);
    bench.write_numbers(0..1);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    bench.broker.fail(&[Fault::ProduceTooLarge, Fault::ProduceTooLarge]).unwrap();
    let message = member.next().await;
    let output = failure(&message.value);
    publishing.send(message.map(|_| output)).await;
    assert_eq!(publishing.end().await.published, 1);
    assert_eq!(bench.read(DEAD)[0].key.as_deref(), Some(&b"0"[..]));
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_a_person_must_remove_stalls_and_drops_nothing() {
    let bench = Bench::new(1);
    bench.write_numbers(0..3);
    let (member, publishing) = (bench.member(), Publishing::start(&bench));
    bench.broker.fail(&[Fault::ProduceNotAuthorised]).unwrap();
    for message in member.take(3).await {
        let output = caption(&message.value);
        publishing.send(message.map(|_| output)).await;
    }
    let counter = publishing.counter.clone();
    assert_eq!(publishing.end().await.published, 3);
    assert!(counter.refused.lock().unwrap().contains(&Class::NotAuthorised));
    assert_eq!(bench.read(CAPTIONS).len(), 3);
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(3)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn advances_offset_past_tombstones() {
    let bench = Bench::new(1);
    let tombstone = || NewRecord { value: None, ..numbered(0) };
    bench.write(IN, [numbered(0), tombstone(), tombstone(), numbered(1), tombstone()]);
    let member = bench.member();
    for message in member.take(2).await {
        message.resolve(Outcome::Published);
    }
    eventually("caught up", async || member.consume.view().caught_up()).await;
    assert!(member.output.is_empty());
    let view = member.consume.view();
    member.close().await.unwrap();
    assert_eq!(view.status().tombstones, 3);
    assert_eq!(view.status().messages[IN], 5);
    assert_eq!(bench.committed(), [Some(5)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_message_is_named_and_never_committed() {
    let bench = Bench::new(1);
    bench.write_numbers(0..5);
    let member = bench.member();
    for (at, message) in member.take(5).await.into_iter().enumerate() {
        if at == 2 { drop(message) } else { drop(message.resolve(Outcome::Published)) }
    }
    let lost = member.ledger.take_lost().unwrap();
    assert_eq!((lost.partition.to_string().as_str(), lost.offset), ("in/0", 2));
    member.close().await.unwrap();
    assert_eq!(bench.committed(), [Some(2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_commit_is_tried_again() {
    let bench = Bench::new(1);
    bench.write_numbers(0..5);
    let member = bench.member();
    let taken = member.take(5).await;
    bench.broker.fail(&[Fault::CommitRebalancing]).unwrap();
    for message in taken {
        message.resolve(Outcome::Published);
    }
    eventually("committed", async || bench.committed() == [Some(5)]).await;
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_paused_or_at_its_end_is_not_taken_for_stuck() {
    let mut bench = Bench::new(2);
    bench.kafka.stuck_after = Duration::from_millis(50);
    bench.write_numbers(0..5);
    let member = bench.member();
    let taken = member.take(5).await;
    eventually("a broker is known to be up", async || member.consume.view().status().brokers_up == 1).await;
    quiet().await;
    member.gate.shut(Reason::Operator);
    eventually("everything is paused", async || member.paused() == 2).await;
    quiet().await;
    assert_eq!(member.consume.view().status().reseeks, 0);
    for message in taken {
        message.resolve(Outcome::Published);
    }
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_silent_for_too_long_is_read_anew_and_repeats_nothing() {
    let mut bench = Bench::new(1);
    bench.kafka.stuck_after = Duration::from_millis(50);
    bench.write_numbers(0..20);
    let member = bench.member();
    eventually("a broker is known to be up", async || member.consume.view().status().brokers_up == 1).await;
    // Answers take longer than the watchdog waits, so that it barks at a partition that is only slow.
    bench.broker.round_trip_time(Duration::from_millis(200)).unwrap();
    bench.write_numbers(20..40);
    eventually("it was read anew", async || member.consume.view().status().reseeks > 0).await;
    bench.broker.round_trip_time(Duration::ZERO).unwrap();
    let mut seen = Vec::new();
    for message in member.take(40).await {
        seen.push(number(&message.resolve(Outcome::Published)));
    }
    assert_eq!(seen, (0..40).collect::<Vec<_>>());
    eventually("caught up", async || member.consume.view().caught_up()).await;
    assert!(member.output.is_empty());
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_ends_in_bounded_time_while_the_brokers_are_away() {
    let mut bench = Bench::new(1);
    bench.kafka.session_timeout = SHORT_SESSION;
    bench.kafka.commit_interval = Duration::from_secs(60);
    bench.write_numbers(0..3);
    let member = bench.member();
    let taken = member.take(3).await;
    bench.broker.down().unwrap();
    for message in taken {
        message.resolve(Outcome::Published);
    }
    // The commit has failed, or the partition counts as lost by then; either way nothing was committed.
    drop(member.close().await);
    bench.broker.up().unwrap();
    assert_eq!(bench.committed(), [None]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_without_offsets_begins_at_the_beginning() {
    let bench = Bench::new(1);
    bench.write_numbers(0..3);
    let member = bench.member();
    assert_eq!(number(&member.next().await.resolve(Outcome::Published)), 0);
    for message in member.take(2).await {
        message.resolve(Outcome::Published);
    }
    member.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offset_out_of_range_stops_the_worker_with_its_place() {
    let mut bench = Bench::new(1);
    bench.kafka.session_timeout = SHORT_SESSION;
    bench.write_numbers(0..3);
    commit(&bench.kafka, 1000);
    let mut member = bench.member();
    let error = tokio::time::timeout(PATIENCE, member.consume.failed()).await.expect("a failure in time");
    assert!(matches!(error, Error::OffsetOutOfRange { offset: 1000, low: 0, high: 3, .. }), "{error}");
    assert!(error.to_string().contains("in/0"), "{error}");
    assert_eq!(member.close().await, Err(error));
    assert_eq!(bench.committed(), [Some(1000)]);
}

/// Commits an offset for the only partition, as a member of the group.
fn commit(kafka: &settings::Kafka, offset: i64) {
    let consumer = Consumer::new(kafka).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(Event::Assigned(partitions)) = consumer.poll(Duration::from_millis(100)) {
            consumer.assign(&[(partitions[0].clone(), Start::Beginning)]).unwrap();
            consumer.commit_now(&[(partitions[0].clone(), offset)]).unwrap();
            return consumer.close();
        }
    }
    panic!("no assignment in time");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_input_topics_are_caught_up_when_both_are() {
    let mut bench = Bench::new(2);
    bench.kafka.inputs.push(Input { topic: "more".into(), weight: 1 });
    bench.write("more", (0..10).map(numbered));
    bench.write_numbers(10..20);
    let member = bench.member();
    let view = member.consume.view();
    let mut taken = member.take(20).await;
    let last = taken.pop().unwrap();
    for message in taken {
        message.resolve(Outcome::Published);
    }
    quiet().await;
    assert!(!view.caught_up());
    last.resolve(Outcome::Published);
    eventually("caught up", async || view.caught_up()).await;
    eventually("the status knows", async || view.status().joined && view.status().brokers_up == 1).await;
    let lags = async || view.status().partitions.iter().map(|partition| partition.lag).collect::<Vec<_>>();
    eventually("no lag is left", async || !lags().await.is_empty() && lags().await.iter().all(|l| *l == Some(0))).await;
    member.close().await.unwrap();
}

#[test]
fn a_check_finds_topics_and_names_what_is_missing() {
    let bench = Bench::new(3);
    let brokers = check_topics(&bench.kafka, &TopicCheck::of(&bench.kafka), PATIENCE).unwrap();
    let partitions: Vec<usize> = brokers.topics.iter().map(|topic| topic.partitions).collect();
    assert_eq!(partitions, [3, 1, 1]);
    assert_eq!(brokers.addresses.len(), 1);
    let away = settings::Kafka { bootstrap_servers: "127.0.0.1:1".into(), ..bench.kafka };
    let error = check_topics(&away, &TopicCheck::of(&away), Duration::from_secs(1)).unwrap_err();
    assert!(error.to_string().contains("kafka.bootstrap_servers"), "{error}");
}
