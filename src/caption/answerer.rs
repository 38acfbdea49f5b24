//! BLIP's answerer of questions about images (`BlipForQuestionAnswering` of transformers): a question is read in the sight of
//! its image, and the answer is written in the sight of the question as it was read.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::config::BlipConfig;
use super::engine::at_home;
use super::load::{Built, LoadError};
use super::memory::{ImageMemory, Sizes};
use super::preprocess::Preprocessor;
use super::reader::{Part, Reader, parts};
use super::rows::Rows;
use super::viewer::{Looks, Vision};
use super::writer::Writer;
use super::{Caption, Encoded, EngineError, ModelInfo, Params, Pixels, RowId};

/// Sequences that are written at a time, but for a single answer with more beams.
const SEQUENCES: usize = 64;

/// A model that answers questions about images, on a device. Cheap to share.
pub struct Answerer {
    vision: Vision,
    /// Of questions.
    reader: Reader,
    /// Of answers.
    writer: Writer,
    config: BlipConfig,
    preprocessor: Preprocessor,
}

/// An encoded image, as questions look at it.
struct Seen(Arc<ImageMemory>);

/// A question that was read, as its answer looks at it.
struct Question {
    /// Where it stands among all.
    at: usize,
    memory: Arc<ImageMemory>,
    /// Its tokens.
    length: usize,
}

impl Looks for Answerer {
    fn vision(&self) -> &Vision {
        &self.vision
    }

    fn remember_hidden(&self, hidden: &Tensor, _: usize) -> std::result::Result<Vec<Encoded>, EngineError> {
        let memories = self.reader.remember(hidden, self.config.vision.tokens())?;
        let encoded = memories.into_iter().map(|memory| {
            let bytes = memory.bytes();
            Encoded::new(Seen(Arc::new(memory)), bytes)
        });
        Ok(encoded.collect())
    }
}

impl Answerer {
    /// Reads `text_encoder` and `text_decoder`.
    pub(super) fn build(built: Built<'_>) -> std::result::Result<Self, LoadError> {
        let Built { config, preprocessor, tokenizer, scope, vision, identity, .. } = built;
        let tokenizer = Arc::new(tokenizer);
        let reader = Reader::load(&scope.part("text_encoder"), &config, Arc::clone(&tokenizer))?;
        let sizes = Sizes::of_texts(&config.text);
        let writer = Writer::load(&scope.part("text_decoder"), &config.text, sizes, tokenizer)?;
        let info = identity.info(&config, config.answerer_parameters() + writer.untied());
        let vision = Vision { encoder: vision, device: scope.device().clone(), info };
        Ok(Self { vision, reader, writer, config, preprocessor })
    }

    /// The model and where it runs.
    pub fn info(&self) -> &ModelInfo {
        &self.vision.info
    }

    /// What makes its pixels of pictures.
    pub fn preprocessor(&self) -> &Preprocessor {
        &self.preprocessor
    }

    /// Encodes images of the model's size; the result is in the order of `images`.
    ///
    /// # Errors
    /// An image has another size, or the device fails.
    pub fn encode(&self, images: &[Pixels]) -> std::result::Result<Vec<Encoded>, EngineError> {
        self.encode_all(images)
    }

    /// Answers questions about images, in their order; a caption's text is the answer. Each question's own errors stand in its
    /// place: no words, too many tokens, unsound parameters or a prompt among them, an image of another model. An image is best
    /// followed by all questions about it.
    ///
    /// # Errors
    /// The device fails.
    pub fn answer(
        &self,
        asked: &[(&Encoded, &str, Params)],
    ) -> std::result::Result<Vec<std::result::Result<Caption, EngineError>>, EngineError> {
        at_home(&self.vision.device, || self.answer_all(asked))
    }

    fn answer_all(
        &self,
        asked: &[(&Encoded, &str, Params)],
    ) -> std::result::Result<Vec<std::result::Result<Caption, EngineError>>, EngineError> {
        let mut results: Vec<_> = asked.iter().map(|_| Err(EngineError::internal("a question was lost"))).collect();
        let (mut images, mut tokens) = (BTreeMap::new(), Vec::with_capacity(asked.len()));
        for (at, (image, question, params)) in asked.iter().enumerate() {
            let own = check(params).and_then(|()| seen(image)).and_then(|image| {
                images.insert(at, image);
                self.reader.tokens(question)
            });
            tokens.push((at, own));
        }
        let mut questions = Vec::with_capacity(asked.len());
        for part in parts(tokens.into_iter(), &mut results) {
            let own: Vec<_> = part.places.iter().filter_map(|at| images.get(at)).map(|image| &image.0).collect();
            questions.extend(self.read(&part, &own)?);
        }
        for questions in self.together(questions) {
            self.write(questions, asked, &mut results)?;
        }
        Ok(results)
    }

    /// Reads questions of one length in the sight of their images.
    fn read(&self, part: &Part, images: &[&Arc<ImageMemory>]) -> Result<Vec<Question>> {
        let length = part.length();
        let hidden = self.reader.read(part, Some(images))?;
        let memories = self.writer.text.remember(&hidden, length)?.into_iter();
        let both = memories.zip(&part.places);
        Ok(both.map(|(memory, at)| Question { at: *at, memory: Arc::new(memory), length }).collect())
    }

    /// Questions whose answers are written together: of one length each, where they have slots of one size in a memory; all,
    /// where each has a place of its own.
    fn together(&self, questions: Vec<Question>) -> Vec<Vec<Question>> {
        let mut groups: BTreeMap<usize, Vec<Question>> = BTreeMap::new();
        for question in questions {
            let group = if self.writer.kept.are_tensors() { question.length } else { 0 };
            groups.entry(group).or_default().push(question);
        }
        groups.into_values().collect()
    }

    /// Writes the answers, a new one whenever others are finished.
    fn write(
        &self,
        questions: Vec<Question>,
        asked: &[(&Encoded, &str, Params)],
        results: &mut [std::result::Result<Caption, EngineError>],
    ) -> std::result::Result<(), EngineError> {
        let longest = questions.iter().map(|question| question.length).max().unwrap_or(0);
        let mut rows = Rows::new(self.writer.new_memory(longest));
        let mut places: BTreeMap<RowId, usize> = BTreeMap::new();
        let mut questions = questions.into_iter().peekable();
        while questions.peek().is_some() || rows.active() > 0 {
            let mut sequences: usize = places.values().map(|at| asked[*at].2.rows()).sum();
            while let Some(question) = questions.next_if(|next| {
                sequences = sequences.saturating_add(asked[next.at].2.rows());
                sequences <= SEQUENCES || rows.active() == 0
            }) {
                match rows.admit(&self.writer, &question.memory, &asked[question.at].2) {
                    Ok(row) => {
                        places.insert(row, question.at);
                    }
                    Err(error) if error.is_of_one_row() => results[question.at] = Err(error),
                    Err(error) => return Err(error),
                }
            }
            if rows.active() == 0 {
                continue;
            }
            for (row, answer) in rows.step(&self.writer)? {
                if let Some(at) = places.remove(&row) {
                    results[at] = Ok(answer);
                }
            }
        }
        Ok(())
    }
}

fn seen(image: &Encoded) -> std::result::Result<Arc<Seen>, EngineError> {
    image.state().ok_or_else(|| EngineError::bad_input("the image was encoded by another kind of model"))
}

/// The parameters of an answer have no prompt: the reference begins every answer afresh.
fn check(params: &Params) -> std::result::Result<(), EngineError> {
    match params.prompt {
        Some(_) => Err(EngineError::bad_params("an answer continues no prompt: the question is asked by itself")),
        None => params.check(),
    }
}
