//! The pipeline without Kafka: requests of a command line in, records and failures out, in their order.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use async_channel::{Receiver, Sender};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::runtime::{Handle, Runtime};

use super::generation::GenerationOptions;
use super::{Exit, Usage, broken_pipe, input, runtime};
use crate::config::ConfigOptions;
use crate::disposition::{Failure, Stage};
use crate::message::{CaptionRecord, ImageRef, Message, Origin, ParseError, Request, RequestParams, Row, Timing};
use crate::metrics::Metrics;
use crate::offsets::{Outcome, TopicPartition};
use crate::pipeline::{Control, Core, Parts};
use crate::settings::Settings;
use crate::stage::infer::DeviceFailure;
use crate::stage::{Finished, Output, check_params, failed};
use crate::tracked::Tracked;

/// How often lost rows are looked for.
const PULSE: Duration = Duration::from_millis(200);
/// The topic that stands for the command line in an image's origin.
const ARGUMENTS: &str = "arguments";

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// A line of text for each result
    Text,
    /// One JSON object a line
    Jsonl,
}

/// Batch size where none is given: a folder is too short for a warm-up.
const BATCH: usize = 8;

/// What the commands that caption without Kafka have in common.
#[derive(Debug, clap::Args)]
pub struct CaptionerOptions {
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
    #[command(flatten)]
    config: ConfigOptions,
    #[command(flatten)]
    generation: GenerationOptions,
}

/// How many failures are taken as a success.
#[derive(Debug, clap::Args)]
pub struct Tolerance {
    /// Exit with 3 when a larger share of the images fails
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    pub max_failure_rate: f64,
}

impl CaptionerOptions {
    /// The settings, with what the flags change of them, and the parameters of the captions.
    ///
    /// # Errors
    /// A flag or the configuration is wrong.
    pub fn settings(&self, images: &[String]) -> anyhow::Result<(Settings, RequestParams)> {
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
        settings.batch.max_size = self.max_batch_size.unwrap_or(match settings.batch.max_size {
            0 => BATCH,
            size => size,
        });
        settings.model.prompt = self.prompt.clone().or(settings.model.prompt);
        self.generation.permit(&mut settings.model);
        let params = self.generation.params();
        check_params(&settings.model, &params).map_err(Usage)?;
        open_to_the_user(&mut settings, images, &self.allow_network);
        Ok((settings, params))
    }
}

impl CaptionerOptions {
    /// The settings where workers elsewhere caption, with nothing of a model but the prompt that is asked for; and the
    /// parameters, which are for the workers to judge.
    ///
    /// # Errors
    /// The configuration is wrong.
    pub fn for_workers(&self) -> anyhow::Result<(Settings, RequestParams)> {
        let mut settings = self.config.load()?.settings;
        settings.model.prompt.clone_from(&self.prompt);
        Ok((settings, self.generation.params()))
    }
}

/// A record, or the name of an image and why it has none.
type Printable = Result<Box<CaptionRecord>, (String, Failure)>;

/// A request, named by its `id`; or why the name is none.
pub type Named = Result<Request, Box<(Request, ParseError)>>;

/// The request for the image of an argument, which names it.
pub fn request(argument: &str) -> Named {
    let named = |image| Request { id: Some(argument.to_owned()), ..Request::of(image) };
    match input::reference(argument) {
        Ok(image) => Ok(named(image)),
        Err(error) => Err(Box::new((named(ImageRef::File(argument.into())), error))),
    }
}

/// What the command line's own user may do: there is no Kafka to put anything off to, and the files and buckets that are
/// named are the user's own.
pub fn open_to_the_user(settings: &mut Settings, images: &[String], networks: &[ipnet::IpNet]) {
    settings.fetch.allow_networks.extend(networks);
    settings.kafka.retry_topics.clear();
    settings.fetch.file_roots = vec!["/".into()];
    let store = |image: &String| match ImageRef::parse(image) {
        Ok(ImageRef::Object(object)) => Some(object.store()),
        _ => None,
    };
    let named: BTreeSet<String> = images.iter().filter_map(store).collect();
    settings.fetch.stores.extend(named);
}

/// Refuses a share that is none.
pub fn check_rate(max_failure_rate: f64) -> Result<(), Usage> {
    if (0.0..=1.0).contains(&max_failure_rate) {
        return Ok(());
    }
    Err(Usage("--max-failure-rate is a share between 0 and 1".into()))
}

/// A share on the command line.
fn share(text: &str) -> Result<f64, String> {
    let share = text.parse::<f64>().map_err(|error| error.to_string())?;
    check_rate(share).map(|()| share).map_err(|Usage(why)| why)
}

/// The flow of a command that has no Kafka, with what it runs on.
pub struct Flow {
    /// What its tasks run on.
    pub runtime: Runtime,
    /// Its budget and its ledger; rows are opened as offsets of [`arguments`].
    pub control: Control,
    /// The flow itself.
    pub core: Core,
}

impl Flow {
    /// Starts the flow.
    ///
    /// # Errors
    /// A thread or a client could not be made.
    pub fn start(settings: &Settings, parts: Parts) -> anyhow::Result<Self> {
        let runtime = runtime()?;
        let control = Control::new(&settings.flow, Arc::new(Metrics::new()));
        let core = {
            let _inside = runtime.enter();
            Core::start(settings, parts, &control)?
        };
        control.ledger().assign(arguments());
        Ok(Self { runtime, control, core })
    }
}

/// What a broken device means: nothing but a warning while there is another.
///
/// # Errors
/// It was the last one.
pub fn heed(failure: DeviceFailure, control: &Control) -> anyhow::Result<()> {
    if !control.alive() {
        return Err(failure).context("not every image was captioned");
    }
    tracing::warn!("{failure}; going on with the other devices");
    Ok(())
}

/// Prints a record.
pub type Print = fn(&CaptionRecord, &mut dyn Write) -> io::Result<()>;

/// How results are printed in a form: records whole, or in the text form of a command.
pub fn printing(form: Form, text: Print) -> (Form, Print) {
    let whole: Print = |record, out| writeln!(out, "{}", serde_json::to_string(record)?);
    (form, if form == Form::Jsonl { whole } else { text })
}

/// Runs requests through the flow and prints what comes of them; failures in a form, too.
///
/// # Errors
/// The flow could not be started, or lost something; there were no requests; the output cannot be written.
pub fn run(
    settings: &Settings,
    parts: Parts,
    requests: impl Iterator<Item = io::Result<Named>> + Send + 'static,
    (form, print): (Form, Print),
    max_failure_rate: f64,
) -> anyhow::Result<Exit> {
    let Flow { runtime, control, core } = Flow::start(settings, parts)?;
    let Core { rows, finished, failures, device_failures, fetching, endpoint: _ } = core;
    let feeder = {
        let feeder = Feeder { rows, failures, control: control.clone(), runtime: runtime.handle().clone() };
        std::thread::Builder::new().name("arguments".into()).spawn(move || feeder.run(requests))?
    };
    let mut printer = Printer::new(form, print);
    runtime.block_on(print_all(&mut printer, &finished, &device_failures, &control))?;
    runtime.block_on(fetching).context("the fetch stage panicked")?;
    let count = feeder.join().map_err(|_| anyhow::anyhow!("reading the arguments panicked"))??;
    anyhow::ensure!(printer.next == count as i64, "not every image was captioned");
    printer.end(count)?;
    let rate = printer.failed as f64 / count.max(1) as f64;
    Ok(if rate > max_failure_rate { Exit::TooManyFailures } else { Exit::Done })
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
            Ok(failure) = device_failures.recv() => heed(failure, control)?,
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

/// The partition that stands for the command line.
pub fn arguments() -> TopicPartition {
    TopicPartition { topic: ARGUMENTS.into(), partition: 0 }
}

/// Feeds the arguments into the flow as fast as its budget allows.
struct Feeder {
    rows: Sender<Tracked<Row>>,
    failures: Sender<Finished>,
    control: Control,
    runtime: Handle,
}

impl Feeder {
    /// Returns how many there were.
    fn run(self, requests: impl Iterator<Item = io::Result<Named>>) -> anyhow::Result<usize> {
        let mut count = 0;
        for request in requests {
            let request = request.context("cannot read the list of images")?;
            let bytes = match &request {
                Ok(request) => size(request),
                Err(wrong) => size(&wrong.0),
            };
            let permit = self.runtime.block_on(self.control.budget().messages.acquire(bytes));
            let Some(ticket) = self.control.ledger().open(&self::arguments(), count) else {
                anyhow::bail!("argument {count} was numbered twice");
            };
            count += 1;
            let offset = ticket.offset();
            let sent = match request {
                Ok(request) => self
                    .rows
                    .send_blocking(Tracked::new(row(request, offset), ticket, permit))
                    .map_err(|e| e.into_inner().abandon())
                    .is_ok(),
                Err(wrong) => {
                    let (request, error) = *wrong;
                    let failure = Failure::new(Stage::Parse, &error);
                    let row = Tracked::new(row(request, offset), ticket, permit);
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

/// What a request takes of the memory for messages, in bytes.
pub fn size(request: &Request) -> usize {
    let inline = match &request.image {
        ImageRef::Base64(text) | ImageRef::Percent(text) => text.len(),
        ImageRef::Http(_) | ImageRef::File(_) | ImageRef::Object(_) => 0,
    };
    let texts = request.id.iter().chain(&request.texts).chain(&request.questions);
    inline + texts.map(String::len).sum::<usize>()
}

/// The row of a request without a message.
pub fn row(request: Request, offset: i64) -> Row {
    let origin = Origin { topic: ARGUMENTS.into(), partition: 0, offset, index: None };
    let message = Message::empty(ARGUMENTS, 0, offset);
    Row { message: Arc::new(message), request, origin, index: 0, only: true, timing: Timing::default() }
}

/// Prints results in the order of the arguments, each as soon as all before it are there.
struct Printer {
    /// Of failures.
    form: Form,
    /// Of records.
    record: Print,
    /// Results that came before their turn. Their tickets and message permits are kept, which bounds their number.
    early: BTreeMap<i64, Tracked<Printable>>,
    next: i64,
    failed: usize,
    bar: ProgressBar,
    begun: Instant,
}

impl Printer {
    fn new(form: Form, record: Print) -> Self {
        // Where the captions themselves appear on the terminal, they are the progress.
        let bar = if io::stdout().is_terminal() || !io::stderr().is_terminal() {
            ProgressBar::hidden()
        } else {
            let style = ProgressStyle::with_template("{spinner} {pos} images, {per_sec}, {elapsed}");
            ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        };
        Self { form, record, early: BTreeMap::new(), next: 0, failed: 0, bar, begun: Instant::now() }
    }

    fn take(&mut self, finished: Finished) -> anyhow::Result<()> {
        let mut result = finished.map(|output| match output {
            Output::Caption { record, .. } => Ok(record),
            Output::Canary { .. } => unreachable!("a canary without a stream"),
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
            (_, Ok(record)) => (self.record)(&record, &mut out),
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
