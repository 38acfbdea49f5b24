//! The text of a configuration file. What `blipstream config` prints of it is a configuration file with the same values.

#![no_main]

use std::{env, fs, process};

use blipstream::command::config::print_text;
use blipstream::config::{ConfigErrors, ConfigOptions, HIDDEN, Loaded};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let loaded = match load(text) {
        Ok(loaded) => loaded,
        Err(errors) => {
            assert!(!errors.all().is_empty());
            return assert!(!errors.to_string().is_empty());
        }
    };
    loaded.warnings();
    let entries = loaded.entries();
    // A secret is hidden; what is printed in its place is no value of it.
    if entries.iter().any(|entry| entry.value.as_ref().is_some_and(|value| value.as_str() == Some(HIDDEN))) {
        return;
    }
    let mut printed = Vec::new();
    print_text(&entries, &mut printed).expect("memory can be written to");
    let printed = String::from_utf8(printed).expect("settings are text");
    let again = load(&printed).unwrap_or_else(|errors| panic!("{errors}\nof what was printed:\n{printed}"));
    assert_eq!(again.settings, loaded.settings, "{printed}");
});

/// The settings of a file with this text, and of nothing else.
fn load(text: &str) -> Result<Loaded, ConfigErrors> {
    let file = env::temp_dir().join(format!("blipstream-fuzz-{}.toml", process::id()));
    fs::write(&file, text).expect("the folder for temporary files can be written to");
    let loaded = ConfigOptions { files: vec![file.clone()], set: Vec::new() }.load_with([]);
    fs::remove_file(file).expect("the file was just written");
    loaded
}
