//! A worker in its consumer group: one member for each input topic, and one for the retry topics.
//!
//! Of one that subscribes to all topics librdkafka's cooperative-sticky assignor counts the partitions together. Of two
//! workers and four topics with six partitions each, one had all of the requests and the other one all of the retries,
//! which are idle as a rule. Members that subscribe to different topics are balanced apart, so each topic is shared
//! out evenly.

use std::cell::{Cell, RefCell};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::time::Duration;

use rdkafka::Offset;
use rdkafka::consumer::{BaseConsumer, Consumer as _};

use super::context::{ConsumerSide, Errors};
use super::error::{Class, Error};
use super::member::{self, Member};
use super::transaction::GroupMetadata;
use crate::message::Message;
use crate::offsets::{Committed, TopicPartition};
use crate::settings::Kafka;

/// What the consumer's thread asks about commits; it owns the consumer, the answers are another room's.
///
/// The rule it must keep: an offset that is committed is never beyond the first unresolved message.
pub trait Committer: Send {
    /// What to commit now, beyond what the group has.
    fn due(&mut self) -> Vec<(TopicPartition, Committed)>;
    /// Whether a message of one of these partitions waits for something that is due.
    fn is_urgent(&self, of: &dyn Fn(&TopicPartition) -> bool) -> bool;
    /// The result of a commit.
    fn committed(&mut self, offsets: &[(TopicPartition, Committed)], result: &Result<(), Error>);
    /// Whether somebody else is still to commit something of these partitions.
    fn is_elsewhere(&self, partitions: &[TopicPartition]) -> bool;
}

/// The longest that leaving the group may take. Usually the brokers decide how long it does; but librdkafka 2.12 never answers
/// who gives partitions back at the moment at which it has left already (`rd_kafka_cgrp_op_serve`).
const LEAVE: Duration = Duration::from_secs(15);

/// Which member of the group, of the several that a worker is: a number from 0 to [`Consumer::members`], exclusive.
pub type MemberId = usize;

/// Something that happened to the consumer.
#[derive(Debug)]
pub enum Event {
    /// A message.
    Message(Message),
    /// The end of a partition with this number was reached; librdkafka does not say of which of the member's topics.
    End(MemberId, i32),
    /// Partitions are ours once [`Consumer::assign`] is called; the group waits for it.
    Assigned(MemberId, Vec<TopicPartition>),
    /// Partitions go to others once [`Consumer::unassign`] is called; the group waits for it.
    Revoked {
        /// Who had them.
        member: MemberId,
        /// Which.
        partitions: Vec<TopicPartition>,
        /// Others have them already: nothing may be committed.
        lost: bool,
    },
    /// A commit that did not wait has its result.
    Committed(MemberId, Vec<(TopicPartition, Committed)>, Result<(), Error>),
    /// Statistics, once a second of each member.
    Stats(MemberId, Stats),
    /// The last readable offset of partitions, exclusive, as [`Consumer::ask_ends`] asked.
    Ends(Vec<(TopicPartition, i64)>),
    /// An error that librdkafka deals with itself; it was logged.
    Passing(Class),
    /// The offset to read from is not in the log of some partition.
    OffsetOutOfRange,
    /// A batch of one of the member's partitions cannot be read, for this reason. It comes before any message behind it.
    Unreadable(MemberId, String),
    /// The consumer can do nothing more.
    Fatal(Error),
}

/// Statistics of a member; what is not of its partitions is of all members.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Brokers that are connected; 0 where one of us has none.
    pub brokers_up: usize,
    /// Whether the group has settled with us in it, for an input at least, be it without a partition.
    pub joined: bool,
    /// Bytes of messages fetched and not delivered.
    pub prefetched_bytes: u64,
    /// The partitions of the member that librdkafka knows of.
    pub partitions: Vec<PartitionStats>,
}

/// Statistics of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionStats {
    /// Which.
    pub partition: TopicPartition,
    /// One behind its last readable offset, if known.
    pub log_end: Option<i64>,
    /// Where librdkafka stands at the end of the partition, if it does.
    pub end_seen: Option<i64>,
    /// Messages fetched and not delivered, of all partitions of the member together.
    pub prefetched: u64,
}

/// Where reading begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At the first message there is.
    Beginning,
    /// At an offset.
    At(i64),
}

impl From<Start> for Offset {
    fn from(start: Start) -> Self {
        match start {
            Start::Beginning => Self::Beginning,
            Start::At(offset) => Self::Offset(offset),
        }
    }
}

/// What a worker reads of `kafka.inputs` and `kafka.retry_topics` as part of the group `kafka.group_id`. One thread owns it
/// and polls it all the time.
#[derive(Debug)]
pub struct Consumer {
    members: Vec<Member>,
    /// Who is asked first, so that no member waits behind a busy one.
    turn: Cell<MemberId>,
    /// Who had the newest message: the wait for the next one is there.
    busy: Cell<MemberId>,
    /// How many of the members read inputs: those that come first.
    inputs: usize,
    /// The newest statistics of each.
    stats: RefCell<Vec<Stats>>,
    errors: Arc<Errors>,
}

impl Consumer {
    /// Creates the clients; they join the group with [`Consumer::subscribe`].
    pub fn new(settings: &Kafka) -> Result<Self, Error> {
        let (subscriptions, errors) = (settings.subscriptions(), Arc::new(Errors::default()));
        let of = subscriptions.len();
        let members = subscriptions.iter().enumerate();
        let members = members.map(|(id, topics)| Member::new(settings, topics, (id, of), errors.clone()));
        let members = members.collect::<Result<Vec<_>, _>>()?;
        let stats = RefCell::new(vec![Stats::default(); of]);
        let inputs = settings.inputs.len();
        Ok(Self { members, turn: Cell::default(), busy: Cell::default(), inputs, stats, errors })
    }

    /// How many members of the group this is.
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// Whose partition this is, ours or not.
    pub fn member_of(&self, partition: &TopicPartition) -> MemberId {
        member_of(&self.members, partition)
    }

    /// Asks for a share of the topics. From here on the consumer must be polled.
    pub fn subscribe(&self) -> Result<(), Error> {
        self.members.iter().try_for_each(Member::subscribe)
    }

    /// What a producer of transactions needs to know of the group, for as long as this consumer lives.
    pub fn membership(&self) -> Membership {
        let of = |member: &Member| (member.topics().to_vec(), member.client());
        Membership(self.members.iter().map(of).collect())
    }

    /// The next event, or `None` after `timeout`. What another member has than the one whose message was the last is noticed
    /// after `timeout`, too.
    pub fn poll(&self, timeout: Duration) -> Option<Event> {
        let (first, count) = (self.turn.get(), self.members.len());
        let now = (first..first + count).filter(|_| count > 1);
        let found = now.map(|turn| turn % count).find_map(|at| Some((at, self.members[at].poll(Duration::ZERO)?)));
        let waiting = || Some((self.busy.get(), self.members[self.busy.get()].poll(timeout)?));
        let (at, event) = found.or_else(waiting)?;
        self.turn.set((at + 1) % count);
        Some(match event {
            Event::Stats(at, stats) => Event::Stats(at, self.together(at, stats)),
            Event::Message(message) => {
                self.busy.set(at);
                Event::Message(message)
            }
            event => event,
        })
    }

    /// Statistics of a member, with what all members have in common.
    fn together(&self, at: MemberId, mut stats: Stats) -> Stats {
        // A client may know others' partitions, of which it fetches nothing.
        stats.partitions.retain(|known| self.member_of(&known.partition) == at);
        let mut newest = self.stats.borrow_mut();
        newest[at] = Stats { partitions: Vec::new(), ..stats.clone() };
        let connected = newest.iter().all(|of| of.brokers_up > 0);
        if connected {
            self.errors.clear();
        }
        let most = newest.iter().map(|of| of.brokers_up).max().unwrap_or_default();
        Stats {
            brokers_up: if connected { most } else { 0 },
            joined: newest[..self.inputs].iter().any(|of| of.joined),
            prefetched_bytes: newest.iter().map(|of| of.prefetched_bytes).sum(),
            partitions: stats.partitions,
        }
    }

    /// The newest error that librdkafka reported, if things have not been well again since.
    pub fn last_error(&self) -> Option<(Class, String)> {
        self.errors.last()
    }

    /// What the group has committed for each partition, as a member asks that was assigned them. Waits for the brokers, two
    /// seconds at most.
    ///
    /// Not as any member: of one that is joining, nothing is answered until all others have joined, and those that wait for
    /// this answer never would.
    pub fn committed(
        &self,
        member: MemberId,
        partitions: &[TopicPartition],
    ) -> Result<Vec<(TopicPartition, Option<Committed>)>, Error> {
        self.members[member].committed(partitions)
    }

    /// Takes partitions on that a member was assigned, each from where it is to be read.
    pub fn assign(&self, member: MemberId, partitions: &[(TopicPartition, Start)]) -> Result<(), Error> {
        self.members[member].assign(partitions)
    }

    /// Lets partitions go that are revoked of a member.
    pub fn unassign(&self, member: MemberId, partitions: &[TopicPartition]) -> Result<(), Error> {
        self.members[member].unassign(partitions)
    }

    /// Whether others already have what we thought was this member's.
    pub fn assignment_lost(&self, member: MemberId) -> bool {
        self.members[member].assignment_lost()
    }

    /// Stops the delivery of partitions; what was prefetched of them is thrown away and read again later.
    pub fn pause(&self, partitions: &[TopicPartition]) -> Result<(), Error> {
        self.by_member(partitions, Member::pause)
    }

    /// Goes on with the delivery of partitions.
    pub fn resume(&self, partitions: &[TopicPartition]) -> Result<(), Error> {
        self.by_member(partitions, Member::resume)
    }

    /// Does the same to the partitions of each member; the first error is told.
    fn by_member(
        &self,
        partitions: &[TopicPartition],
        does: impl Fn(&Member, &[TopicPartition]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut done = Ok(());
        for (id, member) in self.members.iter().enumerate() {
            let of = partitions.iter().filter(|partition| self.member_of(partition) == id);
            let of: Vec<_> = of.cloned().collect();
            if !of.is_empty() {
                done = done.and(does(member, &of));
            }
        }
        done
    }

    /// Reads a partition from `start` on, without waiting.
    pub fn seek(&self, partition: &TopicPartition, start: Start) -> Result<(), Error> {
        self.members[self.member_of(partition)].seek(partition, start)
    }

    /// Commits exactly these offsets of a member with their notes; the result comes as [`Event::Committed`].
    pub fn commit(&self, member: MemberId, offsets: &[(TopicPartition, Committed)]) -> Result<(), Error> {
        self.members[member].commit(offsets)
    }

    /// Commits exactly these offsets of a member with their notes and waits for the broker; at most a session's time-out
    /// when it is away, which is why the end of a worker does not use it.
    pub fn commit_now(&self, member: MemberId, offsets: &[(TopicPartition, Committed)]) -> Result<(), Error> {
        self.members[member].commit_now(offsets)
    }

    /// First and last readable offset of a partition, the latter exclusive. Waits for the broker, two seconds at most.
    pub fn bounds(&self, partition: &TopicPartition) -> Result<(i64, i64), Error> {
        self.members[0].bounds(partition)
    }

    /// Asks for the ends of partitions, unless that is being asked already; the answer comes as [`Event::Ends`]. Of
    /// paused ones the statistics tell the ends only as they were before.
    pub fn ask_ends(&self, partitions: &[TopicPartition]) {
        self.members[0].ask_ends(partitions);
    }

    /// Leaves the group, in [`LEAVE`] at most. Commit before; what is polled for is over.
    pub fn close(self) {
        let (leaving, left) = mpsc::sync_channel::<()>(0);
        // At once: the group settles once, and brokers that are away are waited for once.
        for member in self.members {
            let leaving = leaving.clone();
            std::thread::spawn(move || {
                member.close();
                drop(leaving);
            });
        }
        drop(leaving);
        // The channel ends with the last of them.
        if left.recv_timeout(LEAVE) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("leaving the consumer group does not end; it is left to itself");
        }
    }
}

/// Topics are few. One that nobody reads is the first member's, which is asked for offsets of any.
fn member_of(members: &[Member], partition: &TopicPartition) -> MemberId {
    members.iter().position(|member| member.reads(&partition.topic)).unwrap_or_default()
}

type Client = Weak<BaseConsumer<ConsumerSide>>;

/// The group as a producer of transactions sees it, from another thread than the consumer's: the topics of each member,
/// and its client.
pub struct Membership(Vec<(Vec<Arc<str>>, Client)>);

/// Offsets of one member, and who it is.
pub type OfMember = (GroupMetadata, Vec<(TopicPartition, Committed)>);

impl Membership {
    /// Offsets by the members whose they are, and who these are in the group now; `None` when the consumer has ended.
    ///
    /// Take it first and look at the ledger afterwards: partitions leave the ledger before they leave the group, so what
    /// the ledger still has was ours in the generation that was taken, and the brokers refuse that generation from the
    /// moment on when the partitions are another worker's.
    pub fn split(&self, offsets: &[(TopicPartition, Committed)]) -> Option<Vec<OfMember>> {
        let mut members = Vec::new();
        for (topics, client) in &self.0 {
            let of = offsets.iter().filter(|(partition, _)| topics.contains(&partition.topic));
            let of: Vec<_> = of.cloned().collect();
            if !of.is_empty() {
                members.push((GroupMetadata(client.upgrade()?.group_metadata()?), of));
            }
        }
        let found: usize = members.iter().map(|(_, of)| of.len()).sum();
        (found == offsets.len()).then_some(members)
    }

    /// What the group has committed for each partition; transactions that are under way are waited for. Waits for the
    /// brokers, two seconds at most.
    ///
    /// # Errors
    /// The brokers do not answer in time, or the consumer has ended.
    pub fn committed(&self, partitions: &[TopicPartition]) -> Result<Vec<(TopicPartition, Option<Committed>)>, Error> {
        let ended = || Error::Other { doing: "asking for the committed offsets", reason: "the consumer ended".into() };
        let mut committed = Vec::with_capacity(partitions.len());
        for (topics, client) in &self.0 {
            // Each as the member that has it, see [`Consumer::committed`].
            let of = partitions.iter().filter(|partition| topics.contains(&partition.topic));
            let of: Vec<_> = of.cloned().collect();
            if !of.is_empty() {
                committed.extend(member::committed(&*client.upgrade().ok_or_else(ended)?, &of)?);
            }
        }
        Ok(committed)
    }
}

impl std::fmt::Debug for Membership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Membership").finish_non_exhaustive()
    }
}
