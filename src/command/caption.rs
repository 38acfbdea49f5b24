//! `blipstream caption`: the pipeline without Kafka, for files, folders and URLs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use async_channel::{Receiver, Sender};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::runtime::Handle;

use super::generation::GenerationOptions;
use super::{Exit, Usage, broken_pipe, input, models, runtime, telemetry};
use crate::config::ConfigOptions;
use crate::disposition::{Failure, Stage};
use crate::message::{CaptionRecord, ImageRef, Message, Origin, ParseError, Request, RequestParams, Row, Timing};
use crate::metrics::Metrics;
use crate::offsets::{Outcome, TopicPartition};
use crate::pipeline::{Control, Core};
use crate::settings::Settings;
use crate::stage::infer::DeviceFailure;
use crate::stage::{Finished, Output, failed};
use crate::tracked::Tracked;

/// How often lost rows are looked for.
const PULSE: Duration = Duration::from_millis(200);
/// Batch size where none is given: a folder is too short for a warm-up.
const BATCH: usize = 8;
/// The topic that stands for the command line in an image's origin.
const ARGUMENTS: &str = "arguments";

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
    /// Form of the output
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
    generation: GenerationOptions,
    #[command(flatten)]
    config: ConfigOptions,
}

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Form {
    /// The image's name, a tab, its caption; a line for each caption of it
    Text,
    /// One JSON object a line
    Jsonl,
}

/// Runs the command.
pub fn run(args: CaptionArgs) -> anyhow::Result<Exit> {
    let settings = args.settings()?;
    telemetry::init(&telemetry::quiet(&settings.log))?;
    let model = models::load(&settings.model, &settings.batch)?;
    let parts = models::parts(&settings, model)?;
    let runtime = runtime()?;
    let control = Control::new(&settings.flow, Arc::new(Metrics::new()));
    let core = {
        let _inside = runtime.enter();
        Core::start(&settings, parts, &control)?
    };
    let Core { rows, finished, failures, device_failures, fetching } = core;
    control.ledger().assign(arguments());
    let feeder = {
        let (control, runtime) = (control.clone(), runtime.handle().clone());
        let feeder = Feeder { rows, failures, params: args.generation.params(), control, runtime };
        std::thread::Builder::new().name("arguments".into()).spawn(move || feeder.run(args.images))?
    };
    let mut printer = Printer::new(args.output);
    runtime.block_on(print_all(&mut printer, &finished, &device_failures, &control))?;
    runtime.block_on(fetching).context("the fetch stage panicked")?;
    let count = feeder.join().map_err(|_| anyhow::anyhow!("reading the arguments panicked"))??;
    anyhow::ensure!(printer.next == count as i64, "not every image was captioned");
    printer.end(count)?;
    let rate = printer.failed as f64 / count.max(1) as f64;
    Ok(if rate > args.max_failure_rate { Exit::TooManyFailures } else { Exit::Done })
}

/// Prints results until the last one. What would leave a gap for ever, since results are printed in order, is an error
/// at once: the last device has gone, or a row was lost.
async fn print_all(
    printer: &mut Printer,
    finished: &Receiver<Finished>,
    device_failures: &Receiver<DeviceFailure>,
    control: &Control,
) -> anyhow::Result<()> {
    let mut pulse = tokio::time::interval(PULSE);
    loop {
        tokio::select! {
            biased; // what is finished is printed before anything is given up
            next = finished.recv() => match next {
                Ok(next) => printer.take(next)?,
                Err(_) => break,
            },
            Ok(failure) = device_failures.recv() => {
                if !control.alive() {
                    return Err(failure).context("not every image was captioned");
                }
                tracing::warn!("{failure}; going on with the other devices");
            }
            _ = pulse.tick() => if let Some(lost) = control.ledger().take_lost() {
                anyhow::bail!("{lost}");
            },
        }
    }
    // The failure of a device is told after its last result; the channel closes when all device threads have ended.
    while let Ok(failure) = device_failures.recv().await {
        if !control.alive() && control.ledger().open_tickets() > 0 {
            return Err(failure).context("not every image was captioned");
        }
    }
    Ok(())
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
        if !(0.0..=1.0).contains(&self.max_failure_rate) {
            return Err(Usage("--max-failure-rate is a share between 0 and 1".into()).into());
        }
        settings.batch.max_size = self.max_batch_size.unwrap_or(match settings.batch.max_size {
            0 => BATCH,
            size => size,
        });
        settings.model.prompt = self.prompt.clone().or(settings.model.prompt);
        self.generation.permit(&mut settings.model);
        settings.fetch.allow_networks.extend(&self.allow_network);
        // There is no Kafka to put anything off to.
        settings.kafka.retry_topics.clear();
        // The files are the user's own, named by the user, and so are buckets.
        settings.fetch.file_roots = vec!["/".into()];
        let named: BTreeSet<String> = self
            .images
            .iter()
            .filter_map(|image| match ImageRef::parse(image) {
                Ok(ImageRef::Object(object)) => Some(object.store()),
                _ => None,
            })
            .collect();
        settings.fetch.stores.extend(named);
        Ok(settings)
    }
}

fn arguments() -> TopicPartition {
    TopicPartition { topic: ARGUMENTS.into(), partition: 0 }
}

/// Feeds the arguments into the flow as fast as its budget allows.
struct Feeder {
    rows: Sender<Tracked<Row>>,
    failures: Sender<Finished>,
    params: RequestParams,
    control: Control,
    runtime: Handle,
}

impl Feeder {
    /// Returns how many there were.
    fn run(self, arguments: Vec<String>) -> anyhow::Result<usize> {
        let mut count = 0;
        for argument in input::images(arguments) {
            let argument = argument.context("cannot read the list of images")?;
            let permit = self.runtime.block_on(self.control.budget().messages.acquire(argument.len()));
            let Some(ticket) = self.control.ledger().open(&self::arguments(), count) else {
                anyhow::bail!("argument {count} was numbered twice");
            };
            count += 1;
            let row = row(&argument, &self.params, ticket.offset());
            let sent = match row {
                Ok(row) => self
                    .rows
                    .send_blocking(Tracked::new(row, ticket, permit))
                    .map_err(|e| e.into_inner().abandon())
                    .is_ok(),
                Err((row, error)) => {
                    let failure = Failure::new(Stage::Parse, &error);
                    let row = Tracked::new(*row, ticket, permit);
                    self.failures.send_blocking(failed(row, failure)).map_err(|e| e.into_inner().abandon()).is_ok()
                }
            };
            if !sent {
                break;
            }
        }
        anyhow::ensure!(count > 0, "no images: the folders and lists given are empty");
        Ok(count as usize)
    }
}

/// The row of an argument; one that is no reference becomes a row that has failed already.
fn row(argument: &str, params: &RequestParams, offset: i64) -> Result<Row, (Box<Row>, ParseError)> {
    let origin = Origin { topic: ARGUMENTS.into(), partition: 0, offset, index: None };
    let message = Message::empty(ARGUMENTS, 0, offset);
    let reference = input::reference(argument);
    let (image, error) = match reference {
        Ok(image) => (image, None),
        Err(error) => (ImageRef::File(argument.into()), Some(error)),
    };
    let request = Request {
        id: Some(argument.to_owned()),
        image,
        prompt: None,
        params: params.clone(),
        deadline: None,
        meta: serde_json::Map::new(),
    };
    let row = Row { message: Arc::new(message), request, origin, index: 0, only: true, timing: Timing::default() };
    match error {
        None => Ok(row),
        Some(error) => Err((Box::new(row), error)),
    }
}

/// A caption, or the name of an image and why it has none.
type Printable = Result<Box<CaptionRecord>, (String, Failure)>;

/// Prints results in the order of the arguments, each as soon as all before it are there.
struct Printer {
    form: Form,
    /// Results that came before their turn. Their tickets and message permits are kept, which bounds their number.
    early: BTreeMap<i64, Tracked<Printable>>,
    next: i64,
    failed: usize,
    bar: ProgressBar,
    begun: Instant,
}

impl Printer {
    fn new(form: Form) -> Self {
        // Where the captions themselves appear on the terminal, they are the progress.
        let bar = if io::stdout().is_terminal() || !io::stderr().is_terminal() {
            ProgressBar::hidden()
        } else {
            let style = ProgressStyle::with_template("{spinner} {pos} images, {per_sec}, {elapsed}");
            ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        };
        Self { form, early: BTreeMap::new(), next: 0, failed: 0, bar, begun: Instant::now() }
    }

    fn take(&mut self, finished: Finished) -> anyhow::Result<()> {
        let mut result = finished.map(|output| match output {
            Output::Caption { record, .. } => Ok(record),
            Output::FailedRow(row, failure) => Err((row.request.id.unwrap_or_default(), failure)),
            Output::FailedMessage { failure, .. } => Err((String::new(), failure)),
        });
        // The one whose turn it is may need this permit.
        result.release_image();
        let offset = result.offset();
        self.early.insert(offset, result);
        while let Some(result) = self.early.remove(&self.next) {
            self.next += 1;
            let result = result.resolve(Outcome::Published);
            self.failed += usize::from(result.is_err());
            match self.print(result) {
                Err(error) if broken_pipe(&error) => super::leave(0),
                printed => printed.context("cannot write the captions")?,
            }
            self.bar.inc(1);
        }
        Ok(())
    }

    #[allow(clippy::print_stderr)] // a failure is this command's output, for people
    fn print(&self, result: Printable) -> io::Result<()> {
        let mut out = io::stdout().lock();
        match (self.form, result) {
            (Form::Text, Ok(record)) if record.candidates.is_empty() => writeln!(out, "{}\t{}", record.id, record.text),
            (Form::Text, Ok(record)) => {
                record.candidates.iter().try_for_each(|one| writeln!(out, "{}\t{}", record.id, one.text))
            }
            (Form::Jsonl, Ok(record)) => writeln!(out, "{}", serde_json::to_string(&record)?),
            (Form::Text, Err((name, failure))) => {
                self.bar.suspend(|| eprintln!("{name}: {}: {}", failure.code, failure.message));
                Ok(())
            }
            (Form::Jsonl, Err((name, failure))) => {
                let (code, stage) = (failure.code.as_str(), failure.stage.as_str());
                let error = json!({"code": code, "stage": stage, "message": failure.message});
                writeln!(out, "{}", json!({"id": name, "error": error}))
            }
        }
    }

    #[allow(clippy::print_stderr)] // the summary is for people, beside the output
    fn end(&mut self, count: usize) -> anyhow::Result<()> {
        self.bar.finish_and_clear();
        io::stdout().flush()?;
        if count > 1 && io::stderr().is_terminal() {
            let seconds = self.begun.elapsed().as_secs_f64();
            eprintln!("{count} images, {} failed, {seconds:.1} s, {:.1} images/s", self.failed, count as f64 / seconds);
        }
        Ok(())
    }
}
