//! `blipstream capfilt`: captions for images, judged together with the texts that were found with them, without Kafka.

use std::io::{self, Write};
use std::ops::ControlFlow;

use async_channel::bounded;
use serde_json::Map;

use super::generation::GenerationOptions;
use super::local::{self, Form, Named};
use super::submit::inputs::Inputs;
use super::submit::request::{Bad, Builder, Item};
use super::{Exit, Usage, caption, models, telemetry};
use crate::config::ConfigOptions;
use crate::message::{CaptionRecord, ImageRef, Message, ParseError, Request, parse};
use crate::settings::Settings;
use crate::stage::check_params;

/// Inputs that are read ahead.
const AHEAD: usize = 64;

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
    /// Folder, hub id, or `demo`: the captioner
    #[arg(long, value_name = "DIR|HUB-ID")]
    model: Option<String>,
    /// Folder, hub id, or `demo`: the model that judges; else filter.source
    #[arg(long, value_name = "DIR|HUB-ID")]
    filter: Option<String>,
    /// Least probability of what is kept; else filter.threshold
    #[arg(long, value_name = "0 TO 1")]
    threshold: Option<f64>,
    /// `auto`, `all` (every GPU), `cpu` or `cuda:N`, which may be given several times
    #[arg(long)]
    device: Vec<String>,
    /// `auto`, `f32`, `bf16`, `f16` or `int8`
    #[arg(long)]
    dtype: Option<String>,
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
pub fn run(args: CapFiltArgs) -> anyhow::Result<Exit> {
    let settings = args.settings()?;
    telemetry::init(&telemetry::quiet(&settings.log))?;
    check_params(&settings.model, &args.generation.params()).map_err(Usage)?;
    let parts = models::parts(&settings, models::load(&settings)?)?;
    let rows = settings.flow.max_rows;
    let items = read(args.read(&settings), args.inputs)?;
    let requests = items.flat_map(move |item| requests(item, rows)).map(Ok);
    local::run(&settings, parts, requests, (args.output, print), args.max_failure_rate)
}

/// Reads the inputs on a thread of its own, since they are pushed.
fn read(inputs: Inputs, arguments: Vec<String>) -> io::Result<impl Iterator<Item = Result<Item, Bad>> + Send> {
    let (sender, receiver) = bounded(AHEAD);
    std::thread::Builder::new().name("inputs".into()).spawn(move || {
        inputs.read(&arguments, &mut |item| match sender.send_blocking(item) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        })
    })?;
    Ok(std::iter::from_fn(move || receiver.recv_blocking().ok()))
}

/// The requests of an input, named by their ids or by where they stand.
fn requests(item: Result<Item, Bad>, max_rows: usize) -> Vec<Named> {
    let unnamed = || Request::of(ImageRef::File(std::path::PathBuf::new()));
    let wrong = |place: &str, error| Err(Box::new((Request { id: Some(place.to_owned()), ..unnamed() }, error)));
    let item = match item {
        Ok(item) => item,
        Err(Bad { place, why }) => return vec![wrong(&place, ParseError::Message(why))],
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
    fn settings(&self) -> anyhow::Result<Settings> {
        local::check_rate(self.max_failure_rate)?;
        let mut settings = self.config.load()?.settings;
        let (model, filter) = (&mut settings.model, &mut settings.filter);
        model.source = self.model.clone().unwrap_or_else(|| model.source.clone());
        if !self.device.is_empty() {
            model.devices.clone_from(&self.device);
        }
        model.dtype = self.dtype.clone().unwrap_or_else(|| model.dtype.clone());
        model.prompt = self.prompt.clone().or_else(|| model.prompt.clone());
        self.generation.permit(model);
        filter.source = self.filter.clone().or_else(|| filter.source.clone());
        filter.threshold = self.threshold.unwrap_or(filter.threshold);
        if filter.source.is_none() {
            return Err(Usage("which model judges? Say --filter DIR|HUB-ID, or set filter.source".into()).into());
        }
        if !(0.0..=1.0).contains(&filter.threshold) {
            return Err(Usage("--threshold is a probability between 0 and 1".into()).into());
        }
        if settings.batch.max_size == 0 {
            settings.batch.max_size = caption::BATCH;
        }
        local::open_to_the_user(&mut settings, &self.inputs, &self.allow_network);
        Ok(settings)
    }

    fn read(&self, settings: &Settings) -> Inputs {
        let builder = Builder {
            prompt: None,
            params: self.generation.params(),
            filter: true,
            text_column: Some(self.text_column.clone()),
            meta: Map::new(),
            deadline: None,
            keyed: false,
            // Read below the roots, which are open to the user, and never taken into a message.
            as_file_url: true,
            max_bytes: settings.kafka.max_message_size.as_u64(),
            max_rows: settings.flow.max_rows,
        };
        Inputs { builder, column: self.column.clone() }
    }
}
