//! The forward process of block diffusion and what a training step makes of it: block-wise clipped
//! noise and its warm-up (arXiv 2601.15892 §3.2 and §3.3), the two-copy layout, and the
//! autoregressive layout beside it. Pure seeded CPU code; it knows token ids and no tensors.
//!
//! Every draw is a function of (seed, step, sequence, block), so a sequence is corrupted alike
//! however a batch is split and wherever a run is resumed.

use demask_engine::philox::Philox;
use serde::{Deserialize, Serialize};

/// Keeps these streams apart from others drawn under the same user seed.
const NOISE: u64 = u64::from_le_bytes(*b"noise\0\0\0");
/// Block coordinate of the stream that deals out the strata; no real block has this index.
const STRATA: u32 = u32::MAX;

/// The law of a block's mask rate u, and the weight of a masked token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Schedule {
    /// u ~ U(0, u_max), weight 1, blocks may stay unmasked: the task grows from "nearly everything
    /// is visible" (§3.2, Eq. 10). Clip and forced mask are off, since they would keep u ≥ 1/B.
    Warmup {
        /// Upper end of the rate, see [`u_max`].
        u_max: f32,
    },
    /// u = max(t, 1/B), t ~ U(0,1), weight 1/u ≤ B; a block left unmasked gets one forced mask
    /// (§3.3). What training uses after the warm-up. The forced mask inflates the expected weight
    /// (4.452 instead of 4 for B = 4), so this loss is not a likelihood bound.
    Clipped,
    /// u = t ~ U(0,1), weight 1/u, nothing forced: unbiased, for evaluation; and for training without the clip.
    Unclipped,
}

/// Upper end of the warm-up's mask rate at `step`, u_init + (1 − u_init)·s/S; `None` once s ≥ S
/// (§3.2, Eq. 10; the paper's example for u_init is 1e-3).
pub fn u_max(step: u64, warmup_steps: u64, u_init: f32) -> Option<f32> {
    let progress = step as f32 / warmup_steps.max(1) as f32;
    (step < warmup_steps).then_some(u_init + (1.0 - u_init) * progress)
}

impl Schedule {
    /// The training schedule at `step`: warm-up first, then clipped noise, or unclipped.
    pub fn at(step: u64, warmup_steps: u64, u_init: f32, clip: bool) -> Self {
        let after = if clip { Schedule::Clipped } else { Schedule::Unclipped };
        u_max(step, warmup_steps, u_init).map_or(after, |u_max| Schedule::Warmup { u_max })
    }

    /// (mask rate, weight of a masked token) of a block for t ~ U(0,1).
    fn rate_and_weight(self, t: f32, block_length: usize) -> (f32, f32) {
        match self {
            Schedule::Warmup { u_max } => (t * u_max, 1.0),
            Schedule::Clipped => {
                let u = t.max(1.0 / block_length as f32);
                (u, 1.0 / u)
            }
            Schedule::Unclipped => (t, 1.0 / t),
        }
    }
}

/// Names the randomness of one sequence in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoiseKey {
    /// The run's seed.
    pub seed: u64,
    /// Optimiser step.
    pub step: u32,
    /// Index of the sequence within the step or the run, counted before any split into
    /// micro-batches or ranks.
    pub sequence: u32,
}

/// How sequences are corrupted.
#[derive(Clone, Copy, Debug)]
pub struct Corruption {
    /// B. Blocks start at multiples of B; the last one may be shorter and keeps the rate's floor
    /// of 1/B.
    pub block_length: usize,
    /// The id that replaces a masked token.
    pub mask_id: u32,
    /// The law of the mask rate.
    pub schedule: Schedule,
    /// How the rates of different blocks depend on each other.
    pub strata: Strata,
}

/// How mask rates are spread. Each t is exactly U(0,1) taken alone; only the joint law changes, and with it the
/// variance of the loss: with n strata the i-th takes t = (π(i) + U_i)/n, π a uniformly random permutation and
/// U_i ~ U(0,1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strata {
    /// Each on its own.
    Independent,
    /// Evenly over the blocks of a sequence.
    Blocks,
    /// Evenly over this many sequences of a step, each with one rate: for blocks as long as the sequence.
    Sequences(u32),
}

/// One corrupted sequence of length L.
#[derive(Clone, Debug, PartialEq)]
pub struct Corrupted {
    /// x_t \[L]: x_0 with `mask_id` at the masked positions.
    pub tokens: Vec<u32>,
    /// \[L]: the weight of a masked position, 0 elsewhere.
    pub weights: Vec<f32>,
    /// Mask rate of each block \[⌈L/B⌉]; 0 for a block with nothing maskable.
    pub rates: Vec<f32>,
    /// Blocks that came out unmasked and were given their forced mask.
    pub n_forced: usize,
    /// B of the rates.
    pub block_length: usize,
}

impl Corruption {
    /// Corrupts x_0 \[L]. Tokens that are not `maskable` \[L] (a prompt) always stay visible.
    #[track_caller]
    pub fn corrupt(&self, x0: &[u32], maskable: &[bool], key: NoiseKey) -> Corrupted {
        assert!(self.block_length > 0, "corrupt: block_length is 0");
        assert_eq!(x0.len(), maskable.len(), "corrupt: one maskable flag per token of x0");
        let mut out = Corrupted {
            tokens: x0.to_vec(),
            weights: vec![0.0; x0.len()],
            rates: vec![0.0; x0.len().div_ceil(self.block_length)],
            n_forced: 0,
            block_length: self.block_length,
        };
        // A block of prompt alone takes no stratum: the others would be spread less evenly.
        let active: Vec<usize> = maskable
            .chunks(self.block_length)
            .enumerate()
            .filter_map(|(b, flags)| flags.contains(&true).then_some(b))
            .collect();
        let strata = match self.strata {
            Strata::Independent => None,
            Strata::Blocks => Some(permutation(active.len(), key)),
            // The same permutation for every sequence of the step; this one takes its place in it.
            Strata::Sequences(n) => {
                let all = permutation(n as usize, NoiseKey { sequence: STRATA, ..key });
                let mine = all[key.sequence as usize % all.len()];
                Some((0..active.len()).map(|i| (mine + i as u32) % n).collect())
            }
        };
        let n_strata = match self.strata {
            Strata::Sequences(n) => n as usize,
            _ => active.len(),
        };
        for (i, &block) in active.iter().enumerate() {
            let mut stream = key.stream(block as u32);
            let mut t = f64::from(stream.uniform());
            if let Some(strata) = &strata {
                t = (f64::from(strata[i]) + t) / n_strata as f64;
            }
            let (rate, weight) = self.schedule.rate_and_weight(t as f32, self.block_length);
            out.rates[block] = rate;
            let start = block * self.block_length;
            let end = x0.len().min(start + self.block_length);
            let candidates: Vec<usize> = (start..end).filter(|&p| maskable[p]).collect();
            let masked = candidates.iter().copied().filter(|_| stream.uniform() < rate);
            let mut masked: Vec<usize> = masked.collect();
            if masked.is_empty() && self.schedule == Schedule::Clipped {
                masked.push(candidates[stream.below(candidates.len() as u32) as usize]);
                out.n_forced += 1;
            }
            for position in masked {
                out.tokens[position] = self.mask_id;
                out.weights[position] = weight;
            }
        }
        out
    }

    /// The same sequence with what was visible masked, and the other way round: x_t of the complementary rates 1 − u.
    /// Blocks that were masked whole have nothing to learn here.
    pub fn complement(&self, x0: &[u32], maskable: &[bool], of: &Corrupted) -> Corrupted {
        let mut out = Corrupted {
            tokens: x0.to_vec(),
            weights: vec![0.0; x0.len()],
            rates: vec![0.0; of.rates.len()],
            n_forced: 0,
            block_length: self.block_length,
        };
        for i in (0..x0.len()).filter(|&i| maskable[i]) {
            let block = i / self.block_length;
            // A rate of 0 that was drawn, not left: all of the block is masked here.
            let rate = 1.0 - of.rates[block];
            out.rates[block] = rate;
            if of.weights[i] == 0.0 {
                out.tokens[i] = self.mask_id;
                out.weights[i] = self.schedule.rate_and_weight(rate, self.block_length).1;
            }
        }
        out
    }
}

impl NoiseKey {
    fn stream(self, block: u32) -> Philox {
        Philox::new(self.seed ^ NOISE, [self.step, self.sequence, block])
    }
}

/// A uniformly random permutation of 0..n (Fisher–Yates).
fn permutation(n: usize, key: NoiseKey) -> Vec<u32> {
    let mut stream = key.stream(STRATA);
    let mut order: Vec<u32> = (0..n as u32).collect();
    for i in (1..n).rev() {
        order.swap(i, stream.below(i as u32 + 1) as usize);
    }
    order
}

/// One sequence, laid out for a training step: what goes in, and which rows are supervised.
/// The base sequence has length L; the input has R rows, L (autoregressive) or 2L (two copies).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// Input ids \[R].
    pub tokens: Vec<u32>,
    /// Position ids \[R], 0..L in each copy.
    pub positions: Vec<u32>,
    /// \[L]: half-open range of the positions that share a document with this one.
    pub spans: Vec<[u32; 2]>,
    /// Supervised rows of the input, ascending \[M].
    pub supervised: Vec<u32>,
    /// The id that each supervised row must predict \[M].
    pub targets: Vec<u32>,
    /// Weight of each supervised row's cross-entropy \[M].
    pub weights: Vec<f32>,
    /// Mask rate of each supervised row's block \[M]; empty for autoregressive training.
    pub rates: Vec<f32>,
    /// What the weighted sum is divided by: the tokens that could have been supervised, masked or
    /// not. The paper's curves only fit this normaliser (loss ≈ u_max/2 · CE in the warm-up).
    pub divisor: f32,
}

impl Example {
    /// x_t ⊕ x_0 \[2L]: row i < L is supervised where x_t is masked, and predicts x_0 at i itself,
    /// without the autoregressive shift (arXiv 2601.15892 §4.1; the layout is BD3-LM's,
    /// arXiv 2503.09573).
    #[track_caller]
    pub fn two_copy(
        x0: &[u32],
        maskable: &[bool],
        spans: Vec<[u32; 2]>,
        xt: &Corrupted,
    ) -> Example {
        let alone = Self::single_copy(x0, maskable, spans, xt);
        let positions = 0..x0.len() as u32;
        Example {
            tokens: [&xt.tokens, x0].concat(),
            positions: positions.clone().chain(positions).collect(),
            ..alone
        }
    }

    /// x_t alone \[L], for attention over the whole sequence or over what came before: supervised like
    /// [`Example::two_copy`].
    #[track_caller]
    pub fn single_copy(
        x0: &[u32],
        maskable: &[bool],
        spans: Vec<[u32; 2]>,
        xt: &Corrupted,
    ) -> Example {
        assert_eq!(x0.len(), xt.tokens.len(), "x_0 and x_t differ in length");
        assert_eq!(x0.len(), spans.len(), "one span per token of x_0");
        assert_eq!(x0.len(), maskable.len(), "one maskable flag per token of x_0");
        let masked: Vec<usize> = (0..x0.len()).filter(|&i| xt.weights[i] > 0.0).collect();
        Example {
            tokens: xt.tokens.clone(),
            positions: (0..x0.len() as u32).collect(),
            spans,
            rates: masked.iter().map(|&i| xt.rates[i / xt.block_length]).collect(),
            supervised: masked.iter().map(|&i| i as u32).collect(),
            targets: masked.iter().map(|&i| x0[i]).collect(),
            weights: masked.iter().map(|&i| xt.weights[i]).collect(),
            divisor: maskable.iter().filter(|&&m| m).count() as f32,
        }
    }

    /// x_0 \[L]: row i predicts token i + 1 with weight 1, where that token is `supervisable` (no
    /// prompt) and in the same span: nothing announces what the next document starts with.
    #[track_caller]
    pub fn autoregressive(x0: &[u32], supervisable: &[bool], spans: Vec<[u32; 2]>) -> Example {
        assert_eq!(x0.len(), spans.len(), "autoregressive: one span per token of x_0");
        assert_eq!(x0.len(), supervisable.len(), "autoregressive: one flag per token of x_0");
        let supervised: Vec<u32> = (0..x0.len() as u32)
            .filter(|&i| i + 1 < spans[i as usize][1] && supervisable[i as usize + 1])
            .collect();
        Example {
            tokens: x0.to_vec(),
            positions: (0..x0.len() as u32).collect(),
            targets: supervised.iter().map(|&i| x0[i as usize + 1]).collect(),
            weights: vec![1.0; supervised.len()],
            rates: Vec::new(),
            divisor: supervised.len() as f32,
            supervised,
            spans,
        }
    }

    /// M, the supervised rows: masked tokens, or next tokens.
    pub fn n_supervised(&self) -> usize {
        self.supervised.len()
    }
}

#[cfg(test)]
#[path = "noise_tests.rs"]
mod tests;
