//! Lives of workers on the ledger: who dies of what, and who is blamed.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::offsets::{Committed, Note, Outcome, Reach, Ticket};

const SPAN: u64 = 6;

fn partition(number: usize) -> TopicPartition {
    TopicPartition { topic: "t".into(), partition: number as i32 }
}

/// An assigned partition of which the group has this.
fn assigned(offset: i64, note: Note) -> (Ledger, TopicPartition) {
    let ledger = Ledger::new();
    let tp = partition(0);
    ledger.assign(tp.clone());
    ledger.found(&tp, Some(Committed { offset, note }), SPAN);
    (ledger, tp)
}

fn starts(starts: u32) -> Note {
    Note { starts, ..Note::default() }
}

/// Commits what is due, and tells it.
fn commit(ledger: &Ledger) -> Vec<Committed> {
    let due = ledger.due(Reach::Resolved);
    for prefix in &due {
        ledger.transacted(prefix);
    }
    due.into_iter().map(|prefix| prefix.end).collect()
}

#[test]
fn the_first_message_of_an_assignment_waits_for_its_note_and_no_other_does() {
    let (ledger, tp) = assigned(5, starts(1));
    assert_eq!(commit(&ledger), [], "an idle partition is noted nowhere");
    assert_eq!(ledger.pass(&tp, 7), Pass::Later);
    assert!(ledger.is_urgent(Reach::Resolved) && ledger.is_waiting(&tp));
    assert_eq!(commit(&ledger), [Committed { offset: 7, note: starts(2) }], "offsets are sparse");
    assert!(!ledger.is_urgent(Reach::Resolved) && !ledger.is_waiting(&tp));
    let tickets = [7, 8, 9].map(|offset| {
        assert_eq!(ledger.pass(&tp, offset), Pass::Now);
        ledger.open(&tp, offset).unwrap()
    });
    let [first, second, third] = tickets;
    assert_eq!(commit(&ledger), []);
    first.resolve(Outcome::Published);
    assert_eq!(commit(&ledger), [Committed { offset: 8, note: starts(1) }], "the count begins anew where it got on");
    second.resolve(Outcome::Published);
    third.resolve(Outcome::Published);
    assert_eq!(commit(&ledger), [Committed::from(10)]);
}

#[test]
fn after_a_death_few_are_in_flight_and_only_they_are_suspect_after_the_next() {
    let (ledger, tp) = (Ledger::new(), partition(0));
    ledger.assign(tp.clone());
    ledger.found(&tp, Some(Committed { offset: 100, note: starts(1) }), 1000);
    assert_eq!(ledger.pass(&tp, 100), Pass::Later);
    commit(&ledger);
    let tickets: Vec<_> = (100..132)
        .map(|offset| {
            assert_eq!(ledger.pass(&tp, offset), Pass::Now, "{offset}");
            ledger.open(&tp, offset).unwrap()
        })
        .collect();
    assert_eq!(ledger.pass(&tp, 132), Pass::Later);
    assert!(ledger.is_waiting(&tp) && !ledger.is_urgent(Reach::Resolved), "there is nothing to commit yet");
    for ticket in tickets {
        ticket.resolve(Outcome::Published);
    }
    assert!(ledger.is_urgent(Reach::Resolved), "it waits for nothing but the commit");
    assert_eq!(commit(&ledger), [Committed::from(132)]);
    assert!(!ledger.is_waiting(&tp));
    assert_eq!(ledger.pass(&tp, 163), Pass::Now);
    assert_eq!(ledger.pass(&tp, 164), Pass::Later);
    assert_eq!(ledger.pass(&tp, 1100), Pass::Now, "what killed the worker lay before");
    assert_eq!(ledger.pass(&tp, 1164), Pass::Now);

    ledger.assign(tp.clone());
    ledger.found(&tp, Some(Committed { offset: 100, note: starts(2) }), 1000);
    assert_eq!(ledger.suspects(), [(tp, 100, 132)]);
}

#[test]
fn offsets_that_do_not_exist_hold_nobody_up_after_a_death() {
    for open in [false, true] {
        let (ledger, tp) = (Ledger::new(), partition(0));
        ledger.assign(tp.clone());
        ledger.found(&tp, Some(Committed { offset: 100, note: starts(1) }), 1000);
        ledger.pass(&tp, 100);
        commit(&ledger);
        let ticket = ledger.open(&tp, 100).unwrap();
        if !open {
            ledger.open(&tp, 101).unwrap().resolve(Outcome::Published);
        }
        let ticket = if open {
            Some(ticket)
        } else {
            ticket.resolve(Outcome::Published);
            commit(&ledger);
            None
        };
        assert_eq!(ledger.pass(&tp, 500), Pass::Later);
        assert!(ledger.is_waiting(&tp));
        if let Some(ticket) = ticket {
            assert!(!ledger.is_urgent(Reach::Resolved), "the first one is under way");
            ticket.resolve(Outcome::Published);
            commit(&ledger);
            assert!(!ledger.is_waiting(&tp), "it may ask again");
            assert_eq!(ledger.pass(&tp, 500), Pass::Later);
        }
        assert!(ledger.is_urgent(Reach::Resolved));
        assert_eq!(commit(&ledger), [Committed { offset: 500, note: starts(1) }]);
        assert_eq!(ledger.pass(&tp, 500), Pass::Now);
    }
}

#[test]
fn a_commit_that_nobody_waits_for_is_not_urgent() {
    let (ledger, tp) = assigned(5, Note::default());
    ledger.pass(&tp, 5);
    assert!(ledger.is_urgent(Reach::Resolved));
    commit(&ledger);
    for offset in 5..9 {
        assert_eq!(ledger.pass(&tp, offset), Pass::Now);
        ledger.open(&tp, offset).unwrap().resolve(Outcome::Published);
        assert!(!ledger.is_urgent(Reach::Resolved), "{offset}");
        commit(&ledger);
    }
}

#[test]
fn a_message_is_blamed_until_its_dead_letter_is_there() {
    let (ledger, tp) = assigned(5, Note { starts: 3, alone: true, until: Some(11) });
    assert_eq!(ledger.pass_alone(&tp, 5), Pass::Blamed(3));
    let ticket = ledger.open(&tp, 5).unwrap();
    assert_eq!(commit(&ledger), [], "a worker that dies now leaves the note as it was");
    ticket.resolve(Outcome::Published);
    assert_eq!(commit(&ledger), [Committed { offset: 6, note: Note { starts: 0, alone: false, until: Some(11) } }]);
    assert_eq!(ledger.pass_alone(&tp, 6), Pass::Later);
    let note = Note { starts: 1, alone: true, until: Some(11) };
    assert_eq!(commit(&ledger), [Committed { offset: 6, note }]);
}

#[test]
fn an_end_in_order_takes_the_note_back_and_a_lost_message_does_not() {
    for lost in [false, true] {
        let (ledger, tp) = assigned(5, starts(1));
        ledger.pass(&tp, 5);
        commit(&ledger);
        let ticket = ledger.open(&tp, 5).unwrap();
        if lost {
            drop(ticket);
        } else {
            ticket.abandon();
        }
        ledger.end();
        let expected = if lost { vec![] } else { vec![Committed::from(5)] };
        assert_eq!(commit(&ledger), expected);
        assert_eq!(ledger.amended(), []);
    }
}

#[test]
fn an_end_before_the_first_message_proves_nothing() {
    for note in [starts(1), starts(2), Note { alone: true, ..starts(3) }] {
        let (ledger, tp) = assigned(5, note);
        ledger.leave(&[tp]);
        assert_eq!(commit(&ledger), []);
        ledger.end();
        assert_eq!(commit(&ledger), []);
    }
}

#[test]
fn a_message_that_is_alone_is_not_blamed_for_an_end_in_order() {
    let (ledger, tp) = assigned(5, starts(2));
    assert_eq!(ledger.pass(&tp, 5), Pass::Later, "not beside others");
    assert_eq!(ledger.pass_alone(&tp, 5), Pass::Later);
    assert_eq!(commit(&ledger), [Committed { offset: 5, note: Note { starts: 3, alone: true, until: Some(11) } }]);
    assert_eq!(ledger.pass_alone(&tp, 5), Pass::Now);
    let ticket = ledger.open(&tp, 5).unwrap();
    // The partition goes to another worker before the message is through: that one goes on counting.
    ledger.leave(std::slice::from_ref(&tp));
    assert_eq!(commit(&ledger), [Committed { offset: 5, note: Note { starts: 3, alone: false, until: Some(11) } }]);
    ticket.resolve(Outcome::Published);
    let rest = Note { until: Some(11), ..Note::default() };
    assert_eq!(commit(&ledger), [Committed { offset: 6, note: rest }], "the rest of the span stays suspect");
    ledger.end();
    assert_eq!(commit(&ledger), [Committed::from(6)]);
}

#[test]
fn a_message_is_alone_only_when_nothing_else_is_in_flight_anywhere() {
    let (ledger, tp) = assigned(5, starts(2));
    let other = partition(1);
    ledger.assign(other.clone());
    ledger.found(&other, Some(Committed { offset: 0, note: Note { starts: 1, alone: false, until: Some(9) } }), SPAN);
    let elsewhere = ledger.open(&other, 0).unwrap();
    assert_eq!(ledger.pass_alone(&tp, 5), Pass::Later);
    assert_eq!(commit(&ledger), [], "not even noted");
    ledger.revoke(&other);
    assert_eq!(ledger.pass_alone(&tp, 5), Pass::Later, "what belongs to an earlier assignment may kill as well");
    elsewhere.resolve(Outcome::Discarded);
    ledger.pass_alone(&tp, 5);
    commit(&ledger);
    assert_eq!(ledger.pass_alone(&tp, 5), Pass::Now);
    ledger.open(&tp, 5).unwrap().resolve(Outcome::Published);
    // The next one, of another partition, waits until this one is no longer said to be alone.
    ledger.assign(other.clone());
    ledger.found(&other, Some(Committed { offset: 0, note: starts(2) }), SPAN);
    assert_eq!(ledger.pass_alone(&other, 0), Pass::Later);
    assert_eq!(commit(&ledger), [Committed { offset: 6, note: Note { until: Some(11), ..Note::default() } }]);
}

#[test]
fn the_message_that_was_alone_at_a_death_is_blamed_and_none_that_stands_behind_it() {
    let alone = Note { starts: 3, alone: true, until: Some(9) };
    let (ledger, tp) = assigned(5, alone);
    assert_eq!(ledger.pass_alone(&tp, 5), Pass::Blamed(3));
    assert_eq!(ledger.suspects(), [(tp, 5, 9)]);
    let (ledger, tp) = assigned(5, alone);
    assert_eq!(ledger.pass_alone(&tp, 6), Pass::Later, "the blamed one is not in the log any more");
    assert_eq!(commit(&ledger)[0].offset, 6);
    assert_eq!(ledger.pass_alone(&tp, 6), Pass::Now);
}

/// What outlives a worker.
struct World {
    /// Offsets of the messages of each partition.
    logs: Vec<Vec<i64>>,
    group: Vec<Option<Committed>>,
    captioned: BTreeSet<(usize, i64)>,
    blamed: Vec<(usize, i64)>,
}

impl World {
    /// The life of one worker that does at random what it may do: hand on, resolve, commit. Whether it died of `deadly`.
    fn live(&mut self, deadly: Option<(usize, i64)>, mut chance: impl FnMut(usize) -> usize) -> bool {
        let ledger = Ledger::new();
        let mut next: Vec<usize> = Vec::new();
        for (at, found) in self.group.iter().enumerate() {
            ledger.assign(partition(at));
            ledger.found(&partition(at), *found, SPAN);
            next.push(self.logs[at].partition_point(|offset| found.is_some_and(|found| *offset < found.offset)));
        }
        let mut flight: Vec<Ticket> = Vec::new();
        loop {
            for (tp, from, until) in ledger.suspects() {
                let at = tp.partition as usize;
                if from >= until || (next[at] == self.logs[at].len() && ledger.open_in(&tp) == 0) {
                    ledger.trust(&tp);
                }
            }
            match chance(4) {
                0 | 1 => {
                    let solo = ledger.suspects().first().map(|(tp, ..)| tp.clone());
                    let tp = solo.clone().unwrap_or_else(|| partition(chance(self.logs.len())));
                    let at = tp.partition as usize;
                    let Some(offset) = self.logs[at].get(next[at]).copied() else { continue };
                    let full = ledger.position(&tp).is_some_and(|position| position.span >= SPAN);
                    let pass = if solo.is_some() { ledger.pass_alone(&tp, offset) } else { ledger.pass(&tp, offset) };
                    match pass {
                        Pass::Now if !full => {
                            assert!(solo.is_none() || flight.is_empty(), "not alone");
                            flight.push(ledger.open(&tp, offset).unwrap());
                        }
                        Pass::Blamed(_) => {
                            self.blamed.push((at, offset));
                            ledger.open(&tp, offset).unwrap().resolve(Outcome::Published);
                        }
                        Pass::Now | Pass::Later => continue,
                    }
                    next[at] += 1;
                }
                2 if !flight.is_empty() => {
                    let ticket = flight.swap_remove(chance(flight.len()));
                    let message = (ticket.partition().partition as usize, ticket.offset());
                    if Some(message) == deadly {
                        flight.into_iter().chain([ticket]).for_each(Ticket::abandon);
                        return true;
                    }
                    self.captioned.insert(message);
                    ticket.resolve(Outcome::Published);
                }
                3 => self.commit(&ledger),
                _ => {}
            }
            if flight.is_empty() && next.iter().zip(&self.logs).all(|(next, log)| *next == log.len()) {
                ledger.end();
                (0..3).for_each(|_| self.commit(&ledger));
                assert_eq!(ledger.due(Reach::Resolved), []);
                return false;
            }
        }
    }

    fn commit(&mut self, ledger: &Ledger) {
        for prefix in ledger.due(Reach::Resolved) {
            self.group[prefix.partition.partition as usize] = Some(prefix.end);
            ledger.transacted(&prefix);
        }
    }
}

proptest! {
    #[test]
    fn the_message_that_kills_is_found_and_no_other_is_blamed(
        gaps in proptest::collection::vec(proptest::collection::vec(1i64..4, 1..12), 1..4),
        which: (proptest::sample::Index, proptest::sample::Index),
        seed: u64,
    ) {
        let log = |gaps: Vec<i64>| gaps.into_iter().scan(-1, |at, gap| { *at += gap; Some(*at) }).collect::<Vec<_>>();
        let logs: Vec<Vec<i64>> = gaps.into_iter().map(log).collect();
        let at = which.0.index(logs.len());
        let deadly = (at, logs[at][which.1.index(logs[at].len())]);
        let messages: BTreeSet<_> =
            logs.iter().enumerate().flat_map(|(at, log)| log.iter().map(move |offset| (at, *offset))).collect();
        let group = vec![None; logs.len()];
        let mut world = World { logs, group, captioned: BTreeSet::new(), blamed: Vec::new() };
        let mut random = fastrand::Rng::with_seed(seed);
        let mut deaths = 0;
        while world.live(Some(deadly), |below| random.usize(..below)) {
            deaths += 1;
            // Each death at an offset is counted; only progress, which is finite, begins the count anew.
            prop_assert!(deaths <= 3 * (messages.len() + 1), "still dying");
        }
        prop_assert!(deaths >= 3, "blamed after {} deaths", deaths);
        prop_assert_eq!(world.blamed, [deadly]);
        let expected: BTreeSet<_> = messages.into_iter().filter(|message| *message != deadly).collect();
        prop_assert_eq!(world.captioned, expected);
        for (committed, log) in world.group.iter().zip(&world.logs) {
            prop_assert_eq!(*committed, log.last().map(|last| Committed::from(last + 1)));
        }
    }
}
