use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use image::RgbImage;

use super::*;
use crate::budget::{Limit, Pool};
use crate::message::{Message, Origin, Row};
use crate::offsets::{Ledger, Outcome, TopicPartition};
use crate::stage::Output;

const SIZE: usize = 8;

fn png(width: u32, height: u32, seed: u8) -> Bytes {
    let image = RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, seed]));
    let mut out = Cursor::new(Vec::new());
    image.write_to(&mut out, image::ImageFormat::Png).unwrap();
    out.into_inner().into()
}

fn config(threads: usize) -> Config {
    let settings = settings::Decode { threads, max_pixels: 100_000, ..settings::Decode::default() };
    Config::new(Preprocessor::blip(SIZE), &settings, &settings::Output::default())
}

fn row(offset: i64, image: ImageRef) -> Row {
    let topic: Arc<str> = "requests".into();
    let message = Message::empty(topic.clone(), 0, offset);
    let request = Request::of(image);
    let origin = Origin { topic, partition: 0, offset, index: None };
    Row { message: Arc::new(message), request, origin, index: 0, only: true, timing: Timing::default() }
}

/// A stage with all its surroundings; everything it puts out is kept until the end.
struct Bench {
    ledger: Ledger,
    images: Pool,
    input: Option<Sender<Tracked<Fetched>>>,
    received: Receiver<Tracked<Fetched>>,
    outputs: Outputs,
    ready: Arc<Mutex<Vec<Tracked<Ready>>>>,
    failed: Receiver<Finished>,
}

impl Bench {
    fn new() -> Self {
        let ledger = Ledger::new();
        ledger.assign(TopicPartition { topic: "requests".into(), partition: 0 });
        let (input, received) = async_channel::bounded(64);
        let (failed_in, failed) = async_channel::bounded(64);
        let ready = Arc::new(Mutex::new(Vec::new()));
        let kept = ready.clone();
        #[allow(clippy::result_large_err)] // the row comes back whole, as the contract says
        let outputs = Outputs {
            ready: Arc::new(move |row| {
                kept.lock().unwrap().push(row);
                Ok(())
            }),
            finished: failed_in,
            answers: None,
            metrics: Arc::new(Metrics::new()),
        };
        let images = Pool::new(Limit { items: 64, bytes: 1 << 20 });
        Self { ledger, images, input: Some(input), received, outputs, ready, failed }
    }

    fn send_row(&self, row: Row, body: Bytes) {
        let partition = TopicPartition { topic: row.origin.topic.clone(), partition: 0 };
        let ticket = self.ledger.open(&partition, row.origin.offset).unwrap();
        let message = Pool::new(Limit { items: 1, bytes: 1 }).try_acquire(0).unwrap();
        let image = self.images.try_acquire(body.len()).unwrap();
        let fetched = Tracked::new(Fetched { row, body }, ticket, message).with_image(image);
        self.input.as_ref().unwrap().send_blocking(fetched).unwrap();
    }

    fn send(&self, offset: i64, body: impl Into<Bytes>) {
        self.send_row(row(offset, ImageRef::Base64(Bytes::new())), body.into());
    }

    /// Closes the input, waits for the threads, and gives out what came out, by offset.
    fn finish(&mut self, threads: std::io::Result<Vec<JoinHandle<()>>>) -> BTreeMap<i64, Result<Ready, Failure>> {
        self.input = None;
        for thread in threads.unwrap() {
            thread.join().unwrap();
        }
        let mut all = BTreeMap::new();
        for row in self.ready.lock().unwrap().drain(..) {
            let ready = row.resolve(Outcome::Published);
            assert!(all.insert(ready.row.origin.offset, Ok(ready)).is_none(), "a row came out twice");
        }
        while let Ok(finished) = self.failed.try_recv() {
            let Output::FailedRow(row, failure) = finished.resolve(Outcome::Published) else {
                panic!("the stage ends rows only as failed rows")
            };
            assert_eq!(failure.stage, Stage::Decode);
            assert!(all.insert(row.origin.offset, Err(failure)).is_none(), "a row came out twice");
        }
        assert_eq!((self.ledger.open_tickets(), self.images.used()), (0, Limit::default()));
        assert_eq!(self.outputs.metrics.stage_so_far(Stage::Decode).0, all.len() as u64);
        all
    }
}

fn code(result: &Result<Ready, Failure>) -> Option<Code> {
    result.as_ref().err().map(|failure| failure.code)
}

#[test]
fn bad_neighbours_do_not_disturb_good_ones() {
    let mut bench = Bench::new();
    let good: Vec<Bytes> = (0..8).map(|seed| png(20 + u32::from(seed), 11, seed)).collect();
    let threads = spawn(&config(3), &bench.received, &bench.outputs);
    for (n, good) in (0..).zip(&good) {
        bench.send(4 * n, good.clone());
        bench.send(4 * n + 1, &b"<html>not found</html>"[..]);
        bench.send(4 * n + 2, good.slice(..good.len() / 2));
        bench.send(4 * n + 3, png(400, 300, 0));
    }
    let results = bench.finish(threads);
    assert_eq!(results.len(), 32);
    let mut resizer = Resizer::new();
    for (n, good) in (0..).zip(&good) {
        let ready = results[&(4 * n)].as_ref().unwrap();
        let picture = preprocess::decode(good, &config(1).limits).unwrap();
        assert_eq!(ready.pixels, Preprocessor::blip(SIZE).resize(&picture, &mut resizer).unwrap());
        assert_eq!((ready.image.width, ready.image.height, ready.image.bytes), (20 + n as u32, 11, good.len()));
        assert_eq!((ready.image.format.as_str(), ready.image.sha256.len()), ("png", 64));
        assert_eq!(code(&results[&(4 * n + 1)]), Some(Code::UnsupportedMedia));
        assert_eq!(code(&results[&(4 * n + 2)]), Some(Code::Decode));
        assert_eq!(code(&results[&(4 * n + 3)]), Some(Code::TooManyPixels));
    }
}

#[test]
fn a_jpeg_decoded_at_a_part_of_its_size_is_recorded_with_its_own() {
    let whole = RgbImage::from_fn(16 * SIZE as u32, 9 * SIZE as u32, |x, y| image::Rgb([x as u8, y as u8, 9]));
    let mut jpeg = Cursor::new(Vec::new());
    whole.write_to(&mut jpeg, image::ImageFormat::Jpeg).unwrap();
    let body = Bytes::from(jpeg.into_inner());
    let mut resizer = Resizer::new();
    let turbo = match TurboJpeg::open() {
        Ok(turbo) => turbo,
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "{error}");
            return;
        }
    };
    for (jpeg_reducing_gap, sides) in [(0.0, (128, 72)), (1.0, (16, 9)), (2.0, (32, 18)), (9.0, (128, 72))] {
        let settings = settings::Decode { jpeg_reducing_gap, threads: 1, ..settings::Decode::default() };
        let config = Config::new(Preprocessor::blip(SIZE), &settings, &settings::Output::default());
        let mut bench = Bench::new();
        let threads = spawn(&config, &bench.received, &bench.outputs);
        bench.send(0, body.clone());
        let results = bench.finish(threads);
        let ready = results[&0].as_ref().unwrap();
        assert_eq!((ready.image.width, ready.image.height), (128, 72));
        let least = (jpeg_reducing_gap * SIZE as f64) as u32;
        let least = if least == 0 { 999 } else { least };
        let picture = preprocess::decode_at_least(&body, &config.limits, least, &turbo).unwrap();
        assert_eq!((picture.width, picture.height), sides);
        assert_eq!(ready.pixels, Preprocessor::blip(SIZE).resize(&picture, &mut resizer).unwrap());
    }
}

#[test]
fn a_panic_in_a_decoder_is_a_dead_letter_and_the_thread_goes_on() {
    let mut bench = Bench::new();
    let made = Arc::new(AtomicUsize::new(0));
    let counter = made.clone();
    let threads = spawn_with(&config(1), &bench.received, &bench.outputs, move |_| {
        counter.fetch_add(1, Ordering::Relaxed);
        |body: &[u8]| {
            assert_ne!(body, b"boom", "index out of bounds");
            let pixels = Pixels::new(1, vec![0; 3]).unwrap();
            Ok(Decoded { pixels, width: 1, height: 1, format: "png" })
        }
    });
    for (offset, body) in (0..).zip(["fine", "boom", "fine", "boom", "fine"]) {
        bench.send(offset, body.as_bytes());
    }
    let results = bench.finish(threads);
    let codes: Vec<_> = results.values().map(code).collect();
    assert_eq!(codes, [None, Some(Code::Decode), None, Some(Code::Decode), None]);
    assert!(results[&1].as_ref().unwrap_err().message.contains("index out of bounds"));
    assert_eq!(made.load(Ordering::Relaxed), 3, "a decoder that panicked must not be used again");
}

#[test]
fn a_row_past_its_deadline_is_not_decoded() {
    let mut bench = Bench::new();
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = calls.clone();
    let threads = spawn_with(&config(1), &bench.received, &bench.outputs, move |_| {
        let counter = counter.clone();
        move |_: &[u8]| {
            counter.fetch_add(1, Ordering::Relaxed);
            Err(preprocess::DecodeError::Broken("on purpose".into()))
        }
    });
    let mut late = row(0, ImageRef::Base64(Bytes::new()));
    late.request.deadline = Some("2020-01-01T00:00:00Z".parse().unwrap());
    let mut early = row(1, ImageRef::Base64(Bytes::new()));
    early.request.deadline = Some("9000-01-01T00:00:00Z".parse().unwrap());
    bench.send_row(late, Bytes::from_static(b"late"));
    bench.send_row(early, Bytes::from_static(b"early"));
    let results = bench.finish(threads);
    assert_eq!((code(&results[&0]), code(&results[&1])), (Some(Code::Deadline), Some(Code::Decode)));
    assert_eq!(calls.load(Ordering::Relaxed), 1);
}

#[test]
fn an_image_permit_shrinks_to_the_pixels() {
    let mut bench = Bench::new();
    let body = png(60, 50, 1);
    assert!(body.len() > SIZE * SIZE * 3);
    let threads = spawn(&config(1), &bench.received, &bench.outputs);
    bench.send(0, body);
    bench.input = None;
    for thread in threads.unwrap() {
        thread.join().unwrap();
    }
    assert_eq!(bench.images.used(), Limit { items: 1, bytes: SIZE * SIZE * 3 });
    assert_eq!(bench.finish(Ok(Vec::new())).len(), 1);
}

#[test]
fn threads_end_when_the_queue_for_devices_is_closed() {
    let bench = Bench::new();
    let outputs = Outputs { ready: Arc::new(Err), ..bench.outputs.clone() };
    let threads = spawn(&config(2), &bench.received, &outputs).unwrap();
    bench.send(0, png(3, 3, 0));
    bench.send(1, png(3, 3, 0));
    for thread in threads {
        thread.join().unwrap();
    }
    // Neither captioned nor blamed: the tickets stay open, so that the next worker reads the messages again.
    assert!(bench.failed.is_empty());
    let mut lost: Vec<_> = std::iter::from_fn(|| bench.ledger.take_lost()).map(|lost| lost.offset).collect();
    lost.sort_unstable();
    assert_eq!(lost, [0, 1]);
}

#[test]
fn waiting_for_room_in_a_queue_counts_as_blocked() {
    let mut bench = Bench::new();
    let (failed_in, failed) = async_channel::bounded(1);
    bench.failed = failed;
    let outputs = Outputs { finished: failed_in, ..bench.outputs.clone() };
    let threads = spawn(&config(1), &bench.received, &outputs);
    let metrics = bench.outputs.metrics.clone();
    bench.send(0, "no image");
    while bench.failed.is_empty() {
        thread::yield_now();
    }
    assert_eq!(metrics.blocked_so_far(Stage::Decode), Duration::ZERO);
    bench.send(1, "no image");
    while metrics.blocked_so_far(Stage::Decode).is_zero() {
        thread::yield_now();
    }
    bench.failed.recv_blocking().unwrap().resolve(Outcome::Published);
    bench.input = None;
    for thread in threads.unwrap() {
        thread.join().unwrap();
    }
    bench.failed.recv_blocking().unwrap().resolve(Outcome::Published);
    assert_eq!(bench.ledger.open_tickets(), 0);
}

#[test]
fn records_name_an_address_without_its_secrets_and_never_inline_data() {
    let http = ImageRef::Http("https://user:pw@host.example/a.jpg?token=1#x".parse().unwrap());
    assert_eq!(address(&http, false).as_deref(), Some("https://host.example/a.jpg"));
    assert_eq!(address(&http, true).as_deref(), Some("https://user:pw@host.example/a.jpg?token=1#x"));
    let file = ImageRef::File(PathBuf::from("/data/a b.png"));
    assert_eq!(address(&file, false).as_deref(), Some("file:///data/a%20b.png"));
    assert_eq!(address(&ImageRef::Base64(Bytes::from_static(b"AAAA")), true), None);
    assert_eq!(address(&ImageRef::Percent(Bytes::from_static(b"AAAA")), true), None);
}

#[test]
fn the_digest_is_that_of_the_encoded_bytes() {
    assert_eq!(sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}
