//! One vector register of f32, for the inner loops that the compiler does not find by itself.

use half::bf16;

/// Numbers of the widest register.
pub(super) const WIDEST: usize = 16;

/// A vector register of f32.
///
/// # Safety
/// The functions of an implementation may only be reached on a machine that has its instructions, and have to be inlined
/// into a function that is compiled for them.
pub(in crate::caption) unsafe trait Lanes: Copy {
    /// Numbers in a register.
    const COUNT: usize;
    /// Rows of a tile two registers wide whose sums stay in registers.
    const ROWS: usize;

    /// Zeros.
    unsafe fn zero() -> Self;
    /// The same number in each lane.
    unsafe fn splat(x: f32) -> Self;
    /// Reads [`Self::COUNT`] numbers.
    unsafe fn load(from: *const f32) -> Self;
    /// Reads [`Self::COUNT`] numbers and widens them.
    unsafe fn widen(from: *const bf16) -> Self;
    /// Writes [`Self::COUNT`] numbers.
    unsafe fn store(self, to: *mut f32);
    /// The sum.
    unsafe fn add(self, other: Self) -> Self;
    /// The product.
    unsafe fn mul(self, other: Self) -> Self;
    /// The quotient.
    unsafe fn div(self, other: Self) -> Self;
    /// The larger of both; `other` where one of them is no number.
    unsafe fn max(self, other: Self) -> Self;
    /// The smaller of both; `other` where one of them is no number.
    unsafe fn min(self, other: Self) -> Self;
    /// 2ⁿ, where n stands in the lowest bits of each lane.
    unsafe fn power_of_two(self) -> Self;
    /// `self · factor + addend`, rounded once where the machine can.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
}

/// For any machine: so many numbers, which the compiler puts into the registers that there are.
#[derive(Clone, Copy)]
pub(in crate::caption) struct Plain<const N: usize>([f32; N]);

/// The registers of SSE2, NEON and the like.
pub(in crate::caption) type Four = Plain<4>;

/// One number, for the ends of rows that do not fill a register.
pub(in crate::caption) type One = Plain<1>;

#[expect(clippy::inline_always, reason = "see the trait")]
unsafe impl<const N: usize> Lanes for Plain<N> {
    const COUNT: usize = N;
    const ROWS: usize = 6;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; N])
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; N])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller has so many numbers there.
        Self(unsafe { from.cast::<[f32; N]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn widen(from: *const bf16) -> Self {
        // SAFETY: the caller has so many numbers there.
        Self(unsafe { from.cast::<[bf16; N]>().read_unaligned() }.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16)))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller has room for so many numbers there.
        unsafe { to.cast::<[f32; N]>().write_unaligned(self.0) };
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] * other.0[lane]))
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] / other.0[lane]))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| if self.0[lane] > other.0[lane] { self.0[lane] } else { other.0[lane] }))
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| if self.0[lane] < other.0[lane] { self.0[lane] } else { other.0[lane] }))
    }

    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        Self(self.0.map(|x| f32::from_bits((x.to_bits() << 23).wrapping_add(0x3f80_0000))))
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(std::array::from_fn(|lane| {
            let (x, y, z) = (self.0[lane], factor.0[lane], addend.0[lane]);
            // Elsewhere it may be a call of a slow function.
            if cfg!(target_arch = "aarch64") { x.mul_add(y, z) } else { x * y + z }
        }))
    }
}

#[cfg(target_arch = "x86_64")]
pub(in crate::caption) mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm_loadu_si128, _mm256_add_epi32, _mm256_add_ps, _mm256_castps_si256, _mm256_castsi256_ps,
        _mm256_cvtepu16_epi32, _mm256_div_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_max_ps,
        _mm256_min_ps, _mm256_mul_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_slli_epi32,
        _mm256_storeu_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_castps_si512, _mm512_castsi512_ps,
        _mm512_cvtepu16_epi32, _mm512_div_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_max_ps, _mm512_min_ps,
        _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps,
    };

    use half::bf16;

    use super::Lanes;

    /// Eight lanes, of AVX2 with fused multiply-add.
    #[derive(Clone, Copy)]
    pub(in crate::caption) struct Avx2(__m256);

    /// Sixteen lanes, of AVX-512.
    #[derive(Clone, Copy)]
    pub(in crate::caption) struct Avx512(__m512);

    #[expect(clippy::inline_always, reason = "see the trait")]
    // SAFETY: nothing here is more than one instruction of AVX2 or FMA.
    unsafe impl Lanes for Avx2 {
        const COUNT: usize = 8;
        // 12 of 16 registers hold sums, two the weights, one or two what is multiplied.
        const ROWS: usize = 6;

        #[inline(always)]
        unsafe fn zero() -> Self {
            Self(unsafe { _mm256_setzero_ps() })
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            Self(unsafe { _mm256_set1_ps(x) })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Self(unsafe { _mm256_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn widen(from: *const bf16) -> Self {
            let narrow = unsafe { _mm_loadu_si128(from.cast()) };
            Self(unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(narrow))) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self.0) };
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            Self(unsafe { _mm256_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            Self(unsafe { _mm256_mul_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn div(self, other: Self) -> Self {
            Self(unsafe { _mm256_div_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            Self(unsafe { _mm256_max_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            Self(unsafe { _mm256_min_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn power_of_two(self) -> Self {
            let exponent = unsafe { _mm256_slli_epi32::<23>(_mm256_castps_si256(self.0)) };
            Self(unsafe { _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f80_0000))) })
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
            Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
        }
    }

    #[expect(clippy::inline_always, reason = "see the trait")]
    // SAFETY: nothing here is more than one instruction of AVX-512F.
    unsafe impl Lanes for Avx512 {
        const COUNT: usize = 16;
        // 24 of 32 registers hold sums.
        const ROWS: usize = 12;

        #[inline(always)]
        unsafe fn zero() -> Self {
            Self(unsafe { _mm512_setzero_ps() })
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            Self(unsafe { _mm512_set1_ps(x) })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Self(unsafe { _mm512_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn widen(from: *const bf16) -> Self {
            let narrow = unsafe { _mm256_loadu_si256(from.cast()) };
            Self(unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow))) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self.0) };
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            Self(unsafe { _mm512_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            Self(unsafe { _mm512_mul_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn div(self, other: Self) -> Self {
            Self(unsafe { _mm512_div_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            Self(unsafe { _mm512_max_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            Self(unsafe { _mm512_min_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn power_of_two(self) -> Self {
            let exponent = unsafe { _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0)) };
            Self(unsafe { _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f80_0000))) })
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
            Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
        }
    }
}

/// The caches that a line can be asked into, as the instruction of x86-64 numbers them.
pub(super) const FIRST_CACHE: i32 = 3;
pub(super) const SECOND_CACHE: i32 = 2;

/// Asks for a line of memory that is about to be used; any address will do.
#[inline(always)]
#[expect(clippy::inline_always, reason = "a part of hot loops")]
pub(super) fn prefetch<const CACHE: i32, T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every machine of this architecture has the instruction, and it reads nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<CACHE>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The instructions that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Whatever every machine of this architecture has.
    Plain,
    /// AVX2 and fused multiply-add.
    Avx2,
    /// AVX-512F.
    Avx512,
}

impl Isa {
    /// All of them, the least first.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Avx2, Self::Avx512];

    /// As a user writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this machine has it.
    pub(in crate::caption) fn is_here(self) -> bool {
        match self {
            Self::Plain => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512f"),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The best that this machine has.
    pub(in crate::caption) fn detect() -> Self {
        Self::ALL.into_iter().rfind(|isa| isa.is_here()).unwrap_or(Self::Plain)
    }

    /// Columns of a panel.
    pub(in crate::caption) fn columns(self) -> usize {
        2 * match self {
            Self::Plain => Four::COUNT,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => x86::Avx2::COUNT,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => x86::Avx512::COUNT,
            #[cfg(not(target_arch = "x86_64"))]
            _ => Four::COUNT,
        }
    }

    /// Rows of a tile.
    pub(in crate::caption) fn rows(self) -> usize {
        match self {
            Self::Plain => Four::ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => x86::Avx2::ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => x86::Avx512::ROWS,
            #[cfg(not(target_arch = "x86_64"))]
            _ => Four::ROWS,
        }
    }
}

/// Compiles a function whose `$lanes` is any [`Lanes`] for each [`Isa`], and chooses at run time.
macro_rules! for_isa {
    ($(#[$meta:meta])* unsafe fn $name:ident<$lanes:ident>[$($generic:ident: $bound:path),*](
        $($argument:ident: $type:ty),* $(,)?
    ) $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name<$($generic: $bound),*>(isa: $crate::caption::compute::lanes::Isa, $($argument: $type),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, clippy::inline_always)]
            unsafe fn any<$lanes: $crate::caption::compute::lanes::Lanes, $($generic: $bound),*>($($argument: $type),*)
                $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx512<$($generic: $bound),*>($($argument: $type),*) {
                // SAFETY: the caller's, and compiled for it.
                unsafe { any::<$crate::caption::compute::lanes::x86::Avx512, $($generic),*>($($argument),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx2<$($generic: $bound),*>($($argument: $type),*) {
                // SAFETY: the caller's, and compiled for it.
                unsafe { any::<$crate::caption::compute::lanes::x86::Avx2, $($generic),*>($($argument),*) }
            }
            // SAFETY: the caller's.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    $crate::caption::compute::lanes::Isa::Avx512 => avx512($($argument),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::caption::compute::lanes::Isa::Avx2 => avx2($($argument),*),
                    _ => any::<$crate::caption::compute::lanes::Four, $($generic),*>($($argument),*),
                }
            }
        }
    };
}
pub(super) use for_isa;
