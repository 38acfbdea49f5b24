//! `blipstream worker`: the pipeline with Kafka at both ends, until it is told to stop.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::serve::Ports;
use super::{Exit, models, runtime, telemetry};
use crate::config::ConfigOptions;
use crate::kafka::{self, Access};
use crate::metrics::Metrics;
use crate::pipeline::{Budget, Control, Parts, worker};
use crate::settings::{Kafka, Settings};

/// How long the brokers may take to answer before that is told.
const TRY: Duration = Duration::from_secs(10);
/// Wait between two tries to reach them.
const PAUSE: Duration = Duration::from_millis(500);
/// A topic may have been made a moment ago.
const SETTLE: Duration = Duration::from_secs(3);

/// Arguments of `worker`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  blipstream worker --config blipstream.toml
  BLIPSTREAM_KAFKA__BOOTSTRAP_SERVERS=broker:9092 blipstream worker --set model.source=demo

SIGTERM or SIGINT drains: consumption stops, what is in flight is captioned and published within flow.drain_timeout, \
what is published is committed, and the group is left. However much hangs, the process ends within flow.drain_timeout \
and 13 seconds more: give the orchestrator's grace period that much. Exit code 1 says that something was unfinished. A \
second signal stops at once; what was in flight is read again by the next worker.")]
pub struct WorkerArgs {
    /// How long an image may take, e.g. 250ms: bounds the batch size that is found at warm-up (batch.latency_goal)
    #[arg(long, value_name = "TIME")]
    latency_goal: Option<String>,
    #[command(flatten)]
    config: ConfigOptions,
}

/// Runs the command.
pub fn run(mut args: WorkerArgs) -> anyhow::Result<Exit> {
    args.config.set.extend(args.latency_goal.map(|goal| format!("batch.latency_goal={goal}")));
    let loaded = args.config.load()?;
    telemetry::init(&loaded.settings.log)?;
    for warning in loaded.warnings() {
        tracing::warn!("{warning}");
    }
    serve(loaded.settings, |settings| {
        models::load_for_stream(settings).and_then(|model| models::parts(settings, model))
    })
}

/// Runs a worker on whatever `load` brings, until it is told to stop. The fault tests bring a fake captioner.
///
/// # Errors
/// See [`worker::run`]; or `load` failed, or the admin port is taken, or the brokers refuse what a worker needs.
pub fn serve(
    settings: Settings,
    load: impl FnOnce(&Settings) -> anyhow::Result<Parts> + Send + 'static,
) -> anyhow::Result<Exit> {
    let runtime = runtime()?;
    let exit = runtime.block_on(work(settings, load));
    // Threads that outlive the drain deadline hold nothing that is committed; they end with the process.
    runtime.shutdown_background();
    exit
}

async fn work(
    settings: Settings,
    load: impl FnOnce(&Settings) -> anyhow::Result<Parts> + Send + 'static,
) -> anyhow::Result<Exit> {
    let endpoint = settings.endpoint.listen.is_some().then_some(&settings.endpoint);
    let budget = Budget::new(&settings.flow);
    let budget = endpoint.map_or(budget.clone(), |endpoint| budget.with_endpoint(endpoint.share));
    let control = Control::with_budget(budget, Arc::new(Metrics::new()));
    drain_on_signal(&control)?;
    let ports = Ports::open(&settings, endpoint, &control).await?;
    let loading = {
        let settings = settings.clone();
        tokio::task::spawn_blocking(move || load(&settings))
    };
    let looking = {
        let (kafka, stop) = (settings.kafka.clone(), control.draining().clone());
        tokio::task::spawn_blocking(move || look_for_brokers(&kafka, &stop))
    };
    let ready = async {
        let parts = async { loading.await.context("loading the model panicked")? };
        let granted = async { anyhow::Ok(looking.await.context("looking for the brokers panicked")??) };
        // The first that fails ends the wait for the other.
        tokio::try_join!(parts, granted)
    };
    let (parts, ()) = tokio::select! {
        biased; // a signal counts more than a model that is loaded in the same moment
        () = control.draining().cancelled() => return Ok(Exit::Done),
        ready = ready => ready?,
    };
    let summary = worker::run(&settings, parts, &control).await?;
    ports.close().await;
    tracing::info!(
        captions = summary.totals.captions,
        dead_letters = summary.totals.dead_letters,
        unfinished = summary.unfinished,
        "stopped"
    );
    Ok(if summary.clean() { Exit::Done } else { Exit::Failed })
}

/// Waits for the brokers, and looks before anything is consumed whether a worker may do here what it does.
///
/// # Errors
/// What a person has to change first.
fn look_for_brokers(kafka: &Kafka, stop: &CancellationToken) -> Result<(), kafka::Error> {
    let begun = Instant::now();
    loop {
        match kafka::check_access(kafka, TRY).and_then(Access::granted) {
            Ok(()) => return Ok(()),
            // Brokers learn of a new topic one after the other.
            Err(kafka::Error::UnknownTopic { .. }) if begun.elapsed() < SETTLE => {}
            Err(error) if error.lasts() => return Err(error),
            Err(error) => tracing::warn!("{error}. Nothing is consumed before that; trying again"),
        }
        if stop.is_cancelled() {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
}

/// The first SIGTERM or SIGINT drains, the second stops at once.
pub fn drain_on_signal(control: &Control) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let control = control.clone();
    tokio::spawn(async move {
        for again in [false, true] {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if again {
                tracing::warn!(signal = name, "stopping at once; what was in flight is read again by the next worker");
                super::leave_at_once(1);
            }
            tracing::info!(signal = name, "draining; a second signal stops at once");
            control.drain(name);
        }
    });
    Ok(())
}
