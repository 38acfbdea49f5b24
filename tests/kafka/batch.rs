//! `blipstream batch --kafka` on Apache Kafka.

use blipstream::settings::Delivery;

use crate::support::client::eventually;
use crate::support::flow::Flow;
use crate::support::job::Job;
use crate::support::place::finish;
use crate::support::promises::slow;

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_job_takes_the_answers_of_an_exactly_once_fleet_and_asks_for_nothing_twice() {
    let Some(flow) = Flow::on_kafka(3).await else { return };
    // Markers of transactions stand between the answers.
    let job = Job::of_pictures(flow.delivering(Delivery::ExactlyOnce), 200);
    let arguments = ["list.csv", "--mini-batch-size", "40"];
    let worker = job.flow.worker(slow());
    let mut child = job.spawn(&arguments);
    job.place.until_recorded("out.jsonl", 60);
    assert!(worker.stop().await.clean());
    let answers = || job.flow.read(job.answers().0).len();
    eventually("some have no answer", || job.requests() >= answers() + 10).await;
    child.kill().unwrap();
    assert_eq!(finish(child).code, None, "it ended before it was killed");

    let worker = job.flow.worker(slow());
    eventually("every request is answered", || answers() == job.requests()).await;
    let ran = job.run(&arguments);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.err.contains(" answers had come meanwhile"), "{ran:?}");
    job.assert_complete(200);
    assert_eq!((job.requests(), answers()), (200, 200), "work was done twice");
    assert!(worker.stop().await.clean());
}
