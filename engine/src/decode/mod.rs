//! Decoding: prompt ids in, answer ids out, with an event for every step on the way. Block
//! diffusion (`block.rs`) and one token at a time (`autoregressive.rs`) go through one entry,
//! [`generate`]. Not here: text (the tokenizer's), chat templates, batches of several prompts.

mod autoregressive;
mod block;
mod canvas;
mod sampler;
mod score;

use std::ops::ControlFlow;
use std::time::Instant;

pub use autoregressive::{AutoregressiveOptions, AutoregressiveSession};
pub use block::{BlockOptions, BlockSession, Remasking, Schedule};
pub use canvas::{Canvas, Outcome, Proposal, Quota};
pub use sampler::{Choice, Sampler};
pub use score::{bits_per_byte, perplexity, score};

use crate::gpu::Gpu;
use crate::model::{DiffusionAttention, Llama, LlamaConfig};
use crate::{Error, Result};

/// Rows of the prompt that one forward pass takes, which bounds the memory of a prefill.
const PREFILL_ROWS: usize = 512;
/// Block length of the published Stable-DiffCoder models, for configurations that name none.
const DEFAULT_BLOCK_LENGTH: usize = 4;
/// The same for models that were not trained on blocks.
const DEFAULT_WITHOUT_BLOCKS: usize = 32;

/// How to decode.
#[derive(Clone, Debug, PartialEq)]
pub struct DecodeOptions {
    /// Block diffusion or one token at a time.
    pub mode: Mode,
    /// Length of the answer in tokens, unless a stop token comes first.
    pub max_tokens: usize,
    /// 0 takes the likeliest token; T > 0 samples from softmax(logits / T).
    pub temperature: f32,
    /// Names the random draws: the same seed gives the same answer.
    pub seed: u64,
    /// Tokens that end the answer; they are searched in the answer only, never in the prompt.
    pub eos_ids: Vec<u32>,
}

/// The two ways to fill positions.
#[derive(Clone, Debug, PartialEq)]
pub enum Mode {
    /// Whole blocks, several tokens per forward pass.
    Block(BlockOptions),
    /// Left to right, one token per forward pass.
    Autoregressive(AutoregressiveOptions),
}

impl DecodeOptions {
    /// Block diffusion for a model with a mask token, one token at a time for one without; greedy,
    /// 256 tokens, stopping at the model's eos tokens.
    pub fn for_model(config: &LlamaConfig) -> Self {
        Self::block(config).unwrap_or_else(|_| Self::autoregressive(config))
    }

    /// Block diffusion with the model's mask token and block length. Without one, 4, or 32 if the model was not
    /// trained on blocks.
    ///
    /// # Errors
    /// If the model names no mask token.
    pub fn block(config: &LlamaConfig) -> Result<Self> {
        let mask_id = config.mask_token_id.ok_or_else(|| {
            Error::Request(
                "the model's configuration names no mask_token_id, which block diffusion needs; \
                 give one, or decode autoregressively"
                    .into(),
            )
        })?;
        let attention = config.diffusion_attention;
        let length = config.block_length.unwrap_or(match attention {
            DiffusionAttention::Block => DEFAULT_BLOCK_LENGTH,
            _ => DEFAULT_WITHOUT_BLOCKS,
        });
        let mode = Mode::Block(BlockOptions { attention, ..BlockOptions::new(mask_id, length) });
        Ok(DecodeOptions { mode, ..Self::autoregressive(config) })
    }

    /// One token at a time.
    pub fn autoregressive(config: &LlamaConfig) -> Self {
        DecodeOptions {
            mode: Mode::Autoregressive(AutoregressiveOptions::default()),
            max_tokens: 256,
            temperature: 0.0,
            seed: 0,
            eos_ids: config.eos_token_ids.clone(),
        }
    }
}

/// One step of a session. Positions count from the first token of the prompt.
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
}

/// What a session has done so far.
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

/// A decoding in progress; each call of `advance` tells of one forward pass (and a commit pass behind
/// it, where that is not fused).
pub trait Session {
    /// Waits for the next pass and appends its events, having recorded the passes behind it as far as the session
    /// looks ahead. Does nothing once finished.
    ///
    /// # Errors
    /// A device fault, or logits that are not finite. The session cannot go on after an error.
    fn advance(&mut self, events: &mut Vec<Event>) -> Result<()>;
    /// Why the session ended, once it has.
    fn finished(&self) -> Option<FinishReason>;
    /// The answer up to its first open position or stop token.
    fn answer(&self) -> &[u32];
    /// What was done so far.
    fn counters(&self) -> Counters;
}

/// Begins a decoding of `prompt` (ids, `[P]`) without running anything yet.
///
/// # Errors
/// [`Error::Request`] if the prompt or the options do not fit the model.
pub fn start<'a>(
    llama: &'a Llama,
    prompt: &[u32],
    options: &DecodeOptions,
) -> Result<Box<dyn Session + 'a>> {
    Ok(match &options.mode {
        Mode::Block(_) => Box::new(BlockSession::new(llama, prompt, options)?),
        Mode::Autoregressive(_) => Box::new(AutoregressiveSession::new(llama, prompt, options)?),
    })
}

/// Decodes an answer to `prompt` (ids, `[P]`). `on_event` sees every event as soon as its pass is
/// done and may end the decoding with `ControlFlow::Break`.
///
/// # Errors
/// [`Error::Request`] if the prompt or the options do not fit the model, or the model gives no
/// finite logits; a device fault.
pub fn generate(
    llama: &Llama,
    prompt: &[u32],
    options: &DecodeOptions,
    mut on_event: impl FnMut(&Event) -> ControlFlow<()>,
) -> Result<Generation> {
    let began = Instant::now();
    let mut session = start(llama, prompt, options)?;
    let mut events = Vec::new();
    let mut interrupted = false;
    while !interrupted && session.finished().is_none() {
        session.advance(&mut events)?;
        interrupted = events.drain(..).any(|event| on_event(&event).is_break());
    }
    let token_ids = session.answer().to_vec();
    let forwards = session.counters().forwards;
    Ok(Generation {
        prompt_token_ids: prompt.to_vec(),
        tokens_per_forward: token_ids.len() as f32 / forwards.max(1) as f32,
        token_ids,
        forwards,
        finish_reason: session.finished().unwrap_or(FinishReason::Interrupted),
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// How many passes a session records before it waits for the first of them, unless told otherwise. With two, a GPU
/// finds its next pass while the host still waits for this one, and never idles. Where `surplus` says that the next
/// pass may turn out to be one too many, the device must be able to skip it. A software adapter computes on the
/// host's own cores: there is no idle time to fill, and deciding what to skip takes time of its own.
pub fn look_ahead(gpu: &Gpu, surplus: bool) -> usize {
    if gpu.adapter().is_software() || (surplus && !gpu.can_skip()) { 1 } else { 2 }
}

/// Refuses prompts and options that fit no mode; returns the length of prompt and answer in tokens.
fn check_request(config: &LlamaConfig, prompt: &[u32], options: &DecodeOptions) -> Result<usize> {
    check_ids(config, prompt)?;
    let total = prompt.len().saturating_add(options.max_tokens);
    if total > config.max_position_embeddings {
        return Err(Error::Request(format!(
            "a prompt of {} tokens and an answer of {} do not fit the model's {} positions; \
             shorten the prompt or lower max_tokens",
            prompt.len(),
            options.max_tokens,
            config.max_position_embeddings
        )));
    }
    if !(options.temperature >= 0.0 && options.temperature.is_finite()) {
        return Err(Error::Request(format!(
            "temperature {} is not a finite number from 0 up",
            options.temperature
        )));
    }
    Ok(total)
}

/// Refuses ids outside the vocabulary.
fn check_ids(config: &LlamaConfig, tokens: &[u32]) -> Result<()> {
    match tokens.iter().position(|&id| id as usize >= config.vocab_size) {
        None => Ok(()),
        Some(at) => Err(Error::Request(format!(
            "token {} at position {at} is outside the vocabulary of {}; was another model's \
             tokenizer used?",
            tokens[at], config.vocab_size
        ))),
    }
}

fn not_finite(position: usize) -> Error {
    Error::Request(format!(
        "the model gave no finite logits at position {position}; its weights are damaged, or their \
         precision is too low for it"
    ))
}
