//! What a simulation must show whatever the load: nothing lost, and the policies' own promises.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);
const AT_ONCE: Policy = Policy::AT_ONCE;

/// A device that takes `call` for a batch and `image` for each image of it, in milliseconds.
fn device(call: u32, image: u32) -> Curve {
    Curve::new([1, 2, 4, 8, 16, 32].map(|size| (size, (call + image * size as u32) * MS))).unwrap()
}

fn run(devices: &[Curve], policy: Policy, arrivals: &[Duration], goal: Duration) -> Outcome {
    let sizes: Vec<_> = devices.iter().map(|curve| curve.best(None)).collect();
    Scenario { devices, sizes: &sizes, policy, arrivals, goal }.run()
}

#[test]
fn a_curve_runs_straight_between_what_was_measured() {
    let curve = Curve::new([(4, 40 * MS), (1, 16 * MS), (8, 72 * MS)]).unwrap();
    assert_eq!([1, 2, 4, 6, 8, 16].map(|size| curve.time(size).as_millis()), [16, 24, 40, 56, 72, 144]);
    // 56, 77, 95, 108, 116 and 120 images a second.
    let curve = device(10, 8);
    assert_eq!((curve.best(None), curve.best(Some(80 * MS)), curve.best(Some(MS))), (16, 8, 1));
    assert!(Curve::new([]).is_err() && Curve::new([(0, MS)]).is_err() && Curve::new([(1, Duration::ZERO)]).is_err());
}

#[test]
fn a_curve_is_read_from_a_report_of_the_bench() {
    let json = r#"{"version":"1","batches":[{"batch":4,"images_per_second":8.0,"step":1},{"batch":1,"images_per_second":5.0}]}"#;
    let curve = Curve::from_report(json).unwrap();
    assert_eq!((curve.time(1), curve.time(4)), (200 * MS, 500 * MS));
    assert!(Curve::from_report(r#"{"batches":[{"batch":4,"images_per_second":0.0}]}"#).is_err());
    assert!(Curve::from_report("[]").unwrap_err().to_string().contains("bench captioner --json"));
}

#[test]
fn patterns_keep_to_their_rate_and_bursts_to_their_pauses() {
    let bursts = Arrivals::Bursts { on: 200 * MS, off: 800 * MS };
    for pattern in [Arrivals::Poisson, bursts] {
        let times = pattern.times(50.0, 20_000, 7);
        assert!(times.is_sorted());
        let rate = times.len() as f64 / times[times.len() - 1].as_secs_f64();
        assert!((rate / 50.0 - 1.0).abs() < 0.05, "{pattern:?}: {rate}");
    }
    let phase = |time: &Duration| time.as_secs_f64().fract();
    assert!(bursts.times(50.0, 2_000, 3).iter().all(|time| phase(time) < 0.2001));
    assert_eq!(Arrivals::Backlog.times(1.0, 3, 1), [Duration::ZERO; 3]);
}

#[test]
fn a_backlog_is_worked_off_at_the_rate_of_the_devices_each_by_its_speed() {
    let devices = [device(10, 1), device(10, 1), device(20, 4)];
    let sizes: Vec<_> = devices.iter().map(|curve| curve.best(None)).collect();
    let outcome = run(&devices, AT_ONCE, &Arrivals::Backlog.times(0.0, 40_000, 1), MS);
    let share = outcome.throughput / full_rate(&devices, &sizes);
    assert!(share > 0.99 && share <= 1.0, "{share}");
    assert!(outcome.busy > 0.99, "{}", outcome.busy);
    let by_speed = devices.each_ref().map(|curve| curve.rate(32) / full_rate(&devices, &sizes));
    for (images, share) in outcome.shares.iter().zip(by_speed) {
        assert!((*images as f64 / 40_000.0 - share).abs() < 0.01, "{:?}", outcome.shares);
    }
}

#[test]
fn a_timer_before_the_devices_costs_latency_that_pulling_does_not() {
    let devices = [device(10, 1)];
    let arrivals = Arrivals::Poisson.times(20.0, 5_000, 2);
    let pulling = run(&devices, AT_ONCE, &arrivals, 50 * MS);
    let timer = run(&devices, Policy::Timer(30 * MS), &arrivals, 50 * MS);
    assert!(pulling.p50 < 15 * MS && timer.p50 > 30 * MS, "{:?} and {:?}", pulling.p50, timer.p50);
    assert!(pulling.idle.is_zero() && !timer.idle.is_zero());
}

#[test]
fn a_device_that_lingers_for_fuller_batches_still_keeps_the_goal() {
    let devices = [device(10, 1)];
    let arrivals = Arrivals::Poisson.times(50.0, 5_000, 2);
    let goal = 300 * MS;
    let blind = run(&devices, Policy::Pulling { linger: 600 * MS, deadlines: false }, &arrivals, goal);
    let seeing = run(&devices, Policy::Pulling { linger: 600 * MS, deadlines: true }, &arrivals, goal);
    let at_once = run(&devices, AT_ONCE, &arrivals, goal);
    assert!(blind.p99 > goal && seeing.p99 <= goal, "{:?} and {:?}", blind.p99, seeing.p99);
    assert!(seeing.batch > 2.0 * at_once.batch, "{} and {}", seeing.batch, at_once.batch);
}

#[test]
fn the_sustained_rate_is_near_capacity_for_a_loose_goal_and_none_for_an_impossible_one() {
    let devices = [device(10, 1)];
    let sustained = |goal| sustained(&devices, &[32], goal);
    let most = devices[0].rate(32);
    assert!(sustained(Duration::from_secs(2)) > 0.9 * most);
    let tight = sustained(40 * MS);
    assert!(tight > 0.1 * most && tight < 0.9 * most, "{tight} of {most}");
    assert!(sustained(5 * MS).abs() < f64::EPSILON);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_image_gets_its_caption_and_no_device_is_free_while_one_waits(
        speeds in proptest::collection::vec((1u32..50, 1u32..20), 1..8),
        load in 0.1f64..1.3,
        seed in 0u64..1000,
    ) {
        let devices: Vec<_> = speeds.iter().map(|&(call, image)| device(call, image)).collect();
        let sizes: Vec<_> = devices.iter().map(|curve| curve.best(None)).collect();
        let arrivals = Arrivals::Poisson.times(load * full_rate(&devices, &sizes), 500, seed);
        for policy in [AT_ONCE, Policy::Timer(20 * MS), Policy::Pulling { linger: 20 * MS, deadlines: true }] {
            let outcome = run(&devices, policy, &arrivals, 200 * MS);
            prop_assert_eq!(outcome.shares.iter().sum::<usize>(), 500);
            prop_assert!(outcome.goodput <= outcome.throughput && outcome.p50 <= outcome.p99);
            prop_assert!(outcome.busy <= 1.0 + 1e-9);
            if policy == AT_ONCE {
                prop_assert_eq!(outcome.idle, Duration::ZERO);
            }
        }
    }
}
