//! An engine without a model: deterministic captions from the pixels, delays and failures on demand. For tests of what
//! stands around an engine, and for measuring the pipeline without a model's cost.

mod beside;

use std::thread;
use std::time::{Duration, Instant};

use super::{
    Caption, Encoded, EncoderId, Engine, EngineError, ErrorKind, Filter, Finish, Match, ModelInfo, Params, Phases,
    Pixels, Respondent, RowId, Sight, Viewer,
};
pub use beside::{FakeAnswerer, FakeFilter, FakeViewer};

/// How a [`FakeEngine`] behaves.
#[derive(Clone, Debug)]
pub struct FakeOptions {
    /// What its model is called.
    pub id: String,
    /// Side of the images it takes, in pixels.
    pub image_size: usize,
    /// How long each call of `encode` takes.
    pub encode_delay: Duration,
    /// How long each call of `step` takes.
    pub step_delay: Duration,
    /// The calls of `encode` that fail with [`ErrorKind::Internal`], counted from 1.
    pub failing_calls: Vec<usize>,
    /// A call of `encode` with more images than this runs out of memory.
    pub memory_for: usize,
    /// An image whose first pixel has this colour makes its whole call of `encode` fail with [`ErrorKind::Internal`].
    pub poison: Option<[u8; 3]>,
    /// An image whose first pixel has this colour ends the process, as a bug in native code does.
    pub deadly: Option<[u8; 3]>,
    /// An image whose first pixel has this colour makes the thread panic.
    pub panicking: Option<[u8; 3]>,
    /// The longest prompt that is taken, in words.
    pub max_prompt_words: usize,
    /// The first word of its captions.
    pub article: &'static str,
    /// What a row is said to take of the device's memory, in bytes.
    pub row_bytes: usize,
}

impl Default for FakeOptions {
    fn default() -> Self {
        Self {
            id: "fake".into(),
            image_size: 8,
            encode_delay: Duration::ZERO,
            step_delay: Duration::ZERO,
            failing_calls: Vec::new(),
            memory_for: usize::MAX,
            poison: None,
            deadly: None,
            panicking: None,
            max_prompt_words: 64,
            article: "a",
            row_bytes: 0,
        }
    }
}

/// An engine whose caption names the mean colour and a hash of the pixels; see [`fake_words`].
pub struct FakeEngine {
    options: FakeOptions,
    model: ModelInfo,
    encoder: EncoderId,
    rows: Vec<FakeRow>,
    next_row: u64,
    encode_calls: usize,
    phases: Phases,
}

struct FakeEncoding(Vec<String>);

struct FakeSight(Vec<String>, EncoderId);

fn see(images: &[Pixels], by: EncoderId) -> Vec<Sight> {
    images.iter().map(|image| Sight::new(FakeSight(fake_words(image), by))).collect()
}

fn remember(sights: &[Sight], own: EncoderId) -> Result<Vec<Encoded>, EngineError> {
    let remembered = |sight: &Sight| {
        let seen = sight.state::<FakeSight>().filter(|seen| seen.1 == own);
        let seen = seen.ok_or_else(|| EngineError::bad_input("the image was seen by another image encoder"))?;
        Ok(Encoded::new(FakeEncoding(seen.0.clone()), 0))
    };
    sights.iter().map(remembered).collect()
}

struct FakeRow {
    id: RowId,
    prompt: Option<String>,
    words: Vec<String>,
    generated: usize,
    max_new_tokens: usize,
    min_new_tokens: usize,
    captions: usize,
}

/// The words of the caption that a [`FakeEngine`] gives to an image, without a prompt and with tokens to spare:
/// `a <red> <green> <blue> image <hash>`, of the mean colour in decimal and of the bytes' FNV-1a hash in hexadecimal.
pub fn fake_words(pixels: &Pixels) -> Vec<String> {
    let mean = |channel: usize| {
        let sum: u64 = pixels.data().iter().skip(channel).step_by(3).map(|&byte| u64::from(byte)).sum();
        sum / (pixels.size() * pixels.size()) as u64
    };
    let hash = fnv(pixels.data());
    vec![
        "a".into(),
        mean(0).to_string(),
        mean(1).to_string(),
        mean(2).to_string(),
        "image".into(),
        format!("{hash:016x}"),
    ]
}

/// FNV-1a.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A point of the sphere, from the hash of a word.
fn embedding(word: &str) -> Vec<f32> {
    let point = fnv(word.as_bytes()).to_le_bytes().map(|byte| f32::from(byte) - 127.5);
    let length = point.iter().map(|x| x * x).sum::<f32>().sqrt();
    point.iter().map(|x| x / length).collect()
}

impl FakeEngine {
    /// An engine that behaves as `options` say.
    pub fn new(options: FakeOptions) -> Self {
        let model = ModelInfo {
            id: options.id.clone(),
            revision: None,
            dtype: "f32".into(),
            device: "cpu".into(),
            backend: "fake".into(),
            image_size: options.image_size,
            parameters: 0,
            context_length: options.max_prompt_words,
        };
        let encoder = EncoderId::new();
        Self { options, model, encoder, rows: Vec::new(), next_row: 0, encode_calls: 0, phases: Phases::default() }
    }

    /// The usual one, with the image encoder of another model.
    pub fn with(encoder: EncoderId) -> Self {
        Self { encoder, ..Self::default() }
    }

    /// How often images were looked at.
    pub fn encode_calls(&self) -> usize {
        self.encode_calls
    }
}

impl Default for FakeEngine {
    fn default() -> Self {
        Self::new(FakeOptions::default())
    }
}

impl Engine for FakeEngine {
    fn model(&self) -> &ModelInfo {
        &self.model
    }

    fn encoder(&self) -> EncoderId {
        self.encoder
    }

    fn see(&mut self, images: &[Pixels]) -> Result<Vec<Sight>, EngineError> {
        let started = Instant::now();
        self.encode_calls += 1;
        thread::sleep(self.options.encode_delay);
        if self.options.failing_calls.contains(&self.encode_calls) {
            return Err(EngineError::internal("this call was told to fail"));
        }
        if images.len() > self.options.memory_for {
            return Err(EngineError::new(ErrorKind::OutOfMemory, "the device is out of memory"));
        }
        if let Some(image) = images.iter().find(|image| image.size() != self.options.image_size) {
            let expected = self.options.image_size;
            return Err(EngineError::bad_input(format!(
                "the model takes images of side {expected}, not {}",
                image.size()
            )));
        }
        let has = |colour: Option<[u8; 3]>| {
            colour.is_some_and(|colour| images.iter().any(|image| image.data()[..3] == colour))
        };
        if has(self.options.deadly) {
            std::process::abort();
        }
        assert!(!has(self.options.panicking), "an image of the batch makes the engine panic");
        if has(self.options.poison) {
            return Err(EngineError::internal("an image of the batch is poisoned"));
        }
        self.phases.encode += started.elapsed();
        self.phases.images += images.len();
        Ok(see(images, self.encoder))
    }

    fn remember(&mut self, sights: &[Sight]) -> Result<Vec<Encoded>, EngineError> {
        remember(sights, self.encoder)
    }

    fn admit(&mut self, image: &Encoded, params: &Params) -> Result<RowId, EngineError> {
        let encoding = image
            .state::<FakeEncoding>()
            .ok_or_else(|| EngineError::bad_input("the image was encoded by another engine"))?;
        let prompt_words = params.prompt.as_deref().map_or(0, |prompt| prompt.split_whitespace().count());
        if prompt_words > self.options.max_prompt_words {
            let most = self.options.max_prompt_words;
            return Err(EngineError::bad_params(format!("the prompt has {prompt_words} tokens, at most {most} fit")));
        }
        params.check()?;
        let id = RowId(self.next_row);
        self.next_row += 1;
        self.rows.push(FakeRow {
            id,
            prompt: params.prompt.clone(),
            words: std::iter::once(self.options.article.into()).chain(encoding.0.iter().skip(1).cloned()).collect(),
            generated: 0,
            max_new_tokens: params.max_new_tokens,
            min_new_tokens: params.min_new_tokens,
            captions: params.captions,
        });
        Ok(id)
    }

    fn step(&mut self) -> Result<Vec<(RowId, Caption)>, EngineError> {
        let started = Instant::now();
        thread::sleep(self.options.step_delay);
        let mut finished = Vec::new();
        for row in &mut self.rows {
            row.generated += 1;
            if let Some(finish) = row.finish() {
                finished.push((row.id, row.caption(finish)));
            }
        }
        self.phases.tokens += self.rows.len();
        self.phases.steps += 1;
        self.phases.decode += started.elapsed();
        self.rows.retain(|row| row.finish().is_none());
        Ok(finished)
    }

    fn active(&self) -> usize {
        self.rows.len()
    }

    fn state_bytes(&self, rows: usize, _tokens: usize) -> usize {
        rows * self.options.row_bytes
    }

    fn clear(&mut self) {
        self.rows.clear();
    }

    fn take_phases(&mut self) -> Phases {
        std::mem::take(&mut self.phases)
    }
}

impl FakeRow {
    /// The end token comes after the last word, or later where `min_new_tokens` holds it back.
    fn finish(&self) -> Option<Finish> {
        if self.generated > self.words.len() && self.generated > self.min_new_tokens {
            Some(Finish::Stop)
        } else if self.generated >= self.max_new_tokens {
            Some(Finish::Length)
        } else {
            None
        }
    }

    /// Further captions have their number at the end.
    fn caption(&self, finish: Finish) -> Caption {
        let words = self.words.iter().take(self.generated).map(String::as_str);
        let text = self.prompt.as_deref().into_iter().chain(words).collect::<Vec<_>>().join(" ");
        let one = |text| Caption {
            text,
            token_ids: (1..=self.generated as u32).collect(),
            logprob: -0.5 * self.generated as f32,
            tokens: self.generated,
            finish,
            more: Vec::new(),
        };
        Caption {
            more: (2..=self.captions).map(|number| one(format!("{text} {number}"))).collect(),
            ..one(text.clone())
        }
    }
}

/// The word of a fake caption that tells the image.
fn hash_of(image: &Encoded) -> Result<String, EngineError> {
    let words = image.state::<FakeEncoding>().ok_or_else(|| EngineError::bad_input("of another engine"))?;
    words.0.last().cloned().ok_or_else(|| EngineError::internal("a fake caption has words"))
}

fn last_word(text: &str) -> Result<&str, EngineError> {
    let mut words = text.split_whitespace().rev();
    words
        .find(|word| word.contains(char::is_alphanumeric))
        .ok_or_else(|| EngineError::bad_params("the text has no words"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::caption;

    fn image(colour: [u8; 3]) -> Pixels {
        Pixels::new(8, colour.repeat(64)).unwrap()
    }

    fn with(options: FakeOptions) -> FakeEngine {
        FakeEngine::new(options)
    }

    #[test]
    fn captions_name_the_pixels_and_keep_their_order() {
        let items = [(image([1, 2, 3]), Params::default()), (image([9, 8, 7]), Params::default())];
        let captions = caption(&mut FakeEngine::default(), &items).unwrap();
        let texts: Vec<String> = captions.into_iter().map(|caption| caption.unwrap().text).collect();
        assert_eq!(texts, [fake_words(&items[0].0).join(" "), fake_words(&items[1].0).join(" ")]);
        assert!(texts[0].starts_with("a 1 2 3 image "));
    }

    #[test]
    fn a_bad_prompt_is_the_error_of_its_row_alone() {
        let long = Params { prompt: Some("word ".repeat(65)), ..Params::default() };
        let short = Params { prompt: Some("a photo of".into()), max_new_tokens: 2, ..Params::default() };
        let items = [(image([1, 1, 1]), long), (image([2, 2, 2]), short)];
        let captions = caption(&mut FakeEngine::default(), &items).unwrap();
        assert_eq!(captions[0].as_ref().unwrap_err().kind(), ErrorKind::BadParams);
        let second = captions[1].as_ref().unwrap();
        assert_eq!((second.text.as_str(), second.finish), ("a photo of a 2", Finish::Length));
    }

    #[test]
    fn a_text_that_ends_with_the_hash_of_an_image_is_where_the_image_is() {
        let mut filter = FakeFilter::default();
        let images = filter.encode(&[image([1, 2, 3]), image([9, 8, 7])]).unwrap();
        let of_images: Vec<_> = images.iter().map(|image| filter.image_embedding(image).unwrap()).collect();
        let caption = fake_words(&image([9, 8, 7])).join(" ");
        let of_texts = filter.text_embeddings(&[&caption, " ", "a dog"]).unwrap();
        assert_eq!(of_texts[0].as_ref().unwrap(), &of_images[1]);
        assert_eq!(of_texts[1].as_ref().unwrap_err().kind(), ErrorKind::BadParams);
        assert!(of_images[0] != of_images[1] && of_texts[2].as_ref().unwrap() != &of_images[1]);
        for point in of_images {
            assert!((point.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-6);
        }
        let foreign = Encoded::new((), 0);
        assert_eq!(filter.image_embedding(&foreign).unwrap_err().kind(), ErrorKind::BadInput);
    }

    #[test]
    fn fails_where_it_is_told_to_and_recovers() {
        let one = [(image([1, 1, 1]), Params::default())];
        let two = [one[0].clone(), (image([6, 6, 6]), Params::default())];
        let kind =
            |engine: &mut FakeEngine, items: &[_]| caption(engine, items).map(|_| ()).map_err(|error| error.kind());
        let mut engine = with(FakeOptions { failing_calls: vec![1], memory_for: 1, ..FakeOptions::default() });
        assert_eq!(kind(&mut engine, &one), Err(ErrorKind::Internal));
        assert_eq!(kind(&mut engine, &two), Err(ErrorKind::OutOfMemory));
        assert_eq!(kind(&mut engine, &one), Ok(()));
        let mut engine = with(FakeOptions { poison: Some([6, 6, 6]), ..FakeOptions::default() });
        assert_eq!(kind(&mut engine, &two), Err(ErrorKind::Internal));
        assert_eq!(kind(&mut engine, &one), Ok(()));
    }
}
