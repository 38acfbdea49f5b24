//! Files and folders that the settings name must be there when the program starts, not when they are first used.

use std::fs;
use std::path::Path;

use super::validate::Problem;
use crate::settings::Settings;

pub(super) fn settings(settings: &Settings) -> Vec<Problem> {
    let files = [
        ("kafka.ssl_ca_file", &settings.kafka.ssl_ca_file),
        ("kafka.ssl_certificate_file", &settings.kafka.ssl_certificate_file),
        ("kafka.ssl_key_file", &settings.kafka.ssl_key_file),
        ("model.hub_token_file", &settings.model.hub_token_file),
        ("output.flag_terms_file", &settings.output.flag_terms_file),
    ];
    let unread = files.into_iter().filter_map(|(key, path)| Some(Problem::new(&[key], file(path.as_deref()?)?)));
    let roots =
        settings.fetch.file_roots.iter().filter_map(|root| Some(Problem::new(&["fetch.file_roots"], folder(root)?)));
    unread.chain(roots).collect()
}

fn file(path: &Path) -> Option<String> {
    match fs::File::open(path).and_then(|file| file.metadata()) {
        Ok(metadata) if metadata.is_dir() => Some(format!("{} is a folder, not a file", path.display())),
        Ok(_) => None,
        Err(error) => Some(format!("cannot read {}: {error}", path.display())),
    }
}

fn folder(path: &Path) -> Option<String> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => None,
        Ok(_) => Some(format!("{} is no folder", path.display())),
        Err(error) => Some(format!("cannot read {}: {error}", path.display())),
    }
}
