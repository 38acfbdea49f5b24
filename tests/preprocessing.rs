//! Decoding and resizing against Pillow, and against broken and hostile images.
//!
//! `tests/reference/pillow.py` writes the fixtures: images of every kind, and what Pillow makes of them.

#[path = "support/turbo.rs"]
mod turbo;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use blipstream::caption::preprocess::{
    DecodeError, Limits, Picture, Preprocessor, Resizer, TurboJpeg, decode, decode_at_least,
};
use proptest::prelude::*;
use turbo::turbo;

/// For the cases of a property.
static TURBO: LazyLock<Option<TurboJpeg>> = LazyLock::new(turbo);

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
fn lossless_images_of_every_mode_equal_pillow_bit_for_bit() {
    let mut all = Differences::default();
    let each = differences("lossless");
    for (name, differences) in &each {
        report(name, differences);
        differences.0.iter().for_each(|(level, n)| *all.0.entry(*level).or_default() += n);
    }
    report("all", &all);
    let off: Vec<_> = each.iter().filter(|(_, d)| d.largest() > 0).map(|(name, _)| name).collect();
    assert!(off.is_empty(), "not as in Pillow: {off:?}");
}

#[test]
fn lossy_images_equal_pillow_but_for_the_rounding_of_their_decoders() {
    for (name, differences) in differences("lossy") {
        report(&name, &differences);
        assert!(differences.mean() < 0.5, "{name}: mean difference {}", differences.mean());
        assert!(differences.share(|level| level > 2) < 0.01, "{name}: {:?}", differences.0);
        assert!(differences.largest() <= 5, "{name}: {:?}", differences.0);
    }
}

#[test]
fn a_jpeg_at_a_part_of_its_size_has_the_means_of_its_blocks() {
    let Some(turbo) = turbo() else { return };
    for name in ["420", "422", "444", "grey", "progressive", "restarts", "rotated"] {
        let bytes = fixture(&format!("lossy/{name}.jpg"));
        let whole = decode(&bytes, &LIMITS).unwrap();
        // The fixtures have 250x170 pixels. Their colours change from pixel to pixel, and where they are stored at half the
        // resolution only brightness can be compared.
        let colours = matches!(name, "444" | "grey");
        let weights =
            if colours { [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]] } else { [[0.299, 0.587, 0.114]; 3] };
        let value = |picture: &Picture, (x, y): (u32, u32), weights: [f64; 3]| {
            let at = 3 * (y * picture.width + x) as usize;
            picture.rgb[at..at + 3].iter().zip(weights).map(|(value, weight)| f64::from(*value) * weight).sum::<f64>()
        };
        for (least, block, (width, height)) in [(22, 8, (32, 22)), (23, 4, (63, 43)), (44, 2, (125, 85))] {
            let picture = decode_at_least(&bytes, &LIMITS, least, &turbo).unwrap();
            assert_eq!((picture.width, picture.height, picture.full_size), (width, height, (250, 170)), "{name}");
            let mut difference = 0.0;
            for (x, y) in (0..height).flat_map(|y| (0..width).map(move |x| (x, y))) {
                let [across, down] = [(x, 250), (y, 170)].map(|(at, end)| at * block..(at * block + block).min(end));
                let pixels: Vec<_> = down.flat_map(|y| across.clone().map(move |x| (x, y))).collect();
                for weights in weights {
                    let mean = pixels.iter().map(|&at| value(&whole, at, weights)).sum::<f64>() / pixels.len() as f64;
                    difference += (value(&picture, (x, y), weights) - mean).abs() / f64::from(3 * width * height);
                }
            }
            assert!(difference < 2.0, "{name} at {width}x{height}: {difference:.2} levels on average");
        }
    }
}

#[test]
fn what_cannot_be_decoded_at_a_part_of_its_size_is_decoded_whole() {
    let Some(turbo) = turbo() else { return };
    for name in SAMPLES {
        let bytes = fixture(name);
        let whole = decode(&bytes, &LIMITS).unwrap();
        let least = if name.ends_with("jpg") && !name.contains("cmyk") { 86 } else { 1 };
        assert!(decode_at_least(&bytes, &LIMITS, least, &turbo).unwrap() == whole, "{name}");
        assert_eq!(whole.full_size, (whole.width, whole.height), "{name}");
    }
}

#[test]
fn a_broken_header_leaves_no_trace_in_the_next_picture() {
    let Some(turbo) = turbo() else { return };
    let good = fixture("lossy/420.jpg");
    let scaled = decode_at_least(&good, &LIMITS, 22, &turbo).unwrap();
    assert_eq!((scaled.width, scaled.height), (32, 22));
    let marker = |marker: u8| good.windows(2).position(|bytes| bytes == [0xFF, marker]).unwrap();
    let (frame, scan) = (marker(0xC0), marker(0xDA));
    let mut lossless = good.clone();
    lossless[frame + 1] = 0xC3;
    for (what, broken) in
        [("cut before its frame", &good[..frame]), ("cut before its scan", &good[..scan]), ("lossless", &lossless)]
    {
        assert!(decode_at_least(broken, &LIMITS, 22, &turbo).is_err(), "{what}");
        assert!(decode_at_least(&good, &LIMITS, 22, &turbo).unwrap() == scaled, "after one {what}");
    }
}

fn kind(result: &Result<Picture, DecodeError>) -> &'static str {
    match result {
        Ok(_) => "picture",
        Err(DecodeError::UnsupportedMedia(_)) => "unsupported",
        Err(DecodeError::TooManyPixels { .. }) => "pixels",
        Err(DecodeError::TooManyScans { .. }) => "scans",
        Err(DecodeError::TooLongSide { .. }) => "side",
        Err(DecodeError::TooMuchMemory { .. }) => "memory",
        Err(DecodeError::Broken(_)) => "broken",
    }
}

/// One small image of each format and of each way of coding it.
const SAMPLES: [&str; 17] = [
    "lossy/420.jpg",
    "lossy/progressive.jpg",
    "lossy/restarts.jpg",
    "lossy/cmyk.jpg",
    "lossy/lossy.webp",
    "lossless/rgb-up.png",
    "lossless/palette-4-bit.png",
    "lossless/rgba.webp",
    "lossless/animated.webp",
    "lossless/partial.gif",
    "lossless/interlaced.gif",
    "lossless/palette-8.bmp",
    "lossless/rgb-565.bmp",
    "lossless/rgb-raw.tiff",
    "lossless/rgb-tiff-lzw.tiff",
    "lossless/cmyk.tiff",
    "lossless/mono-group4.tiff",
];

#[test]
fn a_truncated_image_is_an_error_or_whole_but_never_half_a_picture() {
    for name in SAMPLES {
        let bytes = fixture(name);
        let whole = decode(&bytes, &LIMITS).unwrap();
        let step = (bytes.len() / 40).max(1);
        let cuts = (0..bytes.len()).step_by(step).chain(bytes.len().saturating_sub(24)..bytes.len());
        for cut in cuts {
            match decode(&bytes[..cut], &LIMITS) {
                Ok(picture) => {
                    assert!(picture == whole, "{name} cut to {cut} of {} bytes is half a picture", bytes.len());
                }
                Err(DecodeError::Broken(_) | DecodeError::UnsupportedMedia(_)) => {}
                Err(error) => panic!("{name} cut to {cut} bytes: {error}"),
            }
        }
    }
}

#[test]
fn a_truncated_jpeg_is_broken_wherever_it_is_cut() {
    let turbo = turbo();
    for name in SAMPLES.iter().filter(|name| name.ends_with("jpg")) {
        let bytes = fixture(name);
        for cut in (3..bytes.len()).step_by(997).chain(bytes.len() - 8..bytes.len()) {
            assert_eq!(kind(&decode(&bytes[..cut], &LIMITS)), "broken", "{name} cut to {cut} bytes");
            if let Some(turbo) = &turbo {
                assert_eq!(
                    kind(&decode_at_least(&bytes[..cut], &LIMITS, 9, turbo)),
                    "broken",
                    "{name} cut to {cut} bytes"
                );
            }
        }
        let trailed = [&bytes, &b"trailing bytes"[..]].concat();
        assert_eq!(kind(&decode(&trailed, &LIMITS)), "picture", "{name}");
    }
}

#[test]
fn what_is_no_image_is_unsupported_and_named() {
    let cases: [(&[u8], &str); 7] = [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"\n <HTML>", "HTML"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"Not found\n", "text"),
        (b"\x00\x01\x02\x03", "no known image format"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "Avif"),
    ];
    for (bytes, what) in cases {
        let result = decode(bytes, &LIMITS);
        assert_eq!(kind(&result), "unsupported", "{what}");
        let message = result.unwrap_err().to_string();
        assert!(message.contains(what) && message.contains("supported are JPEG"), "{message}");
    }
}

/// A PNG of a given size with no pixel data to speak of, checksums and all.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = fixture("lossless/rgb-one-pixel.png");
    bytes[16..20].copy_from_slice(&width.to_be_bytes());
    bytes[20..24].copy_from_slice(&height.to_be_bytes());
    let crc = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    bytes
}

/// The checksum of PNG (ISO 3309), bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 })
    };
    !bytes.iter().fold(!0, step)
}

#[test]
fn a_bomb_is_refused_by_its_header() {
    assert_eq!(kind(&decode(&png_header(1, 1), &LIMITS)), "picture");
    assert_eq!(kind(&decode(&png_header(30_000, 30_000), &LIMITS)), "side");
    assert_eq!(kind(&decode(&png_header(8_000, 8_000), &LIMITS)), "pixels");
    let tight = Limits { max_memory: 3 * 100 * 100 - 1, ..LIMITS };
    assert_eq!(kind(&decode(&png_header(100, 100), &tight)), "memory");
    // Within every limit, so that it is the missing pixels that are noticed.
    assert_eq!(kind(&decode(&png_header(100, 100), &LIMITS)), "broken");
}

#[test]
fn a_large_frame_on_a_small_webp_canvas_is_refused() {
    let simple = fixture("lossy/lossy.webp");
    let mut frame = simple[12..].to_vec();
    frame[14..18].copy_from_slice(&[0xFF, 0x3F, 0xFF, 0x3F]);
    let canvas = b"WEBPVP8X\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let length = (canvas.len() + frame.len()) as u32;
    let bytes = [&b"RIFF"[..], &length.to_le_bytes(), canvas, &frame].concat();
    assert_eq!(kind(&decode(&bytes, &LIMITS)), "side");
}

#[test]
fn every_format_is_held_to_the_limits() {
    let turbo = turbo();
    for name in SAMPLES {
        let bytes = fixture(name);
        let Picture { width, height, .. } = decode(&bytes, &LIMITS).unwrap();
        let pixels = u64::from(width) * u64::from(height);
        for (limits, verdict) in [
            (Limits { max_side: width.max(height) - 1, ..LIMITS }, "side"),
            (Limits { max_pixels: pixels - 1, ..LIMITS }, "pixels"),
            (Limits { max_memory: pixels * 3 - 1, ..LIMITS }, "memory"),
            (Limits { max_side: width.max(height), max_pixels: pixels, ..LIMITS }, "picture"),
        ] {
            assert_eq!(kind(&decode(&bytes, &limits)), verdict, "{name}");
            if let Some(turbo) = &turbo {
                assert_eq!(kind(&decode_at_least(&bytes, &limits, 9, turbo)), verdict, "{name} at a part of its size");
            }
        }
    }
}

#[test]
fn an_image_without_pixels_is_broken() {
    assert_eq!(kind(&decode(&png_header(0, 10), &LIMITS)), "broken");
    assert_eq!(kind(&decode(&png_header(10, 0), &LIMITS)), "broken");
    let mut gif = fixture("lossless/whole.gif");
    gif[6..10].fill(0);
    assert_eq!(kind(&decode(&gif, &LIMITS)), "picture", "a frame beyond its screen widens it");
}

#[test]
fn sixteen_bit_grey_is_scaled_not_clipped() {
    let deep = decode(&fixture("lossless/grey-16-bit.png"), &LIMITS).unwrap();
    let shallow = decode(&fixture("lossless/grey.png"), &LIMITS).unwrap();
    assert_eq!(deep.rgb, shallow.rgb);
}

#[test]
fn orientation_is_ignored_as_in_the_reference() {
    let upright = decode(&fixture("lossy/420.jpg"), &LIMITS).unwrap();
    let rotated = decode(&fixture("lossy/rotated.jpg"), &LIMITS).unwrap();
    assert_eq!((rotated.width, rotated.height), (upright.width, upright.height));
    assert!(rotated.rgb == upright.rgb);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = decode(&bytes, &LIMITS);
    }

    #[test]
    fn damaged_images_never_panic_and_keep_to_the_limits(
        sample in 0..SAMPLES.len(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6),
    ) {
        let mut bytes = fixture(SAMPLES[sample]);
        for (at, value, near_the_front) in damage {
            // Headers are where damage is most inventive.
            let range = if near_the_front { bytes.len().min(64) } else { bytes.len() };
            bytes[at.index(range)] = value;
        }
        if let Ok(picture) = decode(&bytes, &LIMITS) {
            let pixels = u64::from(picture.width) * u64::from(picture.height);
            prop_assert!(pixels <= LIMITS.max_pixels && picture.rgb.len() as u64 == pixels * 3);
            Preprocessor::blip(16).resize(&picture, &mut Resizer::new()).unwrap();
        }
        if let Some(Ok(picture)) = TURBO.as_ref().map(|turbo| decode_at_least(&bytes, &LIMITS, 16, turbo)) {
            let pixels = u64::from(picture.width) * u64::from(picture.height);
            prop_assert!(pixels <= LIMITS.max_pixels && picture.rgb.len() as u64 == pixels * 3);
            Preprocessor::blip(16).resize(&picture, &mut Resizer::new()).unwrap();
        }
    }
}
