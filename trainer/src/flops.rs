//! Floating-point operations of a training step by the usual count: two for each weight and row it meets, four for each
//! element of a pair of positions that attend (two products of length H), three times that for forward and backward.
//! Recomputed layers do not count: utilisation is about useful work.

use demask_engine::model::LlamaConfig;
use demask_engine::ops::Mask;

/// Operations of one sequence of `length` tokens with `supervised` rows.
pub fn of_sequence(config: &LlamaConfig, mask: Mask, length: usize, supervised: usize) -> f64 {
    let l = length as f64;
    let (rows, pairs) = match mask {
        Mask::Causal => (l, l * (l + 1.0) / 2.0),
        Mask::Full => (l, l * l),
        Mask::BlockCausal(b) => (l, l * (l + b as f64) / 2.0),
        Mask::TwoCopy(b) => (2.0 * l, l * (l + b as f64)),
    };
    let (d, f, h) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (n, g) = (config.num_attention_heads, config.num_key_value_heads);
    let weights = d * h * (2 * n + 2 * g) + 3 * d * f;
    let layer = 2.0 * weights as f64 * rows + 4.0 * pairs * (n * h) as f64;
    let head = 2.0 * (config.vocab_size * d) as f64 * supervised as f64;
    3.0 * (layer * config.num_hidden_layers as f64 + head)
}
