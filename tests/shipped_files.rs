//! Promises about the files that ship beside the program: that they agree with it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use blipstream::config::{ConfigErrors, ConfigOptions, Keys, Loaded};
use blipstream::metrics::{Family, Metrics};
use blipstream::pipeline::worker::OVERTIME;
use blipstream::settings::Settings;
use serde::Deserialize;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(repository(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

const DOCKERFILES: [&str; 2] = ["ops/Dockerfile", "ops/Dockerfile.cuda"];

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

/// `NAME: value` lines of a YAML file whose name has this beginning. No YAML parser is needed for that.
fn settings_of(text: &str, beginning: &str) -> Vec<(String, String)> {
    let lines = text.lines().map(str::trim).filter(|line| line.starts_with(beginning));
    let pairs = lines.filter_map(|line| line.split_once(": "));
    pairs.map(|(name, value)| (name.to_owned(), value.trim_matches('"').to_owned())).collect()
}

/// The value that Compose puts for `${NAME:-value}` when NAME is not set.
fn interpolated(value: &str) -> &str {
    value.strip_prefix("${").and_then(|rest| rest.strip_suffix('}')).map_or(value, |inner| {
        let (_, default) = inner.split_once(":-").expect("every variable of the compose file has a default");
        default
    })
}

#[test]
fn the_compose_file_sets_keys_that_exist_to_values_that_load() {
    let variables = settings_of(&read("docker-compose.yml"), "BLIPSTREAM_");
    let loaded = load(variables.iter().map(|(name, value)| (name.as_str(), interpolated(value))));
    let settings = loaded.expect("the compose file's environment").settings;
    assert_eq!(settings.kafka.bootstrap_servers, "kafka:19092");
    assert_eq!(settings.admin.listen.port(), Settings::default().admin.listen.port(), "Prometheus reads that port");
    assert!(read("ops/prometheus/prometheus.yml").contains(&format!("port: {}", settings.admin.listen.port())));
    for file in DOCKERFILES {
        assert!(read(file).contains(&format!("127.0.0.1:{}/livez", settings.admin.listen.port())), "{file}");
    }

    let misspelt = [("BLIPSTREAM_MODEL__SORCE", "demo")];
    assert!(load(misspelt.into_iter()).is_err(), "this test would not notice a wrong key");
}

fn load<'a>(variables: impl Iterator<Item = (&'a str, &'a str)>) -> Result<Loaded, ConfigErrors> {
    ConfigOptions::default().load_with(variables.map(|(name, value)| (name.into(), value.into())))
}

#[test]
fn the_compose_file_lets_a_worker_end_by_itself() {
    let grace = settings_of(&read("docker-compose.yml"), "stop_grace_period");
    let [(_, grace)] = &grace[..] else { panic!("{grace:?}") };
    let grace = humantime::parse_duration(grace).unwrap();
    // And a second for the admin port.
    assert!(grace > Settings::default().flow.drain_timeout + OVERTIME + Duration::from_secs(1), "{grace:?}");
}

#[test]
fn the_documentation_states_how_long_the_end_may_take() {
    let most = OVERTIME.as_secs() + 1;
    for text in [read("docs/runbook.md"), read("src/command/worker.rs")] {
        assert!(text.contains(&format!("{most} seconds more")));
    }
}

#[test]
fn the_files_that_the_compose_file_and_the_dockerfiles_name_exist() {
    let compose = read("docker-compose.yml");
    let words = compose.split(|c: char| c.is_whitespace() || matches!(c, '"' | '[' | ']' | ','));
    let mounted = words.filter_map(|word| word.strip_prefix("./")).filter_map(|word| word.split(':').next());
    let mut paths: Vec<&str> = mounted.collect();
    assert!(paths.len() >= 5, "{paths:?}");
    let dockerfiles = DOCKERFILES.map(read).join("\n");
    let copied = dockerfiles.lines().filter(|line| line.starts_with("COPY ") && !line.contains("--from"));
    paths.extend(copied.filter_map(|line| line.split(' ').nth(1)));
    for path in paths {
        assert!(repository(path).exists(), "{path} does not exist");
    }
    assert!(compose.contains("dockerfile: ops/Dockerfile"));
}

#[test]
fn the_image_for_gpus_says_what_is_missing_where_there_is_no_driver_and_starts_the_program_where_there_is_one() {
    let start = |listed: &str, mounted: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        for file in mounted {
            fs::write(folder.path().join(file), "").unwrap();
        }
        for (name, line) in [("ldconfig", listed), ("program", "echo \"started: $*\"")] {
            let file = folder.path().join(name);
            fs::write(&file, format!("#!/bin/sh\n{line}\n")).unwrap();
            fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        let path = format!("{}:/usr/bin:/bin", folder.path().display());
        let mut command = Command::new(repository("ops/cuda-start"));
        command.arg("worker").env("PATH", path).env("BLIPSTREAM_PROGRAM", folder.path().join("program"));
        command.env("LD_LIBRARY_PATH", format!("/nowhere:{}", folder.path().display()));
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, _, error) = start("echo libcudart.so.13", &[]);
    assert_eq!(code, Some(2));
    assert!(error.contains("no NVIDIA driver") && error.contains("--gpus all"), "{error}");
    let listed = "echo '  libcuda.so.1 (libc6,x86-64) => /usr/lib/libcuda.so.1'";
    for (listed, mounted) in [(listed, &[][..]), ("exit 1", &["libcuda.so.1"])] {
        let (code, said, error) = start(listed, mounted);
        assert_eq!((code, said.as_str(), error.as_str()), (Some(0), "started: worker\n", ""));
    }
}

#[test]
fn the_compose_file_opens_no_port_beyond_loopback_and_pins_every_image() {
    let compose = read("docker-compose.yml");
    for (_, ports) in settings_of(&compose, "ports") {
        assert!(ports.starts_with("[\"127.0.0.1:"), "{ports}");
    }
    for (_, image) in settings_of(&compose, "image") {
        let (_, tag) = image.rsplit_once(':').expect("an image has a tag");
        assert_ne!(tag, "latest", "{image}");
    }
}

#[test]
fn the_topics_created_are_those_of_the_defaults_and_take_the_largest_message() {
    let script = read("ops/kafka/create-topics.sh");
    let created: BTreeSet<&str> = script
        .lines()
        .filter_map(|line| line.strip_prefix("create "))
        .filter_map(|line| line.split(' ').next())
        .collect();
    let kafka = Settings::default().kafka;
    let mut expected: BTreeSet<&str> = kafka.inputs.iter().map(|input| input.topic.as_str()).collect();
    expected.extend([kafka.captions_topic.as_str(), kafka.dead_letter_topic.as_str()]);
    // Each of one constant delay.
    expected.extend(["blipstream.retry.10s", "blipstream.retry.1m", "blipstream.retry.10m"]);
    assert_eq!(created, expected);
    let limit = kafka.max_message_size.as_u64();
    assert!(script.contains(&format!("max.message.bytes={limit}")));
    assert!(read("docker-compose.yml").contains(&format!("KAFKA_MESSAGE_MAX_BYTES: \"{limit}\"")));
}

#[test]
fn the_dashboard_shows_metrics_that_exist_by_labels_that_they_have() {
    let dashboard: serde_json::Value = serde_json::from_str(&read("ops/grafana/dashboards/blipstream.json")).unwrap();
    let metrics = Metrics::new();
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(panels.len() >= 10);
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    for expression in targets.map(|target| target["expr"].as_str().unwrap()) {
        let named: Vec<&Family> = words(expression)
            .filter(|word| word.starts_with("blipstream_"))
            .map(|word| family(&metrics, word).unwrap_or_else(|| panic!("no metric {word} for {expression:?}")))
            .collect();
        assert!(!named.is_empty(), "{expression:?} shows nothing of ours");
        let grouped = expression.split("by (").skip(1).filter_map(|rest| rest.split(')').next());
        for label in grouped.flat_map(words).filter(|&label| label != "le") {
            let known = named.iter().all(|family| family.labels.iter().any(|known| known == label));
            assert!(known, "no label {label} for {expression:?}");
        }
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// The family of a series: a histogram has three.
fn family<'a>(metrics: &'a Metrics, series: &str) -> Option<&'a Family> {
    let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|end| series.strip_suffix(end));
    let find = |name: &str| metrics.families().iter().find(|family| family.name == name);
    find(series).or_else(|| histogram.and_then(find))
}
