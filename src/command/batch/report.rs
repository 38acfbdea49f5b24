//! What came of a job, counted.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use indicatif::{HumanCount, HumanDuration};
use jiff::Timestamp;
use serde::Serialize;

use super::journal::Ended;

/// Most points of the rate over time.
const POINTS: usize = 60;

/// The report of a job; `FILE.report.json` is it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Version of the program.
    pub version: String,
    /// Who captioned.
    pub model: String,
    /// Where the rows are; `None` where no rows were asked for.
    pub output: Option<String>,
    pub rows: u64,
    pub captioned: u64,
    pub failed: u64,
    /// Failed rows by code.
    pub errors: BTreeMap<String, u64>,
    /// Rows that were done before the last run began.
    pub resumed: u64,
    /// Tries beyond the first of each row.
    pub retries: u64,
    /// Seconds of work, over all runs, without the loading of models.
    pub seconds: f64,
    pub images_per_second: f64,
    /// Rows a second, over time.
    pub rate: Vec<Rate>,
    /// Lengths of the captions in tokens.
    pub tokens: Lengths,
    /// And in characters.
    pub characters: Lengths,
    pub finished_at: Timestamp,
}

/// Rows a second in a stretch of time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    /// Where it ends, in seconds of work.
    pub second: f64,
    pub images_per_second: f64,
}

/// How long captions are.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Lengths {
    pub mean: f64,
    pub least: u64,
    pub p10: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub most: u64,
    /// How many captions have each length.
    pub histogram: BTreeMap<u64, u64>,
}

impl Lengths {
    fn of(histogram: BTreeMap<u64, u64>) -> Self {
        let count: u64 = histogram.values().sum();
        if count == 0 {
            return Self::default();
        }
        // The least length that this share of the captions does not exceed.
        let quantile = |percent: u64| {
            let rank = (count * percent).div_ceil(100).max(1);
            let mut seen = 0;
            let reached = histogram.iter().find(|(_, count)| {
                seen += **count;
                seen >= rank
            });
            reached.map_or(0, |(length, _)| *length)
        };
        let sum: u64 = histogram.iter().map(|(length, count)| length * count).sum();
        Self {
            mean: sum as f64 / count as f64,
            least: quantile(0),
            p10: quantile(10),
            p50: quantile(50),
            p90: quantile(90),
            p99: quantile(99),
            most: quantile(100),
            histogram,
        }
    }
}

/// Counts rows on their way into the output.
#[derive(Debug)]
pub struct Counter {
    seconds: f64,
    captioned: u64,
    errors: BTreeMap<String, u64>,
    retries: u64,
    points: Vec<u64>,
    tokens: BTreeMap<u64, u64>,
    characters: BTreeMap<u64, u64>,
}

impl Counter {
    /// For rows that took so many seconds together.
    pub fn new(seconds: f64) -> Self {
        let points = (seconds.ceil() as usize).clamp(1, POINTS);
        Self {
            seconds: seconds.max(1e-3),
            captioned: 0,
            errors: BTreeMap::new(),
            retries: 0,
            points: vec![0; points],
            tokens: BTreeMap::new(),
            characters: BTreeMap::new(),
        }
    }

    /// Counts a row.
    pub fn add(&mut self, row: &Ended) {
        self.retries += u64::from(row.tries.saturating_sub(1));
        let last = self.points.len() - 1;
        let point = (row.second / self.seconds * self.points.len() as f64) as usize;
        self.points[point.min(last)] += 1;
        if let Some(caption) = &row.caption {
            self.captioned += 1;
            *self.characters.entry(caption.text.chars().count() as u64).or_default() += 1;
            if let Some(tokens) = caption.tokens {
                *self.tokens.entry(tokens).or_default() += 1;
            }
        }
        if let Some(error) = &row.error {
            *self.errors.entry(error.code.clone()).or_default() += 1;
        }
    }

    /// The report of all rows; `resumed` of them were done before the last run.
    pub fn report(self, model: &str, output: Option<String>, resumed: u64) -> Report {
        let failed: u64 = self.errors.values().sum();
        let rows = self.captioned + failed;
        let stretch = self.seconds / self.points.len() as f64;
        let rate = |(at, rows): (usize, &u64)| Rate {
            second: round((at + 1) as f64 * stretch),
            images_per_second: round(*rows as f64 / stretch),
        };
        Report {
            version: env!("CARGO_PKG_VERSION").into(),
            model: model.into(),
            output,
            rows,
            captioned: self.captioned,
            failed,
            errors: self.errors,
            resumed,
            retries: self.retries,
            seconds: round(self.seconds),
            images_per_second: round(rows as f64 / self.seconds),
            rate: self.points.iter().enumerate().map(rate).collect(),
            tokens: Lengths::of(self.tokens),
            characters: Lengths::of(self.characters),
            finished_at: Timestamp::now(),
        }
    }
}

fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

impl Report {
    /// The report in a few lines, for people.
    pub fn summary(&self) -> String {
        let count = HumanCount;
        let mut text = format!(
            "{} {}: {} captioned, {} failed; {:.1} images/s, {}",
            count(self.rows),
            if self.rows == 1 { "row" } else { "rows" },
            count(self.captioned),
            count(self.failed),
            self.images_per_second,
            HumanDuration(std::time::Duration::from_secs_f64(self.seconds)),
        );
        if self.resumed > 0 {
            let _ = write!(text, "; {} of them in earlier runs", count(self.resumed));
        }
        if self.retries > 0 {
            let _ = write!(text, "; {} retries", count(self.retries));
        }
        let mut errors: Vec<_> = self.errors.iter().collect();
        errors.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (code, failed) in errors {
            let _ = write!(text, "\n  {code}: {}", count(*failed));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::cells::Cells;
    use super::super::journal::{Caption, Failed};
    use super::*;

    fn row(second: f64, tries: u32, result: Result<(&str, u64), &str>) -> Ended {
        let caption =
            result.ok().map(|(text, tokens)| Caption { text: text.into(), tokens: Some(tokens), ..Caption::default() });
        let error = result.err().map(|code| Failed { code: code.into(), message: String::new() });
        Ended { row: 0, place: String::new(), second, tries, cells: Cells::default(), caption, error }
    }

    #[test]
    fn rows_errors_retries_and_rates_add_up() {
        let mut counter = Counter::new(4.0);
        for row in [
            row(0.5, 1, Ok(("dog", 2))),
            row(0.9, 3, Ok(("bücher", 4))),
            row(3.9, 2, Err("dns")),
            row(4.0, 1, Err("http_5xx")),
        ] {
            counter.add(&row);
        }
        let report = counter.report("demo", None, 1);
        assert_eq!((report.rows, report.captioned, report.failed, report.retries), (4, 2, 2, 3));
        let rates: Vec<_> = report.rate.iter().map(|rate| (rate.second, rate.images_per_second)).collect();
        assert_eq!(rates, [(1.0, 2.0), (2.0, 0.0), (3.0, 0.0), (4.0, 2.0)]);
        assert_eq!((report.tokens.p50, report.characters.most, report.characters.mean), (2, 6, 4.5));
        let summary = report.summary();
        assert!(summary.starts_with("4 rows: 2 captioned, 2 failed; 1.0 images/s, 4 seconds"), "{summary}");
        assert!(summary.ends_with("  dns: 1\n  http_5xx: 1"), "{summary}");
    }

    #[test]
    fn quantiles_are_lengths_that_occur() {
        let lengths = Lengths::of(BTreeMap::from([(5, 50), (9, 49), (40, 1)]));
        let Lengths { least, p10, p50, p90, p99, most, .. } = lengths;
        assert_eq!([least, p10, p50, p90, p99, most], [5, 5, 5, 9, 9, 40]);
        assert_eq!(Lengths::of(BTreeMap::new()), Lengths::default());
    }
}
