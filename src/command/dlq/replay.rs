//! `blipstream dlq replay`: sends dead letters back to where their requests came from.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::HumanCount;
use serde_json::{Value, json};

use super::filter::Filter;
use super::letter::{Letter, Place};
use super::once::Once;
use super::reading::{Reading, Wanted, progress};
use super::target::{Targets, obstacle};
use super::writer::{Pace, Refused, Writer};
use super::{Common, Form};
use crate::command::collect::answer::one_line;
use crate::command::{Exit, Usage, runtime, telemetry};
use crate::kafka::{Record, check_topics};
use crate::message::{DROPPED_HEADERS_HEADER, DROPPED_KEY_HEADER, Headers, Message, ORIGIN_HEADER, replay_headers};

/// One step of a longer wait; so late may Ctrl-C be noticed.
const STEP: Duration = Duration::from_millis(50);

/// Arguments of `dlq replay`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  blipstream dlq replay 0/17 2/4
  blipstream dlq replay --code http_5xx --host images.example --since 2h --dry-run
  blipstream dlq replay --code http_5xx --host images.example --since 2h --rate 20
  blipstream dlq replay --all --topic blipstream.requests.slow

Each request is written with its key, its value and its own headers to the topic of its origin if that is one
of kafka.inputs, else to the first of them. It keeps blipstream-origin, and so its identity: its caption is that
of the first message. It keeps blipstream-first-failed-at and blipstream-attempts, too: a worker that fails on it
again adds its tries to them. The headers about the error are taken away. A deadline in a request stays: one that
has passed fails again.

A dead letter stays in its topic when it is replayed, so the same command a second time makes a second request of
the same origin, and a second caption: narrow it down, e.g. by --since. Within one run an origin is replayed once,
however many dead letters it has. What fails again while the command runs is not replayed again.

A dead letter whose value was over-long has only a pointer to it and cannot be replayed: it is named and counted.
Exit codes: 1 failed, interrupted, or nothing at a PLACE; 3 some could not be replayed.")]
pub struct ReplayArgs {
    /// The places of the dead letters, partition/offset, as `dlq ls` prints them
    #[arg(value_name = "PLACE")]
    places: Vec<Place>,
    /// Every dead letter there is
    #[arg(long, conflicts_with = "places")]
    all: bool,
    #[command(flatten)]
    filter: Filter,
    /// End after so many that match
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Write all of them to this topic
    #[arg(long)]
    topic: Option<String>,
    /// Print what would be written, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Form of what --dry-run prints
    #[arg(long, value_enum, default_value_t = Form::Text, requires = "dry_run")]
    output: Form,
    /// Most records a second
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    #[command(flatten)]
    common: Common,
}

impl ReplayArgs {
    fn check(&self) -> Result<(), Usage> {
        let narrow = !self.places.is_empty() || !self.filter.is_empty();
        match (self.all, narrow) {
            (false, false) => Err(Usage(
                "which dead letters? Name places, or narrow them down (--code, --host, --since, --until, --id, \
                 --origin), or say --all"
                    .into(),
            )),
            (true, true) => Err(Usage("--all and what narrows it down contradict each other".into())),
            _ => self.filter.check(),
        }
    }
}

/// Runs the command.
pub fn run(args: ReplayArgs) -> anyhow::Result<Exit> {
    args.check()?;
    let settings = args.common.config.load()?.settings;
    telemetry::init(&telemetry::quiet(&settings.log))?;
    let (kafka, timeout) = (&settings.kafka, args.common.timeout);
    let targets = Targets::new(kafka, args.topic.as_deref())?;
    check_topics(kafka, &targets.checks(), timeout)?;
    let wanted = Wanted { places: args.places, filter: args.filter, limit: args.limit };
    let mut reading = Reading::open(kafka, wanted, timeout, progress(args.dry_run))?;
    let runtime = runtime()?;
    runtime.spawn(stop_at_ctrl_c(reading.stop.clone()));
    let begun = Instant::now();
    let sink = if args.dry_run {
        Sink::Print(args.output, 0)
    } else {
        Sink::Write(Box::new(Writer::new(kafka, timeout)?), Pace::new(args.rate, begun))
    };
    let mut replay = Replay { targets, sink, once: Once::default(), counts: Counts::default() };
    let ended = replay.run(&mut reading);
    reading.bar.finish_and_clear();
    tell(&reading, &replay.summary(&reading, begun.elapsed()));
    ended?;
    let missing = reading.tell_missing(&kafka.dead_letter_topic);
    Ok(if reading.is_stopped() || missing {
        Exit::Failed
    } else if replay.counts.skipped + replay.counts.refused > 0 {
        Exit::TooManyFailures
    } else {
        Exit::Done
    })
}

async fn stop_at_ctrl_c(stop: Arc<AtomicBool>) {
    if tokio::signal::ctrl_c().await.is_ok() {
        stop.store(true, Ordering::Relaxed);
    }
}

#[allow(clippy::print_stderr)] // for people, beside the output
fn tell(reading: &Reading, summary: &str) {
    if reading.is_stopped() {
        eprintln!("interrupted");
    }
    eprintln!("{summary}");
}

/// Where replays go.
enum Sink {
    /// To standard output, and how many there were.
    Print(Form, u64),
    /// To Kafka.
    Write(Box<Writer>, Pace),
}

#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    skipped: u64,
    repeated: u64,
    refused: u64,
}

struct Replay {
    targets: Targets,
    sink: Sink,
    once: Once,
    counts: Counts,
}

impl Replay {
    fn run(&mut self, reading: &mut Reading) -> anyhow::Result<()> {
        while let Some((letter, message)) = reading.next()? {
            if let Some(why) = obstacle(&letter, &message) {
                self.counts.skipped += 1;
                complain(reading, &format!("{} cannot be replayed: {why} (origin {})", letter.place, letter.origin));
            } else if !self.once.is_first(&letter.origin) {
                self.counts.repeated += 1;
            } else {
                self.take(reading, &letter, &message)?;
            }
            self.name_refused(reading);
        }
        if let Sink::Write(writer, _) = &mut self.sink {
            let finished = writer.finish();
            self.name_refused(reading);
            finished?;
        }
        Ok(())
    }

    fn take(&mut self, reading: &Reading, letter: &Letter, message: &Message) -> anyhow::Result<()> {
        let topic = self.targets.of(&letter.origin);
        let headers = replay_headers(message);
        match &mut self.sink {
            Sink::Print(form, count) => {
                let line = match form {
                    Form::Text => line(letter, message, topic),
                    Form::Jsonl => object(letter.place, message, topic, &headers).to_string(),
                };
                writeln!(io::stdout(), "{line}")?;
                *count += 1;
            }
            Sink::Write(writer, pace) => {
                while !pace.wait(Instant::now()).is_zero() {
                    if reading.is_stopped() {
                        return Ok(());
                    }
                    std::thread::sleep(pace.wait(Instant::now()).min(STEP));
                }
                pace.take(Instant::now());
                let (key, value) = (message.key.as_deref(), message.payload.as_deref());
                writer.send(
                    letter.place,
                    topic,
                    Record { topic, key, value, headers: &headers, timestamp_ms: None },
                )?;
            }
        }
        for (header, what) in [(DROPPED_KEY_HEADER, "its key"), (DROPPED_HEADERS_HEADER, "all of its own headers")] {
            if message.header(header).is_some() {
                complain(reading, &format!("{} goes without {what}: the dead letter had no room for it", letter.place));
            }
        }
        Ok(())
    }

    fn name_refused(&mut self, reading: &Reading) {
        let Sink::Write(writer, _) = &mut self.sink else { return };
        for Refused { place, reason } in writer.take_refused() {
            self.counts.refused += 1;
            complain(reading, &format!("{place} is {reason}"));
        }
    }

    /// `replayed 12 dead letters in 0.3 s (10 to a, 2 to b), 1 cannot be replayed; 3,400 records read`.
    fn summary(&self, reading: &Reading, took: Duration) -> String {
        let mut text = match &self.sink {
            Sink::Print(_, count) => format!("would replay {}, wrote nothing", letters(*count)),
            Sink::Write(writer, _) => {
                let written = writer.written();
                let by_topic: Vec<_> =
                    written.iter().map(|(topic, count)| format!("{} to {topic}", HumanCount(*count))).collect();
                let mut text = format!("replayed {} in {:.1} s", letters(written.values().sum()), took.as_secs_f64());
                if !by_topic.is_empty() {
                    let _ = write!(text, " ({})", by_topic.join(", "));
                }
                if writer.under_way() > 0 {
                    let _ = write!(text, ", {} not acknowledged", HumanCount(writer.under_way() as u64));
                }
                text
            }
        };
        let Counts { skipped, repeated, refused } = self.counts;
        for (count, what) in [
            (skipped, "cannot be replayed"),
            (refused, "not taken by the brokers, or not confirmed"),
            (repeated, "left out, since their origin came before"),
        ] {
            if count > 0 {
                let _ = write!(text, ", {} {what}", HumanCount(count));
            }
        }
        let _ = write!(text, "; {} records read", HumanCount(reading.looked_at()));
        text
    }
}

fn letters(count: u64) -> String {
    if count == 1 { "1 dead letter".into() } else { format!("{} dead letters", HumanCount(count)) }
}

#[allow(clippy::print_stderr)] // for people, beside the output
fn complain(reading: &Reading, text: &str) {
    reading.bar.suspend(|| eprintln!("{text}"));
}

/// What would be written, for a person: no addresses, since they may hold secrets.
fn line(letter: &Letter, message: &Message, topic: &str) -> String {
    let key = message.key.as_ref().map_or_else(|| "none".into(), |key| one_line(&String::from_utf8_lossy(key)));
    let bytes = message.payload.as_ref().map_or(0, bytes::Bytes::len);
    let tries = letter.attempts.map_or_else(|| "?".into(), |tries| tries.to_string());
    format!(
        "{} to {topic}: id {}, {ORIGIN_HEADER} {}, key {key}, {bytes} bytes, host {}, {tries} tries so far, {}",
        letter.place,
        one_line(&letter.id),
        letter.origin,
        letter.host.as_deref().unwrap_or("-"),
        one_line(&letter.code),
    )
}

/// The record that would be written; bytes that are no UTF-8 are replaced.
fn object(place: Place, message: &Message, topic: &str, headers: &Headers) -> Value {
    let text = |bytes: Option<&bytes::Bytes>| bytes.map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    let headers: Vec<_> = headers.iter().map(|(name, value)| json!([name, text(value.as_ref())])).collect();
    json!({
        "place": place.to_string(),
        "topic": topic,
        "key": text(message.key.as_ref()),
        "value": text(message.payload.as_ref()),
        "headers": headers,
    })
}
