//! What no broker has confirmed is never committed.

use tokio_util::sync::CancellationToken;

use super::*;
use crate::budget::{Limit, Pool};
use crate::disposition::{Code, Failure, Stage};
use crate::kafka::{Consumer, EmbeddedBroker};
use crate::message::Message;
use crate::offsets::Outcome;
use crate::stage::Output;
use crate::stage::publish::DeadLetters;
use crate::tracked::Tracked;

/// A dead letter of the first message of a partition.
fn flight(ledger: &Ledger) -> Flight {
    let partition = TopicPartition { topic: "in".into(), partition: 0 };
    ledger.assign(partition.clone());
    let permit = Pool::new(Limit { items: 1, bytes: 1 }).try_acquire(1).unwrap();
    let failure = Failure::with_message(Stage::Parse, Code::BadMessage, "not a request".into());
    let message = Arc::new(Message::empty("in", 0, 0));
    let output = Output::FailedMessage { message, index: None, native: None, failure };
    Flight::new(Tracked::new(output, ledger.open(&partition, 0).unwrap(), permit))
}

#[test]
fn a_transaction_with_a_record_that_no_broker_has_confirmed_is_aborted_and_the_same_once_more() {
    let broker = EmbeddedBroker::start(1, &[("in", 1), ("captions", 1), ("dead", 1)]).unwrap();
    let kafka = Kafka {
        bootstrap_servers: broker.bootstrap_servers().unwrap(),
        captions_topic: "captions".into(),
        dead_letter_topic: "dead".into(),
        retry_topics: Vec::new(),
        ..Kafka::default()
    };
    let (consumer, ledger, metrics) = (Consumer::new(&kafka).unwrap(), Ledger::new(), Arc::new(Metrics::new()));
    let setup = Setup {
        kafka,
        worker: "test".into(),
        input: async_channel::bounded(1).1,
        give_up: CancellationToken::new(),
        failed: CancellationToken::new(),
        metrics: metrics.clone(),
        dead_letters: DeadLetters::default(),
        exactly_once: None,
    };
    let failures = Failures::new(metrics.clone());
    let mut transactor = Transactor::new(&setup, consumer.membership(), ledger.clone(), failures);
    let mut batch = Batch::new(Vec::new(), vec![flight(&ledger)]);
    assert!(transactor.initialise().is_ok());
    assert!(transactor.step(&mut batch, Producer::begin_transaction).is_ok());
    // The report comes while the commit waits for it.
    broker.round_trip_time(Duration::from_secs(2)).unwrap();
    assert!(transactor.send_all(&mut batch).is_ok());
    let reports = transactor.reports.clone();
    let stopped = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            let failure = NotDelivered { class: Class::Unconfirmed, reason: "nobody has".into() };
            reports.delivered(Box::new(0), Err(failure));
            broker.round_trip_time(Duration::ZERO).unwrap();
        });
        transactor.commit(&mut batch)
    });
    let Err(Stop::Again(trouble)) = stopped else { panic!("it is not committed") };
    assert!(trouble.mended && trouble.reason == "nobody has", "{}", trouble.reason);
    assert!(!batch.in_doubt);
    let counted = |name: &str| metrics.render().contains(name);
    assert!(counted("blipstream_publish_unconfirmed_total 1") && counted("blipstream_transaction_aborts_total 1"));
    let Ended::Committed(batch) = transactor.run(batch) else { panic!("the second time nothing is wrong") };
    for flight in batch.flights {
        flight.finished.resolve(Outcome::Published);
    }
}
