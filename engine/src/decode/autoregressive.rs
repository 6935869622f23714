//! One token per forward pass under the causal mask: how any Llama model decodes, and what block
//! diffusion is compared with. Same events as `block.rs`; a token is a block of its own.

use super::{Counters, DecodeOptions, Event, FinishReason, Mode, PREFILL_ROWS, Sampler, Session};
use super::{check_request, not_finite};
use crate::model::{KvCache, Llama};
use crate::ops::{self, Mask};
use crate::{Error, Result};

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
    sampler: Sampler,
    eos_ids: Vec<u32>,
    cache: KvCache,
    /// Prompt and answer so far.
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
        Ok(AutoregressiveSession {
            llama,
            sampler: Sampler {
                temperature: options.temperature,
                seed: options.seed,
                top_k: limits.top_k,
                top_p: limits.top_p,
                forbidden: None,
            },
            eos_ids: options.eos_ids.clone(),
            cache: KvCache::new(llama.gpu(), llama.config(), total),
            tokens: prompt.to_vec(),
            prompt: prompt.len(),
            total,
            cached: 0,
            counters: Counters::default(),
            finished: None,
        })
    }

    fn prefill(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let end = self.cached + PREFILL_ROWS;
        let rows = &self.tokens[self.cached..end];
        self.llama.step(rows, self.cached, Mask::Causal, &mut self.cache);
        // Nothing is read back, but a caller who breaks off should not wait for the whole prompt.
        self.llama.gpu().sync()?;
        self.cached = end;
        self.counters.prefills += 1;
        events.push(Event::Prefilled { tokens: end, total: self.prompt });
        Ok(())
    }

    fn next_token(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let rows = &self.tokens[self.cached..];
        let hidden = self.llama.step(rows, self.cached, Mask::Causal, &mut self.cache);
        let logits = self.llama.logits(&ops::rows(&hidden, rows.len() - 1, 1)).to_vec()?;
        let position = self.tokens.len();
        let choice =
            self.sampler.choose(&logits, position, 0).ok_or_else(|| not_finite(position))?;
        let (token, confidence, pass) = (choice.token, choice.confidence, self.counters.passes);
        self.cached = position;
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
        Ok(())
    }

    fn finish(&mut self, reason: FinishReason, events: &mut Vec<Event>) {
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
        if self.tokens.len() - self.cached > PREFILL_ROWS {
            return self.prefill(events);
        }
        self.next_token(events)
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
