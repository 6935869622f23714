//! Block diffusion decoding (arXiv 2601.15892): blocks of B positions are filled left to right;
//! inside a block, a pass proposes a token for every hole and commits the surest ones. Attention is
//! block-causal on absolute positions, prompt included.
//!
//! The cache needs keys and values of the *final* tokens of a block, which only a pass after the
//! last commit can give. Fused, that pass is the first one of the next block: it runs both blocks
//! at once, exactly, because the finished block cannot see the open one. The reference
//! implementation runs it by itself instead (`fused: false`).
//!
//! Where this deviates from the reference implementation: a hole is known by position, so that a
//! mask token in the prompt is an ordinary token; the mask token is never proposed; the threshold
//! schedule runs until the block is full; a block ends as soon as everything up to its stop token
//! is filled.

use std::collections::VecDeque;
use std::ops::Range;

use super::{Counters, DecodeOptions, Event, FinishReason, Mode, PREFILL_ROWS, Sampler, Session};
use super::{check_ids, check_request, not_finite};
use crate::model::{KvCache, Llama};
use crate::ops::{self, Mask};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// How block diffusion fills a block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockOptions {
    /// Positions in a block, B.
    pub block_length: usize,
    /// The token that stands for an open position.
    pub mask_id: u32,
    /// How many positions a pass commits.
    pub schedule: Schedule,
    /// Which positions a pass commits.
    pub remasking: Remasking,
    /// Run the commit pass of a block inside the first pass of the next one. The answer is the
    /// same; `false` only serves comparison with other implementations.
    pub fused: bool,
}

/// How many positions a pass commits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Schedule {
    /// The holes of a block are split evenly over this many passes, the remainder over the first
    /// ones.
    Fixed {
        /// Passes per block; more than B are the same as B, which is one token per pass.
        steps: usize,
    },
    /// The best position, and every other one whose confidence is at least this. 0 commits whole
    /// blocks at once, anything above 1 one token per pass.
    Threshold(f32),
}

/// Which positions a pass commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remasking {
    /// The most probable ones.
    LowConfidence,
    /// Random ones: a draw from [0, 1) stands in for the confidence, in the threshold as well.
    Random,
}

impl BlockOptions {
    /// Confidence threshold 0.95, fused.
    pub fn new(mask_id: u32, block_length: usize) -> Self {
        BlockOptions {
            block_length,
            mask_id,
            schedule: Schedule::Threshold(0.95),
            remasking: Remasking::LowConfidence,
            fused: true,
        }
    }

    fn check(&self, vocab_size: usize) -> Result<()> {
        let refuse = |why: String| Err(Error::Request(why));
        if self.block_length == 0 {
            return refuse("block_length is 0; it must be at least 1".into());
        }
        if self.mask_id as usize >= vocab_size {
            return refuse(format!(
                "mask token {} is outside the vocabulary of {vocab_size}",
                self.mask_id
            ));
        }
        match self.schedule {
            Schedule::Fixed { steps: 0 } => {
                refuse("0 steps per block fill nothing; give at least 1".into())
            }
            Schedule::Threshold(t) if t.is_nan() => refuse("threshold is not a number".into()),
            _ => Ok(()),
        }
    }
}

/// A block-diffusion decoding in progress.
pub struct BlockSession<'a> {
    llama: &'a Llama,
    options: BlockOptions,
    sampler: Sampler,
    eos_ids: Vec<u32>,
    cache: KvCache,
    /// Prompt and answer, `[P + max_tokens]`; holes hold the mask token.
    tokens: Vec<u32>,
    /// Which positions are open, `[P + max_tokens]`.
    holes: Vec<bool>,
    /// Length of the prompt, P.
    prompt: usize,
    /// Rows of the cache that hold keys and values of final tokens. The next pass starts here, and
    /// overwrites whatever earlier passes left behind this row.
    clean: usize,
    /// The block being filled; its first positions may belong to the prompt.
    block: Range<usize>,
    /// Forward passes done when this block was opened.
    forwards_before: usize,
    /// How many positions each of the coming passes commits (fixed schedule only).
    quotas: VecDeque<usize>,
    counters: Counters,
    finished: Option<FinishReason>,
}

/// What a pass proposes for one hole.
struct Candidate {
    position: usize,
    token: u32,
    confidence: f32,
    /// What decides about the commit: the confidence, or a random number.
    priority: f32,
}

impl<'a> BlockSession<'a> {
    /// Begins a decoding of `prompt` (ids, `[P]`, may be empty) without running anything yet.
    ///
    /// # Errors
    /// [`Error::Request`] if prompt or options do not fit the model, or the mode is another one.
    pub fn new(llama: &'a Llama, prompt: &[u32], options: &DecodeOptions) -> Result<Self> {
        let Mode::Block(block) = &options.mode else {
            return Err(Error::Request("a block session needs options of block mode".into()));
        };
        let config = llama.config();
        let total = check_request(config, prompt, options)?;
        check_ids(config, &options.eos_ids)?;
        block.check(config.vocab_size)?;
        // A block longer than any sequence is the whole sequence.
        let block_length = block.block_length.min(config.max_position_embeddings);
        let mut tokens = prompt.to_vec();
        tokens.resize(total, block.mask_id);
        let mut session = BlockSession {
            llama,
            sampler: Sampler {
                temperature: options.temperature,
                seed: options.seed,
                forbidden: Some(block.mask_id),
                ..Sampler::greedy()
            },
            eos_ids: options.eos_ids.clone(),
            cache: KvCache::new(llama.gpu(), config, total.max(1)),
            tokens,
            holes: (0..total).map(|i| i >= prompt.len()).collect(),
            prompt: prompt.len(),
            clean: 0,
            block: 0..0,
            forwards_before: 0,
            quotas: VecDeque::new(),
            counters: Counters::default(),
            finished: None,
            options: BlockOptions { block_length, ..block.clone() },
        };
        session.open(session.aligned());
        Ok(session)
    }

    /// Prompt tokens in whole blocks; the rest of the prompt begins the first block.
    fn aligned(&self) -> usize {
        self.prompt / self.options.block_length * self.options.block_length
    }

    fn mask(&self) -> Mask {
        Mask::BlockCausal(self.options.block_length)
    }

    fn open(&mut self, start: usize) {
        let end = (start + self.options.block_length).min(self.tokens.len());
        self.block = start..end;
        self.forwards_before = self.counters.forwards;
        if let Schedule::Fixed { steps } = self.options.schedule {
            let n = self.holes[start..end].iter().filter(|&&hole| hole).count();
            let quota = |step: usize| n / steps + usize::from(step < n % steps);
            self.quotas = (0..steps.min(n)).map(quota).collect();
        }
    }

    /// Rows of the prompt that the next pass only reads; `None` if the block's passes can begin.
    fn next_prefill(&self) -> Option<Range<usize>> {
        let b = self.options.block_length;
        let most = (PREFILL_ROWS / b).max(1) * b;
        let left = self.aligned().saturating_sub(self.clean);
        // The last rows of the prompt can share the first block's first pass.
        let alone = left > if self.options.fused { most } else { 0 };
        alone.then(|| self.clean..self.clean + left.min(most))
    }

    fn prefill(&mut self, rows: Range<usize>, events: &mut Vec<Event>) -> Result<()> {
        self.run(rows.clone());
        // Nothing is read back, but a caller who breaks off should not wait for the whole prompt.
        self.llama.gpu().sync()?;
        self.clean = rows.end;
        self.counters.prefills += 1;
        events.push(Event::Prefilled { tokens: rows.end, total: self.aligned() });
        Ok(())
    }

    /// Runs the tokens at `rows` behind the cache and returns their hidden states, `[rows, D]`.
    fn run(&mut self, rows: Range<usize>) -> Tensor {
        let mask = self.mask();
        self.llama.step(&self.tokens[rows.clone()], rows.start, mask, &mut self.cache)
    }

    /// One pass over the open block, and over whatever final tokens the cache still lacks before
    /// it.
    fn denoise(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let first = self.clean;
        let hidden = self.run(first..self.block.end);
        self.clean = self.block.start;
        let mut candidates = self.candidates(&hidden, first)?;
        for c in &candidates {
            let Candidate { position, token, confidence, .. } = *c;
            events.push(Event::Proposed { position, token, confidence });
        }
        // The sort is stable: among equals the leftmost comes first.
        candidates.sort_by(|a, b| b.priority.total_cmp(&a.priority));
        candidates.truncate(self.quota(&candidates));
        candidates.sort_by_key(|c| c.position);
        for Candidate { position, token, confidence, .. } in candidates {
            self.tokens[position] = token;
            self.holes[position] = false;
            self.counters.tokens += 1;
            let pass = self.counters.passes;
            events.push(Event::Committed { position, token, confidence, pass });
        }
        self.counters.passes += 1;
        self.counters.forwards += 1;
        Ok(())
    }

    /// A candidate for each hole of the block, left to right; `first` is the position of row 0 of
    /// `hidden`. The one read-back of a pass.
    fn candidates(&self, hidden: &Tensor, first: usize) -> Result<Vec<Candidate>> {
        let holes: Vec<usize> = self.block.clone().filter(|&i| self.holes[i]).collect();
        let (Some(&start), Some(&last)) = (holes.first(), holes.last()) else {
            return Ok(Vec::new());
        };
        let rows = ops::rows(hidden, start - first, last + 1 - start);
        let logits = self.llama.logits(&rows).to_vec()?;
        let v = self.llama.config().vocab_size;
        let pass = self.counters.passes;
        let candidate = |position: usize| {
            let row = &logits[(position - start) * v..][..v];
            let choice =
                self.sampler.choose(row, position, pass).ok_or_else(|| not_finite(position))?;
            let priority = match self.options.remasking {
                Remasking::LowConfidence => choice.confidence,
                Remasking::Random => self.sampler.order(position, pass),
            };
            let (token, confidence) = (choice.token, choice.confidence);
            Ok(Candidate { position, token, confidence, priority })
        };
        holes.into_iter().map(candidate).collect()
    }

    /// How many of the candidates, best first, this pass commits: at least one.
    fn quota(&mut self, candidates: &[Candidate]) -> usize {
        match self.options.schedule {
            Schedule::Fixed { .. } => self.quotas.pop_front().unwrap_or(candidates.len()),
            Schedule::Threshold(t) => {
                candidates.iter().take_while(|c| c.priority >= t).count().max(1)
            }
        }
    }

    /// Where the answer ends inside the open block: at its first stop token, else at the block's
    /// end. Earlier positions are the prompt's, whose stop tokens (a chat turn's end) mean nothing
    /// here.
    fn answer_end(&self) -> usize {
        let is_stop = |i: &usize| !self.holes[*i] && self.eos_ids.contains(&self.tokens[*i]);
        let mut answer = self.block.start.max(self.prompt)..self.block.end;
        answer.find(is_stop).unwrap_or(self.block.end)
    }

    /// Ends the block whose answer ends at `end`, and opens the next one if there is one.
    fn close(&mut self, end: usize, events: &mut Vec<Event>) {
        let stopped = end < self.block.end;
        if !self.options.fused && !stopped {
            self.run(self.block.clone());
            self.clean = self.block.end;
            self.counters.forwards += 1;
        }
        let start = self.block.start.max(self.prompt);
        events.push(Event::BlockDone {
            start,
            end,
            tokens: self.tokens[start..end].to_vec(),
            forwards: self.counters.forwards - self.forwards_before,
        });
        if stopped {
            self.finish(FinishReason::Eos, events);
        } else if self.block.end == self.tokens.len() {
            self.finish(FinishReason::Length, events);
        } else {
            self.open(self.block.end);
        }
    }

    fn finish(&mut self, reason: FinishReason, events: &mut Vec<Event>) {
        self.finished = Some(reason);
        events.push(Event::Finished { reason });
    }
}

impl Session for BlockSession<'_> {
    fn advance(&mut self, events: &mut Vec<Event>) -> Result<()> {
        if self.finished.is_some() {
            return Ok(());
        }
        if self.prompt == self.tokens.len() {
            self.finish(FinishReason::Length, events);
            return Ok(());
        }
        if let Some(rows) = self.next_prefill() {
            return self.prefill(rows, events);
        }
        self.denoise(events)?;
        let end = self.answer_end();
        if !self.holes[self.block.start..end].contains(&true) {
            self.close(end, events);
        }
        Ok(())
    }

    fn finished(&self) -> Option<FinishReason> {
        self.finished
    }

    fn answer(&self) -> &[u32] {
        let ends = |i: &usize| self.holes[*i] || self.eos_ids.contains(&self.tokens[*i]);
        let end = (self.prompt..self.tokens.len()).find(ends).unwrap_or(self.tokens.len());
        &self.tokens[self.prompt..end]
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}
