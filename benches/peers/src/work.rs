//! What is asked of a peer, and the data that every peer makes for itself by the same rule.

use std::path::PathBuf;

use serde::Serialize;

use crate::peer::Peer;

/// One row group of a table: the same work for every peer. Sent to the peers as JSON.
#[derive(Clone, Debug, serde::Deserialize, Serialize)]
#[serde(tag = "work", rename_all = "lowercase")]
pub enum Work {
    /// Y = A · B with A: [M, K], f32; B in each engine's own layout of a linear layer.
    Matmul {
        /// Rows of A.
        m: usize,
        /// Columns of B.
        n: usize,
        /// The contraction.
        k: usize,
        /// B rests as f16.
        half: bool,
    },
    /// Forward, mean cross-entropy and backward over one sequence.
    Step {
        /// Hugging Face folder with f32 safetensors.
        folder: PathBuf,
        /// Length of the sequence.
        tokens: usize,
    },
    /// Attention forward and backward under the two-copy mask, batch 1.
    Attention {
        /// Noisy and clean rows together.
        rows: usize,
        /// Tokens of a block.
        block: usize,
    },
    /// Greedy decoding of one sequence.
    Decode {
        /// GGUF file.
        file: PathBuf,
        /// The same weights as f32, for the reference.
        f32_file: PathBuf,
        /// The weights are blocks of 4 bits.
        four_bits: bool,
        /// Token ids.
        prompt: Vec<u32>,
        /// Length of the answer.
        tokens: usize,
    },
}

/// Query heads of the attention work.
pub const HEADS: usize = 9;
/// Key and value heads of the attention work.
pub const KV_HEADS: usize = 3;
/// Head dimension of the attention work.
pub const HEAD_DIM: usize = 64;

impl Work {
    /// Heading of the table.
    pub fn title(&self) -> &'static str {
        match self {
            Work::Matmul { .. } => "Matrix product, M×N×K",
            Work::Step { .. } => "Training step of SmolLM2-135M, f32, batch 1, no optimiser",
            Work::Attention { .. } => "Two-copy attention, forward and backward, heads 9/3 of 64",
            Work::Decode { .. } => "Greedy decoding of SmolLM2-135M, batch 1",
        }
    }

    /// Name of the row group.
    pub fn name(&self) -> String {
        match self {
            Work::Matmul { m, n, k, half } => {
                format!("{m}×{n}×{k} {}", if *half { "f16 weights" } else { "f32" })
            }
            Work::Step { tokens, .. } => format!("{tokens} tokens"),
            Work::Attention { rows, block } => format!("{rows} rows, blocks of {block}"),
            Work::Decode { four_bits, tokens, .. } => {
                format!("{} weights, {tokens} tokens", if *four_bits { "4-bit" } else { "f16" })
            }
        }
    }

    /// Who takes part. demask comes first: the others are compared with it.
    pub fn peers(&self) -> &'static [Peer] {
        use Peer::*;
        match self {
            Work::Matmul { half: false, .. } => {
                &[Demask, Burn, Meganeura, OpenBlas, TorchCpu, TorchCuda]
            }
            Work::Matmul { half: true, .. } => &[Demask, Burn, Meganeura, TorchCuda],
            Work::Step { .. } => &[Demask, Burn, Meganeura, TorchCpu, TorchCuda],
            Work::Attention { .. } => &[Demask, Burn, TorchCpu, TorchCuda],
            Work::Decode { .. } => &[Demask, LlamaVulkan, LlamaCpu],
        }
    }

    /// What the last-but-one column counts, and how much of it one run does.
    pub fn figure(&self) -> (&'static str, f64) {
        match self {
            Work::Matmul { m, n, k, .. } => ("GFLOP/s", 2e-9 * (m * n * k) as f64),
            Work::Step { tokens, .. } => ("tokens/s", *tokens as f64),
            Work::Attention { rows, block } => {
                // Visible pairs: a noisy block sees itself and the clean blocks before it, a clean one those up to
                // itself. Forward takes two products a pair, backward five.
                let blocks = rows / 2 / block;
                let pairs = block
                    * block
                    * (blocks + blocks * (blocks - 1) / 2 + blocks * (blocks + 1) / 2);
                ("GFLOP/s", 14e-9 * (pairs * HEADS * HEAD_DIM) as f64)
            }
            Work::Decode { tokens, .. } => ("tokens/s", (tokens - 1) as f64),
        }
    }

    /// Largest difference from the reference that counts as equal, as a part of the largest value; of tokens, how much
    /// less likely one may be than the reference's own, in nats.
    pub fn tolerance(&self) -> f64 {
        match self {
            Work::Matmul { half: true, .. } => 5e-3,
            // Activations rounded to 8 bits, as llama.cpp's are beside weights in blocks, move logits by about as much.
            Work::Decode { .. } => 0.25,
            _ => 1e-3,
        }
    }
}

/// Value `i` of array `salt`: a hash, between −0.5 and 0.5. torch_peer.py has the same.
pub fn value(i: usize, salt: u32) -> f32 {
    let mut h = (i as u32).wrapping_add(salt.wrapping_mul(1_000_003)).wrapping_mul(2_654_435_761);
    h ^= h >> 15;
    h = h.wrapping_mul(2_246_822_519);
    h ^= h >> 13;
    (h >> 8) as f32 / 16_777_216.0 - 0.5
}

/// The first `n` values of array `salt`.
pub fn values(n: usize, salt: u32) -> Vec<f32> {
    (0..n).map(|i| value(i, salt)).collect()
}

/// Which elements of a long result are compared: 64 of them, spread by a hash. torch_peer.py has the same.
pub fn samples(len: usize) -> impl Iterator<Item = usize> {
    (0..len.min(64)).map(move |j| (j as u32).wrapping_mul(2_654_435_761) as usize % len)
}

/// Tokens of the training step: inputs and, one further, targets.
pub fn step_tokens(n: usize) -> (Vec<u32>, Vec<u32>) {
    let tokens: Vec<u32> = (0..=n as u32).map(|i| 20 + i * 37 % 400).collect();
    (tokens[..n].to_vec(), tokens[1..].to_vec())
}

/// Parameters whose gradients' norms are compared after a training step.
pub const COMPARED: [&str; 3] = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.29.mlp.down_proj.weight",
];
