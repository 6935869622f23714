//! Keys and values of tokens that will not change any more, one pair of tensors a layer.
//! Rows are written in place at absolute positions: writing a position again replaces it, so nothing needs
//! to be dropped or truncated.

use super::config::LlamaConfig;
use crate::gpu::Gpu;
use crate::tensor::{DType, Tensor};

/// A cache for one sequence.
pub struct KvCache {
    /// Per layer: keys and values, f32 [1, capacity, G, H].
    layers: Vec<(Tensor, Tensor)>,
    capacity: usize,
}

impl KvCache {
    /// Room for `capacity` positions.
    pub fn new(gpu: &Gpu, config: &LlamaConfig, capacity: usize) -> KvCache {
        let shape = [1, capacity, config.num_key_value_heads, config.head_dim];
        let empty = || Tensor::empty(gpu, shape, DType::F32, "kv cache");
        let layers = (0..config.num_hidden_layers).map(|_| (empty(), empty())).collect();
        KvCache { layers, capacity }
    }

    /// Positions it has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// One layer's whole keys and values, for the ops that write and read them.
    pub(super) fn layer(&self, layer: usize) -> (&Tensor, &Tensor) {
        let (keys, values) = &self.layers[layer];
        (keys, values)
    }
}
