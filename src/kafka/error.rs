//! What can go wrong with Kafka, sorted by what it means, with words for the person who runs the worker.

use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use super::access::Right;
use crate::offsets::TopicPartition;

/// An error of the link to Kafka.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// librdkafka refuses the settings. Values are left out, since some are secrets.
    #[error("librdkafka refuses `{key}`: {reason}. It comes from the section [kafka] or from kafka.options")]
    Setting {
        /// librdkafka's name of the setting.
        key: String,
        /// Its words.
        reason: String,
    },
    /// No broker answers.
    #[error(
        "no Kafka broker answers at {servers} ({reason}). Check kafka.bootstrap_servers and kafka.security_protocol, \
         that the brokers run, and that their advertised listeners can be reached from here"
    )]
    Unreachable {
        /// `kafka.bootstrap_servers`.
        servers: String,
        /// librdkafka's words.
        reason: String,
    },
    /// The brokers do not accept who we are, or we do not accept who they are.
    #[error("no link to the Kafka brokers: {} ({reason})", login_advice(reason))]
    Authentication {
        /// librdkafka's words.
        reason: String,
    },
    /// The brokers know us, and do not permit this.
    #[error(
        "not permitted by the Kafka brokers: {reason}. The user needs Read on the input topics and on the group \
         kafka.group_id, Write on kafka.captions_topic, kafka.filtered_topic, kafka.canary_topic and kafka.dead_letter_topic, and \
         both on kafka.retry_topics"
    )]
    NotAuthorised {
        /// What was refused.
        reason: String,
    },
    /// The brokers know us, and do not permit something that a worker does.
    #[error(
        "the Kafka brokers do not permit {who} to {right} the {resource} `{name}` that {setting} names. To grant it: \
         kafka-acls --add --allow-principal User:{principal} --operation {right} --{resource} {name}",
        who = user.as_deref().map_or("this client".into(), |user| format!("the user {user}")),
        principal = user.as_deref().unwrap_or("NAME")
    )]
    Denied {
        /// `kafka.sasl_username`.
        user: Option<String>,
        /// What is not permitted.
        right: Right,
        /// `topic` or `group`.
        resource: &'static str,
        /// Its name.
        name: String,
        /// The setting that names it.
        setting: &'static str,
    },
    /// A topic does not exist.
    #[error("the topic `{topic}` does not exist; create it, or change {setting}")]
    UnknownTopic {
        /// The topic.
        topic: String,
        /// The setting that names it.
        setting: String,
    },
    /// The committed offset is not in the log: messages were deleted before they were read.
    #[error(
        "the position {offset} of {partition} is outside of its log ({low} to {high}): messages were deleted before \
         they were read, or the topic was made anew. Nothing is skipped silently: move the group's offset with \
         `kafka-consumer-groups --reset-offsets`, or choose another kafka.group_id"
    )]
    OffsetOutOfRange {
        /// The partition.
        partition: TopicPartition,
        /// Where the group stands.
        offset: i64,
        /// First offset of the log.
        low: i64,
        /// One behind its last offset.
        high: i64,
    },
    /// The group is being rearranged; the same is accepted once that is over.
    #[error("{doing}: the consumer group is being rearranged")]
    Rebalancing {
        /// What was being done.
        doing: &'static str,
    },
    /// The client can do nothing more.
    #[error("the Kafka client has failed for good: {reason}")]
    Fatal {
        /// librdkafka's words.
        reason: String,
    },
    /// A thread of the client ended by a panic.
    #[error("the {0} thread panicked; what was under way is read again by the next worker")]
    Panicked(&'static str),
    /// Anything else.
    #[error("{doing}: {reason}")]
    Other {
        /// What was being done.
        doing: &'static str,
        /// librdkafka's words.
        reason: String,
    },
}

/// What a person can do about a login that is refused, or a certificate that is.
pub(crate) fn login_advice(reason: &str) -> &'static str {
    let says = |text: &str| reason.contains(text);
    if says("certificate verify failed") || says("certificate could not be verified") {
        "the brokers' certificate is not trusted. Check kafka.ssl_ca_file, which must hold the CA that signed it, and \
         that kafka.bootstrap_servers names the hosts that it is for"
    } else if says("SSL") && !says("SASL") {
        "TLS fails. Check kafka.security_protocol, and kafka.ssl_certificate_file and kafka.ssl_key_file where the \
         brokers want a certificate of the client"
    } else if says("mechanism handshake failed") || says("Unsupported SASL mechanism") {
        "the brokers do not offer this way to log in. Check kafka.sasl_mechanism"
    } else {
        "the login is refused. Check kafka.sasl_username and kafka.sasl_password_file (or kafka.sasl_password), and \
         that the user has a password for kafka.sasl_mechanism"
    }
}

impl Error {
    /// Whether trying again is of no use until a person has changed something.
    pub fn lasts(&self) -> bool {
        matches!(
            self,
            Self::Setting { .. }
                | Self::Authentication { .. }
                | Self::NotAuthorised { .. }
                | Self::Denied { .. }
                | Self::UnknownTopic { .. }
                | Self::Fatal { .. }
        )
    }

    /// An error of librdkafka, while `doing` something.
    pub(crate) fn from_kafka(doing: &'static str, error: &KafkaError) -> Self {
        if let KafkaError::ClientConfig(_, reason, key, _) = error {
            return Self::Setting { key: key.clone(), reason: reason.clone() };
        }
        if let KafkaError::ClientCreation(reason) = error {
            return Self::Setting { key: "the settings together".into(), reason: reason.clone() };
        }
        let code = error.rdkafka_error_code();
        // The latter of a commit that is on its way while the group begins its next generation. Where we are no longer in it,
        // the partitions are lost next.
        if matches!(code, Some(RDKafkaErrorCode::RebalanceInProgress | RDKafkaErrorCode::IllegalGeneration)) {
            return Self::Rebalancing { doing };
        }
        let reason = code.map_or_else(|| error.to_string(), |code| code.to_string());
        match code.map(Class::of) {
            Some(Class::Authentication) => Self::Authentication { reason },
            Some(Class::NotAuthorised) => Self::NotAuthorised { reason },
            Some(Class::Fatal) => Self::Fatal { reason },
            _ => Self::Other { doing, reason },
        }
    }
}

/// What an error of librdkafka means for the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// The brokers are away; librdkafka tries again by itself.
    Unreachable,
    /// The login is refused.
    Authentication,
    /// The user may not do this.
    NotAuthorised,
    /// The topic or the partition does not exist.
    UnknownTopic,
    /// The record is over a limit.
    TooLarge,
    /// The topic takes no record with this timestamp.
    BadTimestamp,
    /// The offset to read from is not in the log.
    OffsetOutOfRange,
    /// The group is being rearranged, or gave our partitions to others.
    Rebalancing,
    /// We took the record back ourselves.
    Purged,
    /// No broker has confirmed the record, though librdkafka takes it for written: it may be there, or not.
    Unconfirmed,
    /// The transaction that the record was for has failed already, for another reason.
    TransactionOver,
    /// The client can do nothing more.
    Fatal,
    /// Anything else: worth another try.
    Other,
}

impl Class {
    /// The class of an error of librdkafka.
    pub(crate) fn of_error(error: &KafkaError) -> Self {
        error.rdkafka_error_code().map_or(Self::Other, Self::of)
    }

    /// The class of an error that a client reports with its reason. A link that breaks during the TLS handshake may be
    /// a broker that starts; a certificate that is refused stays refused, whatever the code says.
    pub(crate) fn reported(code: RDKafkaErrorCode, reason: &str) -> Self {
        match Self::of(code) {
            Self::Unreachable if reason.contains("certificate verify failed") => Self::Authentication,
            Self::Authentication if reason.contains("Disconnected") || reason.contains("unexpected eof") => {
                Self::Unreachable
            }
            class => class,
        }
    }

    /// Whether a reader of topics can go no further; librdkafka goes on by itself after anything else.
    pub(crate) fn ends_reading(self) -> bool {
        matches!(self, Self::Authentication | Self::NotAuthorised | Self::UnknownTopic | Self::Fatal)
    }

    /// The class of a code of librdkafka.
    pub(crate) fn of(code: RDKafkaErrorCode) -> Self {
        use RDKafkaErrorCode as C;
        match code {
            C::AllBrokersDown
            | C::BrokerTransportFailure
            | C::Resolve
            | C::OperationTimedOut
            | C::RequestTimedOut
            | C::MessageTimedOut
            | C::WaitingForCoordinator
            | C::CoordinatorNotAvailable
            | C::CoordinatorLoadInProgress
            | C::NotCoordinator => Self::Unreachable,
            C::Authentication
            | C::SSL
            | C::SaslAuthenticationFailed
            | C::UnsupportedSASLMechanism
            | C::IllegalSASLState => Self::Authentication,
            C::TopicAuthorizationFailed
            | C::GroupAuthorizationFailed
            | C::ClusterAuthorizationFailed
            | C::TransactionalIdAuthorizationFailed => Self::NotAuthorised,
            C::UnknownTopic | C::UnknownTopicOrPartition | C::UnknownPartition | C::InvalidTopic => Self::UnknownTopic,
            C::MessageSizeTooLarge | C::MessageBatchTooLarge => Self::TooLarge,
            C::InvalidTimestamp => Self::BadTimestamp,
            C::AutoOffsetReset | C::OffsetOutOfRange | C::LogTruncation => Self::OffsetOutOfRange,
            C::RebalanceInProgress
            | C::IllegalGeneration
            | C::UnknownMemberId
            | C::AssignmentLost
            | C::PollExceeded => Self::Rebalancing,
            C::PurgeQueue | C::PurgeInflight => Self::Purged,
            C::State => Self::TransactionOver,
            C::Fatal | C::Fenced | C::ProducerFenced | C::FencedInstanceId => Self::Fatal,
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handshake_that_breaks_is_tried_again_and_a_refused_certificate_is_not() {
        let refused = "error:0A000086:SSL routines::certificate verify failed (after 3ms in state SSL_HANDSHAKE)";
        let broken = "SSL handshake failed: Disconnected: connecting to a PLAINTEXT broker listener?";
        for code in [RDKafkaErrorCode::BrokerTransportFailure, RDKafkaErrorCode::SSL] {
            assert_eq!(Class::reported(code, refused), Class::Authentication);
            assert_eq!(Class::reported(code, broken), Class::Unreachable);
        }
    }

    #[test]
    fn the_advice_names_the_setting_that_is_wrong() {
        for (reason, setting) in [
            ("SSL handshake failed: certificate verify failed", "kafka.ssl_ca_file"),
            ("ssl://h:1: SSL handshake failed: tlsv13 alert certificate required", "kafka.ssl_certificate_file"),
            ("SASL OAUTHBEARER mechanism handshake failed: Broker: Unsupported SASL mechanism", "kafka.sasl_mechanism"),
            ("sasl_ssl://h:1: SASL authentication error: Invalid username or password", "kafka.sasl_password_file"),
        ] {
            assert!(login_advice(reason).contains(setting), "{reason}: {}", login_advice(reason));
        }
    }

    #[test]
    fn an_error_of_the_settings_never_shows_the_value() {
        let error = rdkafka::ClientConfig::new()
            .set("sasl.passwort", "hunter2")
            .create::<rdkafka::consumer::BaseConsumer>()
            .err()
            .map(|error| Error::from_kafka("starting", &error));
        let text = error.map(|error| error.to_string()).unwrap_or_default();
        assert!(text.contains("sasl.passwort"), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}
