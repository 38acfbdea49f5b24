//! The pass over images and texts that embeds both in one space.

use super::task::of_its_own;
use super::{Ask, Encoded, EngineError, Filter, Pixels, Told};

/// Where an image and the texts found with it are in the space of both: points of length 1, whose products are cosines.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    /// Of the image.
    pub image: Vec<f32>,
    /// Of each of the texts, or why it has none.
    pub texts: Vec<Result<Vec<f32>, String>>,
}

/// Embeds the images at some places that ask for it, as the filter encoded them, and their texts; tells them in `results`.
///
/// # Errors
/// Of the call as a whole.
pub(super) fn embed(
    filter: &mut dyn Filter,
    items: &[(Pixels, Ask)],
    places: &[usize],
    images: &[Encoded],
    results: &mut [Result<Told, EngineError>],
) -> Result<(), EngineError> {
    let asked = || images.iter().zip(places).filter(|(_, at)| items[**at].1.embed);
    let texts: Vec<&str> = asked().flat_map(|(_, at)| items[*at].1.texts.iter().map(String::as_str)).collect();
    let embedded = if texts.is_empty() { Vec::new() } else { filter.text_embeddings(&texts)? };
    let mut embedded = embedded.into_iter().map(of_its_own);
    for (image, at) in asked() {
        let image = filter.image_embedding(image)?;
        let texts = embedded.by_ref().take(items[*at].1.texts.len()).collect::<Result<_, _>>()?;
        if let Ok(told) = &mut results[*at] {
            told.embeddings = Some(Embeddings { image, texts });
        }
    }
    Ok(())
}
