//! The BLIP of candle-transformers, measured as `blipstream bench captioner` measures ours, for `make bench`.
//!
//! ```text
//! cargo run --example candle_blip -- MODEL [TOKENS] [SECONDS]
//! ```
//!
//! It captions one image at a time: with more its decoder fails.

use std::path::Path;
use std::time::Instant;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::blip::{BlipForConditionalGeneration, Config};

const WORDS: &str = "text_decoder.bert.embeddings.word_embeddings.weight";
const DECODER: &str = "text_decoder.cls.predictions.decoder.weight";
/// The token that a caption begins with.
const BEGIN: u32 = 30522;

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("name the folder of a model")?;
    let tokens: usize = arguments.next().map_or(Ok(20), |text| text.parse())?;
    let seconds: f64 = arguments.next().map_or(Ok(8.0), |text| text.parse())?;
    let begun = Instant::now();
    let mut model = load(Path::new(&folder))?;
    let image = Tensor::rand(-1f32, 1f32, (1, 3, 384, 384), &Device::Cpu)?;
    caption(&mut model, &image, tokens)?;
    let first = begun.elapsed().as_secs_f64();
    let (begun, mut images, mut encode) = (Instant::now(), 0, 0.0);
    while images == 0 || begun.elapsed().as_secs_f64() < seconds {
        encode += caption(&mut model, &image, tokens)?;
        images += 1;
    }
    let each = begun.elapsed().as_secs_f64() / f64::from(images);
    let encode = encode / f64::from(images);
    say(&serde_json::json!({
        "first_caption": first,
        "peak_memory": peak_memory(),
        "batches": [{"batch": 1, "images_per_second": 1.0 / each, "encode": encode, "decode": each - encode}],
    }));
    Ok(())
}

/// A model of base's sizes.
fn load(folder: &Path) -> Result<BlipForConditionalGeneration> {
    let mut tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)?;
    // It does not share the embedding with the head by itself.
    if !tensors.contains_key(DECODER) {
        tensors.insert(DECODER.into(), tensors[WORDS].clone());
    }
    let mut config = Config::image_captioning_large();
    config.text_config.encoder_hidden_size = 768;
    let vision = &mut config.vision_config;
    (vision.hidden_size, vision.intermediate_size) = (768, 3072);
    (vision.num_hidden_layers, vision.num_attention_heads) = (12, 12);
    BlipForConditionalGeneration::new(&config, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

/// Returns the seconds that the encoder took.
fn caption(model: &mut BlipForConditionalGeneration, image: &Tensor, tokens: usize) -> Result<f64> {
    model.reset_kv_cache();
    let begun = Instant::now();
    let encoded = image.apply(model.vision_model())?;
    let encode = begun.elapsed().as_secs_f64();
    let mut latest = BEGIN;
    for _ in 0..tokens {
        let logits = model.text_decoder().forward(&Tensor::new(&[[latest]], &Device::Cpu)?, &encoded)?;
        latest = logits.flatten_all()?.argmax(D::Minus1)?.to_scalar()?;
    }
    Ok(encode)
}

fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[expect(clippy::print_stdout, reason = "a program that reports")]
fn say(report: &serde_json::Value) {
    println!("{report}");
}
