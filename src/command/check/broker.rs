//! Brokers and topics.

use std::fmt::Write as _;
use std::time::Duration;

use super::Item;
use crate::kafka::{Access, Error, Found, FoundTopic, TopicCheck, check_access, group_members};
use crate::settings::Kafka;

/// Asks the brokers for every topic that a worker needs, and whether it may do what it does.
pub fn items(kafka: &Kafka, timeout: Duration) -> Vec<Item> {
    let checks = TopicCheck::of(kafka);
    match check_access(kafka, timeout) {
        Ok(Access { found: Found { addresses, topics }, group }) => {
            let broker = Item::ok("broker", format!("reached at {}{}", addresses.join(", "), login(kafka)));
            let inputs = checks.iter().zip(&topics).filter(|(check, _)| check.setting == "kafka.inputs");
            let partitions = inputs.filter_map(|(_, found)| Some(found.as_ref().ok()?.partitions)).max();
            let topics = checks.iter().zip(topics).map(|(check, found)| topic(kafka, check, found));
            let group = match group {
                Ok(()) => {
                    let workers = group_members(kafka, timeout).div_ceil(kafka.subscriptions().len().max(1));
                    spare(kafka, workers, partitions.unwrap_or_default())
                }
                Err(error) => Some(Item::failed("group", error.to_string())),
            };
            std::iter::once(broker).chain(topics).chain(group).collect()
        }
        Err(error) => {
            let names: Vec<_> = checks.into_iter().map(|check| check.topic).collect();
            let unknown = Item::skipped("topics", format!("not looked up: {}", names.join(", ")));
            vec![Item::failed("broker", error.to_string()), unknown]
        }
    }
}

/// Says when one more worker would have nothing to do: each input topic is shared out by itself.
fn spare(kafka: &Kafka, workers: usize, partitions: usize) -> Option<Item> {
    let text = format!(
        "the group {} (kafka.group_id) has {workers} workers, and no input topic has more than {partitions} partitions: \
         one more worker stays idle until another one leaves, or until kafka.inputs have more partitions",
        kafka.group_id
    );
    (workers > 0 && workers >= partitions).then(|| Item::warning("group", text))
}

fn login(kafka: &Kafka) -> String {
    let protocol = kafka.security_protocol.as_str();
    match &kafka.sasl_username {
        Some(user) => format!(" over {protocol} as {user}"),
        None => format!(" over {protocol}"),
    }
}

fn topic(kafka: &Kafka, check: &TopicCheck, found: Result<FoundTopic, Error>) -> Item {
    let (name, does) = match check.setting {
        "kafka.captions_topic" => ("captions", "captions go to"),
        "kafka.filtered_topic" => ("filtered", "what the filter rejects goes to"),
        "kafka.canary_topic" => ("canary", "what the canary writes goes to"),
        "kafka.dead_letter_topic" => ("dead letters", "what fails goes to"),
        "kafka.retry_topics" => ("retries", "what may go better later waits in"),
        _ => ("requests", "requests come from"),
    };
    let found = match found {
        Ok(found) => found,
        Err(error @ Error::UnknownTopic { .. }) => {
            let (servers, topic) = (&kafka.bootstrap_servers, &check.topic);
            return Item::failed(
                name,
                format!(
                    "{error}: kafka-topics.sh --bootstrap-server {servers} --create --topic {topic} --partitions 12"
                ),
            );
        }
        Err(error) => return Item::failed(name, error.to_string()),
    };
    let partitions = match found.partitions {
        1 => "1 partition".to_owned(),
        partitions => format!("{partitions} partitions"),
    };
    let mut text = format!("{does} {} ({partitions})", found.topic);
    if name == "requests" {
        let (group, most) = (&kafka.group_id, found.partitions);
        let _ = write!(text, ", shared by the workers of the group {group}, of which at most {most} have work");
    }
    Item::ok(name, text)
}
