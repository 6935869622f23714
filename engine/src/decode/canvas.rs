//! The tokens of a decoding on the device. What a pass decides, which token an open position would get, how sure it
//! is, and which positions are committed, is decided by two kernels and written where the next pass reads it; only a
//! record of four words a position comes back, whenever the host cares to wait for it.
//!
//! The rules are those of [`Sampler`], whose draws have the same names: argmax of the logits, or of logit + T · g with
//! a Gumbel draw g per (seed, token, position, pass), which samples from softmax(logits / T). `top_k` and `top_p` need
//! a sorted vocabulary and stay on the host.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::{Remasking, Sampler, not_finite};
use crate::Result;
use crate::gpu::{Gpu, Kernel, ReadBack, kernel};
use crate::ops;
use crate::tensor::{DType, Tensor};

const CHOOSE: Kernel = kernel!("choose");
const COMMIT: Kernel = kernel!("commit");

/// Columns of the vocabulary that one workgroup looks through.
const SEGMENT: usize = 2048;
/// Lanes of a workgroup. Few, because each barrier costs a software adapter in proportion.
const LANES: (&str, u32) = ("WG", 64);
/// Words of a record: token, confidence, priority, status.
const RECORD: usize = 4;
/// A temperature above this drowns every logit just the same, and does not overflow.
const HOTTEST: f32 = 1e30;

/// The tokens of a decoding, and how they are chosen. A position is open while it holds the token `hole`. Clones share
/// the memory.
#[derive(Clone)]
pub struct Canvas {
    /// u32 [capacity, 1].
    tokens: Tensor,
    /// u32 [3]: passes done; 1 until the answer ended; 1 while the rows of the last pass want another one.
    state: Tensor,
    /// u32 [E], or one word that is no token.
    stops: Tensor,
    stop_count: usize,
    hole: u32,
    sampler: Sampler,
}

/// When a pass that is recorded ahead is wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Wanted {
    /// In any case.
    Surely,
    /// Unless the answer has ended.
    WhileGoing,
    /// Unless the answer has ended or the rows of the last commit are full.
    WhileOpen,
}

/// How many of the open positions a pass commits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Quota {
    /// This many of the highest priority, at least one.
    Best(usize),
    /// The one of the highest priority, and all whose priority is at least this.
    AtLeast(f32),
}

/// What a pass did about a position that was open.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Proposal {
    /// The position.
    pub position: usize,
    /// Its likeliest or drawn token.
    pub token: u32,
    /// The token's probability under the raw logits.
    pub confidence: f32,
    /// True if the position got the token for good.
    pub committed: bool,
}

/// The record of a pass, on its way to the host.
pub struct Outcome {
    read: ReadBack,
    start: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ChooseParams {
    columns: u32,
    first: u32,
    segments: u32,
    skip: u32,
    position: u32,
    hole: u32,
    key: [u32; 2],
    temperature: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CommitParams {
    rows: u32,
    segments: u32,
    stops: u32,
    position: u32,
    hole: u32,
    quota: u32,
    random: u32,
    key: [u32; 2],
    threshold: f32,
}

impl Canvas {
    /// The canvas of `tokens`, of which those that are `hole` may become open positions. `hole` is never chosen; it
    /// need not be a token of the vocabulary.
    ///
    /// # Panics
    /// If the sampler has limits or a forbidden token of its own.
    pub fn new(gpu: &Gpu, tokens: &[u32], hole: u32, sampler: Sampler, stops: &[u32]) -> Canvas {
        let limits = (sampler.top_k, sampler.top_p, sampler.forbidden);
        assert_eq!(limits, (None, None, None), "the device samples from the whole vocabulary");
        let words = if stops.is_empty() { &[u32::MAX] } else { stops };
        Canvas {
            tokens: Tensor::from_u32(gpu, tokens, [tokens.len(), 1]),
            state: Tensor::from_u32(gpu, &[0, 1, 0], [3]),
            stops: Tensor::from_u32(gpu, words, [words.len()]),
            stop_count: stops.len(),
            hole,
            sampler,
        }
    }

    /// Records a pass that the device skips where `wanted` does not hold any more.
    pub(super) fn pass_if<R>(&self, wanted: Wanted, pass: impl FnOnce() -> R) -> R {
        let word = match wanted {
            Wanted::Surely => return pass(),
            Wanted::WhileGoing => 1,
            Wanted::WhileOpen => 2,
        };
        self.tokens.gpu().only_if(self.state.buffer(), word, pass)
    }

    /// The tokens at `rows`, u32 [rows, 1].
    pub fn rows(&self, rows: Range<usize>) -> Tensor {
        ops::rows(&self.tokens, rows.start, rows.len())
    }

    /// Sets one token from the host, which commits it.
    pub fn set(&self, position: usize, token: u32) {
        let bytes = token.to_le_bytes();
        self.tokens.gpu().write(self.tokens.buffer(), 4 * position as u64, &bytes);
    }

    /// Records a choice for each open position among the rows from `start` on, and the commit of some of them.
    /// `logits` are [R, V_i], the parts of the vocabulary in order. The rows are the whole part of a block that
    /// belongs to the answer; once they hold a stop token and nothing open before it, later passes do nothing.
    ///
    /// # Panics
    /// If the logits have different numbers of rows, or the rows do not fit the canvas.
    pub fn commit(
        &self,
        logits: &[Tensor],
        start: usize,
        quota: Quota,
        remasking: Remasking,
    ) -> Outcome {
        let rows = logits.first().map_or(0, |part| part.shape()[0]);
        let fits = logits.iter().all(|part| part.shape().len() == 2 && part.shape()[0] == rows);
        assert!(fits && start + rows <= self.tokens.numel(), "commit of {logits:?} at {start}");
        let gpu = self.tokens.gpu();
        let segments_of = |part: &Tensor| part.shape()[1].div_ceil(SEGMENT);
        let segments: usize = logits.iter().map(segments_of).sum();
        let offers = Tensor::empty(gpu, [rows, segments, 6], DType::U32, "commit");
        let seed = self.sampler.seed;
        let key = [seed as u32, (seed >> 32) as u32];
        let (mut first, mut skip) = (0, 0);
        for part in logits {
            let params = ChooseParams {
                columns: part.shape()[1] as u32,
                first: first as u32,
                segments: segments as u32,
                skip: skip as u32,
                position: start as u32,
                hole: self.hole,
                key,
                temperature: self.sampler.temperature.min(HOTTEST),
            };
            let grid = [segments_of(part) as u32, rows as u32, 1];
            CHOOSE.with(&[LANES]).run(
                &params,
                &[part, &self.tokens, &self.state],
                &[&offers],
                grid,
            );
            first += part.shape()[1];
            skip += segments_of(part);
        }
        let (quota, threshold) = match quota {
            Quota::Best(n) => (n.clamp(1, 1 << 30), 0.0),
            // Priorities lie in [0, 1].
            Quota::AtLeast(t) => (0, t.clamp(0.0, 2.0)),
        };
        let params = CommitParams {
            rows: rows as u32,
            segments: segments as u32,
            stops: self.stop_count as u32,
            position: start as u32,
            hole: self.hole,
            quota: quota as u32,
            random: u32::from(remasking == Remasking::Random),
            key,
            threshold,
        };
        let records = Tensor::empty(gpu, [rows, RECORD], DType::U32, "commit");
        let writes = [&self.tokens, &self.state, &records];
        COMMIT.with(&[LANES]).run(&params, &[&offers, &self.stops], &writes, [1, 1, 1]);
        let read = gpu.read_later(records.buffer(), 0, (4 * RECORD * rows) as u64);
        Outcome { read, start }
    }
}

impl Outcome {
    /// Waits for the pass, and for no later one. Positions that were not open are left out.
    ///
    /// # Errors
    /// A device fault, or logits that are not finite; then the pass committed nothing.
    pub fn wait(self) -> Result<Vec<Proposal>> {
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&self.read.wait()?);
        let mut proposals = Vec::new();
        for (row, record) in words.chunks_exact(RECORD).enumerate() {
            let position = self.start + row;
            let [token, confidence, priority, status] =
                [record[0], record[1], record[2], record[3]];
            let confidence = f32::from_bits(confidence);
            match status {
                2 => return Err(not_finite(position)),
                _ if f32::from_bits(priority) < 0.0 => {}
                _ => {
                    let committed = status == 1;
                    proposals.push(Proposal { position, token, confidence, committed });
                }
            }
        }
        Ok(proposals)
    }
}
