use std::io::Write;
use std::process::Command;

use half::bf16;

use super::super::host::quantize_row;
use super::super::packed::Matrix;
use super::super::product::tests::{Place, numbers};
use super::*;

/// The versions that `make test-setup` gets: the system's, and version 3.
fn libraries() -> Vec<&'static Library> {
    let third = concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/onednn/lib/libdnnl.so.3");
    let found: Vec<_> =
        [None, Some(Path::new(third))].into_iter().filter_map(|file| Library::open(file).ok()).collect();
    if std::env::var_os("CI").is_some() {
        assert_eq!(found.len(), 2, "make test-setup gets two versions of oneDNN");
    } else if found.is_empty() {
        // Around the capture of the test harness: what is skipped proves nothing.
        let _ = std::io::stderr().write_all(b"SKIPPED: there is no oneDNN; make test-setup gets it\n");
    }
    found
}

#[test]
fn columns_are_cut_without_gaps_and_no_task_has_few_of_them() {
    for width in [1, 63, 64, 65, 127, 128, 130, 191, 192, 300, 30_524] {
        for columns in [64, 128, 320] {
            let cut: Vec<_> = super::factor::chunks(width, columns).collect();
            let joined = cut.windows(2).all(|pair| pair[0].end == pair[1].start);
            assert!(joined && cut[0].start == 0 && cut[cut.len() - 1].end == width, "{width} by {columns}: {cut:?}");
            assert!(
                cut.iter().all(|cut| cut.len() >= super::factor::COLUMNS.min(width)),
                "{width} by {columns}: {cut:?}"
            );
        }
    }
}

/// Rows of several tasks and of one, depths and widths of whole registers and odd ones, columns of several chunks.
const SHAPES: [(usize, usize, usize); 4] = [(1, 64, 64), (33, 70, 100), (577, 768, 384), (41, 3072, 130)];

/// `left` rounded row by row, and `right` column by column, as the factors are.
fn assert_products(
    library: &'static Library,
    number: Number,
    round_left: impl Fn(&[f32]) -> Vec<f64>,
    round_right: impl Fn(&[f32]) -> Vec<f64>,
) {
    for (rows, depth, width) in SHAPES {
        let (left, columns) = (numbers(rows * depth, 1), numbers(depth * width, 2));
        let factor = Factor::of_columns(library, number, &columns, depth).unwrap();
        let y = factor.product(Matrix::new(&left, depth, rows, depth), &Place).unwrap();
        let left: Vec<_> = left.chunks_exact(depth).map(&round_left).collect();
        let columns: Vec<_> = columns.chunks_exact(depth).map(&round_right).collect();
        for (index, y) in y.into_iter().enumerate() {
            let (row, column) = (index / width, index % width);
            let exact: f64 = left[row].iter().zip(&columns[column]).map(|(x, y)| x * y).sum();
            let place = (1000 * row + column) as f32;
            let (version, exact) = (library.version(), exact as f32);
            assert!(
                (y - place - exact).abs() < 1e-3 + place * 1e-6,
                "{version}, {number:?}: {y} is not {exact} at {row}, {column} of {rows} x {depth} x {width}"
            );
        }
    }
}

#[test]
fn products_of_f32_are_exact() {
    for library in libraries() {
        let exact = |row: &[f32]| row.iter().map(|x| f64::from(*x)).collect();
        assert_products(library, Number::F32, exact, exact);
    }
}

#[test]
fn products_of_integers_are_those_of_the_rounded_factors() {
    for library in libraries() {
        let round = |row: &[f32], most: f32| {
            let mut integers = vec![0; row.len()];
            let scale = f64::from(quantize_row(&mut integers, row, most));
            integers.into_iter().map(|x| f64::from(x) * scale).collect()
        };
        assert_products(
            library,
            Number::Int8,
            |row| round(row, 127.0),
            |row| round(row, library.largest_weight().unwrap()),
        );
    }
}

#[test]
fn products_of_bf16_are_those_of_the_rounded_factors_or_refused() {
    for library in libraries() {
        let round = |row: &[f32]| row.iter().map(|x| bf16::from_f32(*x).to_f64()).collect();
        if crate::caption::backend::has_bf16() {
            assert_products(library, Number::Bf16, round, round);
        } else {
            // Instead of taking minutes for an image. With AVX-512 some versions have kernels that widen it.
            match Factor::of_columns(library, Number::Bf16, &numbers(64 * 64, 1), 64) {
                Ok(_) => assert_products(library, Number::Bf16, round, round),
                Err(refused) => {
                    let told = refused.to_string();
                    assert!(told.contains("no fast kernel") || told.contains("no such kernel"), "{told}");
                }
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_none_and_an_empty_row_stays_empty() {
    for library in libraries() {
        for number in [Number::F32, Number::Int8] {
            let factor = Factor::of_columns(library, number, &numbers(64 * 64, 1), 64).unwrap();
            let mut left = numbers(3 * 64, 2);
            left[70] = f32::NAN;
            left[128..].fill(0.0);
            let y = factor.product(Matrix::new(&left, 64, 3, 64), &super::super::finish::AsIs).unwrap();
            assert!(y[..64].iter().all(|y| y.is_finite()), "{number:?}");
            assert!(y[64..128].iter().all(|y| y.is_nan()), "{number:?}");
            assert!(y[128..].iter().all(|y| *y == 0.0), "{number:?}");
        }
    }
}

/// A library that says of itself what `version` is.
fn imitation(version: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("fake.c"), folder.path().join("libdnnl.so"));
    let code = format!("int version[8] = {{{version}}}; int *dnnl_version(void) {{ return version; }}");
    std::fs::write(&source, code).unwrap();
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status().unwrap();
    assert!(built.success());
    (folder, library)
}

#[test]
fn a_library_that_cannot_serve_is_told_apart_from_a_missing_one() {
    let refusal = |file: &Path| Library::open(Some(file)).err().unwrap().to_string();
    assert!(refusal(Path::new("nowhere/libdnnl.so.3")).contains("oneDNN was not found"));
    let (_folder, old) = imitation("1, 8, 0");
    assert!(refusal(&old).contains("oneDNN 1.8, but 2.6 or newer"), "{}", refusal(&old));
    let (_folder, new) = imitation("4, 0, 0");
    assert!(refusal(&new).contains("oneDNN 4.0, but"), "{}", refusal(&new));
    // Its threads would be TBB's.
    let (_folder, other) = imitation("3, 2, 0, 0, 0, 0, 4");
    assert!(refusal(&other).contains("cannot be told to stay one"), "{}", refusal(&other));
    // For one thread, as it should be, but without the functions.
    let (_folder, hollow) = imitation("3, 2, 0, 0, 0, 0, 1");
    assert!(refusal(&hollow).contains("not a whole one"), "{}", refusal(&hollow));
    let (folder, _) = imitation("0");
    let text = folder.path().join("fake.c");
    assert!(refusal(&text).contains("was not found") && refusal(&text).contains("fake.c"), "{}", refusal(&text));
}
