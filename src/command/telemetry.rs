//! Logging: human on a terminal, JSON otherwise, always on standard error, so that it never mixes with output.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use super::Usage;
use crate::settings::{Log, LogFormat};

/// Sets logging up, once a process. `BLIPSTREAM_LOG` or `RUST_LOG` are not read: the configuration is one place.
///
/// # Errors
/// `log.filter` is not a filter.
pub fn init(log: &Log) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&log.filter).map_err(|error| {
        Usage(format!("log.filter: {:?} is not a filter: {error}; try `info` or `blipstream=debug`", log.filter))
    })?;
    let human = match log.format {
        LogFormat::Auto => io::stderr().is_terminal(),
        LogFormat::Human => true,
        LogFormat::Json => false,
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // A second call happens only in tests that run several commands in one process; the first one stays.
    let _ = if human {
        builder.with_target(false).with_ansi(io::stderr().is_terminal()).try_init()
    } else {
        builder.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init()
    };
    Ok(())
}

/// Logging of a command for people at a terminal: warnings only, unless the filter was changed.
pub fn quiet(log: &Log) -> Log {
    let filter = if log.filter == Log::default().filter { "warn".to_owned() } else { log.filter.clone() };
    Log { filter, format: if log.format == LogFormat::Auto { LogFormat::Human } else { log.format } }
}
