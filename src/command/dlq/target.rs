//! Where a dead letter is replayed to, and which cannot be.

use std::sync::Arc;

use super::letter::Letter;
use crate::command::Usage;
use crate::kafka::TopicCheck;
use crate::message::{Message, Origin};
use crate::settings::Kafka;

/// The topics that dead letters go back to.
#[derive(Debug)]
pub struct Targets {
    topics: Vec<Arc<str>>,
    setting: &'static str,
}

impl Targets {
    /// `topic` if it is given, else the inputs of the settings.
    ///
    /// # Errors
    /// There is no such topic, or it is that of the dead letters.
    pub fn new(kafka: &Kafka, topic: Option<&str>) -> Result<Self, Usage> {
        if topic == Some(&kafka.dead_letter_topic) {
            return Err(Usage(format!("--topic {} is the topic of the dead letters itself", kafka.dead_letter_topic)));
        }
        let (topics, setting) = match topic {
            Some(topic) => (vec![Arc::from(topic)], "--topic"),
            None => (kafka.inputs.iter().map(|input| input.topic.as_str().into()).collect(), "kafka.inputs"),
        };
        if topics.is_empty() {
            return Err(Usage("kafka.inputs is empty: say --topic".into()));
        }
        Ok(Self { topics, setting })
    }

    /// All of them, to be looked up.
    pub fn checks(&self) -> Vec<TopicCheck> {
        let check = |topic: &Arc<str>| TopicCheck { topic: topic.to_string(), setting: self.setting };
        self.topics.iter().map(check).collect()
    }

    /// The topic of the origin if it is one of them, else the first.
    pub fn of(&self, origin: &Origin) -> &Arc<str> {
        self.topics.iter().find(|topic| **topic == origin.topic).unwrap_or(&self.topics[0])
    }
}

/// Why a dead letter cannot be replayed, if it cannot.
pub fn obstacle(letter: &Letter, message: &Message) -> Option<&'static str> {
    if letter.pointer {
        return Some("its value was too long for a dead letter and is only pointed to");
    }
    message.payload.is_none().then_some("it has no value")
}

#[cfg(test)]
mod tests {
    use super::super::letter::tests::dead;
    use super::*;
    use crate::disposition::Code;
    use crate::settings::Input;

    fn kafka(inputs: &[&str]) -> Kafka {
        let inputs = inputs.iter().map(|topic| Input { topic: (*topic).into(), weight: 1 }).collect();
        Kafka { inputs, ..Kafka::default() }
    }

    fn target(inputs: &[&str], topic: Option<&str>) -> String {
        Targets::new(&kafka(inputs), topic).unwrap().of(&"b/0/7".parse().unwrap()).to_string()
    }

    #[test]
    fn a_dead_letter_goes_back_to_where_it_came_from_or_else_to_the_first_input() {
        assert_eq!(target(&["a", "b"], None), "b");
        assert_eq!(target(&["a", "c"], None), "a");
        assert_eq!(target(&["a", "b"], Some("c")), "c");
    }

    #[test]
    fn no_topic_and_the_topic_of_dead_letters_are_refused() {
        assert!(Targets::new(&kafka(&[]), None).unwrap_err().to_string().contains("--topic"));
        assert!(Targets::new(&kafka(&["a"]), Some("blipstream.dlq")).is_err());
    }

    #[test]
    fn what_has_no_value_of_its_own_cannot_be_replayed() {
        let can = |message: &Message| obstacle(&Letter::read(message).unwrap(), message).is_none();
        let message = dead("https://e.com/a.jpg", Code::Dns, 0, None);
        assert!(can(&message));
        assert!(!can(&Message { payload: None, ..message }));
        assert!(!can(&dead(r#"{"blipstream_pointer":{"length":9,"sha256":"0"},"origin":{}}"#, Code::Dns, 0, None)));
    }
}
