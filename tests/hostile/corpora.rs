//! The files that decoders of others are tested with, as messages: broken, odd and hostile ones among them. They are not ours
//! to keep here; `ops/image-corpora` gets them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::support::flow::{Flow, request};
use crate::support::kafka::skip;
use crate::{TURN, record};

/// What a worker may have resident: what one decoder may allocate, for each of its two threads, and 256 MiB for itself.
const MEMORY: u64 = (2 * 512 + 256) << 20;
/// With fewer files the test says little: a package that could not be had is told by the script.
const FEWEST: usize = 900;

/// Files in the folders of packages, in order; what begins with a dot is the script's own.
fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(folder) else { continue };
        for entry in entries.map(Result::unwrap).filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."))
        {
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => folders.push(entry.path()),
                _ => found.push(entry.path()),
            }
        }
    }
    found.sort();
    found
}

/// The first folder of a path.
fn package(id: &str) -> &str {
    id.split('/').next().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_file_of_other_decoders_corpora_ends_as_a_caption_or_a_dead_letter() {
    let _turn = TURN.lock().await;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(target).join("corpora");
    let files = files(&root);
    if files.len() < FEWEST {
        let why =
            format!("{} holds {} of at least {FEWEST} files; ops/image-corpora gets them", root.display(), files.len());
        return skip("the test with the corpora of other decoders", &why).unwrap_or_default();
    }
    let mut flow = Flow::start(8);
    flow.settings.fetch.file_roots = vec![root.clone()];
    flow.settings.decode.threads = 2;
    let address = |file: &PathBuf| url::Url::from_file_path(file).unwrap().to_string();
    flow.write(files.iter().map(|file| request(file.strip_prefix(&root).unwrap().display(), address(file))));
    let worker = flow.process();
    let answers = flow.until_answered(files.len());
    let memory = worker.peak_memory();
    assert_eq!(worker.terminate(), Some(0));
    assert_eq!((answers.origins().len(), answers.count()), (files.len(), files.len()));
    assert!(memory < MEMORY, "{memory} bytes");
    let panicked = answers.dead_letters.values().flatten().filter(|letter| {
        letter.header("blipstream-error-message").is_some_and(|message| message.contains("the decoder failed"))
    });
    let panicked: Vec<_> = panicked.filter_map(|letter| std::str::from_utf8(letter.key.as_deref()?).ok()).collect();
    assert!(panicked.is_empty(), "a decoder panicked: {panicked:#?}");

    let mut ends: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
    for record in answers.captions.values().flatten() {
        *ends.entry(package(record["id"].as_str().unwrap())).or_default().entry("captioned").or_default() += 1;
    }
    for letter in answers.dead_letters.values().flatten() {
        let id = std::str::from_utf8(letter.key.as_deref().unwrap()).unwrap();
        *ends.entry(package(id)).or_default().entry(letter.header("blipstream-error-code").unwrap()).or_default() += 1;
    }
    let mut table = "| files of | captioned | dead letters, by code |\n|---|---:|---|\n".to_owned();
    for (package, ends) in &ends {
        let captioned = ends.get("captioned").unwrap_or(&0);
        let codes =
            ends.iter().filter(|(end, _)| **end != "captioned").map(|(code, count)| format!("{count} `{code}`"));
        writeln!(table, "| {package} | {captioned} | {} |", codes.collect::<Vec<_>>().join(", ")).unwrap();
    }
    let times = answers.captions.values().flatten().filter_map(|record| record["timing_ms"]["decode"].as_f64());
    let slowest = times.fold(0.0, f64::max);
    let mib = memory >> 20;
    let count = files.len();
    writeln!(table, "\n{count} files. The worker, with two threads that decode, had {mib} MiB resident at most.")
        .unwrap();
    writeln!(table, "The slowest picture took {slowest:.0} ms to decode and resize.").unwrap();
    record("corpora", &table);
}
