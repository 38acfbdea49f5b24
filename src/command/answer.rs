//! `blipstream answer`: answers to questions about an image.

use std::io::{self, Write};

use super::alone::{self, AloneOptions};
use super::local::Form;
use super::{Exit, Usage, models};
use crate::message::{CaptionRecord, Request, Tasks};
use crate::settings::Settings;

/// Arguments of `answer`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  blipstream answer photo.jpg 'how many dogs are there?' 'is it raining?' --model Salesforce/blip-vqa-base
  blipstream answer https://example.com/a.png 'what is for sale?' --model models/vqa --output jsonl
  blipstream answer photo.jpg 'what colour is the car?' --model models/vqa --set answerer.num_beams=3

A line of text is the probability that the model gives to the answer, the answer, and the question, in the order of the
questions; for a question that cannot be answered, a hyphen and the reason. A JSON line is a record with the `answers`.")]
pub struct AnswerArgs {
    /// A file or a URL
    image: String,
    /// Questions about it
    #[arg(required = true, value_name = "QUESTION")]
    questions: Vec<String>,
    /// Form of the output
    #[arg(long, value_enum, default_value_t = Form::Text)]
    output: Form,
    /// Folder or hub id of a model that answers questions; else answerer.source
    #[arg(long, value_name = "DIR|HUB-ID")]
    model: Option<String>,
    #[command(flatten)]
    options: AloneOptions,
}

/// Runs the command.
pub fn run(args: AnswerArgs) -> anyhow::Result<Exit> {
    let settings = args.settings()?;
    let asking =
        |request| Request { questions: args.questions, tasks: Tasks { answer: true, ..Tasks::NONE }, ..request };
    alone::ask(&settings, models::load_answerer_alone, &args.image, asking, (args.output, print))
}

fn print(record: &CaptionRecord, out: &mut dyn Write) -> io::Result<()> {
    record.answers.iter().try_for_each(|answer| {
        let question = &answer.question;
        match (&answer.text, answer.generated.logprob) {
            (Some(text), Some(logprob)) => writeln!(out, "{:.4}\t{text}\t{question}", logprob.exp()),
            _ => writeln!(out, "-\t{}\t{question}", answer.error.as_deref().unwrap_or("not answered")),
        }
    })
}

impl AnswerArgs {
    fn settings(&self) -> anyhow::Result<Settings> {
        let mut settings = self.options.settings(std::slice::from_ref(&self.image))?;
        settings.answerer.source = self.model.clone().or(settings.answerer.source);
        if settings.answerer.source.is_none() {
            let text = "which model answers? Say --model DIR|HUB-ID, or set answerer.source; \
                        Salesforce/blip-vqa-base is one";
            return Err(Usage(text.into()).into());
        }
        Ok(settings)
    }
}
