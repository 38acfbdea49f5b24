//! What a worker notes beside a committed offset, for whoever reads on from there.

use serde::{Deserialize, Serialize};

/// Starts that did not end in order at one offset, after which the messages behind it are taken one at a time.
///
/// The first may have any cause, a machine that was switched off among them; one that repeats itself at the same offset
/// is worth the slowness.
pub const SUSPECT_AFTER: u32 = 2;

/// Version of the note's form.
const VERSION: u32 = 1;

/// The metadata of a committed offset: how often a worker has started at it without ending in order, and whether the
/// message at it was alone in flight.
///
/// Written as JSON in the metadata of the group's offset, e.g. `{"v":1,"starts":2,"alone":true,"until":2100}`; a note
/// that says nothing is an empty text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Note {
    /// Starts at this offset that have not ended in order, the one under way included.
    pub starts: u32,
    /// Whether the message at this very offset is in flight, and no other one in the whole worker.
    pub alone: bool,
    /// End of the offsets that are taken one at a time, exclusive.
    pub until: Option<i64>,
}

#[derive(Serialize, Deserialize)]
struct Written {
    v: u32,
    #[serde(default)]
    starts: u32,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    alone: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    until: Option<i64>,
}

impl Note {
    /// Reads the metadata of an offset. What is empty, somebody else's or of a later version says nothing.
    pub fn parse(metadata: &[u8]) -> Self {
        match serde_json::from_slice(metadata) {
            Ok(Written { v: VERSION, starts, alone, until }) => Self { starts, alone, until },
            _ => Self::default(),
        }
    }

    /// The metadata to write.
    pub fn render(&self) -> String {
        if *self == Self::default() {
            return String::new();
        }
        let Self { starts, alone, until } = *self;
        serde_json::to_string(&Written { v: VERSION, starts, alone, until }).expect("numbers are always JSON")
    }
}

/// An offset that the group has, or is to have, and the note beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Committed {
    /// Where the next worker reads on.
    pub offset: i64,
    /// What it is told.
    pub note: Note,
}

impl From<i64> for Committed {
    fn from(offset: i64) -> Self {
        Self { offset, note: Note::default() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_note_is_a_short_text_and_one_that_says_nothing_is_none() {
        let note = Note { starts: 2, alone: true, until: Some(2100) };
        assert_eq!(note.render(), r#"{"v":1,"starts":2,"alone":true,"until":2100}"#);
        assert_eq!(Note { starts: 1, ..Note::default() }.render(), r#"{"v":1,"starts":1}"#);
        assert_eq!(Note::default().render(), "");
    }

    #[test]
    fn a_note_of_somebody_else_or_of_a_later_version_says_nothing() {
        let foreign = ["", "x", "{}", r#"{"v":2,"starts":9,"alone":true}"#, r#"{"v":1,"starts":-1}"#, "7", "\u{0}"];
        for metadata in foreign {
            assert_eq!(Note::parse(metadata.as_bytes()), Note::default(), "{metadata}");
        }
        let more = r#"{"v":1,"starts":3,"since":"yesterday"}"#;
        assert_eq!(Note::parse(more.as_bytes()).starts, 3, "version 1 may gain fields");
    }

    proptest! {
        #[test]
        fn a_note_survives_being_written_and_read(starts: u32, alone: bool, until: Option<i64>) {
            let note = Note { starts, alone, until };
            prop_assert_eq!(Note::parse(note.render().as_bytes()), note);
            // Brokers take 4,096 bytes unless told otherwise (offset.metadata.max.bytes).
            prop_assert!(note.render().len() < 100);
        }

        #[test]
        fn any_bytes_are_a_note_or_none(metadata in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = Note::parse(&metadata);
        }
    }
}
