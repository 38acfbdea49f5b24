//! Which options of librdkafka `kafka.options` may not set: the one list, for the configuration, which refuses them with
//! their origin, and for the client, which takes settings from anybody.

/// Options that blipstream sets itself, or whose change would break a promise, each with why, or with what to use
/// instead. A name that ends in `*` stands for all that begin so. Sorted.
pub const OWNED_OPTIONS: &[(&str, &str)] = &[
    ("acks", DELIVERY),
    ("allow.auto.create.topics", "a misspelt topic should fail, not appear"),
    ("auto.commit.*", DELIVERY),
    ("auto.offset.reset", DELIVERY),
    ("bootstrap.servers", "use kafka.bootstrap_servers"),
    ("compression.*", "use kafka.compression"),
    ("delivery.report.only.error", DELIVERY),
    ("delivery.timeout.ms", DELIVERY),
    ("enable.auto.commit", DELIVERY),
    ("enable.auto.offset.store", DELIVERY),
    ("enable.gapless.guarantee", DELIVERY),
    ("enable.idempotence", DELIVERY),
    ("enable.partition.eof", "blipstream needs it to know when a topic is drained"),
    ("enabled_events", INNER),
    ("fetch.max.bytes", "use kafka.prefetch"),
    ("fetch.message.max.bytes", "use kafka.max_message_size"),
    ("group.id", "use kafka.group_id"),
    ("group.instance.id", "use kafka.group_instance_id"),
    ("group.protocol", "blipstream needs the classic protocol"),
    ("group.remote.assignor", "blipstream needs the classic protocol"),
    ("isolation.level", DELIVERY),
    ("linger.ms", "use kafka.linger"),
    ("log.queue", INNER),
    ("max.in.flight*", DELIVERY),
    ("max.partition.fetch.bytes", "use kafka.max_message_size"),
    ("max.poll.interval.ms", "use kafka.max_poll_interval"),
    ("message.max.bytes", "use kafka.max_message_size"),
    ("message.send.max.retries", DELIVERY),
    ("message.timeout.ms", DELIVERY),
    ("metadata.broker.list", "use kafka.bootstrap_servers"),
    ("offset.store.method", DELIVERY),
    ("partition.assignment.strategy", "blipstream needs cooperative-sticky"),
    ("partitioner", "keys are placed as Java clients place them"),
    ("plugin.library.paths", "blipstream loads no plugins"),
    ("queue.buffering.max.*", "queues are bounded by blipstream; see kafka.linger and flow"),
    ("queued.max.messages.kbytes", "use kafka.prefetch"),
    ("queued.min.messages", "use kafka.prefetch"),
    ("receive.message.max.bytes", "use kafka.max_message_size"),
    ("request.required.acks", DELIVERY),
    ("retries", DELIVERY),
    ("sasl.*", "use kafka.sasl_mechanism, kafka.sasl_username and kafka.sasl_password_file"),
    ("security.protocol", "use kafka.security_protocol"),
    ("session.timeout.ms", "use kafka.session_timeout"),
    ("ssl.ca.location", "use kafka.ssl_ca_file"),
    ("ssl.certificate.location", "use kafka.ssl_certificate_file"),
    ("ssl.key.location", "use kafka.ssl_key_file"),
    ("statistics.interval.ms", "the consumer lag is read from these statistics"),
    ("test.mock.num.brokers", "the embedded broker of `blipstream demo` is the way to run without one"),
    ("transaction.timeout.ms", "use kafka.transaction_timeout"),
    ("transactional.id", "use kafka.transactional_id"),
];

const INNER: &str = "the client's logs and events go through it";

const DELIVERY: &str = "the promise of delivery depends on it";

/// Why `kafka.options` may not set this option, if it may not.
pub fn owned_option(name: &str) -> Option<String> {
    // `topic.` reaches the same option of the topic.
    let name = name.trim();
    let bare = name.strip_prefix("topic.").unwrap_or(name);
    let owned = |pattern: &str| match pattern.strip_suffix('*') {
        Some(prefix) => bare.starts_with(prefix),
        None => bare == pattern,
    };
    let (_, reason) = OWNED_OPTIONS.iter().find(|(pattern, _)| owned(pattern))?;
    Some(format!("blipstream sets this option of librdkafka itself: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owned_options_are_refused_with_what_to_use_instead_and_others_pass() {
        assert!(owned_option("group.id").is_some_and(|reason| reason.contains("kafka.group_id")));
        for name in [
            "auto.commit.enable",
            "auto.commit.interval.ms",
            "compression.codec",
            "compression.type",
            "max.in.flight",
            "max.in.flight.requests.per.connection",
            "queue.buffering.max.kbytes",
            "queue.buffering.max.messages",
            "queue.buffering.max.ms",
            "sasl.mechanism",
            "sasl.mechanisms",
            "sasl.password",
            "sasl.username",
            "topic.acks",
            "transactional.id",
        ] {
            assert!(owned_option(name).is_some(), "{name}");
        }
        for name in ["fetch.wait.max.ms", "socket.keepalive.enable", "client.rack", "ssl.key.password", "ackss"] {
            assert_eq!(owned_option(name), None, "{name}");
        }
    }

    #[test]
    fn the_list_is_sorted_and_has_no_name_twice() {
        assert!(OWNED_OPTIONS.is_sorted_by(|a, b| a.0 < b.0));
    }
}
