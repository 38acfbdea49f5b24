//! Which instructions the passes are computed with.

use super::portable;
use super::weights::Weights;
#[cfg(target_arch = "x86_64")]
use super::x86::{avx2, vnni};

/// A set of instructions. All give the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernels {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Default for Kernels {
    /// The fastest that this machine has.
    fn default() -> Self {
        Self::all().into_iter().rev().find(|kernels| kernels.runs_here()).unwrap_or(Self::Portable)
    }
}

impl Kernels {
    /// All of this architecture, the fastest one last.
    pub(super) fn all() -> Vec<Self> {
        vec![
            Self::Portable,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2,
            #[cfg(target_arch = "x86_64")]
            Self::Vnni,
        ]
    }

    /// Whether this machine has the instructions.
    pub(super) fn runs_here(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vnni")
            }
        }
    }

    /// Stretches each row of `width` RGB pixels to as many pixels as `weights` are for.
    pub(super) fn horizontal(self, source: &[u8], width: usize, weights: &Weights, target: &mut [u8]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 if self.runs_here() => {
                // SAFETY: the machine has the instructions.
                unsafe { avx2::horizontal(source, width, weights, target) }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Vnni if self.runs_here() => {
                // SAFETY: the machine has the instructions.
                unsafe { vnni::horizontal(source, width, weights, target) }
            }
            _ => portable::horizontal(source, width, weights, target),
        }
    }

    /// Stretches the columns of rows of `row` bytes: as many rows come out as `weights` are for.
    pub(super) fn vertical(self, source: &[u8], row: usize, weights: &Weights, target: &mut [u8]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 if self.runs_here() && weights.in_groups() && row >= avx2::COLUMNS => {
                // SAFETY: the machine has the instructions.
                unsafe { avx2::vertical(source, row, weights, target) }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Vnni if self.runs_here() && weights.in_groups() && row >= vnni::COLUMNS => {
                // SAFETY: the machine has the instructions.
                unsafe { vnni::vertical(source, row, weights, target) }
            }
            _ => portable::vertical(source, row, weights, target),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::caption::preprocess::Filter;

    /// Bytes that no two pictures share; every third picture has extremes only, which overshoot most.
    fn noise(seed: u64, length: usize) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(seed);
        let extremes = seed.is_multiple_of(3);
        (0..length).map(|_| if extremes { u8::MAX * u8::from(random.bool()) } else { random.u8(..) }).collect()
    }

    fn assert_equal_to_portable(width: usize, height: usize, size: usize, filter: Filter, seed: u64) {
        let source = noise(seed, width * height * 3);
        let pass = |kernels: Kernels, down: bool| {
            if down {
                let mut target = vec![0; width * size * 3];
                kernels.vertical(&source, width * 3, &Weights::new(height, size, filter), &mut target);
                target
            } else {
                let mut target = vec![0; size * height * 3];
                kernels.horizontal(&source, width, &Weights::new(width, size, filter), &mut target);
                target
            }
        };
        for down in [false, true] {
            let expected = pass(Kernels::Portable, down);
            for kernels in Kernels::all().into_iter().filter(|kernels| kernels.runs_here()) {
                assert!(pass(kernels, down) == expected, "{kernels:?}, {width}x{height} to {size}, down: {down}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn all_kernels_give_the_same_bytes(
            (width, height) in (1..90_usize, 1..90_usize),
            size in 1..60_usize,
            filter in prop::sample::select(vec![Filter::Bilinear, Filter::Bicubic]),
            seed: u64,
        ) {
            assert_equal_to_portable(width, height, size, filter, seed);
        }
    }

    #[test]
    fn all_kernels_give_the_same_bytes_of_long_pictures() {
        for (width, height, size) in [(3000, 3, 7), (3, 3000, 7), (8192, 2, 1), (25, 8192, 1), (641, 429, 384)] {
            assert_equal_to_portable(width, height, size, Filter::Bicubic, 3);
            assert_equal_to_portable(width, height, size, Filter::Bicubic, 4);
        }
    }
}
