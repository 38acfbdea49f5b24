//! The answers of a record, and its embeddings.

use super::generated;
use crate::caption::{self, Caption, Told};
use crate::message::{Answer, Embeddings, Generated};

/// An answer, or why there is none, to each of the questions.
pub(super) fn of(told: &Told, questions: &[String]) -> Vec<Answer> {
    let answer = |(question, answer): (&String, &Result<Caption, String>)| {
        let question = question.clone();
        match answer {
            Ok(answer) => {
                let (text, generated) = (Some(answer.text.clone()), generated(answer));
                Answer { question, text, generated, error: None }
            }
            Err(why) => Answer { question, text: None, generated: Generated::default(), error: Some(why.clone()) },
        }
    };
    questions.iter().zip(&told.answers).map(answer).collect()
}

/// The first question's answer that has one: what is told where nothing else was asked for.
pub(super) fn first(answers: &[Answer]) -> Option<(String, Generated)> {
    answers.iter().find_map(|answer| Some((answer.text.clone()?, answer.generated)))
}

/// Embeddings as they are published.
pub(super) fn embeddings(told: &caption::Embeddings) -> Embeddings {
    let error =
        |(at, text): (usize, &Result<Vec<f32>, String>)| Some((format!("text[{at}]"), text.as_ref().err()?.clone()));
    Embeddings {
        image: told.image.clone(),
        text: told.texts.iter().map(|text| text.as_ref().ok().cloned()).collect(),
        errors: told.texts.iter().enumerate().filter_map(error).collect(),
    }
}
