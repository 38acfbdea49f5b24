//! Keeps `docs/messages.md` true: its requests are read, and its lists are those of the program.

use bytes::Bytes;
use serde_json::Value;

use super::*;
use crate::disposition::Code;

const PAGE: &str = include_str!("../../docs/messages.md");

/// From one heading up to another.
fn section(from: &str, to: &str) -> &'static str {
    let (_, rest) = PAGE.split_once(from).unwrap();
    rest.split_once(to).map_or(rest, |(section, _)| section)
}

/// The code blocks of a section, by the word behind their opening fence.
fn blocks(section: &'static str, language: &str) -> Vec<&'static str> {
    let fenced = section.split("```").skip(1).step_by(2);
    fenced.filter_map(|block| block.strip_prefix(language)?.strip_prefix('\n')).collect()
}

/// The first cells of the tables in a section, where they are code.
fn first_cells(section: &'static str) -> Vec<&'static str> {
    section.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect()
}

fn read(payload: &'static str) -> usize {
    let bytes = Bytes::from_static(payload.as_bytes());
    let message = Message { payload: Some(bytes), ..Message::empty("blipstream.requests", 0, 0) };
    let rows = parse(&message, 10).unwrap_or_else(|error| panic!("{payload}: {error}"));
    for row in &rows {
        assert!(row.is_ok(), "{payload}: {row:?}");
    }
    rows.len()
}

#[test]
fn every_documented_request_is_read() {
    let forms = section("## Requests", "### Which form it is");
    let rows: Vec<_> = blocks(forms, "json").into_iter().map(read).collect();
    assert_eq!(rows, [1, 1, 1, 1, 1, 2, 1, 1], "five native ones, a table, an event, a string");
    let raw: Vec<_> = blocks(forms, "").into_iter().map(|block| block.split("\n\n").last().unwrap()).collect();
    assert_eq!(raw.into_iter().map(read).collect::<Vec<_>>(), [1, 1], "an event in binary mode, a raw reference");
}

#[test]
fn every_code_is_documented_and_no_other() {
    let codes: Vec<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
    assert_eq!(first_cells(section("### Codes", "\u{0}")), codes);
}

#[test]
fn a_code_means_in_the_documentation_what_the_program_says() {
    let rows = section("### Codes", "\u{0}").lines().filter(|line| line.starts_with("| `"));
    let meanings: Vec<_> = rows.map(|row| row.split(" | ").nth(1).unwrap()).collect();
    assert_eq!(meanings, Code::ALL.iter().map(|code| code.meaning()).collect::<Vec<_>>());
}

#[test]
fn every_header_of_a_dead_letter_is_documented_and_no_other() {
    let documented = first_cells(section("## Dead letters", "### Codes"));
    assert_eq!(documented, dead_letter::OURS[..documented.len()]);
    for rest in &dead_letter::OURS[documented.len()..] {
        let retries = section("## Retries", "### Codes");
        assert!(PAGE.contains(&format!("`{rest}` says how")) || retries.contains(&format!("{rest}:")), "{rest}");
    }
}

#[test]
fn every_parameter_is_documented_and_no_other() {
    let documented = first_cells(section("#### Parameters", "### 2. Table"));
    assert_eq!(sorted(&documented), sorted(&request::PARAMS));
}

fn sorted<T: AsRef<str>>(names: &[T]) -> Vec<&str> {
    let mut names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    names.sort_unstable();
    names
}

#[test]
fn the_documented_record_has_the_fields_of_a_record() {
    let block = blocks(section("## Caption records", "### Identity"), "json")[0];
    let mut documented: Value = serde_json::from_str(block).unwrap();
    let record = CaptionRecord {
        schema: SCHEMA,
        id: String::new(),
        index: 0,
        text: String::new(),
        generated: Generated { logprob: Some(0.0), tokens: Some(0), finish: Some("stop") },
        candidates: Vec::new(),
        answers: Vec::new(),
        embeddings: None,
        flags: Vec::new(),
        cached: false,
        model: ModelRef { id: String::new(), revision: None, dtype: String::new() },
        filter: None,
        answerer: None,
        image: ImageInfo::default(),
        timing_ms: Timing::default(),
        origin: Origin { topic: "".into(), partition: 0, offset: 0, index: None },
        worker: String::new(),
        meta: serde_json::Map::new(),
    };
    documented["meta"] = serde_json::json!({});
    assert_eq!(names(&documented), names(&serde_json::to_value(record).unwrap()));
}

/// The paths of all fields.
fn names(value: &Value) -> Vec<String> {
    let Value::Object(fields) = value else { return Vec::new() };
    let mut names: Vec<String> = fields.keys().cloned().collect();
    for (name, value) in fields {
        names.extend(names_below(name, value));
    }
    names.sort_unstable();
    names
}

fn names_below(name: &str, value: &Value) -> Vec<String> {
    names(value).into_iter().map(|below| format!("{name}.{below}")).collect()
}
