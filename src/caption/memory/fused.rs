//! Memory on the fused steps: every active row has a slot in shared buffers, of its own tokens and of its image, with the
//! keys and values of a layer side by side and a token a row of them: what an attention reads lies together. Slots are kept
//! without gaps; a row that leaves is overwritten by the last.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::{Block, ImageMemory, Memory, Room, Sizes, move_slot};
use crate::caption::compute::ImageProjection;
use crate::caption::compute::fused::{self, NewTokens};

/// See the [module](self).
pub(in crate::caption) struct FusedMemory {
    sizes: Sizes,
    device: Device,
    dtype: DType,
    rows: usize,
    room: Room,
    layers: Vec<Layer>,
    new: Option<NewTokens>,
}

struct Layer {
    /// `[slots, 2, columns, hidden]`.
    text: Tensor,
    /// `[slots, 2, image tokens, hidden]`.
    image: Tensor,
}

impl FusedMemory {
    pub(in crate::caption) fn new(sizes: Sizes, device: Device, dtype: DType) -> Self {
        Self { sizes, device, dtype, rows: 0, room: Room::default(), layers: Vec::new(), new: None }
    }

    /// Makes room for `slots` rows of `columns` tokens.
    fn reserve(&mut self, slots: usize, columns: usize) -> Result<()> {
        let Some(room) = self.room.grown(slots, columns) else { return Ok(()) };
        let (hidden, dtype, device) = (self.sizes.hidden(), self.dtype, &self.device);
        let buffer = |tokens: usize| Tensor::zeros((room.slots, 2, tokens, hidden), dtype, device);
        if self.layers.is_empty() {
            let layer = |_| Ok(Layer { text: buffer(room.columns)?, image: buffer(self.sizes.image_tokens)? });
            self.layers = (0..self.sizes.layers).map(layer).collect::<Result<_>>()?;
            self.room = room;
            return Ok(());
        }
        // A layer at a time, so that old and new buffers of one only are there together.
        for layer in &mut self.layers {
            layer.text = grown(&layer.text, buffer(room.columns)?, self.rows)?;
            if room.slots > self.room.slots {
                layer.image = grown(&layer.image, buffer(self.sizes.image_tokens)?, self.rows)?;
            }
        }
        self.room = room;
        Ok(())
    }

    fn layer(&self, index: usize) -> Result<(&Layer, &NewTokens)> {
        let unknown = || candle_core::Error::Msg("no row was admitted, or no block was announced".into());
        self.layers.get(index).zip(self.new.as_ref()).ok_or_else(unknown)
    }
}

/// The larger buffer with the first rows of the smaller one.
fn grown(from: &Tensor, to: Tensor, rows: usize) -> Result<Tensor> {
    if rows > 0 {
        to.narrow(0, 0, rows)?.slice_set(&from.narrow(0, 0, rows)?, 2, 0)?;
    }
    Ok(to)
}

impl Memory for FusedMemory {
    fn admit(&mut self, image: &Arc<ImageMemory>, capacity: usize) -> Result<()> {
        let ImageMemory::Rows(image) = &**image else {
            candle_core::bail!("the image was encoded by another kind of engine")
        };
        self.reserve(self.rows + 1, capacity)?;
        for (index, layer) in self.layers.iter().enumerate() {
            layer.image.slice_set(&image.narrow(0, 2 * index, 2)?.unsqueeze(0)?, 0, self.rows)?;
        }
        self.rows += 1;
        Ok(())
    }

    fn swap_remove(&mut self, row: usize) -> Result<()> {
        self.rows -= 1;
        if row < self.rows {
            for buffer in self.layers.iter().flat_map(|layer| [&layer.text, &layer.image]) {
                move_slot(buffer, self.rows, row)?;
            }
        }
        Ok(())
    }

    fn clear(&mut self) {
        *self = Self::new(self.sizes, self.device.clone(), self.dtype);
    }

    fn bytes_for(&self, rows: usize, capacity: usize) -> usize {
        self.sizes.bytes_in_slots(rows, capacity, self.dtype)
    }

    fn begin(&mut self, block: &Block) -> Result<()> {
        self.reserve(block.starts.len(), block.longest())?;
        let starts = Tensor::from_iter(block.starts.iter().map(|start| *start as u32), &self.device)?;
        self.new = Some(NewTokens { block: block.width, starts });
        Ok(())
    }

    fn attend_text(&mut self, layer: usize, qkv: &Tensor) -> Result<Tensor> {
        let (Layer { text, .. }, new) = self.layer(layer)?;
        fused::append(text, qkv, new)?;
        fused::attend_rows(qkv, text, self.sizes.heads, new.block, Some(&new.starts))
    }

    fn attend_image(&mut self, layer: usize, queries: &Tensor, _: Option<&ImageProjection>) -> Result<Tensor> {
        let (Layer { image, .. }, new) = self.layer(layer)?;
        fused::attend_rows(queries, image, self.sizes.heads, new.block, None)
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
            let layers = memory.layers.iter();
            let held: usize = layers.map(|layer| layer.text.elem_count() + layer.image.elem_count()).sum();
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
