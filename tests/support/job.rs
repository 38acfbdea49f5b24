//! A job of `blipstream batch --kafka`, beside a broker.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Child;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::client::eventually;
use super::flow::Flow;
use super::place::{Place, finish};
use super::ran::Ran;

/// A job of a list, beside a broker.
pub struct Job {
    pub flow: Flow,
    pub place: Place,
}

impl Job {
    pub fn new(flow: Flow) -> Self {
        let place = Place::new();
        place.write("config.toml", toml::to_string(&flow.settings).unwrap());
        Self { flow, place }
    }

    /// Of so many pictures, each another one, in `list.csv`.
    pub fn of_pictures(flow: Flow, count: u32) -> Self {
        let job = Self::new(flow);
        job.place.list("list.csv", count);
        job
    }

    pub fn spawn(&self, more: &[&str]) -> Child {
        let always = ["--output", "out.jsonl", "--kafka", "--config", "config.toml"];
        self.place.batch(&[&always[..], more].concat()).spawn().unwrap()
    }

    pub fn run(&self, more: &[&str]) -> Ran {
        finish(self.spawn(more))
    }

    /// The topics of captions and of dead letters.
    pub fn answers(&self) -> (&str, &str) {
        (&self.flow.settings.kafka.captions_topic, &self.flow.settings.kafka.dead_letter_topic)
    }

    pub fn requests(&self) -> usize {
        self.flow.counter().records(self.flow.requests())
    }

    pub async fn until_requested(&self, count: usize) {
        let counter = self.flow.counter();
        eventually("the requests are there", || counter.records(self.flow.requests()) >= count).await;
        assert_eq!(counter.records(self.flow.requests()), count);
    }

    /// Every request is answered, by this moment's workers.
    pub async fn until_all_answered(&self) {
        let counter = self.flow.counter();
        let (captions, dead_letters) = self.answers();
        let answers = || counter.records(captions) + counter.records(dead_letters);
        eventually("every request is answered", || answers() == counter.records(self.flow.requests())).await;
    }

    pub fn rows(&self) -> Vec<Value> {
        self.place.rows("out.jsonl")
    }

    pub fn codes(&self) -> Vec<String> {
        self.rows().iter().map(|row| row["error_code"].as_str().unwrap_or("-").to_owned()).collect()
    }

    /// As [`Job::assert_captioned`], and the journal has each row once.
    pub fn assert_complete(&self, count: u32) {
        self.assert_captioned(count);
        assert_eq!(self.place.recorded("out.jsonl"), count as usize, "a row was recorded twice");
    }

    /// The pictures of `list.csv` have a row each, in their order, with the caption of just that picture.
    pub fn assert_captioned(&self, count: u32) {
        let records = self.flow.read(self.answers().0);
        let records =
            records.iter().filter_map(|record| serde_json::from_slice::<Value>(record.payload.as_ref()?).ok());
        let captions: BTreeMap<String, String> = records
            .filter_map(|record| Some((record["image"]["sha256"].as_str()?.into(), record["text"].as_str()?.into())))
            .collect();
        let rows = self.rows();
        assert_eq!(rows.len(), count as usize);
        for (number, row) in rows.iter().enumerate() {
            assert_eq!(row["number"], number.to_string(), "{row}");
            let picture = std::fs::read(self.place.path(&format!("images/{number}.png"))).unwrap();
            let mut sha256 = String::new();
            for byte in Sha256::digest(picture) {
                write!(sha256, "{byte:02x}").unwrap();
            }
            assert_eq!((&row["image_sha256"], &row["text"]), (&json!(sha256), &json!(captions[&sha256])), "{row}");
        }
    }
}
