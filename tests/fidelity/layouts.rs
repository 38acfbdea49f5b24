//! Every published layout gives the same captions, and what is wrong with a model is said by file and key.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use blipstream::caption::{
    BlipEngine, DeviceSpec, DtypeSpec, LoadError, LoadOptions, ModelSource, caption, load, load_model,
};
use candle_core::{Device, Tensor};
use tempfile::TempDir;

use crate::fixture::{Fixture, directory, load_from};

const SMALL_FILES: [&str; 4] = ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"];

/// A copy of the fixture without its weights, to which a test adds and from which it takes away.
fn copy(fixture: &Fixture) -> TempDir {
    let copy = TempDir::new().unwrap();
    for name in SMALL_FILES {
        fs::copy(fixture.directory().join(name), copy.path().join(name)).unwrap();
    }
    copy
}

fn add_weights(fixture: &Fixture, to: &Path) {
    fs::copy(fixture.directory().join("model.safetensors"), to.join("model.safetensors")).unwrap();
}

fn check_captions(fixture: &Fixture, directory: &Path) {
    let mut engine = BlipEngine::new(load_from(directory, DtypeSpec::F32));
    for (expected, caption) in fixture.captions.iter().zip(caption(&mut engine, &fixture.items()).unwrap()) {
        expected.check(&caption.unwrap());
    }
}

#[test]
fn sharded_weights_load_to_the_same_captions() {
    let fixture = Fixture::read("proportions");
    let copy = copy(&fixture);
    let mut shards = 0;
    for entry in fs::read_dir(directory("proportions-sharded")).unwrap() {
        let path = entry.unwrap().path();
        shards += usize::from(path.extension().is_some_and(|extension| extension == "safetensors"));
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    assert!(shards > 1);
    check_captions(&fixture, copy.path());
}

#[test]
fn a_pickled_state_dict_loads_to_the_same_captions() {
    let fixture = Fixture::read("widths");
    let copy = copy(&fixture);
    let pickle = directory("widths-pickle").join("pytorch_model.bin");
    fs::copy(pickle, copy.path().join("pytorch_model.bin")).unwrap();
    check_captions(&fixture, copy.path());
}

#[test]
fn a_list_of_words_loads_as_a_tokenizer_does() {
    for fixture in Fixture::all() {
        let copy = copy(&fixture);
        add_weights(&fixture, copy.path());
        fs::remove_file(copy.path().join("tokenizer.json")).unwrap();
        fs::copy(fixture.directory().join("vocab.txt"), copy.path().join("vocab.txt")).unwrap();
        check_captions(&fixture, copy.path());
        fs::remove_file(copy.path().join("tokenizer_config.json")).unwrap();
        check_captions(&fixture, copy.path());
    }
}

#[test]
fn files_in_memory_load_as_files_on_disk_do() {
    let fixture = Fixture::read("widths");
    let names = SMALL_FILES.into_iter().chain(["model.safetensors"]);
    let files: BTreeMap<String, Cow<'static, [u8]>> =
        names.map(|name| (name.to_owned(), fs::read(fixture.directory().join(name)).unwrap().into())).collect();
    let source = ModelSource::Memory { id: "embedded".into(), files };
    let mut engine =
        load(&LoadOptions { device: DeviceSpec::Cpu, dtype: DtypeSpec::F32, ..LoadOptions::new(source) }).unwrap();
    assert_eq!(engine.model().id, "embedded");
    for (expected, caption) in fixture.captions.iter().zip(caption(&mut *engine, &fixture.items()).unwrap()) {
        expected.check(&caption.unwrap());
    }
}

#[test]
fn a_head_stored_beside_an_equal_embedding_changes_nothing() {
    let fixture = Fixture::read("proportions");
    let copy = copy(&fixture);
    let mut tensors = weights(&fixture);
    let words = tensors["text_decoder.bert.embeddings.word_embeddings.weight"].clone();
    let decoder = "text_decoder.cls.predictions.decoder.weight".to_owned();
    tensors.insert(decoder.clone(), words);
    candle_core::safetensors::save(&tensors, copy.path().join("model.safetensors")).unwrap();
    check_captions(&fixture, copy.path());
    // Nor if the file has the head alone.
    tensors.remove("text_decoder.bert.embeddings.word_embeddings.weight");
    candle_core::safetensors::save(&tensors, copy.path().join("model.safetensors")).unwrap();
    check_captions(&fixture, copy.path());
}

#[test]
fn random_weights_of_any_size_make_captions() {
    let fixture = Fixture::read("depths");
    let json = fs::read(fixture.directory().join("config.json")).unwrap();
    let config = blipstream::caption::config::BlipConfig::from_json(&json).unwrap();
    let source = ModelSource::Random { id: "random".into(), config, seed: 7 };
    let options = LoadOptions { device: DeviceSpec::Cpu, dtype: DtypeSpec::F32, ..LoadOptions::new(source) };
    let once = caption(&mut *load(&options).unwrap(), &fixture.items()[..2]).unwrap();
    let again = caption(&mut *load(&options).unwrap(), &fixture.items()[..2]).unwrap();
    for (once, again) in once.into_iter().zip(again) {
        assert_eq!(once.unwrap(), again.unwrap());
    }
}

fn weights(fixture: &Fixture) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture.directory().join("model.safetensors"), &Device::Cpu).unwrap()
}

/// The whole message, causes included.
fn failure(directory: &Path) -> String {
    let source = ModelSource::Dir(directory.to_owned());
    let options = LoadOptions { device: DeviceSpec::Cpu, dtype: DtypeSpec::F32, ..LoadOptions::new(source) };
    chain(&load_model(&options).err().expect("the model should not load"))
}

fn chain(error: &LoadError) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[test]
fn what_is_missing_is_named() {
    let fixture = Fixture::read("depths");
    let expect = |directory: &Path, words: &[&str]| {
        let message = failure(directory);
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    let empty = TempDir::new().unwrap();
    expect(empty.path(), &["config.json", "model directory"]);
    let copy = copy(&fixture);
    expect(copy.path(), &["model.safetensors", "pytorch_model.bin", "weights"]);
    add_weights(&fixture, copy.path());
    fs::remove_file(copy.path().join("tokenizer.json")).unwrap();
    expect(copy.path(), &["tokenizer.json or vocab.txt"]);
}

#[test]
fn a_tensor_that_is_missing_or_misshapen_is_named() {
    let fixture = Fixture::read("depths");
    let copy = copy(&fixture);
    let file = copy.path().join("model.safetensors");
    let name = "vision_model.encoder.layers.1.self_attn.qkv.weight";
    let mut tensors = weights(&fixture);
    tensors.insert(name.into(), Tensor::zeros((3, 4), candle_core::DType::F32, &Device::Cpu).unwrap());
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let message = failure(copy.path());
    assert!(message.contains(name) && message.contains("[3, 4]") && message.contains("[216, 72]"), "{message}");
    tensors.remove(name);
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let message = failure(copy.path());
    assert!(message.contains(name) && message.contains("missing"), "{message}");
}

#[test]
fn a_file_that_is_not_what_it_claims_is_named() {
    let fixture = Fixture::read("depths");
    let spoilt = |name: &str, bytes: &[u8]| {
        let copy = copy(&fixture);
        if name != "pytorch_model.bin" {
            add_weights(&fixture, copy.path());
        }
        fs::write(copy.path().join(name), bytes).unwrap();
        let message = failure(copy.path());
        assert!(message.contains(name), "{message}");
        message
    };
    spoilt("config.json", b"{");
    spoilt("tokenizer.json", b"[]");
    spoilt("preprocessor_config.json", b"3");
    spoilt("model.safetensors", b"not a tensor");
    assert!(spoilt("model.safetensors", b"").contains("download"));
    let mut cut = fs::read(fixture.directory().join("model.safetensors")).unwrap();
    cut.truncate(cut.len() - 1);
    assert!(spoilt("model.safetensors", &cut).contains("download"));
    spoilt("pytorch_model.bin", b"not a zip");
    let message = spoilt("config.json", br#"{"model_type":"blip-2"}"#);
    assert!(message.contains("model_type") && message.contains("blip-2"), "{message}");
}

#[test]
fn an_index_may_only_name_files_beside_it() {
    let fixture = Fixture::read("depths");
    let copy = copy(&fixture);
    let index = copy.path().join("model.safetensors.index.json");
    for (name, word) in [("../../etc/passwd", "not the name of a file"), ("part-1.safetensors", "download")] {
        fs::write(&index, format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#)).unwrap();
        let message = failure(copy.path());
        assert!(message.contains(name) && message.contains(word), "{message}");
    }
}

#[test]
fn a_source_is_a_directory_or_a_repository() {
    let here = directory("depths").display().to_string();
    assert!(matches!(here.parse::<ModelSource>().unwrap(), ModelSource::Dir(_)));
    assert!(matches!("random-large".parse::<ModelSource>().unwrap(), ModelSource::Random { .. }));
    let ModelSource::Hub(hub) = "org/name@v1".parse::<ModelSource>().unwrap() else { panic!("not a repository") };
    assert_eq!((hub.id.as_str(), hub.revision.as_deref()), ("org/name", Some("v1")));
    let message = chain(&load_model(&LoadOptions::new("no such thing".parse().unwrap())).err().unwrap());
    assert!(message.contains("no such thing") && message.contains("organisation/name"), "{message}");
}
