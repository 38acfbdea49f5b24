//! Consume: one OS thread that owns the consumer, polls it all the time, and hands messages on while there is room.
//!
//! A message gets its ticket and its permit here. When there is no room, it is held, all partitions are paused, and
//! polling goes on, so that the group keeps its member. Which partitions rest is decided in one place,
//! `Partitions::change`; nothing else pauses or resumes.

mod group;
mod held;
mod partitions;
mod report;
mod solo;
mod spare;
mod status;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_channel::Sender;
use jiff::Timestamp;
use tokio::sync::oneshot;

use self::group::{Closing, Membership, Rebalance};
use self::held::Held;
use self::partitions::{Arrival, Partitions};
use self::solo::Admission;
use self::spare::Spare;
pub use self::status::{CLOSE, Consume, ConsumeStatus, ConsumeView, PartitionStatus};
use self::status::{Control, Phase};
use crate::budget::Pool;
use crate::disposition::Stage;
use crate::gate::{Gate, Hysteresis, Passage, Reason};
use crate::kafka::{Committer, Consumer, Error, Event};
use crate::message::Message;
use crate::metrics::Metrics;
use crate::offsets::{Ledger, Outcome, TopicPartition};
use crate::settings;
use crate::stage::Finished;
use crate::tracked::Tracked;

/// What a message costs beside its bytes: its structs, its headers' list, its ticket, its place in a queue.
pub const MESSAGE_OVERHEAD: usize = 1024;

/// Longest wait for an event; commands are noticed within it.
const IDLE_POLL: Duration = Duration::from_millis(20);

/// Longest wait for one more try while a message is held and nothing is paused yet.
const HELD_POLL: Duration = Duration::from_millis(1);

/// How often the state of all partitions is looked at; after every message only its own is.
const SWEEP: Duration = Duration::from_millis(20);

/// How old a status may be.
const STATUS_AGE: Duration = Duration::from_millis(100);

/// How often the ends of resting partitions are asked for; those of others come with the statistics, as often.
const ENDS_AGE: Duration = Duration::from_secs(1);

/// The limit on messages in flight opens again at this share of it.
const LIMIT_RESUME: f64 = 0.5;

/// What the stage needs.
pub struct Setup {
    /// The member of the group; it joins when the stage starts.
    pub consumer: Consumer,
    /// Intervals and limits of it.
    pub kafka: settings::Kafka,
    /// Limits.
    pub flow: settings::Flow,
    /// Where tickets come from.
    pub ledger: Ledger,
    /// Permits of messages.
    pub messages: Pool,
    /// Whether to consume at all.
    pub gate: Gate,
    /// What is to be committed.
    pub committer: Box<dyn Committer>,
    /// Counts how long messages were held, and how long commits took.
    pub metrics: Arc<Metrics>,
}

/// Starts the thread. Messages go to `output`, of which nobody else may hold a sender: it closes after
/// [`Consume::stop`], so that the flow drains. Those that have killed a worker go to `failures`.
///
/// # Errors
/// librdkafka refuses the topics. That brokers are away is no error; the status tells.
pub fn start(setup: Setup, output: Sender<Tracked<Message>>, failures: Sender<Finished>) -> Result<Consume, Error> {
    setup.consumer.subscribe()?;
    let control = Arc::new(Control::default());
    let (failure, failed) = oneshot::channel();
    let (end, ended) = oneshot::channel();
    let (leave, left) = oneshot::channel();
    let (ledger, told) = (setup.ledger.clone(), control.clone());
    let worker = Worker::new(setup, (output, failures), Signals { control: control.clone(), failure: Some(failure) });
    let thread = std::thread::Builder::new().name("consume".into());
    let spawned = thread.spawn(move || {
        let (result, consumer) = worker.run();
        // Nobody listens when the handle was dropped; then nobody wants to know.
        let _ = end.send(result);
        consumer.close();
        told.status().joined = false;
        let _ = leave.send(());
    });
    let starting = |error: std::io::Error| Error::Other { doing: "starting a thread", reason: error.to_string() };
    spawned.map_err(starting)?;
    Ok(Consume { control, ledger, failed, ended, left })
}

/// The times at which things are due.
struct Clock {
    /// Before which a message that waits for a commit hurries nobody.
    urgent: Instant,
    sweep: Instant,
    status: Instant,
    ends: Instant,
}

/// Hysteresis of everything that can shut the gate by itself.
struct Pressure {
    messages: Hysteresis,
    limit: Hysteresis,
    /// A message found no room for longer than patience lasts.
    held: bool,
}

/// What the handle sees.
struct Signals {
    control: Arc<Control>,
    failure: Option<oneshot::Sender<Error>>,
}

struct Worker {
    setup: Setup,
    output: Option<Sender<Tracked<Message>>>,
    failures: Option<Sender<Finished>>,
    signals: Signals,
    /// The error to end with.
    error: Option<Error>,
    partitions: Partitions,
    /// Messages that found no room; without tickets, so that they can be forgotten.
    held: Held,
    /// The partition that is read alone, one message at a time.
    solo: Option<TopicPartition>,
    pressure: Pressure,
    /// Of each member of the group that this worker is.
    members: Vec<Membership>,
    /// How far the last commit has come.
    closing: Option<Closing>,
    clock: Clock,
    spare: Spare,
}

impl Worker {
    fn new(setup: Setup, (output, failures): (Sender<Tracked<Message>>, Sender<Finished>), signals: Signals) -> Self {
        let now = Instant::now();
        let (pause, resume) = (setup.flow.pause_at, setup.flow.resume_at);
        let first_commit = now + setup.kafka.commit_interval;
        Self {
            output: Some(output),
            failures: Some(failures),
            signals,
            error: None,
            partitions: Partitions::default(),
            held: Held::default(),
            solo: None,
            pressure: Pressure {
                messages: Hysteresis::new(pause, resume),
                limit: Hysteresis::new(1.0, LIMIT_RESUME),
                held: false,
            },
            members: std::iter::repeat_with(|| Membership::new(first_commit)).take(setup.consumer.members()).collect(),
            closing: None,
            clock: Clock { urgent: now, sweep: now, status: now, ends: now },
            spare: Spare::default(),
            setup,
        }
    }

    /// Runs until the last commit; what is left to do is to leave the group.
    fn run(mut self) -> (Result<(), Error>, Consumer) {
        loop {
            let phase = self.signals.control.phase();
            if phase > Phase::Running {
                self.stop_delivery();
            }
            if phase == Phase::Closing
                && let Some(committed) = self.last_commit(Instant::now())
            {
                return self.end(committed);
            }
            self.offer_held();
            let now = Instant::now();
            self.advance_rebalances(now);
            self.commit_if_due(now);
            self.sweep_if_due(now);
            if let Some(event) = self.setup.consumer.poll(self.patience()) {
                self.handle(event);
            }
        }
    }

    /// How long to wait for an event.
    fn patience(&self) -> Duration {
        if self.held.is_empty() || self.pressure.held { IDLE_POLL } else { HELD_POLL }
    }

    fn handle(&mut self, event: Event) {
        let now = Instant::now();
        match event {
            Event::Message(message) => self.receive(message, now),
            Event::End(member, number) => {
                let Self { partitions, setup, .. } = self;
                partitions.ended(number, |partition| setup.consumer.member_of(partition) == member, now);
            }
            Event::Assigned(member, partitions) => {
                self.signals.control.status().rebalances += 1;
                self.members[member].rebalance = Some(Rebalance::Assign { partitions, next_try: now });
            }
            Event::Revoked { member, partitions, lost } => self.begin_revoke(member, partitions, lost, now),
            Event::Committed(member, offsets, result) => {
                if let (Some(since), Ok(())) = (self.members[member].committing.take(), &result) {
                    self.setup.metrics.stage(Stage::Commit, since.elapsed());
                }
                self.record_commit(&offsets, &result);
            }
            Event::Stats(_, stats) => {
                self.partitions.learn(&stats, now);
                self.look_for_work(stats.joined, now);
                let mut status = self.signals.control.status();
                status.joined = stats.joined;
                status.brokers_up = stats.brokers_up;
                status.prefetched_bytes = stats.prefetched_bytes;
            }
            Event::Ends(ends) => self.partitions.learn_ends(&ends),
            Event::Passing(class) => tracing::debug!(?class, "passing kafka error"),
            Event::OffsetOutOfRange => {
                let error = self.out_of_range();
                self.fail(error);
            }
            Event::Unreadable(member, reason) => {
                let error = self.unreadable(member, &reason);
                self.fail(error);
            }
            Event::Fatal(error) => self.fail(error),
        }
    }

    // --- messages

    fn receive(&mut self, message: Message, now: Instant) {
        let partition = partition_of(&message);
        if let Some(due) = self.due(&message, now)
            && self.partitions.defer(&partition, message.offset, due, now)
        {
            return self.apply_pauses(now);
        }
        let taken = match self.partitions.received(&partition, message.offset, now) {
            Arrival::Taken => true,
            Arrival::Left => false,
            Arrival::Ahead(offset) => {
                tracing::warn!(%partition, offset, came = message.offset, "a message did not come again; it is sought anew");
                false
            }
            Arrival::Without(offset) => {
                tracing::warn!(%partition, offset, came = message.offset, "a message has gone from the log, unread");
                true
            }
        };
        if !taken || self.output.is_none() {
            // Of a partition that goes to others, or after the stop: the next reader begins before it. Or behind one that
            // was turned away.
            self.signals.control.status().skipped += 1;
            return;
        }
        self.signals.control.set_at_end(false);
        if self.held.is_empty() {
            self.offer(message, now);
        } else {
            self.held.push(message, now);
        }
        self.apply_pauses(now);
    }

    /// When a message of a retry topic is due, if that is not now: after the topic's delay at the latest, whatever a
    /// header or a clock says.
    fn due(&self, message: &Message, now: Instant) -> Option<Instant> {
        let retry = self.setup.kafka.retry_topic(&message.topic)?;
        let wait = Duration::try_from(message.not_before()?.duration_since(Timestamp::now())).ok()?;
        (!wait.is_zero()).then(|| now + wait.min(retry.delay))
    }

    fn look_at_span(&mut self, partition: &TopicPartition) {
        let span = self.setup.ledger.position(partition).map_or(0, |position| position.span);
        self.partitions.spanned(partition, span, self.setup.flow.max_span);
    }

    /// Hands a message on, or holds it.
    fn offer(&mut self, message: Message, now: Instant) {
        if let Some(message) = self.pass(message) {
            self.held.push(message, now);
        }
    }

    /// Tries the held messages again.
    fn offer_held(&mut self) {
        while let Some(message) = self.held.take() {
            if !self.partitions.takes(&partition_of(&message)) {
                continue;
            }
            if let Some(message) = self.pass(message) {
                self.held.put_back(message);
                return;
            }
        }
    }

    /// The partition can go no further until older messages are resolved, or something is committed. What came of it is
    /// forgotten, so that others do not wait behind it, and is read again.
    fn turn_away(&mut self, partition: &TopicPartition, offset: i64) {
        self.partitions.turn_away(partition, offset);
        self.held.retain(|message| partition_of(message) != *partition);
        self.review(Instant::now());
    }

    /// Gives the message back when there is no room for it.
    fn pass(&mut self, message: Message) -> Option<Message> {
        let partition = partition_of(&message);
        if self.partitions.is_span_full(&partition) {
            self.turn_away(&partition, message.offset);
            return None;
        }
        let Some(output) = &self.output else { return None };
        let ledger = &self.setup.ledger;
        if message.payload.is_none() {
            let ticket = ledger.open(&partition, message.offset);
            self.count(&message, ticket.is_some());
            if let Some(ticket) = ticket {
                ticket.resolve(Outcome::Skipped);
            }
            self.look_at_span(&partition);
            return None;
        }
        if !self.setup.gate.admits(ledger.open_tickets()) || output.is_full() {
            return Some(message);
        }
        match self.admission(&partition, message.offset) {
            Admission::Now => {}
            Admission::Later => return Some(message),
            Admission::Elsewhere => {
                self.turn_away(&partition, message.offset);
                return None;
            }
            Admission::Blamed(starts) => return self.quarantine(message, starts),
        }
        let (ledger, Some(output)) = (&self.setup.ledger, &self.output) else { return None };
        let Some(permit) = self.setup.messages.try_acquire(message.size() + MESSAGE_OVERHEAD) else {
            return Some(message);
        };
        let ticket = ledger.open(&partition, message.offset);
        self.count(&message, ticket.is_some());
        let ticket = ticket?;
        self.setup.metrics.stage(Stage::Consume, message.received.elapsed());
        // There is room: nobody else sends on this channel.
        let sent = output.try_send(Tracked::new(message, ticket, permit));
        self.look_at_span(&partition);
        if let Err(refused) = sent {
            refused.into_inner().abandon();
            self.fail_behind();
        }
        None
    }

    fn fail_behind(&mut self) {
        self.fail(Error::Other { doing: "handing messages on", reason: "the stage behind it has ended".into() });
    }

    // --- pausing

    /// Whether all partitions are to rest. Tells the gate why on the way.
    fn shut(&mut self, now: Instant) -> bool {
        // The image pool has no say: whoever waits for it holds a message permit, so a spent image pool shows in the
        // message pool, after the devices were given a backlog to work on.
        let Setup { gate, messages, ledger, .. } = &self.setup;
        let fill = messages.fill();
        gate.set(Reason::Messages, self.pressure.messages.update(fill));
        let limited = match gate.passage() {
            Passage::Limited(limit) => self.pressure.limit.update(ledger.open_tickets() as f64 / limit.max(1) as f64),
            Passage::Open | Passage::Shut => self.pressure.limit.update(0.0),
        };
        let queue_low = self
            .output
            .as_ref()
            .is_none_or(|output| output.capacity().is_none_or(|capacity| output.len() <= capacity / 2));
        if self.held.too_much(now) {
            self.pressure.held = true;
        } else if self.held.is_empty() && queue_low && fill <= self.setup.flow.resume_at {
            self.pressure.held = false;
        }
        let shut = gate.passage() == Passage::Shut;
        let held = self.pressure.held;
        gate.tell(Reason::Limit, limited);
        gate.tell(Reason::Queue, held && !queue_low);
        // What finds no room though the queue has some is too long for what is left of the pool.
        gate.tell(Reason::Messages, held && queue_low && !limited && !shut && self.solo.is_none());
        gate.tell(Reason::Span, self.partitions.any_span_full() || ledger.is_crowded());
        limited || held || self.output.is_none() || shut
    }

    /// The one place that pauses and resumes.
    fn apply_pauses(&mut self, now: Instant) {
        let shut = self.shut(now);
        let change = self.partitions.change(shut, now);
        let pause = if change.pause.is_empty() { Ok(()) } else { self.setup.consumer.pause(&change.pause) };
        let resume = if change.resume.is_empty() { Ok(()) } else { self.setup.consumer.resume(&change.resume) };
        // A thread of librdkafka that has nothing to fetch sleeps for up to a second, and a resume does not wake it;
        // a seek does.
        for (partition, start) in &change.seek {
            if let Err(error) = self.setup.consumer.seek(partition, *start) {
                tracing::warn!(%error, %partition, "could not read on where the partition rested; trying again");
                self.partitions.not_sought(partition);
            }
        }
        if let Err(error) = pause.and(resume) {
            tracing::warn!(%error, "could not pause or resume");
        }
    }

    fn sweep_if_due(&mut self, now: Instant) {
        if now < self.clock.sweep {
            return;
        }
        self.clock.sweep = now + SWEEP;
        for partition in self.partitions.names() {
            self.look_at_span(&partition);
        }
        self.review(now);
        let settled = self.members.iter().all(Membership::has_its_share);
        self.signals.control.set_at_end(self.held.is_empty() && settled && self.partitions.all_at_end());
        if self.signals.control.status().brokers_up > 0 {
            self.seek_stuck(now);
        }
        if now >= self.clock.status {
            self.clock.status = now + STATUS_AGE;
            self.publish_status();
        }
        if now >= self.clock.ends {
            self.clock.ends = now + ENDS_AGE;
            self.setup.consumer.ask_ends(&self.partitions.resting());
        }
    }

    fn seek_stuck(&mut self, now: Instant) {
        for (partition, start) in self.partitions.stuck(self.setup.kafka.stuck_after, now) {
            tracing::warn!(%partition, ?start, "the partition was silent and is read anew");
            self.signals.control.status().reseeks += 1;
            // What librdkafka was told may have been lost on its way, too.
            let resumed = self.setup.consumer.resume(std::slice::from_ref(&partition));
            if let Err(error) = resumed.and(self.setup.consumer.seek(&partition, start)) {
                tracing::warn!(%error, %partition, "could not read the partition anew");
            }
        }
    }

    // --- the end

    /// Remembers what the worker ends with, and begins the end.
    fn fail(&mut self, error: Error) {
        if self.error.is_none() {
            self.error = Some(error.clone());
            if let Some(failure) = self.signals.failure.take() {
                let _ = failure.send(error);
            }
        }
        self.signals.control.advance(Phase::Stopping);
    }

    /// Closes the channel, so that the flow drains; what is held has no ticket and is simply read again.
    fn stop_delivery(&mut self) {
        self.failures = None;
        if self.output.take().is_some() {
            self.held.clear();
            self.setup.gate.shut(Reason::Drain);
            self.apply_pauses(Instant::now());
        }
    }
}

fn partition_of(message: &Message) -> TopicPartition {
    TopicPartition { topic: message.topic.clone(), partition: message.partition }
}
