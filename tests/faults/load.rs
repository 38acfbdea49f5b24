//! The load: requests at a steady rate, whatever becomes of them, of every kind there is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext};
use serde_json::json;

use crate::support::images::{Answer, ImageServer, png};
use crate::support::promises::inline;

/// How long the last records may take to be acknowledged; brokers may be down for a while.
const FLUSH: Duration = Duration::from_secs(120);
/// Pictures that differ.
const PICTURES: usize = 256;

/// What becomes of a request in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Inline data: a caption.
    Inline,
    /// A host that is away for the first request: a caption, by way of a retry topic.
    Flaky,
    /// A host that is always away: a dead letter, by way of every retry topic.
    Down,
    /// A reference that is none: a dead letter at once.
    Bad,
}

impl Kind {
    /// Of each hundred one is flaky and one is bad; of each two hundred one host is down.
    pub fn of(id: usize) -> Self {
        match id % 200 {
            7 | 107 => Self::Flaky,
            33 | 133 => Self::Bad,
            61 => Self::Down,
            _ => Self::Inline,
        }
    }

    /// Whether a caption is expected, not a dead letter.
    pub fn is_healthy(self) -> bool {
        matches!(self, Self::Inline | Self::Flaky)
    }
}

/// The hosts of a run's images.
pub async fn images(ids: usize) -> ImageServer {
    let mut images = ImageServer::start().await.with("/down", Answer::status(503));
    for id in (0..ids).filter(|id| Kind::of(*id) == Kind::Flaky) {
        let picture = Answer::Body(png(12, 9, id as u8));
        images = images.with_all(&format!("/flaky/{id}"), vec![Answer::status(503), picture]);
    }
    images
}

/// Writes requests, at least so many as were asked for, and until it is ended.
pub struct Load {
    acknowledged: Arc<AtomicUsize>,
    enough: Arc<AtomicBool>,
    thread: JoinHandle<usize>,
}

struct Count(Arc<AtomicUsize>);

impl rdkafka::ClientContext for Count {}

impl ProducerContext for Count {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if result.is_ok() {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Load {
    /// Begins to write requests at a steady rate, so many of them `over` this time, and goes on like that until it is
    /// [ended](Self::end), but writes `most` at most. Each is written once, however brokers fail.
    pub fn begin(servers: &str, topic: &str, images: &ImageServer, ids: usize, over: Duration, most: usize) -> Self {
        let (acknowledged, enough) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let told = enough.clone();
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", servers).set("enable.idempotence", "true").set("message.timeout.ms", "0");
        // Of several under way the first to a partition may pass for written though the brokers refused it.
        config.set("max.in.flight.requests.per.connection", "1");
        config.set("partitioner", "murmur2_random").set("linger.ms", "50");
        config.set("reconnect.backoff.ms", "50").set("reconnect.backoff.max.ms", "500");
        let producer: BaseProducer<Count> = config.create_with_context(Count(acknowledged.clone())).unwrap();
        let pictures: Vec<String> = (0..PICTURES).map(inline).collect();
        let (down, flaky) = (images.url("/down"), images.url("/flaky"));
        let reference = move |id: usize| match Kind::of(id) {
            Kind::Inline => pictures[id % PICTURES].clone(),
            Kind::Flaky => format!("{flaky}/{id}"),
            Kind::Down => down.to_string(),
            Kind::Bad => "ftp://a/b".to_owned(),
        };
        let topic = topic.to_owned();
        let thread = std::thread::spawn(move || {
            let begun = Instant::now();
            let mut written = 0;
            for id in (0..most).take_while(|id| *id < ids || !told.load(Ordering::Relaxed)) {
                written = id + 1;
                let due = begun + over.mul_f64(id as f64 / ids as f64);
                while Instant::now() < due {
                    producer.poll(due - Instant::now());
                }
                let (key, value) = (id.to_string(), json!({"id": id.to_string(), "image": reference(id)}).to_string());
                loop {
                    match producer.send(BaseRecord::to(&topic).key(&key).payload(&value)) {
                        Ok(()) => break,
                        Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => {
                            producer.poll(Duration::from_millis(10));
                        }
                        Err((error, _)) => panic!("request {id} is not written: {error}"),
                    }
                }
            }
            producer.flush(FLUSH).expect("all requests are written in time");
            written
        });
        Self { acknowledged, enough, thread }
    }

    /// Whether all is written.
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends it when as many are written as were asked for at first; returns how many requests were written, and how many of them the brokers have acknowledged.
    pub fn end(self) -> (usize, usize) {
        self.enough.store(true, Ordering::Relaxed);
        let written = self.thread.join().expect("the load ends in order");
        (written, self.acknowledged.load(Ordering::Relaxed))
    }
}
