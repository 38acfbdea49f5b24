//! From the configuration to loaded engines.

use std::time::Duration;

use anyhow::Context;

use super::{Usage, assets};
use crate::caption::preprocess::Preprocessor;
use crate::caption::{
    Backend, BlipEngine, DeviceSpec, DtypeSpec, Engine, HubSource, LoadOptions, ModelInfo, ModelSource, load_model,
};
use crate::pipeline::{Loaded, Parts};
use crate::settings::{Batch, Model, Settings};
use crate::stage::infer::{WarmUp, most_rows, warm_up};

/// Time for finding the best batch size of a device.
const WARM_UP_BUDGET: Duration = Duration::from_secs(8);
/// Tokens a warm-up caption has: enough that the decoder's share shows.
const WARM_UP_TOKENS: usize = 8;
/// Largest batch tried on a CPU, and on a GPU.
const MAX_BATCH: (usize, usize) = (32, 256);

/// Where the configured model comes from.
pub fn source(model: &Model) -> anyhow::Result<ModelSource> {
    if model.source == assets::DEMO_MODEL {
        return Ok(assets::model());
    }
    let mut source: ModelSource = model.source.parse().unwrap_or_else(|never| match never {});
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

/// The devices of the configuration.
pub fn devices(model: &Model) -> anyhow::Result<Vec<DeviceSpec>> {
    let parse = |text: &String| text.parse().map_err(|error| Usage(format!("model.devices: {error}")).into());
    let mut devices: Vec<DeviceSpec> = model.devices.iter().map(parse).collect::<anyhow::Result<_>>()?;
    if devices.is_empty() {
        devices.push(DeviceSpec::Auto);
    }
    Ok(devices)
}

/// A loaded model: engines for every device, and what goes before them.
pub struct LoadedModel {
    /// What is known of it.
    pub info: ModelInfo,
    /// The engines.
    pub engines: Vec<Loaded>,
    /// The model's preprocessing.
    pub preprocessor: Preprocessor,
}

/// Loads the configured model once for each device, with its replicas, and finds the best batch sizes.
pub fn load(model: &Model, batch: &Batch) -> anyhow::Result<LoadedModel> {
    let source = source(model)?;
    let dtype: DtypeSpec = model.dtype.parse().map_err(|error| Usage(format!("model.dtype: {error}")))?;
    let backend: Backend = model.backend.parse().map_err(|error| Usage(format!("model.backend: {error}")))?;
    let mut engines = Vec::new();
    let mut first = None;
    for device in devices(model)? {
        let onednn_library = model.onednn_library.clone();
        let options = LoadOptions { source: source.clone(), device, dtype, backend, onednn_library };
        let loaded =
            load_model(&options).with_context(|| format!("cannot load the model {} (model.source)", model.source))?;
        let (info, preprocessor) = (loaded.info().clone(), loaded.preprocessor().clone());
        let mut size = batch.max_size;
        for replica in 0..model.replicas.max(1) {
            let mut engine: Box<dyn Engine> = Box::new(BlipEngine::new(loaded.clone()));
            let most = most_rows(engine.as_ref(), model);
            if size == 0 {
                size = best_batch_size(engine.as_mut(), most)?;
            } else if size > most {
                let device = &engine.model().device;
                tracing::warn!(device, size, most, "batch.max_size is cut to what fits into model.max_state");
                size = most;
            }
            let replica = (model.replicas > 1).then_some(replica);
            engines.push(Loaded { engine, batch_size: size, replica });
        }
        first.get_or_insert((info, preprocessor));
    }
    let (info, preprocessor) = first.context("model.devices names no device")?;
    Ok(LoadedModel { info, engines, preprocessor })
}

fn best_batch_size(engine: &mut dyn Engine, most: usize) -> anyhow::Result<usize> {
    let max = if engine.model().device == "cpu" { MAX_BATCH.0 } else { MAX_BATCH.1 };
    let plan = WarmUp { max: max.min(most), tokens: WARM_UP_TOKENS, budget: WARM_UP_BUDGET };
    let size = warm_up(engine, plan).context("the model failed on a grey picture while it was warmed up")?;
    tracing::info!(device = engine.model().device, size, "best batch size found at warm-up (batch.max_size sets it)");
    Ok(size)
}

/// What a flow is made of, from the configuration and a loaded model.
pub fn parts(settings: &Settings, model: LoadedModel) -> anyhow::Result<Parts> {
    Ok(Parts {
        engines: model.engines,
        preprocessor: model.preprocessor,
        flag_terms: flag_terms(settings)?,
        worker: settings.output.worker.clone().unwrap_or_else(worker_name),
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
