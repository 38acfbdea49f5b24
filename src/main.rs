//! The command line: parse it, set up logging, run one command, map its end to an exit code.

use blipstream::command::{self, Cli};
use clap::Parser;

// The system's hands large blocks back at once and has them zeroed anew, page by page, each time an encoder asks for its
// activations: a tenth of the time of a caption on two cores, and half of it on sixteen.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let cli = Cli::parse();
    let code = match command::run(cli) {
        Ok(exit) => exit.code(),
        Err(error) => {
            command::report(&error);
            command::exit_of(&error)
        }
    };
    command::leave(code)
}
