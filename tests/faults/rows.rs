//! The rows of the matrix: what breaks, for how long, and by what it must be felt.

use std::time::Duration;

use tokio::time::sleep;

use crate::proxy::{END_OF_TRANSACTION, TRANSACTION_REQUESTS, Weather};
use crate::run::{MAX_POLL, Run, SESSION, WORKERS};
use crate::site::{Coordinated, NODES};

/// Longer than a session and than a transaction may be.
const LONG: Duration = Duration::from_secs(2 * SESSION.as_secs());
/// Between two steps of one fault.
const STEP: Duration = Duration::from_secs(5);

/// A row.
pub struct Row {
    pub name: &'static str,
    /// What happens, for the table.
    pub what: &'static str,
    pub fault: Fault,
    /// Where it applies.
    pub modes: Modes,
    /// How long requests are written, so that they come before, during and after the fault.
    pub load: Duration,
    /// Whether nothing may come twice even where delivery is at least once.
    pub orderly: bool,
    /// Whether workers have `kafka.transactional_id`s of the row's choosing.
    pub own_ids: bool,
    /// Whether the fault has shown.
    pub felt: fn(&Evidence) -> bool,
    /// Whether the row is part of the short matrix, and in which modes.
    pub short: Modes,
}

/// Modes of delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Modes {
    Neither,
    AtLeastOnce,
    ExactlyOnce,
    Both,
}

/// By what a fault has shown, from the first strike to the healing.
#[derive(Debug, Clone, Default)]
pub struct Evidence {
    /// Messages in flight at the strike; the fewest, where there were several.
    pub in_flight: u64,
    pub rebalances: u64,
    pub aborts: u64,
    pub fences: u64,
    pub refusals: u64,
    /// Pieces that the proxies held or delayed, and connections they closed.
    pub touched: u64,
    /// The longest time without a result.
    pub stall: Duration,
    /// The longest time without a caption.
    pub caption_stall: Duration,
    /// The most lag, in seconds of the load.
    pub lag: f64,
}

/// What breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Kill,
    Zombie,
    Terminate,
    Churn,
    Rolling,
    Broker,
    GroupCoordinator,
    TransactionCoordinator,
    AllBrokers,
    Resets,
    Cut { to_broker: bool, to_worker: bool },
    Slow,
    TransactionRequests,
    TransactionAnswers,
    Output,
    Pause,
}

const fn row(name: &'static str, what: &'static str, fault: Fault, load: u64, felt: fn(&Evidence) -> bool) -> Row {
    let load = Duration::from_secs(load);
    Row { name, what, fault, modes: Modes::Both, load, orderly: false, own_ids: false, felt, short: Modes::Neither }
}

const fn rebalanced(evidence: &Evidence) -> bool {
    evidence.rebalances > 0
}

fn stalled(evidence: &Evidence) -> bool {
    evidence.stall > Duration::from_secs(2)
}

fn lagged(evidence: &Evidence) -> bool {
    evidence.lag > 2.0
}

/// Every row.
pub const ROWS: &[Row] = &[
    Row { short: Modes::Both, ..row("kill", "SIGKILL of workers at random moments", Fault::Kill, 40, rebalanced) },
    Row {
        short: Modes::ExactlyOnce,
        ..row(
            "zombie",
            "SIGSTOP of a worker beyond session and transaction, then SIGCONT",
            Fault::Zombie,
            40,
            rebalanced,
        )
    },
    Row {
        orderly: true,
        short: Modes::AtLeastOnce,
        ..row("terminate", "SIGTERM of a worker under load", Fault::Terminate, 40, rebalanced)
    },
    Row { orderly: true, ..row("churn", "workers added and removed every 5 s", Fault::Churn, 50, rebalanced) },
    Row { orderly: true, ..row("rolling", "workers restarted one after the other", Fault::Rolling, 40, rebalanced) },
    Row {
        short: Modes::ExactlyOnce,
        ..row("broker", "SIGKILL of a broker, restarted after 5 s", Fault::Broker, 45, |e| e.stall.as_millis() > 300)
    },
    row("group-coordinator", "SIGKILL of the group's coordinator", Fault::GroupCoordinator, 45, |e| {
        rebalanced(e) || e.stall.as_millis() > 300
    }),
    Row {
        modes: Modes::ExactlyOnce,
        own_ids: true,
        short: Modes::ExactlyOnce,
        ..row(
            "transaction-coordinator",
            "SIGKILL of a transaction's coordinator",
            Fault::TransactionCoordinator,
            40,
            |e| e.aborts + e.fences > 0 || e.stall.as_millis() > 300,
        )
    },
    row("all-brokers", "all brokers down for 30 s", Fault::AllBrokers, 70, |e| e.stall.as_secs() > 25),
    row("resets", "connections of all workers closed every second", Fault::Resets, 40, |e| e.touched > 20),
    row("cut", "network of a worker cut both ways", Fault::Cut { to_broker: true, to_worker: true }, 40, rebalanced),
    row(
        "cut-to-broker",
        "nothing of a worker arrives at the brokers",
        Fault::Cut { to_broker: true, to_worker: false },
        40,
        rebalanced,
    ),
    Row {
        short: Modes::ExactlyOnce,
        ..row(
            "cut-to-worker",
            "nothing of the brokers arrives at a worker",
            Fault::Cut { to_broker: false, to_worker: true },
            40,
            rebalanced,
        )
    },
    row("slow", "everything between workers and brokers 500 ms later", Fault::Slow, 40, |e| {
        e.touched > 100 && e.stall.as_millis() > 300
    }),
    Row {
        modes: Modes::ExactlyOnce,
        short: Modes::ExactlyOnce,
        ..row(
            "held-requests",
            "requests of transactions held beyond their time-out",
            Fault::TransactionRequests,
            40,
            |e| e.touched > 0 && stalled(e),
        )
    },
    Row {
        modes: Modes::ExactlyOnce,
        short: Modes::ExactlyOnce,
        ..row("held-answers", "answers to commits held beyond their time-out", Fault::TransactionAnswers, 40, |e| {
            e.touched > 0 && stalled(e)
        })
    },
    Row {
        short: Modes::AtLeastOnce,
        ..row("full-output", "the brokers refuse captions for 10 s and more", Fault::Output, 45, |e| {
            e.caption_stall > Duration::from_secs(8)
        })
    },
    Row { orderly: true, ..row("pause", "a pause longer than max.poll.interval.ms", Fault::Pause, 40, lagged) },
];

/// Does what the fault is, and heals it.
pub async fn strike(run: &mut Run<'_>, fault: Fault) {
    let victim = run.running()[0];
    let all: Vec<_> = (0..WORKERS).collect();
    match fault {
        Fault::Kill => {
            for _ in 0..3 {
                sleep(Duration::from_millis(run.random.u64(500..3000))).await;
                let Some(slot) = run.pick().await else { return };
                run.kill(slot);
                sleep(Duration::from_secs(1)).await;
                run.start(slot);
            }
        }
        Fault::Zombie => {
            run.aim(&[victim]).await;
            run.suspend(victim, LONG).await;
        }
        Fault::Terminate => {
            run.aim(&[victim]).await;
            run.terminate(victim).await;
            sleep(Duration::from_secs(1)).await;
            run.start(victim);
        }
        Fault::Churn => {
            // One place is empty, and moves on.
            for (comes, goes) in [(3, 0), (0, 1), (1, 2)] {
                run.aim(&all).await;
                run.start(comes);
                sleep(STEP).await;
                run.aim(&[goes]).await;
                run.terminate(goes).await;
                sleep(STEP).await;
            }
        }
        Fault::Rolling => {
            for slot in all {
                run.aim(&[slot]).await;
                run.terminate(slot).await;
                run.start(slot);
                sleep(STEP).await;
            }
        }
        Fault::Broker => {
            let node = run.random.usize(1..=NODES);
            down(run, node).await;
        }
        Fault::GroupCoordinator => {
            let node = run.site.coordinator(Coordinated::Group(&run.settings.kafka.group_id));
            down(run, node).await;
        }
        Fault::TransactionCoordinator => {
            let id = run.transactional_id(victim).expect("an id of the row's choosing");
            let node = run.site.coordinator(Coordinated::TransactionalId(&id));
            down(run, node).await;
        }
        Fault::AllBrokers => {
            run.aim(&all).await;
            run.may_tear();
            run.site.cluster.run(&["kill"]);
            sleep(Duration::from_secs(30)).await;
            run.site.mend();
        }
        Fault::Resets => {
            run.aim(&all).await;
            run.may_tear();
            for _ in 0..10 {
                run.site.weather(Weather::Down);
                sleep(Duration::from_millis(run.random.u64(50..300))).await;
                run.site.weather(Weather::Clear);
                sleep(Duration::from_millis(800)).await;
            }
        }
        Fault::Cut { to_broker, to_worker } => {
            run.aim(&[victim]).await;
            run.may_tear();
            run.site.links[victim].set(Weather::Held { to_broker, to_worker });
            sleep(LONG).await;
            run.site.links[victim].set(Weather::Clear);
        }
        Fault::Slow => weather(run, Weather::Delayed(Duration::from_millis(500))).await,
        Fault::TransactionRequests => weather(run, Weather::RequestsHeld(TRANSACTION_REQUESTS)).await,
        Fault::TransactionAnswers => weather(run, Weather::AnswersHeld(END_OF_TRANSACTION)).await,
        Fault::Output => {
            run.aim(&all).await;
            run.may_tear();
            // One copy is missing, which this topic alone does not forgive.
            let topic = run.settings.kafka.captions_topic.clone();
            let node = run.random.usize(1..=NODES);
            run.site.copies_before_acknowledging(&topic, NODES).await;
            run.site.cluster.kill(node);
            sleep(2 * STEP).await;
            run.site.cluster.restart(node);
            run.site.until_copied(&topic, NODES).await;
            // Not before: Kafka 4.4 would remember the node as one of this topic's eligible leaders for ever, and refuse it
            // at its next start after the topic is removed.
            run.site.copies_before_acknowledging(&topic, 2).await;
        }
        Fault::Pause => {
            run.aim(&all).await;
            run.post("/admin/pause").await;
            sleep(MAX_POLL + STEP).await;
            run.post("/admin/resume").await;
        }
    }
}

async fn down(run: &mut Run<'_>, node: usize) {
    let all: Vec<_> = (0..WORKERS).collect();
    run.aim(&all).await;
    run.may_tear();
    run.site.cluster.kill(node);
    sleep(STEP).await;
    run.site.cluster.restart(node);
}

async fn weather(run: &mut Run<'_>, weather: Weather) {
    let all: Vec<_> = (0..WORKERS).collect();
    run.aim(&all).await;
    run.may_tear();
    run.site.weather(weather);
    sleep(LONG).await;
    run.site.weather(Weather::Clear);
}

impl Modes {
    /// Whether a mode is among them.
    pub fn has(self, mode: blipstream::settings::Delivery) -> bool {
        use blipstream::settings::Delivery::{AtLeastOnce, ExactlyOnce};
        match self {
            Self::Neither => false,
            Self::AtLeastOnce => mode == AtLeastOnce,
            Self::ExactlyOnce => mode == ExactlyOnce,
            Self::Both => true,
        }
    }
}

impl std::fmt::Display for Evidence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in flight", self.in_flight)?;
        let counts = [
            (self.rebalances, "rebalances"),
            (self.aborts, "aborts"),
            (self.fences, "fences"),
            (self.refusals, "refusals"),
        ];
        for (count, name) in counts.iter().filter(|(count, _)| *count > 0) {
            write!(f, ", {count} {name}")?;
        }
        write!(f, ", {:.1} s without a result", self.stall.as_secs_f64())?;
        if self.caption_stall > self.stall + Duration::from_secs(1) {
            write!(f, ", {:.1} s without a caption", self.caption_stall.as_secs_f64())?;
        }
        Ok(())
    }
}
