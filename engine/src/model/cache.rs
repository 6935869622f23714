//! Keys and values of tokens that will not change any more, one pair of tensors a layer.
//! Slots are written in place: writing one again replaces it, so nothing needs to be dropped or truncated. Which slot
//! belongs to which position of which sequence is the caller's knowledge (`ops::Lane`).

use std::ops::Range;

use super::config::LlamaConfig;
use crate::gpu::Gpu;
use crate::ops;
use crate::tensor::{DType, Tensor};

/// A cache of slots, one a token.
pub struct KvCache {
    /// Per layer: keys and values, f32 or f16 [1, slots, G, H].
    layers: Vec<(Tensor, Tensor)>,
    capacity: usize,
}

impl KvCache {
    /// Room for `capacity` tokens.
    pub(super) fn new(gpu: &Gpu, config: &LlamaConfig, capacity: usize, dtype: DType) -> KvCache {
        let shape = [1, capacity, config.num_key_value_heads, config.head_dim];
        let empty = || Tensor::empty(gpu, shape, dtype, "kv cache");
        let layers = (0..config.num_hidden_layers).map(|_| (empty(), empty())).collect();
        KvCache { layers, capacity }
    }

    /// Slots.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Device memory.
    pub fn bytes(&self) -> usize {
        let tensors = self.layers.iter().flat_map(|(keys, values)| [keys, values]);
        tensors.map(|t| t.dtype().bytes(t.shape())).sum()
    }

    /// Copies slots to others, from `to` on.
    pub fn copy(&mut self, from: Range<usize>, to: usize) {
        for tensor in self.layers.iter().flat_map(|(keys, values)| [keys, values]) {
            let [_, _, heads, h] = **tensor.shape() else { unreachable!("four axes") };
            let flat = tensor.reshape([self.capacity, heads * h]);
            // WebGPU copies nothing within a buffer.
            let part = ops::rows(&flat, from.start, from.len());
            let bytes = tensor.dtype().row_bytes(heads * h);
            let (to, all) = ((to * bytes) as u64, (from.len() * bytes) as u64);
            tensor.gpu().copy(part.buffer(), 0, tensor.buffer(), to, all);
        }
    }

    /// One layer's whole keys and values, for the ops that write and read them.
    pub(super) fn layer(&self, layer: usize) -> (&Tensor, &Tensor) {
        let (keys, values) = &self.layers[layer];
        (keys, values)
    }
}
