//! The whole flow: Kafka at both ends of the core, one owner for its end.

use std::time::Duration;

use anyhow::Context;
use async_channel::{Receiver, bounded};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::{Control, Core, HANDOVER, Parts, Totals, waiting};
use crate::disposition::Stage;
use crate::gate::Reason;
use crate::kafka;
use crate::offsets::Lost;
use crate::settings::{Delivery, Settings};
use crate::stage::commit::{InTransactions, Watermarks};
use crate::stage::consume::{self, Consume};
use crate::stage::infer::DeviceFailure;
use crate::stage::parse::Parse;
use crate::stage::publish;

/// Time for the publisher to hand back what it has, after the drain deadline.
const GIVE_UP: Duration = Duration::from_secs(6);
/// How long the end of a worker may take beyond `flow.drain_timeout`, whatever hangs: giving up what is not finished,
/// the last commit, leaving the group.
pub const OVERTIME: Duration = GIVE_UP.saturating_add(consume::CLOSE);
/// How often dropped tickets are looked for.
const PULSE: Duration = Duration::from_millis(200);

/// How a worker ended.
#[derive(Debug)]
pub struct Summary {
    /// Counts since the start.
    pub totals: Totals,
    /// Messages that were not resolved by the drain deadline; the next worker reads them again.
    pub unfinished: usize,
    /// Messages whose tickets were dropped: bugs.
    pub lost: Vec<Lost>,
}

impl Summary {
    /// Whether everything that was consumed was published and committed.
    pub fn clean(&self) -> bool {
        self.unfinished == 0 && self.lost.is_empty()
    }
}

/// Why a worker stops by itself.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("{0}")]
    Consumer(kafka::Error),
    #[error("the publisher has ended")]
    Producer,
    #[error("{0}; no device is left")]
    Devices(DeviceFailure),
    #[error("{0}")]
    Lost(Lost),
    #[error("the {0} stage panicked; the message is in the log")]
    Panic(Stage),
    #[error("the {0} stage ended before it was told to, since a stage beside it did; the log says more")]
    Ended(Stage),
}

impl Fault {
    /// The fault of a stage that ended by itself.
    fn of(stage: Stage, ended: Result<(), JoinError>) -> Self {
        match ended {
            Ok(()) => Self::Ended(stage),
            Err(_) => Self::Panic(stage),
        }
    }
}

/// Runs a worker until [`Control::drain`], or until something breaks that it cannot mend; drains in both cases.
///
/// Shutdown is ownership: consumption stops, each stage finishes what it has and drops its senders, what is published
/// is committed, and the group is left.
///
/// # Errors
/// The flow could not be started, or the worker stopped by itself; the message says why. What was in flight and could
/// not be finished is not committed.
pub async fn run(settings: &Settings, parts: Parts, control: &Control) -> anyhow::Result<Summary> {
    let worker = parts.worker.clone();
    let Core { rows, finished, failures, device_failures, fetching, endpoint } = Core::start(settings, parts, control)?;
    let metrics = control.metrics().clone();
    let answering = control.answer(endpoint, &settings.endpoint);

    // publish, the last stage
    let consumer = kafka::Consumer::new(&settings.kafka)?;
    let ledger = control.ledger().clone();
    let (committer, exactly_once): (Box<dyn kafka::Committer>, _) = match settings.kafka.delivery {
        Delivery::AtLeastOnce => (Box::new(Watermarks(ledger)), None),
        Delivery::ExactlyOnce => {
            let publishing = publish::ExactlyOnce { group: consumer.membership(), ledger: ledger.clone() };
            (Box::new(InTransactions(ledger)), Some(publishing))
        }
    };
    let (give_up, producer_failed) = (CancellationToken::new(), CancellationToken::new());
    let publishing = publish::run(publish::Setup {
        kafka: settings.kafka.clone(),
        worker,
        input: finished,
        give_up: give_up.clone(),
        failed: producer_failed.clone(),
        metrics: metrics.clone(),
        dead_letters: publish::DeadLetters {
            per_minute: settings.flow.max_dead_letters_per_minute,
            gate: control.gate().clone(),
        },
        exactly_once,
    });
    // However the publisher ends, also by a panic or before it began: without it the worker cannot go on.
    let gone = producer_failed.clone().drop_guard();
    let publishing = tokio::spawn(async move {
        let _gone = gone;
        publishing.await
    });

    // parse → fetch
    let (messages_in, messages) = bounded(HANDOVER);
    let before_parse = waiting(&messages);
    let parse = Parse {
        input: messages,
        rows,
        finished: failures.clone(),
        max_bytes: settings.kafka.max_message_size.as_u64() as usize,
        max_rows: settings.flow.max_rows,
        metrics: metrics.clone(),
    };
    let parsing = tokio::spawn(parse.run());

    // consume → parse
    let setup = consume::Setup {
        consumer,
        kafka: settings.kafka.clone(),
        flow: settings.flow.clone(),
        ledger: control.ledger().clone(),
        messages: control.budget().messages.clone(),
        gate: control.gate().clone(),
        committer,
        metrics,
    };
    let mut consumer = consume::start(setup, messages_in, failures)?;
    control.consuming(consumer.view(), before_parse);

    let watched = Watched {
        control,
        consumer: &mut consumer,
        producer_failed,
        parsing,
        fetching,
        device_failures: &device_failures,
    };
    let fault = watched.until_the_end().await;
    if let Some(fault) = &fault {
        tracing::error!("{fault}; draining");
        control.drain(&fault.to_string());
    }

    // Drain, front to back, against one deadline.
    control.gate().shut(Reason::Drain);
    if let Some(endpoint) = control.endpoint() {
        endpoint.close();
    }
    consumer.stop();
    let published = drain(publishing, &give_up, settings.flow.drain_timeout).await;
    while let Ok(failure) = device_failures.try_recv() {
        tracing::error!("{failure}");
    }
    let lost: Vec<_> = std::iter::from_fn(|| control.take_lost()).collect();
    for lost in &lost {
        tracing::error!("{lost}");
    }
    let unfinished = control.ledger().open_tickets();
    if unfinished > 0 {
        tracing::warn!(
            unfinished,
            "not finished: the drain deadline (flow.drain_timeout) passed, or an outage held them; the next worker reads \
             them again"
        );
    }
    if let Some(answering) = answering {
        // What is left of it has a client that no longer waits.
        answering.abort();
    }
    let closed = consumer.close().await;
    if let Some(fault) = fault {
        // The publisher knows best why it ended.
        let producer = matches!(fault, Fault::Producer);
        return Err(published.err().filter(|_| producer).unwrap_or_else(|| fault.into()));
    }
    closed.context("the consumer did not end well; what it could not commit is read again")?;
    published?;
    Ok(Summary { totals: control.totals(), unfinished, lost })
}

/// Waits for the publisher, which ends when everything before it has ended and all is acknowledged; at the deadline it
/// is told to give up what is left.
async fn drain(
    mut publishing: JoinHandle<Result<publish::Summary, kafka::Error>>,
    give_up: &CancellationToken,
    timeout: Duration,
) -> anyhow::Result<()> {
    let ended = if let Ok(ended) = tokio::time::timeout(timeout, &mut publishing).await {
        ended
    } else {
        give_up.cancel();
        // The stages before it may hang in a decoder or a device; what they hold is not committed.
        let Ok(ended) = tokio::time::timeout(GIVE_UP, publishing).await else { return Ok(()) };
        ended
    };
    ended.context("the publish stage panicked")??;
    Ok(())
}

/// The parts whose end is watched.
struct Watched<'a> {
    control: &'a Control,
    consumer: &'a mut Consume,
    producer_failed: CancellationToken,
    parsing: JoinHandle<()>,
    fetching: JoinHandle<()>,
    device_failures: &'a Receiver<DeviceFailure>,
}

impl Watched<'_> {
    /// Waits until somebody asks for the drain (`None`), or something breaks that the worker cannot mend.
    async fn until_the_end(mut self) -> Option<Fault> {
        let mut pulse = interval(PULSE);
        pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased; // a fault counts more than an order to drain: it decides the exit code
                _ = pulse.tick() => if let Some(lost) = self.control.take_lost() {
                    return Some(Fault::Lost(lost));
                },
                error = self.consumer.failed() => return Some(Fault::Consumer(error)),
                () = self.producer_failed.cancelled() => return Some(Fault::Producer),
                // The later stage first: when both have ended, the earlier one ended because of it.
                ended = &mut self.fetching => return Some(Fault::of(Stage::Fetch, ended)),
                ended = &mut self.parsing => return Some(Fault::of(Stage::Parse, ended)),
                Ok(failure) = self.device_failures.recv() => {
                    if !self.control.alive() {
                        return Some(Fault::Devices(failure));
                    }
                    tracing::error!("{failure}; going on with the other devices");
                }
                () = self.control.draining().cancelled() => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stage_that_ended_quietly_is_not_said_to_have_panicked() {
        let quiet = tokio::spawn(async {}).await;
        assert!(matches!(Fault::of(Stage::Parse, quiet), Fault::Ended(Stage::Parse)));
        let panic = tokio::spawn(async { panic!("on purpose") }).await;
        assert!(matches!(Fault::of(Stage::Parse, panic), Fault::Panic(Stage::Parse)));
    }
}
