//! Memory in f32 on a CPU: a row owns its buffer and shares its image's, so that nothing is copied when rows come and
//! go, and attention reads both in place.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::{Block, ImageMemory, Memory, Sizes};
use crate::caption::compute::host::Head;
use crate::caption::compute::{Hidden, ImageProjection, Packing, elements};

/// Tokens whose folded queries, each `heads` times as wide as an image's hidden states, are held at a time.
const FOLDED: usize = 64;

/// See the [module](self).
pub(in crate::caption) struct HostMemory {
    sizes: Sizes,
    /// How images are remembered.
    packing: Packing,
    rows: Vec<Row>,
    width: usize,
}

#[derive(Clone)]
struct Row {
    image: Arc<ImageMemory>,
    /// `[layers, 2, hidden, capacity]`.
    text: Vec<f32>,
    capacity: usize,
    /// The current block's first position, and how many of its tokens are real.
    start: usize,
    count: usize,
}

impl HostMemory {
    pub(in crate::caption) fn new(sizes: Sizes, packing: Packing) -> Self {
        Self { sizes, packing, rows: Vec::new(), width: 1 }
    }
}

impl Memory for HostMemory {
    fn admit(&mut self, image: &Arc<ImageMemory>, capacity: usize) -> Result<()> {
        let text = vec![0.0; self.sizes.elements(capacity)];
        self.rows.push(Row { image: Arc::clone(image), text, capacity, start: 0, count: 0 });
        Ok(())
    }

    fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        let copy = self.rows[from].clone();
        if to == self.rows.len() {
            self.rows.push(copy);
        } else {
            self.rows[to] = copy;
        }
        Ok(())
    }

    fn swap_remove(&mut self, row: usize) -> Result<()> {
        self.rows.swap_remove(row);
        Ok(())
    }

    fn clear(&mut self) {
        self.rows.clear();
    }

    fn bytes_for(&self, rows: usize, capacity: usize) -> usize {
        let image = Hidden::bytes_for(self.sizes.image_tokens, self.sizes.image_width, self.packing);
        rows * (image + self.sizes.elements(capacity) * size_of::<f32>())
    }

    fn begin(&mut self, block: &Block) -> Result<()> {
        self.width = block.width;
        for (index, row) in self.rows.iter_mut().enumerate() {
            (row.start, row.count) = (block.starts[index], block.counts[index]);
            if row.start + row.count > row.capacity {
                candle_core::bail!("a row outgrew its memory of {} tokens", row.capacity);
            }
        }
        Ok(())
    }

    fn attend_text(&mut self, layer: usize, qkv: &Tensor) -> Result<Tensor> {
        let sizes = self.sizes;
        let hidden = sizes.hidden();
        let (storage, layout) = qkv.storage_and_layout();
        let qkv = elements(&storage, layout)?;
        let mut contexts = vec![0.0; self.rows.len() * self.width * hidden];
        self.rows
            .par_iter_mut()
            .zip(contexts.par_chunks_mut(self.width * hidden))
            .zip(qkv.par_chunks(self.width * 3 * hidden))
            .for_each(|((row, contexts), qkv)| row.attend(layer, sizes, qkv, contexts));
        Tensor::from_vec(contexts, (self.rows.len() * self.width, hidden), &Device::Cpu)
    }

    fn attend_image(&mut self, _: usize, queries: &Tensor, projection: Option<&ImageProjection>) -> Result<Tensor> {
        let Some(projection) = projection else {
            candle_core::bail!("hidden states need the layer's projection");
        };
        let (storage, layout) = queries.storage_and_layout();
        let queries = elements(&storage, layout)?;
        let hidden = self.sizes.hidden();
        let mut tokens = Vec::with_capacity(self.rows.len());
        for (index, row) in self.rows.iter().enumerate() {
            let ImageMemory::Hidden(image) = &*row.image else {
                candle_core::bail!("the host remembers hidden states, not keys and values");
            };
            // Not the fillers.
            tokens.extend((0..row.count).map(|offset| (index * self.width + offset, image)));
        }
        let mut contexts = vec![0.0; queries.len()];
        for tokens in tokens.chunks(FOLDED) {
            let own: Vec<f32> = tokens.iter().flat_map(|(at, _)| &queries[at * hidden..][..hidden]).copied().collect();
            let images: Vec<&Hidden> = tokens.iter().map(|(_, image)| *image).collect();
            let attended = projection.attend(&own, &images);
            for ((at, _), context) in tokens.iter().zip(attended.chunks_exact(hidden)) {
                contexts[at * hidden..][..hidden].copy_from_slice(context);
            }
        }
        Tensor::from_vec(contexts, (self.rows.len() * self.width, hidden), &Device::Cpu)
    }
}

impl Row {
    /// `qkv` is this row's part of the block, `[width, 3 · hidden]`, and `contexts` `[width, hidden]`.
    fn attend(&mut self, layer: usize, sizes: Sizes, qkv: &[f32], contexts: &mut [f32]) {
        let hidden = sizes.hidden();
        let size = hidden * self.capacity;
        let layer = &mut self.text[layer * 2 * size..(layer + 1) * 2 * size];
        let (keys, values) = layer.split_at_mut(size);
        let mut scores = vec![0.0; self.capacity];
        let tokens = qkv.chunks_exact(3 * hidden).zip(contexts.chunks_exact_mut(hidden)).take(self.count);
        for (offset, (qkv, contexts)) in tokens.enumerate() {
            let position = self.start + offset;
            let (query, key_value) = qkv.split_at(hidden);
            let (key, value) = key_value.split_at(hidden);
            for (memory, new) in [(&mut *keys, key), (&mut *values, value)] {
                for (row, x) in memory.chunks_exact_mut(self.capacity).zip(new) {
                    row[position] = *x;
                }
            }
            for (index, (query, context)) in
                query.chunks_exact(sizes.head).zip(contexts.chunks_exact_mut(sizes.head)).enumerate()
            {
                let one = index * sizes.head * self.capacity..(index + 1) * sizes.head * self.capacity;
                let memory = Head {
                    keys: &keys[one.clone()],
                    values: &values[one],
                    stride: self.capacity,
                    length: position + 1,
                };
                memory.attend(query, context, &mut scores);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::Isa;

    #[test]
    fn rows_take_the_memory_that_was_told() {
        let sizes = Sizes { layers: 2, heads: 3, head: 4, image_tokens: 5, image_width: 12 };
        for narrow in [false, true] {
            let packing = Packing { isa: Isa::detect(), narrow };
            let mut memory = HostMemory::new(sizes, packing);
            for rows in 1..=5 {
                let image = Hidden::new(&[0.0; 5 * 12], 12, packing);
                memory.admit(&Arc::new(ImageMemory::Hidden(image)), 40).unwrap();
                let held = memory.rows.iter().map(|row| row.text.len() * size_of::<f32>() + row.image.bytes());
                assert_eq!(memory.bytes_for(rows, 40), held.sum::<usize>());
            }
        }
    }
}
