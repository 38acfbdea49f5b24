//! The kinds of models that share one layout, and the refusal of one where another is wanted.

use super::{BlipConfig, invalid};
use crate::caption::load::LoadError;

/// The kinds of models that are published in one layout, as transformers calls them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// `BlipForConditionalGeneration`: writes captions.
    Captioner,
    /// `BlipForImageTextRetrieval`: judges images and texts.
    Matcher,
    /// `BlipForQuestionAnswering`: answers questions about images.
    Answerer,
}

impl Architecture {
    const ALL: [Self; 3] = [Self::Captioner, Self::Matcher, Self::Answerer];

    /// What transformers calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Captioner => "BlipForConditionalGeneration",
            Self::Matcher => "BlipForImageTextRetrieval",
            Self::Answerer => "BlipForQuestionAnswering",
        }
    }

    /// The one that a file's `architectures` name, if it is known.
    pub(super) fn named(names: &[String]) -> Option<Self> {
        Self::ALL.into_iter().find(|known| names.iter().any(|name| name == known.name()))
    }

    /// What it does, to be read after "a model that".
    fn does(self) -> &'static str {
        match self {
            Self::Captioner => "writes captions",
            Self::Matcher => "judges whether texts match images",
            Self::Answerer => "answers questions about images",
        }
    }
}

impl BlipConfig {
    /// Refuses a file that says to be of another kind.
    ///
    /// # Errors
    /// It does; the message names both kinds.
    pub fn is(&self, wanted: Architecture) -> Result<(), LoadError> {
        match self.architecture {
            Some(other) if other != wanted => {
                let what = format!("is {}, a model that {}; one that", other.name(), other.does());
                Err(invalid("architectures", format!("{what} {} is {}", wanted.does(), wanted.name())))
            }
            _ => Ok(()),
        }
    }

    /// How many parameters a model of a kind has with these sizes, tied ones counted once.
    pub(in crate::caption) fn parameters_of(&self, architecture: Architecture) -> u64 {
        match architecture {
            Architecture::Captioner => self.parameters(),
            Architecture::Matcher => self.matcher_parameters(),
            Architecture::Answerer => self.answerer_parameters(),
        }
    }
}
