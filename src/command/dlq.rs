//! `blipstream dlq`: lists, shows and replays dead letters.

mod count;
mod filter;
mod letter;
mod list;
mod once;
mod reading;
mod replay;
mod show;
mod target;
mod writer;

use std::io;
use std::time::Duration;

use super::{Exit, broken_pipe};
use crate::config::ConfigOptions;

/// Arguments of `dlq`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  blipstream dlq ls --count-by code                      what fails, and how often
  blipstream dlq ls --since 2h --code dns,connect        what failed so within the last two hours
  blipstream dlq show 0/17                               one dead letter whole, and what to do about it
  blipstream dlq replay --code http_5xx --host images.example --dry-run
  blipstream dlq replay --code http_5xx --host images.example --rate 20

No consumer group is joined and nothing is committed: dead letters stay in their topic until its retention ends.
Each command ends at the end that the topic had when it began.")]
pub struct DlqArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// List dead letters, or count them
    Ls(list::LsArgs),
    /// Show dead letters whole, with what they mean and what to do
    Show(show::ShowArgs),
    /// Send dead letters back to their input topic
    Replay(replay::ReplayArgs),
}

/// What all three need.
#[derive(Debug, clap::Args)]
struct Common {
    /// How long the brokers may take to answer, at the start and in between
    #[arg(long, value_name = "DURATION", default_value = "15s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    #[command(flatten)]
    config: ConfigOptions,
}

/// Form of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Form {
    /// A table
    Text,
    /// One JSON object a line
    Jsonl,
}

/// Runs the command.
pub fn run(args: DlqArgs) -> anyhow::Result<Exit> {
    let finished = match args.action {
        Action::Ls(args) => list::run(args),
        Action::Show(args) => show::run(args),
        Action::Replay(args) => replay::run(args),
    };
    match finished {
        // Who reads the list has seen enough of it.
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(broken_pipe) => Ok(Exit::Done),
        finished => finished,
    }
}
