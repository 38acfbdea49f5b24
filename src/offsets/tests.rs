//! The ledger against a naive model, and its promises one by one.

use proptest::prelude::*;

use super::*;

fn partition(number: i32) -> TopicPartition {
    TopicPartition { topic: "t".into(), partition: number }
}

fn owned(number: i32) -> (Ledger, TopicPartition) {
    let ledger = Ledger::new();
    ledger.assign(partition(number));
    (ledger, partition(number))
}

fn watermark(ledger: &Ledger, partition: &TopicPartition) -> i64 {
    ledger.position(partition).unwrap().watermark
}

#[test]
fn the_watermark_waits_for_the_oldest_open_message_and_then_jumps() {
    let (ledger, tp) = owned(0);
    assert_eq!(ledger.position(&tp), None, "nothing was consumed");
    let mut tickets: Vec<_> = [10, 11, 15, 16].into_iter().map(|offset| ledger.open(&tp, offset).unwrap()).collect();
    tickets.pop().unwrap().resolve(Outcome::Published);
    tickets.remove(1).resolve(Outcome::Skipped);
    assert_eq!(ledger.position(&tp), Some(Position { watermark: 10, ready: 10, span: 7, open: 2 }));
    tickets.remove(0).resolve(Outcome::Published);
    assert_eq!(
        ledger.position(&tp),
        Some(Position { watermark: 15, ready: 15, span: 2, open: 1 }),
        "offsets are sparse"
    );
    tickets.remove(0).resolve(Outcome::Published);
    assert_eq!(ledger.position(&tp), Some(Position { watermark: 17, ready: 17, span: 0, open: 0 }));
}

#[test]
fn an_offset_is_worked_on_once_and_only_in_an_assigned_partition() {
    let (ledger, tp) = owned(0);
    let ticket = ledger.open(&tp, 5).unwrap();
    assert!(ledger.open(&tp, 5).is_none() && ledger.open(&tp, 4).is_none(), "a seek delivers messages again");
    assert!(ledger.open(&partition(1), 0).is_none());
    ledger.revoke(&tp);
    assert!(ledger.open(&tp, 6).is_none());
    ticket.resolve(Outcome::Published);
}

#[test]
fn a_completion_of_an_earlier_assignment_is_discarded() {
    let (ledger, tp) = owned(0);
    let old = ledger.open(&tp, 5).unwrap();
    ledger.revoke(&tp);
    ledger.assign(tp.clone());
    let new = ledger.open(&tp, 5).unwrap();
    old.resolve(Outcome::Published);
    assert_eq!(ledger.position(&tp), Some(Position { watermark: 5, ready: 5, span: 1, open: 1 }));
    assert_eq!(ledger.open_tickets(), 1);
    new.resolve(Outcome::Published);
    assert_eq!(watermark(&ledger, &tp), 6);
}

#[test]
fn what_is_ready_reaches_to_the_first_message_with_a_row_that_is_not() {
    let (ledger, tp) = owned(0);
    let ready = || ledger.position(&tp).unwrap().ready;
    let mut first = ledger.open(&tp, 5).unwrap();
    let mut rows = ledger.open(&tp, 6).unwrap().split(2);
    let mut last = ledger.open(&tp, 9).unwrap();
    last.ready();
    first.ready();
    first.ready();
    rows[0].ready();
    assert_eq!((ready(), watermark(&ledger, &tp)), (6, 5));
    rows[1].ready();
    assert_eq!((ready(), watermark(&ledger, &tp)), (10, 5));
    first.resolve(Outcome::Published);
    assert_eq!((ready(), watermark(&ledger, &tp)), (10, 6));
    ledger.revoke(&tp);
    assert!(!last.current());
    rows.into_iter().chain([last]).for_each(|ticket| ticket.resolve(Outcome::Published));
}

#[test]
fn a_message_of_several_rows_closes_with_the_last_one() {
    let (ledger, tp) = owned(0);
    let mut rows = ledger.open(&tp, 5).unwrap().split(3);
    let nested = rows.pop().unwrap().split(2);
    for row in rows.into_iter().chain(nested) {
        assert_eq!((watermark(&ledger, &tp), ledger.open_tickets()), (5, 1));
        row.resolve(Outcome::Published);
    }
    assert_eq!((watermark(&ledger, &tp), ledger.open_tickets()), (6, 0));
}

#[test]
fn a_split_into_no_rows_leaves_one_ticket() {
    let (ledger, tp) = owned(0);
    let mut rows = ledger.open(&tp, 5).unwrap().split(0);
    assert_eq!(rows.len(), 1);
    rows.remove(0).resolve(Outcome::Skipped);
    assert_eq!(watermark(&ledger, &tp), 6);
}

#[test]
fn a_dropped_ticket_is_reported_once_with_its_place_and_blocks_the_watermark() {
    let (ledger, tp) = owned(7);
    let rows = ledger.open(&tp, 5).unwrap().split(3);
    let behind = ledger.open(&tp, 6).unwrap();
    for (at, row) in rows.into_iter().enumerate() {
        drop(row);
        // Also when the report was taken in between.
        assert_eq!(ledger.take_lost(), (at == 0).then(|| Lost { partition: tp.clone(), offset: 5 }));
    }
    behind.resolve(Outcome::Published);
    assert_eq!(watermark(&ledger, &tp), 5);
    let text = Lost { partition: tp, offset: 5 }.to_string();
    assert!(text.contains("t/7/5"), "{text}");
}

#[test]
fn a_ticket_dropped_after_its_revocation_is_no_loss() {
    let (ledger, tp) = owned(0);
    let ticket = ledger.open(&tp, 5).unwrap();
    ledger.revoke(&tp);
    drop(ticket);
    assert_eq!(ledger.take_lost(), None, "another worker has the message now");
}

#[test]
fn rows_resolved_on_many_threads_close_their_messages_exactly_once() {
    let (ledger, tp) = owned(0);
    let mut hands: Vec<Vec<Ticket>> = (0..4).map(|_| Vec::new()).collect();
    for offset in 0..500 {
        for (at, row) in ledger.open(&tp, offset).unwrap().split(4).into_iter().enumerate() {
            hands[at].push(row);
        }
    }
    std::thread::scope(|scope| {
        for hand in hands {
            scope.spawn(|| hand.into_iter().for_each(|row| row.resolve(Outcome::Published)));
        }
    });
    assert_eq!(ledger.position(&tp), Some(Position { watermark: 500, ready: 500, span: 0, open: 0 }));
    assert_eq!((ledger.open_tickets(), ledger.take_lost()), (0, None));
}

#[derive(Debug, Clone)]
enum Step {
    Assign(usize),
    Revoke(usize),
    Open { partition: usize, gap: i64 },
    OpenAgain { partition: usize, back: i64 },
    Split { ticket: usize, rows: usize },
    Ready(usize),
    Resolve(usize),
    Lose(usize),
}

fn any_step() -> impl Strategy<Value = Step> {
    let partition = 0..PARTITIONS;
    prop_oneof![
        1 => partition.clone().prop_map(Step::Assign),
        1 => partition.clone().prop_map(Step::Revoke),
        8 => (partition.clone(), 0i64..3).prop_map(|(partition, gap)| Step::Open { partition, gap }),
        1 => (partition, 1i64..5).prop_map(|(partition, back)| Step::OpenAgain { partition, back }),
        3 => (any::<usize>(), 0usize..4).prop_map(|(ticket, rows)| Step::Split { ticket, rows }),
        6 => any::<usize>().prop_map(Step::Ready),
        10 => any::<usize>().prop_map(Step::Resolve),
        1 => any::<usize>().prop_map(Step::Lose),
    ]
}

const PARTITIONS: usize = 2;

/// The ledger as one would write it with no thought of speed: a list of all messages that ever were.
#[derive(Default)]
struct Model {
    epoch: u64,
    /// Epoch of the assignment, and one behind the newest offset seen in it.
    assigned: [Option<(u64, Option<i64>)>; PARTITIONS],
    messages: Vec<ModelMessage>,
    lost: VecDeque<(usize, i64)>,
}

struct ModelMessage {
    partition: usize,
    epoch: u64,
    offset: i64,
    unresolved: usize,
    unready: usize,
    reported: bool,
}

impl Model {
    fn is_current(&self, message: &ModelMessage) -> bool {
        self.assigned[message.partition].is_some_and(|(epoch, _)| epoch == message.epoch)
    }

    fn position(&self, partition: usize) -> Option<Position> {
        let next = self.assigned[partition]?.1?;
        let open =
            || self.messages.iter().filter(|m| m.partition == partition && self.is_current(m) && m.unresolved > 0);
        let watermark = open().map(|message| message.offset).min().unwrap_or(next);
        let ready = open().filter(|message| message.unready > 0).map(|message| message.offset).min().unwrap_or(next);
        Some(Position { watermark, ready, span: (next - watermark) as u64, open: open().count() })
    }
}

/// The ledger and its model, going the same steps.
#[derive(Default)]
struct Both {
    ledger: Ledger,
    model: Model,
    /// Each with the place of its message in the model, and whether it was said to be ready.
    tickets: Vec<(Ticket, usize, bool)>,
}

impl Both {
    fn pick(&mut self, at: usize) -> Option<(Ticket, usize, bool)> {
        (!self.tickets.is_empty()).then(|| self.tickets.swap_remove(at % self.tickets.len()))
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Assign(at) => {
                self.ledger.assign(partition(*at as i32));
                self.model.epoch += 1;
                self.model.assigned[*at] = Some((self.model.epoch, None));
            }
            Step::Revoke(at) => {
                self.ledger.revoke(&partition(*at as i32));
                self.model.assigned[*at] = None;
            }
            Step::Open { partition: at, gap } => {
                let offset = self.model.assigned[*at].and_then(|(_, next)| next).unwrap_or(100) + gap;
                let ticket = self.ledger.open(&partition(*at as i32), offset);
                assert_eq!(ticket.is_some(), self.model.assigned[*at].is_some());
                if let (Some(ticket), Some((epoch, next))) = (ticket, &mut self.model.assigned[*at]) {
                    *next = Some(offset + 1);
                    self.tickets.push((ticket, self.model.messages.len(), false));
                    let (partition, epoch) = (*at, *epoch);
                    let message = ModelMessage { partition, epoch, offset, unresolved: 1, unready: 1, reported: false };
                    self.model.messages.push(message);
                }
            }
            Step::OpenAgain { partition: at, back } => {
                if let Some((_, Some(next))) = self.model.assigned[*at] {
                    assert!(self.ledger.open(&partition(*at as i32), next - back).is_none());
                }
            }
            Step::Split { ticket, rows } => {
                if let Some((ticket, message, ready)) = self.pick(*ticket) {
                    let rows = ticket.split(*rows);
                    self.model.messages[message].unresolved += rows.len() - 1;
                    self.model.messages[message].unready += if ready { 0 } else { rows.len() - 1 };
                    self.tickets.extend(rows.into_iter().map(|row| (row, message, ready)));
                }
            }
            Step::Ready(ticket) => {
                if let Some((mut ticket, message, ready)) = self.pick(*ticket) {
                    ticket.ready();
                    self.model.messages[message].unready -= usize::from(!ready);
                    self.tickets.push((ticket, message, true));
                }
            }
            Step::Resolve(ticket) => {
                if let Some((ticket, message, ready)) = self.pick(*ticket) {
                    ticket.resolve(Outcome::Published);
                    self.model.messages[message].unready -= usize::from(!ready);
                    self.model.messages[message].unresolved -= 1;
                }
            }
            Step::Lose(ticket) => {
                if let Some((ticket, message, _)) = self.pick(*ticket) {
                    drop(ticket);
                    let current = self.model.is_current(&self.model.messages[message]);
                    let message = &mut self.model.messages[message];
                    if current && !message.reported {
                        message.reported = true;
                        self.model.lost.push_back((message.partition, message.offset));
                    }
                }
            }
        }
    }

    fn agree(&self) {
        for at in 0..PARTITIONS {
            assert_eq!(self.ledger.position(&partition(at as i32)), self.model.position(at));
        }
        let open = self.model.messages.iter().filter(|message| message.unresolved > 0).count();
        assert_eq!(self.ledger.open_tickets(), open);
        let assigned: Vec<_> = self.ledger.assigned().iter().map(|tp| tp.partition as usize).collect();
        let expected: Vec<_> = (0..PARTITIONS).filter(|at| self.model.assigned[*at].is_some()).collect();
        assert_eq!(assigned, expected);
    }
}

proptest! {
    #[test]
    fn the_ledger_agrees_with_a_naive_model_at_every_step(steps in proptest::collection::vec(any_step(), 0..120)) {
        let mut both = Both::default();
        (0..PARTITIONS).for_each(|at| both.step(&Step::Assign(at)));
        for step in &steps {
            let before: Vec<_> = both.ledger.positions();
            both.step(step);
            both.agree();
            if !matches!(step, Step::Assign(_) | Step::Revoke(_)) {
                for (tp, position) in before {
                    let after = both.ledger.position(&tp).unwrap();
                    prop_assert!(after.watermark >= position.watermark, "the watermark went back");
                    prop_assert!(after.ready >= position.ready && after.ready >= after.watermark);
                }
            }
        }
        let lost: Vec<_> = std::iter::from_fn(|| both.ledger.take_lost()).collect();
        let lost: VecDeque<_> = lost.into_iter().map(|lost| (lost.partition.partition as usize, lost.offset)).collect();
        prop_assert_eq!(&lost, &both.model.lost);
        while !both.tickets.is_empty() {
            both.step(&Step::Resolve(0));
            both.agree();
        }
        for (tp, position) in both.ledger.positions() {
            let nothing_lost = both.model.messages.iter().all(|message| message.unresolved == 0);
            prop_assert!(!nothing_lost || position.span == 0, "{}: all is resolved, and {:?}", tp, position);
        }
    }
}

#[test]
fn the_late_answer_to_a_commit_of_an_earlier_assignment_holds_up_nothing() {
    let (ledger, partition) = owned(0);
    ledger.found(&partition, Some(40.into()), 500);
    // Another worker had it meanwhile, and came no further than to 40.
    ledger.committed(&partition, 50.into());
    assert_eq!(ledger.committed_so_far(&partition), Some(40.into()));
    assert_eq!(ledger.pass(&partition, 40), Pass::Later, "the start is written down first");
    let due = ledger.due(Reach::Resolved);
    assert_eq!(due[0].end.offset, 40);
    ledger.committed(&partition, due[0].end);
    assert_eq!(ledger.pass(&partition, 40), Pass::Now);
    ledger.open(&partition, 40).unwrap().resolve(Outcome::Published);
    ledger.committed(&partition, 41.into());
    assert_eq!(ledger.committed_so_far(&partition), Some(41.into()));
}
