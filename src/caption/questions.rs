//! The pass over a batch that answers the questions about its images.

use super::task::of_its_own;
use super::viewer::Sights;
use super::{Ask, EngineError, ErrorKind, Pixels, Respondent, Told};

/// Images that are asked about at a time: what is remembered of an image takes some 20 MB on a GPU.
const IMAGES: usize = 32;
/// Questions that are asked at a time, but for those about a single image: each is remembered until its answer is written.
const QUESTIONS: usize = 64;

/// Answers the questions about the images of a batch whose earlier passes went well, and tells them in `results`.
///
/// # Errors
/// Of the call as a whole.
pub(super) fn answer(
    respondent: Option<&mut dyn Respondent>,
    items: &[(Pixels, Ask)],
    sights: &mut Sights,
    results: &mut [Result<Told, EngineError>],
) -> Result<(), EngineError> {
    let asked: Vec<usize> =
        (0..items.len()).filter(|at| !items[*at].1.questions.is_empty() && results[*at].is_ok()).collect();
    let Some(respondent) = respondent else {
        for at in asked {
            results[at] = Err(EngineError::new(ErrorKind::Unavailable, "no model that answers questions is loaded"));
        }
        return Ok(());
    };
    parts(&asked, |at| items[at].1.questions.len())
        .try_for_each(|places| tell(respondent, items, places, sights, results))
}

/// The places in parts of so many images and questions, one image at least.
fn parts(places: &[usize], questions: impl Fn(usize) -> usize) -> impl Iterator<Item = &[usize]> {
    let mut rest = places;
    std::iter::from_fn(move || {
        let mut asked = 0;
        let fitting = rest.iter().take(IMAGES).take_while(|at| {
            asked += questions(**at);
            asked <= QUESTIONS
        });
        let count = fitting.count();
        let (part, later) = rest.split_at(count.max(1).min(rest.len()));
        rest = later;
        (!part.is_empty()).then_some(part)
    })
}

fn tell(
    respondent: &mut dyn Respondent,
    items: &[(Pixels, Ask)],
    places: &[usize],
    sights: &mut Sights,
    results: &mut [Result<Told, EngineError>],
) -> Result<(), EngineError> {
    let images = sights.look(respondent, items, places, |_| false)?;
    let mut asked = Vec::new();
    for (image, at) in images.iter().zip(places) {
        let Ask { questions, answering, .. } = &items[*at].1;
        asked.extend(questions.iter().map(|question| (image, question.as_str(), answering.clone())));
    }
    let mut answers = respondent.answer(&asked)?.into_iter().map(of_its_own);
    for at in places {
        let answers = answers.by_ref().take(items[*at].1.questions.len()).collect::<Result<_, _>>()?;
        if let Ok(told) = &mut results[*at] {
            told.answers = answers;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_asked_in_parts_that_there_is_memory_for() {
        let of = |questions: &[usize]| {
            let places: Vec<usize> = (0..questions.len()).collect();
            parts(&places, |at| questions[at]).map(<[usize]>::len).collect::<Vec<_>>()
        };
        assert_eq!(of(&[1; 70]), [32, 32, 6]);
        assert_eq!(of(&[16; 9]), [4, 4, 1]);
        assert_eq!(of(&[64, 1, 200, 63, 1]), [1, 1, 1, 2], "one image at least");
        assert!(of(&[]).is_empty());
    }
}
