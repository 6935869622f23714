//! Keys and values of tokens that will not change any more, one pair of tensors a layer.
//! Rows are written in place at absolute positions: writing a position again replaces it, so nothing needs
//! to be dropped or truncated.

use bytemuck::{Pod, Zeroable};

use super::config::LlamaConfig;
use crate::gpu::{Gpu, Kernel, fold, kernel};
use crate::tensor::{DType, Tensor};

const WRITE: Kernel = kernel!("cache_write");

/// A cache for one sequence.
pub struct KvCache {
    /// Per layer: keys and values, f32 [1, capacity, G, H].
    layers: Vec<(Tensor, Tensor)>,
    capacity: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    n: u32,
    start: u32,
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

    /// Writes the keys and values of `k`, `v`: [1, T, G, H] at positions `start`.. of one layer and returns
    /// that layer's whole cache.
    ///
    /// # Panics
    /// If they do not fit behind `start`.
    pub(super) fn write(
        &mut self,
        layer: usize,
        start: usize,
        k: &Tensor,
        v: &Tensor,
    ) -> (&Tensor, &Tensor) {
        let (keys, values) = &self.layers[layer];
        let row = keys.numel() / self.capacity.max(1);
        let n = k.numel();
        assert!(start * row + n <= keys.numel(), "cache of {} positions is full", self.capacity);
        let params = Params { n: n as u32, start: (start * row) as u32 };
        WRITE.run(&params, &[k, v], &[keys, values], fold(n.div_ceil(256)));
        (keys, values)
    }
}
