//! The fault matrix: what workers promise, while everything around them breaks, on three nodes of Apache Kafka.
//!
//! `make faults` runs all of it and writes `docs/faults.md`. Under `CI` the tests run a part of it; see [`USAGE`].

#![allow(clippy::print_stdout, clippy::print_stderr)] // a program that reports on a terminal

mod load;
mod proxy;
mod record;
mod rows;
mod run;
mod site;
#[path = "../support/mod.rs"]
mod support;
mod tally;
mod watch;
mod worker;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use blipstream::settings::Delivery;

use crate::record::{Key, Record, mode_name};
use crate::rows::{ROWS, Row};
use crate::site::Site;

const USAGE: &str = "cargo test --test faults -- [OPTIONS]

Runs rows of the fault matrix on a cluster of its own. Without options: the short matrix where CI is set, else nothing.

  --all            every row, in both modes of delivery, with each seed
  --short          the short matrix: some rows, fewer requests, one seed
  --row NAME       this row, in both modes, with each seed; may be repeated
  --list           the rows
  --at-least-once  this mode only
  --exactly-once   this mode only
  --seeds 1,2,3    the seeds
  --record         write what has passed to docs/faults.md, in place of what it says
  --resume         with --record: keep what the page says, and run what is not in it";

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/faults.md");
/// Where the logs of workers are kept that have failed.
const LOGS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/faults");
const SEEDS: &[u64] = &[1, 2, 3];
/// Requests of a run.
const IDS: usize = 20_000;
/// Requests a second in the short matrix.
const SHORT_RATE: usize = 150;

#[derive(Debug, Default)]
struct Options {
    all: bool,
    short: bool,
    list: bool,
    mode: Option<Delivery>,
    seeds: Vec<u64>,
    record: bool,
    resume: bool,
    rows: Vec<String>,
}

fn options() -> Result<Options, String> {
    let (mut options, mut filtered) = (Options::default(), false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--all" => options.all = true,
            "--short" => options.short = true,
            "--list" => options.list = true,
            "--at-least-once" => options.mode = Some(Delivery::AtLeastOnce),
            "--exactly-once" => options.mode = Some(Delivery::ExactlyOnce),
            "--record" => options.record = true,
            "--resume" => options.resume = true,
            "--seeds" => {
                let seeds = arguments.next().ok_or("--seeds wants numbers")?;
                let numbers: Result<_, _> = seeds.split(',').map(str::parse).collect();
                options.seeds = numbers.map_err(|_| format!("--seeds {seeds}: these are no numbers"))?;
            }
            "--row" => options.rows.push(arguments.next().ok_or("--row wants a name")?),
            // What `cargo test` hands to every test program: names of tests, of which there are none here.
            "--nocapture" | "--no-capture" | "--quiet" | "--exact" => {}
            filter if !filter.starts_with('-') => filtered = true,
            other => return Err(format!("{other} is no option\n\n{USAGE}")),
        }
    }
    if let Some(unknown) = options.rows.iter().find(|name| ROWS.iter().all(|row| row.name != **name)) {
        return Err(format!("--row {unknown}: there is no such row; --list tells which there are"));
    }
    options.all |= !options.rows.is_empty() && !options.short;
    options.short |= !options.all && !filtered && std::env::var_os("CI").is_some();
    if options.seeds.is_empty() {
        options.seeds = if options.short { SEEDS[..1].to_vec() } else { SEEDS.to_vec() };
    }
    Ok(options)
}

impl Options {
    fn plan(&self) -> Vec<(&'static Row, Delivery, Key)> {
        let mut plan = Vec::new();
        for &seed in &self.seeds {
            for (index, row) in ROWS.iter().enumerate() {
                for mode in [Delivery::AtLeastOnce, Delivery::ExactlyOnce] {
                    let modes = if self.short { row.short } else { row.modes };
                    let named = self.rows.is_empty() || self.rows.iter().any(|name| name == row.name);
                    if (self.all || self.short) && named && modes.has(mode) && self.mode.is_none_or(|only| only == mode)
                    {
                        plan.push((row, mode, (index, mode_name(mode), seed)));
                    }
                }
            }
        }
        plan
    }
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(worker::WORKER) {
        worker::run(Path::new(&arguments.next().expect("a file of settings")));
    }
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    if options.list {
        for row in ROWS {
            println!("{:24} {}", row.name, row.what);
        }
        return ExitCode::SUCCESS;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    runtime.block_on(matrix(&options))
}

async fn matrix(options: &Options) -> ExitCode {
    let plan = options.plan();
    if plan.is_empty() {
        println!("\nno fault is asked for; `make faults` runs the matrix, and so do the tests where CI is set\n");
        return ExitCode::SUCCESS;
    }
    let mut record = options.record.then(|| Record::open(Path::new(PAGE)));
    if let Some(record) = record.as_mut().filter(|_| !options.resume) {
        record.clear();
    }
    let Some(site) = Site::open().await else { return ExitCode::SUCCESS };
    println!("\nrunning {} faults", plan.len());
    let (mut passed, mut failed) = (0, Vec::new());
    for (row, mode, key) in plan {
        if record.as_ref().is_some_and(|record| record.has(&key)) {
            continue;
        }
        let name = format!("{}, {}, seed {}", row.name, mode_name(mode), key.2);
        print!("fault {name} ... ");
        let _ = std::io::stdout().flush();
        let folder = folder(row, mode, key.2);
        let ids = if options.short { SHORT_RATE * row.load.as_secs() as usize } else { IDS };
        let outcome = run::run(&site, row, mode, key.2, ids, &folder).await;
        let recovery = outcome.recovery.map_or("never".into(), |time| format!("{:.1} s", time.as_secs_f64()));
        println!(
            "{}: {} ids, {} lost, {} duplicates, recovered in {recovery}, {} MiB; {}",
            if outcome.problems.is_empty() { "ok" } else { "FAILED" },
            outcome.ids,
            outcome.lost,
            outcome.duplicates,
            outcome.memory >> 20,
            outcome.evidence,
        );
        if let Some(record) = &mut record {
            record.set(key, &outcome);
        }
        if outcome.problems.is_empty() {
            passed += 1;
            let _ = std::fs::remove_dir_all(&folder);
        } else {
            for problem in &outcome.problems {
                println!("    {problem}");
            }
            println!("    logs: {}", folder.display());
            failed.push(name);
        }
    }
    let result = if failed.is_empty() { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {result}. {passed} passed; {} failed; 0 ignored; 0 measured; 0 filtered out",
        failed.len()
    );
    for name in &failed {
        println!("  failed: {name}");
    }
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// An empty folder for the files of a run.
fn folder(row: &Row, mode: Delivery, seed: u64) -> PathBuf {
    let folder = Path::new(LOGS).join(format!("{}-{}-{seed}", row.name, mode_name(mode).replace(' ', "-")));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}
