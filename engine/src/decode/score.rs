//! How probable a given text is to a model, token by token, and how far one model's predictions lie from another's.
//! Read causally, a token is given those before it. Read in blocks, it is given the blocks before its own, which is
//! hidden whole: what a block-diffusion model holds of a token before its first pass. That is no likelihood of the
//! diffusion process, which has none in closed form, but comparable between texts and between models.

use std::ops::Range;

use super::PREFILL_ROWS;
use super::options::{BlockOptions, Mode, check_ids};
use crate::model::{DiffusionAttention, KvCache, Llama};
use crate::ops::{Lane, Lanes, Supervision, linear_cross_entropy};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Logits that two models' comparison holds on the host at a time, in bytes for each model.
const COMPARED_BYTES: usize = 32 << 20;

/// Natural log-probability of each token, read as the mode says. `None` for what nothing precedes: the first token of a
/// text read causally. Runs in pieces of 512 tokens; logits on the device never exceed 32 MiB.
///
/// # Errors
/// [`Error::Request`] if there are more tokens than the model has positions, an id is outside the vocabulary, or the
/// mode is one of full attention; a device fault.
pub fn score(llama: &Llama, tokens: &[u32], mode: &Mode) -> Result<Vec<Option<f32>>> {
    let mut reader = Reader::new(llama, tokens, mode)?;
    let mut scores = vec![None; reader.first().min(tokens.len())];
    while let Some((hidden, range)) = reader.next() {
        let gpu = llama.gpu();
        let supervision = Supervision {
            targets: Tensor::from_u32(gpu, &tokens[range.clone()], [range.len()]),
            weights: Tensor::from_f32(gpu, &vec![1.0; range.len()], [range.len()]),
            divisor: 1.0,
        };
        let costs = linear_cross_entropy(&hidden, llama.head(), &supervision).per_row.to_vec()?;
        scores.extend(costs.into_iter().map(|cost| Some(-cost)));
    }
    Ok(scores)
}

/// How the predictions of one model differ from another's at one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// Σ p ln(p / q) over the vocabulary, p the reference's probabilities: Kullback-Leibler divergence in nats.
    pub kl: f64,
    /// Both hold the same token for the likeliest.
    pub same_top: bool,
    /// Natural log-probability of the token under the reference, and under the model.
    pub logprobs: [f64; 2],
}

/// Compares what a model predicts for each token of a text (but those that nothing precedes) with what the reference
/// predicts. `on_progress` is told how many tokens are done.
///
/// # Errors
/// As [`score`], and if the two have different vocabularies.
pub fn compare(
    llama: &Llama,
    reference: &Llama,
    tokens: &[u32],
    mode: &Mode,
    mut on_progress: impl FnMut(usize),
) -> Result<Vec<Difference>> {
    let sizes = [reference, llama].map(|model| model.config().vocab_size);
    if sizes[0] != sizes[1] {
        return Err(Error::Request(format!(
            "the reference has a vocabulary of {}, the model one of {}; they cannot be compared",
            sizes[0], sizes[1]
        )));
    }
    let most = (COMPARED_BYTES / (4 * sizes[0])).max(1);
    let mut readers = [Reader::new(reference, tokens, mode)?, Reader::new(llama, tokens, mode)?];
    let mut differences = Vec::with_capacity(tokens.len());
    loop {
        let [p, q] = &mut readers;
        let (Some((p, range)), Some((q, _))) = (p.next(), q.next()) else { break };
        for first in (0..range.len()).step_by(most) {
            let rows = first..(first + most).min(range.len());
            let targets = &tokens[range.start + rows.start..range.start + rows.end];
            let p = host_logits(reference, &p, rows.clone())?;
            let q = host_logits(llama, &q, rows)?;
            let pairs = p.chunks(sizes[0]).zip(q.chunks(sizes[0])).zip(targets);
            differences.extend(pairs.map(|((p, q), &target)| difference(p, q, target as usize)));
            on_progress(differences.len());
        }
    }
    Ok(differences)
}

/// Rows of hidden states as logits, [R, V] in one piece.
fn host_logits(llama: &Llama, hidden: &Tensor, rows: Range<usize>) -> Result<Vec<f32>> {
    let n = rows.len();
    let shards = llama.logits_of_rows(hidden, rows);
    let shards: Vec<Vec<f32>> = shards.iter().map(Tensor::to_vec).collect::<Result<_>>()?;
    if shards.len() == 1 {
        return Ok(shards.into_iter().next().expect("one shard"));
    }
    let mut whole = Vec::new();
    for row in 0..n {
        for shard in &shards {
            let width = shard.len() / n;
            whole.extend_from_slice(&shard[row * width..(row + 1) * width]);
        }
    }
    Ok(whole)
}

fn difference(p: &[f32], q: &[f32], target: usize) -> Difference {
    let norm = |logits: &[f32]| {
        let top = (0..logits.len()).fold(0, |a, b| if logits[b] > logits[a] { b } else { a });
        let most = f64::from(logits[top]);
        let sum: f64 = logits.iter().map(|&l| (f64::from(l) - most).exp()).sum();
        (top, most + sum.ln())
    };
    let ((p_top, p_norm), (q_top, q_norm)) = (norm(p), norm(q));
    let pairs = p.iter().zip(q).map(|(&a, &b)| (f64::from(a) - p_norm, f64::from(b) - q_norm));
    let kl: f64 = pairs.map(|(p, q)| p.exp() * (p - q)).sum();
    let logprobs = [f64::from(p[target]) - p_norm, f64::from(q[target]) - q_norm];
    // Rounding may put equal distributions a hair below 0; `max` would take NaN for one of these.
    Difference { kl: if kl < 0.0 { 0.0 } else { kl }, same_top: p_top == q_top, logprobs }
}

/// Reads a text piece by piece over a cache.
struct Reader<'a> {
    llama: &'a Llama,
    tokens: &'a [u32],
    cache: KvCache,
    blocks: Option<BlockOptions>,
    /// First token that was not told of yet.
    at: usize,
}

impl<'a> Reader<'a> {
    fn new(llama: &'a Llama, tokens: &'a [u32], mode: &Mode) -> Result<Reader<'a>> {
        let config = llama.config();
        check_ids(config.vocab_size, tokens)?;
        if tokens.len() > config.context_length() {
            return Err(Error::Request(format!(
                "{} tokens do not fit the model's {} positions; score them in pieces",
                tokens.len(),
                config.context_length()
            )));
        }
        let blocks = match mode {
            Mode::Autoregressive => None,
            Mode::Block(block) => {
                block.check(config.vocab_size)?;
                Some(block.clone())
            }
        };
        if blocks.as_ref().is_some_and(|b| b.attention == DiffusionAttention::Full) {
            return Err(Error::Request(
                "a model of full attention reads a text anew for each block; score it causally, or give it blocks"
                    .into(),
            ));
        }
        // Behind the text there is room for the hidden blocks of a piece.
        let hidden = blocks.as_ref().map_or(0, |b| PREFILL_ROWS.max(b.block_length));
        let cache = llama.cache(tokens.len().max(1) + hidden);
        let at = usize::from(blocks.is_none());
        Ok(Reader { llama, tokens, cache, blocks, at })
    }

    /// The first token that it tells of.
    fn first(&self) -> usize {
        self.at
    }

    /// Final hidden states whose logits are those of the next tokens, and which these are.
    fn next(&mut self) -> Option<(Tensor, Range<usize>)> {
        let start = self.at;
        if start >= self.tokens.len() {
            return None;
        }
        let most = match &self.blocks {
            None => PREFILL_ROWS,
            Some(block) => (PREFILL_ROWS / block.block_length).max(1) * block.block_length,
        };
        let end = (start + most).min(self.tokens.len());
        self.at = end;
        let hidden = match self.blocks.clone() {
            None => {
                let inputs = &self.tokens[start - 1..end - 1];
                // The whole text is one context, whatever pieces it is read in.
                let lane = Lane {
                    rows: inputs.len(),
                    position: start - 1,
                    block: 1,
                    length: self.tokens.len(),
                    ..Lane::default()
                };
                let gpu = self.llama.gpu();
                let tokens = Tensor::from_u32(gpu, inputs, [inputs.len()]);
                self.llama.pass(&tokens, &Lanes::new(gpu, &[lane]), &mut self.cache)
            }
            Some(block) => self.hidden_blocks(&block, start..end),
        };
        Some((hidden, start..end))
    }

    /// Reads a piece of whole blocks, and then each of its blocks again, hidden, behind the ones before it.
    fn hidden_blocks(&mut self, block: &BlockOptions, range: Range<usize>) -> Tensor {
        let seen = match block.attention {
            DiffusionAttention::Causal => 1,
            _ => block.block_length,
        };
        let gpu = self.llama.gpu();
        let length = self.tokens.len();
        let lane = Lane {
            rows: range.len(),
            position: range.start,
            block: seen,
            length,
            ..Lane::default()
        };
        let tokens = Tensor::from_u32(gpu, &self.tokens[range.clone()], [range.len()]);
        self.llama.pass(&tokens, &Lanes::new(gpu, &[lane]).of_many_rows(), &mut self.cache);
        let (first, scratch) = (range.start, self.tokens.len());
        let starts = range.clone().step_by(block.block_length);
        let lanes: Vec<Lane> = starts
            .map(|position| Lane {
                row: position - first,
                rows: block.block_length.min(range.end - position),
                position,
                block: seen,
                prefix: (0, position),
                slot: scratch + position - first,
                length,
            })
            .collect();
        let masks = Tensor::from_u32(gpu, &vec![block.mask_id; range.len()], [range.len()]);
        self.llama.pass(&masks, &Lanes::new(gpu, &lanes), &mut self.cache)
    }
}

/// exp(−mean log-probability) over the scored tokens; `None` if none was scored.
pub fn perplexity(scores: &[Option<f32>]) -> Option<f64> {
    let n = scores.iter().flatten().count();
    (n > 0).then(|| (-sum(scores) / n as f64).exp())
}

/// −Σ log₂ probability of the scored tokens per byte of their text (without those that are not scored); `None` if
/// `bytes` is 0.
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

    #[test]
    fn divergence_of_two_coins() {
        // p = (3/4, 1/4), q = (1/2, 1/2); logits are free up to a constant.
        let p = [3.0f32.ln() + 5.0, 5.0];
        let d = difference(&p, &[-2.0, -2.0], 1);
        let want = 0.75 * (0.75f64 / 0.5).ln() + 0.25 * (0.25f64 / 0.5).ln();
        assert!((d.kl - want).abs() < 1e-6 && d.same_top, "{d:?}");
        assert!((d.logprobs[0] - 0.25f64.ln()).abs() < 1e-6);
        assert!((d.logprobs[1] - 0.5f64.ln()).abs() < 1e-6);
        assert_eq!(difference(&p, &p, 0).kl, 0.0);
        assert!(!difference(&p, &[0.0, 1.0], 0).same_top);
        assert!(difference(&p, &[0.0, f32::NAN], 0).kl.is_nan());
    }
}
