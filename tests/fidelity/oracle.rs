//! A second oracle: the BLIP of candle-transformers, an implementation of other hands on the same tensors.

use std::collections::HashMap;

use blipstream::caption::caption;
use candle_core::{D, DType, Device, Module, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::blip::{BlipForConditionalGeneration, Config};

use crate::fixture::{Fixture, largest_difference, report};

const WORDS: &str = "text_decoder.bert.embeddings.word_embeddings.weight";
const DECODER: &str = "text_decoder.cls.predictions.decoder.weight";
const END: u32 = 3;

fn theirs(fixture: &Fixture) -> (BlipForConditionalGeneration, u32) {
    let directory = fixture.directory();
    let json = std::fs::read(directory.join("config.json")).unwrap();
    let config: Config = serde_json::from_slice(&json).unwrap();
    let raw: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let begin = raw["text_config"]["bos_token_id"].as_u64().unwrap() as u32;
    let mut tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load(directory.join("model.safetensors"), &Device::Cpu).unwrap();
    // It does not share the embedding with the head by itself.
    if !tensors.contains_key(DECODER) {
        tensors.insert(DECODER.into(), tensors[WORDS].clone());
    }
    // It knows only the bias that a tied head has.
    if let Some(bias) = tensors.get("text_decoder.cls.predictions.decoder.bias").cloned() {
        tensors.insert("text_decoder.cls.predictions.bias".into(), bias);
    }
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    (BlipForConditionalGeneration::new(&config, weights).unwrap(), begin)
}

/// Pixels as its input, `[1, 3, size, size]`, normalised as the fixtures' processor does.
fn normalised(pixels: &blipstream::caption::Pixels) -> Tensor {
    let (mean, std) = ([0.481_454_67, 0.457_827_5, 0.408_210_72], [0.268_629_55, 0.261_302_6, 0.275_777_1]);
    let size = pixels.size();
    let statistic = |values: [f32; 3]| Tensor::new(&values, &Device::Cpu).unwrap().reshape((3, 1, 1)).unwrap();
    let image = Tensor::from_slice(pixels.data(), (size, size, 3), &Device::Cpu).unwrap();
    let image = (image.permute((2, 0, 1)).unwrap().to_dtype(DType::F32).unwrap() / 255.0).unwrap();
    let image = image.broadcast_sub(&statistic(mean)).unwrap().broadcast_div(&statistic(std)).unwrap();
    image.unsqueeze(0).unwrap()
}

#[test]
fn candle_transformers_gives_the_same_captions() {
    for fixture in Fixture::all() {
        let (mut model, begin) = theirs(&fixture);
        let mut engine = fixture.engine();
        let ours = caption(&mut engine, &fixture.items()).unwrap();
        let hidden = fixture.model().hidden_states(&fixture.images).unwrap();
        let mut largest = 0f32;
        for (expected, ours) in fixture.captions.iter().zip(ours).filter(|(expected, _)| expected.is_free()) {
            let image = model.vision_model().forward(&normalised(&fixture.images[expected.image])).unwrap();
            let flat = vec![image.flatten_all().unwrap().to_vec1().unwrap()];
            largest = largest.max(largest_difference(&flat, &hidden[expected.image..=expected.image]));
            model.reset_kv_cache();
            let (mut tokens, mut latest) = (Vec::new(), begin);
            while tokens.len() < expected.max_new_tokens && latest != END {
                let input = Tensor::new(&[[latest]], &Device::Cpu).unwrap();
                let logits = model.text_decoder().forward(&input, &image).unwrap();
                latest = logits.flatten_all().unwrap().argmax(D::Minus1).unwrap().to_scalar().unwrap();
                tokens.push(latest);
            }
            assert_eq!(ours.unwrap().token_ids, tokens, "{}", fixture.name);
        }
        report(&format!("{}: candle-transformers agrees, hidden states within {largest:.2e}", fixture.name));
        assert!(largest < crate::fixture::TOLERANCE);
    }
}
