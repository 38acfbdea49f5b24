//! Other models for a flow that runs (`POST /admin/models`).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;

use super::{check_pixels, options, source, try_captioner};
use crate::caption::config::Architecture;
use crate::caption::preprocess::Preprocessor;
use crate::caption::{
    Answerer, BlipEngine, DeviceSpec, Encoders, Engine, Filter, LoadError, LoadOptions, Matcher, Model, NoCaptioner,
    Respondent, probe, tell,
};
use crate::pipeline::{Load, Wanted};
use crate::settings;
use crate::stage::infer::Replacement;

/// Loads models in the way in which those at the start were loaded.
pub(super) struct Reload {
    pub(super) model: settings::Model,
    /// The device of each engine of the flow.
    pub(super) devices: Vec<DeviceSpec>,
    /// What makes the pixels of the flow.
    pub(super) preprocessor: Preprocessor,
    /// Those in use, and those to come.
    pub(super) encoders: Mutex<Encoders>,
}

/// What was loaded for a device.
#[derive(Clone)]
struct New {
    captioner: Option<Arc<Model>>,
    filter: Option<Arc<Matcher>>,
    answerer: Option<Arc<Answerer>>,
    canary: Option<Arc<Model>>,
}

impl Load for Reload {
    fn load(&self, wanted: &Wanted, engines: &[usize]) -> anyhow::Result<Vec<Replacement>> {
        let mut loaded: HashMap<DeviceSpec, New> = HashMap::new();
        for device in engines.iter().map(|at| self.devices[*at]) {
            if let Entry::Vacant(place) = loaded.entry(device) {
                place.insert(self.load_on(device, wanted)?);
            }
        }
        Ok(engines.iter().map(|at| loaded[&self.devices[*at]].replacement()).collect())
    }
}

impl Reload {
    fn load_on(&self, device: DeviceSpec, wanted: &Wanted) -> anyhow::Result<New> {
        let mut encoders = self.encoders.lock().unwrap_or_else(PoisonError::into_inner);
        let (caption, filter, vqa) = (wanted.caption.as_ref(), wanted.filter.as_ref(), wanted.vqa.as_ref());
        let canary = wanted.canary.as_ref();
        let of = |architecture| (device, architecture);
        let new = New {
            captioner: self.one("caption", caption, of(Architecture::Captioner), Model::preprocessor, |options| {
                encoders.load_model(options)
            })?,
            filter: self.one("filter", filter, of(Architecture::Matcher), Matcher::preprocessor, |options| {
                encoders.load_matcher(options)
            })?,
            answerer: self.one("vqa", vqa, of(Architecture::Answerer), Answerer::preprocessor, |options| {
                encoders.load_answerer(options)
            })?,
            canary: self.one("canary", canary, of(Architecture::Captioner), Model::preprocessor, |options| {
                encoders.load_model(options)
            })?,
        };
        let works = new.work_on_a_picture(self.preprocessor.size());
        works.with_context(|| format!("a new model failed on a grey picture on {device}"))?;
        Ok(new)
    }

    /// Loads the model that an order names for a task, if it names one. The pixels of images under way are made already, and
    /// those to come are made in the same way, so that it has to take these.
    fn one<T>(
        &self,
        task: &str,
        name: Option<&String>,
        (device, architecture): (DeviceSpec, Architecture),
        preprocessor: fn(&T) -> &Preprocessor,
        load: impl FnOnce(&LoadOptions) -> Result<Arc<T>, LoadError>,
    ) -> anyhow::Result<Option<Arc<T>>> {
        let Some(name) = name else { return Ok(None) };
        let options = LoadOptions { device, ..options(source(name, architecture, &self.model)?, &self.model)? };
        let new = load(&options).with_context(|| format!("{task}: cannot load {name}"))?;
        check_pixels(preprocessor(&new), &self.preprocessor, task, &options.source)
            .context("a worker with it has to be started anew")?;
        Ok(Some(new))
    }
}

impl New {
    /// For one engine of the device.
    fn replacement(&self) -> Replacement {
        let Self { captioner, filter, answerer, canary } = self.clone();
        let engine = |model| Box::new(BlipEngine::new(model)) as Box<dyn Engine>;
        Replacement {
            engine: captioner.map(engine),
            canary: canary.map(engine),
            filter: filter.map(|filter| Box::new(filter) as Box<dyn Filter>),
            answerer: answerer.map(|answerer| Box::new(answerer) as Box<dyn Respondent>),
        }
    }

    /// Before anything is exchanged: a model that cannot do this would take its device out of the flow.
    fn work_on_a_picture(&self, size: usize) -> anyhow::Result<()> {
        let Self { captioner, mut filter, mut answerer, canary } = self.clone();
        if let Some(canary) = canary {
            try_captioner(&canary).context("canary")?;
        }
        let items = probe(size, captioner.is_some(), filter.is_some(), answerer.is_some())?;
        let beside = filter.as_ref().map(|filter| filter.info()).or(answerer.as_ref().map(|answerer| answerer.info()));
        let mut engine: Box<dyn Engine> = match (captioner, beside) {
            (Some(model), _) => Box::new(BlipEngine::new(model)),
            (None, Some(info)) => Box::new(NoCaptioner::new(info.clone())),
            (None, None) => return Ok(()),
        };
        let filter = filter.as_mut().map(|filter| filter as &mut dyn Filter);
        let answerer = answerer.as_mut().map(|answerer| answerer as &mut dyn Respondent);
        let told = tell(engine.as_mut(), filter, answerer, &items)?;
        Ok(told.into_iter().try_for_each(|told| told.map(drop))?)
    }
}
