//! `blipstream score`: how well texts describe an image.

use std::io::{self, Write};

use super::alone::{self, AloneOptions};
use super::local::Form;
use super::{Exit, models};
use crate::message::{CaptionRecord, Request, Tasks};
use crate::settings::Settings;

/// Arguments of `score`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  blipstream score photo.jpg 'a dog on a beach' 'a cat'
  blipstream score https://example.com/a.png 'for sale' --output jsonl
  blipstream score photo.jpg 'a dog' --model Salesforce/blip-itm-base-coco

A line of text is the probability that the text matches the image (itm), the cosine of the angle between their embeddings
(itc), yes or no by filter.threshold, and the text; the best comes first. A JSON line is a record whose `candidates` are the
texts in their order.")]
pub struct ScoreArgs {
    /// A file or a URL
    image: String,
    /// Texts to judge
    #[arg(required = true, value_name = "TEXT")]
    texts: Vec<String>,
    /// Form of the output
    #[arg(long, value_enum, default_value_t = Form::Text)]
    output: Form,
    /// Folder or hub id of a model that judges images and texts; else filter.source, or else Salesforce/blip-itm-base-coco
    #[arg(long, value_name = "DIR|HUB-ID")]
    model: Option<String>,
    #[command(flatten)]
    options: AloneOptions,
}

/// Runs the command.
pub fn run(args: ScoreArgs) -> anyhow::Result<Exit> {
    let settings = args.settings()?;
    let asking = |request| Request { texts: args.texts, tasks: Tasks { filter: true, ..Tasks::NONE }, ..request };
    alone::ask(&settings, models::load_filter_alone, &args.image, asking, (args.output, print))
}

fn print(record: &CaptionRecord, out: &mut dyn Write) -> io::Result<()> {
    let judged = record.candidates.iter().filter_map(|one| Some((one.judged.as_ref()?, one.text.as_str())));
    let mut judged: Vec<_> = judged.collect();
    judged.sort_by(|(a, _), (b, _)| b.itm.unwrap_or(-1.0).total_cmp(&a.itm.unwrap_or(-1.0)));
    judged.into_iter().try_for_each(|(judged, text)| match (judged.itm.zip(judged.itc), &judged.error) {
        (Some((itm, itc)), _) => {
            writeln!(out, "{itm:.4}\t{itc:+.4}\t{}\t{text}", if judged.kept { "yes" } else { "no" })
        }
        (None, why) => writeln!(out, "-\t-\t{}\t{text}", why.as_deref().unwrap_or("not judged")),
    })
}

impl ScoreArgs {
    fn settings(&self) -> anyhow::Result<Settings> {
        let mut settings = self.options.settings(std::slice::from_ref(&self.image))?;
        settings.filter.source = Some(models::filter_name(self.model.clone(), &settings));
        Ok(settings)
    }
}
