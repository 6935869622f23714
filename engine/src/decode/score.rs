//! How probable given tokens are under the causal model, and the usual summaries. Not a likelihood
//! of the block-diffusion process, which has none in closed form.

use super::PREFILL_ROWS;
use super::options::check_ids;
use crate::model::{KvCache, Llama};
use crate::ops::{Mask, Supervision, linear_cross_entropy};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Natural log-probability of each token given those before it; `None` for the first, which nothing
/// precedes. Runs in chunks of 512 rows; logits on the device never exceed 32 MiB.
///
/// # Errors
/// [`Error::Request`] if there are more tokens than the model has positions, or an id is outside
/// the vocabulary; a device fault.
pub fn score(llama: &Llama, tokens: &[u32]) -> Result<Vec<Option<f32>>> {
    let config = llama.config();
    check_ids(config.vocab_size, tokens)?;
    if tokens.len() > config.max_position_embeddings {
        return Err(Error::Request(format!(
            "{} tokens do not fit the model's {} positions; score them in pieces",
            tokens.len(),
            config.max_position_embeddings
        )));
    }
    let mut scores = Vec::with_capacity(tokens.len());
    scores.extend(tokens.first().map(|_| None));
    // The last token is only a target.
    let inputs = tokens.len().saturating_sub(1);
    let mut cache = KvCache::new(llama.gpu(), config, inputs.max(1));
    for start in (0..inputs).step_by(PREFILL_ROWS) {
        let end = (start + PREFILL_ROWS).min(inputs);
        let hidden = llama.step(&tokens[start..end], start, Mask::Causal, &mut cache);
        let n = end - start;
        let gpu = llama.gpu();
        let supervision = Supervision {
            targets: Tensor::from_u32(gpu, &tokens[start + 1..=end], [n]),
            weights: Tensor::from_f32(gpu, &vec![1.0; n], [n]),
            divisor: 1.0,
        };
        let costs = linear_cross_entropy(&hidden, llama.head(), &supervision).per_row.to_vec()?;
        scores.extend(costs.into_iter().map(|cost| Some(-cost)));
    }
    Ok(scores)
}

/// exp(−mean log-probability) over the scored tokens; `None` if none was scored.
pub fn perplexity(scores: &[Option<f32>]) -> Option<f64> {
    let n = scores.iter().flatten().count();
    (n > 0).then(|| (-sum(scores) / n as f64).exp())
}

/// −Σ log₂ probability of the scored tokens per byte of their text (without the first token's,
/// which is not scored); `None` if `bytes` is 0.
pub fn bits_per_byte(scores: &[Option<f32>], bytes: usize) -> Option<f64> {
    (bytes > 0).then(|| -sum(scores) / std::f64::consts::LN_2 / bytes as f64)
}

fn sum(scores: &[Option<f32>]) -> f64 {
    scores.iter().flatten().map(|&s| f64::from(s)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_of_a_fair_coin() {
        let half = Some(0.5f32.ln());
        let scores = [None, half, half, half, half];
        let perplexity = perplexity(&scores).expect("four scores");
        assert!((perplexity - 2.0).abs() < 1e-6);
        let bits = bits_per_byte(&scores, 2).expect("two bytes");
        assert!((bits - 2.0).abs() < 1e-6);
    }

    #[test]
    fn nothing_scored_gives_nothing() {
        assert_eq!(perplexity(&[None]), None);
        assert_eq!(bits_per_byte(&[None], 0), None);
    }
}
