//! Other models for a running device, which takes them between two batches.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::caption::{Engine, Filter, Respondent};

/// Models of one device that take the places of those it has; what is `None` stays.
#[derive(Default)]
pub struct Replacement {
    /// The captioner.
    pub engine: Option<Box<dyn Engine>>,
    /// The judge of texts.
    pub filter: Option<Box<dyn Filter>>,
    /// What answers questions.
    pub answerer: Option<Box<dyn Respondent>>,
    /// The captioner on trial.
    pub canary: Option<Box<dyn Engine>>,
}

/// Where a device finds them.
#[derive(Default)]
pub struct Mailbox(Mutex<Replacement>);

impl Mailbox {
    /// Leaves models for the device's next batch, in the place of those that it has not taken yet.
    pub fn put(&self, new: Replacement) {
        let Replacement { engine, filter, answerer, canary } = new;
        let mut waiting = self.lock();
        if engine.is_some() {
            waiting.engine = engine;
        }
        if filter.is_some() {
            waiting.filter = filter;
        }
        if answerer.is_some() {
            waiting.answerer = answerer;
        }
        if canary.is_some() {
            waiting.canary = canary;
        }
    }

    /// What was left since the last call.
    pub(super) fn take(&self) -> Replacement {
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Replacement> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
