//! The command line: parse it, set up logging, run one command, map its end to an exit code.

use std::process::ExitCode;

use blipstream::command::{self, Cli};
use clap::Parser;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match command::run(cli) {
        Ok(exit) => exit.into(),
        Err(error) => {
            command::report(&error);
            command::exit_of(&error).into()
        }
    }
}
