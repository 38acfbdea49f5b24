//! What types cannot say: ranges, pairs, and values that contradict each other. Pure; files are looked at in
//! [`super::paths`].

mod models;

use std::collections::BTreeSet;
use std::fmt::Display;
use std::time::Duration;

use bytesize::ByteSize;
use tracing_subscriber::EnvFilter;

use super::error::{ConfigError, Origin};
use super::{Given, GivenMap, HIDDEN};
use crate::message::ObjectRoot;
use crate::settings::{
    Admin, Endpoint, Fetch, Flow, Input, Kafka, LONGEST_BREAK, Log, RetryTopic, STORE_OPTIONS, SecurityProtocol,
    Settings, is_web_address,
};

const MECHANISMS: [&str; 3] = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"];
/// Far beyond what anybody waits for at one worker.
const MOST_IN_FLIGHT: usize = 1_000_000;
/// Longest memory for failed fetches.
const LONGEST_WINDOW: Duration = Duration::from_secs(3600);

/// librdkafka's own ranges (CONFIGURATION.md, 2.12): over them the client would refuse to start, less clearly.
const MESSAGE_SIZES: (ByteSize, ByteSize) = (ByteSize::b(1_000), ByteSize::b(1_000_000_000));
const PREFETCH_SIZES: (ByteSize, ByteSize) = (ByteSize::kib(1), ByteSize::kib(2_097_151));
const LONGEST_SESSION: Duration = Duration::from_secs(3_600);
const LONGEST_POLL_INTERVAL: Duration = Duration::from_secs(86_400);
/// Below it a single slow answer of a broker aborts every transaction.
const SHORTEST_TRANSACTION: Duration = Duration::from_secs(1);
/// Far beyond what anybody needs: the fidelity of 3 cannot be told from that of whole pictures.
const LARGEST_GAP: f64 = 64.0;
const LONGEST_LINGER: Duration = Duration::from_secs(900);

/// A contradiction, before it is known where its values come from.
pub(super) struct Problem {
    /// The keys at odds; the first is the one to change.
    pub(super) keys: Vec<String>,
    pub(super) message: String,
}

impl Problem {
    pub(super) fn new(keys: &[&str], message: impl Into<String>) -> Self {
        Self { keys: keys.iter().map(|&key| key.to_owned()).collect(), message: message.into() }
    }

    /// Blames the first of the keys that somebody gave: a default alone is never wrong.
    pub(super) fn into_error(self, given: &GivenMap) -> ConfigError {
        let culprit = self.keys.iter().find(|key| given.contains_key(*key)).or(self.keys.first());
        let key = culprit.cloned().unwrap_or_default();
        let origin = given.get(&key).map_or(Origin::Default, |Given { origin, .. }| origin.clone());
        ConfigError { key, origin, message: self.message }
    }
}

/// Everything that is at odds, in the order of the sections.
pub(super) fn settings(settings: &Settings) -> Vec<Problem> {
    let mut check = Check(Vec::new());
    check.kafka(&settings.kafka);
    check.topics(&settings.kafka);
    check.sasl(&settings.kafka);
    check.tls(&settings.kafka);
    check.flow(&settings.flow);
    check.fetch(&settings.fetch);
    check.at_least_one("decode.max_pixels", settings.decode.max_pixels);
    check.at_least_one("decode.max_side", u64::from(settings.decode.max_side));
    check.at_least_one("decode.max_memory", settings.decode.max_memory.as_u64());
    let gap = settings.decode.jpeg_reducing_gap;
    check.need(
        gap == 0.0 || (1.0..=LARGEST_GAP).contains(&gap),
        &["decode.jpeg_reducing_gap"],
        format!("must be 0 (JPEGs are decoded whole) or from 1 to {LARGEST_GAP}, not {gap}"),
    );
    check.model(&settings.model);
    check.filter(&settings.filter);
    check.answerer(&settings.answerer, &settings.model);
    check.canary(&settings.canary, &settings.kafka);
    check.at_least_one("batch.queue", settings.batch.queue as u64);
    if let Some(worker) = &settings.output.worker {
        check.header("output.worker", worker);
    }
    check.endpoint(&settings.endpoint);
    check.admin(&settings.admin);
    check.log(&settings.log);
    check.0
}

/// What is allowed but probably not meant.
pub(super) fn warnings(settings: &Settings) -> Vec<String> {
    let mut found = Vec::new();
    let mut warn = |yes: bool, text: String| found.extend(yes.then_some(text));
    let (kafka, flow, fetch) = (&settings.kafka, &settings.flow, &settings.fetch);
    warn(
        kafka.max_message_size > flow.max_message_bytes,
        format!(
            "kafka.max_message_size ({}) is over flow.max_message_bytes ({}): such a message is admitted only while \
             no other is under way",
            kafka.max_message_size, flow.max_message_bytes
        ),
    );
    warn(
        kafka.filtered_topic.is_some() && settings.filter.source.is_none(),
        "kafka.filtered_topic has no effect in a worker without filter.source, the model that rejects something".into(),
    );
    warn(
        kafka.canary_topic.is_some() && settings.canary.source.is_none(),
        "kafka.canary_topic has no effect in a worker without canary.source, the model whose captions it takes".into(),
    );
    warn(
        settings.canary.source.as_ref() == Some(&settings.model.source),
        "canary.source is the model of model.source: the canary is compared with itself".into(),
    );
    warn(
        fetch.max_body > flow.max_image_bytes,
        format!(
            "fetch.max_body ({}) is over flow.max_image_bytes ({}): an image whose length is not announced is fetched \
             only while no other is under way",
            fetch.max_body, flow.max_image_bytes
        ),
    );
    let endpoint = &settings.endpoint;
    let part = ByteSize((flow.max_message_bytes.as_u64() as f64 * endpoint.share) as u64);
    warn(
        endpoint.listen.is_some() && endpoint.max_body.as_u64() > part.as_u64() / 2,
        format!(
            "endpoint.max_body ({}) is over half of what the endpoint has of flow.max_message_bytes beside a stream ({part}, \
             by endpoint.share): while one such body comes, there is no room for the next",
            endpoint.max_body
        ),
    );
    warn(
        fetch.connect_timeout > fetch.total_timeout,
        "fetch.connect_timeout is over fetch.total_timeout and has no effect".into(),
    );
    warn(
        settings.batch.max_size > 0 && !settings.batch.latency_goal.is_zero(),
        "batch.latency_goal has no effect, since batch.max_size says the size".into(),
    );
    found
}

struct Check(Vec<Problem>);

impl Check {
    fn need(&mut self, holds: bool, keys: &[&str], message: impl Into<String>) {
        if !holds {
            self.0.push(Problem::new(keys, message));
        }
    }

    fn at_least_one(&mut self, key: &str, value: u64) {
        self.need(value >= 1, &[key], "must be at least 1");
    }

    fn one_of(&mut self, key: &str, value: &str, known: &[&str]) {
        let message = format!("must be one of {}, not {value:?}", known.join(", "));
        self.need(known.contains(&value), &[key], message);
    }

    fn not_empty(&mut self, key: &str, text: &str) {
        self.need(!text.trim().is_empty(), &[key], "must not be empty");
    }

    fn longer_than_zero(&mut self, key: &str, duration: Duration) {
        self.need(!duration.is_zero(), &[key], "must be longer than 0");
    }

    fn within<T: PartialOrd + Display>(&mut self, key: &str, value: T, low: T, high: T) {
        let message = format!("must be from {low} to {high}, not {value}");
        self.need(value >= low && value <= high, &[key], message);
    }

    fn no_longer_than(&mut self, key: &str, value: Duration, limit: Duration) {
        let message = format!("must be at most {}", humantime::format_duration(limit));
        self.need(value <= limit, &[key], message);
    }

    /// A value that is sent as a header of HTTP or Kafka.
    fn header(&mut self, key: &str, text: &str) {
        let plain = !text.is_empty() && text.len() <= 256 && text.bytes().all(|byte| (0x20..0x7f).contains(&byte));
        self.need(plain, &[key], "must be 1 to 256 printable ASCII characters, since it is sent as a header");
    }

    fn kafka(&mut self, kafka: &Kafka) {
        let servers = || kafka.bootstrap_servers.split(',').map(str::trim);
        let wrong = servers().find(|server| !is_server(server));
        let message = format!("must be a list like host1:9092,host2:9092; {:?} is not", wrong.unwrap_or_default());
        self.need(wrong.is_none(), &["kafka.bootstrap_servers"], message);
        self.not_empty("kafka.group_id", &kafka.group_id);
        self.within("kafka.prefetch", kafka.prefetch, PREFETCH_SIZES.0, PREFETCH_SIZES.1);
        self.within("kafka.max_message_size", kafka.max_message_size, MESSAGE_SIZES.0, MESSAGE_SIZES.1);
        for (key, duration) in [
            ("kafka.session_timeout", kafka.session_timeout),
            ("kafka.max_poll_interval", kafka.max_poll_interval),
            ("kafka.commit_interval", kafka.commit_interval),
            ("kafka.stuck_after", kafka.stuck_after),
            ("kafka.transaction_interval", kafka.transaction_interval),
        ] {
            self.longer_than_zero(key, duration);
        }
        self.no_longer_than("kafka.session_timeout", kafka.session_timeout, LONGEST_SESSION);
        self.no_longer_than("kafka.max_poll_interval", kafka.max_poll_interval, LONGEST_POLL_INTERVAL);
        self.no_longer_than("kafka.linger", kafka.linger, LONGEST_LINGER);
        self.at_least_one("kafka.transaction_records", kafka.transaction_records as u64);
        let (key, timeout) = ("kafka.transaction_timeout", kafka.transaction_timeout);
        self.need(timeout >= SHORTEST_TRANSACTION, &[key], "must be at least 1s");
        self.need(
            kafka.transaction_interval < timeout,
            &["kafka.transaction_interval", key],
            "kafka.transaction_interval must be shorter than kafka.transaction_timeout",
        );
        for (key, name) in
            [("kafka.transactional_id", &kafka.transactional_id), ("kafka.group_instance_id", &kafka.group_instance_id)]
        {
            if let Some(name) = name {
                self.not_empty(key, name);
            }
        }
        self.need(
            kafka.session_timeout <= kafka.max_poll_interval,
            &["kafka.session_timeout", "kafka.max_poll_interval"],
            "kafka.session_timeout must not be longer than kafka.max_poll_interval",
        );
        self.need(
            kafka.revoke_drain < kafka.max_poll_interval,
            &["kafka.revoke_drain", "kafka.max_poll_interval"],
            "kafka.revoke_drain must be shorter than kafka.max_poll_interval, or the group expels a draining worker",
        );
    }

    fn topics(&mut self, kafka: &Kafka) {
        self.need(!kafka.inputs.is_empty(), &["kafka.inputs"], "must name at least one topic");
        let mut seen = BTreeSet::new();
        for Input { topic, weight } in &kafka.inputs {
            self.topic("kafka.inputs", topic);
            self.need(*weight >= 1, &["kafka.inputs"], format!("the weight of {topic} must be at least 1"));
            self.need(seen.insert(topic), &["kafka.inputs"], format!("{topic} is named twice"));
        }
        let mut outputs = vec![
            ("kafka.captions_topic", &kafka.captions_topic),
            ("kafka.dead_letter_topic", &kafka.dead_letter_topic),
        ];
        outputs.extend(kafka.filtered_topic.iter().map(|topic| ("kafka.filtered_topic", topic)));
        outputs.extend(kafka.canary_topic.iter().map(|topic| ("kafka.canary_topic", topic)));
        for &(key, topic) in &outputs {
            self.topic(key, topic);
            let message = format!("{topic} is also an input: blipstream would read what it writes, for ever");
            self.need(!seen.contains(topic), &[key, "kafka.inputs"], message);
        }
        for RetryTopic { topic, delay } in &kafka.retry_topics {
            self.topic("kafka.retry_topics", topic);
            self.longer_than_zero("kafka.retry_topics", *delay);
            let message = format!("{topic} is named twice, or is also an input");
            self.need(seen.insert(topic), &["kafka.retry_topics", "kafka.inputs"], message);
        }
        for &(key, topic) in &outputs {
            let retried = kafka.retry_topic(topic).is_some();
            let message = format!("{topic} is also a retry topic: blipstream would read what it writes, for ever");
            self.need(!retried, &[key, "kafka.retry_topics"], message);
        }
        self.need(
            kafka.captions_topic != kafka.dead_letter_topic,
            &["kafka.dead_letter_topic", "kafka.captions_topic"],
            "captions and dead letters need a topic each",
        );
        let apart = |other: &String| kafka.filtered_topic.as_ref() != Some(other);
        self.need(
            apart(&kafka.captions_topic) && apart(&kafka.dead_letter_topic),
            &["kafka.filtered_topic", "kafka.captions_topic", "kafka.dead_letter_topic"],
            "what the filter rejects needs a topic of its own; without kafka.filtered_topic it goes with the captions",
        );
        let others = [Some(&kafka.captions_topic), kafka.filtered_topic.as_ref(), Some(&kafka.dead_letter_topic)];
        self.need(
            kafka.canary_topic.is_none() || !others.contains(&kafka.canary_topic.as_ref()),
            &["kafka.canary_topic", "kafka.captions_topic", "kafka.filtered_topic", "kafka.dead_letter_topic"],
            "what the canary writes needs a topic of its own",
        );
    }

    fn topic(&mut self, key: &str, topic: &str) {
        // The rule of `org.apache.kafka.common.internals.Topic`.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let valid = (1..=249).contains(&topic.len()) && topic.bytes().all(plain) && topic != "." && topic != "..";
        let message = format!("{topic:?} is no topic name: 1 to 249 letters, digits, dots, underscores and hyphens");
        self.need(valid, &[key], message);
    }

    fn sasl(&mut self, kafka: &Kafka) {
        let wanted = matches!(kafka.security_protocol, SecurityProtocol::SaslPlaintext | SecurityProtocol::SaslSsl);
        let protocol = kafka.security_protocol.as_str();
        let given = [
            ("kafka.sasl_mechanism", &kafka.sasl_mechanism),
            ("kafka.sasl_username", &kafka.sasl_username),
            ("kafka.sasl_password", &kafka.sasl_password),
        ];
        for (key, value) in given {
            let missing = value.as_deref().unwrap_or_default().is_empty();
            let message = format!("kafka.security_protocol = \"{protocol}\" needs {key}");
            let file = super::keys::file_key(key);
            self.need(!(wanted && missing), &[key, &file, "kafka.security_protocol"], message);
            let message = format!("has no effect while kafka.security_protocol is \"{protocol}\"; use \"sasl_ssl\"");
            self.need(wanted || value.is_none(), &[key, &file, "kafka.security_protocol"], message);
        }
        if let Some(mechanism) = &kafka.sasl_mechanism {
            let message = format!("must be one of {}, not {mechanism:?}", MECHANISMS.join(", "));
            self.need(MECHANISMS.contains(&mechanism.as_str()), &["kafka.sasl_mechanism"], message);
        }
    }

    fn tls(&mut self, kafka: &Kafka) {
        let protocol = kafka.security_protocol;
        let wanted = matches!(protocol, SecurityProtocol::Ssl | SecurityProtocol::SaslSsl);
        let (certificate, key) = ("kafka.ssl_certificate_file", "kafka.ssl_key_file");
        let given = [
            ("kafka.ssl_ca_file", &kafka.ssl_ca_file),
            (certificate, &kafka.ssl_certificate_file),
            (key, &kafka.ssl_key_file),
        ];
        for (key, value) in given {
            let message = format!("has no effect while kafka.security_protocol is \"{}\"", protocol.as_str());
            self.need(wanted || value.is_none(), &[key, "kafka.security_protocol"], message);
        }
        let paired = kafka.ssl_certificate_file.is_some() == kafka.ssl_key_file.is_some();
        let message = "a client certificate needs both kafka.ssl_certificate_file and kafka.ssl_key_file";
        self.need(paired, &[certificate, key], message);
    }

    fn flow(&mut self, flow: &Flow) {
        for (key, value) in [
            ("flow.max_messages", flow.max_messages as u64),
            ("flow.max_message_bytes", flow.max_message_bytes.as_u64()),
            ("flow.max_images", flow.max_images as u64),
            ("flow.max_image_bytes", flow.max_image_bytes.as_u64()),
            ("flow.max_span", flow.max_span),
            ("flow.max_rows", flow.max_rows as u64),
        ] {
            self.at_least_one(key, value);
        }
        self.within("flow.pause_at", flow.pause_at, 0.0, 1.0);
        self.within("flow.resume_at", flow.resume_at, 0.0, 1.0);
        self.need(
            flow.resume_at < flow.pause_at,
            &["flow.resume_at", "flow.pause_at"],
            format!(
                "flow.resume_at ({}) must be below flow.pause_at ({}), or partitions would flap",
                flow.resume_at, flow.pause_at
            ),
        );
        self.longer_than_zero("flow.drain_timeout", flow.drain_timeout);
    }

    fn fetch(&mut self, fetch: &Fetch) {
        self.at_least_one("fetch.concurrency", fetch.concurrency as u64);
        self.at_least_one("fetch.per_host", fetch.per_host as u64);
        let rate = fetch.per_host_rate;
        self.need(rate.is_finite() && rate >= 0.0, &["fetch.per_host_rate"], "must be requests a second, or 0");
        self.longer_than_zero("fetch.breaker_wait", fetch.breaker_wait);
        let message = "fetch.breaker_wait must not be longer than ten minutes, which is the most";
        self.need(fetch.breaker_wait <= LONGEST_BREAK, &["fetch.breaker_wait"], message);
        self.at_least_one("fetch.attempts", u64::from(fetch.attempts));
        self.at_least_one("fetch.max_body", fetch.max_body.as_u64());
        self.longer_than_zero("fetch.connect_timeout", fetch.connect_timeout);
        self.longer_than_zero("fetch.read_timeout", fetch.read_timeout);
        self.longer_than_zero("fetch.total_timeout", fetch.total_timeout);
        let message = "fetch.backoff must not be longer than fetch.max_backoff";
        self.need(fetch.backoff <= fetch.max_backoff, &["fetch.backoff", "fetch.max_backoff"], message);
        self.header("fetch.user_agent", &fetch.user_agent);
        if let Some(contact) = &fetch.contact {
            self.header("fetch.contact", contact);
        }
        self.need(!fetch.allow_ports.contains(&0), &["fetch.allow_ports"], "0 is no port; no ports at all mean any");
        let message = "must be an http address without user name and password, e.g. http://proxy.internal:3128";
        self.need(fetch.proxy.as_ref().is_none_or(is_web_address), &["fetch.proxy"], message);
        for store in &fetch.stores {
            let wrong = ObjectRoot::parse(store).err();
            let message = format!("{store:?} is {}", wrong.as_deref().unwrap_or_default());
            self.need(wrong.is_none(), &["fetch.stores"], message);
        }
        for name in fetch.store_options.keys() {
            let message = format!(
                "may not be set here. Secrets belong into the worker's environment (AWS_SECRET_ACCESS_KEY and the like); the \
                 options are {}",
                STORE_OPTIONS.join(", ")
            );
            self.need(STORE_OPTIONS.contains(&&**name), &[&format!("fetch.store_options.{name}")], message);
        }
        let message = "fetch.outage_window must not be longer than an hour";
        self.need(fetch.outage_window <= LONGEST_WINDOW, &["fetch.outage_window"], message);
    }

    fn admin(&mut self, admin: &Admin) {
        let open = !admin.listen.ip().is_loopback();
        self.need(
            !open || admin.token.is_some(),
            &["admin.listen", "admin.token_file"],
            format!(
                "{} can be reached from other machines, so the routes that change something need admin.token_file \
                 (or admin.token)",
                admin.listen
            ),
        );
        self.token("admin.token", admin.token.as_deref());
    }

    fn endpoint(&mut self, endpoint: &Endpoint) {
        let open = endpoint.listen.filter(|address| !address.ip().is_loopback());
        self.need(
            open.is_none() || endpoint.token.is_some() || endpoint.anonymous,
            &["endpoint.listen", "endpoint.token_file"],
            format!(
                "{} can be reached from other machines: set endpoint.token_file, or endpoint.anonymous = true if \
                 everybody who reaches it may use it",
                open.map(|address| address.to_string()).unwrap_or_default()
            ),
        );
        self.token("endpoint.token", endpoint.token.as_deref());
        let share = endpoint.share;
        let message = format!("must be more than 0 and less than 1, not {share}");
        self.need(share > 0.0 && share < 1.0, &["endpoint.share"], message);
        self.at_least_one("endpoint.max_rows", endpoint.max_rows as u64);
        let (rows, all) = (endpoint.max_rows, endpoint.max_in_flight);
        self.need(
            rows <= all,
            &["endpoint.max_in_flight", "endpoint.max_rows"],
            format!("endpoint.max_in_flight ({all}) must be at least endpoint.max_rows ({rows})"),
        );
        self.within("endpoint.max_in_flight", all, 1, MOST_IN_FLIGHT);
        self.within("endpoint.max_body", endpoint.max_body, ByteSize::kib(1), ByteSize::gib(1));
        self.longer_than_zero("endpoint.timeout", endpoint.timeout);
        self.no_longer_than("endpoint.timeout", endpoint.timeout, LONGEST_WINDOW);
    }

    /// Anything else cannot stand in an Authorization header.
    fn token(&mut self, key: &str, token: Option<&str>) {
        let sendable = |token: &str| !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
        self.need(token.is_none_or(sendable), &[key], format!("must be printable ASCII without spaces ({HIDDEN})"));
    }

    fn log(&mut self, log: &Log) {
        let wrong = EnvFilter::builder().parse(&log.filter).err().map(|error| error.to_string());
        let message = format!("is no filter like info or blipstream=debug: {}", wrong.as_deref().unwrap_or_default());
        self.need(wrong.is_none(), &["log.filter"], message);
    }
}

/// `host`, `host:port` or `[v6]:port`.
fn is_server(server: &str) -> bool {
    let (host, port) = match server.rsplit_once(':') {
        Some((host, port)) if !server.ends_with(']') => (host, Some(port)),
        _ => (server, None),
    };
    let named = !host.is_empty() && !host.contains(|c: char| c.is_whitespace() || c == '/');
    named && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}
