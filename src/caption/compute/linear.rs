//! Linear layers on a CPU, with weights that are packed once.

use half::bf16;
use rayon::prelude::*;

use super::finish::{AsIs, Bias, BiasAdd, BiasGelu, Finish};
use super::onednn::{self, Library, OneDnnError};
use super::packed::{Matrix, Packed, Packing};
use super::product::{Target, product, product_here};

/// `x · weightᵀ + bias` for slices.
pub(in crate::caption) struct HostLinear {
    weight: Factor,
    bias: Vec<f32>,
    inputs: usize,
}

/// The right factor of a layer's product.
enum Factor {
    /// For our own product.
    Own(Weight),
    /// For oneDNN's.
    OneDnn(onednn::Factor),
}

impl Factor {
    fn product(&self, x: Matrix<'_>, finish: &impl Finish) -> Result<Vec<f32>, OneDnnError> {
        match self {
            Self::Own(weight) => Ok(weight.product(x, finish)),
            Self::OneDnn(factor) => factor.product(x, finish),
        }
    }
}

/// A right factor in one of the precisions in which it may be packed.
enum Weight {
    /// In f32.
    Full(Packed<f32>),
    /// In bf16.
    Bf16(Packed<bf16>),
}

impl Weight {
    /// From a matrix whose rows are the factor's columns, as `weight` `[outputs, inputs]` is.
    fn of_columns(columns: Matrix<'_>, Packing { isa, narrow }: Packing) -> Self {
        if narrow { Self::Bf16(Packed::of_columns(isa, columns)) } else { Self::Full(Packed::of_columns(isa, columns)) }
    }

    fn of_rows(rows: Matrix<'_>, Packing { isa, narrow }: Packing) -> Self {
        if narrow { Self::Bf16(Packed::of_rows(isa, rows)) } else { Self::Full(Packed::of_rows(isa, rows)) }
    }

    fn product(&self, x: Matrix<'_>, finish: &impl Finish) -> Vec<f32> {
        match self {
            Self::Full(packed) => product(x, packed, finish),
            Self::Bf16(packed) => product(x, packed, finish),
        }
    }

    /// # Safety
    /// As [`product_here`].
    unsafe fn product_here(&self, x: Matrix<'_>, target: Target, finish: &impl Finish) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::Full(packed) => product_here(x, packed, target, finish),
                Self::Bf16(packed) => product_here(x, packed, target, finish),
            }
        }
    }
}

impl HostLinear {
    /// On our own product, from `weight` `[outputs, inputs]` and `bias` `[outputs]`.
    pub(in crate::caption) fn new(weight: &[f32], bias: Vec<f32>, packing: Packing) -> Self {
        let inputs = weight.len() / bias.len();
        let weight = Weight::of_columns(Matrix::new(weight, inputs, bias.len(), inputs), packing);
        Self { weight: Factor::Own(weight), bias, inputs }
    }

    /// The same, on oneDNN's.
    pub(in crate::caption) fn with_onednn(
        library: &'static Library,
        number: onednn::Number,
        weight: &[f32],
        bias: Vec<f32>,
    ) -> Result<Self, OneDnnError> {
        let inputs = weight.len() / bias.len();
        let factor = onednn::Factor::of_columns(library, number, weight, inputs)?;
        Ok(Self { weight: Factor::OneDnn(factor), bias, inputs })
    }

    fn input<'a>(&self, x: &'a [f32]) -> Matrix<'a> {
        Matrix::new(x, self.inputs, x.len() / self.inputs, self.inputs)
    }

    /// `[rows, inputs]` to `[rows, outputs]`.
    pub(in crate::caption) fn forward(&self, x: &[f32]) -> Result<Vec<f32>, OneDnnError> {
        self.weight.product(self.input(x), &Bias(&self.bias))
    }

    /// With the exact (erf) GELU on top.
    pub(in crate::caption) fn forward_gelu(&self, x: &[f32]) -> Result<Vec<f32>, OneDnnError> {
        self.weight.product(self.input(x), &BiasGelu(&self.bias))
    }

    /// With `residual` `[rows, outputs]` added.
    pub(in crate::caption) fn forward_add(&self, x: &[f32], residual: &[f32]) -> Result<Vec<f32>, OneDnnError> {
        assert_eq!(residual.len() / self.bias.len(), x.len() / self.inputs, "a residual is of the result's shape");
        self.weight.product(self.input(x), &BiasAdd(&self.bias, residual))
    }

    /// The weights of one output, as our own product keeps them; oneDNN's do not come back.
    pub(in crate::caption) fn output(&self, output: usize) -> Option<Vec<f32>> {
        match &self.weight {
            Factor::Own(Weight::Full(packed)) => Some(packed.column(output).collect()),
            Factor::Own(Weight::Bf16(packed)) => Some(packed.column(output).collect()),
            Factor::OneDnn(_) => None,
        }
    }
}

/// Cross-attention's projections of keys and values, folded into queries and contexts: instead of projecting the hidden
/// states X of an image to keys X · Wₖᵀ and values X · Wᵥᵀ in every layer, a head's query q becomes q · Wₖ and attends to
/// X itself; its context c, a mean of rows of X, becomes c · Wᵥᵀ + bᵥ. The bias of the keys adds the same to all scores
/// of a query, and so nothing to its probabilities.
///
/// X serves as the keys and values of all layers, so that an image takes a `layers`th of the memory, and its projection
/// no time; a token takes more, by `heads` queries as wide as X.
pub(in crate::caption) struct Folded {
    /// `[head, image width]` for each head.
    keys: Vec<Weight>,
    /// `[image width, head]` for each head.
    values: Vec<Weight>,
    bias: Vec<f32>,
    head: usize,
    width: usize,
}

impl Folded {
    /// From the weights of keys and values `[hidden, image width]` and the bias of the values.
    pub(in crate::caption) fn new(
        keys: &[f32],
        values: &[f32],
        bias: Vec<f32>,
        heads: usize,
        packing: Packing,
    ) -> Self {
        let (head, width) = (bias.len() / heads, keys.len() / bias.len());
        let one = |which: usize| which * head * width..(which + 1) * head * width;
        let matrix = |values| Matrix::new(values, width, head, width);
        Self {
            keys: (0..heads).map(|which| Weight::of_rows(matrix(&keys[one(which)]), packing)).collect(),
            values: (0..heads).map(|which| Weight::of_columns(matrix(&values[one(which)]), packing)).collect(),
            bias,
            head,
            width,
        }
    }

    /// How many heads there are.
    pub(in crate::caption) fn heads(&self) -> usize {
        self.keys.len()
    }

    /// What scores are multiplied by.
    pub(in crate::caption) fn scale(&self) -> f32 {
        1.0 / (self.head as f32).sqrt()
    }

    /// Queries `[rows, heads · head]` to `[rows, heads · image width]`.
    pub(in crate::caption) fn queries(&self, queries: &[f32]) -> Vec<f32> {
        each_head(&self.keys, queries, self.head, self.width, |_| AsIs)
    }

    /// Contexts `[rows, heads · image width]` to `[rows, heads · head]`.
    pub(in crate::caption) fn contexts(&self, contexts: &[f32]) -> Vec<f32> {
        each_head(&self.values, contexts, self.width, self.head, |which| Bias(&self.bias[which * self.head..]))
    }
}

/// The product of each head's part of the rows of `x`, `[rows, heads · from]`, with its weights, and what `finish` makes
/// for the head done to it: `[rows, heads · to]`.
fn each_head<F: Finish>(
    weights: &[Weight],
    x: &[f32],
    from: usize,
    to: usize,
    finish: impl Fn(usize) -> F + Sync,
) -> Vec<f32> {
    let heads = weights.len();
    let rows = x.len() / (heads * from);
    let mut y = Vec::with_capacity(rows * heads * to);
    let target = Target::new(y.as_mut_ptr(), heads * to);
    weights.par_iter().enumerate().for_each(|(which, weight)| {
        let x = Matrix::new(&x[which * from..], heads * from, rows, from);
        // SAFETY: each head has columns of its own in `y`, which has room for all of them.
        unsafe { weight.product_here(x, target.from(0, which * to), &finish(which)) };
    });
    // SAFETY: the heads have written all of it.
    unsafe { y.set_len(rows * heads * to) };
    y
}
