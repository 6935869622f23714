//! One sequence on its way: which rows the next forward pass has to run for it, and what a pass decided. Blocks of B
//! positions are filled left to right (arXiv 2601.15892); inside a block a pass proposes a token for every open
//! position and commits some. One token at a time is the same with blocks of one, whose logits come from the row
//! before. No device here: rows and outcomes are told by and to `decoder.rs`.
//!
//! The cache needs keys and values of the *final* tokens of a block, which only a pass after the last commit can give.
//! Fused, that pass is the first one of the next block: it runs both blocks at once, exactly, because the finished
//! block cannot see the open one. The reference implementation runs it by itself instead (`fused: false`). Under full
//! attention (LLaDA, arXiv 2502.09992) a token's keys depend on what comes behind it, so nothing can be cached: every
//! pass runs the whole text.
//!
//! Passes may be planned before the outcome of earlier ones is known; those that turn out to be one too many, behind a
//! full block or a finished answer, are skipped by the device and not counted here.
//!
//! Where this deviates from the reference implementation: a hole is known by position, so that a mask token in the
//! prompt is an ordinary token; the mask token is never proposed; the threshold schedule runs until the block is full;
//! a block ends as soon as everything up to its stop token is filled.

use std::ops::Range;

use super::canvas::{Proposal, Quota};
use super::options::{Mode, Request, Schedule};
use super::{Answer, Counters, Event, FinishReason, PREFILL_ROWS};
use crate::model::DiffusionAttention;

/// What a sequence wants of the next pass.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Next {
    /// Only to read these positions, whose tokens are final.
    Read(Range<usize>),
    /// To decide about positions.
    Decide(Work),
    /// Nothing: all its passes are planned.
    Nothing,
}

/// A pass over a block.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Work {
    /// Positions to run.
    pub rows: Range<usize>,
    /// Positions to decide about, in order; some may be filled by then.
    pub decide: Vec<usize>,
    /// How many of these to commit.
    pub quota: Quota,
    /// Start of the block.
    pub block: usize,
    /// True for the first pass over the block.
    pub first: bool,
}

/// See the module's page.
pub(super) struct Sequence {
    /// Positions in a block; every block is at most the whole text.
    block_length: usize,
    /// 1 if a position is decided by the logits of the row before it.
    shift: usize,
    attention: DiffusionAttention,
    schedule: Schedule,
    fused: bool,
    eos_ids: Vec<u32>,
    /// The text as far as it is known.
    tokens: Vec<u32>,
    open: Vec<bool>,
    /// Which positions were open at first.
    asked: Vec<bool>,
    /// How far passes are planned.
    plan: Plan,
    /// The block whose outcomes come next; empty at the end.
    block: Range<usize>,
    /// Forward passes done when this block was opened.
    forwards_before: usize,
    /// Positions from the start on whose keys and values are final in the cache by what was replayed.
    last_final: usize,
    counters: Counters,
    finished: Option<FinishReason>,
}

struct Plan {
    /// Positions whose final keys and values are in the cache, or will be when all planned passes are done. The next
    /// pass starts here, and overwrites whatever earlier passes left behind.
    clean: usize,
    /// The block that the next pass works on; empty when there is none.
    block: Range<usize>,
    /// Its positions that were open.
    decide: Vec<usize>,
    /// Passes over this block so far.
    passes: usize,
    /// After this many passes the block is surely full.
    enough: usize,
    /// End of the last block that was decided from `clean` on.
    decided: usize,
}

impl Sequence {
    /// Begins. `cached` positions, whole blocks of the prompt, are in the cache already.
    pub fn new(request: &Request, cached: usize) -> Sequence {
        let Request { tokens, open, options } = request;
        let total = tokens.len();
        let (block_length, shift, attention, schedule, fused) = match &options.mode {
            Mode::Block(block) => (
                block.block_length.min(total.max(1)),
                0,
                block.attention,
                block.schedule,
                block.fused,
            ),
            Mode::Autoregressive => {
                (1, 1, DiffusionAttention::Causal, Schedule::Fixed { steps: 1 }, true)
            }
        };
        // A block that is as long as the text begins where the text does, as a longer one would.
        let mut sequence = Sequence {
            block_length,
            shift,
            attention,
            schedule,
            fused,
            eos_ids: options.eos_ids.clone(),
            tokens: tokens.clone(),
            open: open.clone(),
            asked: open.clone(),
            plan: Plan {
                clean: cached,
                block: 0..0,
                decide: vec![],
                passes: 0,
                enough: 0,
                decided: 0,
            },
            block: 0..0,
            forwards_before: 0,
            last_final: 0,
            counters: Counters::default(),
            finished: None,
        };
        sequence.block = sequence.block_from(0);
        sequence.plan(sequence.block.clone());
        sequence
    }

    /// Positions that the rows of a sequence may be read in before its first block, which other sequences with the
    /// same beginning can share: whole blocks.
    pub fn prompt(&self) -> usize {
        let shareable = self.given().saturating_sub(self.shift);
        if self.caches() { shareable / self.block_length * self.block_length } else { 0 }
    }

    /// Tokens before the first position that was open.
    pub fn given(&self) -> usize {
        self.asked.iter().position(|&asked| asked).unwrap_or(self.tokens.len())
    }

    /// Tokens in a block as attention knows it.
    pub fn attended_block(&self) -> usize {
        match self.attention {
            DiffusionAttention::Block => self.block_length,
            DiffusionAttention::Causal => 1,
            DiffusionAttention::Full => 0,
        }
    }

    /// The text; open positions hold anything.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Positions from the start on whose keys and values in the cache are final.
    pub fn last_final(&self) -> usize {
        self.last_final
    }

    /// Positions that are final together.
    pub fn granularity(&self) -> usize {
        self.block_length
    }

    pub fn finished(&self) -> Option<FinishReason> {
        self.finished
    }

    /// What it came to.
    pub fn end(&self, finish_reason: FinishReason) -> Answer {
        let start = self.given();
        let ends = |i: &usize| self.open[*i] || self.is_stop(*i);
        let end = (start..self.tokens.len()).find(ends).unwrap_or(self.tokens.len());
        Answer {
            token_ids: self.tokens[start..end].to_vec(),
            tokens: self.tokens.clone(),
            open: self.open.clone(),
            counters: self.counters,
            finish_reason,
        }
    }

    fn is_stop(&self, position: usize) -> bool {
        let filled = self.asked[position] && !self.open[position];
        filled && self.eos_ids.contains(&self.tokens[position])
    }

    /// Whether keys and values of final tokens are final too.
    fn caches(&self) -> bool {
        self.attention != DiffusionAttention::Full
    }

    /// Whether a block's final keys and values are computed by a pass of their own.
    fn seals(&self) -> bool {
        !self.fused && self.caches()
    }

    /// The first block from `start` on with an open position; empty without one.
    fn block_from(&self, start: usize) -> Range<usize> {
        let total = self.tokens.len();
        let Some(first) = (start..total).find(|&at| self.open[at]) else { return total..total };
        let begin = first / self.block_length * self.block_length;
        begin..(begin + self.block_length).min(total)
    }

    /// The next passes work on this block.
    fn plan(&mut self, block: Range<usize>) {
        let decide: Vec<usize> = block.clone().filter(|&at| self.open[at]).collect();
        let enough = match self.schedule {
            Schedule::Fixed { steps } => steps.min(decide.len()),
            _ => decide.len(),
        };
        let Plan { clean, decided, .. } = self.plan;
        self.plan = Plan { clean, block, decide, passes: 0, enough, decided };
    }

    /// Plans one more pass.
    pub fn next(&mut self) -> Next {
        while self.plan.passes == self.plan.enough {
            let block = self.plan.block.clone();
            if block.is_empty() {
                return Next::Nothing;
            }
            if self.seals() && self.plan.clean < block.end {
                let rows = self.plan.clean..block.end;
                self.plan.clean = block.end;
                return Next::Read(rows);
            }
            self.plan(self.block_from(block.end));
        }
        let Plan { clean, ref block, ref decide, passes, .. } = self.plan;
        // What the last block left rides along in this one's first pass, if the two are neighbours.
        let rides = self.plan.decided == block.start;
        let target = block.start.saturating_sub(self.shift);
        if self.caches() && clean < target && !rides {
            let most = (PREFILL_ROWS / self.block_length).max(1) * self.block_length;
            let rows = clean..target.min(clean + most);
            self.plan.clean = rows.end;
            return Next::Read(rows);
        }
        let rows = match self.caches() {
            true => clean..block.end - self.shift,
            false => 0..self.tokens.len(),
        };
        let quota = match self.schedule {
            Schedule::Fixed { steps } => {
                let n = decide.len();
                Quota::Best(n / steps + usize::from(passes < n % steps))
            }
            Schedule::Threshold(least) => Quota::AtLeast(least),
            Schedule::Factor(factor) => Quota::Factor(factor),
            Schedule::EntropyBound(most) => Quota::EntropyBound(most),
        };
        let (decide, start, end) = (decide.clone(), block.start, block.end);
        self.plan.passes += 1;
        if self.caches() {
            (self.plan.clean, self.plan.decided) = (start, if self.seals() { 0 } else { end });
        }
        Next::Decide(Work { rows, decide, quota, block: start, first: passes == 0 })
    }

    /// Tells what a pass did.
    pub fn replay(&mut self, proposals: &[Proposal], events: &mut Vec<Event>) {
        if self.shift == 0 {
            for &Proposal { position, token, confidence, .. } in proposals {
                events.push(Event::Proposed { position, token, confidence });
            }
        }
        if self.caches() {
            self.last_final = self.block.start;
        }
        let pass = self.counters.passes;
        for &Proposal { position, token, confidence, .. } in
            proposals.iter().filter(|p| p.committed)
        {
            self.tokens[position] = token;
            self.open[position] = false;
            self.counters.tokens += 1;
            events.push(Event::Committed { position, token, confidence, pass });
        }
        self.counters.passes += 1;
        self.counters.forwards += 1;
        // The answer ends at its first stop token. The prompt's (a chat turn's end) mean nothing here.
        let stop = self.block.clone().find(|&at| self.is_stop(at));
        let end = stop.unwrap_or(self.block.end);
        if !self.open[self.block.start..end].contains(&true) {
            self.close(end, stop.is_some(), events);
        }
    }

    /// Ends the block whose answer ends at `end`, and opens the next one if there is one.
    fn close(&mut self, end: usize, stopped: bool, events: &mut Vec<Event>) {
        if self.plan.block == self.block {
            // Passes that were planned for this block and not needed did nothing.
            self.plan.enough = self.plan.passes;
        }
        self.counters.forwards += usize::from(self.seals() && !stopped);
        let start = self.block.clone().find(|&at| self.asked[at]).unwrap_or(self.block.start);
        events.push(Event::BlockDone {
            start,
            end,
            tokens: self.tokens[start..end].to_vec(),
            forwards: self.counters.forwards - self.forwards_before,
        });
        let next = self.block_from(self.block.end);
        if stopped {
            self.finish(FinishReason::Eos, events);
        } else if next.is_empty() {
            self.finish(FinishReason::Length, events);
        } else {
            self.block = next;
            self.forwards_before = self.counters.forwards;
        }
    }

    /// Tells that positions were only read.
    pub fn read(&mut self, rows: &Range<usize>, events: &mut Vec<Event>) {
        if self.counters.passes == 0 {
            self.counters.prefills += 1;
            let total = self.block.start.saturating_sub(self.shift);
            events.push(Event::Prefilled { tokens: rows.end, total });
        }
    }

    /// Start of the block whose outcomes come next.
    pub fn block(&self) -> usize {
        self.block.start
    }

    /// Whether nothing is open.
    pub fn is_full(&self) -> bool {
        self.block.is_empty()
    }

    /// What was done so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Ends it.
    pub fn finish(&mut self, reason: FinishReason, events: &mut Vec<Event>) {
        self.plan(self.tokens.len()..self.tokens.len());
        self.finished = Some(reason);
        events.push(Event::Finished { reason });
    }
}
