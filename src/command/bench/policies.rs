//! `blipstream bench policies`: what ways of batching make of loads and patterns of arrival, simulated.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use plotters::prelude::*;

use crate::command::{Exit, Usage};
use crate::simulation::{Arrivals, Curve, Outcome, Policy, Scenario, full_rate};

/// Loads, as shares of what the devices can do, in tenths.
const LOADS: std::ops::RangeInclusive<usize> = 1..=12;

/// Arguments of `bench policies`.
#[derive(Debug, clap::Args)]
pub(super) struct PoliciesArgs {
    /// What `blipstream bench captioner --json` printed; given again, one more kind of device
    #[arg(long, value_name = "FILE", required = true)]
    curve: Vec<PathBuf>,
    /// Devices of each kind
    #[arg(long, value_name = "N", default_value_t = 1)]
    devices: usize,
    /// Within what time an image should be done
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    goal: Duration,
    /// Images of each simulation
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    images: usize,
    /// Write the report as Markdown, with a picture beside it
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

/// All policies at all loads, under one pattern.
struct Sweep {
    pattern: &'static str,
    /// For each load, an outcome of each policy.
    outcomes: Vec<(f64, [Outcome; 3])>,
}

/// Runs the command.
pub(super) fn run(args: &PoliciesArgs) -> anyhow::Result<Exit> {
    if args.devices == 0 || args.images == 0 || args.goal.is_zero() {
        return Err(Usage("--devices and --images are at least 1, and --goal is more than 0".into()).into());
    }
    if args.write.as_ref().is_some_and(|file| file.extension().is_some_and(|end| end == "svg")) {
        return Err(Usage("--write is the report; its picture, an SVG, goes beside it: name it x.md".into()).into());
    }
    let mut devices = Vec::new();
    for file in &args.curve {
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let curve = Curve::from_report(&text).with_context(|| file.display().to_string())?;
        devices.extend(std::iter::repeat_n(curve, args.devices));
    }
    let sizes: Vec<_> = devices.iter().map(|curve| curve.best(Some(args.goal / 4))).collect();
    let bursts = Arrivals::Bursts { on: args.goal * 2, off: args.goal * 2 };
    let sweeps = [("random arrivals", Arrivals::Poisson), ("bursts", bursts)]
        .map(|(pattern, arrivals)| sweep(args, &devices, &sizes, pattern, arrivals));
    let report = report(args, &devices, &sizes, &sweeps);
    io::stdout().lock().write_all(report.as_bytes())?;
    if let Some(file) = &args.write {
        let picture = file.with_extension("svg");
        std::fs::write(file, &report).with_context(|| format!("cannot write {}", file.display()))?;
        plot(&picture, &sweeps).with_context(|| format!("cannot write {}", picture.display()))?;
    }
    Ok(Exit::Done)
}

/// Name and policy of each: a fixed batch with a timer, and ours without and with lingering.
fn policies(goal: Duration) -> [(&'static str, Policy); 3] {
    [
        ("timer", Policy::Timer(goal / 4)),
        ("at once", Policy::AT_ONCE),
        ("deadlines", Policy::Pulling { linger: goal, deadlines: true }),
    ]
}

fn sweep(args: &PoliciesArgs, devices: &[Curve], sizes: &[usize], pattern: &'static str, arrivals: Arrivals) -> Sweep {
    let most = full_rate(devices, sizes);
    let at = |tenths: usize| {
        let load = tenths as f64 / 10.0;
        let arrivals = arrivals.times(load * most, args.images, 1);
        let run = |(_, policy)| Scenario { devices, sizes, policy, arrivals: &arrivals, goal: args.goal }.run();
        (load, policies(args.goal).map(run))
    };
    Sweep { pattern, outcomes: LOADS.map(at).collect() }
}

fn in_time(outcome: &Outcome) -> f64 {
    100.0 * outcome.goodput / outcome.throughput
}

fn report(args: &PoliciesArgs, devices: &[Curve], sizes: &[usize], sweeps: &[Sweep]) -> String {
    let most = full_rate(devices, sizes);
    let goal = humantime::format_duration(args.goal);
    let distinct: BTreeSet<_> = sizes.iter().collect();
    let mut text = format!(
        "# Ways of batching, simulated\n\n`blipstream bench policies` wrote this page. Devices: {} of {}, with batches of up \
         to {} images, {most:.2} images/s together; {} images a row; the goal is {goal} from arrival to caption.\n\n\
         - **timer**: a device starts when its batch is full or the oldest image has waited for {}, as servers do that batch \
         before their devices\n- **at once**: a free device takes what is there (`batch.linger = \"0s\"`, the default)\n\
         - **deadlines**: a free device waits for a full batch, as long as every image can still be done within the goal \
         (`batch.linger`, with a `deadline` in the requests)\n\nAt a load of 1 and more the queue grows without end, so those \
         rows depend on the number of images.\n",
        devices.len(),
        args.curve.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", "),
        distinct.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        args.images,
        humantime::format_duration(args.goal / 4),
    );
    let picture = args.write.as_ref().map(|file| file.with_extension("svg"));
    if let Some(name) = picture.as_deref().and_then(Path::file_name) {
        let _ = write!(text, "\n![images within the goal, by load]({})\n", name.to_string_lossy());
    }
    for Sweep { pattern, outcomes } in sweeps {
        let _ = write!(
            text,
            "\n## Under {pattern}\n\nFor each policy: % of the images within the goal, p50 and p99 in ms, % of the time at \
             work, images of a batch.\n\n| load | timer | at once | deadlines |\n|---:|---|---|---|\n"
        );
        for (load, outcomes) in outcomes {
            let cells = outcomes.each_ref().map(|outcome| {
                format!(
                    "{:.1}, {}, {}, {:.0}, {:.1}",
                    in_time(outcome),
                    outcome.p50.as_millis(),
                    outcome.p99.as_millis(),
                    100.0 * outcome.busy,
                    outcome.batch
                )
            });
            let _ = writeln!(text, "| {load:.1} | {} |", cells.join(" | "));
        }
    }
    let _ = write!(
        text,
        "\n## A backlog\n\nImages a second, and % of what the devices can do.\n\n| policy | images/s | % |\n|---|---:|---:|\n"
    );
    let backlog = Arrivals::Backlog.times(0.0, args.images, 1);
    for (name, policy) in policies(args.goal) {
        let outcome = Scenario { devices, sizes, policy, arrivals: &backlog, goal: args.goal }.run();
        let _ = writeln!(text, "| {name} | {:.2} | {:.1} |", outcome.throughput, 100.0 * outcome.throughput / most);
    }
    text
}

fn plot(file: &Path, sweeps: &[Sweep]) -> anyhow::Result<()> {
    let root = SVGBackend::new(file, (900, 380)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, sweep) in root.split_evenly((1, sweeps.len())).iter().zip(sweeps) {
        let mut chart = ChartBuilder::on(area)
            .caption(sweep.pattern, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(44)
            .build_cartesian_2d(0.0..1.25, 0.0..104.0)?;
        chart.configure_mesh().x_desc("load").y_desc("% within the goal").x_labels(7).light_line_style(WHITE).draw()?;
        for (index, (name, _)) in policies(Duration::from_secs(1)).iter().enumerate() {
            let colour = [RED, BLUE, BLACK][index].stroke_width(2);
            let points = sweep.outcomes.iter().map(|(load, outcomes)| (*load, in_time(&outcomes[index])));
            chart
                .draw_series(LineSeries::new(points, colour))?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerLeft)
            .background_style(WHITE)
            .border_style(BLACK.mix(0.2))
            .draw()?;
    }
    root.present()?;
    Ok(())
}
