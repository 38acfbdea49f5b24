//! A JSON tree that borrows from its text, so that an inline image is not copied on its way through the parser.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap, Serializer};
use serde_json::{Map, Number, Value};

/// Most JSON values in one message. A value of two bytes in the text takes some forty in the tree, so that without a
/// bound a message could take twenty times its permit; this is 250 columns at the default of 1,000 rows.
pub(super) const MAX_VALUES: usize = 250_000;

/// A JSON value. Text is borrowed where it needed no unescaping.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Json<'a> {
    Null,
    Bool(bool),
    Number(Number),
    Text(Cow<'a, str>),
    List(Vec<Json<'a>>),
    Object(Fields<'a>),
}

/// The fields of an object in their order; of a repeated name the last one counts.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Fields<'a>(pub(super) Vec<(Cow<'a, str>, Json<'a>)>);

impl<'a> Json<'a> {
    /// Reads one JSON value that fills the whole text.
    pub(super) fn read(text: &'a str) -> serde_json::Result<Self> {
        let mut reader = serde_json::Deserializer::from_str(text);
        let left = Cell::new(MAX_VALUES);
        let value = Node { left: &left }.deserialize(&mut reader)?;
        reader.end()?;
        Ok(value)
    }

    /// The same tree over a value that was read already.
    pub(super) fn of(value: &'a Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(value) => Self::Bool(*value),
            Value::Number(number) => Self::Number(number.clone()),
            Value::String(text) => Self::Text(Cow::Borrowed(text)),
            Value::Array(items) => Self::List(items.iter().map(Self::of).collect()),
            Value::Object(map) => Self::Object(Fields::of(map)),
        }
    }

    /// What it is, in words for an error.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "true or false",
            Self::Number(_) => "a number",
            Self::Text(_) => "a string",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }

    /// An owned copy.
    pub(super) fn to_value(&self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Bool(value) => Value::Bool(*value),
            Self::Number(number) => Value::Number(number.clone()),
            Self::Text(text) => Value::String(text.to_string()),
            Self::List(items) => Value::Array(items.iter().map(Self::to_value).collect()),
            Self::Object(fields) => Value::Object(fields.to_map()),
        }
    }
}

impl<'a> Fields<'a> {
    /// The fields of an object that was read already.
    pub(super) fn of(map: &'a Map<String, Value>) -> Self {
        Self(map.iter().map(|(name, value)| (Cow::Borrowed(name.as_str()), Json::of(value))).collect())
    }

    /// The value of a field; `null` is as good as absent.
    pub(super) fn get(&self, name: &str) -> Option<&Json<'a>> {
        let (_, value) = self.0.iter().rev().find(|(key, _)| key == name)?;
        (*value != Json::Null).then_some(value)
    }

    /// An owned copy.
    pub(super) fn to_map(&self) -> Map<String, Value> {
        self.0.iter().map(|(name, value)| (name.to_string(), value.to_value())).collect()
    }
}

impl serde::Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Number(number) => number.serialize(serializer),
            Self::Text(text) => serializer.serialize_str(text),
            Self::List(items) => serializer.collect_seq(items),
            Self::Object(fields) => fields.serialize(serializer),
        }
    }
}

impl serde::Serialize for Fields<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// Reads one value, as long as there are any `left`.
#[derive(Clone, Copy)]
struct Node<'c> {
    left: &'c Cell<usize>,
}

impl<'a> DeserializeSeed<'a> for Node<'_> {
    type Value = Json<'a>;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Json<'a>, D::Error> {
        let Some(left) = self.left.get().checked_sub(1) else {
            return Err(D::Error::custom(format!("more than {MAX_VALUES} JSON values in one message")));
        };
        self.left.set(left);
        deserializer.deserialize_any(self)
    }
}

impl<'a> Visitor<'a> for Node<'_> {
    type Value = Json<'a>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Json<'a>, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Json<'a>, E> {
        Ok(Json::Bool(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Json<'a>, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Json<'a>, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Json<'a>, E> {
        Ok(Number::from_f64(value).map_or(Json::Null, Json::Number))
    }

    fn visit_borrowed_str<E: Error>(self, text: &'a str) -> Result<Json<'a>, E> {
        Ok(Json::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Json<'a>, E> {
        Ok(Json::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'a>>(self, mut list: A) -> Result<Json<'a>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Json::List(items))
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Json<'a>, A::Error> {
        let mut fields = Vec::new();
        while let Some(name) = map.next_key_seed(self)? {
            let Json::Text(name) = name else { return Err(A::Error::custom("a name that is no string")) };
            fields.push((name, map.next_value_seed(self)?));
        }
        Ok(Json::Object(Fields(fields)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_without_escapes_is_borrowed() {
        let text = r#"{"a":"plain","b":"esc\naped"}"#;
        let Json::Object(fields) = Json::read(text).unwrap() else { panic!("not an object") };
        assert!(matches!(fields.get("a"), Some(Json::Text(Cow::Borrowed("plain")))));
        assert!(matches!(fields.get("b"), Some(Json::Text(Cow::Owned(_)))));
    }

    #[test]
    fn a_repeated_name_means_its_last_value_and_null_means_absent() {
        let Json::Object(fields) = Json::read(r#"{"a":1,"a":2,"b":null}"#).unwrap() else { panic!("not an object") };
        assert_eq!(fields.get("a"), Some(&Json::Number(2.into())));
        assert_eq!(fields.get("b"), None);
    }

    #[test]
    fn more_values_than_the_limit_are_refused_before_they_are_built() {
        let many = format!("[{}0]", "0,".repeat(MAX_VALUES));
        assert!(Json::read(&many).unwrap_err().to_string().contains("more than 250000"));
        let few = format!("[{}0]", "0,".repeat(MAX_VALUES - 2));
        assert!(Json::read(&few).is_ok());
    }

    #[test]
    fn deep_nesting_is_refused_without_overflowing_the_stack() {
        assert!(Json::read(&"[".repeat(1_000_000)).unwrap_err().to_string().contains("recursion"));
    }

    proptest! {
        #[test]
        fn reads_and_writes_what_serde_json_reads(text in "[\\[\\]{}:,\"0-9a-z\\\\ .-]{0,40}") {
            let ours = Json::read(&text).map(|json| json.to_value());
            let theirs = serde_json::from_str::<Value>(&text);
            prop_assert_eq!(ours.is_ok(), theirs.is_ok());
            if let (Ok(ours), Ok(theirs)) = (ours, theirs) {
                prop_assert_eq!(&ours, &theirs);
                prop_assert_eq!(&Json::of(&ours).to_value(), &theirs);
                let again = serde_json::to_string(&Json::read(&text).unwrap()).unwrap();
                prop_assert_eq!(serde_json::from_str::<Value>(&again).unwrap(), theirs);
            }
        }
    }
}
