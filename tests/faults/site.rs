//! What all runs share: three nodes of Apache Kafka, and a way of its own from each worker to each of them.

use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::metadata::MetadataPartition;

use crate::proxy::{Link, Weather};
use crate::support::kafka::{Cluster, Options};

/// Nodes of the cluster.
pub const NODES: usize = 3;
/// Places for workers, each with a listener of its own on every node.
pub const SLOTS: usize = 4;
/// How long an administrative request may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a node that was down may take until it has copied what it missed.
const COPYING: Duration = Duration::from_secs(120);

/// The cluster and the ways to it.
pub struct Site {
    pub cluster: Cluster,
    pub links: Vec<Link>,
}

impl Site {
    /// Starts it; `None` where there is no Java or Maven.
    pub async fn open() -> Option<Self> {
        let mut links = Vec::new();
        let mut options = Options { nodes: NODES, ..Options::default() };
        for slot in 0..SLOTS {
            let link = Link::open(NODES).await;
            options.listeners.push(listener(slot));
            options.advertise.extend(link.ports().iter().zip(1..).map(|(port, node)| (listener(slot), node, *port)));
            links.push(link);
        }
        let cluster = Cluster::start(&options)?;
        for (slot, link) in links.iter().enumerate() {
            link.connect((1..=NODES).map(|node| cluster.port(&listener(slot), node)).collect());
        }
        Some(Self { cluster, links })
    }

    /// Bootstrap servers for the worker in a slot.
    pub fn servers(&self, slot: usize) -> &str {
        self.cluster.listener(&listener(slot))
    }

    /// Sets the weather on the ways of all workers.
    pub fn weather(&self, weather: Weather) {
        self.links.iter().for_each(|link| link.set(weather));
    }

    /// Starts the nodes that are down, and clears the weather.
    pub fn mend(&self) {
        self.weather(Weather::Clear);
        self.cluster.run(&["start"]);
    }

    fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.cluster.bootstrap());
        config
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.config().create().unwrap()
    }

    /// The node that coordinates a group, or the transactions of an id.
    pub fn coordinator(&self, of: Coordinated<'_>) -> usize {
        let (topic, key) = match of {
            Coordinated::Group(group) => ("__consumer_offsets", group),
            Coordinated::TransactionalId(id) => ("__transaction_state", id),
        };
        let client: BaseConsumer = self.config().create().unwrap();
        let metadata = client.fetch_metadata(Some(topic), PATIENCE).unwrap();
        let partitions = metadata.topics()[0].partitions();
        // As the brokers choose it: Java's hash of the name, its absolute value, modulo.
        let partition = java_hash(key).checked_abs().unwrap_or(0) as usize % partitions.len();
        let leader = partitions.iter().find(|found| found.id() as usize == partition).map(MetadataPartition::leader);
        leader.filter(|leader| *leader > 0).expect("a coordinator") as usize
    }

    /// Makes the brokers ask for so many copies of a topic before they acknowledge a record.
    pub async fn copies_before_acknowledging(&self, topic: &str, copies: usize) {
        let copies = copies.to_string();
        let change = AlterConfig::new(ResourceSpecifier::Topic(topic)).set("min.insync.replicas", &copies);
        for changed in self.admin().alter_configs([&change], &AdminOptions::new()).await.unwrap() {
            changed.unwrap();
        }
    }

    /// Waits until every partition of a topic has so many copies in sync.
    pub async fn until_copied(&self, topic: &str, copies: usize) {
        let client: BaseConsumer = self.config().create().unwrap();
        let deadline = Instant::now() + COPYING;
        loop {
            let metadata = client.fetch_metadata(Some(topic), PATIENCE).unwrap();
            if metadata.topics()[0].partitions().iter().all(|partition| partition.isr().len() >= copies) {
                return;
            }
            assert!(Instant::now() < deadline, "{topic} has not {copies} copies in time");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Removes topics, so that many runs fit on the nodes.
    pub async fn remove_topics(&self, topics: &[&str]) {
        let _ = self.admin().delete_topics(topics, &AdminOptions::new().request_timeout(Some(PATIENCE))).await;
    }
}

/// What a node coordinates.
pub enum Coordinated<'a> {
    Group(&'a str),
    TransactionalId(&'a str),
}

fn listener(slot: usize) -> String {
    format!("w{}", slot + 1)
}

/// `String.hashCode()` of Java, for ASCII.
fn java_hash(text: &str) -> i32 {
    text.bytes().fold(0, |hash: i32, byte| hash.wrapping_mul(31).wrapping_add(i32::from(byte)))
}
