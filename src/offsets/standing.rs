//! What the group has of one partition, and what it is to have: the offset, and the note beside it. Pure.
//!
//! A worker writes down that it has started at an offset before it hands on the first message behind it, and takes that
//! back when it ends in order. So the next worker can count the starts that ended otherwise. The rules:
//!
//! - a commit that moves the offset begins the count anew, with 1 while messages behind it are open, else with 0;
//! - after one such start, no more than [`FEW`] offsets behind the committed one are handed on, for the next
//!   `flow.max_span` offsets: what killed the worker was among these, since nothing beyond was ever in flight;
//! - [`SUSPECT_AFTER`] such starts make the next [`FEW`] offsets suspect: the second start had no others in flight;
//! - of a suspect span one message at a time is handed on, each after a note that it is alone is written;
//! - so a note that says so when a partition is assigned names the message that a worker died of.

use super::note::{Committed, Note, SUSPECT_AFTER};

/// Offsets of a partition in flight after a start that did not end in order. A second death leaves so many to be taken one
/// at a time, which must not take long; a device is still given whole batches.
const FEW: u64 = 32;

/// One assignment of a partition.
#[derive(Debug, Clone, Default)]
pub(super) struct Standing {
    /// What the group has, as it was found and as it was committed since.
    pub(super) had: Option<Committed>,
    /// What is to be committed before a message may be handed on.
    wanted: Option<Committed>,
    /// What was wanted when the partition began to leave: it may be on its way, and still be written down.
    asked: Option<Committed>,
    /// The furthest offset that was ever wanted: a commit of it may be on its way, whatever is wanted by now.
    furthest: Option<i64>,
    /// Whether a transaction is to commit something of this that is not known to have ended.
    under_way: bool,
    /// Whether this start is written down.
    begun: bool,
    /// Starts found, this one not among them; 0 once they no longer count.
    starts: u32,
    /// End of the suspect span.
    pub(super) until: Option<i64>,
    /// End of the offsets of which only a few are in flight.
    careful: Option<i64>,
    /// The message that waits until those before it are committed.
    crowded: Option<i64>,
    /// The message that was alone in flight when a worker died.
    pub(super) blamed: Option<i64>,
    /// The partition goes to another worker in order.
    leaving: bool,
    /// The worker ends in order.
    ending: bool,
    /// A message was dropped: whatever the worker says now, it did not end in order here.
    lost: bool,
}

/// How far the messages of a partition have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reached {
    /// The offset that may be committed, if a message was seen.
    pub(super) end: Option<i64>,
    /// Whether all messages seen lie before it.
    pub(super) idle: bool,
}

impl Standing {
    /// Begins with what the group has.
    pub(super) fn found(committed: Option<Committed>, max_span: u64) -> Self {
        let Some(Committed { offset, note }) = committed else { return Self::default() };
        let given = note.until.filter(|until| *until > offset);
        let suspect = note.starts >= SUSPECT_AFTER || note.alone;
        let behind = |offsets: u64| offset.saturating_add_unsigned(offsets.max(1));
        Self {
            had: committed,
            starts: note.starts,
            until: given.or(suspect.then(|| behind(max_span.min(FEW)))),
            careful: (note.starts > 0).then(|| behind(max_span)),
            blamed: note.alone.then_some(offset),
            ..Self::default()
        }
    }

    /// Whether a message may be handed on beside others. If not, something is to be written down first: the start, or,
    /// where everything before the message is `settled`, that the worker has come this far.
    pub(super) fn begin(&mut self, offset: i64, settled: bool) -> bool {
        if !self.begun {
            self.want(offset, Note { starts: self.starts.saturating_add(1), ..Note::default() });
            return false;
        }
        let near = self.is_near(offset);
        if !near && settled {
            // Offsets are sparse: there is nothing in between that would ever move the committed one.
            self.want(offset, Note { starts: 1, ..Note::default() });
        }
        near
    }

    /// Whether an offset is near enough to the committed one.
    fn is_near(&mut self, offset: i64) -> bool {
        self.careful = self.careful.filter(|until| offset < *until);
        let behind = self.had.map_or(0, |had| offset.abs_diff(had.offset));
        self.crowded = (self.careful.is_some() && behind >= FEW).then_some(offset);
        self.crowded.is_none()
    }

    /// Whether it is written down that the message is alone. If not, that is to be done first.
    pub(super) fn alone(&mut self, offset: i64) -> bool {
        let starts = if self.begun { 1 } else { self.starts.saturating_add(1) };
        if self.wanted.is_none_or(|wanted| wanted.offset != offset || !wanted.note.alone) {
            self.want(offset, Note { starts, alone: true, until: self.until });
        }
        self.wanted == self.had
    }

    fn want(&mut self, offset: i64, note: Note) {
        if !self.leaving && !self.ending {
            self.wanted = Some(Committed { offset, note });
            self.furthest = self.furthest.max(Some(offset));
        }
    }

    /// Whether something is still to be committed before the partition can begin, or go on.
    pub(super) fn is_waiting(&self) -> bool {
        self.is_crowded() || self.wanted.is_some() && !self.begun
    }

    /// Whether a message waits until those before it are committed.
    pub(super) fn is_crowded(&self) -> bool {
        self.crowded.is_some()
    }

    /// Whether the group is told that a message is alone, be it resolved by now. What a dead worker has told does not
    /// count.
    pub(super) fn says_alone(&self) -> bool {
        self.blamed.is_none() && self.had.is_some_and(|had| had.note.alone)
    }

    /// Whether something is wanted at once: a message waits for it.
    pub(super) fn is_urgent(&self, reached: Reached) -> bool {
        let waiting = self.wanted.is_some() && self.wanted != self.had;
        let told = self.had.is_some_and(|had| had.note.alone);
        let crowded = self.is_crowded() && reached.idle;
        (waiting || told || crowded) && self.due(reached).is_some()
    }

    /// What is to be committed now.
    pub(super) fn due(&self, reached: Reached) -> Option<Committed> {
        // It is wanted while no message of the partition is open, for the next one: nothing unresolved is passed.
        if let Some(wanted) = self.wanted
            && self.had.is_none_or(|had| had.offset <= wanted.offset && had != wanted)
        {
            return Some(wanted);
        }
        let moved = reached.end.filter(|end| self.had.is_none_or(|had| *end > had.offset));
        match moved {
            Some(offset) => Some(Committed { offset, note: self.note(reached.idle) }),
            None => self.amended(reached.idle),
        }
    }

    /// The offset that the group has, with another note, where the one that it has is no longer true.
    pub(super) fn amended(&self, idle: bool) -> Option<Committed> {
        let had = self.had?;
        let note = self.note_at_rest(had, idle);
        (note != had.note).then_some(Committed { note, ..had })
    }

    /// What to say of messages that wait or pass as usual.
    fn note(&self, idle: bool) -> Note {
        let starts = match (self.begun, self.blamed) {
            (true, _) => u32::from(!idle),
            // The offset has moved past it: its dead letter is there.
            (false, Some(_)) => 0,
            (false, None) => self.starts,
        };
        Note { starts, alone: false, until: self.until.filter(|_| !self.ending) }
    }

    fn note_at_rest(&self, had: Committed, idle: bool) -> Note {
        // It is true: that a message is alone, or that one was when a worker died, or that this one did not end in order.
        if self.lost || self.blamed.is_some() || self.wanted == Some(had) {
            return had.note;
        }
        if self.ending {
            return Note { starts: if self.begun { 0 } else { self.starts }, ..Note::default() };
        }
        if self.leaving && !idle {
            // It may kill this worker yet, which nobody will know of; the count goes on.
            return Note { alone: false, ..had.note };
        }
        let over = had.note.until.is_some() && self.until.is_none();
        let drained = self.leaving && self.begun && had.note.starts > 0;
        // Nothing was handed on for it.
        let in_vain = self.leaving && self.asked == Some(had);
        if had.note.alone || over || drained || in_vain { self.note(idle) } else { had.note }
    }

    /// A transaction is to commit something of this.
    pub(super) fn transacting(&mut self) {
        self.under_way = true;
    }

    /// Whether a transaction may still commit something of this.
    pub(super) fn is_under_way(&self) -> bool {
        self.under_way
    }

    /// The furthest offset that the group has, or was to have for the sake of a message to come.
    pub(super) fn furthest(&self) -> Option<i64> {
        self.furthest.max(self.had.map(|had| had.offset))
    }

    /// The group has this now.
    pub(super) fn committed(&mut self, committed: Committed) {
        self.under_way = false;
        if self.had.is_some_and(|had| had.offset > committed.offset) {
            return;
        }
        self.had = Some(committed);
        self.begun |= self.wanted == self.had;
        // What was wanted before an offset that is committed is of no use any more.
        self.wanted = self.wanted.filter(|wanted| wanted.offset >= committed.offset);
        // It asks again, and is told whether that was enough.
        self.crowded = None;
        if self.blamed.is_some_and(|blamed| blamed < committed.offset) {
            self.dealt_with();
        }
    }

    /// The message that a worker died of is dealt with.
    pub(super) fn dealt_with(&mut self) {
        self.blamed = None;
        self.starts = 0;
    }

    /// The suspect span is through: none of it killed this worker.
    pub(super) fn trust(&mut self) {
        self.dealt_with();
        self.until = None;
        self.wanted = None;
    }

    /// The partition goes to another worker in order.
    pub(super) fn leave(&mut self) {
        self.leaving = true;
        self.asked = self.wanted.take();
    }

    /// The worker ends in order.
    pub(super) fn end(&mut self) {
        self.ending = true;
        self.wanted = None;
    }

    /// A message was dropped.
    pub(super) fn lose(&mut self) {
        self.lost = true;
    }
}
