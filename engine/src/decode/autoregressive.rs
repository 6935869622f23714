//! One token per forward pass under the causal mask: how any Llama model decodes, and what block
//! diffusion is compared with. Same events as `block.rs`; a token is a block of its own. A token is chosen on the
//! device (`canvas.rs`) and the next pass reads it there, so a few passes can be recorded before the first token is
//! known; those behind a stop token change nothing.

use std::collections::VecDeque;

use super::canvas::{Canvas, Outcome, Quota, Wanted};
use super::{Choice, Counters, DecodeOptions, Event, FinishReason, Mode, PREFILL_ROWS, Remasking};
use super::{Sampler, Session, check_request, look_ahead, not_finite};
use crate::model::{KvCache, Llama};
use crate::ops::Mask;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Stands for a token that is not chosen yet; no vocabulary has it.
const OPEN: u32 = u32::MAX;

/// Limits on sampling; both are unused at temperature 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AutoregressiveOptions {
    /// Sample among this many largest logits only; at least 1.
    pub top_k: Option<usize>,
    /// Sample among the fewest tokens that together have this probability, above 0 and at most 1.
    pub top_p: Option<f32>,
}

impl AutoregressiveOptions {
    fn check(&self) -> Result<()> {
        if self.top_k == Some(0) {
            return Err(Error::Request("top_k is 0; it must be at least 1".into()));
        }
        match self.top_p {
            Some(p) if !(p > 0.0 && p <= 1.0) => {
                Err(Error::Request(format!("top_p is {p}; it must be above 0 and at most 1")))
            }
            _ => Ok(()),
        }
    }
}

/// An autoregressive decoding in progress.
pub struct AutoregressiveSession<'a> {
    llama: &'a Llama,
    /// Chooses on the host where `top_k` or `top_p` asks for it: one read-back of all logits a token.
    host_sampler: Option<Sampler>,
    eos_ids: Vec<u32>,
    canvas: Canvas,
    cache: KvCache,
    /// Tokens recorded whose outcomes were not replayed, oldest first.
    recorded: VecDeque<Outcome>,
    /// How many tokens may be recorded at a time.
    look_ahead: usize,
    /// Prompt and answer as far as replayed.
    tokens: Vec<u32>,
    /// Length of the prompt, P.
    prompt: usize,
    /// Length of prompt and full answer.
    total: usize,
    /// Tokens whose keys and values are in the cache.
    cached: usize,
    counters: Counters,
    finished: Option<FinishReason>,
}

impl<'a> AutoregressiveSession<'a> {
    /// Begins a decoding of `prompt` (ids, `[P]`, P ≥ 1) without running anything yet.
    ///
    /// # Errors
    /// [`Error::Request`] if prompt or options do not fit the model, or the mode is another one.
    pub fn new(llama: &'a Llama, prompt: &[u32], options: &DecodeOptions) -> Result<Self> {
        let Mode::Autoregressive(limits) = &options.mode else {
            let why = "an autoregressive session needs options of autoregressive mode";
            return Err(Error::Request(why.into()));
        };
        let total = check_request(llama.config(), prompt, options)?;
        limits.check()?;
        if prompt.is_empty() {
            let why = "the prompt is empty; autoregressive decoding continues at least one token";
            return Err(Error::Request(why.into()));
        }
        let (temperature, seed) = (options.temperature, options.seed);
        let sampler = Sampler { temperature, seed, ..Sampler::greedy() };
        let AutoregressiveOptions { top_k, top_p } = *limits;
        let limited = temperature > 0.0 && (top_k.is_some() || top_p.is_some());
        let mut canvas = prompt.to_vec();
        canvas.resize(total, OPEN);
        Ok(AutoregressiveSession {
            llama,
            host_sampler: limited.then(|| Sampler { top_k, top_p, ..sampler.clone() }),
            canvas: Canvas::new(llama.gpu(), &canvas, OPEN, sampler, &options.eos_ids),
            eos_ids: options.eos_ids.clone(),
            cache: KvCache::new(llama.gpu(), llama.config(), total),
            recorded: VecDeque::new(),
            look_ahead: look_ahead(llama.gpu(), false),
            tokens: prompt.to_vec(),
            prompt: prompt.len(),
            total,
            cached: 0,
            counters: Counters::default(),
            finished: None,
        })
    }

    /// Lets up to `tokens` (at least 1) be recorded before the first of them is known. The answer and the events are
    /// the same; only time differs. See [`look_ahead`] for the default. Without effect under `top_k` and `top_p`.
    pub fn with_look_ahead(mut self, tokens: usize) -> Self {
        self.look_ahead = tokens.max(1);
        self
    }

    /// Runs the tokens from the first uncached one to `end`.
    fn run(&mut self, end: usize) -> Tensor {
        let tokens = self.canvas.rows(self.cached..end);
        let hidden = self.llama.step_on_device(&tokens, self.cached, Mask::Causal, &mut self.cache);
        self.cached = end;
        hidden
    }

    fn prefill(&mut self, events: &mut Vec<Event>) -> Result<()> {
        self.run(self.cached + PREFILL_ROWS);
        // Nothing is read back, but a caller who breaks off should not wait for the whole prompt.
        self.llama.gpu().sync()?;
        self.counters.prefills += 1;
        events.push(Event::Prefilled { tokens: self.cached, total: self.prompt });
        Ok(())
    }

    /// Position of the next token to record.
    fn next(&self) -> usize {
        self.tokens.len() + self.recorded.len()
    }

    /// Logits of the token at `position`, one tensor for each shard of the vocabulary.
    fn logits(&mut self, position: usize) -> Vec<Tensor> {
        let hidden = self.run(position);
        let rows = hidden.shape()[0];
        self.llama.logits_of_rows(&hidden, rows - 1..rows)
    }

    /// The next token and its confidence, chosen on the device.
    fn next_token(&mut self) -> Result<(u32, f32)> {
        while self.recorded.len() < self.look_ahead && self.next() < self.total {
            let position = self.next();
            let first = self.recorded.is_empty();
            let wanted = if first { Wanted::Surely } else { Wanted::WhileGoing };
            let canvas = self.canvas.clone();
            let outcome = canvas.pass_if(wanted, || {
                let logits = self.logits(position);
                canvas.commit(&logits, position, Quota::Best(1), Remasking::LowConfidence)
            });
            self.recorded.push_back(outcome);
        }
        let outcome = self.recorded.pop_front().expect("an unfinished answer has a next token");
        let proposals = outcome.wait()?;
        let only = proposals.first().expect("an unfinished answer has one open position");
        Ok((only.token, only.confidence))
    }

    /// The next token and its confidence, chosen on the host.
    fn next_token_on_host(&mut self, sampler: &Sampler) -> Result<(u32, f32)> {
        let position = self.next();
        let mut logits = Vec::new();
        for part in self.logits(position) {
            logits.extend(part.to_vec()?);
        }
        let choice = sampler.choose(&logits, position, self.counters.passes);
        let Choice { token, confidence } = choice.ok_or_else(|| not_finite(position))?;
        self.canvas.set(position, token);
        Ok((token, confidence))
    }

    /// Tells of a token.
    fn replay(&mut self, token: u32, confidence: f32, events: &mut Vec<Event>) {
        let (position, pass) = (self.tokens.len(), self.counters.passes);
        self.tokens.push(token);
        self.counters.forwards += 1;
        self.counters.passes += 1;
        self.counters.tokens += 1;
        events.push(Event::Committed { position, token, confidence, pass });
        let stopped = self.eos_ids.contains(&token);
        let end = if stopped { position } else { position + 1 };
        let tokens = self.tokens[position..end].to_vec();
        events.push(Event::BlockDone { start: position, end, tokens, forwards: 1 });
        if stopped {
            self.finish(FinishReason::Eos, events);
        } else if self.tokens.len() == self.total {
            self.finish(FinishReason::Length, events);
        }
    }

    fn finish(&mut self, reason: FinishReason, events: &mut Vec<Event>) {
        self.recorded.clear();
        self.finished = Some(reason);
        events.push(Event::Finished { reason });
    }
}

impl Session for AutoregressiveSession<'_> {
    fn advance(&mut self, events: &mut Vec<Event>) -> Result<()> {
        if self.finished.is_some() {
            return Ok(());
        }
        if self.prompt == self.total {
            self.finish(FinishReason::Length, events);
            return Ok(());
        }
        if self.next() - self.cached > PREFILL_ROWS {
            return self.prefill(events);
        }
        let (token, confidence) = match self.host_sampler.clone() {
            Some(sampler) => self.next_token_on_host(&sampler)?,
            None => self.next_token()?,
        };
        self.replay(token, confidence, events);
        Ok(())
    }

    fn finished(&self) -> Option<FinishReason> {
        self.finished
    }

    fn answer(&self) -> &[u32] {
        let stopped = usize::from(self.finished == Some(FinishReason::Eos));
        &self.tokens[self.prompt..self.tokens.len() - stopped]
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}
