//! The floors of the house, held by a test: a room imports only what lies below it.
//!
//! Sources are parsed, so that comments and texts do not count. What is looked at: `use` trees, and paths that begin
//! with `crate`, `super`, `self` or the name of a crate, anywhere: in types, expressions, patterns, attributes'
//! arguments and the tokens of macros. A module's own tests obey the same rules, with one exception: a test may use
//! any room of a lower floor *and* of its own, since it stands beside the room and nothing imports it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Span, TokenStream, TokenTree};
use syn::spanned::Spanned;
use syn::visit::Visit;

/// Longest source file, in lines: beyond it a file is split by meaning.
const LONGEST: usize = 500;

/// The rooms by floor. A room imports rooms of lower floors, and `self`.
const FLOORS: &[(usize, &[&str])] = &[
    (0, &["budget", "disposition", "message", "metrics", "offsets", "settings"]),
    (1, &["config", "gate", "kafka", "retry", "tracked", "web", "caption"]),
    (2, &["stage"]),
    (3, &["pipeline", "simulation"]),
    (4, &["admin", "command", "endpoint"]),
];

/// Floor 0 is the vocabulary: its rooms may share words (a dead letter says its disposition, a setting its type).
/// Floor 4 is the way in: a command may serve the admin port.
const SIBLINGS_MAY_MEET: &[usize] = &[0, 4];

/// Rooms that import nothing else of ours, because they could leave the house tomorrow.
const ALONE: &[&str] = &["caption"];

/// What exactly may break a rule, as (file, room), and why. Empty, and meant to stay so.
const EXCEPTIONS: &[(&str, &str, &str)] = &[];

fn floor(room: &str) -> Option<usize> {
    FLOORS.iter().find(|(_, rooms)| rooms.contains(&room)).map(|(floor, _)| *floor)
}

/// A rule broken, and where.
#[derive(Debug, PartialEq, Eq)]
struct Breach {
    file: String,
    line: usize,
    what: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.what)
    }
}

/// A path as a source names it: its segments, where, and whether only tests see it.
struct Reference {
    segments: Vec<String>,
    /// Module that the path stands in, from the crate's root.
    module: Vec<String>,
    line: usize,
    test: bool,
}

/// Collects the paths of one file.
struct Collector {
    module: Vec<String>,
    test: bool,
    found: Vec<Reference>,
}

impl Collector {
    fn add(&mut self, segments: Vec<String>, span: Span) {
        let module = self.module.clone();
        self.found.push(Reference { segments, module, line: span.start().line, test: self.test });
    }

    fn tree(&mut self, prefix: &[String], tree: &syn::UseTree) {
        let with = |ident: &syn::Ident| [prefix, &[ident.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.tree(&with(&path.ident), &path.tree),
            syn::UseTree::Name(name) => self.add(with(&name.ident), name.ident.span()),
            syn::UseTree::Rename(rename) => self.add(with(&rename.ident), rename.ident.span()),
            syn::UseTree::Glob(glob) => self.add(prefix.to_vec(), glob.span()),
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.tree(prefix, tree)),
        }
    }

    /// Paths in tokens that the parser leaves alone: `a::b::c` wherever it begins.
    fn tokens(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            match &tokens[at] {
                TokenTree::Group(group) => self.tokens(group.stream()),
                TokenTree::Ident(first) => {
                    let mut segments = vec![first.to_string()];
                    while let [TokenTree::Punct(a), TokenTree::Punct(b), TokenTree::Ident(next), ..] = &tokens[at + 1..]
                        && a.as_char() == ':'
                        && b.as_char() == ':'
                    {
                        segments.push(next.to_string());
                        at += 3;
                    }
                    if segments.len() > 1 {
                        self.add(segments, first.span());
                    }
                }
                _ => {}
            }
            at += 1;
        }
    }

    fn within(&mut self, attributes: &[syn::Attribute], visit: impl FnOnce(&mut Self)) {
        let before = self.test;
        self.test |= is_test(attributes);
        visit(self);
        self.test = before;
    }
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let cfg_test = || attribute.parse_args::<syn::Path>().is_ok_and(|path| path.is_ident("test"));
        attribute.path().is_ident("cfg") && cfg_test()
    })
}

impl<'ast> Visit<'ast> for Collector {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.within(&item.attrs, |this| {
            this.module.push(item.ident.to_string());
            syn::visit::visit_item_mod(this, item);
            this.module.pop();
        });
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.within(&item.attrs, |this| this.tree(&[], &item.tree));
    }

    fn visit_item_extern_crate(&mut self, item: &'ast syn::ItemExternCrate) {
        self.add(vec![item.ident.to_string()], item.ident.span());
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.add(segments, path.span());
        syn::visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, item: &'ast syn::Macro) {
        syn::visit::visit_macro(self, item);
        self.tokens(item.tokens.clone());
    }

    fn visit_attribute(&mut self, attribute: &'ast syn::Attribute) {
        syn::visit::visit_attribute(self, attribute);
        if let syn::Meta::List(list) = &attribute.meta {
            self.tokens(list.tokens.clone());
        }
    }
}

/// The module that a file holds, from the crate's root: `src/kafka/mod.rs` is `kafka`.
fn module_of(file: &str) -> Vec<String> {
    let inner = file.strip_prefix("src/").unwrap_or(file);
    let inner = inner.strip_suffix(".rs").unwrap_or(inner);
    let mut parts: Vec<String> = inner.split('/').map(str::to_owned).collect();
    if parts.last().is_some_and(|last| matches!(last.as_str(), "mod" | "lib" | "main")) {
        parts.pop();
    }
    parts
}

/// The path from the crate's root, where the reference is to our own crate.
fn resolve(reference: &Reference) -> Option<Vec<String>> {
    let mut module = reference.module.clone();
    let mut segments = reference.segments.iter().map(String::as_str).peekable();
    match segments.next()? {
        // The binary names the library by its name, macros by `$crate`.
        "crate" | "blipstream" => module.clear(),
        "self" => {}
        "super" => {
            module.pop();
        }
        _ => return None,
    }
    while segments.next_if_eq(&"super").is_some() {
        module.pop();
    }
    module.extend(segments.map(str::to_owned));
    Some(module)
}

/// Why a path from `here` to `there` breaks a rule.
fn judge(here: &[String], there: &[String], test: bool) -> Option<String> {
    let (from, to) = (here.first()?, there.first()?);
    let from_floor = floor(from)?;
    // Names at the root that are no rooms: macros that are exported there.
    let to_floor = floor(to)?;
    if from == to {
        return stage_meets_stage(here, there);
    }
    if ALONE.contains(&from.as_str()) {
        return Some(format!("{from} imports {to}, but it should import nothing else of this crate"));
    }
    if to_floor > from_floor {
        return Some(format!("{from} (floor {from_floor}) reaches up to {to} (floor {to_floor})"));
    }
    let beside = to_floor == from_floor && !SIBLINGS_MAY_MEET.contains(&from_floor) && !test;
    beside.then(|| format!("{from} imports its sibling {to} (floor {from_floor})"))
}

fn stage_meets_stage(here: &[String], there: &[String]) -> Option<String> {
    let (from, to) = (here.get(1)?, there.get(1)?);
    // Other names stand in `stage` itself: the types that flow between stages.
    let stages = here[0] == "stage" && STAGES.contains(&to.as_str());
    (stages && from != to).then(|| format!("stage {from} imports stage {to}"))
}

/// What stages have in common, beside what stands in `stage/mod.rs` itself.
const BETWEEN_STAGES: &[&str] = &["answers"];

const STAGES: &[&str] = &["consume", "parse", "fetch", "decode", "batch", "infer", "publish", "commit"];

/// The breaches of one file; `file` is its path from the root of the repository.
fn check(file: &str, source: &str) -> Vec<Breach> {
    let parsed = syn::parse_file(source).unwrap_or_else(|error| panic!("{file}: {error}"));
    let mut collector = Collector { module: module_of(file), test: false, found: Vec::new() };
    collector.visit_file(&parsed);
    let here = module_of(file);
    let breach = |reference: &Reference| {
        let foreign = reference.segments[0].as_str();
        let what = match resolve(reference) {
            Some(there) => judge(&here, &there, reference.test)?,
            None if foreign == "rdkafka" && here.first().is_none_or(|room| room != "kafka") => {
                "rdkafka is imported outside src/kafka/".to_owned()
            }
            None => return None,
        };
        Some(Breach { file: file.to_owned(), line: reference.line, what })
    };
    let mut breaches: Vec<Breach> = collector.found.iter().filter_map(breach).collect();
    // A path inside a path is found twice.
    breaches.dedup();
    breaches
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All sources below `folder`, by their path from the root of the repository.
fn sources(folder: &str) -> BTreeMap<String, String> {
    fn walk(folder: &Path, found: &mut BTreeMap<String, String>) {
        let Ok(entries) = fs::read_dir(folder) else { return };
        for path in entries.map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(repository()).unwrap().to_string_lossy().replace('\\', "/");
                found.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(&repository().join(folder), &mut found);
    found
}

#[test]
fn every_room_imports_only_what_lies_below_it() {
    let mut breaches = Vec::new();
    for (file, source) in sources("src") {
        let excepted = |breach: &Breach| EXCEPTIONS.iter().any(|(f, room, _)| *f == file && breach.what.contains(room));
        breaches.extend(check(&file, &source).into_iter().filter(|breach| !excepted(breach)));
    }
    let lines: Vec<String> = breaches.iter().map(Breach::to_string).collect();
    assert!(lines.is_empty(), "the floors of the house are broken:\n{}", lines.join("\n"));
}

#[test]
fn every_module_of_the_crate_has_its_floor() {
    let library = syn::parse_file(&fs::read_to_string(repository().join("src/lib.rs")).unwrap()).unwrap();
    let modules = library.items.iter().filter_map(|item| match item {
        syn::Item::Mod(module) => Some(module.ident.to_string()),
        _ => None,
    });
    let mut modules: Vec<String> = modules.collect();
    let mut rooms: Vec<String> =
        FLOORS.iter().flat_map(|(_, rooms)| rooms.iter().map(|&room| room.to_owned())).collect();
    modules.sort();
    rooms.sort();
    assert_eq!(modules, rooms, "src/lib.rs and the floors of this test differ");

    let stage = syn::parse_file(&fs::read_to_string(repository().join("src/stage/mod.rs")).unwrap()).unwrap();
    for item in &stage.items {
        if let syn::Item::Mod(module) = item {
            let name = module.ident.to_string();
            let known = STAGES.contains(&name.as_str()) || BETWEEN_STAGES.contains(&name.as_str());
            assert!(is_test(&module.attrs) || known, "{name} is no known stage");
        }
    }
}

#[test]
fn no_source_file_is_too_long_to_read() {
    let mut long = Vec::new();
    for folder in ["src", "tests", "benches"] {
        for (file, source) in sources(folder) {
            let lines = source.lines().count();
            if lines > LONGEST {
                long.push(format!("{file}: {lines} lines, more than {LONGEST}: split it by meaning"));
            }
        }
    }
    assert!(long.is_empty(), "{}", long.join("\n"));
}

// The checker, checked: what must be found, and what must not.

fn found(file: &str, source: &str) -> Vec<String> {
    check(file, source).iter().map(Breach::to_string).collect()
}

#[test]
fn finds_what_breaks_the_rules() {
    for (file, source, expected) in [
        ("src/offsets.rs", "use crate::kafka::Client;", "src/offsets.rs:1: offsets (floor 0) reaches up to kafka"),
        ("src/offsets.rs", "\n\nuse super::kafka::Client;", "src/offsets.rs:3: offsets (floor 0) reaches up to kafka"),
        ("src/message/record.rs", "use super::super::stage::Output;", "reaches up to stage"),
        ("src/gate.rs", "use crate::{budget::Pool, retry};", "src/gate.rs:1: gate imports its sibling retry"),
        ("src/gate.rs", "fn f() -> crate::config::Loaded { todo() }", "gate imports its sibling config"),
        ("src/gate.rs", "fn f() { let x = crate::stage::parse::run(); }", "reaches up to stage"),
        ("src/gate.rs", "fn f() { vec![1, crate::pipeline::LIMIT]; }", "reaches up to pipeline"),
        ("src/gate.rs", "fn f() { g!({ use crate::stage as s; }); }", "reaches up to stage"),
        ("src/gate.rs", "macro_rules! m { () => { $crate::stage::run() } }", "reaches up to stage"),
        ("src/gate.rs", "#[derive(X)] struct S { #[x(with = crate::stage::f)] a: u8 }", "reaches up to stage"),
        ("src/gate.rs", "mod inner { use super::super::stage::Ready; }", "reaches up to stage"),
        ("src/gate.rs", "pub use blipstream::stage::Ready;", "reaches up to stage"),
        ("src/kafka/client.rs", "use crate::tracked::*;", "kafka imports its sibling tracked"),
        ("src/stage/parse.rs", "use super::fetch::Fetcher;", "stage parse imports stage fetch"),
        ("src/stage/parse.rs", "use crate::stage::{Output, fetch};", "stage parse imports stage fetch"),
        ("src/stage/fetch/pool.rs", "use super::super::decode::X;", "stage fetch imports stage decode"),
        ("src/stage/parse.rs", "#[cfg(test)] mod tests { use crate::stage::fetch::X; }", "imports stage fetch"),
        ("src/stage/parse.rs", "use crate::pipeline::Pipeline;", "reaches up to pipeline"),
        ("src/pipeline.rs", "use crate::admin::serve;", "reaches up to admin"),
        ("src/caption/blip.rs", "use crate::message::Row;", "caption imports message"),
        ("src/caption/blip.rs", "#[cfg(test)] mod tests { use crate::budget::Pool; }", "caption imports budget"),
        ("src/stage/consume.rs", "use rdkafka::Message;", "rdkafka is imported outside src/kafka/"),
        ("src/stage/consume.rs", "fn f(_: &rdkafka::Message) {}", "rdkafka is imported outside src/kafka/"),
        ("src/main.rs", "extern crate rdkafka;", "rdkafka is imported outside src/kafka/"),
    ] {
        let found = found(file, source);
        assert!(found.iter().any(|breach| breach.contains(expected)), "no {expected:?} in {found:?} of {source:?}");
    }
}

#[test]
fn lets_pass_what_keeps_the_rules() {
    for (file, source) in [
        ("src/gate.rs", "// use crate::stage;\nconst S: &str = \"crate::stage::X\";"),
        ("src/gate.rs", "use crate::disposition::names; names! { A { B = \"b\" } }"),
        ("src/gate.rs", "use crate::budget::Pool; use std::sync::Arc; use tokio::sync::watch;"),
        ("src/gate.rs", "#[cfg(test)] mod tests { use super::*; use crate::retry::Backoff; }"),
        ("src/message/dead_letter.rs", "use super::Headers; use crate::disposition::Failure;"),
        ("src/config/mod.rs", "mod keys; use self::keys::Keys; use crate::settings::Settings;"),
        ("src/kafka/client.rs", "use rdkafka::ClientConfig; use super::consumer::Consumer;"),
        ("src/caption/blip.rs", "use super::Engine; use crate::caption::error::EngineError; use candle_core::Tensor;"),
        ("src/stage/parse.rs", "use super::{Output, failed}; use crate::kafka::Event; use crate::caption::Pixels;"),
        ("src/stage/fetch/pool.rs", "use super::resolver::Resolver; use crate::stage::fetch::Fetcher;"),
        ("src/stage/mod.rs", "pub mod fetch; use fetch::Fetcher; use crate::stage::fetch::X;"),
        ("src/pipeline.rs", "use crate::stage::{fetch, parse};"),
        ("src/command/worker.rs", "use crate::admin::serve; use crate::pipeline::Pipeline;"),
        ("src/main.rs", "use blipstream::command::Cli;"),
    ] {
        assert_eq!(found(file, source), Vec::<String>::new(), "{file}: {source}");
    }
}
