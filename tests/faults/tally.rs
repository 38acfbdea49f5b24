//! What a reader of committed records sees: captions and dead letters, by origin and by id.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blipstream::kafka::{Follower, From, TopicCheck, group_offsets};
use blipstream::message::Message;
use blipstream::settings;
use serde_json::Value;

use crate::load::Kind;
use crate::support::client::{PATIENCE, read_all};

/// How long one look for a record takes.
const LOOK: Duration = Duration::from_millis(50);
/// Ids that a complaint names.
const NAMED: usize = 5;

/// Results of a run.
#[derive(Debug, Default)]
pub struct Tally {
    /// Results of each origin.
    origins: BTreeMap<String, usize>,
    captioned: BTreeSet<usize>,
    /// Dead letters, and why each of them was given up.
    buried: BTreeMap<usize, String>,
    records: usize,
    /// Records of the input. Brokers that lost their memory may have taken a request twice from its writer; each of the
    /// two is an origin then.
    pub requests: usize,
}

impl Tally {
    /// Everything that is in the topics of captions and dead letters now.
    pub fn read(kafka: &settings::Kafka) -> Self {
        let requests = read_all(kafka, &kafka.inputs[0].topic).len();
        let mut tally = Self { requests, ..Self::default() };
        for topic in [&kafka.captions_topic, &kafka.dead_letter_topic] {
            for message in read_all(kafka, topic) {
                tally.take(&message, topic == &kafka.captions_topic);
            }
        }
        tally
    }

    fn take(&mut self, message: &Message, caption: bool) {
        let origin = message.header("blipstream-origin").expect("every result names its origin");
        *self.origins.entry(origin.to_owned()).or_default() += 1;
        let record: Value = serde_json::from_slice(message.payload.as_deref().unwrap()).unwrap();
        let id = record["id"].as_str().unwrap().parse().unwrap();
        if caption {
            self.captioned.insert(id);
        } else {
            self.buried.insert(id, cause(message));
        }
        self.records += 1;
    }

    /// Ids that have a result.
    pub fn answered(&self) -> usize {
        self.captioned.len() + self.buried.keys().filter(|id| !self.captioned.contains(id)).count()
    }

    /// Ids of `ids` without a result.
    pub fn lost(&self, ids: usize) -> usize {
        self.without_result(ids).count()
    }

    /// Results beyond the first of their origin.
    pub fn duplicates(&self) -> usize {
        self.records - self.origins.len()
    }

    fn without_result(&self, ids: usize) -> impl Iterator<Item = usize> {
        (0..ids).filter(|id| !self.captioned.contains(id) && !self.buried.contains_key(id))
    }

    /// Where those of `ids` requests are that have no result: in which topics, at which offsets, and how far the group has
    /// read there.
    pub fn whereabouts(&self, kafka: &settings::Kafka, ids: usize) -> Vec<String> {
        let lost: Vec<_> = self.without_result(ids).take(NAMED).collect();
        if lost.is_empty() {
            return Vec::new();
        }
        let inputs = kafka.inputs.iter().map(|input| &input.topic);
        let mut places = Vec::new();
        for topic in inputs.chain(kafka.retry_topics.iter().map(|retry| &retry.topic)) {
            let committed = group_offsets(kafka, topic, PATIENCE).unwrap_or_default();
            for message in read_all(kafka, topic) {
                let id = message.key.as_deref().and_then(|key| std::str::from_utf8(key).ok()?.parse().ok());
                if let Some(id) = id.filter(|id| lost.contains(id)) {
                    let group = committed.get(message.partition as usize).copied().flatten();
                    let group = group.map_or("nothing".into(), |offset| offset.to_string());
                    let (partition, offset) = (message.partition, message.offset);
                    places.push(format!("{id} is at {topic}/{partition}@{offset}; the group has committed {group}"));
                }
            }
        }
        places
    }

    /// What is wrong with the results of `ids` requests, whatever was promised of duplicates.
    pub fn complaints(&self, ids: usize) -> Vec<String> {
        let mut complaints = Vec::new();
        let mut complain = |what: &str, found: Vec<usize>| {
            if !found.is_empty() {
                complaints.push(format!("{} {what}, such as {:?}", found.len(), &found[..found.len().min(NAMED)]));
            }
        };
        complain("ids are lost", self.without_result(ids).collect());
        complain(
            "results are of nobody",
            self.captioned.iter().chain(self.buried.keys()).copied().filter(|id| *id >= ids).collect(),
        );
        let healthy = |id: &usize| Kind::of(*id).is_healthy();
        let wronged: Vec<_> = self.buried.keys().copied().filter(healthy).collect();
        complain("healthy ids are dead letters", wronged.clone());
        complain("broken ids have captions", self.captioned.iter().copied().filter(|id| !healthy(id)).collect());
        complaints.extend(wronged.iter().take(NAMED).map(|id| format!("{id}: {}", self.buried[id])));
        if complaints.is_empty() && self.origins.len() != self.requests {
            complaints.push(format!("{} origins for {} requests", self.origins.len(), self.requests));
        }
        complaints
    }
}

/// Why a message was given up, as its dead letter says.
fn cause(letter: &Message) -> String {
    let says = |name| letter.header(name).unwrap_or("nothing");
    let [code, attempts] = ["blipstream-error-code", "blipstream-attempts"].map(says);
    format!("{code} after {attempts} tries: {}", says("blipstream-error-message"))
}

/// Reads results as they become visible.
pub struct Reader {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    tally: Tally,
    /// When results came, to tell where none did, and whether they are captions.
    arrivals: Vec<(Instant, bool)>,
}

impl Reader {
    /// Begins at the beginning of the topics.
    pub fn begin(kafka: &settings::Kafka) -> Self {
        let topics = [&kafka.captions_topic, &kafka.dead_letter_topic];
        let checks = topics.map(|topic| TopicCheck { topic: topic.clone(), setting: "the topic" });
        let follower = Follower::open(kafka, &checks, From::Beginning, Duration::from_secs(30)).unwrap();
        let (seen, stop) = (Arc::new(Mutex::new(Seen::default())), Arc::new(AtomicBool::new(false)));
        let (captions, shared, stopped) = (kafka.captions_topic.clone(), seen.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if let Some(message) = follower.next(LOOK).expect("results can be read") {
                    let mut seen = shared.lock().unwrap();
                    let caption = *message.topic == *captions;
                    seen.tally.take(&message, caption);
                    seen.arrivals.push((Instant::now(), caption));
                }
            }
        });
        Self { seen, stop, thread: Some(thread) }
    }

    /// Ids that have a result so far.
    pub fn answered(&self) -> usize {
        self.seen.lock().unwrap().tally.answered()
    }

    /// The longest time without a result, or without a caption, that began after `from` and before `to`.
    pub fn longest_gap(&self, from: Instant, to: Instant, of_captions: bool) -> Duration {
        let seen = self.seen.lock().unwrap();
        let counted = seen.arrivals.iter().filter(|(at, caption)| *at >= from && (*caption || !of_captions));
        let within = counted.map(|(at, _)| *at);
        let mut longest = Duration::ZERO;
        let mut last = from;
        for at in within.chain([Instant::now()]) {
            longest = longest.max(at - last);
            last = at;
            if at > to {
                break;
            }
        }
        longest
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
