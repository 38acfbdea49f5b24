//! Hostile input through whole workers: every trick of an image server, a crowd of bad messages among good ones, and the
//! broken files that decoders of others are tested with.
//!
//! `make hostile` runs the same with the limits that workers have by default, and writes what it measured into
//! `docs/hostile-input.md`.

mod corpora;
mod crowd;
#[path = "../support/mod.rs"]
mod support;
mod table;
mod tricks;

use std::fmt::Write as _;
use std::path::Path;

/// Held by the test whose turn it is: each wants the machine for itself.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Whether measured figures are written down.
fn recording() -> bool {
    std::env::var_os("BLIPSTREAM_RECORD").is_some()
}

/// Replaces a part of the page, between its two comments, if figures are written down.
fn record(part: &str, text: &str) {
    if !recording() {
        return;
    }
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/hostile-input.md");
    let before = std::fs::read_to_string(&page).unwrap();
    let (begin, end) = (format!("<!-- {part} -->\n"), format!("<!-- end of {part} -->"));
    let (head, rest) = before.split_once(&begin).expect("the page has the part");
    let (_, tail) = rest.split_once(&end).expect("the part has an end");
    let mut after = head.to_owned();
    write!(after, "{begin}\n{text}\n{}{end}{tail}", stamp()).unwrap();
    std::fs::write(&page, after).unwrap();
}

/// When, where and with what it was measured.
fn stamp() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("?", |(_, m)| m);
    let (date, version) = (jiff::Zoned::now().date(), env!("CARGO_PKG_VERSION"));
    format!("\nMeasured on {date} with blipstream {version}, {model}, {cpus} threads.\n\n")
}
