//! From the configuration to loaded engines.

mod reload;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;

use self::reload::Reload;
use super::{Usage, assets};
use crate::caption;
use crate::caption::config::Architecture;
use crate::caption::preprocess::Preprocessor;
use crate::caption::{
    Answerer, BlipEngine, DeviceSpec, Encoders, Engine, ErrorKind, HubSource, LoadError, LoadOptions, Matcher,
    ModelInfo, ModelSource, NoCaptioner, Viewer, load_answerer, load_matcher, load_model, probe, tell,
};
use crate::pipeline::{Load, Loaded, Parts};
use crate::settings::{Batch, Model, Settings};
use crate::stage::infer::{Measured, WarmUp, most_rows, warm_up};

/// Time for finding the best batch size of a device.
const WARM_UP_BUDGET: Duration = Duration::from_secs(8);
/// Tokens a warm-up caption has: enough that the decoder's share shows.
const WARM_UP_TOKENS: usize = 8;
/// Largest batch tried on a CPU, and on a GPU.
const MAX_BATCH: (usize, usize) = (32, 256);

/// Where a configured model comes from.
pub fn source(name: &str, architecture: Architecture, model: &Model) -> anyhow::Result<ModelSource> {
    if name == assets::DEMO_MODEL {
        return Ok(assets::model(architecture));
    }
    let mut source: ModelSource = name.parse().unwrap_or_else(|never| match never {});
    if let ModelSource::Hub(hub) = &mut source {
        configure(hub, model)?;
    }
    Ok(source)
}

fn configure(hub: &mut HubSource, model: &Model) -> anyhow::Result<()> {
    if let Some(endpoint) = &model.hub_endpoint {
        hub.endpoint = Some(endpoint.clone());
    }
    if let Some(file) = &model.hub_token_file {
        let token = std::fs::read_to_string(file)
            .with_context(|| format!("model.hub_token_file: {} cannot be read", file.display()))?;
        hub.token = Some(token.trim().to_owned());
    }
    Ok(())
}

/// The devices of the configuration: `auto` is every GPU, or the CPU where there is none, and `all` is every GPU.
pub fn devices(model: &Model) -> anyhow::Result<Vec<DeviceSpec>> {
    choose(&model.devices, DeviceSpec::gpus)
}

fn choose(
    names: &[String],
    gpus: impl FnOnce() -> Result<Vec<DeviceSpec>, LoadError>,
) -> anyhow::Result<Vec<DeviceSpec>> {
    let wrong = |text: String| anyhow::Error::from(Usage(format!("model.devices: {text}")));
    match names {
        [] => Ok(vec![DeviceSpec::Auto]),
        [name] if name == "auto" => {
            // Without a GPU the loading says what became of `auto`, and why.
            let gpus = gpus().unwrap_or_default();
            Ok(if gpus.is_empty() { vec![DeviceSpec::Auto] } else { gpus })
        }
        [name] if name == "all" => match gpus() {
            Ok(gpus) if gpus.is_empty() => Err(wrong("all is every GPU, and this machine has none; write cpu".into())),
            Ok(gpus) => Ok(gpus),
            Err(error) => Err(wrong(format!("all is every GPU, and {error}; or write cpu"))),
        },
        names if names.iter().any(|name| name == "auto" || name == "all") => {
            Err(wrong("auto and all stand alone, since they take every GPU".into()))
        }
        names => names.iter().map(|name| name.parse().map_err(|error: LoadError| wrong(error.to_string()))).collect(),
    }
}

/// A loaded model: engines for every device, and what goes before them.
pub struct LoadedModel {
    /// What is known of it.
    pub info: ModelInfo,
    /// The engines.
    pub engines: Vec<Loaded>,
    /// The model's preprocessing.
    pub preprocessor: Preprocessor,
    /// What loads others in their places.
    pub load: Option<Arc<dyn Load>>,
}

/// How the models beside the captioner are loaded, of those that there are.
#[derive(Clone, Default)]
struct Beside {
    filter: Option<LoadOptions>,
    answerer: Option<LoadOptions>,
    canary: Option<LoadOptions>,
}

/// Loads the configured models once for each device, with their replicas, and finds the best batch sizes. Of the devices
/// that `auto` and `all` found, those that do not take the models are left out, as long as one does.
///
/// The canary is not loaded: only a stream has images for it, see [`load_for_stream`].
pub fn load(settings: &Settings) -> anyhow::Result<LoadedModel> {
    if settings.canary.source.is_some() {
        tracing::info!("canary.source is for a stream; here no canary is loaded");
    }
    load_all(settings, None)
}

/// The same with the canary, where one is configured.
pub fn load_for_stream(settings: &Settings) -> anyhow::Result<LoadedModel> {
    load_all(settings, settings.canary.source.as_ref())
}

fn load_all(settings: &Settings, canary: Option<&String>) -> anyhow::Result<LoadedModel> {
    let model = &settings.model;
    let source = source(&model.source, Architecture::Captioner, model)?;
    let beside = |name: Option<&String>, architecture| {
        name.map(|name| anyhow::Ok(options(self::source(name, architecture, model)?, model)?)).transpose()
    };
    let beside = Beside {
        filter: beside(settings.filter.source.as_ref(), Architecture::Matcher)?,
        answerer: beside(settings.answerer.source.as_ref(), Architecture::Answerer)?,
        canary: beside(canary, Architecture::Captioner)?,
    };
    let common = options(source, model)?;
    let devices = devices(model)?;
    // What `auto` and `all` found is more than what was written, or it is the only one.
    let named = devices.len() == model.devices.len();
    let (mut all, mut failed) = (None::<LoadedModel>, None);
    let (mut encoders, mut of_engines) = (Encoders::default(), Vec::new());
    for device in devices {
        let options = LoadOptions { device, ..common.clone() };
        match load_on_device(&options, beside.on(device), settings, &mut encoders) {
            Ok(loaded) => {
                of_engines.extend(loaded.engines.iter().map(|_| device));
                match &mut all {
                    Some(all) => all.engines.extend(loaded.engines),
                    None => all = Some(loaded),
                }
            }
            Err(error) if named || !is_of_device(&error) => return Err(error),
            Err(error) => {
                tracing::warn!(%device, error = format!("{error:#}"), "the device is left out");
                failed = Some(error);
            }
        }
    }
    let mut all = all.ok_or_else(|| failed.unwrap_or_else(|| anyhow::anyhow!("model.devices names no device")))?;
    let (model, preprocessor) = (model.clone(), all.preprocessor.clone());
    let encoders = Mutex::new(encoders);
    all.load = Some(Arc::new(Reload { model, devices: of_engines, preprocessor, encoders }));
    Ok(all)
}

impl Beside {
    fn on(&self, device: DeviceSpec) -> Self {
        let on = |options: &Option<LoadOptions>| options.clone().map(|options| LoadOptions { device, ..options });
        Self { filter: on(&self.filter), answerer: on(&self.answerer), canary: on(&self.canary) }
    }
}

/// How a model is loaded, but for its device.
fn options(source: ModelSource, model: &Model) -> Result<LoadOptions, Usage> {
    Ok(LoadOptions {
        dtype: model.dtype.parse().map_err(|error| Usage(format!("model.dtype: {error}")))?,
        backend: model.backend.parse().map_err(|error| Usage(format!("model.backend: {error}")))?,
        onednn_library: model.onednn_library.clone(),
        ..LoadOptions::new(source)
    })
}

/// The published model that was trained to match.
const PUBLISHED_FILTER: &str = "Salesforce/blip-itm-base-coco";

/// The name of the filter for a command that needs one: the one that was asked for, that of the configuration, or the published
/// one.
pub fn filter_name(asked: Option<String>, settings: &Settings) -> String {
    asked.or_else(|| settings.filter.source.clone()).unwrap_or_else(|| PUBLISHED_FILTER.into())
}

/// Loads the filter, without a captioner, on the first of the configured devices.
pub fn load_filter_alone(settings: &Settings) -> anyhow::Result<LoadedModel> {
    let name = settings.filter.source.as_deref().context("filter.source names no model")?;
    let filter = load_alone(name, Architecture::Matcher, settings, load_matcher)?;
    let (info, preprocessor) = (filter.info().clone(), filter.preprocessor().clone());
    Ok(alone(info, preprocessor, |loaded| loaded.filter = Some(Box::new(filter))))
}

/// Loads the model that answers questions, without a captioner, on the first of the configured devices.
pub fn load_answerer_alone(settings: &Settings) -> anyhow::Result<LoadedModel> {
    let name = settings.answerer.source.as_deref().context("answerer.source names no model")?;
    let answerer = load_alone(name, Architecture::Answerer, settings, load_answerer)?;
    let (info, preprocessor) = (answerer.info().clone(), answerer.preprocessor().clone());
    Ok(alone(info, preprocessor, |loaded| loaded.answerer = Some(Box::new(answerer))))
}

fn load_alone<T>(
    name: &str,
    architecture: Architecture,
    settings: &Settings,
    load: impl FnOnce(&LoadOptions) -> Result<T, LoadError>,
) -> anyhow::Result<T> {
    let model = &settings.model;
    let device = devices(model)?.into_iter().next().unwrap_or(DeviceSpec::Auto);
    let options = LoadOptions { device, ..options(source(name, architecture, model)?, model)? };
    load(&options).with_context(|| format!("cannot load the model {name}"))
}

/// A model in the place beside a captioner, and none in the captioner's.
fn alone(info: ModelInfo, preprocessor: Preprocessor, put: impl FnOnce(&mut Loaded)) -> LoadedModel {
    let engine = Box::new(NoCaptioner::new(info.clone()));
    let mut loaded = Loaded { engine, filter: None, answerer: None, canary: None, batch_size: 1, replica: None };
    put(&mut loaded);
    LoadedModel { info, engines: vec![loaded], preprocessor, load: None }
}

/// Whether another device may fare better.
fn is_of_device(error: &anyhow::Error) -> bool {
    use LoadError::{Hub, Invalid, MissingFile, Unreadable};
    let of_model = |error| matches!(error, &(MissingFile { .. } | Unreadable { .. } | Invalid { .. } | Hub { .. }));
    !error.downcast_ref::<LoadError>().is_some_and(of_model)
}

fn load_on_device(
    options: &LoadOptions,
    beside: Beside,
    settings: &Settings,
    encoders: &mut Encoders,
) -> anyhow::Result<LoadedModel> {
    let (model, batch) = (&settings.model, &settings.batch);
    let cannot = || format!("cannot load the model {} (model.source)", model.source);
    let Beside { filter, answerer, canary } = beside;
    // Where it is alone, nobody looks whether its image encoder is another's.
    let alone = filter.is_none() && answerer.is_none() && canary.is_none();
    let loaded = if alone { load_model(options) } else { encoders.load_model(options) }.with_context(cannot)?;
    let pixels = loaded.preprocessor();
    let filter = filter.map(|options| {
        let load = |options: &LoadOptions| encoders.load_matcher(options);
        load_beside(&options, "filter.source", pixels, Matcher::preprocessor, load)
    });
    let filter = filter.transpose()?;
    let answerer = answerer.map(|options| {
        let load = |options: &LoadOptions| encoders.load_answerer(options);
        load_beside(&options, "answerer.source", pixels, Answerer::preprocessor, load)
    });
    let answerer = answerer.transpose()?;
    let canary = canary.map(|options| {
        let load = |options: &LoadOptions| encoders.load_model(options);
        let canary = load_beside(&options, "canary.source", pixels, caption::Model::preprocessor, load)?;
        try_captioner(&canary).with_context(|| format!("the model {} (canary.source)", options.source))?;
        anyhow::Ok(canary)
    });
    let canary = canary.transpose()?;
    let of_others =
        [("filter", filter.as_ref().map(Viewer::encoder)), ("answerer", answerer.as_ref().map(Viewer::encoder))];
    for (name, other) in of_others {
        let Some(other) = other else { continue };
        let encoders = if other == loaded.encoder() {
            "the same image encoder: an image is encoded once for both"
        } else {
            "different image encoders: an image is encoded for each"
        };
        tracing::info!(device = loaded.info().device, "captioner and {name} have {encoders}");
    }
    let mut size = batch.max_size;
    let mut engines = Vec::new();
    for replica in 0..model.replicas.max(1) {
        let mut engine: Box<dyn Engine> = Box::new(BlipEngine::new(loaded.clone()));
        let most = most_rows(engine.as_ref(), model);
        if size == 0 {
            size = best_batch_size(engine.as_mut(), most, model, batch)?;
        } else if size > most {
            let device = &engine.model().device;
            tracing::warn!(device, size, most, "batch.max_size is cut to what fits into model.max_state");
            size = most;
        }
        let replica = (model.replicas > 1).then_some(replica);
        let filter = filter.clone().map(|filter| Box::new(filter) as _);
        let answerer = answerer.clone().map(|answerer| Box::new(answerer) as _);
        let canary = canary.clone().map(|model| Box::new(BlipEngine::new(model)) as _);
        engines.push(Loaded { engine, filter, answerer, canary, batch_size: size, replica });
    }
    let (info, preprocessor) = (loaded.info().clone(), loaded.preprocessor().clone());
    Ok(LoadedModel { info, preprocessor, engines, load: None })
}

/// Loads a model that looks at the pixels that were made for the captioner.
fn load_beside<T>(
    options: &LoadOptions,
    setting: &str,
    captioner: &Preprocessor,
    own: fn(&T) -> &Preprocessor,
    load: impl FnOnce(&LoadOptions) -> Result<Arc<T>, LoadError>,
) -> anyhow::Result<Arc<T>> {
    let model = load(options).with_context(|| format!("cannot load the model {} ({setting})", options.source))?;
    check_pixels(own(&model), captioner, setting, &options.source)?;
    Ok(model)
}

/// Has a captioner write a word about a grey picture.
fn try_captioner(model: &Arc<caption::Model>) -> anyhow::Result<()> {
    let told = probe(model.preprocessor().size(), true, false, false)
        .and_then(|items| tell(&mut BlipEngine::new(model.clone()), None, None, &items))
        .and_then(|told| told.into_iter().try_for_each(|told| told.map(drop)));
    told.with_context(|| format!("it failed on a grey picture on {}", model.info().device))
}

fn check_pixels(
    own: &Preprocessor,
    captioner: &Preprocessor,
    setting: &str,
    source: &ModelSource,
) -> Result<(), LoadError> {
    if own == captioner {
        return Ok(());
    }
    // No other device would fare better.
    let reason = format!(
        "makes its pixels in another way than the captioner: {own:?}, and {captioner:?}. Both must take the same, as the \
         published models of one size do"
    );
    Err(LoadError::Invalid { file: format!("{setting}: {source}"), reason })
}

/// Finds the batch size of a device. An image waits for the batch under way, for `batch.linger`, and for its own batch: each
/// batch may take half of what `batch.latency_goal` leaves for both.
fn best_batch_size(engine: &mut dyn Engine, most: usize, model: &Model, batch: &Batch) -> anyhow::Result<usize> {
    let max = if engine.model().device == "cpu" { MAX_BATCH.0 } else { MAX_BATCH.1 };
    let within = (!batch.latency_goal.is_zero()).then(|| batch.latency_goal.saturating_sub(batch.linger) / 2);
    // Where time counts, captions are as long as they may be.
    let tokens = if within.is_some() { model.max_new_tokens } else { WARM_UP_TOKENS };
    let plan = WarmUp { max: max.min(most), tokens, within, budget: WARM_UP_BUDGET };
    let Measured { size, time } = warm_up(engine, plan).map_err(|error| {
        let advice = if error.kind() == ErrorKind::OutOfMemory {
            ": beside the model there is no room for a single image. End what else runs on the device, or choose a narrower \
             precision (model.dtype) or another device (model.devices)"
        } else {
            ""
        };
        let device = engine.model().device.clone();
        anyhow::Error::from(error).context(format!("the model failed on a grey picture on {device}{advice}"))
    })?;
    let (device, ms) = (&engine.model().device, time.as_millis() as u64);
    tracing::info!(device, size, ms, "best batch size found at warm-up (batch.max_size sets it)");
    if within.is_some_and(|within| time > within) {
        tracing::warn!(device, size, ms, "even a batch of one takes more than its part of batch.latency_goal");
    }
    Ok(size)
}

/// What a flow is made of, from the configuration and a loaded model.
pub fn parts(settings: &Settings, model: LoadedModel) -> anyhow::Result<Parts> {
    Ok(Parts {
        engines: model.engines,
        preprocessor: model.preprocessor,
        flag_terms: flag_terms(settings)?,
        worker: settings.output.worker.clone().unwrap_or_else(worker_name),
        load: model.load,
    })
}

/// Host name and process id: unique among the workers of a fleet, and tells a person where to look.
pub fn worker_name() -> String {
    format!("{}-{}", gethostname::gethostname().to_string_lossy(), std::process::id())
}

fn flag_terms(settings: &Settings) -> anyhow::Result<Vec<String>> {
    let Some(file) = &settings.output.flag_terms_file else { return Ok(Vec::new()) };
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("output.flag_terms_file: {} cannot be read", file.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    Ok(lines.map(str::to_lowercase).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::fake::{FakeEngine, FakeOptions};

    fn chosen(names: &[&str], gpus: Result<usize, &str>) -> Result<String, String> {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        let gpus = || gpus.map(|count| (0..count).map(DeviceSpec::Cuda).collect());
        let chosen = choose(&names, || gpus().map_err(|error| LoadError::Device(error.into())));
        let names = |chosen: Vec<DeviceSpec>| chosen.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        chosen.map(names).map_err(|error| error.to_string())
    }

    #[test]
    fn auto_is_every_gpu_or_else_the_cpu_and_all_is_every_gpu() {
        for name in ["auto", "all"] {
            assert_eq!(chosen(&[name], Ok(3)).unwrap(), "cuda:0 cuda:1 cuda:2");
        }
        assert_eq!(chosen(&["auto"], Ok(0)).unwrap(), "auto");
        assert_eq!(chosen(&["auto"], Err("no driver")).unwrap(), "auto");
        assert!(chosen(&["all"], Ok(0)).unwrap_err().contains("this machine has none"));
        assert!(chosen(&["all"], Err("no driver")).unwrap_err().contains("no driver"));
    }

    #[test]
    fn named_devices_are_taken_as_they_are() {
        assert_eq!(chosen(&["cuda:1", "cpu"], Err("nobody asks")).unwrap(), "cuda:1 cpu");
        assert!(chosen(&["gpu"], Ok(1)).unwrap_err().contains("model.devices"));
        assert!(chosen(&["auto", "cuda:0"], Ok(1)).unwrap_err().contains("stand alone"));
    }

    #[test]
    fn a_device_without_room_for_one_image_is_refused_with_what_to_do() {
        let refused = |options: FakeOptions| {
            let mut engine = FakeEngine::new(options);
            let (model, batch) = (Model::default(), Batch::default());
            format!("{:#}", best_batch_size(&mut engine, 8, &model, &batch).unwrap_err())
        };
        let message = refused(FakeOptions { memory_for: 0, ..FakeOptions::default() });
        assert!(message.contains("single image") && message.contains("model.dtype"), "{message}");
        let message = refused(FakeOptions { failing_calls: vec![1], ..FakeOptions::default() });
        assert!(message.contains("failed on a grey picture") && !message.contains("single image"), "{message}");
    }

    #[test]
    fn only_what_another_device_may_do_better_leaves_a_device_out() {
        let file = LoadError::MissingFile { place: "x".into(), file: "config.json".into(), hint: String::new() };
        assert!(!is_of_device(&anyhow::Error::from(file).context("cannot load the model")));
        assert!(is_of_device(&anyhow::Error::from(LoadError::Device("away".into())).context("cannot load the model")));
        assert!(is_of_device(&anyhow::anyhow!("out of memory")));
    }
}
