use half::bf16;
use proptest::prelude::*;

use super::super::finish::AsIs;
use super::*;

/// Numbers from -1 to 1.
pub(in crate::caption::compute) fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..count).map(|_| random.f32() * 2.0 - 1.0).collect()
}

/// What this machine can run.
fn machines() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_here()).collect()
}

/// Adds the row and the column, so that a misplaced number shows.
pub(in crate::caption::compute) struct Place;

impl Finish for Place {
    unsafe fn finish<V: Lanes>(&self, y: V, row: usize, column: usize) -> V {
        let place: [f32; WIDEST] = std::array::from_fn(|index| (1000 * row + column + index) as f32);
        // SAFETY: no register is wider.
        unsafe { y.add(V::load(place.as_ptr())) }
    }
}

fn assert_products<N: Number>(rows: usize, depth: usize, width: usize, error: f32) {
    let (left, right) = (numbers(rows * depth, 1), numbers(depth * width, 2));
    let transposed: Vec<f32> = (0..width).flat_map(|x| right.iter().skip(x).step_by(width).copied()).collect();
    let left = Matrix::new(&left, depth, rows, depth);
    let exact = |row: usize, column: usize| -> f64 {
        let terms = left.row(row).iter().zip(right[column..].iter().step_by(width));
        terms.map(|(x, y)| f64::from(*x) * f64::from(N::narrow(*y).value())).sum()
    };
    for isa in machines() {
        let packed = Packed::<N>::of_rows(isa, Matrix::new(&right, width, depth, width));
        let same = Packed::<N>::of_columns(isa, Matrix::new(&transposed, depth, width, depth));
        let y = product(left, &packed, &Place);
        let mut here = vec![f32::NAN; rows * width];
        // SAFETY: it has the room, and is ours.
        unsafe { product_here(left, &same, Target::new(here.as_mut_ptr(), width), &AsIs) };
        for (index, (y, here)) in y.into_iter().zip(here).enumerate() {
            let (row, column) = (index / width, index % width);
            let exact = exact(row, column) as f32;
            assert!((here - exact).abs() < error, "{isa:?}: {here} is not {exact} at {row}, {column}");
            let place = (1000 * row + column) as f32;
            assert!((y - place - exact).abs() < error + place * 1e-6, "{isa:?}: {y} is not {exact} at {row}, {column}");
        }
    }
}

#[test]
fn products_of_every_shape_equal_the_sum_of_products() {
    for (rows, depth, width) in [(1, 1, 1), (6, DEPTH, 16), (7, DEPTH + 1, 33), (25, 2 * DEPTH + 5, 40), (400, 70, 100)]
    {
        assert_products::<f32>(rows, depth, width, 1e-3);
        assert_products::<bf16>(rows, depth, width, 1e-3);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn products_of_any_shape_equal_the_sum_of_products(rows in 1usize..40, depth in 1usize..60, width in 1usize..90) {
        assert_products::<f32>(rows, depth, width, 1e-4);
    }
}

#[test]
fn a_column_comes_back_as_it_was_packed() {
    let rows = numbers(7 * 45, 3);
    for isa in machines() {
        let packed = Packed::<f32>::of_rows(isa, Matrix::new(&rows, 45, 7, 45));
        for column in 0..45 {
            let expected: Vec<f32> = rows[column..].iter().step_by(45).copied().collect();
            assert_eq!(packed.column(column).collect::<Vec<_>>(), expected);
        }
    }
}

#[test]
fn a_factor_that_is_packed_again_has_nothing_left_of_the_former_one() {
    let (first, second) = (numbers(5 * 40, 4), numbers(5 * 35, 5));
    for isa in machines() {
        let mut packed = Packed::<f32>::of_rows(isa, Matrix::new(&first, 40, 5, 40));
        packed.take_rows(Matrix::new(&second, 35, 5, 35));
        let fresh = Packed::<f32>::of_rows(isa, Matrix::new(&second, 35, 5, 35));
        assert_eq!(packed.panels, fresh.panels);
    }
}
