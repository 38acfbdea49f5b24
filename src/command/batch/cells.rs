//! The columns of a row, in their order.

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// Names and values, each name once, as a JSON object.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cells(pub Vec<(String, Value)>);

impl Cells {
    /// The value of a column.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(column, _)| column == name).map(|(_, value)| value)
    }
}

impl Serialize for Cells {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

impl<'de> Deserialize<'de> for Cells {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Cells;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Cells, A::Error> {
                let mut cells = Cells::default();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    // As in any JSON object, the last value of a name counts.
                    match cells.0.iter_mut().find(|(column, _)| *column == name) {
                        Some(cell) => cell.1 = value,
                        None => cells.0.push((name, value)),
                    }
                }
                Ok(cells)
            }
        }

        deserializer.deserialize_map(Reader)
    }
}
