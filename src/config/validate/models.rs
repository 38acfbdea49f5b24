//! The models, where they run, and how captions are generated.

use std::collections::BTreeSet;

use super::Check;
use crate::settings::{Answerer, Canary, Filter, Kafka, Model};

const DTYPES: [&str; 5] = ["auto", "f32", "bf16", "f16", "int8"];
const BACKENDS: [&str; 8] =
    ["auto", "native", "native:plain", "native:avx2", "native:avx512", "onednn", "fused", "candle"];

impl Check {
    pub(super) fn model(&mut self, model: &Model) {
        self.not_empty("model.source", &model.source);
        self.devices(&model.devices);
        self.at_least_one("model.replicas", model.replicas as u64);
        self.one_of("model.dtype", &model.dtype, &DTYPES);
        self.one_of("model.backend", &model.backend, &BACKENDS);
        if let Some(endpoint) = &model.hub_endpoint {
            let url = url::Url::parse(endpoint).ok();
            let http = url.is_some_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
            self.need(http, &["model.hub_endpoint"], "must be an http or https address");
        }
        self.at_least_one("model.max_new_tokens", model.max_new_tokens as u64);
        self.at_least_one("model.max_state", model.max_state.map_or(1, |size| size.as_u64()));
        self.need(
            model.min_new_tokens <= model.max_new_tokens,
            &["model.min_new_tokens", "model.max_new_tokens"],
            format!(
                "model.min_new_tokens ({}) must not be over model.max_new_tokens ({})",
                model.min_new_tokens, model.max_new_tokens
            ),
        );
        self.need(
            model.max_new_tokens <= model.max_new_tokens_limit,
            &["model.max_new_tokens", "model.max_new_tokens_limit"],
            format!(
                "model.max_new_tokens ({}) must not be over model.max_new_tokens_limit ({})",
                model.max_new_tokens, model.max_new_tokens_limit
            ),
        );
        self.generation(model);
    }

    fn generation(&mut self, model: &Model) {
        let positive = [("repetition_penalty", model.repetition_penalty), ("temperature", model.temperature)];
        for (name, value) in positive {
            // As the captioner takes it.
            let holds = (value as f32).is_finite() && value as f32 > 0.0;
            self.need(holds, &[&format!("model.{name}")], format!("must be a number above 0, not {value}"));
        }
        let top_p = model.top_p;
        self.need(
            top_p as f32 > 0.0 && top_p <= 1.0,
            &["model.top_p"],
            format!("must be above 0 and at most 1, not {top_p}"),
        );
        self.need((model.length_penalty as f32).is_finite(), &["model.length_penalty"], "must be a finite number");
        let (beams, captions, limit) = (model.num_beams, model.num_return_sequences, model.sequences_limit);
        for (name, value) in [("num_beams", beams), ("num_return_sequences", captions)] {
            let message = format!("must be from 1 to model.sequences_limit ({limit}), not {value}");
            self.need((1..=limit).contains(&value), &[&format!("model.{name}"), "model.sequences_limit"], message);
        }
        self.need(
            !model.do_sample || beams == 1,
            &["model.do_sample", "model.num_beams"],
            format!("model.do_sample draws tokens, and model.num_beams ({beams}) searches: one of them at a time"),
        );
        self.need(
            model.do_sample || captions <= beams,
            &["model.num_return_sequences", "model.num_beams", "model.do_sample"],
            format!("{captions} captions of an image take model.do_sample, or as many model.num_beams (now {beams})"),
        );
    }

    fn devices(&mut self, devices: &[String]) {
        let key = &["model.devices"];
        self.need(!devices.is_empty(), key, "must name at least one device; \"auto\" finds them");
        for device in devices {
            let message = format!("{device:?} is no device: auto, all, cpu, cuda:0, cuda:1, …");
            self.need(is_device(device), key, message);
        }
        let auto = devices.iter().any(|device| device == "auto" || device == "all");
        self.need(!auto || devices.len() == 1, key, "\"auto\" and \"all\" stand alone, since they take every GPU");
        let distinct: BTreeSet<_> = devices.iter().collect();
        let message = "names a device twice; model.replicas sets the copies on each";
        self.need(auto || distinct.len() == devices.len(), key, message);
    }

    pub(super) fn filter(&mut self, filter: &Filter) {
        let threshold = filter.threshold;
        let message = format!("must be a probability from 0 to 1, not {threshold}");
        self.need((0.0..=1.0).contains(&threshold), &["filter.threshold"], message);
        self.at_least_one("filter.texts_limit", filter.texts_limit as u64);
        if let Some(source) = &filter.source {
            self.not_empty("filter.source", source);
        }
    }

    pub(super) fn canary(&mut self, canary: &Canary, kafka: &Kafka) {
        let share = canary.share;
        let message = format!("must be more than 0 and at most 1, not {share}");
        self.need(share > 0.0 && share <= 1.0, &["canary.share"], message);
        self.need(
            canary.source.is_none() || kafka.canary_topic.is_some(),
            &["kafka.canary_topic", "canary.source"],
            "canary.source needs kafka.canary_topic, the topic for what that model writes",
        );
        if let Some(source) = &canary.source {
            self.not_empty("canary.source", source);
        }
    }

    pub(super) fn answerer(&mut self, answerer: &Answerer, model: &Model) {
        self.at_least_one("answerer.questions_limit", answerer.questions_limit as u64);
        for (name, value, limit_name, limit) in [
            ("max_new_tokens", answerer.max_new_tokens, "max_new_tokens_limit", model.max_new_tokens_limit),
            ("num_beams", answerer.num_beams, "sequences_limit", model.sequences_limit),
        ] {
            let (key, limit_key) = (format!("answerer.{name}"), format!("model.{limit_name}"));
            self.at_least_one(&key, value as u64);
            // Who has no answerer did not set its defaults, and may have any limits.
            let message = format!("{key} ({value}) must not be over {limit_key} ({limit})");
            self.need(answerer.source.is_none() || value <= limit, &[&key, &limit_key], message);
        }
        if let Some(source) = &answerer.source {
            self.not_empty("answerer.source", source);
        }
    }
}

fn is_device(device: &str) -> bool {
    let gpu = device.strip_prefix("cuda:").is_some_and(|number| number.parse::<u16>().is_ok());
    gpu || matches!(device, "auto" | "all" | "cpu")
}

#[cfg(test)]
mod tests {
    use crate::config::validate::settings;
    use crate::settings::Settings;

    #[test]
    fn what_is_wrong_with_answers_is_told_by_its_key() {
        let problem = |change: fn(&mut Settings)| {
            let mut wrong = Settings::default();
            wrong.answerer.source = Some("org/name".into());
            change(&mut wrong);
            let problems = settings(&wrong);
            assert_eq!(problems.len(), 1);
            (problems[0].keys[0].clone(), problems[0].message.clone())
        };
        for (change, key, why) in [
            ((|s| s.answerer.questions_limit = 0) as fn(&mut Settings), "answerer.questions_limit", "at least 1"),
            (|s| s.answerer.max_new_tokens = 0, "answerer.max_new_tokens", "at least 1"),
            (|s| s.answerer.num_beams = 9, "answerer.num_beams", "(9) must not be over model.sequences_limit (8)"),
            (|s| s.answerer.max_new_tokens = 201, "answerer.max_new_tokens", "over model.max_new_tokens_limit (200)"),
            (|s| s.answerer.source = Some(" ".into()), "answerer.source", "must not be empty"),
        ] {
            let (found, message) = problem(change);
            assert!(found == key && message.contains(why), "{found}: {message}");
        }
        let mut narrow = Settings::default();
        (narrow.model.max_new_tokens, narrow.model.max_new_tokens_limit) = (10, 10);
        assert!(settings(&narrow).is_empty(), "nobody asks for answers");
    }

    #[test]
    fn a_canary_needs_a_topic_of_its_own_and_a_share() {
        let problems = |change: fn(&mut Settings)| {
            let mut wrong = Settings::default();
            wrong.canary.source = Some("org/name".into());
            wrong.kafka.canary_topic = Some("canary".into());
            change(&mut wrong);
            settings(&wrong).into_iter().map(|wrong| (wrong.keys[0].clone(), wrong.message)).collect::<Vec<_>>()
        };
        assert!(problems(|_| {}).is_empty());
        assert!(problems(|s| s.canary.share = 1.0).is_empty());
        for (change, key, why) in [
            ((|s| s.kafka.canary_topic = None) as fn(&mut Settings), "kafka.canary_topic", "canary.source needs"),
            (|s| s.kafka.canary_topic = Some("blipstream.captions".into()), "kafka.canary_topic", "a topic of its own"),
            (|s| s.kafka.canary_topic = Some("blipstream.requests".into()), "kafka.canary_topic", "is also an input"),
            (|s| s.canary.share = 0.0, "canary.share", "more than 0 and at most 1, not 0"),
            (|s| s.canary.share = 1.5, "canary.share", "not 1.5"),
            (|s| s.canary.share = f64::NAN, "canary.share", "not NaN"),
            (|s| s.canary.source = Some(" ".into()), "canary.source", "must not be empty"),
        ] {
            let found = problems(change);
            let [(found, message)] = &found[..] else { panic!("{key}: {found:?}") };
            assert!(found == key && message.contains(why), "{found}: {message}");
        }
    }
}
