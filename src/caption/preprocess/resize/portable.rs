//! The passes in plain loops: the definition of what the vector kernels compute, and what runs where there are none.
//!
//! Sums fit into 32 bits; they wrap by name because the checks of debug builds would keep the loops from vectorising.

use super::weights::{HALF, PRECISION, Weights};

/// See [`super::kernels::Kernels::horizontal`].
pub(super) fn horizontal(source: &[u8], width: usize, weights: &Weights, target: &mut [u8]) {
    let rows = target.chunks_exact_mut(weights.starts.len() * 3);
    for (target, source) in rows.zip(source.chunks_exact(width * 3)) {
        let (target, _) = target.as_chunks_mut();
        let (source, _) = source.as_chunks::<3>();
        for (pixel, (start, values)) in target.iter_mut().zip(weights.windows()) {
            let neighbours = &source[start..][..values.len()];
            let [mut red, mut green, mut blue] = [HALF; 3];
            for (i, weight) in values.iter().enumerate() {
                red = add_product(red, neighbours[i][0], *weight);
                green = add_product(green, neighbours[i][1], *weight);
                blue = add_product(blue, neighbours[i][2], *weight);
            }
            *pixel = [round(red), round(green), round(blue)];
        }
    }
}

/// See [`super::kernels::Kernels::vertical`].
pub(super) fn vertical(source: &[u8], row: usize, weights: &Weights, target: &mut [u8]) {
    let mut sums = vec![0_i32; row];
    for (target, (start, values)) in target.chunks_exact_mut(row).zip(weights.windows()) {
        sums.fill(HALF);
        for (source, weight) in source[start * row..].chunks_exact(row).zip(values) {
            for (sum, channel) in sums.iter_mut().zip(source) {
                *sum = add_product(*sum, *channel, *weight);
            }
        }
        for (channel, sum) in target.iter_mut().zip(&sums) {
            *channel = round(*sum);
        }
    }
}

#[inline]
fn add_product(sum: i32, channel: u8, weight: i32) -> i32 {
    sum.wrapping_add(i32::from(channel).wrapping_mul(weight))
}

/// Drops the bits behind the point.
fn round(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}
