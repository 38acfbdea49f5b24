//! Memory on the fused steps: every active row has a slot in two buffers, one of its own tokens and one of its image, each
//! with the keys and values of all layers, a token a row of them. So an image is taken in with one copy, and the
//! attention reads what it needs where it lies. Slots are kept without gaps; a row that leaves is overwritten by the last.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::{Block, ImageMemory, Memory, Sizes};
use crate::caption::compute::ImageProjection;
use crate::caption::compute::fused::{self, NewTokens};

/// The buffer of the rows' own tokens grows by this many columns at a time.
const COLUMNS: usize = 32;

/// See the [module](self).
pub(in crate::caption) struct FusedMemory {
    sizes: Sizes,
    device: Device,
    dtype: DType,
    rows: usize,
    buffers: Option<Buffers>,
    new: Option<NewTokens>,
}

struct Buffers {
    /// `[slots, layers · 2, columns, hidden]`.
    text: Tensor,
    /// `[slots, layers · 2, image tokens, hidden]`.
    image: Tensor,
}

impl Buffers {
    fn slots(&self) -> Result<usize> {
        self.text.dim(0)
    }

    fn columns(&self) -> Result<usize> {
        self.text.dim(2)
    }
}

impl FusedMemory {
    pub(in crate::caption) fn new(sizes: Sizes, device: Device, dtype: DType) -> Self {
        Self { sizes, device, dtype, rows: 0, buffers: None, new: None }
    }

    /// Makes room for `slots` rows of `columns` tokens.
    fn reserve(&mut self, slots: usize, columns: usize) -> Result<()> {
        let (had_slots, had_columns) = match &self.buffers {
            Some(buffers) => (buffers.slots()?, buffers.columns()?),
            None => (0, 0),
        };
        if slots <= had_slots && columns <= had_columns {
            return Ok(());
        }
        let slots = if slots > had_slots { slots.next_power_of_two() } else { had_slots };
        let columns = columns.max(had_columns).next_multiple_of(COLUMNS);
        let buffer = |tokens: usize| {
            let shape = (slots, 2 * self.sizes.layers, tokens, self.sizes.hidden());
            Tensor::zeros(shape, self.dtype, &self.device)
        };
        let text = buffer(columns)?;
        let image = match &self.buffers {
            Some(had) if slots == had_slots => had.image.clone(),
            _ => buffer(self.sizes.image_tokens)?,
        };
        if let Some(had) = &self.buffers
            && self.rows > 0
        {
            let rows = |buffer: &Tensor| buffer.narrow(0, 0, self.rows);
            rows(&text)?.slice_set(&rows(&had.text)?, 2, 0)?;
            if slots > had_slots {
                image.slice_set(&rows(&had.image)?, 0, 0)?;
            }
        }
        self.buffers = Some(Buffers { text, image });
        Ok(())
    }

    fn buffers(&self) -> Result<&Buffers> {
        self.buffers.as_ref().ok_or_else(|| candle_core::Error::Msg("no row was admitted".into()))
    }

    fn announced(&self) -> Result<&NewTokens> {
        self.new.as_ref().ok_or_else(|| candle_core::Error::Msg("no block was announced".into()))
    }
}

impl Memory for FusedMemory {
    fn admit(&mut self, image: &Arc<ImageMemory>, capacity: usize) -> Result<()> {
        let ImageMemory::Rows(image) = &**image else {
            candle_core::bail!("the image was encoded by another kind of engine")
        };
        self.reserve(self.rows + 1, capacity)?;
        self.buffers()?.image.slice_set(&image.unsqueeze(0)?, 0, self.rows)?;
        self.rows += 1;
        Ok(())
    }

    fn swap_remove(&mut self, row: usize) -> Result<()> {
        self.rows -= 1;
        if row < self.rows {
            let buffers = self.buffers()?;
            for buffer in [&buffers.text, &buffers.image] {
                // A copy in between, since source and target share their storage.
                let last = buffer.narrow(0, self.rows, 1)?.force_contiguous()?;
                buffer.slice_set(&last, 0, row)?;
            }
        }
        Ok(())
    }

    fn clear(&mut self) {
        *self = Self::new(self.sizes, self.device.clone(), self.dtype);
    }

    fn bytes_for(&self, rows: usize, capacity: usize) -> usize {
        self.sizes.bytes_in_slots(rows, capacity.next_multiple_of(COLUMNS), self.dtype)
    }

    fn begin(&mut self, block: &Block) -> Result<()> {
        let last = block.starts.iter().map(|start| start + block.width).max().unwrap_or(0);
        self.reserve(block.starts.len(), last)?;
        let starts = Tensor::from_iter(block.starts.iter().map(|start| *start as u32), &self.device)?;
        self.new = Some(NewTokens { block: block.width, starts });
        Ok(())
    }

    fn attend_text(&mut self, layer: usize, qkv: &Tensor) -> Result<Tensor> {
        let (new, buffers) = (self.announced()?, self.buffers()?);
        fused::append(&buffers.text, 2 * layer, qkv, new)?;
        fused::attend_rows(qkv, &buffers.text, 2 * layer, self.sizes.heads, new.block, Some(&new.starts))
    }

    fn attend_image(&mut self, layer: usize, queries: &Tensor, _: Option<&ImageProjection>) -> Result<Tensor> {
        let (new, buffers) = (self.announced()?, self.buffers()?);
        fused::attend_rows(queries, &buffers.image, 2 * layer, self.sizes.heads, new.block, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes { layers: 2, heads: 3, head: 4, image_tokens: 5, image_width: 12 };

    fn image(number: f32) -> Arc<ImageMemory> {
        Arc::new(ImageMemory::Rows(Tensor::full(number, (4, 5, 12), &Device::Cpu).unwrap()))
    }

    #[test]
    fn buffers_take_the_memory_that_was_told() {
        let mut memory = FusedMemory::new(SIZES, Device::Cpu, DType::F32);
        for rows in 1..=5 {
            memory.admit(&image(1.0), 40).unwrap();
            let buffers = memory.buffers.as_ref().unwrap();
            let held = buffers.text.elem_count() + buffers.image.elem_count();
            let encoded = rows * image(1.0).bytes();
            assert_eq!(memory.bytes_for(rows, 40), held * DType::F32.size_in_bytes() + encoded, "{rows} rows");
        }
    }

    #[test]
    fn rows_keep_what_is_theirs_while_others_come_and_go() {
        let mut memory = FusedMemory::new(SIZES, Device::Cpu, DType::F32);
        // Contexts of an image whose values are all the same number are that number.
        let seen = |memory: &mut FusedMemory, rows: usize| -> Vec<f32> {
            memory.begin(&Block { width: 1, starts: vec![0; rows], counts: vec![1; rows] }).unwrap();
            let queries = Tensor::ones((rows, 12), DType::F32, &Device::Cpu).unwrap();
            let contexts = memory.attend_image(1, &queries, None).unwrap();
            contexts.narrow(1, 7, 1).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        for number in [1.0, 2.0, 3.0] {
            memory.admit(&image(number), 4).unwrap();
        }
        assert_eq!(seen(&mut memory, 3), [1.0, 2.0, 3.0]);
        memory.swap_remove(0).unwrap();
        assert_eq!(seen(&mut memory, 2), [3.0, 2.0]);
        // More tokens, and more slots, than there was room for.
        memory.admit(&image(4.0), 70).unwrap();
        memory.admit(&image(5.0), 1).unwrap();
        memory.admit(&image(6.0), 1).unwrap();
        assert_eq!(seen(&mut memory, 5), [3.0, 2.0, 4.0, 5.0, 6.0]);
    }
}
