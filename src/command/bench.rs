//! `blipstream bench`: how fast this machine captions, and what holds it up. No file and no network is needed.

mod captioner;
mod pictures;
mod pipeline;

use std::fs;
use std::io::{self, Write};

use clap::Subcommand;
use serde::Serialize;

use super::Exit;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The captioner alone, by batch size: images a second, the time of each phase, and what the machine could give
    Captioner(captioner::CaptionerArgs),
    /// The whole pipeline on the embedded broker: fetch, decode, caption, publish; says which stage holds it up
    Pipeline(pipeline::PipelineArgs),
}

/// Runs the command.
pub fn run(args: BenchArgs) -> anyhow::Result<Exit> {
    match args.what {
        What::Captioner(args) => captioner::run(&args),
        What::Pipeline(args) => pipeline::run(args),
    }
}

/// One line of JSON on standard output.
fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    Ok(writeln!(out)?)
}

/// The most memory that this process has had resident, in bytes, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
