//! What each pixel of the result takes from a row or column of the source.

use crate::caption::preprocess::Filter;

/// Bits of a weight behind the point: 32, less 8 of a pixel and 2 for sums that overshoot.
pub(super) const PRECISION: u32 = 32 - 8 - 2;

/// What a sum of weighted pixels begins with, so that dropping the bits behind the point rounds it.
pub(super) const HALF: i32 = 1 << (PRECISION - 1);

/// Neighbours that the vector kernels take at a time.
pub(super) const GROUP: usize = 4;

/// The weights of one pass: for each pixel of the result, its neighbours in the source and what they weigh.
#[derive(Debug)]
pub(super) struct Weights {
    /// First neighbour of each pixel of the result.
    pub(super) starts: Vec<usize>,
    /// Neighbours of each pixel.
    pub(super) taps: usize,
    /// `taps` weights of each pixel, with [`PRECISION`] bits behind the point.
    pub(super) values: Vec<i32>,
}

impl Weights {
    /// Weights to stretch `from` pixels to `to`. All neighbours lie in the source; they are whole groups, filled up
    /// with weights of 0, unless the source is smaller than that.
    ///
    /// The arithmetic is that of `precompute_coeffs` and `normalize_coeffs_8bpc` in Pillow's `Resample.c`, one
    /// operation of f64 after the other, since the last bit counts.
    pub(super) fn new(from: usize, to: usize, filter: Filter) -> Self {
        let scale = from as f64 / to as f64;
        // The filter widens where the picture shrinks: antialiasing.
        let widening = scale.max(1.0);
        let narrowing = 1.0 / widening;
        let reach = filter.reach() * widening;
        let centre = |at: usize| (at as f64 + 0.5) * scale;
        // Casts round towards zero, and what is negative to 0.
        let window = |at| (centre(at) - reach + 0.5) as usize..((centre(at) + reach + 0.5) as usize).min(from);
        let longest = (0..to).map(|at| window(at).len()).max().unwrap_or(0);
        let taps = longest.next_multiple_of(GROUP).min(from);

        let mut weights = Self { starts: Vec::with_capacity(to), taps, values: vec![0; to * taps] };
        let mut exact = Vec::with_capacity(longest);
        for (at, values) in weights.values.chunks_exact_mut(taps).enumerate() {
            let (window, centre) = (window(at), centre(at));
            let start = window.start.min(from - taps);
            let values = &mut values[window.start - start..];
            exact.clear();
            exact.extend(window.map(|pixel| filter.at((pixel as f64 - centre + 0.5) * narrowing)));
            let sum = exact.iter().fold(0.0, |sum, weight| sum + weight);
            for (value, weight) in values.iter_mut().zip(&exact) {
                // To the nearest, halves away from zero.
                let scaled = weight / sum * f64::from(1 << PRECISION);
                *value = (scaled + 0.5_f64.copysign(scaled)) as i32;
            }
            weights.starts.push(start);
        }
        weights
    }

    /// First neighbour and weights of each pixel.
    pub(super) fn windows(&self) -> impl Iterator<Item = (usize, &[i32])> {
        self.starts.iter().copied().zip(self.values.chunks_exact(self.taps))
    }
}

#[cfg(target_arch = "x86_64")]
impl Weights {
    /// Whether the neighbours of each pixel are whole groups.
    pub(super) fn in_groups(&self) -> bool {
        self.taps.is_multiple_of(GROUP)
    }

    /// The same weights, with windows that begin where a group of the source does. Their ends may lie beyond the
    /// source, with weights of 0.
    pub(super) fn aligned(&self) -> Self {
        let longest = self.starts.iter().map(|start| start % GROUP + self.taps).max().unwrap_or(0);
        let taps = longest.next_multiple_of(GROUP);
        let mut values = vec![0; self.starts.len() * taps];
        for (aligned, (start, values)) in values.chunks_exact_mut(taps).zip(self.windows()) {
            aligned[start % GROUP..][..values.len()].copy_from_slice(values);
        }
        Self { starts: self.starts.iter().map(|start| start - start % GROUP).collect(), taps, values }
    }
}

impl Filter {
    /// Distance in pixels beyond which it is 0.
    fn reach(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    /// Its value at a distance in pixels.
    fn at(self, distance: f64) -> f64 {
        const A: f64 = -0.5;
        let x = distance.abs();
        match self {
            Self::Bilinear if x < 1.0 => 1.0 - x,
            Self::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            _ => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_all_sizes(check: impl Fn(usize, usize, &Weights)) {
        for from in (1..70).chain([383, 384, 385, 8192]) {
            for to in (1..30).chain([384]) {
                for filter in [Filter::Bilinear, Filter::Bicubic] {
                    check(from, to, &Weights::new(from, to, filter));
                }
            }
        }
    }

    #[test]
    fn neighbours_lie_in_the_source_and_weigh_one_together() {
        of_all_sizes(|from, to, weights| {
            assert_eq!(weights.starts.len(), to);
            for (start, values) in weights.windows() {
                assert!(start + values.len() <= from, "{from} to {to}: {start}");
                // Each weight is rounded by half of its last bit at most.
                let sum: i32 = values.iter().sum();
                assert!(sum.abs_diff(1 << PRECISION) as usize <= values.len().div_ceil(2), "{from} to {to}: {sum}");
            }
        });
    }

    /// The vector kernels split weights into parts that hold no more.
    #[test]
    fn no_weight_is_larger_than_two() {
        of_all_sizes(|from, to, weights| {
            let largest = weights.values.iter().map(|weight| weight.abs()).max().unwrap_or(0);
            assert!(largest < 127 << 16, "{from} to {to}: {largest}");
        });
    }
}
