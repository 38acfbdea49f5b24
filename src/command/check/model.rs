//! The model and the devices.

use std::io::Read;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::HumanCount;

use super::Item;
use crate::caption::config::{Architecture, BlipConfig};
use crate::caption::{DeviceSpec, HubSource, ModelSource};
use crate::command::models;
use crate::settings::{Model, Settings};

/// A longer config.json is not what it claims to be.
const MAX_CONFIG: u64 = 1 << 20;
/// Of each line, one file is needed.
const WEIGHTS: [&str; 3] = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"];
const TOKENIZERS: [&str; 2] = ["tokenizer.json", "vocab.txt"];

/// What is said of a model, and its sizes.
type Found = Result<(String, BlipConfig), String>;

/// A model that is looked for.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// Name of the item in the report.
    pub item: &'static str,
    /// Its source.
    pub source: &'a str,
    /// The setting that names it.
    pub setting: &'static str,
    /// What kind of model it has to be.
    pub architecture: Architecture,
}

/// Looks for a model without loading it. Gives its sizes, where they are known.
pub fn source(wanted: Wanted<'_>, model: &Model, offline: bool, timeout: Duration) -> (Item, Option<BlipConfig>) {
    let Wanted { item, setting, architecture, .. } = wanted;
    let found = match models::source(wanted.source, architecture, model) {
        Err(error) => Err(format!("{error:#}")),
        Ok(ModelSource::Dir(path)) => directory(&path),
        Ok(ModelSource::Memory { id, files }) => {
            let json = files.get("config.json").map_or(&[][..], |json| json);
            let config = BlipConfig::from_json(json).map_err(|error| error.to_string());
            config.map(|config| (format!("{id}, compiled into this program"), config))
        }
        Ok(ModelSource::Random { id, config, .. }) => {
            let text = format!("{id} has random weights: good for measuring speed, not for captions");
            return (Item::warning(item, text), Some(config));
        }
        Ok(ModelSource::Hub(hub)) => match hub.cached_config() {
            Err(error) => Err(format!("{error} ({setting})")),
            Ok(Some(path)) => {
                config(&path).map(|config| (format!("{hub}, in the cache of this machine: {}", sizes(&config)), config))
            }
            Ok(None) if offline => {
                let text = format!("{hub} is not a folder here, and the hub is not asked (--offline)");
                return (Item::skipped(item, text), None);
            }
            Ok(None) => on_hub(hub, setting, timeout),
        },
    };
    let fits = |(text, config): (String, BlipConfig)| match config.is(architecture) {
        Ok(()) => Ok((text, config)),
        Err(error) => Err(format!("{text}: {error} ({setting})")),
    };
    match found.and_then(fits) {
        Ok((text, config)) => (Item::ok(item, text), Some(config)),
        Err(why) => (Item::failed(item, why), None),
    }
}

fn directory(path: &Path) -> Found {
    let place = path.display();
    let config = config(&path.join("config.json"))?;
    let has = |names: &[&'static str]| names.iter().copied().find(|name| path.join(name).is_file());
    let weights = has(&WEIGHTS).ok_or(format!("{place} has no weights: one of {} is needed", WEIGHTS.join(", ")))?;
    has(&TOKENIZERS).ok_or(format!("{place} has no tokenizer: one of {} is needed", TOKENIZERS.join(", ")))?;
    let size = path.join(weights).metadata().map_or(0, |metadata| metadata.len());
    Ok((format!("{place}: {}, {weights} ({})", sizes(&config), ByteSize::b(size)), config))
}

fn config(path: &Path) -> Result<BlipConfig, String> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let mut json = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| named(&error))?;
    file.take(MAX_CONFIG).read_to_end(&mut json).map_err(|error| named(&error))?;
    BlipConfig::from_json(&json).map_err(|error| format!("{} ({})", error, path.display()))
}

fn sizes(config: &BlipConfig) -> String {
    format!("{} parameters, images of {} px", HumanCount(config.parameters()), config.vision.image_size)
}

/// Fetches config.json on a thread of its own, since the client knows no time limit.
fn on_hub(hub: HubSource, setting: &str, timeout: Duration) -> Found {
    let name = hub.to_string();
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let _ = sender.send(hub.fetch_config());
    });
    let fetched = receiver.recv_timeout(timeout).map_err(|_| {
        let time = humantime::format_duration(timeout);
        format!("{name}: the hub has not answered for {time}; a local folder as {setting} needs no hub")
    })?;
    let path = fetched.map_err(|error| {
        format!(
            "{error}. Check {setting}, and for a private model model.hub_token_file or HF_TOKEN; a local folder \
             needs no hub"
        )
    })?;
    let config = config(&path)?;
    let text = format!("{name}, on the hub: {}; the worker fetches the weights when it starts", sizes(&config));
    Ok((text, config))
}

/// Says where the model would run.
pub fn devices(model: &Model) -> Item {
    let devices = match models::devices(model) {
        Ok(devices) => devices,
        Err(error) => return Item::failed("devices", format!("{error:#}")),
    };
    let gpus = cfg!(feature = "cuda");
    if let Some(gpu) = devices.iter().find(|device| !gpus && matches!(device, DeviceSpec::Cuda(_))) {
        return Item::failed(
            "devices",
            format!(
                "{gpu} is in model.devices, but this build has no GPU support: build with `--features cuda`, or \
                 choose cpu"
            ),
        );
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let word = |device: &DeviceSpec| match device {
        DeviceSpec::Auto if gpus => format!("the CPU ({cores} cores; no GPU was found)"),
        DeviceSpec::Auto => format!("the CPU ({cores} cores; this build has no GPU support)"),
        DeviceSpec::Cpu => format!("the CPU ({cores} cores)"),
        DeviceSpec::Cuda(number) => format!("GPU {number}"),
    };
    Item::ok("devices", devices.iter().map(word).collect::<Vec<_>>().join(", "))
}

/// Loads the models and finds the batch size, as a worker does when it starts.
pub fn load(settings: &Settings) -> Item {
    let begun = Instant::now();
    match models::load_for_stream(settings) {
        Err(error) => Item::failed("load", format!("{error:#}")),
        Ok(loaded) => {
            let info = &loaded.info;
            let batches: Vec<_> = loaded
                .engines
                .iter()
                .map(|loaded| format!("{} takes {} images at once", loaded.engine.model().device, loaded.batch_size))
                .collect();
            let seconds = begun.elapsed().as_secs_f64();
            let text =
                format!("{} in {} on {}, in {seconds:.1} s; {}", info.id, info.dtype, info.backend, batches.join(", "));
            Item::ok("load", text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn offline(source: &str) -> Item {
        let architecture = Architecture::Captioner;
        let wanted = Wanted { item: "model", source, setting: "model.source", architecture };
        super::source(wanted, &Model::default(), true, Duration::from_secs(1)).0
    }

    #[test]
    fn a_missing_folder_is_not_taken_for_a_name_of_the_hub() {
        for path in ["/nowhere/at/all", "./missing", "missing", "a/b/c"] {
            let item = offline(path);
            assert_eq!(item.state, State::Failed, "{item:?}");
            assert!(item.text.contains("neither a folder"), "{item:?}");
        }
    }

    #[test]
    fn a_folder_without_its_files_names_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display().to_string();
        assert!(offline(&path).text.contains("config.json"), "{:?}", offline(&path));
        std::fs::write(folder.path().join("config.json"), "{\"text_config\": 7}").unwrap();
        assert_eq!(offline(&path).state, State::Failed);
    }

    #[test]
    fn a_gpu_is_refused_by_a_build_without_gpus() {
        let model = Model { devices: vec!["cuda:1".into()], ..Model::default() };
        let expected = if cfg!(feature = "cuda") { State::Ok } else { State::Failed };
        assert_eq!(devices(&model).state, expected);
        let unknown = Model { devices: vec!["gpu".into()], ..Model::default() };
        assert_eq!(devices(&unknown).state, State::Failed);
    }
}
