//! Decoding: token ids in, token ids out, with an event for every step on the way. Block diffusion and one token at a
//! time, one request or many, go through one machine: `sequence.rs` says what a sequence needs next, `decoder.rs` runs
//! it for all of them, `canvas.rs` decides on the device. [`generate`] is the short way for one prompt. Not here: text
//! (the tokenizer's), chat templates.

mod canvas;
mod decoder;
mod options;
mod pool;
#[cfg(any(test, feature = "cases"))]
mod sampler;
mod score;
mod sequence;

use std::ops::ControlFlow;
use std::time::Instant;

pub use canvas::{Canvas, Decided, Decider, Outcome, Proposal, Question, Quota, Row};
pub use decoder::{Decoder, Id, Room, look_ahead};
pub use options::{
    BlockOptions, DEFAULT_THRESHOLD, DecodeOptions, Mode, Order, Request, Sampling, Schedule,
};
#[cfg(any(test, feature = "cases"))]
pub use sampler::{Choice, Sampler};
pub use score::{Difference, bits_per_byte, compare, perplexity, score};

use crate::Result;
use crate::model::Llama;

/// Rows of a prompt that one forward pass takes, which bounds the memory of reading it.
const PREFILL_ROWS: usize = 512;

/// One step of a sequence. Positions count from the first token of the prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// More of the prompt is in the cache.
    Prefilled {
        /// Prompt tokens done so far.
        tokens: usize,
        /// Prompt tokens to do before the first pass.
        total: usize,
    },
    /// What a pass would put into an open position. Block diffusion only; it may change later.
    Proposed {
        /// The open position.
        position: usize,
        /// The proposed token.
        token: u32,
        /// Its probability under the raw logits.
        confidence: f32,
    },
    /// A position got its token, for good.
    Committed {
        /// The position.
        position: usize,
        /// Its token.
        token: u32,
        /// The token's probability under the raw logits of that pass.
        confidence: f32,
        /// The pass, counted from 0 over the session; prefill and commit passes do not count.
        pass: usize,
    },
    /// A block is complete: its part of the answer will not change.
    BlockDone {
        /// First position of the answer in this block.
        start: usize,
        /// One past the last position of the answer in this block; a stop token is not part of it.
        end: usize,
        /// The tokens at `start..end`; empty if the block began with a stop token.
        tokens: Vec<u32>,
        /// Forward passes that this block took, prefill left out.
        forwards: usize,
    },
    /// Nothing comes after this.
    Finished {
        /// Why.
        reason: FinishReason,
    },
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token came.
    Eos,
    /// The answer has its full length.
    Length,
    /// The caller broke off.
    Interrupted,
    /// The model gave no finite logits at this position.
    NotFinite(usize),
}

/// What was done for a sequence so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Forward passes but those that only prefill: the usual NFE.
    pub forwards: usize,
    /// Forward passes that filled positions; the rest of `forwards` are separate commit passes.
    pub passes: usize,
    /// Positions filled.
    pub tokens: usize,
    /// Forward passes that only read the prompt.
    pub prefills: usize,
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The prompt, as given.
    pub prompt_token_ids: Vec<u32>,
    /// The answer without its stop token. After an interruption, what was complete from its start.
    pub token_ids: Vec<u32>,
    /// Forward passes, those left out that only read the prompt.
    pub forwards: usize,
    /// `token_ids` per forward pass; 0 without passes.
    pub tokens_per_forward: f32,
    /// Why the answer ended.
    pub finish_reason: FinishReason,
    /// Wall-clock time, prefill included.
    pub seconds: f64,
}

/// What a request of a [`Decoder`] came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// What was filled, from the first open position to the first that stayed open; without its stop token.
    pub token_ids: Vec<u32>,
    /// The whole text, [T]; open positions hold anything.
    pub tokens: Vec<u32>,
    /// Which positions stayed open, [T].
    pub open: Vec<bool>,
    /// What it took.
    pub counters: Counters,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// Decodes an answer to `prompt` (ids, `[P]`). `on_event` sees every event as soon as its pass is
/// done and may end the decoding with `ControlFlow::Break`.
///
/// # Errors
/// As [`fill`].
pub fn generate(
    llama: &Llama,
    prompt: &[u32],
    options: &DecodeOptions,
    on_event: impl FnMut(&Event) -> ControlFlow<()>,
) -> Result<Generation> {
    let began = Instant::now();
    let answer = fill(llama, Request::answer(llama.config(), prompt, options)?, on_event)?;
    let Answer { token_ids, counters, finish_reason, .. } = answer;
    Ok(Generation {
        prompt_token_ids: prompt.to_vec(),
        tokens_per_forward: token_ids.len() as f32 / counters.forwards.max(1) as f32,
        token_ids,
        forwards: counters.forwards,
        finish_reason,
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// Fills the open positions of one request, by a decoder of its own; as [`generate`] otherwise.
///
/// # Errors
/// [`Error::Request`](crate::Error) if the request does not fit the model, or the model gives no finite logits; a
/// device fault.
pub fn fill(
    llama: &Llama,
    request: Request,
    mut on_event: impl FnMut(&Event) -> ControlFlow<()>,
) -> Result<Answer> {
    let mut decoder = Decoder::for_one(llama, &request);
    let id = decoder.submit(request)?;
    let mut events = Vec::new();
    let mut interrupted = false;
    while !interrupted && !decoder.is_idle() {
        decoder.advance(&mut events)?;
        interrupted = events.drain(..).any(|(_, event)| on_event(&event).is_break());
    }
    let answer = decoder.take(id).expect("the request was not taken before");
    match answer.finish_reason {
        FinishReason::NotFinite(position) => Err(decoder::not_finite(position)),
        _ => Ok(answer),
    }
}
