//! Floating-point operations of a training step by the usual count: two for each weight and row it meets, four for each
//! element of a pair of positions that attend (two products of length H), three times that for forward and backward,
//! twice for weights that are frozen: they get no gradient. An adapter's own thin products are left out.
//! Recomputed layers do not count: utilisation is about useful work. That the last layer leaves out what only rows
//! without supervision need is not subtracted.

use demask_engine::model::LlamaConfig;
use demask_engine::ops::Mask;

/// Operations of one sequence of `length` tokens with `supervised` rows; `frozen` if an adapter is trained.
pub fn of_sequence(
    config: &LlamaConfig,
    mask: Mask,
    length: usize,
    supervised: usize,
    frozen: bool,
) -> f64 {
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
    let layers = config.num_hidden_layers as f64;
    let head = (config.vocab_size * d) as f64 * supervised as f64;
    let products = 2.0 * (weights as f64 * rows * layers + head);
    let attention = 4.0 * pairs * (n * h) as f64 * layers;
    products * if frozen { 2.0 } else { 3.0 } + attention * 3.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Fresh;

    #[test]
    fn of_a_tiny_model_as_counted_by_hand() {
        let fresh = Fresh {
            hidden_size: 8,
            intermediate_size: 12,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            ..Fresh::default()
        };
        let config = fresh.config(10, None, None);
        // q 8·8, k and v 8·4 each, o 8·8; gate, up and down 8·12 each.
        let weights = 64 + 32 + 32 + 64 + 3 * 96;
        // Four tokens, blocks of two, and who sees how many.
        let counts = [
            (Mask::Causal, 4, 1 + 2 + 3 + 4),
            (Mask::Full, 4, 4 + 4 + 4 + 4),
            (Mask::BlockCausal(2), 4, 2 + 2 + 4 + 4),
            // Noisy: its block and the clean one before it. Clean: as above.
            (Mask::TwoCopy(2), 8, (2 + 2 + 4 + 4) + (2 + 2 + 4 + 4)),
        ];
        for (mask, rows, pairs) in counts {
            // A pair costs a product of length 4 for its score and one for its value, in each of two heads.
            let attention = 2 * (4 + 4) * 2 * pairs;
            let layer = 2 * weights * rows + attention;
            let head = 2 * 10 * 8 * 3;
            let expected = 3 * (2 * layer + head);
            assert_eq!(of_sequence(&config, mask, 4, 3, false), f64::from(expected), "{mask:?}");
            let frozen = expected - (2 * 2 * weights * rows + head);
            assert_eq!(of_sequence(&config, mask, 4, 3, true), f64::from(frozen), "{mask:?}");
        }
    }
}
