//! `blipstream bench fetching`: from addresses to the model's pixels, without Kafka and a captioner.

use std::io::BufReader;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use async_channel::Receiver;
use bytes::Bytes;
use clap::ValueEnum;
use futures::StreamExt;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::budget::{Limit, Permit, Pool};
use crate::caption::preprocess::{DecodeError, Preprocessor, TurboJpeg};
use crate::command::input::lines;
use crate::command::{Exit, Usage, print_json, runtime};
use crate::message::ImageRef;
use crate::metrics::Metrics;
use crate::settings::{Decode, Fetch, Flow, Output};
use crate::stage::decode::{self, Decoded};
use crate::stage::fetch::Fetcher;

/// Arguments of `bench fetching`.
#[derive(Debug, clap::Args)]
pub(super) struct FetchingArgs {
    /// A file with an address a line
    #[arg(long, value_name = "FILE")]
    list: PathBuf,
    /// Decode pictures whole, or JPEGs at the smallest part of their size that the model's square fits into
    #[arg(long, default_value = "full", value_enum)]
    decode: Mode,
    /// Side of the model's square, in pixels
    #[arg(long, default_value_t = 384, value_name = "PIXELS")]
    side: usize,
    /// Threads that decode; as many as cores by default
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// A network that may be reached although it is not public; may be given several times
    #[arg(long, value_name = "CIDR", default_value = "127.0.0.0/8")]
    allow_network: Vec<ipnet::IpNet>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mode {
    Full,
    Scaled,
}

/// What is printed, as one JSON object.
#[derive(Debug, Default, Serialize)]
struct Report {
    /// Pictures that were decoded.
    images: usize,
    /// Those that were not.
    failed: usize,
    /// From the first request to the last decoded picture.
    seconds: f64,
    /// Encoded bytes that were fetched.
    bytes: usize,
}

/// Runs the command.
pub(super) fn run(args: &FetchingArgs) -> anyhow::Result<Exit> {
    let file = std::fs::File::open(&args.list).with_context(|| format!("cannot read {}", args.list.display()))?;
    let images: Vec<ImageRef> = lines(BufReader::new(file))
        .map(|line| Ok(ImageRef::parse(&line?)?))
        .collect::<anyhow::Result<_>>()
        .with_context(|| args.list.display().to_string())?;
    if images.is_empty() {
        return Err(Usage(format!("{} names no image", args.list.display())).into());
    }
    let report = measure(args, images)?;
    print_json(&report)?;
    Ok(if report.failed == 0 { Exit::Done } else { Exit::Failed })
}

fn measure(args: &FetchingArgs, images: Vec<ImageRef>) -> anyhow::Result<Report> {
    let settings = Fetch {
        allow_networks: args.allow_network.clone(),
        // One host is all there is, and each address is fetched for itself.
        per_host: Fetch::default().concurrency,
        share: false,
        ..Fetch::default()
    };
    let concurrency = settings.concurrency;
    let flow = Flow::default();
    let pool = Pool::new(Limit { items: concurrency * 2, bytes: flow.max_image_bytes.as_u64() as usize });
    let pixel_bytes = args.side * args.side * 3;
    let fetcher = Fetcher::new(&settings, pool, pixel_bytes, Arc::new(Metrics::new()))?;
    let mut decode = Decode { threads: args.threads.unwrap_or(0), ..Decode::default() };
    if matches!(args.decode, Mode::Scaled) {
        // A worker would decode whole pictures without it.
        TurboJpeg::open()?;
        decode.jpeg_reducing_gap = 1.0;
    }
    let config = decode::Config::new(Preprocessor::blip(args.side), &decode, &Output::default());
    let (sender, receiver) = async_channel::bounded(concurrency);
    let decoders: Vec<_> = (0..config.threads)
        .map(|_| {
            let (receiver, decoder) = (receiver.clone(), config.decoder());
            std::thread::spawn(move || decode_all(&receiver, decoder))
        })
        .collect();
    drop(receiver);
    let started = Instant::now();
    let mut report = Report::default();
    runtime()?.block_on(async {
        let mut fetches =
            futures::stream::iter(&images).map(|image| fetcher.fetch(image, None)).buffer_unordered(concurrency);
        while let Some(fetched) = fetches.next().await {
            match fetched {
                Ok((body, permit)) => {
                    report.bytes += body.len();
                    // The threads end after their input.
                    let _ = sender.send((body, permit)).await;
                }
                Err(error) => {
                    report.failed += 1;
                    tracing::warn!("{error}");
                }
            }
        }
        drop(fetches);
    });
    drop(sender);
    for decoder in decoders {
        let (good, bad) = decoder.join().map_err(|_| anyhow::anyhow!("a decoder panicked"))?;
        report.images += good;
        report.failed += bad;
    }
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// Decodes what comes; says how many pictures were good and how many bad.
fn decode_all(
    input: &Receiver<(Bytes, Permit)>,
    mut decoder: impl FnMut(&[u8]) -> Result<Decoded, DecodeError>,
) -> (usize, usize) {
    let (mut good, mut bad) = (0, 0);
    while let Ok((body, _permit)) = input.recv_blocking() {
        // Records name it.
        std::hint::black_box(Sha256::digest(&body));
        match decoder(&body) {
            Ok(decoded) => {
                std::hint::black_box(decoded.pixels);
                good += 1;
            }
            Err(error) => {
                tracing::warn!("{error}");
                bad += 1;
            }
        }
    }
    (good, bad)
}
