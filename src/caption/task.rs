//! What may be asked about an image, and the two passes that answer a batch: captions first, then the judgement of all texts.

use super::{Caption, Encoded, Engine, EngineError, ErrorKind, Filter, Match, Params, Pixels, Sight, write};

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
}

/// Answers a batch. The results are in the order of `items`, each image's own errors (bad parameters, a text without words) in
/// its place.
///
/// # Errors
/// Of the call as a whole; the engine is empty then.
pub fn tell(
    engine: &mut dyn Engine,
    filter: Option<&mut dyn Filter>,
    items: &[(Pixels, Ask)],
) -> Result<Vec<Result<Told, EngineError>>, EngineError> {
    let mut results: Vec<Result<Told, EngineError>> = items.iter().map(|_| Ok(Told::default())).collect();
    // What the filter can look at without encoding it again.
    let mut sights: Vec<Option<Sight>> = vec![None; items.len()];
    let (places, params): (Vec<usize>, Vec<&Params>) =
        items.iter().enumerate().filter_map(|(at, (_, ask))| Some((at, ask.caption.as_ref()?))).unzip();
    if !places.is_empty() {
        let images: Vec<Pixels> = places.iter().map(|at| items[*at].0.clone()).collect();
        let encoded = if filter.as_ref().is_some_and(|filter| filter.encoder() == engine.encoder()) {
            let seen = engine.see(&images)?;
            let encoded = engine.remember(&seen)?;
            for (at, sight) in places.iter().zip(seen) {
                sights[*at] = Some(sight).filter(|_| items[*at].1.filter);
            }
            encoded
        } else {
            engine.encode(&images)?
        };
        for (at, caption) in places.into_iter().zip(write(engine, encoded.into_iter().zip(params).collect())?) {
            results[at] = caption.map(|caption| Told { caption: Some(caption), ..Told::default() });
        }
    }
    let judged: Vec<usize> = (0..items.len()).filter(|at| items[*at].1.filter && results[*at].is_ok()).collect();
    match filter {
        _ if judged.is_empty() => {}
        Some(filter) => judged.chunks(JUDGED).try_for_each(|places| {
            let images = look(filter, items, places, &sights)?;
            judge(filter, items, places, &images, &mut results)
        })?,
        None => {
            for at in judged {
                results[at] = Err(EngineError::new(ErrorKind::Unavailable, "no filter is loaded"));
            }
        }
    }
    Ok(results)
}

/// Encodes the images at some places for the filter, in the order of the places. Those that were seen are not looked at again.
fn look(
    filter: &mut dyn Filter,
    items: &[(Pixels, Ask)],
    places: &[usize],
    sights: &[Option<Sight>],
) -> Result<Vec<Encoded>, EngineError> {
    let seen: Vec<Sight> = places.iter().filter_map(|at| sights[*at].clone()).collect();
    let unseen: Vec<Pixels> =
        places.iter().filter(|at| sights[**at].is_none()).map(|at| items[*at].0.clone()).collect();
    let mut remembered = if seen.is_empty() { Vec::new() } else { filter.remember(&seen)? }.into_iter();
    let mut encoded = if unseen.is_empty() { Vec::new() } else { filter.encode(&unseen)? }.into_iter();
    let next = places.iter().map(|at| if sights[*at].is_some() { remembered.next() } else { encoded.next() });
    next.collect::<Option<_>>().ok_or_else(|| EngineError::internal("the filter lost an image"))
}

/// Judges the captions and texts of the images at some places.
fn judge(
    filter: &mut dyn Filter,
    items: &[(Pixels, Ask)],
    places: &[usize],
    images: &[Encoded],
    results: &mut [Result<Told, EngineError>],
) -> Result<(), EngineError> {
    let mut pairs: Vec<(&Encoded, &str)> = Vec::new();
    for (image, at) in images.iter().zip(places) {
        pairs.extend(written(&results[*at]).chain(found(&items[*at].1)).map(|text| (image, text)));
    }
    let mut matches = filter.judge(&pairs)?.into_iter();
    for at in places {
        let (captions, texts) = (written(&results[*at]).count(), items[*at].1.texts.len());
        let mut next = |count: usize| {
            let judged = matches.by_ref().take(count).map(|judgement| match judgement {
                Ok(judgement) => Ok(Ok(judgement)),
                // A text of no words, or of too many: the others are judged all the same.
                Err(error) if error.is_of_one_row() => Ok(Err(error.to_string())),
                Err(error) => Err(error),
            });
            judged.collect::<Result<Vec<_>, EngineError>>()
        };
        let (generated, found) = (next(captions)?, next(texts)?);
        if let Some(Err(why)) = found.first().filter(|_| captions == 0 && found.iter().all(Result::is_err)) {
            results[*at] = Err(EngineError::bad_params(format!("text[0]: {why}")));
        } else if let Ok(told) = &mut results[*at] {
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
    use crate::caption::fake::{FakeEngine, FakeFilter, fake_words};

    fn image(colour: [u8; 3]) -> Pixels {
        Pixels::new(8, colour.repeat(64)).unwrap()
    }

    fn ask(caption: bool, texts: &[&str], filter: bool) -> Ask {
        let texts = texts.iter().map(|text| (*text).to_owned()).collect();
        Ask { caption: caption.then(Params::default), texts, filter }
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
        let told = tell(&mut engine, Some(&mut filter), &items).unwrap();
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
        let mut filter = FakeFilter::beside(&engine);
        let again = tell(&mut engine, Some(&mut filter), &items).unwrap();
        let words =
            |told: &[Result<Told, EngineError>]| told.iter().map(|told| format!("{told:?}")).collect::<Vec<_>>();
        assert_eq!(words(&again), words(&told));
        assert_eq!((filter.images(), engine.take_phases().images), (2, 3));
    }

    #[test]
    fn without_a_filter_only_who_asks_for_it_goes_without() {
        let items = [(image([1, 2, 3]), ask(true, &[], false)), (image([1, 2, 3]), ask(true, &[], true))];
        let told = tell(&mut FakeEngine::default(), None, &items).unwrap();
        assert!(told[0].is_ok());
        assert_eq!(told[1].as_ref().unwrap_err().kind(), ErrorKind::Unavailable);
    }
}
