//! How many dead letters there are of a kind.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::io::{self, Write};

use serde_json::json;

use super::letter::Letter;
use crate::command::collect::answer::one_line;

/// Most kinds that are told apart: hosts are a stranger's, and memory is bounded.
const MAX_KINDS: usize = 100_000;

/// What they are counted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum By {
    /// Why it failed
    Code,
    /// Where the image is
    Host,
    /// Where in the flow it failed
    Stage,
    /// Which worker gave up
    Worker,
}

impl By {
    fn name(self) -> &'static str {
        match self {
            Self::Code => "code",
            Self::Host => "host",
            Self::Stage => "stage",
            Self::Worker => "worker",
        }
    }

    fn of(self, letter: &Letter) -> &str {
        match self {
            Self::Code => &letter.code,
            Self::Host => letter.host.as_deref().unwrap_or_default(),
            Self::Stage => &letter.stage,
            Self::Worker => &letter.worker,
        }
    }
}

/// Counts by kind.
pub struct Counts {
    by: By,
    kinds: HashMap<Box<str>, u64>,
    /// Those of kinds beyond [`MAX_KINDS`].
    others: u64,
    total: u64,
}

impl Counts {
    /// Nothing is counted yet.
    pub fn new(by: By) -> Self {
        Self { by, kinds: HashMap::new(), others: 0, total: 0 }
    }

    /// Counts one.
    pub fn add(&mut self, letter: &Letter) {
        self.total += 1;
        let kind = self.by.of(letter);
        if let Some(count) = self.kinds.get_mut(kind) {
            *count += 1;
        } else if self.kinds.len() < MAX_KINDS {
            self.kinds.insert(kind.into(), 1);
        } else {
            self.others += 1;
        }
    }

    /// All that were counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// A table, the most frequent first.
    pub fn write_table(&self, out: &mut impl Write) -> io::Result<()> {
        for (kind, count) in self.sorted() {
            let kind = if kind.is_empty() { "-".into() } else { one_line(kind) };
            writeln!(out, "{count:>10}  {kind}")?;
        }
        if self.others > 0 {
            writeln!(out, "{:>10}  (others: only {MAX_KINDS} are told apart)", self.others)?;
        }
        Ok(())
    }

    /// One JSON object a line: the kind, null where it is unknown, and the count.
    pub fn write_lines(&self, out: &mut impl Write) -> io::Result<()> {
        for (kind, count) in self.sorted() {
            writeln!(out, "{}", json!({(self.by.name()): Some(kind).filter(|kind| !kind.is_empty()), "count": count}))?;
        }
        if self.others > 0 {
            writeln!(out, "{}", json!({"others": true, "count": self.others}))?;
        }
        Ok(())
    }

    fn sorted(&self) -> Vec<(&str, u64)> {
        let mut all: Vec<_> = self.kinds.iter().map(|(kind, count)| (&**kind, *count)).collect();
        all.sort_unstable_by_key(|&(kind, count)| (Reverse(count), kind));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::super::letter::tests::dead;
    use super::*;
    use crate::disposition::Code;

    fn text(by: By, write: impl Fn(&Counts, &mut Vec<u8>) -> io::Result<()>) -> String {
        let mut counts = Counts::new(by);
        for (value, code) in [
            ("https://a.example/1.jpg", Code::Dns),
            ("https://b.example/1.jpg", Code::Dns),
            ("https://b.example/2.jpg", Code::Timeout),
            ("file:///a.jpg", Code::NotFound),
        ] {
            counts.add(&Letter::read(&dead(value, code, 0, None)).unwrap());
        }
        assert_eq!(counts.total(), 4);
        let mut out = Vec::new();
        write(&counts, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_most_frequent_comes_first() {
        let table = text(By::Host, Counts::write_table);
        assert_eq!(table, "         2  b.example\n         1  -\n         1  a.example\n");
        let lines = text(By::Code, Counts::write_lines);
        let expected = "{\"code\":\"dns\",\"count\":2}\n{\"code\":\"not_found\",\"count\":1}\n{\"code\":\"timeout\",\"count\":1}\n";
        assert_eq!(lines, expected);
        assert_eq!(text(By::Stage, Counts::write_table), "         4  fetch\n");
        assert_eq!(text(By::Worker, Counts::write_table), "         4  worker-1\n");
    }

    #[test]
    fn kinds_without_end_are_counted_within_bounds() {
        let letter = Letter::read(&dead("https://a.example/1.jpg", Code::Dns, 0, None)).unwrap();
        let mut counts = Counts::new(By::Host);
        for n in 0..MAX_KINDS + 5 {
            counts.add(&Letter { host: Some(n.to_string()), ..letter.clone() });
        }
        assert_eq!((counts.kinds.len(), counts.others, counts.total()), (MAX_KINDS, 5, MAX_KINDS as u64 + 5));
    }
}
