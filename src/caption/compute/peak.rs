//! What the arithmetic units of a CPU can give: multiplications and additions of numbers that stay in registers.

use std::hint::black_box;

use rayon::prelude::*;

use super::lanes::{Isa, for_isa};

/// Chains of dependent operations: enough for the latencies of today's machines, few enough for their registers.
const CHAINS: usize = 12;
/// Operations of a chain in one task.
const STEPS: usize = 400_000;

/// So many operations, a multiplication and an addition being two, and what does them, on all cores.
pub(in crate::caption) fn multiply_adds(isa: Isa) -> (f64, impl FnMut()) {
    assert!(isa.is_here(), "this machine has no {isa:?}");
    let tasks = 4 * rayon::current_num_threads();
    let work = move || {
        (0..tasks).into_par_iter().for_each(|_| {
            // SAFETY: the machine has the instructions.
            unsafe { chains(isa, black_box(0.999)) };
        });
    };
    // A multiplication and an addition in each lane of a register; a panel is two registers wide.
    ((isa.columns() * CHAINS * STEPS * tasks) as f64, work)
}

for_isa! {
    unsafe fn chains<V>[](factor: f32) {
        // SAFETY: the caller's.
        unsafe {
            let (factor, addend) = (V::splat(factor), V::splat(0.001));
            let mut chains = [V::zero(); CHAINS];
            // Chains that began alike might be computed once.
            for (start, chain) in chains.iter_mut().enumerate() {
                *chain = V::splat(black_box(start as f32));
            }
            for _ in 0..STEPS {
                for chain in &mut chains {
                    *chain = chain.mul_add(factor, addend);
                }
            }
            black_box(chains);
        }
    }
}
