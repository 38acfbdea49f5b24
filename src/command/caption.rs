//! `blipstream caption`: the pipeline without Kafka, for files, folders and URLs.

use std::io::{self, Write};

use super::local::{self, CaptionerOptions, Form, Tolerance};
use super::{Exit, input, models, telemetry};
use crate::message::{CaptionRecord, Request};

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
    #[command(flatten)]
    tolerance: Tolerance,
    #[command(flatten)]
    options: CaptionerOptions,
}

/// Runs the command.
pub fn run(args: CaptionArgs) -> anyhow::Result<Exit> {
    let (mut settings, params) = args.options.settings(&args.images)?;
    // Nothing here asks for it.
    (settings.filter.source, settings.answerer.source) = (None, None);
    telemetry::init(&telemetry::quiet(&settings.log))?;
    let parts = models::parts(&settings, models::load(&settings)?)?;
    let requests = input::images(args.images).map(move |argument| {
        let request = local::request(&argument?);
        Ok(request.map(|request| Request { params: params.clone(), ..request }))
    });
    local::run(&settings, parts, requests, local::printing(args.output, print), args.tolerance.max_failure_rate)
}

fn print(record: &CaptionRecord, out: &mut dyn Write) -> io::Result<()> {
    if record.candidates.is_empty() {
        return writeln!(out, "{}\t{}", record.id, record.text);
    }
    record.candidates.iter().try_for_each(|one| writeln!(out, "{}\t{}", record.id, one.text))
}
