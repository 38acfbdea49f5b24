//! The rows of a job through the workers behind Kafka: requests in their topic, answers from theirs.
//!
//! The journal notes up to where the topics of answers are read. A job that goes on looks first for what came since, and
//! sends only what has no answer: so what workers did while the job was down is not done twice, and the requests that they
//! still have are the only ones that are. Whose an answer is tells its [key](keys), which is the same in every run.

mod keys;
mod replies;

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use anyhow::Context;
use async_channel::Receiver;
use tokio::sync::mpsc;

use self::keys::{Keys, Sent};
use self::replies::{Refused, Reply, missed, topics};
use super::driver::{Answered, Asked, Failure, Rows, Way, drive};
use super::job::{End, Job};
use super::journal::{Caption, Failed, Positions};
use crate::command::collect::follow;
use crate::command::submit::outbox::{Handed, NotTaken, Outbox, Place};
use crate::command::submit::request::Parcel;
use crate::command::submit::{self, CONNECT};
use crate::command::{Usage, runtime};
use crate::disposition::Code;
use crate::kafka::{Error, Follower, From, TopicCheck, check_topics};
use crate::message::{ImageRef, MAX_PROMPT_BYTES, Message, Request};
use crate::settings::{Kafka, Settings};

/// The code of a row to which no worker said a word.
const NO_ANSWER: &str = "no_answer";
/// The code of a row whose request the brokers did not take.
const NOT_SENT: &str = "not_sent";

/// What is for a model in this process.
const MODEL: [&str; 5] = ["model", "device", "dtype", "max_batch_size", "allow_network"];

/// Arguments of a job that others caption.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "By workers behind Kafka")]
pub struct FleetOptions {
    /// Send the images to the workers of kafka.bootstrap_servers, and take their answers
    #[arg(long, conflicts_with_all = MODEL)]
    pub kafka: bool,
    /// Topic to send to; else the first of kafka.inputs
    #[arg(long, requires = "kafka", conflicts_with_all = MODEL)]
    topic: Option<String>,
    /// A row without an answer for so long has failed; longer than the retry topics take, 11 minutes by default
    #[arg(long, value_name = "DURATION", default_value = "15m", value_parser = humantime::parse_duration,
          requires = "kafka", conflicts_with_all = MODEL)]
    timeout: Duration,
    /// Send local files as file:// addresses; workers read them below fetch.file_roots
    #[arg(long, requires = "kafka", conflicts_with_all = MODEL)]
    as_file_url: bool,
}

impl FleetOptions {
    /// Refuses what the workers would.
    pub fn check(&self, settings: &Settings) -> Result<(), Usage> {
        if self.timeout.is_zero() {
            return Err(Usage("--timeout must be longer than 0".into()));
        }
        if settings.model.prompt.as_ref().is_some_and(|prompt| prompt.len() > MAX_PROMPT_BYTES) {
            return Err(Usage(format!("--prompt is longer than {MAX_PROMPT_BYTES} bytes")));
        }
        Ok(())
    }

    /// The topic that requests are sent to.
    pub fn topic(&self, settings: &Settings) -> Result<String, Usage> {
        submit::topic(self.topic.as_deref(), settings)
    }

    /// How local files get into requests; `None` where they stay where they are.
    pub fn parcel(&self, settings: &Settings) -> Option<Parcel> {
        (self.kafka && !self.as_file_url).then(|| parcel(&settings.kafka))
    }
}

fn parcel(kafka: &Kafka) -> Parcel {
    Parcel { max_bytes: kafka.max_message_size.as_u64() }
}

/// Runs rows through the workers until each has ended, or the job is to stop. `settings.model.prompt` is the prompt of rows
/// that have none.
///
/// # Errors
/// The brokers are not reached, or refuse what is needed; they took nothing for `--timeout`; or the journal cannot be
/// written. What is done is recorded.
pub fn run(
    options: &FleetOptions,
    settings: &Settings,
    rows: Rows,
    job: &mut Job,
    retries: u32,
) -> anyhow::Result<End> {
    let kafka = &settings.kafka;
    let connect = options.timeout.min(CONNECT);
    let topic = options.topic(settings)?;
    check_topics(kafka, &[TopicCheck { topic: topic.clone(), setting: "--topic or kafka.inputs" }], connect)?;
    // Before anything is looked for or sent: nothing falls between what is there and what comes.
    let follower = Follower::open(kafka, &topics(kafka), From::Now, connect)?;
    let mut read = Positions::new();
    for (partition, offset) in follower.begins() {
        read.entry(partition.topic.to_string()).or_default().insert(partition.partition, *offset);
    }
    let keys = Keys::new(job.journal.id(), job.journal.round());
    let found = missed(kafka, &keys, job.journal.was_read(), &job.journal.index().done_rows(), connect)?;
    if job.journal.was_read().is_empty() {
        // On the disk before anything is sent, so that no answer to it is ever before it.
        job.read(std::mem::take(&mut read));
        job.sync()?;
    } else if !found.is_empty() {
        let answers = indicatif::HumanCount(found.len() as u64);
        job.progress.tell(&format!("{answers} answers had come meanwhile"));
    }
    let (way, asked, results) = Way::new();
    let fleet = Fleet {
        outbox: Outbox::new(kafka, &topic)?,
        records: follow(follower)?,
        topic,
        kafka: kafka.clone(),
        prompt: settings.model.prompt.clone(),
        timeout: options.timeout,
        keys,
        found,
        open: HashMap::new(),
        due: BTreeSet::new(),
        held: None,
        read,
        acknowledged: Instant::now(),
        heard: Instant::now(),
        warned: false,
        results,
    };
    let runtime = runtime()?;
    let running = runtime.spawn(fleet.run(asked));
    runtime.block_on(async {
        // The mini-batch alone bounds what is under way: it has to last for many devices.
        if let Some(end) = drive(job, way, rows, retries, usize::MAX).await? {
            return Ok(end);
        }
        running.await.context("what sends and listens panicked")??;
        anyhow::bail!("the link to the workers ended with images under way")
    })
}

/// A request without an answer.
struct Open {
    number: i64,
    tries: u32,
    /// To be sent anew; not kept of an inline image, which is long and never fails for a reason that may pass.
    request: Option<Request>,
    /// When it is given up; not before the brokers have it.
    due: Option<Instant>,
    place: Option<Place>,
}

/// Sends requests and listens.
struct Fleet {
    /// Each record goes with its row and the number of its try.
    outbox: Outbox<(u64, i64)>,
    records: Receiver<Result<Message, Error>>,
    topic: String,
    kafka: Kafka,
    prompt: Option<String>,
    timeout: Duration,
    keys: Keys,
    /// Answers that came before this run, by row.
    found: HashMap<u64, Reply>,
    /// By row.
    open: HashMap<u64, Open>,
    /// The rows of `open` by when they are given up.
    due: BTreeSet<(Instant, u64)>,
    /// The next to be sent, once the producer has room.
    held: Option<Asked>,
    /// Up to where answers are read, as far as the driver does not know.
    read: Positions,
    /// When the brokers took something, or were first asked to.
    acknowledged: Instant,
    /// When a worker said something.
    heard: Instant,
    /// Whether it was said that none does.
    warned: bool,
    results: mpsc::Sender<Answered>,
}

impl Fleet {
    /// Goes on until nobody asks for more.
    async fn run(mut self, mut asked: mpsc::Receiver<Asked>) -> anyhow::Result<()> {
        loop {
            if let Some(asked) = self.held.take() {
                self.ask(asked).await?;
            }
            let first_due = self.due.first().map(|(due, _)| *due);
            let silent = self.acknowledged + self.timeout;
            tokio::select! {
                // What is known comes before what is new, and the time is judged at the end.
                biased;
                report = self.outbox.report(), if self.outbox.under_way() > 0 => {
                    let ((row, number), result) = report?;
                    self.acknowledged(row, number, result).await;
                }
                record = self.records.recv() => {
                    self.hear(&record.context("reading ended unexpectedly")??).await;
                }
                next = asked.recv(), if self.held.is_none() && self.outbox.has_room() => match next {
                    Some(asked) => self.ask(asked).await?,
                    None => return Ok(()),
                },
                () = until(first_due) => self.give_up(Instant::now()).await,
                () = until(Some(silent)), if self.outbox.under_way() > 0 => {
                    let silence = self.outbox.explain_silence(self.timeout);
                    anyhow::bail!("{silence}. What is done is kept; the same command goes on from there");
                }
            }
        }
    }

    /// Sends a request, unless it was answered before.
    async fn ask(&mut self, mut asked: Asked) -> anyhow::Result<()> {
        let Asked { number, row, tries, .. } = asked;
        if let Some(reply) = self.found.remove(&row) {
            self.settle(number, reply, Some(asked.request)).await;
            return Ok(());
        }
        let key = self.keys.key(self.keys.sent(row, tries));
        asked.request.id = Some(key.clone());
        if asked.request.prompt.is_none() {
            asked.request.prompt.clone_from(&self.prompt);
        }
        let value = asked.request.to_native();
        if let Err(error) = parcel(&self.kafka).check(Some(key.as_bytes()), &value) {
            self.fail(number, Code::TooLarge.as_str(), error.to_string()).await;
            return Ok(());
        }
        let was_idle = self.outbox.under_way() == 0;
        match self.outbox.send(Some(key.as_bytes()), &value, (row, number))? {
            Handed::Taken => {
                if was_idle {
                    self.acknowledged = Instant::now();
                }
                let request = Some(asked.request).filter(is_short);
                self.open.insert(row, Open { number, tries, request, due: None, place: None });
            }
            Handed::Full(_) => self.held = Some(asked),
            Handed::Refused(_, refused) => self.not_sent(number, refused).await,
        }
        Ok(())
    }

    /// The brokers have a request, or will never.
    async fn acknowledged(&mut self, row: u64, number: i64, result: Result<Option<Place>, NotTaken>) {
        self.acknowledged = Instant::now();
        // An answer may have been quicker, and led to another try.
        let Some(open) = self.open.get_mut(&row).filter(|open| open.number == number) else { return };
        match result {
            Ok(place) => {
                let due = self.acknowledged + self.timeout;
                (open.due, open.place) = (Some(due), place);
                self.due.insert((due, row));
            }
            Err(refused) => {
                self.open.remove(&row);
                self.not_sent(number, refused).await;
            }
        }
    }

    async fn hear(&mut self, message: &Message) {
        let partitions = self.read.entry(message.topic.to_string()).or_default();
        partitions.insert(message.partition, message.offset + 1);
        let Some(reply) = Reply::of(message, &self.keys, &self.kafka) else { return };
        (self.heard, self.warned) = (Instant::now(), false);
        let Sent { row, .. } = reply.sent;
        // Of a row that has ended, or a second one, as after a crash of a worker.
        let is_awaited = self.open.get(&row).is_some_and(|open| reply.settles(self.keys.sent(row, open.tries)));
        if is_awaited && let Some(open) = self.close(row) {
            self.settle(open.number, reply, open.request).await;
        }
    }

    fn close(&mut self, row: u64) -> Option<Open> {
        let open = self.open.remove(&row)?;
        if let Some(due) = open.due {
            self.due.remove(&(due, row));
        }
        Some(open)
    }

    /// Gives up what has had no answer for too long. It is not sent anew by itself: where workers are only slow, it still
    /// waits for them, and twice the work would make them slower.
    async fn give_up(&mut self, now: Instant) {
        let time = humantime::format_duration(self.timeout);
        let question = format!("Does a worker run that reads {}, and is it quick enough?", self.topic);
        if !self.warned && self.heard + self.timeout <= now {
            self.warned = true;
            tracing::warn!("no worker has answered anything for {time}. {question}");
        }
        while let Some((_, row)) = self.due.first().copied().filter(|(due, _)| *due <= now) {
            let Some(Open { number, place, .. }) = self.close(row) else { continue };
            let place = match place {
                Some((partition, Some(offset))) => format!("{}/{partition}/{offset}", self.topic),
                _ => self.topic.clone(),
            };
            let message = format!(
                "no answer for {time} to the request {place}. {question} --retry-failed takes an answer that has come by \
                 then, or asks anew"
            );
            self.fail(number, NO_ANSWER, message).await;
        }
    }

    async fn not_sent(&mut self, number: i64, NotTaken { too_long, why }: NotTaken) {
        let code = if too_long { Code::TooLarge.as_str() } else { NOT_SENT };
        self.fail(number, code, why).await;
    }

    async fn fail(&mut self, number: i64, code: &str, message: String) {
        let failed = Failed { code: code.to_owned(), message };
        self.answer(number, Err(Failure { failed, again: None })).await;
    }

    async fn settle(&mut self, number: i64, reply: Reply, request: Option<Request>) {
        let result = reply.result.map_err(|Refused { failed, may_pass }| {
            let again = request.filter(|request| may_pass && is_short(request));
            Failure { failed, again }
        });
        self.answer(number, result).await;
    }

    async fn answer(&mut self, number: i64, result: Result<Caption, Failure>) {
        // What was found is not recorded, and has to be found again until it is.
        let read = if self.found.is_empty() { std::mem::take(&mut self.read) } else { Positions::new() };
        // A driver that is gone asks for nothing more either, which ends this.
        let _ = self.results.send(Answered { number, result, read }).await;
    }
}

/// Whether a request holds no image.
fn is_short(request: &Request) -> bool {
    !matches!(request.image, ImageRef::Base64(_) | ImageRef::Percent(_))
}

/// Until this moment; for ever where there is none.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}
