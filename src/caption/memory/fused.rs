//! Memory on the fused steps: every active row has a slot in shared buffers, of its own tokens and of its image, with the
//! keys and values of a layer side by side and a token a row of them: what an attention reads lies together. Slots are kept
//! without gaps; a row that leaves is overwritten by the last.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::images::{ByImage, Images, Moved};
use super::{Block, ImageMemory, Memory, Room, Sizes, move_slot};
use crate::caption::compute::ImageProjection;
use crate::caption::compute::fused::{self, NewTokens};

/// See the [module](self).
pub(in crate::caption) struct FusedMemory {
    sizes: Sizes,
    device: Device,
    dtype: DType,
    images: Images,
    room: Room,
    layers: Vec<Layer>,
    new: Option<(NewTokens, ByImage)>,
}

struct Layer {
    /// `[slots, 2, columns, hidden]`.
    text: Tensor,
    /// `[images, 2, image tokens, hidden]`.
    image: Tensor,
}

impl FusedMemory {
    pub(in crate::caption) fn new(sizes: Sizes, device: Device, dtype: DType) -> Self {
        Self { sizes, device, dtype, images: Images::default(), room: Room::default(), layers: Vec::new(), new: None }
    }

    /// Makes room for `slots` rows of `columns` tokens and for so many images.
    fn reserve(&mut self, slots: usize, columns: usize, images: usize) -> Result<()> {
        let Some(room) = self.room.grown(slots, columns, images) else { return Ok(()) };
        let (hidden, dtype, device) = (self.sizes.hidden(), self.dtype, &self.device);
        let buffer = |slots: usize, tokens: usize| Tensor::zeros((slots, 2, tokens, hidden), dtype, device);
        let (text, image) = ((room.slots, room.columns), (room.images, self.sizes.image_tokens));
        if self.layers.is_empty() {
            let layer = |_| Ok(Layer { text: buffer(text.0, text.1)?, image: buffer(image.0, image.1)? });
            self.layers = (0..self.sizes.layers).map(layer).collect::<Result<_>>()?;
            self.room = room;
            return Ok(());
        }
        // A layer at a time, so that old and new buffers of one only are there together.
        for layer in &mut self.layers {
            if (room.slots, room.columns) != (self.room.slots, self.room.columns) {
                layer.text = grown(&layer.text, buffer(text.0, text.1)?, self.images.rows())?;
            }
            if room.images > self.room.images {
                layer.image = grown(&layer.image, buffer(image.0, image.1)?, self.images.count())?;
            }
        }
        self.room = room;
        Ok(())
    }

    /// Overwrites the image of a slot that no row looks at any more.
    fn move_image(&self, moved: Option<Moved>) -> Result<()> {
        let Some(Moved { from, to }) = moved else { return Ok(()) };
        self.layers.iter().try_for_each(|layer| move_slot(&layer.image, from, to))
    }

    fn layer(&self, index: usize) -> Result<(&Layer, &(NewTokens, ByImage))> {
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
        let place = self.images.count();
        self.reserve(self.images.rows() + 1, capacity, place + 1)?;
        for (index, layer) in self.layers.iter().enumerate() {
            layer.image.slice_set(&image.narrow(0, 2 * index, 2)?.unsqueeze(0)?, 0, place)?;
        }
        self.images.push();
        Ok(())
    }

    fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        self.reserve(to + 1, 0, 0)?;
        for layer in &self.layers {
            move_slot(&layer.text, from, to)?;
        }
        let moved = self.images.fork(from, to);
        self.move_image(moved)
    }

    fn swap_remove(&mut self, row: usize) -> Result<()> {
        let last = self.images.rows() - 1;
        if row < last {
            for layer in &self.layers {
                move_slot(&layer.text, last, row)?;
            }
        }
        let moved = self.images.swap_remove(row);
        self.move_image(moved)
    }

    fn clear(&mut self) {
        *self = Self::new(self.sizes, self.device.clone(), self.dtype);
    }

    fn bytes_for(&self, rows: usize, capacity: usize) -> usize {
        self.sizes.bytes_in_slots(rows, capacity, self.dtype)
    }

    fn begin(&mut self, block: &Block) -> Result<()> {
        self.reserve(block.starts.len(), block.longest(), 0)?;
        let starts = Tensor::from_iter(block.starts.iter().map(|start| *start as u32), &self.device)?;
        let by_image = self.images.by_image(block, &self.device)?;
        self.new = Some((NewTokens { block: block.width, starts }, by_image));
        Ok(())
    }

    fn attend_text(&mut self, layer: usize, qkv: &Tensor) -> Result<Tensor> {
        let (Layer { text, .. }, (new, _)) = self.layer(layer)?;
        fused::append(text, qkv, new)?;
        fused::attend_rows(qkv, text, self.sizes.heads, new.block, Some(&new.starts))
    }

    fn attend_image(&mut self, layer: usize, queries: &Tensor, _: Option<&ImageProjection>) -> Result<Tensor> {
        let (Layer { image, .. }, (_, by_image)) = self.layer(layer)?;
        by_image.attend(queries, |queries| fused::attend_rows(queries, image, self.sizes.heads, by_image.width, None))
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
        // One row that shares an image, and one that gives up its own for another's.
        memory.fork(1, 5).unwrap();
        memory.fork(4, 0).unwrap();
        assert_eq!(seen(&mut memory, 6), [6.0, 2.0, 4.0, 5.0, 6.0, 2.0]);
        assert_eq!(memory.images.count(), 4);
        memory.swap_remove(1).unwrap();
        assert_eq!(seen(&mut memory, 5), [6.0, 2.0, 4.0, 5.0, 6.0]);
    }
}
