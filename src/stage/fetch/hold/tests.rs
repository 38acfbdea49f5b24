//! Turns in an outage, without a clock: every probe is due at once.

use std::pin::pin;

use super::*;
use crate::gate::Passage;

/// Later than anything is put off.
const LATER: Duration = Duration::from_secs(3600);
/// More probes than the wait between them needs to become the longest.
const MANY: usize = 20;

fn failure() -> Result<(), FetchError> {
    Err(FetchError::Connect("refused".into()))
}

/// A hold with an outage that is on, of ten hosts.
fn outage() -> (Arc<Hold>, Gate) {
    let gate = Gate::new();
    let around = Surroundings { gate: gate.clone(), ledger: Ledger::new(), draining: CancellationToken::new() };
    let hold = Hold::new(Outage::new(Duration::from_secs(30), 16), around);
    for number in 0..10 {
        let watch = hold.watch(&format!("host {number}"), &|| true);
        watch.may_begin();
        watch.ended(None, None, &failure());
    }
    assert_eq!(gate.passage(), Passage::Shut);
    (hold, gate)
}

/// Probes with the one message that is held until it is let go; `None` if it never is.
async fn probes_until_let_go(hold: &Arc<Hold>) -> Option<usize> {
    let watch = hold.watch("host 0", &|| true);
    for probes in 1..=MANY {
        let mut turn = pin!(watch.turn());
        assert!(futures::poll!(turn.as_mut()).is_pending(), "it waits for its turn");
        let (next, _) = hold.step(Instant::now() + LATER);
        let (held, probe) = next.expect("a probe is due");
        held.go.send(Some(probe)).unwrap();
        match watch.ended(turn.await.unwrap(), None, &failure()) {
            After::Hold => {}
            After::LetGo => return Some(probes),
            After::AsEver => panic!("an outage that is on"),
        }
    }
    None
}

#[tokio::test]
async fn a_message_is_let_go_in_the_end_where_something_else_keeps_others_out() {
    for reason in [Reason::Messages, Reason::Span, Reason::Solo, Reason::Queue, Reason::Limit, Reason::DeadLetters] {
        let (hold, gate) = outage();
        gate.tell(reason, true);
        let probes = probes_until_let_go(&hold).await;
        assert!(probes.is_some_and(|probes| probes > 3), "{reason:?}: {probes:?}");
    }
}

#[tokio::test]
async fn a_message_is_held_as_long_as_the_outage_lasts_where_others_may_come() {
    let (hold, _) = outage();
    assert_eq!(probes_until_let_go(&hold).await, None);
    // A pause is an order: it ends when somebody says so.
    let (hold, gate) = outage();
    gate.shut(Reason::Operator);
    assert_eq!(probes_until_let_go(&hold).await, None);
}

#[test]
fn an_outage_without_anything_to_try_lets_newcomers_in() {
    let (hold, gate) = outage();
    let now = Instant::now() + LATER;
    let (turn, wake) = hold.step(now);
    assert!(turn.is_none() && wake.is_some());
    assert_eq!(gate.passage(), Passage::Limited(NEWCOMERS));
    hold.step(wake.unwrap() + LATER);
    assert_ne!(gate.passage(), Passage::Open, "the outage is on");
}
