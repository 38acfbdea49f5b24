//! The parts of the captioner one by one: `make parts`, or `make parts ARGS=attention` for some of them.

use std::hint::black_box;
use std::time::Duration;

use blipstream::caption::preprocess::{Limits, Preprocessor, Resizer, TurboJpeg, decode, decode_at_least};
use blipstream::caption::{Backend, DtypeSpec, kernels, pictures};
use blipstream::stage::batch::{Queue, Take};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Of BLIP base: tokens of an image, their width, that of the inner layer, and heads.
const TOKENS: usize = 577;
const WIDTH: usize = 768;
const INNER: usize = 3072;
const HEADS: usize = 12;

/// Linear layers on every backend and precision that the machine has. The throughput is in operations.
#[expect(clippy::print_stderr, reason = "for people: what is missing has to be told")]
fn linear(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("linear");
    for (rows, inputs, outputs) in
        [(1, WIDTH, WIDTH), (16, WIDTH, INNER), (2 * TOKENS, WIDTH, INNER), (2 * TOKENS, INNER, WIDTH)]
    {
        group.throughput(Throughput::Elements((2 * rows * inputs * outputs) as u64));
        for (backend, dtype) in [
            (Backend::Native(None), DtypeSpec::F32),
            (Backend::Native(None), DtypeSpec::Bf16),
            (Backend::OneDnn, DtypeSpec::F32),
            (Backend::OneDnn, DtypeSpec::Bf16),
            (Backend::OneDnn, DtypeSpec::Int8),
            (Backend::Candle, DtypeSpec::F32),
        ] {
            match kernels::linear(backend, dtype, rows, inputs, outputs) {
                Ok(mut work) => {
                    let id = BenchmarkId::new(format!("{backend} {dtype}"), format!("{rows}x{inputs}x{outputs}"));
                    group.bench_function(id, |bencher| bencher.iter(&mut work));
                }
                Err(error) => eprintln!("left out: {error}"),
            }
        }
    }
}

fn rows(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("rows");
    group.throughput(Throughput::Elements((TOKENS * WIDTH) as u64));
    let mut norm = kernels::layer_norm(TOKENS, WIDTH).unwrap();
    group.bench_function("layer norm", |bencher| bencher.iter(&mut norm));
    group.throughput(Throughput::Elements((48 * TOKENS) as u64));
    let mut softmax = kernels::softmax(48, TOKENS);
    group.bench_function("softmax, one thread", |bencher| bencher.iter(&mut softmax));
    for images in [1, 2] {
        group.throughput(Throughput::Elements((4 * images * TOKENS * TOKENS * WIDTH) as u64));
        let mut attention = kernels::attention(images, TOKENS, HEADS, WIDTH / HEADS).unwrap();
        group.bench_function(BenchmarkId::new("attention", images), |bencher| bencher.iter(&mut attention));
    }
}

/// One photograph on one thread, to BLIP base's 384 pixels: decoded whole, or with sides of at least so many times that.
fn preprocessing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("preprocessing");
    let limits = Limits { max_pixels: 1 << 26, max_side: 1 << 14, max_memory: 1 << 30 };
    let (preprocessor, mut resizer) = (Preprocessor::blip(384), Resizer::new());
    for (width, height) in [(640, 427), (1024, 683), (2048, 1365), (4000, 3000)] {
        let jpeg = pictures::photograph(width, height, 1).unwrap();
        group.throughput(Throughput::Elements(u64::from(width * height)));
        for (gap, turbo) in [1, 2].into_iter().zip(std::iter::repeat_with(TurboJpeg::open)) {
            let Ok(turbo) = turbo else { continue };
            let mut work = || {
                let picture = decode_at_least(&jpeg, &limits, gap * 384, &turbo).unwrap();
                preprocessor.resize(&picture, &mut resizer).unwrap()
            };
            group.bench_function(
                BenchmarkId::new(format!("both, gap {gap}"), format!("{width}x{height}")),
                |bencher| {
                    bencher.iter(|| black_box(work()));
                },
            );
        }
        group.bench_function(BenchmarkId::new("decode", format!("{width}x{height}")), |bencher| {
            bencher.iter(|| black_box(decode(&jpeg, &limits).unwrap()));
        });
        let picture = decode(&jpeg, &limits).unwrap();
        group.bench_function(BenchmarkId::new("resize", format!("{width}x{height}")), |bencher| {
            bencher.iter(|| black_box(preprocessor.resize(&picture, &mut resizer).unwrap()));
        });
    }
}

/// Items through the queue, two lanes, 16 at a time.
fn batcher(criterion: &mut Criterion) {
    const ITEMS: u64 = 1024;
    let mut group = criterion.benchmark_group("batcher");
    group.throughput(Throughput::Elements(ITEMS));
    let take = Take { max: 16, linger: Duration::ZERO, work: Duration::ZERO };
    group.bench_function("push and take", |bencher| {
        let queue = Queue::<u64>::new(ITEMS as usize, &[4, 1], |_| None);
        bencher.iter(|| {
            for item in 0..ITEMS {
                queue.push(usize::from(item % 3 == 0), item).unwrap();
            }
            let mut left = ITEMS;
            while left > 0 {
                let (items, _) = queue.take(take).unwrap();
                left -= items.len() as u64;
                queue.done();
            }
        });
    });
}

criterion_group! {
    name = parts;
    config = Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1)).sample_size(20);
    targets = linear, rows, preprocessing, batcher
}
criterion_main!(parts);
