//! What is asked of a decoding, and what of it is refused.

use crate::model::{DiffusionAttention, LlamaConfig};
use crate::{Error, Result};

/// Confidence from which a token is committed, unless told otherwise.
pub const DEFAULT_THRESHOLD: f32 = 0.95;
/// Stop tokens that a sequence may have.
pub(super) const MOST_STOPS: usize = 16;
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
    /// How a token is drawn.
    pub sampling: Sampling,
    /// Tokens that end the answer, at most 16; they are searched in the answer only, never in the prompt.
    pub eos_ids: Vec<u32>,
}

/// How a token is drawn from a position's logits. Confidence is a matter of the raw logits, whatever is asked here.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token; T > 0 samples from softmax(logits / T).
    pub temperature: f32,
    /// Names the random draws: the same seed gives the same answer.
    pub seed: u64,
    /// Sample among this many largest logits only; at least 1. Without effect at temperature 0, as `top_p`.
    pub top_k: Option<usize>,
    /// Sample among the fewest tokens that together have this probability, above 0 and at most 1, after temperature
    /// and `top_k`. Tokens as likely as the last of them are among them.
    pub top_p: Option<f32>,
    /// Divides the positive logits of tokens that stand in the text, and multiplies the negative ones (arXiv
    /// 1909.05858); 1 leaves them.
    pub repetition_penalty: f32,
    /// Tokens that are never chosen.
    pub forbidden: Vec<u32>,
}

/// The two ways to fill positions.
#[derive(Clone, Debug, PartialEq)]
pub enum Mode {
    /// Whole blocks, several tokens per forward pass.
    Block(BlockOptions),
    /// Left to right, one token per forward pass.
    Autoregressive,
}

/// How diffusion fills a block.
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
    /// Which positions a pass commits first.
    pub order: Order,
    /// Run the commit pass of a block inside the first pass of the next one. The answer is the
    /// same; `false` only serves comparison with other implementations.
    pub fused: bool,
}

/// How many positions a pass commits; at least one in any case. Priorities are those of [`Order`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Schedule {
    /// The holes of a block are split evenly over this many passes, the remainder over the first
    /// ones.
    Fixed {
        /// Passes per block; more than B are the same as B, which is one token per pass.
        steps: usize,
    },
    /// Every position whose priority is at least this (Fast-dLLM, arXiv 2505.22618). 0 commits whole
    /// blocks at once, anything above 1 one token per pass.
    Threshold(f32),
    /// The r-th position if its priority is at least 1 − f / (r + 1), counted from 1 (the same paper).
    Factor(f32),
    /// The positions of least entropy as long as these sum to at most this, in nats; arXiv 2505.24857 bounds the sum
    /// without its largest term. Orders by entropy whatever else is asked.
    EntropyBound(f32),
}

/// What makes a position come before others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The probability of its token.
    Confidence,
    /// The probability of the likeliest token less that of the second.
    Margin,
    /// The entropy of its distribution, negative.
    Entropy,
    /// Nothing: a draw from [0, 1).
    Random,
}

impl Sampling {
    /// The likeliest token.
    pub fn greedy() -> Self {
        Sampling {
            temperature: 0.0,
            seed: 0,
            top_k: None,
            top_p: None,
            repetition_penalty: 1.0,
            forbidden: Vec::new(),
        }
    }

    fn check(&self, vocab_size: usize) -> Result<()> {
        let refuse = |why: String| Err(Error::Request(why));
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            let why = format!("temperature {} is not a finite number from 0 up", self.temperature);
            return refuse(why);
        }
        if self.top_k == Some(0) {
            return refuse("top_k is 0; it must be at least 1".into());
        }
        if let Some(p) = self.top_p.filter(|&p| !(p > 0.0 && p <= 1.0)) {
            return refuse(format!("top_p is {p}; it must be above 0 and at most 1"));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            let penalty = self.repetition_penalty;
            return refuse(format!("repetition_penalty is {penalty}; it must be above 0"));
        }
        check_ids(vocab_size, &self.forbidden)
    }
}

impl BlockOptions {
    /// [`DEFAULT_THRESHOLD`], fused, block-causal.
    pub fn new(mask_id: u32, block_length: usize) -> Self {
        BlockOptions {
            block_length,
            mask_id,
            attention: DiffusionAttention::Block,
            schedule: Schedule::Threshold(DEFAULT_THRESHOLD),
            order: Order::Confidence,
            fused: true,
        }
    }

    pub(super) fn check(&self, vocab_size: usize) -> Result<()> {
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
        let (name, number) = match self.schedule {
            Schedule::Fixed { steps: 0 } => {
                return refuse("0 steps per block fill nothing; give at least 1".into());
            }
            Schedule::Fixed { .. } => return Ok(()),
            Schedule::Threshold(number) => ("threshold", number),
            Schedule::Factor(number) => ("factor", number),
            Schedule::EntropyBound(number) => ("entropy bound", number),
        };
        match number.is_nan() {
            true => refuse(format!("the {name} is not a number")),
            false => Ok(()),
        }
    }
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
            mode: Mode::Autoregressive,
            max_tokens: 256,
            sampling: Sampling::greedy(),
            eos_ids: config.eos_token_ids.clone(),
        }
    }
}

/// Text with open positions, and how to fill them.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Token ids, [T]; what stands at an open position does not matter.
    pub tokens: Vec<u32>,
    /// Which positions are open, [T].
    pub open: Vec<bool>,
    /// How to fill them. `max_tokens` is not looked at.
    pub options: DecodeOptions,
}

impl Request {
    /// An answer of up to `max_tokens` behind a prompt.
    ///
    /// # Errors
    /// If both do not fit the model's positions.
    pub fn answer(
        config: &LlamaConfig,
        prompt: &[u32],
        options: &DecodeOptions,
    ) -> Result<Request> {
        let total = prompt.len().saturating_add(options.max_tokens);
        if total > config.context_length() {
            return Err(Error::Request(format!(
                "a prompt of {} tokens and an answer of {} do not fit the model's {} positions; \
                 shorten the prompt or lower max_tokens",
                prompt.len(),
                options.max_tokens,
                config.context_length()
            )));
        }
        let mut tokens = prompt.to_vec();
        tokens.resize(total, 0);
        let open = (0..total).map(|at| at >= prompt.len()).collect();
        Ok(Request { tokens, open, options: options.clone() })
    }

    /// Refuses what does not fit the model, as a decoder does.
    ///
    /// # Errors
    /// [`Error::Request`], in words.
    pub fn check(&self, config: &LlamaConfig) -> Result<()> {
        let refuse = |why: String| Err(Error::Request(why));
        let DecodeOptions { mode, sampling, eos_ids, .. } = &self.options;
        let vocab_size = config.vocab_size;
        assert_eq!(self.tokens.len(), self.open.len(), "a request says which tokens are open");
        let given: Vec<u32> =
            self.tokens.iter().zip(&self.open).filter(|t| !t.1).map(|t| *t.0).collect();
        check_ids(vocab_size, &given)?;
        if self.tokens.len() > config.context_length() {
            return refuse(format!(
                "{} tokens do not fit the model's {} positions; shorten the text",
                self.tokens.len(),
                config.context_length()
            ));
        }
        sampling.check(vocab_size)?;
        check_ids(vocab_size, eos_ids)?;
        if eos_ids.len() > MOST_STOPS {
            return refuse(format!("{} stop tokens; at most {MOST_STOPS} work", eos_ids.len()));
        }
        let first = self.open.iter().position(|&open| open);
        match mode {
            Mode::Block(block) => block.check(vocab_size),
            Mode::Autoregressive if first == Some(0) => refuse(
                "the prompt is empty; autoregressive decoding continues at least one token".into(),
            ),
            Mode::Autoregressive
                if first.is_some_and(|first| !self.open[first..].iter().all(|&o| o)) =>
            {
                refuse(
                    "autoregressive decoding fills no holes inside a text; use block diffusion"
                        .into(),
                )
            }
            Mode::Autoregressive => Ok(()),
        }
    }
}

/// Refuses ids outside the vocabulary.
pub(super) fn check_ids(vocab_size: usize, tokens: &[u32]) -> Result<()> {
    match tokens.iter().position(|&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(at) => Err(Error::Request(format!(
            "token {} at position {at} is outside the vocabulary of {vocab_size}; was another \
             model's tokenizer used?",
            tokens[at]
        ))),
    }
}
