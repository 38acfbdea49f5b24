//! What the gate and its thresholds promise.

use proptest::prelude::*;

use super::*;

fn any_reason() -> impl Strategy<Value = Reason> {
    proptest::sample::select(Reason::ALL)
}

#[test]
fn a_limit_counts_only_while_nothing_shuts_the_gate() {
    let gate = Gate::new();
    gate.limit(Some(2));
    assert_eq!((gate.passage(), gate.admits(1), gate.admits(2)), (Passage::Limited(2), true, false));
    gate.shut(Reason::Operator);
    assert_eq!((gate.passage(), gate.admits(0)), (Passage::Shut, false));
    gate.clear(Reason::Operator);
    gate.limit(None);
    assert_eq!((gate.passage(), gate.admits(usize::MAX)), (Passage::Open, true));
}

#[test]
fn a_limit_of_zero_lets_nothing_through() {
    let gate = Gate::new();
    gate.limit(Some(0));
    assert!(!gate.admits(0));
}

#[test]
fn of_several_limits_the_smallest_counts_and_a_limit_that_the_worker_sets_to_zero_shuts_the_gate() {
    let gate = Gate::new();
    gate.limit(Some(5));
    gate.narrow(Reason::DeadLetters, Some(8));
    assert_eq!((gate.passage(), gate.reasons()), (Passage::Limited(5), vec![Reason::DeadLetters]));
    gate.narrow(Reason::Outage, Some(3));
    assert_eq!((gate.admits(2), gate.admits(3)), (true, false));
    gate.narrow(Reason::Outage, Some(0));
    assert_eq!(gate.passage(), Passage::Shut);
    gate.narrow(Reason::Outage, None);
    gate.narrow(Reason::DeadLetters, None);
    assert_eq!((gate.passage(), gate.reasons()), (Passage::Limited(5), vec![]));
}

#[test]
fn a_reason_that_is_only_told_shuts_nothing() {
    let gate = Gate::new();
    gate.tell(Reason::Queue, true);
    gate.shut(Reason::Messages);
    gate.tell(Reason::Messages, true);
    assert_eq!(gate.reasons(), [Reason::Messages, Reason::Queue]);
    gate.clear(Reason::Messages);
    assert_eq!((gate.reasons(), gate.passage()), (vec![Reason::Messages, Reason::Queue], Passage::Open));
    gate.tell(Reason::Messages, false);
    gate.tell(Reason::Queue, false);
    assert!(gate.reasons().is_empty());
}

#[test]
fn every_clone_is_the_same_gate() {
    let gate = Gate::new();
    let other = gate.clone();
    other.shut(Reason::Drain);
    assert_eq!(gate.reasons(), [Reason::Drain]);
}

#[test]
fn between_the_thresholds_nothing_changes() {
    let mut hysteresis = Hysteresis::new(0.8, 0.4);
    let seen = [0.0, 0.5, 0.79, 0.8, 0.5, 0.41, 1.3, 0.4, 0.79].map(|fill| hysteresis.update(fill));
    assert_eq!(seen, [false, false, false, true, true, true, true, false, false]);
}

#[test]
fn a_lower_threshold_above_the_higher_one_is_taken_as_equal_to_it() {
    let mut hysteresis = Hysteresis::new(0.5, 0.9);
    assert_eq!([0.6, 0.7, 0.4, 0.5].map(|fill| hysteresis.update(fill)), [true, true, false, true]);
}

proptest! {
    #[test]
    fn the_gate_is_shut_exactly_while_some_reason_stands(
        steps in proptest::collection::vec((any_reason(), any::<bool>()), 0..30)
    ) {
        let gate = Gate::new();
        let mut standing = BTreeSet::new();
        for (reason, shut) in steps {
            let changes = if shut { standing.insert(reason) } else { standing.remove(&reason) };
            prop_assert_eq!(gate.set(reason, shut), changes);
            prop_assert_eq!(gate.passage() == Passage::Shut, !standing.is_empty());
            prop_assert_eq!(gate.reasons(), standing.iter().copied().collect::<Vec<_>>());
        }
    }

    #[test]
    fn reasons_commute(
        reasons in proptest::sample::subsequence(Reason::ALL, 0..=Reason::ALL.len()).prop_shuffle(),
        cleared in proptest::sample::subsequence(Reason::ALL, 0..=Reason::ALL.len()).prop_shuffle(),
    ) {
        let (forth, back) = (Gate::new(), Gate::new());
        for at in 0..reasons.len() {
            forth.shut(reasons[at]);
            back.shut(reasons[reasons.len() - 1 - at]);
        }
        for at in 0..cleared.len() {
            forth.clear(cleared[at]);
            back.clear(cleared[cleared.len() - 1 - at]);
        }
        prop_assert_eq!(forth.reasons(), back.reasons());
        prop_assert_eq!(forth.passage(), back.passage());
    }

    #[test]
    fn thresholds_shut_at_high_open_at_low_and_change_only_there(
        high in 0.0f64..1.0, low in 0.0f64..1.0, fills in proptest::collection::vec(0.0f64..1.5, 0..40)
    ) {
        let mut hysteresis = Hysteresis::new(high, low);
        let mut was = false;
        for fill in fills {
            let is = hysteresis.update(fill);
            prop_assert!(is || fill < high);
            prop_assert!(!is || fill > low || fill >= high);
            prop_assert!(is == was || (is && fill >= high) || (!is && fill <= low));
            was = is;
        }
    }
}
