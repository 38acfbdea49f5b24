//! Decoding and resizing against Pillow, and against broken and hostile images.
//!
//! `tests/reference/pillow.py` writes the fixtures: images of every kind, and what Pillow makes of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use blipstream::caption::preprocess::{DecodeError, Limits, Picture, Preprocessor, Resizer, decode};
use proptest::prelude::*;

const LIMITS: Limits = Limits { max_pixels: 4_000_000, max_side: 8_192, max_memory: 64 << 20 };

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pillow")
}

/// Name and bytes of each file in a folder of the fixtures, in order.
fn images(folder: &str) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(fixtures().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap())).collect()
}

fn fixture(name: &str) -> Vec<u8> {
    fs::read(fixtures().join(name)).unwrap()
}

/// Pillow's results for an image, by size.
fn expected(name: &str) -> Vec<(usize, Picture)> {
    let results = images("expected");
    let sizes = results.iter().filter_map(|(file, bytes)| {
        let size = file.strip_prefix(name)?.strip_prefix('.')?.strip_suffix(".png")?.parse().ok()?;
        Some((size, decode(bytes, &LIMITS).unwrap()))
    });
    sizes.collect()
}

/// How many channel values differ by how many levels.
#[derive(Default)]
struct Differences(BTreeMap<u8, usize>);

impl Differences {
    fn add(&mut self, ours: &[u8], theirs: &[u8]) {
        assert_eq!(ours.len(), theirs.len());
        for (a, b) in ours.iter().zip(theirs) {
            *self.0.entry(a.abs_diff(*b)).or_default() += 1;
        }
    }

    fn largest(&self) -> u8 {
        self.0.keys().next_back().copied().unwrap_or(0)
    }

    fn share(&self, of: impl Fn(u8) -> bool) -> f64 {
        let total: usize = self.0.values().sum();
        self.0.iter().filter(|(level, _)| of(**level)).map(|(_, n)| n).sum::<usize>() as f64 / total as f64
    }

    fn mean(&self) -> f64 {
        let total: usize = self.0.values().sum();
        self.0.iter().map(|(level, n)| usize::from(*level) * n).sum::<usize>() as f64 / total as f64
    }
}

/// Compares every image of a folder with Pillow's results.
fn differences(folder: &str) -> BTreeMap<String, Differences> {
    let mut resizer = Resizer::new();
    let of_one = |(name, bytes): (String, Vec<u8>)| {
        let picture = decode(&bytes, &LIMITS).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut differences = Differences::default();
        let expected = expected(&name);
        assert!(!expected.is_empty(), "no expected result for {name}");
        for (size, theirs) in expected {
            let ours = Preprocessor::blip(size).resize(&picture, &mut resizer).unwrap();
            differences.add(ours.data(), &theirs.rgb);
        }
        (name, differences)
    };
    images(folder).into_iter().map(of_one).collect()
}

#[allow(clippy::print_stdout)] // shown with --nocapture
fn report(name: &str, differences: &Differences) {
    let (same, one) = (differences.share(|level| level == 0), differences.share(|level| level == 1));
    let largest = differences.largest();
    println!("{name:<32} 0: {:7.3} %   1: {:6.3} %   largest: {largest}", same * 100.0, one * 100.0);
}

#[test]
fn lossless_images_equal_pillow_within_one_level() {
    let mut all = Differences::default();
    let each = differences("lossless");
    for (name, differences) in &each {
        report(name, differences);
        differences.0.iter().for_each(|(level, n)| *all.0.entry(*level).or_default() += n);
    }
    report("all", &all);
    let off: Vec<_> = each.iter().filter(|(_, d)| d.largest() > 1).map(|(name, _)| name).collect();
    assert!(off.is_empty(), "more than one level off: {off:?}");
    assert!(all.share(|level| level == 0) > 0.95);
}

#[test]
fn lossy_images_equal_pillow_but_for_the_rounding_of_their_decoders() {
    for (name, differences) in differences("lossy") {
        report(&name, &differences);
        assert!(differences.mean() < 1.0, "{name}: mean difference {}", differences.mean());
        assert!(differences.share(|level| level > 4) < 0.01, "{name}: {:?}", differences.0);
    }
}
