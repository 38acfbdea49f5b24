//! Other models for a flow that runs (`POST /admin/models`).

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, ensure};

use super::{options, source};
use crate::caption::config::Architecture;
use crate::caption::preprocess::Preprocessor;
use crate::caption::{
    Answerer, Ask, BlipEngine, DeviceSpec, Encoders, Engine, Filter, LoadOptions, Matcher, Model, NoCaptioner, Params,
    Respondent, pictures, tell,
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
}

impl Load for Reload {
    fn load(&self, wanted: &Wanted, engines: &[usize]) -> anyhow::Result<Vec<Replacement>> {
        let mut loaded: Vec<(DeviceSpec, New)> = Vec::new();
        let mut all = Vec::with_capacity(engines.len());
        for device in engines.iter().map(|at| self.devices[*at]) {
            let known = loaded.iter().find(|(other, _)| *other == device).map(|(_, new)| new.clone());
            let new = if let Some(new) = known {
                new
            } else {
                let new = self.load_on(device, wanted)?;
                loaded.push((device, new.clone()));
                new
            };
            all.push(Replacement {
                engine: new.captioner.map(|model| Box::new(BlipEngine::new(model)) as Box<dyn Engine>),
                filter: new.filter.map(|filter| Box::new(filter) as Box<dyn Filter>),
                answerer: new.answerer.map(|answerer| Box::new(answerer) as Box<dyn Respondent>),
            });
        }
        Ok(all)
    }
}

impl Reload {
    fn load_on(&self, device: DeviceSpec, wanted: &Wanted) -> anyhow::Result<New> {
        let mut encoders = self.encoders.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |name: &String, architecture| -> anyhow::Result<LoadOptions> {
            Ok(LoadOptions { device, ..options(source(name, architecture, &self.model)?, &self.model)? })
        };
        let captioner = wanted.caption.as_ref().map(|name| {
            let model = encoders.load_model(&of(name, Architecture::Captioner)?);
            let model = model.with_context(|| format!("caption: cannot load {name}"))?;
            self.makes_the_same_pixels("caption", model.preprocessor())?;
            anyhow::Ok(model)
        });
        let captioner = captioner.transpose()?;
        let filter = wanted.filter.as_ref().map(|name| {
            let filter = encoders.load_matcher(&of(name, Architecture::Matcher)?);
            let filter = filter.with_context(|| format!("filter: cannot load {name}"))?;
            self.makes_the_same_pixels("filter", filter.preprocessor())?;
            anyhow::Ok(filter)
        });
        let answerer = wanted.vqa.as_ref().map(|name| {
            let answerer = encoders.load_answerer(&of(name, Architecture::Answerer)?);
            let answerer = answerer.with_context(|| format!("vqa: cannot load {name}"))?;
            self.makes_the_same_pixels("vqa", answerer.preprocessor())?;
            anyhow::Ok(answerer)
        });
        let new = New { captioner, filter: filter.transpose()?, answerer: answerer.transpose()? };
        new.work_on_a_picture(self.preprocessor.size())
            .with_context(|| format!("a new model failed on a grey picture on {device}"))?;
        Ok(new)
    }

    /// The pixels of images under way are made already, and those to come are made in the same way.
    fn makes_the_same_pixels(&self, what: &str, new: &Preprocessor) -> anyhow::Result<()> {
        let now = &self.preprocessor;
        ensure!(
            new == now,
            "{what}: the model makes its pixels in another way ({new:?}) than the one that runs ({now:?}); a worker with it \
             has to be started anew"
        );
        Ok(())
    }
}

impl New {
    /// Before anything is exchanged: a model that cannot do this would take its device out of the flow.
    fn work_on_a_picture(&self, size: usize) -> anyhow::Result<()> {
        let picture = pictures::grey(size)?;
        if let Some(model) = &self.captioner {
            let ask = Ask::caption(Params { max_new_tokens: 1, ..Params::default() });
            tell(&mut BlipEngine::new(model.clone()), None, None, &[(picture.clone(), ask)])?.remove(0)?;
        }
        if let Some(filter) = &self.filter {
            let ask = Ask { texts: vec!["a picture".into()], filter: true, ..Ask::default() };
            let mut nobody = NoCaptioner::new(filter.info().clone());
            tell(&mut nobody, Some(&mut filter.clone()), None, &[(picture.clone(), ask)])?.remove(0)?;
        }
        if let Some(answerer) = &self.answerer {
            let ask = Ask { questions: vec!["what is it?".into()], ..Ask::default() };
            let mut nobody = NoCaptioner::new(answerer.info().clone());
            tell(&mut nobody, None, Some(&mut answerer.clone()), &[(picture, ask)])?.remove(0)?;
        }
        Ok(())
    }
}
