//! `blipstream capfilt`: captions for images, judged together with the texts that were found with them, without Kafka.

use std::io::{self, Write};

use serde_json::Map;

use super::local::{self, CaptionerOptions, Form, Named, Tolerance};
use super::submit::inputs::Inputs;
use super::submit::request::{Bad, Builder, Item, Parcel};
use super::{Exit, Usage, models, telemetry};
use crate::message::{CaptionRecord, ImageRef, Message, ParseError, Request, RequestParams, parse};
use crate::settings::Settings;

/// Arguments of `capfilt`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Inputs are those of `blipstream submit`: addresses, images, folders, and lists (.csv, .jsonl, .json, .txt, -).

Examples:
  blipstream capfilt holiday/ --do-sample --num-return-sequences 3
  blipstream capfilt pages.csv --column url --text-column alt --output jsonl > judged.jsonl
  blipstream capfilt pages.jsonl --threshold 0.8          # lines like {\"image\": \"…\", \"text\": [\"…\"]}
  blipstream capfilt holiday/ --model demo --filter demo

Each caption and each text that was found is a line: kept or rejected, the probability that it matches the image, generated or
found, the image's name and the text. A JSON line is a record with all of them in `candidates`."
)]
pub struct CapFiltArgs {
    /// Addresses, images, folders, lists; `-` reads standard input
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<String>,
    /// Column of .csv files that holds the reference
    #[arg(long, value_name = "NAME")]
    column: Option<String>,
    /// Column of .csv files that holds a text found with the image
    #[arg(long, value_name = "NAME", default_value = "text")]
    text_column: String,
    /// Form of the output
    #[arg(long, value_enum, default_value_t = Form::Text)]
    output: Form,
    /// Folder, hub id, or `demo`: the model that judges; else filter.source
    #[arg(long, value_name = "DIR|HUB-ID")]
    filter: Option<String>,
    /// Least probability of what is kept; else filter.threshold
    #[arg(long, value_name = "0 TO 1")]
    threshold: Option<f64>,
    #[command(flatten)]
    tolerance: Tolerance,
    #[command(flatten)]
    options: CaptionerOptions,
}

/// Runs the command.
pub fn run(args: CapFiltArgs) -> anyhow::Result<Exit> {
    let (settings, params) = args.settings()?;
    telemetry::init(&telemetry::quiet(&settings.log))?;
    let parts = models::parts(&settings, models::load(&settings)?)?;
    let rows = settings.flow.max_rows;
    let items = args.read(&settings, params).start(args.inputs)?;
    let items = std::iter::from_fn(move || items.recv_blocking().ok());
    let requests = items.flat_map(move |item| requests(item, rows)).map(Ok);
    local::run(&settings, parts, requests, local::printing(args.output, print), args.tolerance.max_failure_rate)
}

/// The requests of an input, named by their ids or by where they stand.
fn requests(item: Result<Item, Bad>, max_rows: usize) -> Vec<Named> {
    let unnamed = || Request::of(ImageRef::File(std::path::PathBuf::new()));
    let wrong = |place: &str, error| Err(Box::new((Request { id: Some(place.to_owned()), ..unnamed() }, error)));
    let item = match item {
        Ok(item) => item,
        Err(Bad { place, why, .. }) => return vec![wrong(&place, ParseError::Message(why))],
    };
    let message = Message { payload: Some(item.value), ..Message::empty("", 0, 0) };
    let rows = match parse(&message, max_rows) {
        Ok(rows) => rows,
        Err(error) => return vec![wrong(&item.place, error)],
    };
    let alone = rows.len() == 1;
    let named = |(index, row): (usize, _)| {
        let place = || if alone { item.place.clone() } else { format!("{}[{index}]", item.place) };
        match row {
            Ok(request) => {
                let Request { id, .. } = &request;
                let id = id.clone().unwrap_or_else(place);
                Ok(Request { id: Some(id), ..request })
            }
            Err((error, _)) => wrong(&place(), error),
        }
    };
    rows.into_iter().enumerate().map(named).collect()
}

fn print(record: &CaptionRecord, out: &mut dyn Write) -> io::Result<()> {
    record.candidates.iter().try_for_each(|one| {
        let judged = one.judged.as_ref();
        let kept = if judged.is_some_and(|judged| judged.kept) { "kept" } else { "rejected" };
        let itm = judged.and_then(|judged| judged.itm).map_or_else(|| "-".into(), |itm| format!("{itm:.4}"));
        writeln!(out, "{kept}\t{itm}\t{}\t{}\t{}", one.source, record.id, one.text)
    })
}

impl CapFiltArgs {
    fn settings(&self) -> anyhow::Result<(Settings, RequestParams)> {
        let (mut settings, params) = self.options.settings(&self.inputs)?;
        let filter = &mut settings.filter;
        filter.source = self.filter.clone().or_else(|| filter.source.clone());
        filter.threshold = self.threshold.unwrap_or(filter.threshold);
        if filter.source.is_none() {
            return Err(Usage("which model judges? Say --filter DIR|HUB-ID, or set filter.source".into()).into());
        }
        if !(0.0..=1.0).contains(&filter.threshold) {
            return Err(Usage("--threshold is a probability between 0 and 1".into()).into());
        }
        Ok((settings, params))
    }

    fn read(&self, settings: &Settings, params: RequestParams) -> Inputs {
        let builder = Builder {
            prompt: None,
            params,
            filter: true,
            text_column: Some(self.text_column.clone()),
            meta: Map::new(),
            deadline: None,
            keyed: false,
            // Read below the roots, which are open to the user, and never taken into a message.
            as_file_url: true,
            parcel: Parcel { max_bytes: settings.kafka.max_message_size.as_u64() },
            max_rows: settings.flow.max_rows,
        };
        Inputs { builder, column: self.column.clone() }
    }
}
