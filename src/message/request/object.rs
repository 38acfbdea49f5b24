//! Objects of a store: `s3://bucket/key`, `gs://bucket/key`, `az://container/key`.

use std::fmt;

/// Longest key that the stores know (S3 and Google Cloud Storage; Azure allows as many characters), in bytes.
const MAX_KEY: usize = 1024;

/// Longest name of a bucket (Google Cloud Storage, with dots), in bytes.
const MAX_BUCKET: usize = 222;

/// Whose protocol a store speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreKind {
    /// Amazon S3, and what speaks like it.
    S3,
    /// Google Cloud Storage.
    Google,
    /// Azure Blob Storage.
    Azure,
}

impl StoreKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::S3, Self::Google, Self::Azure];

    /// What addresses begin with, without `://`.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Google => "gs",
            Self::Azure => "az",
        }
    }

    /// The store that a scheme, in any case of letters, stands for.
    pub(super) fn of(scheme: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| scheme.eq_ignore_ascii_case(kind.scheme()))
    }
}

/// One object of a store. The key is meant as it is written: nothing in it is decoded, as in the stores' own tools.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectRef {
    /// Whose store.
    pub kind: StoreKind,
    /// The bucket, or Azure's container.
    pub bucket: String,
    /// The key: not empty, and without empty parts, `.`, `..` and control characters between its slashes.
    pub key: String,
}

impl ObjectRef {
    /// What stands behind `scheme://`.
    pub(super) fn read(kind: StoreKind, rest: &str) -> Result<Self, String> {
        let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
        check_bucket(bucket)?;
        if key.is_empty() {
            return Err("an address of a bucket without a key".into());
        }
        check_key(key)?;
        Ok(Self { kind, bucket: bucket.into(), key: key.into() })
    }

    /// The bucket with its scheme, `s3://bucket`.
    pub fn store(&self) -> String {
        format!("{}://{}", self.kind.scheme(), self.bucket)
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}/{}", self.kind.scheme(), self.bucket, self.key)
    }
}

/// A bucket, or what lies below a folder of it: `s3://bucket`, `s3://bucket/folder/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectRoot {
    /// Whose store.
    pub kind: StoreKind,
    /// The bucket, or Azure's container.
    pub bucket: String,
    /// The folder, without a slash at its end; empty for the whole bucket.
    folder: String,
}

impl ObjectRoot {
    /// Reads a root as a setting names it.
    ///
    /// # Errors
    /// It is none; the text says why.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").unwrap_or_default();
        let kind = StoreKind::of(scheme).ok_or("no address of a bucket (s3://…, gs://…, az://…)")?;
        let (bucket, folder) = rest.split_once('/').unwrap_or((rest, ""));
        check_bucket(bucket)?;
        let folder = folder.strip_suffix('/').unwrap_or(folder);
        if !folder.is_empty() {
            check_key(folder)?;
        }
        Ok(Self { kind, bucket: bucket.into(), folder: folder.into() })
    }

    /// Whether an object lies below it.
    pub fn contains(&self, object: &ObjectRef) -> bool {
        let below = |key: &str| key.strip_prefix(&*self.folder).is_some_and(|rest| rest.starts_with('/'));
        (self.kind, &self.bucket) == (object.kind, &object.bucket) && (self.folder.is_empty() || below(&object.key))
    }
}

fn check_bucket(bucket: &str) -> Result<(), String> {
    let plain = bucket.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if plain && (3..=MAX_BUCKET).contains(&bucket.len()) {
        return Ok(());
    }
    Err("an address of a bucket whose name has not 3 or more letters, digits, dots, hyphens and underscores".into())
}

fn check_key(key: &str) -> Result<(), String> {
    if key.len() > MAX_KEY {
        return Err(format!("an address whose key has over {MAX_KEY} bytes"));
    }
    // Whoever normalizes a path would read another object than the one that was looked at.
    if key.split('/').any(|part| matches!(part, "" | "." | "..")) || key.chars().any(char::is_control) {
        return Err("an address whose key has an empty part, `.`, `..` or control characters".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(text: &str) -> Result<ObjectRef, String> {
        let (scheme, rest) = text.split_once("://").unwrap();
        ObjectRef::read(StoreKind::of(scheme).unwrap(), rest)
    }

    #[test]
    fn a_key_is_meant_as_it_is_written() {
        for text in ["s3://photos/a b/100%25.jpg", "gs://my.bucket/é?x#y", "az://c-1/k=1&l"] {
            let read = object(text).unwrap();
            assert_eq!(read.to_string(), text);
            assert_eq!(read.key, text.splitn(4, '/').nth(3).unwrap());
        }
    }

    #[test]
    fn what_is_no_object_is_refused_with_the_reason() {
        let long = format!("s3://photos/{}", "k".repeat(MAX_KEY + 1));
        for (text, why) in [
            ("s3://photos", "without a key"),
            ("s3://photos/", "without a key"),
            ("s3:///key", "bucket whose name"),
            ("s3://ab/key", "bucket whose name"),
            ("s3://user:pw@bucket/key", "bucket whose name"),
            ("s3://host.example:9000/key", "bucket whose name"),
            ("s3://photos//key", "an empty part"),
            ("s3://photos/a/../key", "`..`"),
            ("s3://photos/./key", "`.`"),
            ("s3://photos/folder/", "an empty part"),
            ("s3://photos/a\nb", "control characters"),
            (&long, "over 1024 bytes"),
        ] {
            let error = object(text).unwrap_err();
            assert!(error.contains(why), "{text:?} gave: {error}");
        }
    }

    #[test]
    fn a_root_holds_what_lies_below_it_and_nothing_that_is_called_alike() {
        for (root, inside, outside) in [
            ("s3://photos", "s3://photos/a.jpg", "s3://photos2/a.jpg"),
            ("s3://photos/", "s3://photos/a/b.jpg", "gs://photos/a/b.jpg"),
            ("S3://photos/2024", "s3://photos/2024/a.jpg", "s3://photos/2024-private/a.jpg"),
            ("gs://photos/2024/06/", "gs://photos/2024/06/a.jpg", "gs://photos/2024/a.jpg"),
            ("az://photos/2024", "az://photos/2024/x/a.jpg", "az://photos/2024"),
        ] {
            let parsed = ObjectRoot::parse(root).unwrap();
            assert!(parsed.contains(&object(inside).unwrap()), "{root} {inside}");
            assert!(!parsed.contains(&object(outside).unwrap()), "{root} {outside}");
        }
        for text in ["", "photos", "https://photos/", "s3://", "s3://photos/b/../c"] {
            assert!(ObjectRoot::parse(text).is_err(), "{text:?}");
        }
    }
}
