//! Promises about the files that ship beside the program: that they agree with it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use blipstream::config::{ConfigOptions, Keys};
use blipstream::settings::Settings;
use serde::Deserialize;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(repository(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A key as a TOML file states it.
struct Stated {
    path: String,
    value: String,
    commented: bool,
}

/// The keys of a file, those behind a comment sign too.
fn stated_keys(text: &str) -> Vec<Stated> {
    let mut section = String::new();
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            name.clone_into(&mut section);
            if section.contains('.') {
                found.push(Stated { path: section.clone(), value: "{}".into(), commented: false });
            }
        }
        let (line, commented) = line.strip_prefix("# ").map_or((line, false), |rest| (rest, true));
        let Some((name, value)) = line.split_once(" = ") else { continue };
        if name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') {
            found.push(Stated { path: format!("{section}.{name}"), value: value.to_owned(), commented });
        }
    }
    found
}

fn sections<'a>(paths: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut sections: Vec<&str> = paths.map(|path| path.split('.').next().unwrap()).collect();
    sections.dedup();
    sections
}

#[test]
fn the_configuration_file_states_the_defaults_and_every_key_once() {
    let options = ConfigOptions { files: vec![repository("config/blipstream.toml")], set: Vec::new() };
    assert_eq!(options.load_with([]).unwrap().settings, Settings::default());

    let text = read("config/blipstream.toml");
    let stated = stated_keys(&text);
    let keys = Keys::new();
    let known: BTreeSet<&str> = keys.all().iter().map(|key| key.path.as_str()).collect();
    let named: BTreeSet<&str> = stated.iter().map(|key| key.path.as_str()).collect();
    assert_eq!(named, known);
    assert_eq!(named.len(), stated.len(), "a key is stated twice");
    assert_eq!(
        sections(stated.iter().map(|key| key.path.as_str())),
        sections(keys.all().iter().map(|key| key.path.as_str()))
    );
}

#[test]
fn the_configuration_file_comments_out_what_has_no_default_and_its_examples_are_valid() {
    let keys = Keys::new();
    for Stated { path, value, commented } in stated_keys(&read("config/blipstream.toml")) {
        let key = keys.find(&path).unwrap();
        // The User-Agent's default names the version: the file could not keep up with it.
        let by_default = key.default.is_some() && path != "fetch.user_agent";
        assert_eq!(commented, !by_default, "{path}");
        let document = format!("[{}]\n{} = {value}\n", key.section, key.name);
        let parsed: toml::Table = toml::from_str(&document).unwrap();
        assert!(Settings::deserialize(parsed).is_ok(), "{path} = {value} is no valid example");
    }
}
