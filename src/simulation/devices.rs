//! Devices, a queue, and what happens to the images.

#![allow(clippy::unchecked_time_subtraction)] // what would underflow is a bug that should be seen

use std::collections::VecDeque;
use std::time::Duration;

use super::Curve;
use crate::metrics::Flush;
use crate::stage::batch::{Decision, Sight, Take};

/// When a free device starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Policy {
    /// When its batch is full, or when the oldest image has waited for so long; a free device does not start before. Many
    /// servers have such a timer before their devices.
    Timer(Duration),
    /// As [`Take::decide`] says, with a `linger` of so much. With `deadlines` every image is due a latency goal after it
    /// arrived, and a device that lingers looks at that.
    Pulling {
        /// How long a free device waits for a fuller batch.
        linger: Duration,
        /// Whether it looks at deadlines.
        deadlines: bool,
    },
}

impl Policy {
    /// A free device takes what is there: the worker's default.
    pub const AT_ONCE: Self = Self::Pulling { linger: Duration::ZERO, deadlines: false };
}

/// What is simulated.
#[derive(Clone, Copy, Debug)]
pub struct Scenario<'a> {
    /// One curve a device, of at least one.
    pub devices: &'a [Curve],
    /// The largest batch of each.
    pub sizes: &'a [usize],
    /// How they take their batches.
    pub policy: Policy,
    /// When images arrive, in order.
    pub arrivals: &'a [Duration],
    /// Within what time an image should be done.
    pub goal: Duration,
}

/// What became of the images.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Images a second, from the first arrival to the last caption.
    pub throughput: f64,
    /// Those of them that were done within the goal.
    pub goodput: f64,
    /// Time from arrival to caption that half of the images take at most.
    pub p50: Duration,
    /// The same, 99 of 100.
    pub p99: Duration,
    /// Share of the time in which devices were at work.
    pub busy: f64,
    /// Images of a batch, on average.
    pub batch: f64,
    /// Time that devices were free while images waited, all devices together.
    pub idle: Duration,
    /// How many images each device captioned.
    pub shares: Vec<usize>,
}

#[derive(Clone, Default)]
struct Device {
    /// The end of its batch, and when the batch's images arrived.
    work: Option<(Duration, Vec<Duration>)>,
    /// Since when it waits for a fuller batch.
    since: Option<Duration>,
    /// When it stops to wait, without anything happening.
    wakes: Option<Duration>,
    /// How long its last batch took.
    last: Option<Duration>,
    worked: Duration,
    images: usize,
}

impl Scenario<'_> {
    /// Runs it until every image has its caption.
    pub fn run(&self) -> Outcome {
        let mut devices = vec![Device::default(); self.devices.len()];
        let mut coming = self.arrivals.iter().copied().peekable();
        let mut queue: VecDeque<Duration> = VecDeque::new();
        let mut latencies = Vec::with_capacity(self.arrivals.len());
        let (mut now, mut idle, mut batches) = (Duration::ZERO, Duration::ZERO, 0);
        // Which of several free devices comes first: the one after the last that took a batch.
        let mut turn = 0;
        loop {
            let ends = devices.iter().filter_map(|device| device.work.as_ref().map(|(end, _)| *end));
            let wakes = devices.iter().filter_map(|device| device.wakes);
            let Some(next) = coming.peek().copied().into_iter().chain(ends).chain(wakes).min() else { break };
            if !queue.is_empty() {
                let free = devices.iter().filter(|device| device.work.is_none()).count();
                idle += (next - now) * free as u32;
            }
            now = next;
            while let Some(arrived) = coming.next_if(|arrived| *arrived <= now) {
                queue.push_back(arrived);
            }
            for device in &mut devices {
                if let Some((_, images)) = device.work.take_if(|(end, _)| *end <= now) {
                    device.images += images.len();
                    latencies.extend(images.into_iter().map(|arrived| now - arrived));
                }
            }
            let first = turn;
            for offset in 0..devices.len() {
                let index = (first + offset) % self.devices.len();
                let device = &mut devices[index];
                if device.work.is_none() {
                    self.look(index, device, &mut queue, now);
                    if device.work.is_some() {
                        batches += 1;
                        turn = index + 1;
                    }
                }
            }
        }
        self.outcome(&devices, latencies, now, idle, batches)
    }

    /// What a free device does now.
    fn look(&self, index: usize, device: &mut Device, queue: &mut VecDeque<Duration>, now: Duration) {
        let (curve, max) = (&self.devices[index], self.sizes[index].max(1));
        device.wakes = None;
        if queue.is_empty() {
            device.since = None;
            return;
        }
        let since = *device.since.get_or_insert(now);
        match self.decide(queue, max, Take::work_after(device.last), now, now - since) {
            Decision::Start(_) => {
                let images: Vec<_> = queue.drain(..max.min(queue.len())).collect();
                let took = curve.time(images.len());
                device.since = None;
                device.worked += took;
                device.last = Some(took);
                device.work = Some((now + took, images));
            }
            Decision::Wait(left) => device.wakes = Some(now + left),
            Decision::Sleep => {}
        }
    }

    fn decide(
        &self,
        queue: &VecDeque<Duration>,
        max: usize,
        work: Duration,
        now: Duration,
        waited: Duration,
    ) -> Decision {
        let Some(oldest) = queue.front().map(|arrived| now - *arrived) else { return Decision::Sleep };
        match self.policy {
            Policy::Timer(_) if queue.len() >= max => Decision::Start(Flush::Full),
            Policy::Timer(timer) if oldest >= timer => Decision::Start(Flush::Linger),
            Policy::Timer(timer) => Decision::Wait(timer - oldest),
            Policy::Pulling { linger, deadlines } => {
                let due_in = deadlines.then(|| self.goal.saturating_sub(oldest));
                let take = Take { max, linger, work };
                take.decide(&Sight { items: queue.len(), capacity: usize::MAX, waited, due_in, closed: false })
            }
        }
    }

    fn outcome(
        &self,
        devices: &[Device],
        mut latencies: Vec<Duration>,
        end: Duration,
        idle: Duration,
        batches: usize,
    ) -> Outcome {
        let seconds = (end - self.arrivals.first().copied().unwrap_or_default()).as_secs_f64().max(f64::EPSILON);
        latencies.sort_unstable();
        let images = latencies.len();
        let at =
            |percent: usize| latencies.get((images * percent).div_ceil(100).max(1) - 1).copied().unwrap_or_default();
        let in_time = latencies.partition_point(|latency| *latency <= self.goal);
        let worked: f64 = devices.iter().map(|device| device.worked.as_secs_f64()).sum();
        Outcome {
            throughput: images as f64 / seconds,
            goodput: in_time as f64 / seconds,
            p50: at(50),
            p99: at(99),
            busy: worked / (seconds * devices.len().max(1) as f64),
            batch: images as f64 / batches.max(1) as f64,
            idle,
            shares: devices.iter().map(|device| device.images).collect(),
        }
    }
}
