//! The bound of a worker's memory, part by part. `docs/deploy.md` has the same list.

use std::fmt::Write as _;

use bytesize::ByteSize;

use super::Item;
use crate::caption::DeviceSpec;
use crate::command::models;
use crate::kafka::{producer_queue_bytes, read_ahead_bytes};
use crate::pipeline::shares;
use crate::settings::Settings;

/// Adds up what a worker may take. `parameters` is how many its models have, where that is known.
pub fn item(settings: &Settings, parameters: Option<u64>) -> Item {
    let (flow, decode, kafka) = (&settings.flow, &settings.decode, &settings.kafka);
    let threads = match decode.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let threads = match settings.endpoint.listen {
        Some(_) => {
            let (stream, endpoint) = shares(threads, settings.endpoint.share);
            stream + endpoint
        }
        None => threads,
    };
    let mut parts = vec![
        (flow.max_message_bytes.as_u64(), "messages (flow.max_message_bytes)"),
        (flow.max_image_bytes.as_u64(), "images (flow.max_image_bytes)"),
        (
            read_ahead_bytes(kafka),
            "messages read ahead (kafka.prefetch, and one more fetch for each input topic and the retries)",
        ),
        (producer_queue_bytes(kafka), "records that are not acknowledged"),
        (
            decode.max_memory.as_u64().saturating_mul(threads as u64),
            "decoding (decode.max_memory for each of decode.threads, which only extreme images need)",
        ),
        (settings.model.caption_cache.as_u64(), "captions known already (model.caption_cache)"),
        (settings.fetch.cache.as_u64(), "bodies that hosts let be kept (fetch.cache)"),
    ];
    // A wrong list of devices is told elsewhere.
    let devices = models::devices(&settings.model).unwrap_or_default();
    let gpus = devices.iter().filter(|device| matches!(device, DeviceSpec::Cuda(_))).count();
    let on_host = Device::new(settings, parameters, false);
    if gpus < devices.len() {
        parts.push((on_host.state, "what the decoder remembers of rows under way (model.max_state)"));
        parts.extend(on_host.weights.map(|weights| (weights, "weights")));
    }
    let sum = parts.iter().fold(0u64, |sum, (bytes, _)| sum.saturating_add(*bytes));
    let list: Vec<_> = parts.iter().map(|(bytes, what)| format!("{} of {what}", ByteSize::b(*bytes))).collect();
    let mut text = format!("{} at most: {}", ByteSize::b(sum), list.join(", "));
    if gpus < devices.len() && on_host.weights.is_none() {
        text += "; the weights, whose size is not known, come on top";
    }
    if gpus > 0 {
        let Device { state, weights } = Device::new(settings, parameters, true);
        let weights =
            weights.map_or("weights of unknown size".to_owned(), |w| format!("{} of weights", ByteSize::b(w)));
        // Writing to a string can't fail.
        let _ = write!(text, "; on each GPU {weights} and {} for rows under way (model.max_state)", ByteSize::b(state));
    }
    Item::ok("memory", text + "; the program and the model's activations take some 300 MiB more")
}

/// What the models take on one device.
struct Device {
    state: u64,
    weights: Option<u64>,
}

impl Device {
    fn new(settings: &Settings, parameters: Option<u64>, gpu: bool) -> Self {
        let model = &settings.model;
        // The canary remembers rows of its own.
        let engines = model.replicas as u64 * if settings.canary.source.is_some() { 2 } else { 1 };
        let bytes = match model.dtype.as_str() {
            "f32" => 4,
            "auto" if !gpu => 4,
            _ => 2,
        };
        Self {
            state: model.state_limit(gpu).as_u64().saturating_mul(engines),
            weights: parameters.map(|parameters| parameters * bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::config::BlipConfig;

    fn text(devices: &[&str], parameters: Option<u64>) -> String {
        let mut settings = Settings::default();
        settings.decode.threads = 2;
        settings.model.devices = devices.iter().map(|&device| device.to_owned()).collect();
        item(&settings, parameters).text
    }

    #[test]
    fn a_decoding_thread_that_only_the_endpoint_has_is_counted() {
        let mut settings = Settings::default();
        settings.decode.threads = 1;
        let alone = item(&settings, None).text;
        assert!(alone.contains("512.0 MiB of decoding"), "{alone}");
        settings.endpoint.listen = Some(([127, 0, 0, 1], 0).into());
        let both = item(&settings, None).text;
        assert!(both.contains("1.0 GiB of decoding"), "{both}");
    }

    #[test]
    fn a_canary_remembers_as_much_as_the_captioner() {
        let mut settings = Settings::default();
        settings.model.devices = vec!["cpu".into()];
        let of_one = item(&settings, None).text;
        assert!(of_one.contains("1.0 GiB of what the decoder remembers"), "{of_one}");
        settings.canary.source = Some("org/name".into());
        let of_both = item(&settings, None).text;
        assert!(of_both.contains("2.0 GiB of what the decoder remembers"), "{of_both}");
    }

    #[test]
    fn the_memory_is_the_sum_of_its_parts() {
        let base = BlipConfig::base().parameters();
        let mib = 64 + 512 + 2 * 16 + 32 + 2 * 512 + 32 + 1024;
        let sum = |more: u64| format!("{} at most: 64.0 MiB of messages", ByteSize::b((mib << 20) + more));
        let on_cpu = text(&["cpu"], Some(base));
        assert!(on_cpu.starts_with(&sum(base * 4)), "{on_cpu}");
        let unknown = text(&["auto"], None);
        assert!(unknown.starts_with(&sum(0)) && unknown.contains("not known"), "{unknown}");
        let on_gpu = text(&["cuda:0", "cuda:1"], Some(base));
        assert!(on_gpu.contains(&format!("on each GPU {} of weights", ByteSize::b(base * 2))), "{on_gpu}");
        assert!(on_gpu.contains("16.0 GiB for rows under way"), "{on_gpu}");
        assert!(!on_gpu.contains("remembers"), "{on_gpu}");
    }
}
