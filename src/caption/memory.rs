//! What the decoder remembers of each row: its image, encoded once, and the keys and values of its own tokens so far,
//! which grow by a column a token.
//!
//! Keys and values are stored transposed, `[heads, head, length]`: a token is a column. So scores and contexts both run
//! along contiguous memory. Of an image, a device has the keys and values of all layers, the plain result of one matrix
//! product; the host has the hidden states, of which each layer makes its own; see [`Hidden`]. On the fused steps a token
//! is a row.

mod device;
mod fused;
mod host;
mod images;

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::compute::fused::takes_heads_of;
use super::compute::{Hidden, ImageProjection};
use super::config::{BlipConfig, TextConfig};
use super::weights::Kept;

pub(super) use device::DeviceMemory;
pub(super) use fused::FusedMemory;
pub(super) use host::HostMemory;

/// What is remembered of one image.
pub(super) enum ImageMemory {
    /// Its cross-attention keys and values, `[layers, 2, heads, head, tokens]`.
    Projected(Tensor),
    /// The same with a token a row, `[layers · 2, tokens, hidden]`.
    Rows(Tensor),
    /// Its hidden states.
    Hidden(Hidden),
}

impl ImageMemory {
    /// Memory that it takes, in bytes.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Projected(tensor) | Self::Rows(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Self::Hidden(hidden) => hidden.bytes(),
        }
    }
}

/// The tokens of one step: `width` for each row, of which row `r`'s first `counts[r]` are real and stand at the
/// positions from `starts[r]` on; the rest fills up.
pub(super) struct Block {
    pub(super) width: usize,
    pub(super) starts: Vec<usize>,
    pub(super) counts: Vec<usize>,
}

impl Block {
    /// How many tokens rows are of at most, fillers included, once they have these.
    fn longest(&self) -> usize {
        self.starts.iter().max().map_or(0, |start| start + self.width)
    }
}

/// The memory of all active rows, and the attention on it. Rows are numbered from 0 without gaps.
pub(super) trait Memory: Send {
    /// Adds a row at the end, for a sequence of at most `capacity` tokens.
    fn admit(&mut self, image: &Arc<ImageMemory>, capacity: usize) -> Result<()>;

    /// Makes row `to`, or one more row at the end, a copy of row `from`: of the same image, which they share, and with the
    /// same tokens so far.
    fn fork(&mut self, from: usize, to: usize) -> Result<()>;

    /// Removes a row; the last row takes its number.
    fn swap_remove(&mut self, row: usize) -> Result<()>;

    /// Forgets all rows.
    fn clear(&mut self);

    /// What `rows` rows for sequences of `capacity` tokens take at most, in bytes, their encoded images included.
    fn bytes_for(&self, rows: usize, capacity: usize) -> usize;

    /// Announces the tokens of the next pass through the layers.
    fn begin(&mut self, block: &Block) -> Result<()>;

    /// Remembers the block's keys and values, and lets its tokens attend to their own row up to themselves.
    /// `qkv` is `[rows · width, 3 · hidden]`, the result `[rows · width, hidden]`; fillers are undefined in it.
    fn attend_text(&mut self, layer: usize, qkv: &Tensor) -> Result<Tensor>;

    /// Lets the block's tokens attend to their row's image; `queries` and the result are `[rows · width, hidden]`.
    /// `projection` is the layer's, where images are remembered by their hidden states.
    fn attend_image(&mut self, layer: usize, queries: &Tensor, projection: Option<&ImageProjection>) -> Result<Tensor>;
}

/// The sizes of a decoder's memory.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) layers: usize,
    pub(super) heads: usize,
    /// Width of one head.
    pub(super) head: usize,
    /// Tokens of an encoded image.
    pub(super) image_tokens: usize,
    /// Width of their hidden states.
    pub(super) image_width: usize,
}

impl Sizes {
    /// Of a language model that looks at images.
    pub(super) fn of(config: &BlipConfig) -> Self {
        let (image_tokens, image_width) = (config.vision.tokens(), config.vision.hidden_size);
        Self { image_tokens, image_width, ..Self::of_texts(&config.text) }
    }

    /// Of one that looks at texts, as long as any, in the place of images.
    pub(super) fn of_texts(text: &TextConfig) -> Self {
        Self {
            layers: text.num_hidden_layers,
            heads: text.num_attention_heads,
            head: text.hidden_size / text.num_attention_heads,
            image_tokens: text.max_position_embeddings,
            image_width: text.hidden_size,
        }
    }

    fn hidden(&self) -> usize {
        self.heads * self.head
    }

    /// Whether an image is remembered a token a row, for [`FusedMemory`].
    pub(super) fn in_rows(self, kept: Kept) -> bool {
        kept.is_fused() && takes_heads_of(self.head)
    }

    /// What rows for sequences of so many tokens take in slots, in bytes, with their encoded images: such a one is copied
    /// into its slot, and lives on until all rows of its batch are admitted.
    fn bytes_in_slots(self, rows: usize, tokens: usize, dtype: DType) -> usize {
        let columns = tokens.next_multiple_of(COLUMNS);
        let (encoded, slot) = (self.elements(self.image_tokens), self.elements(self.image_tokens + columns));
        (rows * encoded + rows.next_power_of_two() * slot) * dtype.size_in_bytes()
    }

    /// Numbers in the keys and values of so many tokens, in all layers.
    fn elements(&self, tokens: usize) -> usize {
        self.layers * 2 * self.hidden() * tokens
    }
}

/// The buffers of rows' own tokens grow by this many columns at a time.
const COLUMNS: usize = 32;

/// Slots and columns of buffers on a device.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Room {
    slots: usize,
    columns: usize,
    images: usize,
}

impl Room {
    /// Larger room, where `slots` rows of `columns` tokens or so many images have none in this.
    fn grown(self, slots: usize, columns: usize, images: usize) -> Option<Self> {
        let number = |wanted: usize, there: usize| if wanted > there { wanted.next_power_of_two() } else { there };
        let columns = if columns > self.columns { columns.next_multiple_of(COLUMNS) } else { self.columns };
        let grown = Self { slots: number(slots, self.slots), columns, images: number(images, self.images) };
        (grown != self).then_some(grown)
    }
}

/// Overwrites a slot of a buffer with another one.
fn move_slot(buffer: &Tensor, from: usize, to: usize) -> Result<()> {
    // A copy in between, since source and target share their storage.
    let slot = buffer.narrow(0, from, 1)?.force_contiguous()?;
    buffer.slice_set(&slot, 0, to)
}

/// The memory that suits a device and a way to keep weights.
pub(super) fn new(sizes: Sizes, device: &Device, dtype: DType, kept: Kept) -> Box<dyn Memory> {
    match kept {
        Kept::Packed(packing) => Box::new(HostMemory::new(sizes, packing)),
        Kept::OneDnn { .. } => unreachable!("the decoder is never kept for oneDNN"),
        Kept::Tensors { .. } if sizes.in_rows(kept) => Box::new(FusedMemory::new(sizes, device.clone(), dtype)),
        Kept::Tensors { .. } => Box::new(DeviceMemory::new(sizes, device.clone(), dtype)),
    }
}
