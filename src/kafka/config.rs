//! From our settings to librdkafka's.

use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;

use super::Error;
use crate::settings::{Kafka, owned_option};

/// Lag, broker states and ends of partitions are as old as this at most.
const STATISTICS_INTERVAL_MS: u32 = 1_000;

/// Messages prefetched at most, small ones; pausing throws prefetched messages away, so few are better than many.
const PREFETCH_MESSAGES: u32 = 5_000;

/// Bytes of one partition in one response, librdkafka's own default. A larger message still comes, alone (KIP-74).
const PARTITION_FETCH_BYTES: u64 = 1 << 20;

/// Room that framing, key and headers of a record take beside its value.
const FRAMING_BYTES: u64 = 64 << 10;

/// Responses up to this length are accepted whatever the limits say (librdkafka's own default), so that a message
/// over `kafka.max_message_size` arrives and is judged, instead of blocking its partition for ever.
const RESPONSE_BYTES: u64 = 100_000_000;

/// Records handed to librdkafka and not acknowledged; what is over this waits in the flow, where it is counted.
const PRODUCER_QUEUE_MESSAGES: u32 = 10_000;

/// The least memory for such records.
const PRODUCER_QUEUE_BYTES: u64 = 32 << 20;

/// New topics and moved partitions are noticed within this time.
const METADATA_REFRESH_MS: u32 = 30_000;

/// How long a connection of the producer of transactions may rest, and the setting of it.
const MAX_IDLE_MS: u32 = 10_000;
const MAX_IDLE: &str = "connections.max.idle.ms";

/// Librdkafka refuses smaller and larger numbers; the bounds are of its own documentation.
const MAX_BYTES: u64 = 1_000_000_000;

/// The configuration refuses owned options with their origin; settings that were made otherwise are refused here.
fn check_options(settings: &Kafka) -> Result<(), Error> {
    let owned = settings.options.keys().find_map(|key| Some((key, owned_option(key)?)));
    owned.map_or(Ok(()), |(key, reason)| Err(Error::Setting { key: key.clone(), reason }))
}

/// What every client needs: where the brokers are and who we are.
pub(crate) fn client(settings: &Kafka) -> Result<ClientConfig, Error> {
    check_options(settings)?;
    let mut config = ClientConfig::new();
    // The option `debug` asks librdkafka for more, which is then let through.
    let level = if settings.options.contains_key("debug") { RDKafkaLogLevel::Debug } else { RDKafkaLogLevel::Info };
    config
        .set("topic.metadata.refresh.interval.ms", METADATA_REFRESH_MS.to_string())
        .set("client.id", "blipstream")
        .set_log_level(level);
    for (key, value) in &settings.options {
        config.set(key, value);
    }
    config
        .set("bootstrap.servers", &settings.bootstrap_servers)
        .set("security.protocol", settings.security_protocol.as_str())
        .set("message.max.bytes", max_message_bytes(settings).to_string());
    set_login(settings, &mut config);
    Ok(config)
}

fn set_login(settings: &Kafka, config: &mut ClientConfig) {
    let mut set = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            config.set(key, value);
        }
    };
    let path = |path: &Option<std::path::PathBuf>| path.as_ref().map(|path| path.display().to_string());
    set("sasl.mechanisms", settings.sasl_mechanism.clone());
    set("sasl.username", settings.sasl_username.clone());
    // `sasl_password_file` was read by the configuration, as all secrets are.
    set("sasl.password", settings.sasl_password.clone());
    set("ssl.ca.location", path(&settings.ssl_ca_file));
    set("ssl.certificate.location", path(&settings.ssl_certificate_file));
    set("ssl.key.location", path(&settings.ssl_key_file));
}

/// Settings of a member of the group, one of `members` of the same worker, with a name among these.
pub(crate) fn consumer(settings: &Kafka, member: &str, members: usize) -> Result<ClientConfig, Error> {
    let mut config = client(settings)?;
    let prefetch = member_prefetch(settings, members);
    let fetch = fetch_bytes(settings, members);
    config
        .set("group.id", &settings.group_id)
        .set("group.protocol", "classic")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("session.timeout.ms", settings.session_timeout.as_millis().to_string())
        .set("max.poll.interval.ms", settings.max_poll_interval.as_millis().to_string())
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "error")
        // Records of aborted transactions are not read, and offsets of open ones are waited for.
        .set("isolation.level", "read_committed")
        .set("enable.partition.eof", "true")
        .set("statistics.interval.ms", STATISTICS_INTERVAL_MS.to_string())
        .set("queued.min.messages", PREFETCH_MESSAGES.to_string())
        .set("queued.max.messages.kbytes", (prefetch / 1024).clamp(1, 2_097_151).to_string())
        .set("fetch.message.max.bytes", PARTITION_FETCH_BYTES.min(prefetch).to_string())
        .set("fetch.max.bytes", fetch.to_string())
        .set("receive.message.max.bytes", (RESPONSE_BYTES.max(fetch) + FRAMING_BYTES).to_string());
    if let Some(name) = &settings.group_instance_id {
        config.set("group.instance.id", format!("{name}-{member}"));
    }
    if !settings.options.contains_key("heartbeat.interval.ms") {
        config.set("heartbeat.interval.ms", heartbeat_ms(settings).to_string());
    }
    Ok(config)
}

fn member_prefetch(settings: &Kafka, members: usize) -> u64 {
    (settings.prefetch.as_u64() / members.max(1) as u64).max(1)
}

/// The longest answer to one fetch: librdkafka wants room for the longest message, whatever is to be read ahead.
fn fetch_bytes(settings: &Kafka, members: usize) -> u64 {
    member_prefetch(settings, members).max(max_message_bytes(settings)).min(MAX_BYTES)
}

/// Bytes of messages that are read ahead, at most: librdkafka fetches once more while a little less than its share of
/// `kafka.prefetch` is there, for each member.
pub fn read_ahead_bytes(settings: &Kafka) -> u64 {
    let members = settings.subscriptions().len();
    settings.prefetch.as_u64().saturating_add(fetch_bytes(settings, members).saturating_mul(members as u64))
}

/// A third of the session's time-out, and librdkafka's default of 3 s at most: two may get lost.
fn heartbeat_ms(settings: &Kafka) -> u128 {
    (settings.session_timeout.as_millis() / 3).clamp(1, 3_000)
}

/// Settings of the producer of captions and dead letters.
pub(crate) fn producer(settings: &Kafka) -> Result<ClientConfig, Error> {
    let mut config = client(settings)?;
    config
        .set("enable.idempotence", "true")
        .set("acks", "all")
        // 0 means: never. An output that cannot be delivered stalls the flow; it is not dropped.
        .set("message.timeout.ms", "0")
        .set("partitioner", "murmur2_random")
        .set("linger.ms", (settings.linger.as_secs_f64() * 1e3).to_string())
        .set("compression.codec", settings.compression.as_str())
        .set("queue.buffering.max.messages", PRODUCER_QUEUE_MESSAGES.to_string())
        .set("queue.buffering.max.kbytes", (producer_queue_bytes(settings) / 1024).to_string())
        .set("statistics.interval.ms", STATISTICS_INTERVAL_MS.to_string());
    Ok(config)
}

/// Settings of the producer whose records are published in transactions.
pub(crate) fn transactional_producer(settings: &Kafka, transactional_id: &str) -> Result<ClientConfig, Error> {
    let mut config = producer(settings)?;
    let timeout = settings.transaction_timeout.as_millis().to_string();
    // Offsets on their way to a group's coordinator that has gone for good would wait for ever: librdkafka looks for the new
    // one only when some connection changes, and does not mind the call's time-out (its issues 5456 and 5511). While they
    // wait the other connections rest, and one that is closed for that is a change.
    if config.get(MAX_IDLE).is_none() {
        config.set(MAX_IDLE, MAX_IDLE_MS.to_string());
    }
    config
        .set("transactional.id", transactional_id)
        .set("transaction.timeout.ms", &timeout)
        // Of a record that takes longer the transaction is over; it is sent anew in the next one.
        .set("message.timeout.ms", &timeout);
    Ok(config)
}

/// Bytes of records that are handed to librdkafka and not acknowledged, at most.
pub fn producer_queue_bytes(settings: &Kafka) -> u64 {
    PRODUCER_QUEUE_BYTES.max(2 * max_message_bytes(settings))
}

/// The longest record that librdkafka accepts, framing included.
fn max_message_bytes(settings: &Kafka) -> u64 {
    settings.max_message_size.as_u64().saturating_add(FRAMING_BYTES).min(MAX_BYTES)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytesize::ByteSize;
    use rdkafka::consumer::BaseConsumer;
    use rdkafka::producer::BaseProducer;

    use super::*;
    use crate::settings::OWNED_OPTIONS;

    #[test]
    fn librdkafka_accepts_the_settings_whatever_the_sizes() {
        let sizes = [ByteSize::b(1), ByteSize::kib(1), ByteSize::mib(1), ByteSize::mib(12), ByteSize::gib(3)];
        for prefetch in sizes {
            for max_message_size in sizes {
                let settings = Kafka { prefetch, max_message_size, ..Kafka::default() };
                consumer(&settings, "t", 2).unwrap().create::<BaseConsumer>().unwrap();
                producer(&settings).unwrap().create::<BaseProducer>().unwrap();
            }
        }
    }

    #[test]
    fn free_options_reach_both_clients() {
        let mut settings = Kafka::default();
        settings.options.insert("socket.keepalive.enable".into(), "true".into());
        settings.options.insert("heartbeat.interval.ms".into(), "777".into());
        for config in [consumer(&settings, "t", 2).unwrap(), producer(&settings).unwrap()] {
            assert_eq!(config.get("socket.keepalive.enable"), Some("true"));
            assert_eq!(config.get("heartbeat.interval.ms"), Some("777"));
        }
    }

    #[test]
    fn owned_options_are_refused_with_what_to_use_instead() {
        for (pattern, reason) in OWNED_OPTIONS {
            let key = pattern.replace('*', "x");
            let settings = Kafka { options: [(key.clone(), "1".to_owned())].into(), ..Kafka::default() };
            let error = client(&settings).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(&key) && error.contains(reason), "{error}");
        }
    }

    #[test]
    fn every_option_that_is_set_is_owned_or_free_to_change() {
        let free = ["topic.metadata.refresh.interval.ms", "client.id", "heartbeat.interval.ms"];
        let word = || Some("x".to_owned());
        let settings = Kafka {
            sasl_mechanism: word(),
            sasl_username: word(),
            sasl_password: word(),
            ssl_ca_file: Some("x".into()),
            ssl_certificate_file: Some("x".into()),
            ssl_key_file: Some("x".into()),
            ..Kafka::default()
        };
        for config in [consumer(&settings, "t", 2).unwrap(), producer(&settings).unwrap()] {
            for key in config.config_map().keys() {
                assert!(owned_option(key).is_some() || free.contains(key), "{key} is neither");
            }
            assert_eq!(config.get("sasl.password"), Some("x"));
        }
    }

    #[test]
    fn the_heartbeat_follows_a_short_session() {
        let settings = Kafka { session_timeout: Duration::from_secs(6), ..Kafka::default() };
        assert_eq!(consumer(&settings, "t", 2).unwrap().get("heartbeat.interval.ms"), Some("2000"));
        assert_eq!(consumer(&Kafka::default(), "t", 2).unwrap().get("heartbeat.interval.ms"), Some("3000"));
    }
}
