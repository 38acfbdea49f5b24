//! `blipstream plan`: how many workers, partitions and how much network a rate of images takes.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use bytesize::ByteSize;
use serde::Serialize;

use super::{Exit, Usage, print_json};
use crate::simulation::{Curve, sustained};

/// Partitions a worker, so that shares stay nearly even when a worker comes or leaves.
const PARTITIONS_A_WORKER: usize = 4;

/// Images a second that nobody asks for.
const MOST: f64 = 1e9;

/// Arguments of `plan`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: 2,000 images a second, each captioned within half a second:
  blipstream bench captioner --json > device.json        on the device that will do it
  blipstream plan --rate 2000 --goal 500ms --curve device.json --devices 8

The rate that devices sustain is simulated with random arrivals and the worker's own way of batching, in batches of the
size that is printed (set batch.max_size to it); the goal is the time from a decoded image to its caption, which 99 of 100
images keep. Fetching and decoding come before it and take processors of their own: `blipstream bench pipeline` tells
whether a machine has enough of them.")]
pub struct PlanArgs {
    /// Images a second
    #[arg(long, value_name = "N")]
    rate: f64,
    /// Time for 99 of 100 captions, from the decoded image on
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    goal: Duration,
    /// What `blipstream bench captioner --json` printed on such a device
    #[arg(long, value_name = "FILE")]
    curve: PathBuf,
    /// Devices of a worker
    #[arg(long, value_name = "N", default_value_t = 1)]
    devices: usize,
    /// Bytes of an image, on average
    #[arg(long, value_name = "SIZE", default_value = "110kB")]
    image_size: ByteSize,
    /// Share of the sustained rate that is kept in reserve, for losses and for busy hours
    #[arg(long, value_name = "SHARE", default_value_t = 0.2)]
    spare: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Plan {
    batch_size: usize,
    batch_ms: f64,
    device_images_per_second: f64,
    worker_images_per_second: f64,
    workers: usize,
    partitions: usize,
    network_bits_per_second: f64,
    worker_network_bits_per_second: f64,
}

/// Runs the command.
pub fn run(args: &PlanArgs) -> anyhow::Result<Exit> {
    if !(args.rate > 0.0 && args.rate <= MOST) || args.devices == 0 || !(0.0..1.0).contains(&args.spare) {
        let text = "--rate is more than 0 and at most a billion, --devices at least 1, and --spare from 0 to below 1";
        return Err(Usage(text.into()).into());
    }
    let text = std::fs::read_to_string(&args.curve).with_context(|| format!("cannot read {}", args.curve.display()))?;
    let curve = Curve::from_report(&text).with_context(|| args.curve.display().to_string())?;
    let plan = plan(args, &curve)?;
    if args.json {
        print_json(&plan)?;
    } else {
        show(args, &plan)?;
    }
    Ok(Exit::Done)
}

fn plan(args: &PlanArgs, curve: &Curve) -> anyhow::Result<Plan> {
    // A batch that takes the whole goal leaves no time to wait for a device.
    let size = curve.best(Some(args.goal / 2));
    let (devices, sizes) = (vec![curve.clone(); args.devices], vec![size; args.devices]);
    let worker = sustained(&devices, &sizes, args.goal);
    if worker == 0.0 {
        let (goal, ms) = (humantime::format_duration(args.goal), curve.time(size).as_millis());
        anyhow::bail!("no load keeps --goal {goal}: on this device a batch of {size} alone takes {ms} ms");
    }
    let workers = (args.rate / (worker * (1.0 - args.spare))).ceil() as usize;
    let network = args.rate * args.image_size.as_u64() as f64 * 8.0;
    Ok(Plan {
        batch_size: size,
        batch_ms: curve.time(size).as_secs_f64() * 1e3,
        device_images_per_second: curve.rate(size),
        worker_images_per_second: worker,
        workers,
        partitions: workers * PARTITIONS_A_WORKER,
        network_bits_per_second: network,
        worker_network_bits_per_second: network / workers as f64,
    })
}

fn show(args: &PlanArgs, plan: &Plan) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let goal = humantime::format_duration(args.goal);
    let devices = match args.devices {
        1 => "its device sustains".to_owned(),
        count => format!("{count} devices sustain"),
    };
    writeln!(
        out,
        "a device     {:.1} images/s in batches of {}, which take {:.0} ms",
        plan.device_images_per_second, plan.batch_size, plan.batch_ms
    )?;
    writeln!(out, "a worker     {devices} {:.1} images/s, 99 of 100 within {goal}\n", plan.worker_images_per_second)?;
    writeln!(out, "for {} images/s, with {:.0} % to spare:", args.rate, args.spare * 100.0)?;
    writeln!(out, "workers      {}", plan.workers)?;
    writeln!(out, "batch        {} (batch.max_size)", plan.batch_size)?;
    writeln!(out, "partitions   {} or more of the input topic", plan.partitions)?;
    writeln!(
        out,
        "network      {} for images of {}, {} a worker",
        bits(plan.network_bits_per_second),
        args.image_size.display().si(),
        bits(plan.worker_network_bits_per_second)
    )
}

fn bits(a_second: f64) -> String {
    if a_second >= 1e9 { format!("{:.1} Gbit/s", a_second / 1e9) } else { format!("{:.1} Mbit/s", a_second / 1e6) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(rate: f64, goal: Duration) -> PlanArgs {
        PlanArgs {
            rate,
            goal,
            curve: PathBuf::new(),
            devices: 2,
            image_size: ByteSize::kb(100),
            spare: 0.2,
            json: false,
        }
    }

    fn curve() -> Curve {
        let ms = |ms: u64| Duration::from_millis(ms);
        Curve::new([(1, ms(11)), (8, ms(18)), (32, ms(42))]).unwrap()
    }

    #[test]
    fn a_plan_has_room_for_the_rate_and_no_worker_too_many() {
        for rate in [10.0, 2_000.0, 100_000.0] {
            let plan = plan(&args(rate, Duration::from_millis(300)), &curve()).unwrap();
            let room = |workers: usize| workers as f64 * plan.worker_images_per_second * 0.8;
            assert!(room(plan.workers) >= rate && room(plan.workers - 1) < rate, "{} workers for {rate}", plan.workers);
            assert_eq!(plan.partitions, 4 * plan.workers);
            assert!((plan.network_bits_per_second / (rate * 800_000.0) - 1.0).abs() < 1e-9);
            assert!(plan.worker_images_per_second <= 2.0 * plan.device_images_per_second);
        }
    }

    #[test]
    fn a_tight_goal_takes_smaller_batches_and_more_workers_and_an_impossible_one_is_explained() {
        let [tight, loose] = [50, 1000].map(|ms| plan(&args(50_000.0, Duration::from_millis(ms)), &curve()).unwrap());
        assert!(tight.batch_size < loose.batch_size && tight.workers > loose.workers);
        let error = plan(&args(1.0, Duration::from_millis(5)), &curve()).err().unwrap().to_string();
        assert!(error.contains("--goal 5ms") && error.contains("takes 11 ms"), "{error}");
    }
}
