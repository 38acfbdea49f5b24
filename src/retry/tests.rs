//! What the backoff promises.

use proptest::prelude::*;

use super::*;

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

fn backoff() -> Backoff {
    Backoff { attempts: 5, base: Duration::from_millis(100), max: Duration::from_secs(1) }
}

#[test]
fn the_ceiling_doubles_up_to_the_most() {
    let ceiling = |made| backoff().wait(made, None, Instant::now(), None, 1.0).map(|wait| wait.as_millis());
    assert_eq!([1, 2, 3, 4, 5].map(ceiling), [Some(100), Some(200), Some(400), Some(800), None]);
    let long = Backoff { attempts: u32::MAX, ..backoff() };
    for made in [5, 31, 32, 33, 1000, u32::MAX - 1] {
        assert_eq!(long.wait(made, None, Instant::now(), None, 1.0), Some(Duration::from_secs(1)), "after {made}");
    }
}

#[test]
fn one_attempt_means_no_second_one() {
    let once = Backoff { attempts: 1, ..backoff() };
    assert_eq!(once.wait(1, None, Instant::now(), None, 0.0), None);
}

#[test]
fn a_wait_that_was_asked_for_is_kept_up_to_the_most() {
    let wait = |asked| backoff().wait(1, Some(asked), Instant::now(), None, 0.5);
    assert_eq!(wait(Duration::from_millis(10)), Some(Duration::from_millis(50)), "ours is longer");
    assert_eq!(wait(Duration::from_millis(700)), Some(Duration::from_millis(700)));
    assert_eq!(wait(Duration::MAX), Some(Duration::from_secs(1)));
}

#[test]
fn a_wait_that_ends_at_the_deadline_or_later_is_given_up() {
    let now = Instant::now();
    let wait = |left| backoff().wait(1, None, now, Some(now + Duration::from_millis(left)), 1.0);
    assert_eq!((wait(0), wait(99), wait(100)), (None, None, None));
    assert_eq!(wait(101), Some(Duration::from_millis(100)));
}

proptest! {
    #[test]
    fn every_wait_is_within_its_bounds(
        attempts in 0u32..50,
        made in 0u32..60,
        base in 0u64..10_000,
        max in 0u64..100_000,
        asked in proptest::option::of(0u64..200_000),
        left in proptest::option::of(0u64..200_000),
        random in 0.0f64..1.0,
    ) {
        let (base, max) = (Duration::from_millis(base), Duration::from_millis(max));
        let asked = asked.map(Duration::from_millis);
        let now = Instant::now();
        let deadline = left.map(|left| now + Duration::from_millis(left));
        match (Backoff { attempts, base, max }).wait(made, asked, now, deadline, random) {
            Some(wait) => {
                prop_assert!(made < attempts && wait <= max);
                prop_assert!(wait >= asked.unwrap_or_default().min(max));
                prop_assert!(deadline.is_none_or(|deadline| now + wait < deadline));
                let ceiling = base.saturating_mul(2u32.saturating_pow(made.saturating_sub(1)));
                prop_assert!(wait <= ceiling.max(asked.unwrap_or_default()));
            }
            None => prop_assert!(made >= attempts || deadline.is_some()),
        }
    }

    #[test]
    fn the_ceiling_never_falls_with_the_tries(base in 0u64..1_000_000, max in 0u64..1_000_000, random in 0.0f64..1.0) {
        let backoff =
            Backoff { attempts: 80, base: Duration::from_micros(base), max: Duration::from_micros(max) };
        let waits: Vec<_> = (1..80).map(|made| backoff.wait(made, None, Instant::now(), None, random)).collect();
        prop_assert!(waits.is_sorted(), "{:?}", waits);
    }

    #[test]
    fn no_numbers_make_it_panic(made: u32, attempts: u32, seconds in 0u64..100, random: f64) {
        prop_assume!(!random.is_nan());
        let backoff = Backoff { attempts, base: YEAR * 100, max: YEAR.saturating_mul(seconds as u32) };
        let _ = backoff.wait(made, Some(Duration::MAX), Instant::now(), Some(Instant::now()), random);
    }
}
