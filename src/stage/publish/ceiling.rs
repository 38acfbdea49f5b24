//! The ceiling on dead letters: those whose reason is not the input's are written no faster than is allowed.
//!
//! Stands before the publisher, of either delivery. What is over the ceiling is held here, consumption pauses, and the
//! held ones are written in their time. Then a few messages are let through as a probe, and when most of them are well
//! the gate opens.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};
use tokio_util::sync::CancellationToken;

use super::record;
use crate::disposition::Code;
use crate::gate::{Gate, Reason};
use crate::offsets::Outcome;
use crate::settings::Kafka;
use crate::stage::{Finished, Output};

/// So many seconds' worth of dead letters may be written at once.
const BURST: f64 = 10.0;
/// Messages in flight while it is tried whether the trouble is over, and results that decide about it.
const PROBES: usize = 8;
/// Wait before the first such try; it doubles from there.
const FIRST_WAIT: Duration = Duration::from_secs(5);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// How fast dead letters may be written, and what is shut when they come faster.
#[derive(Debug, Clone, Default)]
pub struct DeadLetters {
    /// So many a minute, of those whose reason is not the input's; 0 for no ceiling.
    pub per_minute: u32,
    /// The gate before the consumer.
    pub gate: Gate,
}

/// What became of an image, as far as the ceiling is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// A caption, or a failure that is the input's.
    Well,
    /// A record for a retry topic.
    Retry,
    /// A dead letter whose reason is not the input's.
    Dead(Code),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Open,
    /// Nothing is consumed; tries again when nothing is held, but not before this time.
    Shut {
        until: Instant,
    },
    /// A few messages are let through.
    Probing {
        well: usize,
        badly: usize,
    },
}

/// A token bucket with a gate that follows it. Pure: takes `now`.
#[derive(Debug)]
struct Ceiling {
    per_second: f64,
    /// Dead letters that may be written at once.
    tokens: f64,
    filled: Instant,
    state: State,
    wait: Duration,
}

impl Ceiling {
    fn new(per_minute: u32, now: Instant) -> Self {
        let per_second = f64::from(per_minute) / 60.0;
        let mut ceiling = Self { per_second, tokens: 0.0, filled: now, state: State::Open, wait: FIRST_WAIT };
        ceiling.tokens = ceiling.burst();
        ceiling
    }

    fn burst(&self) -> f64 {
        (self.per_second * BURST).max(1.0)
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        (self.tokens, self.filled) = ((self.tokens + passed * self.per_second).min(self.burst()), now);
    }

    /// Takes leave for one dead letter, if there is some.
    fn take(&mut self, now: Instant) -> bool {
        self.fill(now);
        let may = self.tokens >= 1.0;
        self.tokens -= f64::from(u8::from(may));
        may
    }

    /// Notes an end, while as many others are held. Whether it may pass now; if not, the gate is to be shut.
    fn ended(&mut self, ended: Ended, held: usize, now: Instant) -> bool {
        let passes = !matches!(ended, Ended::Dead(_)) || (held == 0 && self.take(now));
        match &mut self.state {
            State::Open | State::Probing { .. } if !passes => self.shut(now),
            State::Probing { well, .. } if ended == Ended::Well => *well += 1,
            State::Probing { badly, .. } => *badly += 1,
            State::Open | State::Shut { .. } => {}
        }
        if let State::Probing { well, badly } = self.state
            && well + badly >= PROBES
        {
            if well > badly {
                (self.state, self.wait) = (State::Open, FIRST_WAIT);
            } else {
                self.shut(now);
            }
        }
        passes
    }

    fn shut(&mut self, now: Instant) {
        self.state = State::Shut { until: now + self.wait };
        self.wait = self.wait.saturating_mul(2).min(LONGEST_WAIT);
    }

    /// Goes on to probes when it is time, with so many held.
    fn advance(&mut self, held: usize, now: Instant) {
        if let State::Shut { until } = self.state
            && held == 0
            && until <= now
        {
            self.state = State::Probing { well: 0, badly: 0 };
        }
    }

    /// When there is something to do, with so many held.
    fn due(&self, held: usize, now: Instant) -> Option<Instant> {
        match self.state {
            _ if held > 0 => {
                let missing = (1.0 - self.tokens).max(0.0) / self.per_second;
                Some(self.filled.max(now) + Duration::from_secs_f64(missing))
            }
            State::Shut { until } => Some(until),
            State::Open | State::Probing { .. } => None,
        }
    }

    /// Messages that may be in flight.
    fn limit(&self) -> Option<usize> {
        match self.state {
            State::Open => None,
            State::Shut { .. } => Some(0),
            State::Probing { .. } => Some(PROBES),
        }
    }
}

/// What stands before the publisher.
pub(super) struct Before {
    pub(super) dead_letters: DeadLetters,
    pub(super) kafka: Kafka,
    pub(super) worker: String,
    pub(super) input: Receiver<Finished>,
    pub(super) output: Sender<Finished>,
    pub(super) give_up: CancellationToken,
}

impl Before {
    /// Runs until the input is closed. What is held then, or at the deadline of a drain, is given up: the next worker
    /// reads its messages again.
    pub(super) async fn run(self) {
        let mut ceiling = Ceiling::new(self.dead_letters.per_minute, Instant::now());
        let mut held: VecDeque<Finished> = VecDeque::new();
        loop {
            let now = Instant::now();
            while let Some(current) = held.front().map(Finished::current) {
                if current && !ceiling.take(now) {
                    break;
                }
                match held.pop_front() {
                    Some(finished) if current => self.pass(finished).await,
                    // Another worker has its message now, and judges for itself.
                    Some(finished) => drop(finished.resolve(Outcome::Discarded)),
                    None => {}
                }
            }
            let before = ceiling.state;
            ceiling.advance(held.len(), now);
            self.follow(before, &ceiling);
            let due = ceiling.due(held.len(), now);
            tokio::select! {
                biased;
                () = self.give_up.cancelled() => break,
                taken = self.input.recv() => match taken {
                    // It says nothing of an image that its caption has not said.
                    Ok(finished) if matches!(finished.value, Output::Canary { .. }) => self.pass(finished).await,
                    Ok(mut finished) => {
                        let (now, before, end) = (Instant::now(), ceiling.state, self.end_of(&finished.value));
                        let passes = ceiling.ended(end, held.len(), now);
                        self.tell(before, &ceiling, end);
                        if passes {
                            self.pass(finished).await;
                        } else {
                            // What the image needed is not needed while its dead letter waits.
                            finished.release_image();
                            held.push_back(finished);
                        }
                    }
                    Err(_) => break,
                },
                () = tokio::time::sleep_until(due.unwrap_or(now).into()), if due.is_some() => {}
            }
        }
        if !held.is_empty() {
            tracing::warn!(
                held = held.len(),
                "dead letters over flow.max_dead_letters_per_minute are given up with the end of the worker; the next \
                 one reads their messages again"
            );
        }
        for finished in held {
            finished.abandon();
        }
        while let Ok(finished) = self.input.recv().await {
            self.pass(finished).await;
        }
    }

    async fn pass(&self, finished: Finished) {
        if let Err(refused) = self.output.send(finished).await {
            // The publisher has ended, and says why.
            refused.into_inner().abandon();
        }
    }

    fn end_of(&self, output: &Output) -> Ended {
        match record::code(output) {
            Some(code) if !code.is_the_inputs() => {
                if record::render_retry(output, &self.kafka, &self.worker).is_some() {
                    Ended::Retry
                } else {
                    Ended::Dead(code)
                }
            }
            _ => Ended::Well,
        }
    }

    /// Lets the gate follow a change.
    fn follow(&self, before: State, ceiling: &Ceiling) {
        if before != ceiling.state {
            self.dead_letters.gate.narrow(Reason::DeadLetters, ceiling.limit());
        }
    }

    /// The same, after an image ended, and says so.
    fn tell(&self, before: State, ceiling: &Ceiling, end: Ended) {
        self.follow(before, ceiling);
        let allowed = self.dead_letters.per_minute;
        match (before, ceiling.state) {
            (State::Open, State::Shut { .. }) => {
                let code = if let Ended::Dead(code) = end { code.as_str() } else { "" };
                tracing::warn!(
                    allowed_a_minute = allowed,
                    latest = code,
                    "dead letters come faster than flow.max_dead_letters_per_minute allows, for reasons that are not the \
                     input's: consumption pauses, and the rest is written in its time. See what fails: `blipstream dlq \
                     ls --since 10m --count-by code`, then --count-by host"
                );
            }
            (State::Probing { .. }, State::Shut { .. }) => {
                tracing::warn!(allowed_a_minute = allowed, "most images still fail: consumption pauses again");
            }
            (State::Probing { .. }, State::Open) => {
                tracing::info!(allowed_a_minute = allowed, "most images are well again: consumption goes on");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEAD: Ended = Ended::Dead(Code::Http5xx);

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn dead_letters_under_the_ceiling_pass_and_the_gate_stays_open() {
        let start = Instant::now();
        let mut ceiling = Ceiling::new(60, start);
        for second in 0..300 {
            assert!(ceiling.ended(DEAD, 0, start + seconds(f64::from(second))));
        }
        assert_eq!(ceiling.limit(), None);
    }

    #[test]
    fn over_the_ceiling_the_gate_is_shut_then_a_few_pass_and_good_ones_open_it() {
        let start = Instant::now();
        let mut ceiling = Ceiling::new(60, start);
        let passed = (0..15).filter(|_| ceiling.ended(DEAD, 0, start)).count();
        assert_eq!((passed, ceiling.limit()), (10, Some(0)));
        let later = start + FIRST_WAIT;
        ceiling.advance(3, later);
        assert_eq!(ceiling.limit(), Some(0), "what is held goes first");
        ceiling.advance(0, later);
        assert_eq!(ceiling.limit(), Some(PROBES));
        for _ in 0..PROBES {
            assert_eq!(ceiling.limit(), Some(PROBES));
            ceiling.ended(Ended::Well, 0, later);
        }
        assert_eq!(ceiling.limit(), None);
    }

    #[test]
    fn a_trouble_that_lasts_is_probed_less_and_less_often() {
        let mut now = Instant::now();
        let mut ceiling = Ceiling::new(600, now);
        (0..101).for_each(|_| _ = ceiling.ended(DEAD, 0, now));
        let mut waits = Vec::new();
        for _ in 0..6 {
            let due = ceiling.due(0, now).expect("a next try");
            waits.push((due - now).as_secs());
            now = due;
            ceiling.advance(0, now);
            assert_eq!(ceiling.limit(), Some(PROBES));
            (0..PROBES).for_each(|_| _ = ceiling.ended(Ended::Retry, 0, now));
            assert_eq!(ceiling.limit(), Some(0));
        }
        assert_eq!(waits, [5, 10, 20, 40, 60, 60]);
    }

    proptest! {
        #[test]
        fn nothing_is_written_faster_than_the_ceiling_and_everything_that_is_held_is_written(
            per_minute in 1u32..600, ends in proptest::collection::vec((0u64..2_000, 0u8..3), 1..300)
        ) {
            let start = Instant::now();
            let mut ceiling = Ceiling::new(per_minute, start);
            let (mut now, mut held, mut written) = (start, 0usize, Vec::new());
            let mut dead = 0;
            for (after, kind) in ends {
                now += Duration::from_millis(after);
                while held > 0 && ceiling.take(now) {
                    held -= 1;
                    written.push(now);
                }
                ceiling.advance(held, now);
                let end = [Ended::Well, Ended::Retry, DEAD][kind as usize];
                let passes = ceiling.ended(end, held, now);
                if end == DEAD {
                    dead += 1;
                    if passes { written.push(now) } else { held += 1 }
                } else {
                    prop_assert!(passes);
                }
                prop_assert!(held == 0 || ceiling.limit() == Some(0), "held, and yet more is consumed");
            }
            while held > 0 {
                now = ceiling.due(held, now).unwrap() + Duration::from_micros(1);
                prop_assert!(ceiling.take(now));
                held -= 1;
                written.push(now);
            }
            prop_assert_eq!(written.len(), dead);
            let per_second = f64::from(per_minute) / 60.0;
            for (index, from) in written.iter().enumerate() {
                for (count, to) in written[index..].iter().enumerate() {
                    let allowed = (per_second * BURST).max(1.0) + per_second * (*to - *from).as_secs_f64();
                    prop_assert!((count + 1) as f64 <= allowed + 0.01, "{} in {:?}", count + 1, *to - *from);
                }
            }
        }
    }
}
