//! The subcommands, one file each.

mod alone;
mod answer;
mod assets;
mod batch;
mod bench;
mod capfilt;
mod caption;
mod check;
mod collect;
pub mod config;
mod demo;
mod dlq;
mod embed;
mod generation;
mod input;
mod local;
mod models;
mod plan;
mod score;
mod serve;
mod submit;
mod telemetry;
pub mod worker;

use std::io::{self, Write};

use clap::{CommandFactory, Parser, Subcommand};
use serde::Serialize;

use crate::config::ConfigErrors;

/// Streaming image captions: image references in from Kafka, BLIP captions out.
#[derive(Debug, Parser)]
#[command(name = "blipstream", version, about, long_about = LONG_ABOUT, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const LONG_ABOUT: &str = "Streaming image captions: image references in from Kafka, BLIP captions out.

A worker consumes requests, fetches and decodes the images, batches them across the devices of its machine, and \
publishes a caption record for each, or a dead letter that says why there is none. Start with `blipstream demo`: it \
needs nothing but this program.";

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 finished with more failures \
than allowed.\nConfiguration: defaults < --config FILE < BLIPSTREAM_SECTION__KEY < --set section.key=value; \
`blipstream config` shows what is in force and why.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the whole thing at work: embedded broker, image server, worker and a small model
    Demo(demo::DemoArgs),
    /// Run a worker: consume requests, caption images, publish records
    Worker(worker::WorkerArgs),
    /// Caption local files, folders and URLs, without Kafka
    Caption(caption::CaptionArgs),
    /// Caption all images of lists, tables, shards and folders, and go on after a stop
    Batch(batch::BatchArgs),
    /// Caption images and judge the captions together with texts that were found, without Kafka
    Capfilt(capfilt::CapFiltArgs),
    /// Judge how well texts describe an image, without Kafka
    Score(score::ScoreArgs),
    /// Answer questions about an image, without Kafka
    Answer(answer::AnswerArgs),
    /// Embed images and texts in one space, without Kafka
    Embed(embed::EmbedArgs),
    /// Answer over HTTP while clients wait, without Kafka
    Serve(serve::ServeArgs),
    /// Send requests to Kafka, and wait for the captions if asked to
    Submit(submit::SubmitArgs),
    /// Read captions and dead letters from Kafka
    Collect(collect::CollectArgs),
    /// List, show and replay dead letters
    Dlq(dlq::DlqArgs),
    /// Check configuration, broker, topics and model, and say what a worker would do
    Check(check::CheckArgs),
    /// Measure how fast this machine captions, and what holds it up
    Bench(bench::BenchArgs),
    /// Say how many workers, partitions and how much network a rate of images takes
    Plan(plan::PlanArgs),
    /// Show the configuration in force and where each value comes from
    Config(config::ConfigArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// How a command ended, when it did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Everything was done.
    Done,
    /// It ran to its end, and something failed that it has named.
    Failed,
    /// More failures than allowed.
    TooManyFailures,
}

impl Exit {
    /// The exit code of the process.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::TooManyFailures => 3,
        }
    }
}

/// Ends the process at once, with what was printed. A plain `exit` would take down the globals of C++ libraries first
/// (oneDNN, CUDA, OpenSSL) while threads still use them, which ends in a crash: threads are left alone here where a
/// model warms up as the worker is told to stop, or where a device hangs.
pub fn leave(code: u8) -> ! {
    // Nobody is left to be told that the last lines could not be written.
    let _ = io::stdout().flush();
    leave_at_once(code)
}

/// The same without what waits to be printed: another thread may be held up in printing it.
pub fn leave_at_once(code: u8) -> ! {
    // SAFETY: it takes any number and does not return.
    unsafe { libc::_exit(code.into()) }
}

/// From now on a signal ends the process: nobody listens for them any more.
pub fn let_signals_end() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the default action is no code of ours.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Bad usage that clap cannot see; exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// The exit code of an error: 2 for usage and configuration, else 1.
pub fn exit_of(error: &anyhow::Error) -> u8 {
    if error.is::<Usage>() || error.is::<ConfigErrors>() { 2 } else { 1 }
}

/// Prints an error and its causes for a person.
#[allow(clippy::print_stderr)] // the last word of the program, after logging has ended
pub fn report(error: &anyhow::Error) {
    eprint!("error: {error}");
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        // Some libraries repeat their cause in their own message.
        let text = cause.to_string();
        if !last.contains(&text) {
            eprint!(": {text}");
            last = text;
        }
    }
    eprintln!();
}

/// Runs a command to its end.
pub fn run(cli: Cli) -> anyhow::Result<Exit> {
    match cli.command {
        Command::Demo(args) => demo::run(args),
        Command::Worker(args) => worker::run(args),
        Command::Caption(args) => caption::run(args),
        Command::Batch(args) => batch::run(args),
        Command::Capfilt(args) => capfilt::run(args),
        Command::Score(args) => score::run(args),
        Command::Answer(args) => answer::run(args),
        Command::Embed(args) => embed::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Submit(args) => submit::run(args),
        Command::Collect(args) => collect::run(args),
        Command::Dlq(args) => dlq::run(args),
        Command::Check(args) => check::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Plan(args) => plan::run(&args),
        Command::Config(args) => match config::run(&args, &mut io::stdout().lock()) {
            Err(config::ConfigCommandError::Config(errors)) => Err(errors.into()),
            result => Ok(result.map(|()| Exit::Done)?),
        },
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "blipstream", &mut io::stdout().lock());
            Ok(Exit::Done)
        }
    }
}

/// The async runtime of a command.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

/// One line of JSON on standard output.
fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    Ok(writeln!(out)?)
}

/// Whether an error only says that the reader of our output has gone (`blipstream … | head`).
fn broken_pipe(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
