//! `blipstream bench`: how fast this machine captions, and what holds it up.

mod batching;
mod captioner;
mod clients;
mod fetching;
mod pipeline;
mod policies;
mod preprocessing;
mod tasks;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Subcommand;

use super::{Exit, Usage, models};
use crate::caption::config::Architecture;
use crate::caption::{LoadOptions, Model, load_model};
use crate::settings;

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
    /// How the captioner is best fed: images to encode at a time, rows to decode at a time, and whether rows should join
    /// a batch under way
    Batching(batching::BatchingArgs),
    /// What beams and the filter cost beside plain captions, and what a shared image encoder saves
    Tasks(tasks::TasksArgs),
    /// What ways of batching make of loads and patterns of arrival, simulated
    Policies(policies::PoliciesArgs),
    /// From the bytes of images to the model's pixels, on one thread
    Preprocessing(preprocessing::PreprocessingArgs),
    /// From addresses to the model's pixels: fetch, decode, resize; prints a JSON object
    Fetching(fetching::FetchingArgs),
    /// The whole pipeline on the embedded broker: fetch, decode, caption, publish; says which stage holds it up
    Pipeline(pipeline::PipelineArgs),
}

/// Runs the command.
pub fn run(args: BenchArgs) -> anyhow::Result<Exit> {
    match args.what {
        What::Captioner(args) => captioner::run(&args),
        What::Batching(args) => batching::run(&args),
        What::Tasks(args) => tasks::run(&args),
        What::Policies(args) => policies::run(&args),
        What::Preprocessing(args) => preprocessing::run(&args),
        What::Fetching(args) => fetching::run(&args),
        What::Pipeline(args) => pipeline::run(args),
    }
}

/// The captioner that is measured.
#[derive(Debug, clap::Args)]
struct ModelArgs {
    /// `random-base`, `random-large`, a folder, a hub id, or `demo`
    #[arg(long, value_name = "NAME|DIR|HUB-ID", default_value = "random-base")]
    model: String,
    /// `auto`, `cpu` or `cuda:N`
    #[arg(long, default_value = "auto")]
    device: String,
    /// `auto`, `f32`, `bf16`, `f16` or `int8`
    #[arg(long, default_value = "auto")]
    dtype: String,
    /// `auto`, `native` (or `native:avx512`, `native:avx2`, `native:plain`), `onednn`, `fused` or
    /// `candle`
    #[arg(long, default_value = "auto")]
    backend: String,
    /// oneDNN's file, where it is not the system's
    #[arg(long, value_name = "FILE")]
    onednn_library: Option<PathBuf>,
}

impl ModelArgs {
    fn load(&self) -> anyhow::Result<Arc<Model>> {
        let options = self.options(&self.model, Architecture::Captioner)?;
        load_model(&options).with_context(|| format!("cannot load {}", self.model))
    }

    /// How a model of that name is loaded.
    fn options(&self, name: &str, architecture: Architecture) -> anyhow::Result<LoadOptions> {
        Ok(LoadOptions {
            source: models::source(name, architecture, &settings::Model::default())?,
            device: self.device.parse().map_err(|error| Usage(format!("--device: {error}")))?,
            dtype: self.dtype.parse().map_err(|error| Usage(format!("--dtype: {error}")))?,
            backend: self.backend.parse().map_err(|error| Usage(format!("--backend: {error}")))?,
            onednn_library: self.onednn_library.clone(),
        })
    }
}

/// The middle of some numbers, the upper one of two.
fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The most memory that this process has had resident, in bytes, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
