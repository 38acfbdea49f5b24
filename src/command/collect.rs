//! `blipstream collect`: reads captions and dead letters, beside all consumer groups.

pub(super) mod answer;

use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::Context;

use self::answer::{Answer, one_line};
use super::{Exit, Usage, broken_pipe, runtime, telemetry};
use crate::config::ConfigOptions;
use crate::kafka::{Follower, From, TopicCheck};
use crate::message::Message;
use crate::settings::Kafka;

/// How long one look at the topics takes at most; so long may the end be noticed late.
const STEP: Duration = Duration::from_millis(50);
/// Records read ahead of the output.
const AHEAD: usize = 256;

/// The first record may take this much longer than `--idle`: connections are made and positions looked up for it.
const FIRST_RECORD: Duration = Duration::from_secs(5);

/// Arguments of `collect`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  blipstream collect                                     everything there is, and then what comes
  blipstream collect --from now --count 100 --idle 1m    the next 100, or as many as come
  blipstream collect --captions-only --output jsonl --idle 5s > captions.jsonl
  blipstream collect --dead-letters-only                 what failed, and why

Text is one line for each image: its id, a tab, its caption. Dead letters go to standard error then, unless only they
are asked for. JSON lines are caption records as workers wrote them; a dead letter has `error` with `code`, `stage` and
`message` instead. No consumer group is joined and nothing is committed: reading here takes nothing from anybody.
Exit code 1 if fewer than --count came before --idle was over.")]
pub struct CollectArgs {
    /// Where to begin
    #[arg(long, value_enum, default_value_t = Begin::Beginning)]
    from: Begin,
    /// Captions, no dead letters
    #[arg(long, conflicts_with = "dead_letters_only")]
    captions_only: bool,
    /// Dead letters, no captions
    #[arg(long)]
    dead_letters_only: bool,
    /// End after so many
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// End when nothing has come for so long, e.g. 10s; without it, only Ctrl-C and --count end it
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    idle: Option<Duration>,
    /// Form of the output
    #[arg(long, value_enum, default_value_t = Form::Text)]
    output: Form,
    /// How long the brokers may take to answer at the start
    #[arg(long, value_name = "DURATION", default_value = "15s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    #[command(flatten)]
    config: ConfigOptions,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Begin {
    /// With the first record there is
    Beginning,
    /// With what comes from now on
    Now,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Form {
    /// The image's id, a tab, its caption
    Text,
    /// One JSON object a line
    Jsonl,
}

/// Runs the command.
pub fn run(args: CollectArgs) -> anyhow::Result<Exit> {
    let settings = args.config.load()?.settings;
    telemetry::init(&telemetry::quiet(&settings.log))?;
    if args.count == Some(0) {
        return Err(Usage("--count must be at least 1".into()).into());
    }
    let from = if args.from == Begin::Now { From::Now } else { From::Beginning };
    let follower = Follower::open(&settings.kafka, &args.topics(&settings.kafka), from, args.timeout)?;
    let records = follow(follower)?;
    let printer = Printer { form: args.output, letters_only: args.dead_letters_only };
    let mut collection = Collection {
        printer,
        dead_letters: settings.kafka.dead_letter_topic,
        count: args.count,
        idle: args.idle,
        taken: 0,
        last: Instant::now(),
        grace: FIRST_RECORD,
    };
    let finished = runtime()?.block_on(collection.run(&records));
    match finished {
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(broken_pipe) => Ok(Exit::Done),
        finished => finished,
    }
}

/// Reads on a thread of its own, since librdkafka blocks. The thread ends when nobody receives any more.
pub(super) fn follow(follower: Follower) -> io::Result<async_channel::Receiver<Result<Message, crate::kafka::Error>>> {
    let (sender, receiver) = async_channel::bounded(AHEAD);
    std::thread::Builder::new().name("follow".into()).spawn(move || {
        while !sender.is_closed() {
            let next = follower.next(STEP);
            let failed = next.is_err();
            let Some(record) = next.transpose() else { continue };
            if sender.send_blocking(record).is_err() || failed {
                break;
            }
        }
    })?;
    Ok(receiver)
}

impl CollectArgs {
    fn topics(&self, kafka: &Kafka) -> Vec<TopicCheck> {
        let mut topics = Vec::new();
        if !self.dead_letters_only {
            topics.extend(records(kafka));
        }
        if !self.captions_only {
            topics.push(dead_letters(kafka));
        }
        topics
    }
}

/// The topics of records: of captions, and of what the filter rejects where that has one of its own.
pub(super) fn records(kafka: &Kafka) -> Vec<TopicCheck> {
    let captions = TopicCheck { topic: kafka.captions_topic.clone(), setting: "kafka.captions_topic" };
    let filtered = kafka.filtered_topic.iter();
    let filtered = filtered.map(|topic| TopicCheck { topic: topic.clone(), setting: "kafka.filtered_topic" });
    [captions].into_iter().chain(filtered).collect()
}

/// The topic of dead letters.
pub(super) fn dead_letters(kafka: &Kafka) -> TopicCheck {
    TopicCheck { topic: kafka.dead_letter_topic.clone(), setting: "kafka.dead_letter_topic" }
}

struct Collection {
    printer: Printer,
    dead_letters: String,
    count: Option<u64>,
    idle: Option<Duration>,
    taken: u64,
    last: Instant,
    /// Added to `idle` until the first record came.
    grace: Duration,
}

impl Collection {
    async fn run(
        &mut self,
        records: &async_channel::Receiver<Result<Message, crate::kafka::Error>>,
    ) -> anyhow::Result<Exit> {
        let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
        loop {
            let idle = async {
                match self.idle {
                    Some(idle) => tokio::time::sleep_until((self.last + idle + self.grace).into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // A person's wish comes first, and what is there is taken before the time is judged.
                biased;
                stopped = &mut interrupted => {
                    stopped.context("cannot wait for Ctrl-C")?;
                    return Ok(Exit::Done);
                }
                record = records.recv() => {
                    self.take(&record.context("reading ended unexpectedly")??)?;
                    if Some(self.taken) == self.count {
                        return Ok(Exit::Done);
                    }
                }
                () = idle => return Ok(self.came_to_rest()),
            }
        }
    }

    fn take(&mut self, record: &Message) -> anyhow::Result<()> {
        (self.last, self.grace) = (Instant::now(), Duration::ZERO);
        match Answer::of(record, &self.dead_letters) {
            Ok(answer) => {
                self.taken += 1;
                self.printer.print(&answer)?;
            }
            Err(why) => tracing::warn!("{}/{}/{}: {why}", record.topic, record.partition, record.offset),
        }
        Ok(())
    }

    #[allow(clippy::print_stderr)] // for people, beside the output
    fn came_to_rest(&self) -> Exit {
        match self.count {
            Some(count) => {
                let idle = humantime::format_duration(self.idle.unwrap_or_default());
                eprintln!("{} of {count} came, and then nothing for {idle}", self.taken);
                Exit::Failed
            }
            None => Exit::Done,
        }
    }
}

struct Printer {
    form: Form,
    letters_only: bool,
}

impl Printer {
    #[allow(clippy::print_stderr)] // failures are this command's output, for people
    fn print(&self, answer: &Answer) -> io::Result<()> {
        let mut out = io::stdout().lock();
        match (self.form, &answer.outcome) {
            (Form::Jsonl, _) => {
                out.write_all(&answer.to_line())?;
                writeln!(out)
            }
            (Form::Text, Ok(captioned)) => writeln!(out, "{}\t{}", one_line(&answer.id), one_line(&captioned.text)),
            (Form::Text, Err(refusal)) => {
                let (id, message) = (one_line(&answer.id), one_line(&refusal.message));
                if self.letters_only {
                    return writeln!(out, "{id}\t{}: {message}", one_line(&refusal.code));
                }
                eprintln!("{id}: {}: {message}", one_line(&refusal.code));
                Ok(())
            }
        }
    }
}
