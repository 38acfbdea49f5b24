//! When an outage begins, when it does not, and how it ends.

use proptest::prelude::*;

use super::*;

const WINDOW: Duration = Duration::from_secs(30);

/// An [`Outage`] with a clock and numbers for its fetches.
struct Bench {
    outage: Outage,
    now: Instant,
    fetches: u64,
}

impl Bench {
    fn new() -> Self {
        Self { outage: Outage::new(WINDOW, 64), now: Instant::now(), fetches: 0 }
    }

    fn begin(&mut self, host: usize) -> (u64, Arc<str>) {
        self.fetches += 1;
        let host: Arc<str> = format!("host{host}").into();
        self.outage.begun(self.fetches, &host, self.now);
        (self.fetches, host)
    }

    fn end(&mut self, (fetch, host): &(u64, Arc<str>), good: bool) -> Option<Evidence> {
        self.now += Duration::from_millis(1);
        self.outage.ended(*fetch, host, (!good).then_some(Code::Connect), self.now)
    }

    /// A fetch of one try.
    fn fetch(&mut self, host: usize, good: bool) -> Option<Evidence> {
        let fetch = self.begin(host);
        self.end(&fetch, good)
    }

    /// Fetches of which nobody asks what comes of them.
    fn fetch_all(&mut self, hosts: impl Iterator<Item = usize>, good: bool) {
        for host in hosts {
            self.fetch(host, good);
        }
    }

    /// An outage of hosts 0 to 4.
    fn in_trouble() -> Self {
        let mut bench = Self::new();
        bench.fetch_all(0..HOSTS, false);
        assert!(bench.outage.is_on());
        bench
    }

    /// A probe when it is due; tells how long it was waited for, and the recovery.
    fn probe(&mut self, host: usize, good: bool) -> (u64, Option<Recovery>) {
        let due = self.outage.due().expect("a probe is due some time");
        let waited = (due - self.now).as_secs();
        self.now = due;
        self.outage.probe();
        assert_eq!(self.outage.due(), None, "one at a time");
        let host = format!("host{host}").into();
        (waited, self.outage.probed(&host, Some(good), self.now))
    }
}

#[test]
fn five_hosts_that_all_fail_are_an_outage_with_its_numbers() {
    let mut bench = Bench::new();
    for host in 0..4 {
        assert_eq!(bench.fetch(host, false), None);
    }
    let evidence = Evidence { failed: 5, fetches: 5, hosts_failing: 5, hosts: 5, code: Code::Connect };
    assert_eq!(bench.fetch(4, false), Some(evidence));
}

#[test]
fn a_thousand_failures_of_one_host_count_no_more_than_a_few() {
    let mut bench = Bench::new();
    // Five small hosts fail as well, and four are well.
    for _ in 0..8 {
        bench.fetch_all(10..14, true);
    }
    (1..6).for_each(|host| assert_eq!(bench.fetch(host, false), None));
    for _ in 0..1000 {
        let evidence = bench.fetch(0, false);
        assert_eq!(evidence.map(|evidence| evidence.failed), None, "{} votes", bench.outage.votes.len());
        // The good hosts go on, at a hundredth of the pace.
        if bench.fetches.is_multiple_of(100) {
            bench.fetch_all(10..14, true);
        }
    }
}

#[test]
fn names_that_do_not_resolve_at_once_are_no_outage_while_slow_good_hosts_are_under_way() {
    let mut bench = Bench::new();
    let good: Vec<_> = (0..20).map(|host| bench.begin(host)).collect();
    (20..30).for_each(|host| assert_eq!(bench.fetch(host, false), None));
    for fetch in &good {
        assert_eq!(bench.end(fetch, true), None);
    }
    (30..40).for_each(|host| assert_eq!(bench.fetch(host, false), None));
}

#[test]
fn a_fetch_counts_once_with_its_latest_try() {
    let mut bench = Bench::new();
    bench.fetch_all(10..14, true);
    let failing: Vec<_> = (0..4).map(|host| bench.begin(host)).collect();
    for _ in 0..10 {
        for fetch in &failing {
            assert_eq!(bench.end(fetch, false), None);
        }
    }
    for fetch in &failing {
        assert_eq!(bench.end(fetch, true), None);
    }
    assert!(bench.outage.votes.iter().all(|vote| vote.failed.is_none()), "they came well in the end");
    assert_eq!(bench.outage.votes.len(), 8);
}

#[test]
fn a_network_that_breaks_is_noticed_though_everything_was_well_just_before() {
    let mut bench = Bench::new();
    bench.fetch_all((0..100_000).map(|fetch| fetch % 300), true);
    let noticed = (0..1_000).position(|host| bench.fetch(host % 300, false).is_some());
    assert!(noticed.is_some_and(|after| after < 200), "{noticed:?}");
}

#[test]
fn failures_older_than_the_window_are_forgotten() {
    let mut bench = Bench::new();
    for host in 0..20 {
        assert_eq!(bench.fetch(host, false), None);
        bench.now += WINDOW / 4;
    }
}

#[test]
fn probes_wait_longer_and_longer_and_two_hosts_that_answer_end_it() {
    let mut bench = Bench::in_trouble();
    let waits: Vec<u64> = (0..7).map(|host| bench.probe(host % 5, false).0).collect();
    assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30]);
    assert_eq!(bench.probe(0, true), (30, None));
    assert_eq!(bench.probe(1, false), (1, None));
    let (waited, recovery) = bench.probe(2, true);
    assert_eq!((waited, recovery.map(|recovery| recovery.probes)), (2, Some(10)));
    assert!(!bench.outage.is_on() && bench.outage.due().is_none());
}

#[test]
fn one_host_alone_ends_it_when_half_of_the_latest_probes_succeed() {
    let mut bench = Bench::in_trouble();
    (0..PROBES).for_each(|_| assert_eq!(bench.probe(0, false).1, None));
    let recovered = (0..PROBES).position(|_| bench.probe(0, true).1.is_some());
    assert_eq!(recovered, Some(PROBES / 2 - 1));
}

#[test]
fn the_hosts_that_failed_are_known_while_the_outage_is_on() {
    let mut bench = Bench::new();
    bench.fetch(9, true);
    bench.fetch_all(0..=HOSTS, false);
    let known = |bench: &Bench, host: usize| bench.outage.has_failed(&format!("host{host}").into());
    assert!(bench.outage.is_on() && (0..=HOSTS).all(|host| known(&bench, host)));
    assert!(!known(&bench, 9) && !known(&bench, 20));
    bench.fetch(20, false);
    assert!(known(&bench, 20));
    assert_eq!(bench.probe(9, true).1, None);
    assert!(bench.probe(8, true).1.is_some());
    assert!(!known(&bench, 0));
}

#[test]
fn a_probe_that_tells_nothing_is_followed_by_another_at_once_and_none_at_all_is_as_good_as_a_failure() {
    let mut bench = Bench::in_trouble();
    bench.now = bench.outage.due().unwrap();
    bench.outage.probe();
    assert_eq!(bench.outage.probed(&"host0".into(), None, bench.now), None);
    assert_eq!(bench.outage.due(), Some(bench.now));
    bench.outage.no_probe(bench.now);
    assert_eq!(bench.outage.due(), Some(bench.now + 2 * FIRST_WAIT));
}

#[test]
fn what_is_broken_for_good_does_not_pause_the_worker_again_while_the_proof_that_it_is_not_us_is_fresh() {
    let mut bench = Bench::in_trouble();
    assert_eq!(bench.probe(10, true).1, None);
    assert!(bench.probe(11, true).1.is_some());
    (0..50).for_each(|fetch| assert_eq!(bench.fetch(fetch % 5, false), None));
    // Unless one of those that had answered fails, too.
    assert!(bench.fetch(10, false).is_some());

    let mut bench = Bench::in_trouble();
    assert_eq!(bench.probe(10, true).1, None);
    assert!(bench.probe(11, true).1.is_some());
    bench.now += WINDOW;
    assert!((0..HOSTS).any(|host| bench.fetch(host, false).is_some()), "the proof is old");
}

proptest! {
    /// Whatever four hosts do, and however often.
    #[test]
    fn fewer_than_five_hosts_are_never_an_outage(
        fetches in proptest::collection::vec((0..HOSTS - 1, any::<bool>(), 0u64..500), 1..500)
    ) {
        let mut bench = Bench::new();
        for (host, good, after) in fetches {
            bench.now += Duration::from_millis(after);
            prop_assert_eq!(bench.fetch(host, good), None);
        }
    }

    /// Every host is asked as often as any other, the broken ones try several times, and answers come in any order.
    #[test]
    fn five_broken_hosts_among_more_good_ones_are_never_an_outage(
        good in HOSTS + 1..40, tries in 1usize..5, rounds in 1usize..20, order: proptest::sample::Index, pace in 0u64..2_000
    ) {
        let mut bench = Bench::new();
        for round in 0..rounds {
            let hosts = HOSTS + good;
            let started: Vec<_> = (0..hosts).map(|host| (host, bench.begin(host))).collect();
            bench.now += Duration::from_millis(pace);
            for at in 0..hosts {
                // Another order each round: a step that has no divisor in common with the number of hosts.
                let step = (1..1_000).skip(order.index(hosts) + round).find(|step| gcd(*step, hosts) == 1).unwrap();
                let (host, fetch) = &started[(at * step) % hosts];
                for _ in 0..if *host < HOSTS { tries } else { 1 } {
                    prop_assert_eq!(bench.end(fetch, *host >= HOSTS), None);
                }
            }
        }
    }

    /// However well it went before: no more failures are needed than are looked at.
    #[test]
    fn when_everything_fails_it_is_soon_an_outage(before in 0usize..2_000, hosts in HOSTS..200) {
        let mut bench = Bench::new();
        bench.fetch_all((0..before).map(|fetch| fetch % hosts), true);
        let noticed = (0..1_000).position(|fetch| bench.fetch(fetch % hosts, false).is_some());
        prop_assert!(noticed.is_some_and(|after| after < bench.outage.latest), "{:?}", noticed);
    }

    #[test]
    fn what_is_remembered_is_bounded(fetches in proptest::collection::vec((0usize..50, any::<bool>()), 0..1000)) {
        let mut bench = Bench::new();
        for (host, good) in fetches {
            if bench.fetch(host, good).is_some() {
                break;
            }
            prop_assert!(bench.outage.votes.len() <= bench.outage.latest);
            let name: Arc<str> = format!("host{host}").into();
            let failures = bench.outage.votes.iter().filter(|vote| vote.host == name && vote.failed.is_some());
            prop_assert!(failures.count() <= bench.outage.failures_of_a_host);
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
