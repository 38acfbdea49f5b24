//! A broker, members of the group, and a publisher, with what tests ask of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_channel::Receiver;
use blipstream::budget::{Limit, Pool};
use blipstream::disposition::{Code, Failure, Stage};
use blipstream::gate::Gate;
use blipstream::kafka::{Consumer, EmbeddedBroker, Error, Event, NewRecord, Start, group_offsets, write_records};
use blipstream::message::{
    CANARY_SCHEMA, CanaryRecord, CaptionRecord, Generated, ImageInfo, Message, ModelRef, SCHEMA, Timing, Written,
};
use blipstream::metrics::Metrics;
use blipstream::offsets::{Committed, Ledger, TopicPartition};
use blipstream::settings;
use blipstream::stage::commit::Watermarks;
use blipstream::stage::consume::{self, Consume};
use blipstream::stage::publish::{self, Summary};
use blipstream::stage::{Finished, Output};
use blipstream::tracked::Tracked;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use crate::support::client::{PATIENCE, eventually};
use crate::support::client::{assert_nothing_was_trimmed, hasty, read_all};

pub const IN: &str = "in";
pub const CAPTIONS: &str = "captions";
pub const DEAD: &str = "dead";
pub const CANARY: &str = "canary";

/// For tests with more than one rebalance: the embedded broker draws each out until the session's time-out less a
/// second.
pub const SHORT_SESSION: Duration = Duration::from_millis(1500);

/// A broker and what it takes to talk to it.
pub struct Bench {
    pub broker: EmbeddedBroker,
    pub kafka: settings::Kafka,
    pub flow: settings::Flow,
}

impl Bench {
    pub fn new(partitions: i32) -> Self {
        let broker = EmbeddedBroker::start(1, &[(IN, partitions), (CAPTIONS, 1), (DEAD, 1), (CANARY, 1)]).unwrap();
        let mut kafka =
            hasty(broker.bootstrap_servers().unwrap(), "fleet".into(), [IN, CAPTIONS, DEAD].map(str::to_owned));
        kafka.canary_topic = Some(CANARY.into());
        Self { broker, kafka, flow: settings::Flow::default() }
    }

    pub fn write(&self, topic: &str, records: impl IntoIterator<Item = NewRecord>) {
        write_records(&self.kafka, topic, records, PATIENCE).unwrap();
    }

    pub fn write_numbers(&self, numbers: std::ops::Range<usize>) {
        self.write(IN, numbers.map(numbered));
    }

    pub fn read(&self, topic: &str) -> Vec<Message> {
        let messages = read_all(&self.kafka, topic);
        assert_nothing_was_trimmed(topic, &messages);
        messages
    }

    pub fn committed(&self) -> Vec<Option<i64>> {
        group_offsets(&self.kafka, IN, PATIENCE).unwrap()
    }

    /// Commits offsets as a member of the group, whose only one it is.
    pub fn commit<const N: usize>(&self, offsets: [(&str, i32, Committed); N]) {
        let consumer = Consumer::new(&self.kafka).unwrap();
        consumer.subscribe().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(Event::Assigned(member, partitions)) = consumer.poll(Duration::from_millis(100)) {
                let starts: Vec<_> = partitions.into_iter().map(|partition| (partition, Start::Beginning)).collect();
                consumer.assign(member, &starts).unwrap();
                let of = |(topic, partition, committed): (&str, i32, Committed)| {
                    (TopicPartition { topic: topic.into(), partition }, committed)
                };
                consumer.commit_now(member, &offsets.map(of)).unwrap();
                return consumer.close();
            }
        }
        panic!("no assignment in time");
    }

    /// What the group has of a partition of a topic.
    pub fn noted(&self, topic: &str, partition: i32) -> Option<Committed> {
        let asking = Consumer::new(&self.kafka).unwrap();
        asking.committed(0, &[TopicPartition { topic: topic.into(), partition }]).unwrap()[0].1
    }

    pub fn member(&self) -> Member {
        Member::start(self, Limit { items: self.flow.max_messages, bytes: 64 << 20 }, 1024)
    }
}

pub fn numbered(number: usize) -> NewRecord {
    let text = number.to_string().into_bytes();
    NewRecord { key: Some(text.clone()), value: Some(text), ..NewRecord::default() }
}

pub fn number(message: &Message) -> usize {
    std::str::from_utf8(message.payload.as_ref().unwrap()).unwrap().parse().unwrap()
}

/// A running consumer and everything around it.
pub struct Member {
    pub consume: Consume,
    pub ledger: Ledger,
    pub messages: Pool,
    pub gate: Gate,
    pub output: Receiver<Tracked<Message>>,
    /// Messages that are to be dead letters, unread.
    pub blamed: Receiver<Finished>,
}

impl Member {
    pub fn start(bench: &Bench, pool: Limit, queue: usize) -> Self {
        let (ledger, messages, gate) = (Ledger::new(), Pool::new(pool), Gate::new());
        let (sender, output) = async_channel::bounded(queue);
        let setup = consume::Setup {
            consumer: Consumer::new(&bench.kafka).unwrap(),
            kafka: bench.kafka.clone(),
            flow: bench.flow.clone(),
            ledger: ledger.clone(),
            messages: messages.clone(),
            gate: gate.clone(),
            committer: Box::new(Watermarks(ledger.clone())),
            metrics: Arc::default(),
        };
        let (failures, blamed) = async_channel::bounded(1);
        let consume = consume::start(setup, sender, failures).unwrap();
        Self { consume, ledger, messages, gate, output, blamed }
    }

    pub async fn next(&self) -> Tracked<Message> {
        tokio::time::timeout(PATIENCE, self.output.recv()).await.expect("a message in time").unwrap()
    }

    pub async fn take(&self, count: usize) -> Vec<Tracked<Message>> {
        let mut taken = Vec::new();
        for _ in 0..count {
            taken.push(self.next().await);
        }
        taken
    }

    pub fn paused(&self) -> usize {
        let status = self.consume.view().status();
        status.partitions.iter().filter(|partition| partition.paused).count()
    }

    pub async fn close(self) -> Result<(), Error> {
        self.consume.stop();
        tokio::time::timeout(PATIENCE, self.consume.close()).await.expect("an end in time")
    }
}

/// Nothing happens for as long as it would take many times over.
pub async fn quiet() {
    tokio::time::sleep(Duration::from_millis(300)).await;
}

pub fn caption(message: &Message) -> Output {
    let record = CaptionRecord {
        schema: SCHEMA,
        id: message.origin().to_string(),
        index: 0,
        text: format!("a caption of {}", number(message)),
        generated: Generated { logprob: Some(-1.0), tokens: Some(3), finish: Some("stop") },
        candidates: Vec::new(),
        answers: Vec::new(),
        embeddings: None,
        flags: Vec::new(),
        cached: false,
        model: ModelRef { id: "fake".into(), revision: None, dtype: "f32".into() },
        filter: None,
        answerer: None,
        image: ImageInfo::default(),
        timing_ms: Timing::default(),
        origin: message.origin(),
        worker: "test".into(),
        meta: serde_json::Map::new(),
    };
    let (record, message) = (Box::new(record), Arc::new(message.clone()));
    Output::Caption { record, message, device: "cpu".into(), rejected: false }
}

/// A comparison for a request that is called like this.
pub fn comparison(message: &Message, id: &str) -> Output {
    let Output::Caption { record, message, .. } = caption(message) else { unreachable!() };
    let CaptionRecord { index, text, generated, model, image, origin, worker, .. } = *record;
    let caption = Written { text: Some(text), generated, model, device_ms: 1.0, error: None };
    let (result, word_distance) = CanaryRecord::compared(&caption, &caption);
    let record = CanaryRecord {
        schema: CANARY_SCHEMA,
        id: id.into(),
        index,
        result,
        word_distance,
        canary: caption.clone(),
        caption,
        image,
        origin,
        worker,
        shortened: false,
    };
    Output::Canary { record: Box::new(record), message }
}

pub fn failure(message: &Message) -> Output {
    let failure = Failure::with_message(Stage::Parse, Code::BadMessage, "not a request".into());
    Output::FailedMessage { message: Arc::new(message.clone()), index: None, native: None, failure }
}

/// A running publisher.
pub struct Publishing {
    pub input: async_channel::Sender<Finished>,
    pub give_up: CancellationToken,
    pub metrics: Arc<Metrics>,
    pub task: JoinHandle<Result<Summary, Error>>,
}

impl Publishing {
    pub fn start(bench: &Bench) -> Self {
        let (input, receiver) = async_channel::bounded(16);
        let (give_up, metrics) = (CancellationToken::new(), Arc::new(Metrics::new()));
        let task = tokio::spawn(publish::run(publish::Setup {
            kafka: bench.kafka.clone(),
            worker: "test".into(),
            input: receiver,
            give_up: give_up.clone(),
            failed: CancellationToken::new(),
            metrics: metrics.clone(),
            dead_letters: publish::DeadLetters::default(),
            exactly_once: None,
        }));
        Self { input, give_up, metrics, task }
    }

    /// Records that the broker has acknowledged.
    pub fn delivered(&self) -> u64 {
        self.metrics.stage_so_far(Stage::Publish).0
    }

    pub async fn send(&self, finished: Finished) {
        tokio::time::timeout(PATIENCE, self.input.send(finished)).await.expect("room in time").unwrap();
    }

    pub async fn end(self) -> Summary {
        drop(self.input);
        tokio::time::timeout(PATIENCE, self.task).await.expect("an end in time").unwrap().unwrap()
    }
}
