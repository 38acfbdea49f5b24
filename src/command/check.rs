//! `blipstream check`: says what a worker with this configuration would do, and what would stop it.

mod broker;
mod memory;
mod model;

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::net::TcpListener;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use super::{Exit, broken_pipe, telemetry};
use crate::caption::config::Architecture;
use crate::caption::preprocess::TurboJpeg;
use crate::config::{ConfigOptions, Loaded};
use crate::kafka::check_transactions;
use crate::settings::{Admin, Delivery, Log, Settings};

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  blipstream check --config blipstream.toml
  blipstream check --set kafka.bootstrap_servers=broker:9092 --offline
  blipstream check --load-model          also load the model and find its batch size
  blipstream check --json | jq '.items[] | select(.state == \"failed\")'

Nothing is consumed, written or created: the brokers are only asked. Under kafka.delivery=exactly_once they are asked for
a transactional id of a made-up name, as at the start of a worker. A hub model's config.json is fetched unless it is in
the cache (--offline asks nobody), its weights only with --load-model.
Exit codes: 0 a worker would start, 1 something is wrong, 2 the configuration is.")]
pub struct CheckArgs {
    /// Do not ask the model hub
    #[arg(long)]
    offline: bool,
    /// Load the model, as a worker would
    #[arg(long)]
    load_model: bool,
    /// How long the brokers, and the hub, may take to answer
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Print one JSON object: `ok` and `items`, each with `name`, `state` and `text`
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigOptions,
}

/// How one thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    Warning,
    Failed,
    Skipped,
}

impl State {
    fn mark(self, terminal: bool) -> &'static str {
        match (self, terminal) {
            (Self::Ok, true) => "✓",
            (Self::Warning, true) => "!",
            (Self::Failed, true) => "✗",
            (Self::Skipped, true) => "–",
            (Self::Ok, false) => "ok  ",
            (Self::Warning, false) => "warn",
            (Self::Failed, false) => "FAIL",
            (Self::Skipped, false) => "skip",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Item {
    name: &'static str,
    state: State,
    text: String,
}

impl Item {
    fn ok(name: &'static str, text: impl Into<String>) -> Self {
        Self { name, state: State::Ok, text: text.into() }
    }

    fn warning(name: &'static str, text: impl Into<String>) -> Self {
        Self { name, state: State::Warning, text: text.into() }
    }

    fn failed(name: &'static str, text: impl Into<String>) -> Self {
        Self { name, state: State::Failed, text: text.into() }
    }

    fn skipped(name: &'static str, text: impl Into<String>) -> Self {
        Self { name, state: State::Skipped, text: text.into() }
    }
}

/// Runs the command.
pub fn run(args: CheckArgs) -> anyhow::Result<Exit> {
    let loaded = args.config.load()?;
    let settings = &loaded.settings;
    telemetry::init(&only_errors(&settings.log))?;
    let mut report = Report { json: args.json, items: Vec::new() };
    // Each is printed as soon as it is known: some take their time.
    let result = report.all(&args, &loaded).and_then(|()| report.end());
    match result {
        Err(error) if !broken_pipe(&error) => Err(error.into()),
        _ if report.failed() > 0 => Ok(Exit::Failed),
        _ => Ok(Exit::Done),
    }
}

fn large_jpegs() -> Item {
    match TurboJpeg::open() {
        Ok(_) => Item::ok("large JPEGs", "are decoded at a part of their size, by libjpeg-turbo"),
        Err(error) => Item::warning("large JPEGs", format!("are decoded whole: {error}")),
    }
}

/// What goes wrong is told by the items; the log would tell it twice.
fn only_errors(log: &Log) -> Log {
    let filter = if log.filter == Log::default().filter { "error".to_owned() } else { log.filter.clone() };
    telemetry::quiet(&Log { filter, ..log.clone() })
}

struct Report {
    json: bool,
    items: Vec<Item>,
}

impl Report {
    fn all(&mut self, args: &CheckArgs, loaded: &Loaded) -> io::Result<()> {
        let settings = &loaded.settings;
        self.add(configuration(&args.config))?;
        for warning in loaded.warnings() {
            self.add(Item::warning("configuration", warning))?;
        }
        for item in broker::items(&settings.kafka, args.timeout) {
            self.add(item)?;
        }
        if settings.decode.jpeg_reducing_gap > 0.0 {
            self.add(large_jpegs())?;
        }
        let reached = self.failed() == 0;
        self.add(delivery(settings, reached.then_some(args.timeout)))?;
        let wanted = model::Wanted {
            item: "model",
            source: &settings.model.source,
            setting: "model.source",
            architecture: Architecture::Captioner,
        };
        let (found, sizes) = model::source(wanted, &settings.model, args.offline, args.timeout);
        let mut usable = matches!(found.state, State::Ok | State::Warning);
        self.add(found)?;
        let mut parameters = sizes.map(|sizes| sizes.parameters());
        for (item, source, setting, architecture) in [
            ("filter", &settings.filter.source, "filter.source", Architecture::Matcher),
            ("answerer", &settings.answerer.source, "answerer.source", Architecture::Answerer),
            ("canary", &settings.canary.source, "canary.source", Architecture::Captioner),
        ] {
            let Some(source) = source else { continue };
            let wanted = model::Wanted { item, source, setting, architecture };
            let (found, sizes) = model::source(wanted, &settings.model, args.offline, args.timeout);
            let own = sizes.map(|sizes| match architecture {
                Architecture::Captioner => sizes.parameters(),
                Architecture::Matcher => sizes.matcher_parameters(),
                Architecture::Answerer => sizes.answerer_parameters(),
            });
            parameters = parameters.zip(own).map(|(sum, own)| sum + own);
            usable &= matches!(found.state, State::Ok | State::Warning);
            self.add(found)?;
        }
        self.add(model::devices(&settings.model))?;
        if args.load_model {
            self.add(if usable {
                model::load(settings)
            } else {
                Item::skipped("load", "the model was not loaded, since it was not found")
            })?;
        }
        self.add(memory::item(settings, parameters))?;
        self.add(admin(&settings.admin))
    }

    fn add(&mut self, item: Item) -> io::Result<()> {
        if !self.json {
            let mut out = io::stdout().lock();
            let mark = item.state.mark(out.is_terminal());
            writeln!(out, "{mark} {}: {}", item.name, item.text.replace('\n', " "))?;
        }
        self.items.push(item);
        Ok(())
    }

    fn end(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let failed = self.failed();
        if self.json {
            return writeln!(out, "{:#}", json!({"ok": failed == 0, "items": self.items}));
        }
        match failed {
            0 => writeln!(out, "\nA worker would start: `blipstream worker` with the same options."),
            1 => writeln!(out, "\nOne thing is wrong; a worker would not run."),
            _ => writeln!(out, "\n{failed} things are wrong; a worker would not run."),
        }
    }

    fn failed(&self) -> usize {
        self.items.iter().filter(|item| item.state == State::Failed).count()
    }
}

fn configuration(options: &ConfigOptions) -> Item {
    let mut text = match options.files.as_slice() {
        [] => "no file, so defaults".to_owned(),
        files => files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", then "),
    };
    if !options.set.is_empty() {
        let _ = write!(text, ", and {} by --set", options.set.len());
    }
    Item::ok("configuration", text + "; environment variables BLIPSTREAM_* count (`blipstream config` shows all)")
}

/// What is promised; the brokers are asked for transactions, for `patience`, where they are there and we need them.
fn delivery(settings: &Settings, patience: Option<Duration>) -> Item {
    let Settings { kafka, flow, .. } = settings;
    if kafka.delivery == Delivery::AtLeastOnce {
        let text = format!(
            "at least once; after a crash at most {} requests of each partition are captioned again (flow.max_span)",
            flow.max_span
        );
        return Item::ok("delivery", text);
    }
    let text = format!(
        "exactly once for readers with isolation.level=read_committed; captions appear every {:?} or {} at a time",
        kafka.transaction_interval, kafka.transaction_records
    );
    match patience.map(|patience| check_transactions(kafka, patience)) {
        Some(Err(error)) => Item::failed("delivery", error.to_string()),
        Some(Ok(true)) => Item::ok("delivery", text + "; the brokers permit it"),
        Some(Ok(false)) | None => {
            Item::ok("delivery", text + "; whether the brokers permit it, the worker sees at start")
        }
    }
}

fn admin(admin: &Admin) -> Item {
    match TcpListener::bind(admin.listen) {
        Ok(_) if admin.listen.port() == 0 => {
            Item::ok("admin", format!("a free port of {}; the log says which", admin.listen.ip()))
        }
        Ok(_) => Item::ok("admin", format!("http://{} (/livez, /readyz, /metrics, /status)", admin.listen)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Item::warning(
            "admin",
            format!(
                "{} is taken, perhaps by a worker that runs here already; a second one needs another admin.listen",
                admin.listen
            ),
        ),
        Err(error) => Item::failed("admin", format!("cannot listen on {} (admin.listen): {error}", admin.listen)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn a_taken_admin_port_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = Admin { listen: listener.local_addr().unwrap(), ..Admin::default() };
        assert_eq!(admin(&taken).state, State::Warning);
        let free = Admin { listen: SocketAddr::from(([127, 0, 0, 1], 0)), ..Admin::default() };
        assert_eq!(admin(&free).state, State::Ok);
        // An address of the documentation (RFC 5737): no machine has it.
        let foreign = Admin { listen: SocketAddr::from(([192, 0, 2, 1], 9464)), ..Admin::default() };
        assert_eq!(admin(&foreign).state, State::Failed);
    }
}
