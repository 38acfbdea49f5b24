//! What may be asked about an image, and the passes that answer a batch: captions first, then the judgement of all texts
//! and the embeddings, then the answers to questions.

use super::viewer::Sights;
use super::{
    Caption, Embeddings, Encoded, EncoderId, Engine, EngineError, ErrorKind, Filter, Match, Params, Pixels, Respondent,
    embeddings, pictures, questions, write,
};

/// Images that are judged at a time: what is remembered of an image takes some 20 MB on a GPU.
const JUDGED: usize = 32;

/// What is asked about one image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ask {
    /// Captions, if any are to be written.
    pub caption: Option<Params>,
    /// Texts that were found with the image.
    pub texts: Vec<String>,
    /// Whether the captions and the texts are to be judged.
    pub filter: bool,
    /// Whether the image and the texts are to be embedded.
    pub embed: bool,
    /// Questions that are to be answered.
    pub questions: Vec<String>,
    /// How they are answered; without a prompt.
    pub answering: Params,
}

/// What is told about one image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// The captions, if they were asked for.
    pub caption: Option<Caption>,
    /// How well each of the captions describes the image, if that was asked for; or why it cannot be judged.
    pub generated: Vec<Result<Match, String>>,
    /// How well each of the texts does.
    pub found: Vec<Result<Match, String>>,
    /// Where the image and the texts are in one space, if that was asked for.
    pub embeddings: Option<Embeddings>,
    /// The answer to each of the questions, or why there is none.
    pub answers: Vec<Result<Caption, String>>,
}

impl Ask {
    /// A caption and nothing else.
    pub fn caption(params: Params) -> Self {
        Self { caption: Some(params), ..Self::default() }
    }

    /// How many rows of the captioner's running batch the image takes at most.
    pub fn rows(&self) -> usize {
        self.caption.as_ref().map_or(1, Params::rows)
    }

    /// Whether the filter is to look at the image.
    fn needs_filter(&self) -> bool {
        self.filter || self.embed
    }
}

/// Answers a batch. The results are in the order of `items`, each image's own errors (bad parameters, nothing but texts and
/// questions without words) in its place.
///
/// # Errors
/// Of the call as a whole; the engine is empty then.
pub fn tell(
    engine: &mut dyn Engine,
    filter: Option<&mut dyn Filter>,
    respondent: Option<&mut dyn Respondent>,
    items: &[(Pixels, Ask)],
) -> Result<Vec<Result<Told, EngineError>>, EngineError> {
    let mut results: Vec<Result<Told, EngineError>> = items.iter().map(|_| Ok(Told::default())).collect();
    let of_filter = filter.as_ref().map(|filter| filter.encoder());
    let of_respondent = respondent.as_ref().map(|respondent| respondent.encoder());
    let is_asked = |at: usize, by: Option<EncoderId>| of_respondent == by && !items[at].1.questions.is_empty();
    let mut sights = Sights::of(items.len());
    let (places, params): (Vec<usize>, Vec<&Params>) =
        items.iter().enumerate().filter_map(|(at, (_, ask))| Some((at, ask.caption.as_ref()?))).unzip();
    if !places.is_empty() {
        let images: Vec<Pixels> = places.iter().map(|at| items[*at].0.clone()).collect();
        let by = Some(engine.encoder());
        let is_judged = |at: usize| of_filter == by && items[at].1.needs_filter();
        let is_looked_at_later = |at: usize| is_judged(at) || is_asked(at, by);
        let encoded = if places.iter().any(|at| is_looked_at_later(*at)) {
            let seen = engine.see(&images)?;
            let encoded = engine.remember(&seen)?;
            let kept = places.iter().zip(seen).filter(|(at, _)| is_looked_at_later(**at));
            kept.for_each(|(at, sight)| sights.keep(*at, engine.encoder(), sight));
            encoded
        } else {
            engine.encode(&images)?
        };
        for (at, caption) in places.into_iter().zip(write(engine, encoded.into_iter().zip(params).collect())?) {
            results[at] = caption.map(|caption| Told { caption: Some(caption), ..Told::default() });
        }
    }
    let judged: Vec<usize> =
        (0..items.len()).filter(|at| items[*at].1.needs_filter() && results[*at].is_ok()).collect();
    match filter {
        _ if judged.is_empty() => {}
        Some(filter) => judged.chunks(JUDGED).try_for_each(|places| {
            let images = sights.look(filter, items, places, |at| is_asked(at, of_filter))?;
            judge(filter, items, places, &images, &mut results)?;
            embeddings::embed(filter, items, places, &images, &mut results)
        })?,
        None => {
            for at in judged {
                results[at] = Err(EngineError::new(ErrorKind::Unavailable, "no filter is loaded"));
            }
        }
    }
    questions::answer(respondent, items, &mut sights, &mut results)?;
    Ok(results.into_iter().map(|told| told.and_then(Told::of_use)).collect())
}

impl Told {
    /// Refuses an image of which nothing could be told, by its first text or question.
    fn of_use(self) -> Result<Self, EngineError> {
        fn first<T>(name: &str, told: &[Result<T, String>]) -> Option<String> {
            Some(format!("{name}[0]: {}", told.first()?.as_ref().err()?))
        }
        let none = self.caption.is_none()
            && self.embeddings.is_none()
            && self.found.iter().all(Result::is_err)
            && self.answers.iter().all(Result::is_err);
        match first("text", &self.found).or_else(|| first("questions", &self.answers)) {
            Some(why) if none => Err(EngineError::bad_params(why)),
            _ => Ok(self),
        }
    }
}

/// A grey picture for each of the tasks, which no sound device fails on.
///
/// # Errors
/// The size is 0.
pub fn probe(size: usize, caption: bool, filter: bool, answer: bool) -> Result<Vec<(Pixels, Ask)>, EngineError> {
    let picture = pictures::grey(size)?;
    let brief = || Params { max_new_tokens: 1, ..Params::default() };
    let asks = [
        caption.then(|| Ask::caption(brief())),
        filter.then(|| Ask { texts: vec!["a picture".into()], filter, ..Ask::default() }),
        answer.then(|| Ask { questions: vec!["a picture?".into()], answering: brief(), ..Ask::default() }),
    ];
    Ok(asks.into_iter().flatten().map(|ask| (picture.clone(), ask)).collect())
}

/// What is told of a text or a question of its own, or why nothing is: it has no words, or too many. The others are told all
/// the same.
///
/// # Errors
/// Any other, which is not its own.
pub(super) fn of_its_own<T>(told: Result<T, EngineError>) -> Result<Result<T, String>, EngineError> {
    match told {
        Ok(told) => Ok(Ok(told)),
        Err(error) if error.is_of_one_row() => Ok(Err(error.to_string())),
        Err(error) => Err(error),
    }
}

/// Judges the captions and texts of the images at some places.
fn judge(
    filter: &mut dyn Filter,
    items: &[(Pixels, Ask)],
    places: &[usize],
    images: &[Encoded],
    results: &mut [Result<Told, EngineError>],
) -> Result<(), EngineError> {
    let asked = || images.iter().zip(places).filter(|(_, at)| items[**at].1.filter);
    let mut pairs: Vec<(&Encoded, &str)> = Vec::new();
    for (image, at) in asked() {
        pairs.extend(written(&results[*at]).chain(found(&items[*at].1)).map(|text| (image, text)));
    }
    if pairs.is_empty() {
        return Ok(());
    }
    let mut matches = filter.judge(&pairs)?.into_iter().map(of_its_own);
    for (_, at) in asked() {
        let (captions, texts) = (written(&results[*at]).count(), items[*at].1.texts.len());
        let mut next = |count: usize| matches.by_ref().take(count).collect::<Result<Vec<_>, EngineError>>();
        let (generated, found) = (next(captions)?, next(texts)?);
        if let Ok(told) = &mut results[*at] {
            (told.generated, told.found) = (generated, found);
        }
    }
    Ok(())
}

/// The captions of an image, in their order.
fn written(told: &Result<Told, EngineError>) -> impl Iterator<Item = &str> {
    told.as_ref().ok().and_then(|told| told.caption.as_ref()).into_iter().flat_map(Caption::texts)
}

fn found(ask: &Ask) -> impl Iterator<Item = &str> {
    ask.texts.iter().map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::EncoderId;
    use crate::caption::fake::{FakeAnswerer, FakeEngine, FakeFilter, fake_words};

    fn image(colour: [u8; 3]) -> Pixels {
        Pixels::new(8, colour.repeat(64)).unwrap()
    }

    fn ask(caption: bool, texts: &[&str], filter: bool) -> Ask {
        let texts = texts.iter().map(|text| (*text).to_owned()).collect();
        Ask { caption: caption.then(Params::default), texts, filter, ..Ask::default() }
    }

    fn asking(questions: &[&str], ask: Ask) -> Ask {
        Ask { questions: questions.iter().map(|question| (*question).to_owned()).collect(), ..ask }
    }

    #[test]
    fn images_are_captioned_and_judged_each_as_it_was_asked() {
        let (mut engine, mut filter) = (FakeEngine::default(), FakeFilter::default());
        let hash = fake_words(&image([9, 8, 7])).pop().unwrap();
        let items = [
            (image([1, 2, 3]), ask(true, &[], false)),
            (image([9, 8, 7]), ask(true, &["nothing of it", &hash], true)),
            (image([9, 8, 7]), ask(false, &[&hash], true)),
            (image([4, 4, 4]), ask(true, &["a", " "], true)),
            (image([4, 4, 4]), ask(false, &[" ", " "], true)),
        ];
        let told = tell(&mut engine, Some(&mut filter), None, &items).unwrap();
        let first = told[0].as_ref().unwrap();
        assert!(first.caption.is_some() && first.generated.is_empty() && first.found.is_empty());
        let second = told[1].as_ref().unwrap();
        assert!(second.generated[0].as_ref().unwrap().itm > 0.5, "its own caption");
        assert_eq!(
            second.found.iter().map(|found| found.as_ref().unwrap().itm > 0.5).collect::<Vec<_>>(),
            [false, true]
        );
        let third = told[2].as_ref().unwrap();
        assert!(third.caption.is_none() && third.found.len() == 1);
        let fourth = told[3].as_ref().unwrap();
        assert!(fourth.generated[0].is_ok() && fourth.found[0].is_ok() && fourth.found[1].is_err(), "{fourth:?}");
        let error = told[4].as_ref().unwrap_err();
        assert_eq!((error.kind(), error.to_string().starts_with("text[0]: ")), (ErrorKind::BadParams, true), "{error}");
        // Four images are looked at by the filter, in one call.
        assert_eq!((filter.encode_calls(), engine.encode_calls()), (1, 1));
        // With one image encoder only those are looked at that had no caption, and all is told as before.
        let mut engine = FakeEngine::default();
        let mut filter = FakeFilter::with(engine.encoder());
        let again = tell(&mut engine, Some(&mut filter), None, &items).unwrap();
        let words =
            |told: &[Result<Told, EngineError>]| told.iter().map(|told| format!("{told:?}")).collect::<Vec<_>>();
        assert_eq!(words(&again), words(&told));
        assert_eq!((filter.images(), engine.take_phases().images), (2, 3));
    }

    #[test]
    fn without_a_filter_only_who_asks_for_it_goes_without() {
        let items = [(image([1, 2, 3]), ask(true, &[], false)), (image([1, 2, 3]), ask(true, &[], true))];
        let told = tell(&mut FakeEngine::default(), None, None, &items).unwrap();
        assert!(told[0].is_ok());
        assert_eq!(told[1].as_ref().unwrap_err().kind(), ErrorKind::Unavailable);
    }

    #[test]
    fn questions_are_answered_beside_captions_and_judgements_and_a_bad_one_spoils_no_other() {
        let (mut engine, mut filter, mut answerer) =
            (FakeEngine::default(), FakeFilter::default(), FakeAnswerer::default());
        let nothing = ask(false, &[], false);
        let items = [
            (image([1, 2, 3]), asking(&["what colour", "?", "how many"], ask(true, &["a"], true))),
            (image([9, 8, 7]), asking(&["what colour"], nothing.clone())),
            (image([4, 4, 4]), asking(&["?", "…"], nothing.clone())),
            (image([4, 4, 4]), asking(&["?"], ask(true, &[], false))),
            (image([4, 4, 4]), asking(&["what colour"], ask(false, &[" "], true))),
            (image([4, 4, 4]), asking(&["?"], ask(false, &[" "], true))),
            (image([5, 5, 5]), ask(true, &[], false)),
        ];
        let told = tell(&mut engine, Some(&mut filter), Some(&mut answerer), &items).unwrap();
        let texts = |at: usize| {
            let told: &Told = told[at].as_ref().unwrap();
            told.answers.iter().map(|answer| answer.as_ref().map(|answer| answer.text.clone())).collect::<Vec<_>>()
        };
        let hash = |colour: [u8; 3]| fake_words(&image(colour)).pop().unwrap();
        let first = texts(0);
        assert_eq!(first[0], Ok(&format!("colour {}", hash([1, 2, 3]))).cloned());
        assert!(first[1].is_err() && first[2].as_ref().unwrap().starts_with("many "), "{first:?}");
        let first = told[0].as_ref().unwrap();
        assert_eq!((first.caption.is_some(), first.generated.len(), first.found.len()), (true, 1, 1));
        assert_eq!(texts(1)[0], Ok(&format!("colour {}", hash([9, 8, 7]))).cloned());
        let error = told[2].as_ref().unwrap_err();
        assert!(error.kind() == ErrorKind::BadParams && error.to_string().starts_with("questions[0]: "), "{error}");
        assert!(texts(3)[0].is_err(), "its caption is told all the same");
        assert!(texts(4)[0].is_ok() && told[4].as_ref().unwrap().found[0].is_err());
        assert!(told[5].as_ref().unwrap_err().to_string().starts_with("text[0]: "));
        assert!(texts(6).is_empty());
        assert_eq!(answerer.encode_calls(), 1);

        let told = tell(&mut engine, None, None, &items[1..2]).unwrap();
        assert_eq!(told[0].as_ref().unwrap_err().kind(), ErrorKind::Unavailable);
    }

    #[test]
    fn an_image_is_looked_at_once_for_each_encoder_that_differs() {
        let (one, two, three) = (EncoderId::new(), EncoderId::new(), EncoderId::new());
        let all = asking(&["what colour"], ask(true, &["a"], true));
        let items = [
            (image([1, 2, 3]), all.clone()),
            (image([4, 5, 6]), asking(&["what colour"], ask(false, &["a"], true))),
            (image([7, 8, 9]), asking(&["what colour"], ask(true, &[], false))),
            (image([1, 1, 1]), asking(&["what colour"], ask(false, &[], false))),
            (image([2, 2, 2]), ask(true, &[], false)),
            (image([3, 3, 3]), all),
        ];
        let mut expected = None;
        // Who looks at how many of the six: four have captions, three are judged, and five have questions.
        for (captioner, filter, answerer, looks) in [
            (one, two, three, [4, 3, 5]),
            (one, one, three, [4, 1, 5]),
            (one, two, one, [4, 3, 2]),
            (one, two, two, [4, 3, 2]),
            (one, one, one, [4, 1, 1]),
        ] {
            let mut engine = FakeEngine::with(captioner);
            let (mut filter, mut answerer) = (FakeFilter::with(filter), FakeAnswerer::with(answerer));
            let told = tell(&mut engine, Some(&mut filter), Some(&mut answerer), &items).unwrap();
            let told: Vec<_> = told.into_iter().map(Result::unwrap).collect();
            assert_eq!(*expected.get_or_insert_with(|| told.clone()), told);
            let found = [engine.take_phases().images, filter.images(), answerer.images()];
            assert_eq!(found, looks, "{captioner:?}");
        }
    }

    #[test]
    fn images_and_texts_are_embedded_by_the_look_that_judges_them() {
        let (mut engine, mut filter) = (FakeEngine::default(), FakeFilter::default());
        let embedded = |ask: Ask| Ask { embed: true, ..ask };
        let hash = fake_words(&image([9, 8, 7])).pop().unwrap();
        let items = [
            (image([9, 8, 7]), embedded(ask(true, &[&hash, " "], true))),
            (image([9, 8, 7]), embedded(ask(false, &[], false))),
            (image([1, 2, 3]), embedded(ask(false, &[" "], true))),
            (image([1, 2, 3]), ask(false, &["a"], true)),
        ];
        let told = tell(&mut engine, Some(&mut filter), None, &items).unwrap();
        let of = |at: usize| told[at].as_ref().unwrap().embeddings.clone();
        let first = of(0).unwrap();
        assert_eq!(first.texts[0].as_ref().unwrap(), &first.image, "where the image is");
        assert!(first.texts[1].is_err() && told[0].as_ref().unwrap().found.len() == 2);
        assert_eq!(of(1), Some(Embeddings { texts: Vec::new(), ..first }));
        assert!(told[1].as_ref().unwrap().found.is_empty());
        assert!(of(2).unwrap().texts[0].is_err(), "its image is embedded all the same");
        assert_eq!((of(3), filter.encode_calls()), (None, 1));
        let told = tell(&mut engine, None, None, &items[1..2]).unwrap();
        assert_eq!(told[0].as_ref().unwrap_err().kind(), ErrorKind::Unavailable);
    }
}
