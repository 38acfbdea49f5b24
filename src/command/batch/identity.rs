//! What makes a job the same job: its inputs as they are, and what is asked of the model.

use std::path::Path;
use std::time::SystemTime;
use std::{fs, io};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::command::input;
use crate::message::RequestParams;

/// The identity of a job, as its journal begins with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// Of the program.
    pub version: String,
    pub inputs: Vec<Input>,
    /// `--column`.
    pub column: Option<String>,
    /// Who captions: the model, or the topic of a fleet.
    pub model: String,
    pub dtype: String,
    pub prompt: Option<String>,
    pub params: RequestParams,
}

/// An input as it was when the job began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// As it was named.
    pub name: String,
    /// Files: more than one, or none, for a folder.
    pub files: u64,
    /// Their bytes, together.
    pub bytes: u64,
    /// When the last of them was changed.
    pub modified: Option<Timestamp>,
    /// Of names, sizes and times of the files of a folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

impl Input {
    /// What an argument names now; what is no local file has only its name.
    ///
    /// # Errors
    /// A folder or a file cannot be looked at.
    pub fn of(argument: &str) -> io::Result<Self> {
        let mut input = Self { name: argument.to_owned(), files: 0, bytes: 0, modified: None, digest: None };
        let path = Path::new(argument);
        if path.is_dir() {
            let mut digest = Sha256::new();
            for image in input::images(vec![argument.to_owned()]) {
                let image = image?;
                let (bytes, modified) = input.add(Path::new(&image))?;
                digest.update(format!("{image}\0{bytes}\0{modified}\n"));
            }
            let first = digest.finalize().first_chunk().copied().unwrap_or_default();
            input.digest = Some(format!("{:016x}", u64::from_be_bytes(first)));
        } else if path.exists() {
            input.add(path)?;
        }
        Ok(input)
    }

    fn add(&mut self, path: &Path) -> io::Result<(u64, Timestamp)> {
        let metadata = fs::metadata(path)?;
        let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        let modified = Timestamp::try_from(modified).unwrap_or(Timestamp::UNIX_EPOCH);
        self.files += 1;
        self.bytes += metadata.len();
        self.modified = self.modified.max(Some(modified));
        Ok((metadata.len(), modified))
    }
}

impl Identity {
    /// What is not as it was, for people; nothing for the same job.
    pub fn differences(&self, then: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, now: String, then: String| {
            if now != then {
                found.push(format!("{what}: {now} now, {then} then"));
            }
        };
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".into());
        let params = |params: &RequestParams| serde_json::to_string(params).unwrap_or_default();
        compare("version", self.version.clone(), then.version.clone());
        compare("model", self.model.clone(), then.model.clone());
        compare("dtype", self.dtype.clone(), then.dtype.clone());
        compare("prompt", or_none(&self.prompt), or_none(&then.prompt));
        compare("parameters", params(&self.params), params(&then.params));
        compare("--column", or_none(&self.column), or_none(&then.column));
        let names = |inputs: &[Input]| inputs.iter().map(|input| input.name.as_str()).collect::<Vec<_>>().join(" ");
        compare("inputs", names(&self.inputs), names(&then.inputs));
        if names(&self.inputs) == names(&then.inputs) {
            for (now, then) in self.inputs.iter().zip(&then.inputs) {
                if now.files != then.files {
                    compare(&now.name, format!("{} images", now.files), format!("{} images", then.files));
                } else if now.bytes != then.bytes {
                    compare(&now.name, format!("{} bytes", now.bytes), format!("{} bytes", then.bytes));
                } else if now.modified != then.modified {
                    let time = |input: &Input| input.modified.map_or_else(String::new, |time| time.to_string());
                    compare(&now.name, format!("of {}", time(now)), format!("of {}", time(then)));
                } else if now != then {
                    compare(&now.name, "other files".into(), "others".into());
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(folder: &Path) -> Identity {
        Identity {
            version: "1.0.0".into(),
            inputs: vec![Input::of(&folder.display().to_string()).unwrap()],
            column: None,
            model: "demo".into(),
            dtype: "auto".into(),
            prompt: None,
            params: RequestParams::default(),
        }
    }

    #[test]
    fn a_difference_is_named_with_both_of_its_sides_and_the_same_job_has_none() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.png"), "12").unwrap();
        let then = identity(folder.path());
        assert_eq!(identity(folder.path()).differences(&then), [""; 0]);
        let read: Identity = serde_json::from_str(&serde_json::to_string(&then).unwrap()).unwrap();
        assert_eq!(read, then);
        let now = Identity {
            model: "other".into(),
            params: RequestParams { num_beams: Some(3), ..RequestParams::default() },
            ..then.clone()
        };
        let expected = ["model: other now, demo then", r#"parameters: {"num_beams":3} now, {} then"#];
        assert_eq!(now.differences(&then), expected);
    }

    #[test]
    fn a_changed_file_a_new_one_and_a_renamed_one_are_other_inputs() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        fs::write(file("a.png"), "12").unwrap();
        let then = identity(folder.path());
        fs::write(file("a.png"), "123").unwrap();
        assert!(identity(folder.path()).differences(&then)[0].ends_with(": 3 bytes now, 2 bytes then"));
        fs::write(file("b.png"), "1").unwrap();
        assert!(identity(folder.path()).differences(&then)[0].ends_with(": 2 images now, 1 images then"));
        let then = identity(folder.path());
        fs::rename(file("b.png"), file("c.png")).unwrap();
        assert_eq!(identity(folder.path()).differences(&then).len(), 1);
    }
}
