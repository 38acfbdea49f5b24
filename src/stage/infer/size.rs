//! How many images a device takes at once: at most what its memory allows, and what was found best while it warmed up.

use std::time::{Duration, Instant};

use crate::caption::{self, Engine, EngineError, ErrorKind, Params, pictures};
use crate::settings;

/// No device gains from larger batches, however much memory it has.
const MOST: usize = 4096;

/// The largest batch that the decoder can remember within `model.max_state`, one row at least. Captions are taken to be as
/// long as a request may ask for.
pub fn most_rows(engine: &dyn Engine, model: &settings::Model) -> usize {
    let info = engine.model();
    let limit = model.state_limit(info.device != "cpu").as_u64();
    let tokens = model.max_new_tokens_limit.min(info.context_length);
    (1..=MOST).take_while(|rows| engine.state_bytes(*rows, tokens) as u64 <= limit).last().unwrap_or(1)
}

/// How the best batch size is found.
#[derive(Debug, Clone, Copy)]
pub struct WarmUp {
    /// The largest size tried.
    pub max: usize,
    /// Tokens generated for each picture.
    pub tokens: usize,
    /// The longest that a batch may take, if that matters.
    pub within: Option<Duration>,
    /// No further size is tried when this is spent.
    pub budget: Duration,
}

/// A batch size, and how long a batch of it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// Images.
    pub size: usize,
    /// From pixels to captions.
    pub time: Duration,
}

impl Measured {
    fn rate(self) -> f64 {
        self.size as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

/// Of some sizes, from small to large, the first that gives 95 % of the best rate of those whose batches take `within` at
/// most: beyond it a batch only adds latency. The first of all where none is so quick; none of none.
pub fn best_of(sizes: &[Measured], within: Option<Duration>) -> Option<Measured> {
    let quick = || sizes.iter().copied().filter(|size| within.is_none_or(|within| size.time <= within));
    let best = quick().map(Measured::rate).fold(0.0, f64::max);
    quick().find(|size| size.rate() >= 0.95 * best).or(sizes.first().copied())
}

/// Runs batches of 1, 2, 4, … and returns [the best of them](best_of). Stops when the time is spent, or a size no longer
/// fits into memory or the time that a batch may take.
pub fn warm_up(engine: &mut dyn Engine, plan: WarmUp) -> Result<Measured, EngineError> {
    let picture = pictures::grey(engine.model().image_size)?;
    let params = Params { max_new_tokens: plan.tokens, min_new_tokens: plan.tokens, ..Params::default() };
    let begun = Instant::now();
    // The first batch pays for allocations and page faults.
    caption::caption(engine, &[(picture.clone(), Params { max_new_tokens: 1, ..Params::default() })])?;
    let mut sizes = Vec::new();
    let mut size = 1;
    while size <= plan.max.max(1) {
        let items = vec![(picture.clone(), params.clone()); size];
        let started = Instant::now();
        match caption::caption(engine, &items) {
            Ok(_) => sizes.push(Measured { size, time: started.elapsed() }),
            Err(error) if error.kind() == ErrorKind::OutOfMemory && size > 1 => break,
            Err(error) => return Err(error),
        }
        let time = started.elapsed();
        // The next size takes about twice as long as this one.
        if begun.elapsed() + time * 2 > plan.budget || plan.within.is_some_and(|within| time > within) {
            break;
        }
        size *= 2;
    }
    engine.take_phases();
    Ok(best_of(&sizes, plan.within).expect("the first size was measured, or its failure was returned"))
}

#[cfg(test)]
mod tests {
    use bytesize::ByteSize;

    use super::*;
    use crate::caption::fake::{FakeEngine, FakeOptions};

    #[test]
    fn the_smallest_size_near_the_best_rate_is_taken_of_those_that_are_quick_enough() {
        let sizes = [(1, 20), (2, 24), (4, 40), (8, 79), (16, 158)]
            .map(|(size, ms)| Measured { size, time: Duration::from_millis(ms) });
        let best = |within: Option<u64>| best_of(&sizes, within.map(Duration::from_millis)).map(|best| best.size);
        assert_eq!(best(None), Some(4), "8 and 16 are hardly faster");
        assert_eq!(best(Some(40)), Some(4));
        assert_eq!(best(Some(39)), Some(2));
        assert_eq!(best(Some(1)), Some(1), "none is quick enough");
        assert_eq!(best_of(&[], None), None);
    }

    #[test]
    fn a_warm_up_ends_where_memory_or_time_does() {
        let tried = |memory_for: usize, within: Option<Duration>| {
            let encode_delay = Duration::from_millis(2);
            let mut engine = FakeEngine::new(FakeOptions { encode_delay, memory_for, ..FakeOptions::default() });
            let plan = WarmUp { max: 16, tokens: 1, within, budget: Duration::from_secs(60) };
            let size = warm_up(&mut engine, plan).unwrap().size;
            (size, engine.encode_calls())
        };
        // One call before the sizes.
        assert_eq!(tried(usize::MAX, None).1, 1 + 5);
        let (size, calls) = tried(5, None);
        assert!(size <= 4 && calls == 1 + 4, "{size}, {calls}");
        assert_eq!(tried(usize::MAX, Some(Duration::from_millis(1))), (1, 1 + 1));
    }

    #[test]
    fn a_batch_is_no_larger_than_its_memory_and_no_smaller_than_a_row() {
        let most = |row_bytes: usize, max_state: Option<ByteSize>| {
            let engine = FakeEngine::new(FakeOptions { row_bytes, ..FakeOptions::default() });
            most_rows(&engine, &settings::Model { max_state, ..settings::Model::default() })
        };
        assert_eq!(most(1000, Some(ByteSize::b(10_000))), 10);
        assert_eq!(most(1000, Some(ByteSize::b(9_999))), 9);
        assert_eq!(most(1000, Some(ByteSize::b(1))), 1);
        // By default a gibibyte on a CPU.
        assert_eq!(most(64 << 20, None), 16);
        assert_eq!(most(0, None), MOST);
    }
}
