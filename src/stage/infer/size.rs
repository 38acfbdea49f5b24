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
    /// No further size is tried when this is spent.
    pub budget: Duration,
}

/// Runs batches of 1, 2, 4, … and returns the smallest size that reaches 95 % of the best throughput seen: beyond it
/// a batch only adds latency. Stops when the time is spent or a size no longer fits into memory.
pub fn warm_up(engine: &mut dyn Engine, plan: WarmUp) -> Result<usize, EngineError> {
    let picture = pictures::grey(engine.model().image_size)?;
    let params = Params { prompt: None, max_new_tokens: plan.tokens, min_new_tokens: plan.tokens };
    let begun = Instant::now();
    // The first batch pays for allocations and page faults.
    caption::caption(engine, &[(picture.clone(), Params { max_new_tokens: 1, ..Params::default() })])?;
    let mut rates: Vec<(usize, f64)> = Vec::new();
    let mut size = 1;
    while size <= plan.max.max(1) {
        let items = vec![(picture.clone(), params.clone()); size];
        let started = Instant::now();
        match caption::caption(engine, &items) {
            Ok(_) => rates.push((size, size as f64 / started.elapsed().as_secs_f64().max(1e-9))),
            Err(error) if error.kind() == ErrorKind::OutOfMemory && size > 1 => break,
            Err(error) => return Err(error),
        }
        // The next size takes about twice as long as this one.
        if begun.elapsed() + started.elapsed() * 2 > plan.budget {
            break;
        }
        size *= 2;
    }
    engine.take_phases();
    let best = rates.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
    Ok(rates.iter().find(|(_, rate)| *rate >= 0.95 * best).map_or(1, |(size, _)| *size))
}

#[cfg(test)]
mod tests {
    use bytesize::ByteSize;

    use super::*;
    use crate::caption::fake::{FakeEngine, FakeOptions};

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
