//! The passes with AVX-512 VNNI, which multiplies four bytes by four and adds the products, in one instruction.

#[allow(clippy::wildcard_imports, reason = "the names of intrinsics tell where they come from")]
use std::arch::x86_64::*;
use std::mem::transmute;

use super::{BYTES, ROWS, Rows, Windows, load, put};
use crate::caption::preprocess::resize::weights::{GROUP, HALF, PRECISION, Weights};

/// Bytes of a row that the vertical pass takes at a time: a register.
pub(in super::super) const COLUMNS: usize = 64;

/// The weights of a group. Each is `d[0] + d[1] * 2⁸ + d[2] * 2¹⁶` with digits from −128 to 127, and the digits of one
/// place are the four bytes of a word. Sums of digits wrap like sums of weights, so that they come out the same.
type Digits = [i32; 3];

fn digits(weights: &[i32; GROUP]) -> Digits {
    let mut rest = *weights;
    [(); 3].map(|()| {
        let digits = rest.map(|weight| weight as i8);
        rest = std::array::from_fn(|i| (rest[i] - i32::from(digits[i])) >> 8);
        i32::from_le_bytes(digits.map(i8::cast_unsigned))
    })
}

/// See [`super::super::kernels::Kernels::horizontal`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(in super::super) fn horizontal(source: &[u8], width: usize, weights: &Weights, target: &mut [u8]) {
    let windows = Windows::new(&weights.aligned(), digits);
    let mut groups = vec![_mm512_setzero_si512(); windows.groups_of_row(width)];
    let to = windows.starts.len();
    let windows: Vec<_> = windows.iter().map(|(start, digits)| (start / GROUP, digits)).collect();
    // Closes the gap between pixels.
    let close = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    for (target, source) in target.chunks_mut(ROWS * to * 3).zip(source.chunks(ROWS * width * 3)) {
        split(&Rows::new(source, width), &mut groups);
        for (at, windows) in windows.chunks(GROUP).enumerate() {
            let mut pixels = [_mm512_setzero_si512(); GROUP];
            for (i, (first, digits)) in windows.iter().enumerate() {
                pixels[i] = sum(&groups[*first..][..digits.len()], digits);
            }
            let [a, b, c, d] = pixels;
            let bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
            // SAFETY: both are 64 bytes, of which any are valid.
            let pixels = unsafe { transmute::<__m512i, [[u8; 16]; ROWS]>(_mm512_shuffle_epi8(bytes, close)) };
            put(&pixels, target, to, at);
        }
    }
}

/// Splits rows into groups: a quarter of a register has four R, four G, four B and four zeros of a row.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn split(rows: &Rows<'_>, groups: &mut [__m512i]) {
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

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn spread([a, b, c, d]: [&[u8; BYTES]; ROWS]) -> __m512i {
    let order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
    let low = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(load(a)), load(b));
    let high = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(load(c)), load(d));
    _mm512_shuffle_epi8(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high), order)
}

/// The pixel of each row that neighbours and weights make.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn sum(groups: &[__m512i], digits: &[Digits]) -> __m512i {
    let mut sums = zero();
    for (i, digits) in digits.iter().enumerate() {
        add_products(&mut sums, groups[i], *digits);
    }
    join(sums)
}

/// What sums of digits begin with.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn zero() -> [__m512i; 3] {
    [_mm512_set1_epi32(HALF), _mm512_setzero_si512(), _mm512_setzero_si512()]
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn add_products([low, middle, high]: &mut [__m512i; 3], pixels: __m512i, digits: Digits) {
    *low = _mm512_dpbusd_epi32(*low, pixels, _mm512_set1_epi32(digits[0]));
    *middle = _mm512_dpbusd_epi32(*middle, pixels, _mm512_set1_epi32(digits[1]));
    *high = _mm512_dpbusd_epi32(*high, pixels, _mm512_set1_epi32(digits[2]));
}

/// The sum of the sums of digits, without the bits behind the point.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn join([low, middle, high]: [__m512i; 3]) -> __m512i {
    let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(middle), _mm512_slli_epi32::<16>(high));
    _mm512_srai_epi32::<PRECISION>(_mm512_add_epi32(sum, low))
}

/// See [`super::super::kernels::Kernels::vertical`]. Rows have at least [`COLUMNS`] bytes, and weights are in groups.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(in super::super) fn vertical(source: &[u8], row: usize, weights: &Weights, target: &mut [u8]) {
    let windows = Windows::new(weights, digits);
    for (target, (start, digits)) in target.chunks_exact_mut(row).zip(windows.iter()) {
        let source = &source[start * row..];
        for column in (0..row).step_by(COLUMNS) {
            // The last columns are computed again where they don't fill a register.
            let column = column.min(row - COLUMNS);
            let [mut first, mut second, mut third, mut fourth] = [zero(); 4];
            for (i, digits) in digits.iter().enumerate() {
                let rows = &source[i * GROUP * row..];
                let [a, b] = [register(rows, column), register(rows, column + row)];
                let [c, d] = [register(rows, column + row * 2), register(rows, column + row * 3)];
                let [ab_low, ab_high] = [_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b)];
                let [cd_low, cd_high] = [_mm512_unpacklo_epi8(c, d), _mm512_unpackhi_epi8(c, d)];
                // Four neighbours of a column side by side; the packing below restores the order of columns.
                add_products(&mut first, _mm512_unpacklo_epi16(ab_low, cd_low), *digits);
                add_products(&mut second, _mm512_unpackhi_epi16(ab_low, cd_low), *digits);
                add_products(&mut third, _mm512_unpacklo_epi16(ab_high, cd_high), *digits);
                add_products(&mut fourth, _mm512_unpackhi_epi16(ab_high, cd_high), *digits);
            }
            let low = _mm512_packs_epi32(join(first), join(second));
            let high = _mm512_packs_epi32(join(third), join(fourth));
            // SAFETY: both are 64 bytes, of which any are valid.
            let bytes = unsafe { transmute::<__m512i, [u8; COLUMNS]>(_mm512_packus_epi16(low, high)) };
            *target[column..].first_chunk_mut().expect("a register fits into a row") = bytes;
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn register(bytes: &[u8], at: usize) -> __m512i {
    let bytes = *bytes[at..].first_chunk().expect("a register fits into a row");
    // SAFETY: both are 64 bytes, of which any are valid.
    unsafe { transmute::<[u8; COLUMNS], __m512i>(bytes) }
}
