//! The flow without a stream: only rows that are answered directly.

use std::time::Duration;

use anyhow::Context;
use tokio::time::{MissedTickBehavior, interval};

use super::{Control, Core, Parts};
use crate::settings::Settings;
use crate::stage::infer::DeviceFailure;

/// How often dropped tickets are looked for.
const PULSE: Duration = Duration::from_millis(200);

/// Answers rows until [`Control::drain`], or until no device is left; what is under way is finished in both cases.
///
/// # Errors
/// The flow could not be started, no device is left, a row was lost, or the drain deadline passed.
pub async fn run(settings: &Settings, parts: Parts, control: &Control) -> anyhow::Result<()> {
    let Core { rows, finished, failures, device_failures, fetching, endpoint } = Core::start(settings, parts, control)?;
    // Nothing comes in by the stream's way.
    drop((rows, finished, failures));
    let answering = control.answer(endpoint, &settings.endpoint).context("the budget has no part for an endpoint")?;
    let mut pulse = interval(PULSE);
    pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let fault: Option<anyhow::Error> = loop {
        tokio::select! {
            biased; // a fault counts more than an order to drain: it decides the exit code
            _ = pulse.tick() => if let Some(lost) = control.take_lost() {
                break Some(anyhow::anyhow!("{lost}"));
            },
            Ok(failure) = device_failures.recv() => {
                if !control.alive() {
                    break Some(anyhow::Error::from(failure).context("no device is left"));
                }
                told(&failure);
            }
            () = control.draining().cancelled() => break None,
        }
    };
    if let Some(fault) = &fault {
        control.drain(&fault.to_string());
    }
    if let Some(endpoint) = control.endpoint() {
        endpoint.close();
    }
    let answered = tokio::time::timeout(settings.flow.drain_timeout, answering).await;
    if let Some(fault) = fault {
        return Err(fault);
    }
    answered.context("requests were not finished within flow.drain_timeout")?.context("answering panicked")?;
    fetching.await.context("the fetch stage panicked")?;
    while let Ok(failure) = device_failures.try_recv() {
        told(&failure);
    }
    Ok(())
}

fn told(failure: &DeviceFailure) {
    tracing::error!("{failure}; going on with the other devices");
}
