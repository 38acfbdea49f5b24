//! A simulation of devices that pull batches from one queue: what a policy makes of a load, before anybody buys a GPU.
//!
//! Time is simulated event by event, and nothing waits. Ours are decided by [`Take::decide`], the very code of the
//! queue; a timer before the devices, as other servers have one, stands beside it for comparison.
//!
//! [`Take::decide`]: crate::stage::batch::Take::decide

mod arrivals;
mod curve;
mod devices;

use std::time::Duration;

pub use arrivals::Arrivals;
pub use curve::{Curve, CurveError};
pub use devices::{Outcome, Policy, Scenario};

/// What devices make together, each in full batches of its size, in images a second.
pub fn full_rate(devices: &[Curve], sizes: &[usize]) -> f64 {
    devices.iter().zip(sizes).map(|(curve, size)| curve.rate(*size)).sum()
}

/// The highest rate of random arrivals, in images a second, at which 99 of 100 images are done within `goal` by devices
/// that take at once what is there; 0 where there is none. Found by halving, to one part in a hundred of what the devices
/// can do.
pub fn sustained(devices: &[Curve], sizes: &[usize], goal: Duration) -> f64 {
    /// Images that are simulated: the slowest hundredth is then two hundred.
    const IMAGES: usize = 20_000;
    let most = full_rate(devices, sizes);
    let holds = |rate: f64| {
        let arrivals = Arrivals::Poisson.times(rate, IMAGES, 1);
        let outcome = Scenario { devices, sizes, policy: Policy::AT_ONCE, arrivals: &arrivals, goal }.run();
        outcome.p99 <= goal
    };
    let (mut good, mut bad) = (0.0, most);
    while bad - good > most / 100.0 {
        let middle = f64::midpoint(good, bad);
        if holds(middle) { good = middle } else { bad = middle }
    }
    good
}

#[cfg(test)]
mod tests;
