//! The models of a running flow, and their exchange for others: no row is lost by it, and none waits for the loading.

use std::sync::{Arc, Mutex, PoisonError, RwLock, TryLockError};

use serde::{Deserialize, Serialize};

use crate::caption::ModelInfo;
use crate::metrics::Metrics;
use crate::stage;
use crate::stage::Answers;
use crate::stage::infer::{DeviceStats, Mailbox, Replacement};

/// The models of a flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Named {
    /// The captioner.
    pub caption: ModelInfo,
    /// The judge of texts, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<ModelInfo>,
    /// What answers questions, if there is such a model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vqa: Option<ModelInfo>,
    /// The captioner on trial, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<ModelInfo>,
}

/// Models to be exchanged, as `model.source`, `filter.source`, `answerer.source` and `canary.source` name them; what is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Wanted {
    /// The captioner.
    pub caption: Option<String>,
    /// The judge of texts.
    pub filter: Option<String>,
    /// What answers questions.
    pub vqa: Option<String>,
    /// The captioner on trial.
    pub canary: Option<String>,
}

/// Loads models for devices that run.
pub trait Load: Send + Sync {
    /// A replacement for each of the devices at these places of the flow, in their order. It may take minutes.
    ///
    /// # Errors
    /// A model cannot be loaded, or does not fit what runs: the message says why. Nothing has changed then.
    fn load(&self, wanted: &Wanted, devices: &[usize]) -> anyhow::Result<Vec<Replacement>>;
}

/// Why nothing was exchanged.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Another exchange is not finished.
    #[error("another exchange of models is under way: try again when it is done")]
    UnderWay,
    /// The models are being loaded for the first time, or this flow has no way to load any.
    #[error("{0}")]
    NotNow(&'static str),
    /// The order itself is wrong.
    #[error("{0}")]
    Order(String),
    /// A model was not loaded, or failed.
    #[error("{0:#}")]
    Load(anyhow::Error),
}

/// The models of a flow, for its handle.
pub struct Models {
    now: RwLock<Named>,
    devices: Vec<(Arc<DeviceStats>, Arc<Mailbox>)>,
    load: Option<Arc<dyn Load>>,
    answers: Arc<Answers>,
    /// Held while models are exchanged.
    exchanging: Mutex<()>,
    metrics: Arc<Metrics>,
}

impl Models {
    pub(super) fn new(
        now: Named,
        devices: Vec<(Arc<DeviceStats>, Arc<Mailbox>)>,
        load: Option<Arc<dyn Load>>,
        answers: Arc<Answers>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { now: RwLock::new(now), devices, load, answers, exchanging: Mutex::default(), metrics }
    }

    /// The models that the next batch of every device is worked on with.
    pub fn now(&self) -> Named {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Loads other models beside those that run, and gives them to every device that is sound. Each takes them between two
    /// batches: what it works on is finished with the old ones, and every batch that begins after this has returned with the
    /// new ones. The old ones are freed then.
    ///
    /// Blocks while models are loaded.
    ///
    /// # Errors
    /// Nothing was exchanged, and everything goes on as before; the message says why.
    pub fn exchange(&self, wanted: &Wanted) -> Result<Named, Refused> {
        let result = self.try_exchange(wanted);
        self.metrics.models_exchanged(result.is_ok());
        match &result {
            Ok(now) => {
                let id = |model: &Option<ModelInfo>| model.as_ref().map(|model| model.id.clone());
                let (filter, vqa, canary) = (id(&now.filter), id(&now.vqa), id(&now.canary));
                let (caption, revision) = (&now.caption.id, &now.caption.revision);
                tracing::info!(caption, revision, filter, vqa, canary, "models exchanged");
            }
            Err(error) => tracing::warn!("no models were exchanged: {error}"),
        }
        result
    }

    fn try_exchange(&self, wanted: &Wanted) -> Result<Named, Refused> {
        let Some(load) = &self.load else { return Err(Refused::NotNow("the models of this flow are fixed")) };
        if *wanted == Wanted::default() {
            return Err(Refused::Order(
                "no model is named: {\"caption\": \"…\"}, with filter, vqa and canary the others".into(),
            ));
        }
        let now = self.now();
        for (name, setting, missing) in [
            ("filter", "filter.source", wanted.filter.is_some() && now.filter.is_none()),
            ("vqa", "answerer.source", wanted.vqa.is_some() && now.vqa.is_none()),
            ("canary", "canary.source", wanted.canary.is_some() && now.canary.is_none()),
        ] {
            if missing {
                let text = format!("{name}: this worker was started without one; set {setting} and start it anew");
                return Err(Refused::Order(text));
            }
        }
        let _alone = match self.exchanging.try_lock() {
            Ok(alone) => alone,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(Refused::UnderWay),
        };
        let sound: Vec<usize> = (0..self.devices.len()).filter(|at| self.devices[*at].0.is_sound()).collect();
        let new = load.load(wanted, &sound).map_err(Refused::Load)?;
        let Some(first) = new.first().filter(|_| new.len() == sound.len()) else {
            return Err(Refused::NotNow("no device is left"));
        };
        let mut now = self.now();
        for (name, engine) in [("caption", &first.engine), ("canary", &first.canary)] {
            let (has, needs) = (engine.as_ref().map(|engine| engine.model().image_size), now.caption.image_size);
            if let Some(has) = has.filter(|has| *has != needs) {
                let text = format!("{name}: the model takes images of side {has}, and what is under way has {needs}");
                return Err(Refused::Order(text));
            }
        }
        if let Some(engine) = &first.engine {
            now.caption = engine.model().clone();
        }
        if let Some(canary) = &first.canary {
            now.canary = Some(canary.model().clone());
        }
        if let Some(filter) = &first.filter {
            now.filter = Some(filter.model().clone());
        }
        if let Some(answerer) = &first.answerer {
            now.vqa = Some(answerer.model().clone());
        }
        self.answers.come_from(stage::Models::of(&now.caption, now.filter.as_ref(), now.vqa.as_ref()));
        for (at, replacement) in sound.into_iter().zip(new) {
            self.devices[at].1.put(replacement);
        }
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = now.clone();
        Ok(now)
    }
}
