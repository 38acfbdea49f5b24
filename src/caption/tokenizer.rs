//! Text to tokens and back, as the reference's processor does it.

use serde::Deserialize;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::bert::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{AddedToken, Tokenizer, decoders};

use super::error::EngineError;
use super::files::ModelFiles;
use super::load::LoadError;

const TOKENIZER: &str = "tokenizer.json";
const VOCABULARY: &str = "vocab.txt";

/// The special tokens of BERT's vocabulary; none of them is ever part of a text.
const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

/// The tokenizer of a model.
pub(super) struct CaptionTokenizer {
    vocabulary: Vocabulary,
    /// Whether spaces before punctuation are removed once more after the pieces are joined.
    cleans_up: bool,
}

enum Vocabulary {
    Pieces(Box<Tokenizer>),
    /// Word `wN` is token N: a stand-in for models without a vocabulary.
    Numbered(usize),
}

/// The part of `tokenizer_config.json` that matters here.
#[derive(Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    do_lower_case: bool,
    strip_accents: Option<bool>,
    tokenize_chinese_chars: bool,
    clean_up_tokenization_spaces: bool,
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        Self {
            do_lower_case: true,
            strip_accents: None,
            tokenize_chinese_chars: true,
            // The default since transformers 5; the join itself cleans up piece by piece.
            clean_up_tokenization_spaces: false,
        }
    }
}

impl CaptionTokenizer {
    /// Reads `tokenizer.json`, or else `vocab.txt`.
    pub(super) fn read(files: &ModelFiles) -> Result<Self, LoadError> {
        let config: TokenizerConfig = match files.read("tokenizer_config.json")? {
            None => TokenizerConfig::default(),
            Some(json) => serde_json::from_slice(&json).map_err(|error| invalid("tokenizer_config.json", error))?,
        };
        let tokenizer = if let Some(json) = files.read(TOKENIZER)? {
            let mut tokenizer = Tokenizer::from_bytes(json).map_err(|error| invalid(TOKENIZER, error))?;
            // Lengths are the engine's business; a file may carry settings of the training.
            tokenizer.with_truncation(None).map_err(|error| invalid(TOKENIZER, error))?;
            tokenizer.with_padding(None);
            tokenizer
        } else if let Some(words) = files.read(VOCABULARY)? {
            word_piece(&words, &config).map_err(|error| invalid(VOCABULARY, error))?
        } else {
            return Err(LoadError::MissingFile {
                place: files.place(),
                file: format!("{TOKENIZER} or {VOCABULARY}"),
                hint: ": the vocabulary is missing".into(),
            });
        };
        let cleans_up = config.clean_up_tokenization_spaces;
        Ok(Self { vocabulary: Vocabulary::Pieces(Box::new(tokenizer)), cleans_up })
    }

    /// `w0`, `w1`, … for a model without a vocabulary.
    pub(super) fn numbered(size: usize) -> Self {
        Self { vocabulary: Vocabulary::Numbered(size), cleans_up: false }
    }

    /// The tokens of a prompt, without any that mark its beginning or end.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        match &self.vocabulary {
            Vocabulary::Pieces(tokenizer) => tokenizer
                .encode(text, false)
                .map(|encoding| encoding.get_ids().to_vec())
                .map_err(|error| EngineError::bad_params(format!("the prompt cannot be tokenised: {error}"))),
            Vocabulary::Numbered(size) => Ok(text.split_whitespace().map(|word| number(word, *size)).collect()),
        }
    }

    /// The number of a special token; `None` where there is no vocabulary.
    pub(super) fn special(&self, token: &str) -> Option<u32> {
        match &self.vocabulary {
            Vocabulary::Pieces(tokenizer) => tokenizer.token_to_id(token),
            Vocabulary::Numbered(_) => None,
        }
    }

    /// The text of a sequence: special tokens, and those outside the vocabulary, are left out.
    pub(super) fn decode(&self, ids: &[u32]) -> Result<String, EngineError> {
        let text = match &self.vocabulary {
            Vocabulary::Pieces(tokenizer) => tokenizer
                .decode(ids, true)
                .map_err(|error| EngineError::internal(format!("the caption cannot be written out: {error}")))?,
            Vocabulary::Numbered(size) => {
                let words = ids.iter().filter(|&&id| (id as usize) < *size).map(|id| format!("w{id}"));
                words.collect::<Vec<_>>().join(" ")
            }
        };
        Ok(if self.cleans_up { clean_up(&text) } else { text })
    }
}

fn invalid(file: &str, error: impl std::fmt::Display) -> LoadError {
    LoadError::Invalid { file: file.into(), reason: error.to_string() }
}

/// BERT's tokenizer from its list of words, one a line.
fn word_piece(words: &[u8], config: &TokenizerConfig) -> tokenizers::Result<Tokenizer> {
    let vocabulary = WordPiece::read_bytes(words)?;
    let special: Vec<_> = SPECIAL
        .into_iter()
        .filter(|word| vocabulary.contains_key(*word))
        .map(|word| AddedToken::from(word, true))
        .collect();
    let model = WordPiece::builder().vocab(vocabulary).unk_token("[UNK]".into()).build()?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(BertNormalizer::new(
            true,
            config.tokenize_chinese_chars,
            config.strip_accents,
            config.do_lower_case,
        )))?
        .with_pre_tokenizer(Some(BertPreTokenizer))
        .with_decoder(Some(decoders::wordpiece::WordPiece::default()));
    tokenizer.add_special_tokens(special)?;
    Ok(tokenizer)
}

/// `clean_up_tokenization` of transformers.
fn clean_up(text: &str) -> String {
    const CLEANED: [(&str, &str); 10] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    CLEANED.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// The number of `wN`, or some number for any other word.
fn number(word: &str, size: usize) -> u32 {
    let known = word.strip_prefix('w').and_then(|digits| digits.parse().ok());
    let hash = || word.bytes().fold(0, |sum: usize, byte| sum.wrapping_mul(31) + usize::from(byte));
    let number: usize = known.unwrap_or_else(|| hash() % size);
    number.min(size - 1) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::borrow::Cow;

    fn from_words(config: Option<&'static str>) -> CaptionTokenizer {
        let words = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ndog\n##s\n,\nit\n'\ns\nthere\n.";
        let mut files = std::collections::BTreeMap::from([("vocab.txt".to_owned(), Cow::from(words.as_bytes()))]);
        if let Some(config) = config {
            files.insert("tokenizer_config.json".into(), Cow::from(config.as_bytes()));
        }
        CaptionTokenizer::read(&ModelFiles::Memory { id: "test".into(), files }).unwrap()
    }

    #[test]
    fn pieces_join_to_words_and_special_or_unknown_ids_vanish() {
        let tokenizer = from_words(None);
        assert_eq!(tokenizer.encode("A dogs, there.").unwrap(), [5, 6, 7, 8, 12, 13]);
        assert_eq!(tokenizer.decode(&[99, 2, 5, 6, 7, 8, 12, 1, 13, 3, 0]).unwrap(), "a dogs, there.");
    }

    #[test]
    fn the_second_clean_up_is_done_where_the_model_asks_for_it() {
        let ids = [9, 10, 11];
        assert_eq!(from_words(None).decode(&ids).unwrap(), "it ' s");
        let tokenizer = from_words(Some(r#"{"clean_up_tokenization_spaces":true}"#));
        assert_eq!(tokenizer.decode(&ids).unwrap(), "it's");
    }

    #[test]
    fn lower_casing_is_the_models_choice() {
        let tokenizer = from_words(Some(r#"{"do_lower_case":false}"#));
        assert_eq!(tokenizer.encode("A a").unwrap(), [1, 5]);
    }

    #[test]
    fn numbered_words_read_back() {
        let tokenizer = CaptionTokenizer::numbered(10);
        assert_eq!(tokenizer.encode("w3 w9 w99").unwrap(), [3, 9, 9]);
        assert_eq!(tokenizer.decode(&[3, 12, 9]).unwrap(), "w3 w9");
    }
}
