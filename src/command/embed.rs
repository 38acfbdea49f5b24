//! `blipstream embed`: where images and texts are in the space of a model that judges both.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::json;

use super::alone::AloneOptions;
use super::local::{self, Form, Tolerance};
use super::{Exit, input, models, print_json, telemetry};
use crate::caption::Filter;
use crate::disposition::{Code, Stage};
use crate::message::{CaptionRecord, Request, Tasks};

/// Arguments of `embed`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  blipstream embed photo.jpg holiday/ > embeddings.jsonl
  blipstream embed photo.jpg --text 'a dog on a beach' --text 'a cat'
  cat urls.txt | blipstream embed - --model Salesforce/blip-itm-base-coco

A line is a JSON object: first those of the texts, with `text` and `embedding`, then those of the images, with `id`, which is the
argument as given, and `embedding`; what has none has `error` instead. Embeddings are lists of numbers of length 1, those of
images and texts in one space: the sum of the products of two is the cosine of the angle between them. The exit code is 3 where a
text has none.")]
pub struct EmbedArgs {
    /// Files, folders and URLs; `-` reads a list from standard input
    #[arg(required_unless_present = "text", value_name = "IMAGE")]
    images: Vec<String>,
    /// A text to embed; may be given several times
    #[arg(long)]
    text: Vec<String>,
    /// Folder, hub id, or `demo`: a model that judges images and texts; else filter.source, or else
    /// Salesforce/blip-itm-base-coco
    #[arg(long, value_name = "DIR|HUB-ID")]
    model: Option<String>,
    #[command(flatten)]
    tolerance: Tolerance,
    #[command(flatten)]
    options: AloneOptions,
}

/// A line that is no failure.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    embedding: &'a [f32],
}

/// Runs the command.
pub fn run(args: EmbedArgs) -> anyhow::Result<Exit> {
    let mut settings = args.options.settings(&args.images)?;
    settings.filter.source = Some(models::filter_name(args.model, &settings));
    telemetry::init(&telemetry::quiet(&settings.log))?;
    let mut parts = models::parts(&settings, models::load_filter_alone(&settings)?)?;
    let filter = parts.engines.first_mut().and_then(|loaded| loaded.filter.as_deref_mut());
    let sound = filter.map_or(Ok(true), |filter| embed_texts(filter, &args.text))?;
    let texts = if sound { Exit::Done } else { Exit::TooManyFailures };
    if args.images.is_empty() {
        return Ok(texts);
    }
    let requests = input::images(args.images).map(|argument| {
        let tasks = Tasks { embed: true, ..Tasks::NONE };
        Ok(local::request(&argument?).map(|request| Request { tasks, ..request }))
    });
    let images = local::run(&settings, parts, requests, (Form::Jsonl, print), args.tolerance.max_failure_rate)?;
    Ok(if images == Exit::Done { texts } else { images })
}

/// Prints the texts with their embeddings, and says whether each has one.
fn embed_texts(filter: &mut dyn Filter, texts: &[String]) -> anyhow::Result<bool> {
    let mut sound = true;
    let borrowed: Vec<&str> = texts.iter().map(String::as_str).collect();
    for (text, embedding) in texts.iter().zip(filter.text_embeddings(&borrowed)?) {
        match embedding {
            Ok(embedding) => print_json(&Line { id: None, text: Some(text), embedding: &embedding })?,
            Err(error) => {
                sound = false;
                let (code, stage) = (Code::BadParams.as_str(), Stage::Infer.as_str());
                let error = json!({"code": code, "stage": stage, "message": error.to_string()});
                print_json(&json!({"text": text, "error": error}))?;
            }
        }
    }
    Ok(sound)
}

fn print(record: &CaptionRecord, out: &mut dyn Write) -> io::Result<()> {
    let embedding = record.embeddings.as_ref().map_or(&[][..], |embeddings| &embeddings.image);
    let line = Line { id: Some(&record.id), text: None, embedding };
    writeln!(out, "{}", serde_json::to_string(&line)?)
}
