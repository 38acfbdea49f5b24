//! `blipstream batch`: captions every image of its inputs, a row for each, exactly once, however often it is killed.

mod alone;
mod cells;
mod columns;
mod driver;
mod fleet;
mod identity;
mod index;
mod job;
mod journal;
mod output;
mod parquet_rows;
mod picture;
mod progress;
mod report;
mod row;
mod sources;
mod tar_rows;

use std::io::{self, Write};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use anyhow::Context;
use indicatif::HumanCount;

use self::columns::Columns;
use self::fleet::FleetOptions;
use self::identity::{Identity, Input};
use self::job::{End, Job};
use self::journal::{Journal, JournalError, Mark};
use self::output::{Form, write_whole};
use self::progress::{Progress, Total};
use self::report::{Counter, Report};
use self::row::Rows;
use self::sources::Sources;
use super::local::CaptionerOptions;
use super::{Exit, Usage, let_signals_end, models, telemetry};
use crate::message::RequestParams;
use crate::settings::Settings;

/// Arguments of `batch`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Inputs, several of them if you like:
  photos.csv                  a row each; the image in the column image, url or image_url, or the only one (--column)
  photos.jsonl, .ndjson       an object each, with such a field, or a string; also .json and .txt, as `submit` reads them
  photos.parquet, .parq, .pq  a row each; the image's column holds paths, addresses, base64, or the images themselves
  shard-0000.tar              a sample each (webdataset); its .txt, .json and .cls become columns
  holiday/                    all images below the folder
  photo.jpg, https://…        an image
A path in a list is looked for in the current folder, then beside the list.

Examples:
  blipstream batch photos.csv --output captions.csv
  blipstream batch shards/*.tar --output captions.parquet --mini-batch-size 500
  blipstream batch photos.parquet --column photo --output captions.jsonl --error-threshold 100
  blipstream batch photos.csv --output captions.csv --retry-failed
  blipstream batch photos.csv --output captions.csv --kafka --set kafka.bootstrap_servers=broker:9092

With --kafka the images go to the workers of a fleet as `submit` sends them, and their answers become the rows; all else
is the same. Local files travel in the requests. Answers that come while the job is stopped or killed are taken when it
goes on.

The output has the rows in the order of the inputs: their columns, then place, text, logprob, tokens, finish, error_code,
error_message and image_sha256, image_width, image_height, image_bytes, image_format; where the inputs have a column of
such a name, ours is called blipstream_… What is done is kept in FILE.journal.jsonl: the same command goes on where it was
stopped or killed. FILE.report.json and FILE.report.svg tell what came of it. See docs/batch.md.
Exit codes: 1 stopped before its end; 3 more rows failed than --error-threshold.")]
pub struct BatchArgs {
    /// Lists, tables, shards, folders, images
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<String>,
    /// Where the rows go: .jsonl, .csv or .parquet
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Rows and a report, or the report alone
    #[arg(long, value_enum, default_value_t = OutputAction::AppendRow)]
    output_action: OutputAction,
    /// Column of lists and tables that holds the image
    #[arg(long, value_name = "NAME")]
    column: Option<String>,
    /// Rows that are checkpointed at a time: a crash repeats the work of so many at most
    #[arg(long, value_name = "N", default_value = "1000")]
    mini_batch_size: NonZeroU64,
    /// Stop with exit code 3 when more rows failed; -1 allows any number
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i64).range(-1..))]
    error_threshold: i64,
    /// Tries beyond the first of a row that fails for a reason that may pass
    #[arg(long, value_name = "N", default_value_t = 3)]
    max_retries: u32,
    /// Try the rows of the job anew that failed, and write the output anew
    #[arg(long, conflicts_with = "restart")]
    retry_failed: bool,
    /// Begin anew: give up what an earlier run has done, and replace its output
    #[arg(long)]
    restart: bool,
    /// No progress, no summary; errors are still told
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    options: CaptionerOptions,
    // Behind the others: its heading stands over all that follow.
    #[command(flatten)]
    fleet: FleetOptions,
}

/// What is written of a job, by the names of Azure's batch endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
enum OutputAction {
    /// A row for each image, and the report
    AppendRow,
    /// Only the report
    SummaryOnly,
}

/// Runs the command.
pub fn run(args: BatchArgs) -> anyhow::Result<Exit> {
    let (settings, params) = args.settings()?;
    telemetry::init(&telemetry::quiet(&settings.log))?;
    let form = Form::of(&args.output).map_err(Usage)?;
    let rows = Rows { column: args.column.clone(), params: params.clone(), max_body: settings.fetch.max_body.as_u64() };
    let sources = Sources::new(&args.inputs, rows)?;
    let identity = args.identity(&settings, params)?;
    let mut journal = args.open(&identity)?;
    let (done, resumed) = (journal.index().done(), journal.index().done());
    if journal.is_finished() && !(args.retry_failed && journal.index().failed() > 0) {
        return args.finished_before(journal, form, &identity.model);
    }
    if args.retry_failed {
        let again = journal.retry_failed().context("cannot write the journal")?;
        args.say(&format!("trying {} failed rows anew", HumanCount(again)));
    } else if done > 0 {
        args.say(&format!("going on with {}: {} rows are done", args.output.display(), HumanCount(done)));
    }
    let total = Total::default();
    let progress = Progress::new(total.clone(), journal.index().done(), args.quiet);
    let threshold = u64::try_from(args.error_threshold).ok();
    let mut job = Job::new(journal, progress, args.mini_batch_size.get(), threshold);
    let (end, rows) = args.work(&settings, sources, &mut job, total)?;
    job.progress.end();
    match end {
        End::Complete => {
            let done = job.journal.index().done();
            anyhow::ensure!(done >= rows, "{} of {rows} rows have no result", rows - done);
            // The output may take long, and appears as a whole.
            let_signals_end();
            let report = args.write(&mut job.journal, form, &identity.model, resumed)?;
            args.tell(&report)?;
            Ok(Exit::Done)
        }
        End::Interrupted => {
            let done = HumanCount(job.journal.index().done());
            args.say(&format!("stopped: {done} rows are done and kept; the same command goes on from there"));
            Ok(Exit::Failed)
        }
        End::TooManyFailures => {
            job.journal.mark(Mark::Stopped).context("cannot write the journal")?;
            args.too_many_failures(&job);
            Ok(Exit::TooManyFailures)
        }
    }
}

impl BatchArgs {
    fn settings(&self) -> anyhow::Result<(Settings, RequestParams)> {
        if self.fleet.kafka {
            let (settings, params) = self.options.for_workers()?;
            self.fleet.check(&settings)?;
            return Ok((settings, params));
        }
        let (mut settings, params) = self.options.settings(&self.inputs)?;
        // Nothing here asks for it.
        (settings.filter.source, settings.answerer.source) = (None, None);
        Ok((settings, params))
    }

    fn identity(&self, settings: &Settings, params: RequestParams) -> anyhow::Result<Identity> {
        let input = |name: &String| Input::of(name).with_context(|| format!("{name}: cannot be read"));
        let (model, dtype) = if self.fleet.kafka {
            (format!("kafka:{}", self.fleet.topic(settings)?), "of the workers".into())
        } else {
            (settings.model.source.clone(), settings.model.dtype.clone())
        };
        Ok(Identity {
            version: env!("CARGO_PKG_VERSION").into(),
            inputs: self.inputs.iter().map(input).collect::<Result<_, _>>()?,
            column: self.column.clone(),
            model,
            dtype,
            prompt: settings.model.prompt.clone(),
            params,
        })
    }

    /// Opens the journal of this job, without touching what is another's.
    fn open(&self, identity: &Identity) -> anyhow::Result<Journal> {
        let path = Journal::path_of(&self.output);
        let begun = path.exists();
        let output = self.output.display();
        let ours = [self.output.clone(), path.clone(), self.beside("report.json"), self.beside("report.svg")];
        if let Some(input) = self.inputs.iter().find(|input| ours.iter().any(|file| is_same(file, Path::new(input)))) {
            return Err(
                Usage(format!("{input} is an input, and this job would write it; name another --output")).into()
            );
        }
        if self.retry_failed && !begun {
            return Err(
                Usage(format!("--retry-failed: there is no job of {output} ({} is missing)", path.display())).into()
            );
        }
        if self.output.exists() && !begun && !self.restart {
            return Err(Usage(format!("{output} exists, and is of no job; --restart replaces it")).into());
        }
        Journal::open(&path, identity, self.restart).map_err(|error| match error {
            other @ JournalError::OtherJob(..) => Usage(other.to_string()).into(),
            other => other.into(),
        })
    }

    /// Runs the rows that are not done. Returns how that ended, and how many rows there are.
    fn work(&self, settings: &Settings, sources: Sources, job: &mut Job, total: Total) -> anyhow::Result<(End, u64)> {
        if job.failed_too_often() {
            return Ok((End::TooManyFailures, 0));
        }
        let sources = std::sync::Arc::new(sources);
        let counted = sources.clone();
        // Nobody waits for it: a total that comes too late is not shown.
        std::thread::Builder::new()
            .name("count".into())
            .spawn(move || total.set(counted.count().unwrap_or_default()))?;
        let (rows, reader) = job::read_rows(sources, job.journal.index().done_rows(), self.fleet.parcel(settings))?;
        let end = match rows.recv_blocking() {
            // A job that was killed behind its last row needs no model, and no workers.
            Err(_) => End::Complete,
            Ok(first) if self.fleet.kafka => fleet::run(&self.fleet, settings, (first, rows), job, self.max_retries)?,
            Ok(first) => {
                let parts = models::parts(settings, models::load(settings)?)?;
                alone::run(settings, parts, (first, rows), job, self.max_retries)?
            }
        };
        // A reader that waits for a row to be taken has nobody to take it.
        let rows = if end == End::Complete {
            let read = reader.join().map_err(|_| anyhow::anyhow!("reading the inputs panicked"))?;
            let done = HumanCount(job.journal.index().done());
            read.map_err(|unread| {
                anyhow::anyhow!(
                    "{unread}; {done} rows are done and kept: once it can be read, the same command goes on"
                )
            })?
        } else {
            0
        };
        Ok((end, rows))
    }

    /// Writes output and report, and notes in the journal that the job is finished.
    fn write(&self, journal: &mut Journal, form: Form, model: &str, resumed: u64) -> anyhow::Result<Report> {
        let mut columns = Columns::default();
        let mut counter = Counter::new(journal.seconds());
        for row in journal.results().context("cannot read the journal")? {
            let row = row.context("cannot read the journal")?;
            columns.add(&row);
            counter.add(&row);
        }
        let output = self.writes_rows().then(|| self.output.display().to_string());
        if self.writes_rows() {
            let rows = journal.results().context("cannot read the journal")?;
            let values = rows.map(|row| row.map(|row| columns.values(row)));
            write_whole(&self.output, |file| output::write(form, file, &columns.all(), values))?;
        }
        let report = counter.report(model, output, resumed);
        write_whole(&self.beside("report.json"), |mut file| {
            serde_json::to_writer_pretty(&file, &report)?;
            file.write_all(b"\n")?;
            Ok(file)
        })?;
        let (picture, part) = (self.beside("report.svg"), self.beside("report.svg.part"));
        picture::draw(&part, &report).with_context(|| format!("cannot write {}", part.display()))?;
        std::fs::rename(&part, &picture).with_context(|| format!("cannot write {}", picture.display()))?;
        let mark = if self.writes_rows() { Mark::Finished } else { Mark::Summarised };
        journal.mark(mark).context("cannot write the journal")?;
        Ok(report)
    }

    fn finished_before(&self, mut journal: Journal, form: Form, model: &str) -> anyhow::Result<Exit> {
        let index = journal.index();
        let (rows, failed) = (HumanCount(index.done()), HumanCount(index.failed()));
        if self.writes_rows() && !(journal.is_written() && self.output.exists()) {
            let done = index.done();
            let report = self.write(&mut journal, form, model, done)?;
            self.tell(&report)?;
            return Ok(Exit::Done);
        }
        let again = if index.failed() > 0 { "; --retry-failed tries those anew" } else { "" };
        self.say(&format!("this job is finished: {rows} rows, {failed} failed{again}. --restart begins anew"));
        Ok(Exit::Done)
    }

    fn writes_rows(&self) -> bool {
        self.output_action == OutputAction::AppendRow
    }

    fn beside(&self, end: &str) -> PathBuf {
        let mut name = self.output.as_os_str().to_owned();
        name.push(".");
        name.push(end);
        name.into()
    }

    #[allow(clippy::print_stderr)] // for people, beside the output
    fn say(&self, text: &str) {
        if !self.quiet {
            eprintln!("{text}");
        }
    }

    #[allow(clippy::print_stderr)] // an error
    fn too_many_failures(&self, job: &Job) {
        let (failed, done) = (job.journal.index().failed(), job.journal.index().done());
        eprintln!(
            "error: {} of {} rows failed, and --error-threshold is {}. With a higher one the same command goes on; \
             --retry-failed tries the failed rows anew, too; {} says why they failed",
            HumanCount(failed),
            HumanCount(done),
            self.error_threshold,
            Journal::path_of(&self.output).display()
        );
    }

    fn tell(&self, report: &Report) -> io::Result<()> {
        if self.quiet {
            return Ok(());
        }
        let shown = |path: &Path| path.display().to_string();
        let mut out = io::stdout().lock();
        writeln!(out, "{}", report.summary())?;
        if let Some(output) = &report.output {
            writeln!(out, "output   {output}")?;
        }
        writeln!(out, "report   {}, {}", shown(&self.beside("report.json")), shown(&self.beside("report.svg")))
    }
}

/// Whether two names are of one file.
fn is_same(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}
