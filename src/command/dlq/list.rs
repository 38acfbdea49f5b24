//! `blipstream dlq ls`: a line for each dead letter, or how many there are of a kind.

use std::io::{self, Write};

use console::{Alignment, Term, pad_str, truncate_str};
use jiff::Timestamp;

use super::count::{By, Counts};
use super::filter::Filter;
use super::letter::Letter;
use super::reading::{Reading, Wanted, progress};
use super::{Common, Form};
use crate::command::collect::answer::one_line;
use crate::command::{Exit, telemetry};

/// Arguments of `dlq ls`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  blipstream dlq ls                                      all there are, the oldest of each partition first
  blipstream dlq ls --since 2h --code dns,connect,timeout
  blipstream dlq ls --host images.example --since 2026-11-23T08:00:00Z --until 2026-11-23T09:00:00Z
  blipstream dlq ls --count-by host --code http_5xx      which hosts failed, the worst first
  blipstream dlq ls --output jsonl | jq -r .id

PLACE is the dead letter's own partition/offset: what `dlq show` and `dlq replay` take. TIME (UTC) is when it
was written. Of the image's address only the host is listed; - stands for an inline image, a file, or an address
that cannot be read. On a terminal, long texts are cut; elsewhere they are whole.")]
pub struct LsArgs {
    #[command(flatten)]
    filter: Filter,
    /// End after so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Count them by this instead of listing them
    #[arg(long, value_enum, value_name = "WHAT")]
    count_by: Option<By>,
    /// Form of the output
    #[arg(long, value_enum, default_value_t = Form::Text)]
    output: Form,
    #[command(flatten)]
    common: Common,
}

/// Runs the command.
pub fn run(args: LsArgs) -> anyhow::Result<Exit> {
    args.filter.check()?;
    let settings = args.common.config.load()?.settings;
    telemetry::init(&telemetry::quiet(&settings.log))?;
    let wanted = Wanted { places: Vec::new(), filter: args.filter, limit: args.limit };
    let bar = progress(args.count_by.is_none());
    let mut reading = Reading::open(&settings.kafka, wanted, args.common.timeout, bar)?;
    let mut out = io::stdout().lock();
    let found = match args.count_by {
        Some(by) => count(&mut reading, by, args.output, &mut out)?,
        None => list(&mut reading, args.output, &mut out)?,
    };
    out.flush()?;
    reading.bar.finish_and_clear();
    if found == 0 {
        tell_none(reading.looked_at(), &settings.kafka.dead_letter_topic);
    }
    Ok(Exit::Done)
}

#[allow(clippy::print_stderr)] // for people, beside the output
fn tell_none(looked_at: u64, topic: &str) {
    match looked_at {
        0 => eprintln!("{topic} has no dead letters"),
        many => eprintln!("none of the {many} dead letters of {topic} matches"),
    }
}

fn list(reading: &mut Reading, form: Form, out: &mut impl Write) -> anyhow::Result<u64> {
    let table = Table::of_terminal();
    let mut found = 0;
    while let Some((letter, _)) = reading.next()? {
        match form {
            Form::Jsonl => writeln!(out, "{}", letter.to_json())?,
            Form::Text => {
                if found == 0 {
                    writeln!(out, "{}", table.head())?;
                }
                writeln!(out, "{}", table.row(&letter))?;
            }
        }
        found += 1;
    }
    Ok(found)
}

fn count(reading: &mut Reading, by: By, form: Form, out: &mut impl Write) -> anyhow::Result<u64> {
    let mut counts = Counts::new(by);
    while let Some((letter, _)) = reading.next()? {
        counts.add(&letter);
    }
    match form {
        Form::Jsonl => counts.write_lines(out)?,
        Form::Text => counts.write_table(out)?,
    }
    Ok(counts.total())
}

/// Widths of the columns before the last two texts: place, time, code, stage, attempts.
const WIDTHS: [usize; 5] = [10, 19, 17, 7, 5];
/// Columns of the host and of the id, where they are as short as they may be.
const SHORT: usize = 18;
/// The same on a wide terminal.
const LONG: usize = 28;
/// From this width on a terminal is wide.
const WIDE: usize = 150;
/// Columns that the error message has, however narrow the terminal.
const LEAST: usize = 24;

/// How a dead letter becomes a line.
struct Table {
    /// Columns of the terminal; without one nothing is cut.
    columns: Option<usize>,
}

impl Table {
    fn of_terminal() -> Self {
        Self { columns: Term::stdout().size_checked().map(|(_, columns)| columns.into()) }
    }

    fn head(&self) -> String {
        self.line(["PLACE", "TIME", "CODE", "STAGE", "TRIES"].map(str::to_owned), "HOST", "ID", "MESSAGE")
    }

    fn row(&self, letter: &Letter) -> String {
        let fixed = [
            letter.place.to_string(),
            letter.time.map_or_else(|| "-".into(), short),
            one_line(&letter.code),
            one_line(&letter.stage),
            letter.attempts.map_or_else(|| "-".into(), |attempts| attempts.to_string()),
        ];
        let host = letter.host.as_deref().unwrap_or("-");
        self.line(fixed, host, &one_line(&letter.id), &one_line(&letter.message))
    }

    fn line(&self, fixed: [String; 5], host: &str, id: &str, message: &str) -> String {
        let wide = self.columns.is_none_or(|columns| columns >= WIDE);
        let mut line = String::new();
        for (text, width) in fixed.iter().zip(WIDTHS) {
            // A longer one moves the rest; a place or a code that is cut would be of no use.
            line.push_str(&pad_str(text, width, Alignment::Left, None));
            line.push(' ');
        }
        for text in [host, id] {
            let width = if wide { LONG } else { SHORT };
            line.push_str(&pad_str(text, width, Alignment::Left, self.columns.map(|_| "…")));
            line.push(' ');
        }
        let room = self.columns.map(|columns| columns.saturating_sub(console::measure_text_width(&line)).max(LEAST));
        line.push_str(&room.map_or_else(|| message.into(), |room| truncate_str(message, room, "…")));
        line
    }
}

/// To the second, in UTC.
fn short(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

#[cfg(test)]
mod tests {
    use super::super::letter::tests::dead;
    use super::*;
    use crate::disposition::Code;

    fn letter() -> Letter {
        let value = r#"{"id":"a very long id, longer than its column","image":"https://images.example/a.jpg"}"#;
        let letter = Letter::read(&dead(value, Code::ModelUnavailable, 7, None)).unwrap();
        Letter { message: "字 a message\nthat is longer than most terminals are wide: ".repeat(3), ..letter }
    }

    #[test]
    fn a_row_fits_its_terminal_and_is_one_line() {
        for columns in [80, 120, 160, 250] {
            let table = Table { columns: Some(columns) };
            let row = table.row(&letter());
            let width = console::measure_text_width(&row);
            assert!(width <= columns.max(130), "{columns}: {width}: {row}");
            assert!(row.starts_with("1/7        2026-09-21 14:13:27 model_unavailable fetch   1     images.example "));
            assert!(!row.contains('\n') && row.ends_with('…') && table.head().starts_with("PLACE      TIME "), "{row}");
        }
    }

    #[test]
    fn what_no_terminal_shows_is_not_cut() {
        let row = Table { columns: None }.row(&letter());
        assert!(row.contains("a very long id, longer than its column 字 a message that is longer"), "{row}");
        assert!(!row.contains('…') && row.ends_with(": "));
    }
}
