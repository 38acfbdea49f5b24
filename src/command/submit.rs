//! `blipstream submit`: sends requests to Kafka and, if asked to, waits for what becomes of them.

mod answers;
pub(super) mod inputs;
pub(super) mod lines;
pub(super) mod outbox;
pub(super) mod request;
mod send;

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use self::inputs::Inputs;
use self::request::{Builder, Parcel};
use self::send::{Answers, Counts, End, Session, open_output};
use super::collect::{dead_letters, follow, records};
use super::generation::GenerationOptions;
use super::{Exit, Usage, local, runtime, telemetry};
use crate::config::ConfigOptions;
use crate::kafka::{Follower, From, TopicCheck, check_topics};
use crate::message::MAX_PROMPT_BYTES;
use crate::settings::{Kafka, Settings};

/// The brokers answer within this time, or `--timeout` if that is shorter.
pub(super) const CONNECT: Duration = Duration::from_secs(15);

/// Arguments of `submit`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Inputs:
  https://example.com/a.jpg   an address; also data: and file: addresses
  cat.jpg, holiday/           a local image, or all images below a folder; their bytes travel in the request
  list.csv                    a reference a row, in the column image, url or image_url, or the only one (--column);
                              `id` is the request's id, `prompt` its prompt, all other columns go into its `meta`
  list.jsonl, list.ndjson     a request a line, sent as it is; a line that is a string is a reference
  request.json                a request, a table ({\"input_data\": …}), or an array of requests and references
  list.txt, -                 a reference or a request a line; # begins a comment; - is standard input
A path in a list is looked for in the current folder, then beside the list. Lists are read while they are sent, so
their length does not matter (a .json file is read as a whole). --prompt, --meta, --deadline and the flags of
generation do not change requests that are sent as they are; what is not given is as the workers are configured. A local image has its path as id where no other is given.

Examples:
  blipstream submit https://example.com/a.jpg https://example.com/b.jpg
  blipstream submit holiday/ --meta album=holiday --wait > captions.jsonl
  blipstream submit photos.csv --column photo_url --deadline 10m
  psql -Atc 'select url from photos' | blipstream submit - --wait --output captions.jsonl
  blipstream submit list.txt --set kafka.bootstrap_servers=broker:9092

With --wait a JSON line is written for each image as its answer comes: the caption record, or the id, index and origin
of a dead letter and its `error` (code, stage, message). Answers are matched by where their requests stand in Kafka, so
other senders do not disturb; about 200 bytes of memory are taken for each request without an answer.
Exit codes: 1 nothing was sent, or answers are missing; 3 a larger share than --max-failure-rate failed.")]
pub struct SubmitArgs {
    /// Addresses, images, folders, lists; `-` reads standard input
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<String>,
    /// Topic to send to; else the first of kafka.inputs
    #[arg(long)]
    topic: Option<String>,
    /// Column of .csv files that holds the reference
    #[arg(long, value_name = "NAME")]
    column: Option<String>,
    /// Have captions, and the texts of --text-column, judged by the workers' filter; requests that are sent as they are get
    /// the task, too, unless they name their own
    #[arg(long)]
    filter: bool,
    /// Column of .csv files that holds a text found with the image, for --filter
    #[arg(long, value_name = "NAME", requires = "filter")]
    text_column: Option<String>,
    /// Send local files as file:// addresses; workers read them below fetch.file_roots
    #[arg(long)]
    as_file_url: bool,
    /// Text that the captions begin with; else the workers' model.prompt
    #[arg(long)]
    prompt: Option<String>,
    /// Key of the records: requests of one key go to one partition
    #[arg(long, value_enum, default_value_t = Key::Id)]
    key: Key,
    /// Comes back in the captions' `meta`; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    meta: Vec<(String, String)>,
    /// From now on; a caption that would be later is not wanted, e.g. 30s
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    deadline: Option<Duration>,
    /// Wait for the captions and dead letters, and write them
    #[arg(long)]
    wait: bool,
    /// Give up when no answer has come for so long; without --wait, when the brokers have taken nothing
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Where --wait writes the answers; - is standard output
    #[arg(long, value_name = "FILE", default_value = "-", requires = "wait")]
    output: String,
    /// Exit with 3 when a larger share of the images fails, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    max_failure_rate: f64,
    /// No progress, no summary; errors are still told
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    config: ConfigOptions,
    #[command(flatten)]
    generation: GenerationOptions,
}

/// What the key of a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Key {
    /// The request's id, if it has one
    Id,
    /// No key: records are spread over all partitions
    None,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or("write KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// Runs the command.
pub fn run(args: SubmitArgs) -> anyhow::Result<Exit> {
    args.check()?;
    let settings = args.config.load()?.settings;
    telemetry::init(&telemetry::quiet(&settings.log))?;
    let topic = topic(args.topic.as_deref(), &settings)?;
    let begun = Instant::now();
    // Before anything is sent, so that a missing topic is told at once and no answer is missed.
    let answers = args.prepare(&settings.kafka, &topic)?;
    let bar = args.progress();
    let timeout = args.timeout;
    let (limit, quiet) = (args.max_failure_rate, args.quiet);
    let items = args.inputs(&settings).start(args.inputs)?;
    let mut session = Session::new(&settings.kafka, &topic, timeout, answers, &bar)?;
    let ended = runtime()?.block_on(session.run(&items));
    bar.finish_and_clear();
    let end = ended?;
    tell(end, &session, quiet, &summary(&session, &topic, begun.elapsed(), args.wait));
    Ok(exit(end, session.counts(), limit))
}

/// The topic that requests are sent to: the one that is named, or the first that workers read.
pub(super) fn topic(named: Option<&str>, settings: &Settings) -> Result<String, Usage> {
    let first = || settings.kafka.inputs.first().map(|input| input.topic.clone());
    named.map(str::to_owned).or_else(first).ok_or_else(|| Usage("kafka.inputs is empty: say --topic".into()))
}

impl SubmitArgs {
    fn check(&self) -> Result<(), Usage> {
        local::check_rate(self.max_failure_rate)?;
        if self.timeout.is_zero() {
            return Err(Usage("--timeout must be longer than 0".into()));
        }
        if self.prompt.as_ref().is_some_and(|prompt| prompt.len() > MAX_PROMPT_BYTES) {
            return Err(Usage(format!("--prompt is longer than {MAX_PROMPT_BYTES} bytes")));
        }
        Ok(())
    }

    fn prepare(&self, kafka: &Kafka, topic: &str) -> anyhow::Result<Option<Answers>> {
        let connect = self.timeout.min(CONNECT);
        check_topics(kafka, &[TopicCheck { topic: topic.to_owned(), setting: "--topic or kafka.inputs" }], connect)?;
        if !self.wait {
            return Ok(None);
        }
        let topics = [records(kafka), vec![dead_letters(kafka)]].concat();
        let follower = Follower::open(kafka, &topics, From::Now, connect)?;
        let out = open_output(&self.output)?;
        Ok(Some(Answers { records: follow(follower)?, dead_letters: kafka.dead_letter_topic.clone(), out }))
    }

    fn inputs(&self, settings: &Settings) -> Inputs {
        let meta: Map<String, Value> =
            self.meta.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
        let builder = Builder {
            prompt: self.prompt.clone(),
            params: self.generation.params(),
            filter: self.filter,
            text_column: self.text_column.clone(),
            meta,
            deadline: self.deadline,
            keyed: self.key == Key::Id,
            as_file_url: self.as_file_url,
            parcel: Parcel { max_bytes: settings.kafka.max_message_size.as_u64() },
            max_rows: settings.flow.max_rows,
        };
        Inputs { builder, column: self.column.clone() }
    }

    fn progress(&self) -> ProgressBar {
        // Where the answers themselves appear on the terminal, they are the progress.
        let answers_shown = self.wait && self.output == "-" && io::stdout().is_terminal();
        if self.quiet || answers_shown || !io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let template = if self.wait {
            "{spinner} {human_pos} of {human_len} answered, {per_sec}, {elapsed}"
        } else {
            "{spinner} {human_pos} sent, {per_sec}, {elapsed}"
        };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner());
        ProgressBar::new(0).with_style(style)
    }
}

/// `sent 1,000 requests to blipstream.requests in 2.1 s: 998 captions, 2 dead letters`.
fn summary(session: &Session<'_>, topic: &str, took: Duration, wait: bool) -> String {
    let counts = session.counts();
    let plural = |count: u64, one: &str, many: &str| match count {
        1 => format!("1 {one}"),
        _ => format!("{} {many}", HumanCount(count)),
    };
    let sent = plural(counts.sent, "request", "requests");
    let mut text = format!("sent {sent} to {topic} in {:.1} s", took.as_secs_f64());
    if wait {
        let captions = plural(counts.captions, "caption", "captions");
        let dead = plural(counts.dead, "dead letter", "dead letters");
        let _ = write!(text, ": {captions}, {dead}");
        if session.unanswered() > 0 {
            let _ = write!(text, ", {} missing", HumanCount(session.unanswered() as u64));
        }
    }
    if session.unacknowledged() > 0 {
        let _ = write!(text, "; {} not acknowledged", session.unacknowledged());
    }
    if counts.bad > 0 {
        let _ = write!(text, "; {} could not be sent", plural(counts.bad, "input", "inputs"));
    }
    text
}

#[allow(clippy::print_stderr)] // for people, beside the output
fn tell(end: End, session: &Session<'_>, quiet: bool, summary: &str) {
    match end {
        End::TimedOut => eprintln!("error: {}", session.explain_timeout()),
        End::Interrupted if !quiet => eprintln!("interrupted"),
        _ => {}
    }
    if session.counts().sent == 0 {
        eprintln!("error: nothing was sent");
    }
    if !quiet {
        eprintln!("{summary}");
    }
}

fn exit(end: End, counts: Counts, limit: f64) -> Exit {
    match end {
        // Who read the answers wanted no more of them.
        End::OutputClosed => Exit::Done,
        End::Complete if counts.sent > 0 && counts.failure_rate() > limit => Exit::TooManyFailures,
        End::Complete if counts.sent > 0 => Exit::Done,
        End::TimedOut | End::Interrupted | End::Complete => Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_says_what_failed() {
        let counts = Counts { sent: 4, images: 4, bad: 0, captions: 3, dead: 1 };
        assert_eq!(exit(End::Complete, counts, 0.0), Exit::TooManyFailures);
        assert_eq!(exit(End::Complete, counts, 0.25), Exit::Done);
        assert_eq!(exit(End::TimedOut, counts, 1.0), Exit::Failed);
        assert_eq!(exit(End::Complete, Counts::default(), 1.0), Exit::Failed);
        let partly = Counts { sent: 3, images: 3, bad: 1, captions: 0, dead: 0 };
        assert_eq!(exit(End::Complete, partly, 0.0), Exit::TooManyFailures);
        assert_eq!(exit(End::Complete, partly, 0.25), Exit::Done);
    }
}
