//! Sends records, names what cannot be sent, and takes the answers.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::Context;
use async_channel::Receiver;
use indicatif::ProgressBar;

use super::answers::{Awaited, Taken};
use super::outbox::{Handed, NotTaken, Outbox, Place};
use super::request::{Bad, Item};
use crate::command::broken_pipe;
use crate::command::collect::answer::Answer;
use crate::kafka::Error;
use crate::message::Message;
use crate::settings::Kafka;

/// A record under way.
struct Sent {
    number: u64,
    name: String,
    rows: usize,
}

/// How the sending ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All is sent and, where answers were waited for, answered.
    Complete,
    /// Nothing more happened for too long.
    TimedOut,
    /// By Ctrl-C.
    Interrupted,
    /// Who read the answers has gone.
    OutputClosed,
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Records that the brokers have.
    pub sent: u64,
    /// Images in them.
    pub images: u64,
    /// Inputs that could not be sent.
    pub bad: u64,
    /// Images with a caption.
    pub captions: u64,
    /// Images with a dead letter.
    pub dead: u64,
}

impl Counts {
    /// Share of the images that failed, here or at the workers; those without an answer are not counted.
    pub fn failure_rate(&self) -> f64 {
        let answered = self.captions + self.dead;
        let known = if answered > 0 { answered } else { self.images };
        (self.bad + self.dead) as f64 / (known + self.bad).max(1) as f64
    }
}

/// Where answers come from and where they go.
pub struct Answers {
    /// Records of the captions and dead-letter topics.
    pub records: Receiver<Result<Message, Error>>,
    /// `kafka.dead_letter_topic`.
    pub dead_letters: String,
    /// One line for each answer.
    pub out: Box<dyn Write>,
}

/// Sending, from the first record to the last answer.
pub struct Session<'a> {
    topic: &'a str,
    timeout: Duration,
    outbox: Outbox<Sent>,
    answers: Option<Answers>,
    bar: &'a ProgressBar,
    awaited: Awaited,
    next: u64,
    held: Option<Item>,
    exhausted: bool,
    counts: Counts,
    last: Instant,
}

impl<'a> Session<'a> {
    /// Creates the producer; nothing is sent yet.
    pub fn new(
        kafka: &Kafka,
        topic: &'a str,
        timeout: Duration,
        answers: Option<Answers>,
        bar: &'a ProgressBar,
    ) -> Result<Self, Error> {
        Ok(Self {
            topic,
            timeout,
            outbox: Outbox::new(kafka, topic)?,
            answers,
            bar,
            awaited: Awaited::new(topic),
            next: 0,
            held: None,
            exhausted: false,
            counts: Counts::default(),
            last: Instant::now(),
        })
    }

    /// Sends all of `items` and waits for what is to be waited for.
    ///
    /// # Errors
    /// What makes going on useless: the topic, the permissions, the login, the output.
    pub async fn run(&mut self, items: &Receiver<Result<Item, Bad>>) -> anyhow::Result<End> {
        let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
        loop {
            self.send_held()?;
            if self.is_complete() {
                return Ok(End::Complete);
            }
            tokio::select! {
                // A person's wish comes first, what is known before what is new, and the time is judged at the end.
                biased;
                stopped = &mut interrupted => {
                    stopped.context("cannot wait for Ctrl-C")?;
                    return Ok(End::Interrupted);
                }
                report = self.outbox.report(), if self.outbox.under_way() > 0 => {
                    let (sent, result) = report?;
                    if let Some(end) = self.delivered(sent, result)? {
                        return Ok(end);
                    }
                }
                record = next_answer(self.answers.as_ref()), if self.wants_answers() => {
                    let record = record.context("reading ended unexpectedly")??;
                    if let Some(end) = self.answered(&record)? {
                        return Ok(end);
                    }
                }
                item = items.recv(), if self.wants_items() => match item {
                    Ok(Ok(item)) => self.held = Some(item),
                    Ok(Err(bad)) => self.refuse(&bad),
                    Err(_) => self.exhausted = true,
                },
                () = tokio::time::sleep_until((self.last + self.timeout).into()), if self.is_waiting() => {
                    return Ok(End::TimedOut);
                }
            }
        }
    }

    /// What came of it so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Why a time-out is one, and what is missing.
    pub fn explain_timeout(&self) -> String {
        if self.outbox.under_way() > 0 {
            return self.outbox.explain_silence(self.timeout);
        }
        let time = humantime::format_duration(self.timeout);
        let (images, missing) = (self.awaited.images(), self.awaited.missing(5));
        let more = if images > missing.len() { ", …" } else { "" };
        format!(
            "no answer for {time}: {images} of {} images are missing: {}{more}. Does a worker run, and read {}?",
            self.counts.images,
            missing.join(", "),
            self.topic
        )
    }

    /// Records of which nobody knows whether the brokers have them.
    pub fn unacknowledged(&self) -> usize {
        self.outbox.under_way() + usize::from(self.held.is_some())
    }

    /// Images without an answer.
    pub fn unanswered(&self) -> usize {
        self.awaited.images()
    }

    fn is_waiting(&self) -> bool {
        self.outbox.under_way() > 0 || self.answers.is_some() && self.awaited.images() > 0
    }

    fn is_complete(&self) -> bool {
        self.exhausted && self.held.is_none() && !self.is_waiting()
    }

    fn wants_items(&self) -> bool {
        !self.exhausted && self.held.is_none() && self.outbox.has_room()
    }

    fn wants_answers(&self) -> bool {
        self.answers.is_some() && !self.awaited.is_crowded()
    }

    fn send_held(&mut self) -> anyhow::Result<()> {
        let Some(item) = self.held.take() else { return Ok(()) };
        let was_waiting = self.is_waiting();
        let sent = Sent { number: self.next, name: item.place.clone(), rows: item.rows };
        match self.outbox.send(item.key.as_deref(), &item.value, sent)? {
            Handed::Taken => {
                self.awaited.sent(self.next);
                self.next += 1;
                if !was_waiting {
                    self.last = Instant::now();
                }
            }
            Handed::Full(_) => self.held = Some(item),
            Handed::Refused(sent, NotTaken { why, .. }) => self.refuse(&Bad::new(sent.name, why)),
        }
        Ok(())
    }

    fn delivered(&mut self, sent: Sent, result: Result<Option<Place>, NotTaken>) -> anyhow::Result<Option<End>> {
        self.last = Instant::now();
        let place = match result {
            Ok(place) => place,
            Err(NotTaken { why, .. }) => {
                self.awaited.settled(sent.number);
                self.refuse(&Bad::new(sent.name, why));
                return Ok(None);
            }
        };
        self.counts.sent += 1;
        self.counts.images += sent.rows as u64;
        if self.answers.is_none() {
            self.bar.inc(1);
            return Ok(None);
        }
        let Some((partition, Some(offset))) = place else {
            self.awaited.settled(sent.number);
            let why = "sent, but the broker did not say to where: its answer cannot be told from others";
            self.refuse(&Bad::new(sent.name, why));
            return Ok(None);
        };
        self.bar.inc_length(sent.rows as u64);
        let early = self.awaited.placed(sent.number, (partition, offset), &sent.name, sent.rows);
        for taken in early {
            if let Some(end) = self.write(&taken)? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    #[allow(clippy::print_stderr)] // for people, beside the output
    fn refuse(&mut self, bad: &Bad) {
        self.counts.bad += 1;
        self.bar.suspend(|| eprintln!("{bad}"));
    }

    fn answered(&mut self, record: &Message) -> anyhow::Result<Option<End>> {
        let dead_letters = self.answers.as_ref().map_or("", |answers| &answers.dead_letters);
        match Answer::of(record, dead_letters) {
            Ok(answer) => self.awaited.take(answer).map_or(Ok(None), |taken| self.write(&taken)),
            Err(why) => {
                tracing::debug!("{}/{}/{}: {why}", record.topic, record.partition, record.offset);
                Ok(None)
            }
        }
    }

    fn write(&mut self, taken: &Taken) -> anyhow::Result<Option<End>> {
        self.last = Instant::now();
        let images = taken.images as u64;
        let count = if taken.answer.outcome.is_ok() { &mut self.counts.captions } else { &mut self.counts.dead };
        *count += images;
        self.bar.inc(images);
        let Some(answers) = &mut self.answers else { return Ok(None) };
        let mut line = taken.answer.to_line();
        line.push(b'\n');
        match answers.out.write_all(&line) {
            Err(error) if broken_pipe(&error) => Ok(Some(End::OutputClosed)),
            written => written.map(|()| None).context("cannot write the answers"),
        }
    }
}

async fn next_answer(answers: Option<&Answers>) -> Result<Result<Message, Error>, async_channel::RecvError> {
    match answers {
        Some(answers) => answers.records.recv().await,
        None => std::future::pending().await,
    }
}

/// Where the answers go: a file, or standard output for `-`.
pub fn open_output(path: &str) -> anyhow::Result<Box<dyn Write>> {
    if path == "-" {
        return Ok(Box::new(io::stdout()));
    }
    let file = std::fs::File::create(path).with_context(|| format!("cannot write {path} (--output)"))?;
    Ok(Box::new(file))
}
