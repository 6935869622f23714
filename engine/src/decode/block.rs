//! Block diffusion decoding (arXiv 2601.15892): blocks of B positions are filled left to right;
//! inside a block, a pass proposes a token for every hole and commits the surest ones. Attention is
//! block-causal on absolute positions, prompt included.
//!
//! The cache needs keys and values of the *final* tokens of a block, which only a pass after the
//! last commit can give. Fused, that pass is the first one of the next block: it runs both blocks
//! at once, exactly, because the finished block cannot see the open one. The reference
//! implementation runs it by itself instead (`fused: false`).
//!
//! A pass decides on the device (`canvas.rs`), so the passes of a block, and of the next one, can be recorded before
//! their outcomes are known: up to `look_ahead` of them. The host replays the outcomes in order. A pass that turns out
//! to be one too many, behind a full block or a finished answer, changes nothing and is not counted.
//!
//! Under full attention (LLaDA, arXiv 2502.09992) a token's keys depend on what comes behind it, so nothing can be
//! cached: every pass runs the whole canvas. Under causal attention everything is as above.
//!
//! Where this deviates from the reference implementation: a hole is known by position, so that a
//! mask token in the prompt is an ordinary token; the mask token is never proposed; the threshold
//! schedule runs until the block is full; a block ends as soon as everything up to its stop token
//! is filled.

use std::collections::VecDeque;
use std::ops::Range;

use super::canvas::{Canvas, Outcome, Proposal, Quota, Wanted};
use super::{Counters, DecodeOptions, Event, FinishReason, Mode, PREFILL_ROWS, Sampler, Session};
use super::{check_ids, check_request, look_ahead};
use crate::model::{DiffusionAttention, KvCache, Llama};
use crate::ops::Mask;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// How block diffusion fills a block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockOptions {
    /// Positions in a block, B.
    pub block_length: usize,
    /// The token that stands for an open position.
    pub mask_id: u32,
    /// What a token sees.
    pub attention: DiffusionAttention,
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
    /// Confidence threshold 0.95, fused, block-causal.
    pub fn new(mask_id: u32, block_length: usize) -> Self {
        BlockOptions {
            block_length,
            mask_id,
            attention: DiffusionAttention::Block,
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
    eos_ids: Vec<u32>,
    canvas: Canvas,
    cache: KvCache,
    plan: Plan,
    /// Passes recorded whose outcomes were not replayed, oldest first, each with the start of its block.
    recorded: VecDeque<(usize, Outcome)>,
    /// How many passes may be recorded at a time.
    look_ahead: usize,
    /// Prompt and answer as far as replayed, `[P + max_tokens]`; holes hold the mask token.
    tokens: Vec<u32>,
    /// Which positions are open, `[P + max_tokens]`.
    holes: Vec<bool>,
    /// Length of the prompt, P.
    prompt: usize,
    /// The block being replayed; its first positions may belong to the prompt.
    block: Range<usize>,
    /// Forward passes done when this block was opened.
    forwards_before: usize,
    counters: Counters,
    finished: Option<FinishReason>,
}

/// How far passes are recorded.
struct Plan {
    /// Rows of the cache that hold keys and values of final tokens. The next pass starts here, and overwrites whatever
    /// earlier passes left behind this row.
    clean: usize,
    /// The block that the next pass works on.
    block: Range<usize>,
    /// Passes over this block so far.
    passes: usize,
    /// After this many passes the block is surely full.
    enough: usize,
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
        let sampler =
            Sampler { temperature: options.temperature, seed: options.seed, ..Sampler::greedy() };
        let mut session = BlockSession {
            llama,
            eos_ids: options.eos_ids.clone(),
            canvas: Canvas::new(llama.gpu(), &tokens, block.mask_id, sampler, &options.eos_ids),
            cache: KvCache::new(llama.gpu(), config, total.max(1)),
            plan: Plan { clean: 0, block: 0..0, passes: 0, enough: 0 },
            recorded: VecDeque::new(),
            look_ahead: look_ahead(llama.gpu(), matches!(block.schedule, Schedule::Threshold(_))),
            tokens,
            holes: (0..total).map(|i| i >= prompt.len()).collect(),
            prompt: prompt.len(),
            block: 0..0,
            forwards_before: 0,
            counters: Counters::default(),
            finished: None,
            options: BlockOptions { block_length, ..block.clone() },
        };
        session.block = session.block_from(session.aligned());
        session.plan(session.block.clone());
        Ok(session)
    }

    /// Lets up to `passes` (at least 1) be recorded before the outcome of the first of them is known. The answer and
    /// the events are the same; only time differs. See [`look_ahead`] for the default.
    pub fn with_look_ahead(mut self, passes: usize) -> Self {
        self.look_ahead = passes.max(1);
        self
    }

    /// Prompt tokens in whole blocks; the rest of the prompt begins the first block.
    fn aligned(&self) -> usize {
        self.prompt / self.options.block_length * self.options.block_length
    }

    fn block_from(&self, start: usize) -> Range<usize> {
        start..(start + self.options.block_length).min(self.tokens.len())
    }

    /// Whether keys and values of final tokens are final too.
    fn caches(&self) -> bool {
        self.options.attention != DiffusionAttention::Full
    }

    /// The part of a block that belongs to the answer.
    fn answer_of(&self, block: &Range<usize>) -> Range<usize> {
        block.start.max(self.prompt)..block.end
    }

    /// The next passes work on this block.
    fn plan(&mut self, block: Range<usize>) {
        let n = self.answer_of(&block).len();
        let enough = match self.options.schedule {
            Schedule::Fixed { steps } => steps.min(n),
            Schedule::Threshold(_) => n,
        };
        self.plan = Plan { block, passes: 0, enough, ..self.plan };
    }

    /// Rows of the prompt that the next pass only reads; `None` if the block's passes can begin.
    fn next_prefill(&self) -> Option<Range<usize>> {
        if !self.caches() {
            return None;
        }
        let b = self.options.block_length;
        let most = (PREFILL_ROWS / b).max(1) * b;
        let left = self.aligned().saturating_sub(self.plan.clean);
        // The last rows of the prompt can share the first block's first pass.
        let alone = left > if self.options.fused { most } else { 0 };
        alone.then(|| self.plan.clean..self.plan.clean + left.min(most))
    }

    fn prefill(&mut self, rows: Range<usize>, events: &mut Vec<Event>) -> Result<()> {
        self.run(rows.clone());
        // Nothing is read back, but a caller who breaks off should not wait for the whole prompt.
        self.llama.gpu().sync()?;
        self.plan.clean = rows.end;
        self.counters.prefills += 1;
        events.push(Event::Prefilled { tokens: rows.end, total: self.aligned() });
        Ok(())
    }

    /// Runs the tokens at `rows` behind the cache and returns their hidden states, `[rows, D]`.
    fn run(&mut self, rows: Range<usize>) -> Tensor {
        let mask = match self.options.attention {
            DiffusionAttention::Block => Mask::BlockCausal(self.options.block_length),
            DiffusionAttention::Causal => Mask::Causal,
            DiffusionAttention::Full => Mask::Full,
        };
        let tokens = self.canvas.rows(rows.clone());
        self.llama.step_on_device(&tokens, rows.start, mask, &mut self.cache)
    }

    /// Whether a block's final keys and values are computed by a pass of their own.
    fn seals(&self) -> bool {
        !self.options.fused && self.caches()
    }

    /// Gives the planned block's final keys and values to the cache, where no pass of the next block does.
    fn seal(&mut self) {
        if self.seals() && self.plan.clean < self.plan.block.end {
            self.run(self.plan.block.clone());
            self.plan.clean = self.plan.block.end;
        }
    }

    /// Records one more pass: over the planned block, and over whatever final tokens the cache still lacks before it.
    /// False if nothing is left to record.
    fn record(&mut self) -> bool {
        if self.plan.passes == self.plan.enough {
            if self.plan.block.end == self.tokens.len() {
                return false;
            }
            self.seal();
            self.plan(self.block_from(self.plan.block.end));
        }
        let Plan { clean, ref block, passes, .. } = self.plan;
        let (block, answer) = (block.clone(), self.answer_of(block));
        let quota = match self.options.schedule {
            Schedule::Fixed { steps } => {
                let n = answer.len();
                Quota::Best(n / steps + usize::from(passes < n % steps))
            }
            Schedule::Threshold(t) => Quota::AtLeast(t),
        };
        let wanted = match (self.recorded.is_empty(), passes) {
            (true, _) => Wanted::Surely,
            (false, 0) => Wanted::WhileGoing,
            (false, _) => Wanted::WhileOpen,
        };
        let (llama, remasking) = (self.llama, self.options.remasking);
        let rows = answer.start - clean..answer.end - clean;
        let canvas = self.canvas.clone();
        let outcome = canvas.pass_if(wanted, || {
            let end = if self.caches() { block.end } else { self.tokens.len() };
            let hidden = self.run(clean..end);
            canvas.commit(&llama.logits_of_rows(&hidden, rows), answer.start, quota, remasking)
        });
        self.recorded.push_back((block.start, outcome));
        self.plan.clean = if self.caches() { block.start } else { 0 };
        self.plan.passes += 1;
        true
    }

    /// Tells what a pass did.
    fn replay(&mut self, proposals: &[Proposal], events: &mut Vec<Event>) {
        for &Proposal { position, token, confidence, .. } in proposals {
            events.push(Event::Proposed { position, token, confidence });
        }
        let pass = self.counters.passes;
        for &Proposal { position, token, confidence, .. } in
            proposals.iter().filter(|p| p.committed)
        {
            self.tokens[position] = token;
            self.holes[position] = false;
            self.counters.tokens += 1;
            events.push(Event::Committed { position, token, confidence, pass });
        }
        self.counters.passes += 1;
        self.counters.forwards += 1;
        let end = self.answer_end();
        if !self.holes[self.block.start..end].contains(&true) {
            self.close(end, events);
        }
    }

    /// Where the answer ends inside the open block: at its first stop token, else at the block's
    /// end. Earlier positions are the prompt's, whose stop tokens (a chat turn's end) mean nothing
    /// here.
    fn answer_end(&self) -> usize {
        let is_stop = |i: &usize| !self.holes[*i] && self.eos_ids.contains(&self.tokens[*i]);
        self.answer_of(&self.block).find(is_stop).unwrap_or(self.block.end)
    }

    /// Ends the block whose answer ends at `end`, and opens the next one if there is one.
    fn close(&mut self, end: usize, events: &mut Vec<Event>) {
        let stopped = end < self.block.end;
        // Passes that were recorded for this block and not needed did nothing.
        self.recorded.retain(|(start, _)| *start != self.block.start);
        if self.plan.block == self.block {
            self.plan.enough = self.plan.passes;
            if !stopped {
                self.seal();
            }
        }
        self.counters.forwards += usize::from(self.seals() && !stopped);
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
            self.block = self.block_from(self.block.end);
            self.forwards_before = self.counters.forwards;
        }
    }

    fn finish(&mut self, reason: FinishReason, events: &mut Vec<Event>) {
        self.recorded.clear();
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
        while self.recorded.len() < self.look_ahead && self.record() {}
        let (_, outcome) =
            self.recorded.pop_front().expect("the last block is full when its passes are done");
        let proposals = outcome.wait()?;
        self.replay(&proposals, events);
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
