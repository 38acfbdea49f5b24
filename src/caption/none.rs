//! The place of a captioner where there is none.

use super::{
    Caption, Encoded, EncoderId, Engine, EngineError, ErrorKind, ModelInfo, Params, Phases, Pixels, RowId, Sight,
};

/// Writes no captions: for a filter that works alone.
pub struct NoCaptioner(ModelInfo, EncoderId);

impl NoCaptioner {
    /// In the place of a captioner beside the model of which this is known.
    pub fn new(beside: ModelInfo) -> Self {
        Self(beside, EncoderId::new())
    }
}

impl Engine for NoCaptioner {
    fn model(&self) -> &ModelInfo {
        &self.0
    }

    fn encoder(&self) -> EncoderId {
        self.1
    }

    fn see(&mut self, images: &[Pixels]) -> Result<Vec<Sight>, EngineError> {
        Ok(images.iter().map(|_| Sight::new(())).collect())
    }

    fn remember(&mut self, sights: &[Sight]) -> Result<Vec<Encoded>, EngineError> {
        Ok(sights.iter().map(|_| Encoded::new((), 0)).collect())
    }

    fn admit(&mut self, _: &Encoded, _: &Params) -> Result<RowId, EngineError> {
        Err(EngineError::new(ErrorKind::Unavailable, "no model that writes captions is loaded"))
    }

    fn step(&mut self) -> Result<Vec<(RowId, Caption)>, EngineError> {
        Ok(Vec::new())
    }

    fn active(&self) -> usize {
        0
    }

    fn state_bytes(&self, _: usize, _: usize) -> usize {
        0
    }

    fn clear(&mut self) {}

    fn take_phases(&mut self) -> Phases {
        Phases::default()
    }
}
