//! Memory on any device in any precision, on candle's operations: every active row has a slot in shared buffers, so
//! that one product serves all rows. Slots are kept without gaps; a row that leaves is overwritten by the last.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::{Block, ImageMemory, Memory, Room, Sizes, move_slot};
use crate::caption::compute::{ImageProjection, attend_memory};

/// See the [module](self).
pub(in crate::caption) struct DeviceMemory {
    sizes: Sizes,
    device: Device,
    dtype: DType,
    rows: usize,
    room: Room,
    layers: Vec<Layer>,
    block: Option<Prepared>,
}

struct Layer {
    text: KeysValues,
    image: KeysValues,
}

/// Both `[slots, heads, head, length]`.
struct KeysValues {
    keys: Tensor,
    values: Tensor,
}

/// What all layers of a pass share.
struct Prepared {
    rows: usize,
    width: usize,
    /// Columns that any row looks at.
    length: usize,
    /// Where each new column goes: `[rows, heads, head, width]`.
    targets: Tensor,
    /// Hides columns after a token's own, where rows differ: `[rows, 1, width, length]`.
    mask: Option<Tensor>,
}

impl DeviceMemory {
    pub(in crate::caption) fn new(sizes: Sizes, device: Device, dtype: DType) -> Self {
        Self { sizes, device, dtype, rows: 0, room: Room::default(), layers: Vec::new(), block: None }
    }

    /// Makes room for `slots` rows of `columns` tokens.
    fn reserve(&mut self, slots: usize, columns: usize) -> Result<()> {
        let Some(room) = self.room.grown(slots, columns) else { return Ok(()) };
        let empty = |length: usize| -> Result<KeysValues> {
            // Zeros, since what a mask hides still takes part in products.
            let shape = (room.slots, self.sizes.heads, self.sizes.head, length);
            let zeros = || Tensor::zeros(shape, self.dtype, &self.device);
            Ok(KeysValues { keys: zeros()?, values: zeros()? })
        };
        if self.layers.is_empty() {
            for _ in 0..self.sizes.layers {
                self.layers.push(Layer { text: empty(room.columns)?, image: empty(self.sizes.image_tokens)? });
            }
        } else {
            for layer in &mut self.layers {
                let text = empty(room.columns)?;
                text.copy_rows(&layer.text, self.rows)?;
                layer.text = text;
                if room.slots > self.room.slots {
                    let image = empty(self.sizes.image_tokens)?;
                    image.copy_rows(&layer.image, self.rows)?;
                    layer.image = image;
                }
            }
        }
        self.room = room;
        Ok(())
    }

    fn prepared(&self) -> Result<&Prepared> {
        self.block.as_ref().ok_or_else(|| candle_core::Error::Msg("no block was announced".into()))
    }

    /// `[rows · width, hidden]` to `[rows, heads, width, head]`.
    fn split_heads(&self, x: &Tensor, block: &Prepared) -> Result<Tensor> {
        x.reshape((block.rows, block.width, self.sizes.heads, self.sizes.head))?.transpose(1, 2)?.contiguous()
    }

    /// The reverse of [`Self::split_heads`].
    fn join_heads(&self, x: &Tensor, block: &Prepared) -> Result<Tensor> {
        x.transpose(1, 2)?.reshape((block.rows * block.width, self.sizes.hidden()))
    }
}

impl Memory for DeviceMemory {
    fn admit(&mut self, image: &Arc<ImageMemory>, capacity: usize) -> Result<()> {
        let ImageMemory::Projected(image) = &**image else {
            candle_core::bail!("a device remembers keys and values, not hidden states")
        };
        self.reserve(self.rows + 1, capacity)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let part = |which: usize| image.narrow(0, index, 1)?.narrow(1, which, 1)?.squeeze(1);
            layer.image.keys.slice_set(&part(0)?, 0, self.rows)?;
            layer.image.values.slice_set(&part(1)?, 0, self.rows)?;
        }
        self.rows += 1;
        Ok(())
    }

    fn swap_remove(&mut self, row: usize) -> Result<()> {
        self.rows -= 1;
        if row < self.rows {
            for layer in &self.layers {
                layer.text.move_row(self.rows, row)?;
                layer.image.move_row(self.rows, row)?;
            }
        }
        Ok(())
    }

    fn clear(&mut self) {
        // The buffers go too: an error may have left values in them that are not numbers, which no mask hides.
        *self = Self::new(self.sizes, self.device.clone(), self.dtype);
    }

    fn bytes_for(&self, rows: usize, capacity: usize) -> usize {
        self.sizes.bytes_in_slots(rows, capacity, self.dtype)
    }

    fn begin(&mut self, block: &Block) -> Result<()> {
        let (rows, width) = (block.starts.len(), block.width);
        let last = block.longest();
        self.reserve(rows, last)?;
        let positions = block.starts.iter().flat_map(|start| (0..width).map(move |offset| (start + offset) as u32));
        let targets = Tensor::from_iter(positions, &self.device)?
            .reshape((rows, 1, 1, width))?
            .broadcast_as((rows, self.sizes.heads, self.sizes.head, width))?
            .contiguous()?;
        let alike = width == 1 && block.starts.windows(2).all(|pair| pair[0] == pair[1]);
        let mask = (!alike).then(|| self.mask(block, last)).transpose()?;
        self.block = Some(Prepared { rows, width, length: last, targets, mask });
        Ok(())
    }

    fn attend_text(&mut self, layer: usize, qkv: &Tensor) -> Result<Tensor> {
        let block = self.prepared()?;
        let hidden = self.sizes.hidden();
        let part = |which: usize| qkv.narrow(1, which * hidden, hidden);
        let memory = &self.layers[layer].text;
        for (which, buffer) in [(1, &memory.keys), (2, &memory.values)] {
            let columns = self.split_heads(&part(which)?, block)?.transpose(2, 3)?.contiguous()?;
            buffer.narrow(0, 0, block.rows)?.scatter_set(&block.targets, &columns, 3)?;
        }
        let queries = self.split_heads(&part(0)?, block)?;
        let seen = |buffer: &Tensor| buffer.narrow(0, 0, block.rows)?.narrow(3, 0, block.length)?.contiguous();
        let contexts = attend_memory(&queries, &seen(&memory.keys)?, &seen(&memory.values)?, block.mask.as_ref())?;
        self.join_heads(&contexts, block)
    }

    fn attend_image(&mut self, layer: usize, queries: &Tensor, _: Option<&ImageProjection>) -> Result<Tensor> {
        let block = self.prepared()?;
        let memory = &self.layers[layer].image;
        let queries = self.split_heads(queries, block)?;
        let seen = |buffer: &Tensor| buffer.narrow(0, 0, block.rows);
        let contexts = attend_memory(&queries, &seen(&memory.keys)?, &seen(&memory.values)?, None)?;
        self.join_heads(&contexts, block)
    }
}

impl DeviceMemory {
    fn mask(&self, block: &Block, length: usize) -> Result<Tensor> {
        let rows = block.starts.len();
        let mut mask = Vec::with_capacity(rows * block.width * length);
        for start in &block.starts {
            for own in (0..block.width).map(|offset| start + offset) {
                mask.extend((0..length).map(|column| if column <= own { 0.0 } else { f32::NEG_INFINITY }));
            }
        }
        Tensor::from_vec(mask, (rows, 1, block.width, length), &self.device)?.to_dtype(self.dtype)
    }
}

impl KeysValues {
    /// Takes over the first `rows` of a smaller buffer.
    fn copy_rows(&self, from: &Self, rows: usize) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        for (to, from) in [(&self.keys, &from.keys), (&self.values, &from.values)] {
            to.narrow(0, 0, rows)?.slice_set(&from.narrow(0, 0, rows)?, 3, 0)?;
        }
        Ok(())
    }

    fn move_row(&self, from: usize, to: usize) -> Result<()> {
        move_slot(&self.keys, from, to)?;
        move_slot(&self.values, from, to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_take_the_memory_that_was_told() {
        let sizes = Sizes { layers: 2, heads: 3, head: 4, image_tokens: 5, image_width: 12 };
        let mut memory = DeviceMemory::new(sizes, Device::Cpu, DType::F16);
        let image = Arc::new(ImageMemory::Projected(Tensor::zeros((2, 2, 3, 4, 5), DType::F16, &Device::Cpu).unwrap()));
        for rows in 1..=5 {
            memory.admit(&image, 40).unwrap();
            let buffers = memory.layers.iter().flat_map(|layer| [&layer.text, &layer.image]);
            let held: usize = buffers.map(|both| both.keys.elem_count() + both.values.elem_count()).sum();
            let encoded = rows * image.bytes();
            assert_eq!(memory.bytes_for(rows, 40), held * DType::F16.size_in_bytes() + encoded, "{rows} rows");
        }
    }
}
