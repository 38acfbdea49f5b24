//! The passes with AVX2, which multiplies pairs of 16-bit numbers and adds the products, in one instruction.

#[allow(clippy::wildcard_imports, reason = "the names of intrinsics tell where they come from")]
use std::arch::x86_64::*;
use std::mem::transmute;

use super::{BYTES, ROWS, Rows, Windows, load, put};
use crate::caption::preprocess::resize::weights::{GROUP, HALF, PRECISION, Weights};

/// Bytes of a row that the vertical pass takes at a time: a register.
pub(in super::super) const COLUMNS: usize = 32;

/// Bits of the lower half of a weight.
const LOW: i32 = 11;

/// The weights of a group, in halves of 16 bits each: the upper halves of the first and of the second pair, then the
/// lower ones. Sums of halves wrap like sums of weights, so that they come out the same.
type Halves = [i32; 4];

fn halves(weights: &[i32; GROUP]) -> Halves {
    let high = weights.map(|weight| weight >> LOW);
    let low = weights.map(|weight| weight & ((1 << LOW) - 1));
    let pair = |halves: &[i32]| (halves[0] & 0xFFFF) | halves[1] << 16;
    [pair(&high[..2]), pair(&high[2..]), pair(&low[..2]), pair(&low[2..])]
}

/// A group of four rows: the first and second pair of pixels of two rows, then those of the other two. Half a register
/// has two R, two G, two B and two zeros of a row, of 16 bits each.
type Group = [__m256i; 4];

/// See [`super::super::kernels::Kernels::horizontal`].
#[target_feature(enable = "avx2")]
pub(in super::super) fn horizontal(source: &[u8], width: usize, weights: &Weights, target: &mut [u8]) {
    let windows = Windows::new(&weights.aligned(), halves);
    let mut groups = vec![[_mm256_setzero_si256(); 4]; windows.groups_of_row(width)];
    let to = windows.starts.len();
    let windows: Vec<_> = windows.iter().map(|(start, halves)| (start / GROUP, halves)).collect();
    // Closes the gap between pixels.
    let close = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    for (target, source) in target.chunks_mut(ROWS * to * 3).zip(source.chunks(ROWS * width * 3)) {
        split(&Rows::new(source, width), &mut groups);
        for (at, windows) in windows.chunks(GROUP).enumerate() {
            let mut pixels = [[_mm256_setzero_si256(); 2]; GROUP];
            for (i, (first, halves)) in windows.iter().enumerate() {
                pixels[i] = sum(&groups[*first..][..halves.len()], halves);
            }
            let [a, b, c, d] = pixels;
            let first = _mm256_packus_epi16(_mm256_packs_epi32(a[0], b[0]), _mm256_packs_epi32(c[0], d[0]));
            let second = _mm256_packus_epi16(_mm256_packs_epi32(a[1], b[1]), _mm256_packs_epi32(c[1], d[1]));
            let rows = [_mm256_shuffle_epi8(first, close), _mm256_shuffle_epi8(second, close)];
            // SAFETY: both are 64 bytes, of which any are valid.
            let pixels = unsafe { transmute::<[__m256i; 2], [[u8; 16]; ROWS]>(rows) };
            put(&pixels, target, to, at);
        }
    }
}

/// Splits rows into groups.
#[target_feature(enable = "avx2")]
#[inline]
fn split(rows: &Rows<'_>, groups: &mut [Group]) {
    let [a, b, c, d] = rows.whole;
    let (whole, last) = groups.split_at_mut(a.len());
    for (i, group) in whole.iter_mut().enumerate() {
        *group = spread([&a[i], &b[i], &c[i], &d[i]]);
    }
    if let Some(group) = last.first_mut() {
        let [a, b, c, d] = rows.last;
        *group = spread([&a, &b, &c, &d]);
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn spread([a, b, c, d]: [&[u8; BYTES]; ROWS]) -> Group {
    let first = _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
    let second = _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    let [first, second] = [_mm256_broadcastsi128_si256(first), _mm256_broadcastsi128_si256(second)];
    let ab = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(load(a)), load(b));
    let cd = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(load(c)), load(d));
    [
        _mm256_shuffle_epi8(ab, first),
        _mm256_shuffle_epi8(ab, second),
        _mm256_shuffle_epi8(cd, first),
        _mm256_shuffle_epi8(cd, second),
    ]
}

/// The pixel of each row that neighbours and weights make: of two rows, then of the other two.
#[target_feature(enable = "avx2")]
#[inline]
fn sum(groups: &[Group], halves: &[Halves]) -> [__m256i; 2] {
    let zero = _mm256_setzero_si256();
    let half = _mm256_set1_epi32(HALF);
    let (mut high_ab, mut low_ab, mut high_cd, mut low_cd) = (zero, half, zero, half);
    for (i, [high, high_next, low, low_next]) in halves.iter().enumerate() {
        let [ab, ab_next, cd, cd_next] = groups[i];
        let [high, high_next] = [_mm256_set1_epi32(*high), _mm256_set1_epi32(*high_next)];
        let [low, low_next] = [_mm256_set1_epi32(*low), _mm256_set1_epi32(*low_next)];
        high_ab = add_products(add_products(high_ab, ab, high), ab_next, high_next);
        low_ab = add_products(add_products(low_ab, ab, low), ab_next, low_next);
        high_cd = add_products(add_products(high_cd, cd, high), cd_next, high_next);
        low_cd = add_products(add_products(low_cd, cd, low), cd_next, low_next);
    }
    [join([high_ab, low_ab]), join([high_cd, low_cd])]
}

#[target_feature(enable = "avx2")]
#[inline]
fn add_products(sum: __m256i, pixels: __m256i, weights: __m256i) -> __m256i {
    _mm256_add_epi32(sum, _mm256_madd_epi16(pixels, weights))
}

/// The sum of the sums of halves, without the bits behind the point.
#[target_feature(enable = "avx2")]
#[inline]
fn join([high, low]: [__m256i; 2]) -> __m256i {
    const BEHIND: i32 = PRECISION as i32;
    _mm256_srai_epi32::<BEHIND>(_mm256_add_epi32(_mm256_slli_epi32::<LOW>(high), low))
}

/// See [`super::super::kernels::Kernels::vertical`]. Rows have at least [`COLUMNS`] bytes, and weights are in groups.
#[target_feature(enable = "avx2")]
pub(in super::super) fn vertical(source: &[u8], row: usize, weights: &Weights, target: &mut [u8]) {
    let windows = Windows::new(weights, halves);
    let start_of_sums = [_mm256_setzero_si256(), _mm256_set1_epi32(HALF)];
    for (target, (start, halves)) in target.chunks_exact_mut(row).zip(windows.iter()) {
        let source = &source[start * row..];
        for column in (0..row).step_by(COLUMNS) {
            // The last columns are computed again where they don't fill a register.
            let column = column.min(row - COLUMNS);
            let mut sums = [start_of_sums; 4];
            for (i, [high, high_next, low, low_next]) in halves.iter().enumerate() {
                let rows = &source[i * GROUP * row..];
                let [a, b] = [register(rows, column), register(rows, column + row)];
                add_rows(&mut sums, a, b, *high, *low);
                let [a, b] = [register(rows, column + row * 2), register(rows, column + row * 3)];
                add_rows(&mut sums, a, b, *high_next, *low_next);
            }
            let [a, b, c, d] = sums;
            let first = _mm256_packs_epi32(join(a), join(b));
            let second = _mm256_packs_epi32(join(c), join(d));
            // SAFETY: both are 32 bytes, of which any are valid.
            let bytes = unsafe { transmute::<__m256i, [u8; COLUMNS]>(_mm256_packus_epi16(first, second)) };
            *target[column..].first_chunk_mut().expect("a register fits into a row") = bytes;
        }
    }
}

/// Adds a pair of neighbouring rows to upper and lower sums. The columns' order is restored by packing.
#[target_feature(enable = "avx2")]
#[inline]
fn add_rows(sums: &mut [[__m256i; 2]; 4], a: __m256i, b: __m256i, high: i32, low: i32) {
    let zero = _mm256_setzero_si256();
    let [first, second] = [_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)];
    let [high, low] = [_mm256_set1_epi32(high), _mm256_set1_epi32(low)];
    add_pair(&mut sums[0], _mm256_unpacklo_epi8(first, zero), high, low);
    add_pair(&mut sums[1], _mm256_unpackhi_epi8(first, zero), high, low);
    add_pair(&mut sums[2], _mm256_unpacklo_epi8(second, zero), high, low);
    add_pair(&mut sums[3], _mm256_unpackhi_epi8(second, zero), high, low);
}

#[target_feature(enable = "avx2")]
#[inline]
fn add_pair([high_sum, low_sum]: &mut [__m256i; 2], pair: __m256i, high: __m256i, low: __m256i) {
    *high_sum = add_products(*high_sum, pair, high);
    *low_sum = add_products(*low_sum, pair, low);
}

#[target_feature(enable = "avx2")]
#[inline]
fn register(bytes: &[u8], at: usize) -> __m256i {
    let bytes = *bytes[at..].first_chunk().expect("a register fits into a row");
    // SAFETY: both are 32 bytes, of which any are valid.
    unsafe { transmute::<[u8; COLUMNS], __m256i>(bytes) }
}
