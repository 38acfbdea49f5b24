//! `blipstream caption`: the pipeline without Kafka, for files, folders and URLs.

use std::io::{self, Write};

use super::generation::GenerationOptions;
use super::local::{self, Form};
use super::{Exit, Usage, input, models, telemetry};
use crate::config::ConfigOptions;
use crate::message::{CaptionRecord, Request};
use crate::settings::Settings;
use crate::stage::check_params;

/// Batch size where none is given: a folder is too short for a warm-up.
pub const BATCH: usize = 8;

/// Arguments of `caption`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  blipstream caption photo.jpg
  blipstream caption holiday/ --output jsonl > captions.jsonl
  cat urls.txt | blipstream caption - --model Salesforce/blip-image-captioning-base
  blipstream caption http://localhost:8000/a.png --allow-network 127.0.0.0/8
  blipstream caption s3://photos/a.jpg --model demo

A JSON line is a caption record whose `id` is the argument as given; for an image that failed it has `error` instead.
Addresses that are not public are refused unless a network given by --allow-network contains them. Objects of stores
(s3://, gs://, az://) are read with your credentials from the environment; a bucket that only a list names has to be
opened by --set 'fetch.stores=[\"s3://photos\"]'.")]
pub struct CaptionArgs {
    /// Files, folders and URLs; `-` reads a list from standard input
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
    /// Form of the output; text is the image's name, a tab and its caption, a line for each caption of it
    #[arg(long, value_enum, default_value_t = Form::Text)]
    output: Form,
    /// Folder, hub id, or `demo` for the small bundled model
    #[arg(long, value_name = "DIR|HUB-ID")]
    model: Option<String>,
    /// `auto`, `all` (every GPU), `cpu` or `cuda:N`, which may be given several times
    #[arg(long)]
    device: Vec<String>,
    /// `auto`, `f32`, `bf16`, `f16` or `int8`
    #[arg(long)]
    dtype: Option<String>,
    /// Images a device takes at once
    #[arg(long, value_name = "N")]
    max_batch_size: Option<usize>,
    /// Text that the captions begin with
    #[arg(long)]
    prompt: Option<String>,
    /// A network that may be reached although it is not public, e.g. 10.0.0.0/8; may be given several times
    #[arg(long, value_name = "CIDR")]
    allow_network: Vec<ipnet::IpNet>,
    /// Exit with 3 when a larger share of the images fails
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    max_failure_rate: f64,
    #[command(flatten)]
    config: ConfigOptions,
    #[command(flatten)]
    generation: GenerationOptions,
}

/// Runs the command.
pub fn run(args: CaptionArgs) -> anyhow::Result<Exit> {
    let settings = args.settings()?;
    telemetry::init(&telemetry::quiet(&settings.log))?;
    let model = models::load(&settings)?;
    let parts = models::parts(&settings, model)?;
    let params = args.generation.params();
    check_params(&settings.model, &params).map_err(Usage)?;
    let requests = input::images(args.images).map(move |argument| {
        let request = local::request(&argument?);
        Ok(request.map(|request| Request { params: params.clone(), ..request }))
    });
    local::run(&settings, parts, requests, (args.output, print), args.max_failure_rate)
}

fn print(record: &CaptionRecord, out: &mut dyn Write) -> io::Result<()> {
    if record.candidates.is_empty() {
        return writeln!(out, "{}\t{}", record.id, record.text);
    }
    record.candidates.iter().try_for_each(|one| writeln!(out, "{}\t{}", record.id, one.text))
}

impl CaptionArgs {
    fn settings(&self) -> anyhow::Result<Settings> {
        let mut settings = self.config.load()?.settings;
        if let Some(model) = &self.model {
            settings.model.source.clone_from(model);
        }
        if !self.device.is_empty() {
            settings.model.devices.clone_from(&self.device);
        }
        if let Some(dtype) = &self.dtype {
            settings.model.dtype.clone_from(dtype);
        }
        if self.max_batch_size == Some(0) {
            return Err(Usage("--max-batch-size must be at least 1".into()).into());
        }
        local::check_rate(self.max_failure_rate)?;
        settings.batch.max_size = self.max_batch_size.unwrap_or(match settings.batch.max_size {
            0 => BATCH,
            size => size,
        });
        settings.model.prompt = self.prompt.clone().or(settings.model.prompt);
        self.generation.permit(&mut settings.model);
        // Nothing here asks for it.
        settings.filter.source = None;
        local::open_to_the_user(&mut settings, &self.images, &self.allow_network);
        Ok(settings)
    }
}
