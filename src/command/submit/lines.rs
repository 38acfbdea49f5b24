//! Lines of a stranger's length.

use std::io::{self, BufRead, Read};

/// The lines that say something, with their numbers from 1; `#` begins a comment. A line longer than `limit` bytes, or
/// one that is not UTF-8, is an error in its place; after an error of the reader nothing more comes.
pub struct Lines<R> {
    reader: R,
    limit: u64,
    setting: &'static str,
    number: u64,
    over: bool,
}

impl<R: BufRead> Lines<R> {
    /// Lines of at most `limit` bytes, which `setting` says.
    pub fn new(reader: R, limit: u64, setting: &'static str) -> Self {
        Self { reader, limit, setting, number: 0, over: false }
    }

    /// The next line as it is; `None` at the end.
    fn line(&mut self) -> Option<io::Result<String>> {
        let mut line = Vec::new();
        // One byte more than the limit tells a line that is too long from one that is not.
        match self.reader.by_ref().take(self.limit.saturating_add(1)).read_until(b'\n', &mut line) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(error) => {
                self.over = true;
                return Some(Err(error));
            }
        }
        self.number += 1;
        if line.len() as u64 > self.limit && line.last() != Some(&b'\n') {
            if let Err(error) = self.skip_line() {
                self.over = true;
                return Some(Err(error));
            }
            let why = format!("longer than {} bytes ({})", self.limit, self.setting);
            return Some(Err(io::Error::new(io::ErrorKind::InvalidData, why)));
        }
        Some(String::from_utf8(line).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not UTF-8")))
    }

    fn skip_line(&mut self) -> io::Result<()> {
        loop {
            let buffer = self.reader.fill_buf()?;
            let end = buffer.iter().position(|byte| *byte == b'\n');
            let length = end.map_or(buffer.len(), |end| end + 1);
            self.reader.consume(length);
            if end.is_some() || length == 0 {
                return Ok(());
            }
        }
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = (u64, io::Result<String>);

    fn next(&mut self) -> Option<Self::Item> {
        while !self.over {
            let line = match self.line()? {
                Err(why) => return Some((self.number, Err(why))),
                Ok(line) => line,
            };
            // Some editors begin a file with a mark of its encoding.
            let line = line.trim_start_matches('\u{feff}').trim();
            if !line.is_empty() && !line.starts_with('#') {
                return Some((self.number, Ok(line.to_owned())));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn comments_and_empty_lines_are_counted_and_passed_over() {
        let lines = Lines::new("# a\n\n one \ntwo".as_bytes(), 100, "limit");
        let lines: Vec<_> = lines.map(|(number, line)| (number, line.unwrap())).collect();
        assert_eq!(lines, [(3, "one".to_owned()), (4, "two".to_owned())]);
    }

    #[test]
    fn a_bad_line_costs_only_itself() {
        let text = [b"one\n".as_slice(), &[b'x'; 50], b"\ntwo\n\xff\xfe\nthree"].concat();
        // A small buffer, so that the long line spans several.
        let lines: Vec<_> = Lines::new(io::BufReader::with_capacity(7, &text[..]), 10, "limit").collect();
        assert_eq!(lines.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        assert_eq!(lines.iter().map(|(_, line)| line.is_ok()).collect::<Vec<_>>(), [true, false, true, false, true]);
        assert!(lines[1].1.as_ref().unwrap_err().to_string().contains("10 bytes"));
    }

    proptest! {
        #[test]
        fn short_lines_come_as_they_are(lines in proptest::collection::vec("[a-z]{1,10}", 0..20), capacity in 1usize..16) {
            let text = lines.join("\n");
            let read = Lines::new(io::BufReader::with_capacity(capacity, text.as_bytes()), 10, "limit");
            let read: Vec<_> = read.map(|(number, line)| (number, line.unwrap())).collect();
            let expected: Vec<_> = (1..).zip(lines).collect();
            prop_assert_eq!(read, expected);
        }
    }
}
