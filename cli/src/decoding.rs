//! Options about how tokens are chosen, which all commands that decode share.

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use demask_engine::decode::{DecodeOptions, FinishReason, Mode, Order, Sampling, Schedule};
use demask_engine::model::{LlamaConfig, Tokenizer};

/// Tokens of an answer where --max-tokens does not say.
const DEFAULT_TOKENS: usize = 256;

/// How tokens are chosen.
#[derive(Args)]
pub struct DecodingArgs {
    /// Longest answer in tokens [default: 256, or what the model's context leaves]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,

    /// 0 takes the likeliest token; above 0 samples, 1 from the model's own distribution
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,

    /// Names the random draws: the same seed gives the same answer
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Sample among the N likeliest tokens only
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,

    /// Sample among the fewest tokens that together have this probability
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,

    /// Makes tokens that stand in the text already less likely, above 1
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repetition_penalty: f32,

    /// How to decode
    #[arg(long, value_enum, default_value = "auto")]
    mode: ModeArg,

    /// Diffusion: tokens of a block [default: what the model was trained with]
    #[arg(long, value_name = "N", help_heading = "Block diffusion")]
    block_length: Option<usize>,

    /// Diffusion: fill each block in this many forward passes
    #[arg(long, value_name = "N", help_heading = "Block diffusion", group = "schedule")]
    steps: Option<usize>,

    /// Diffusion: each pass commits the tokens whose probability is at least this, and always the
    /// best one [default: 0.95]
    #[arg(long, value_name = "P", help_heading = "Block diffusion", group = "schedule")]
    threshold: Option<f32>,

    /// Diffusion: each pass commits the r-th surest token if its probability is at least
    /// 1 - F / (r + 1), and always the best one
    #[arg(long, value_name = "F", help_heading = "Block diffusion", group = "schedule")]
    factor: Option<f32>,

    /// Diffusion: each pass commits the tokens of least entropy as long as these sum to at most H
    /// nats, and always the best one
    #[arg(long, value_name = "H", help_heading = "Block diffusion", group = "schedule")]
    entropy_bound: Option<f32>,

    /// Diffusion: which tokens a pass commits first [default: confidence]
    #[arg(long, value_enum, help_heading = "Block diffusion")]
    order: Option<OrderArg>,
}

/// How to decode.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum ModeArg {
    /// Diffusion if the model's config says that it was trained so, else ar
    Auto,
    /// One token per forward pass
    Ar,
    /// Block by block, several tokens per forward pass
    Diffusion,
}

impl ModeArg {
    /// The mode, as the model would have it.
    pub fn mode(self, config: &LlamaConfig) -> Result<Mode> {
        let diffusion = match self {
            ModeArg::Auto => config.is_diffusion(),
            ModeArg::Ar => false,
            ModeArg::Diffusion => true,
        };
        Ok(match diffusion {
            true => DecodeOptions::block(config).context("--mode diffusion")?.mode,
            false => Mode::Autoregressive,
        })
    }
}

/// Which tokens come first.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum OrderArg {
    /// Those of the highest probability
    Confidence,
    /// Those with the largest lead over the second likeliest
    Margin,
    /// Those of least entropy
    Entropy,
    /// Any
    Random,
}

/// Rows of the passes that fill positions.
pub fn pass_rows(options: &DecodeOptions) -> usize {
    match &options.mode {
        // With the block before, whose keys are still to be written.
        Mode::Block(block) => 2 * block.block_length,
        Mode::Autoregressive => 1,
    }
}

impl DecodingArgs {
    /// How the model's texts are read: as [`DecodingArgs::options`] has it.
    pub fn mode(&self, command: &str, config: &LlamaConfig) -> Result<Mode> {
        let mut mode = self.mode.mode(config)?;
        let schedules = [
            self.steps.map(|steps| Schedule::Fixed { steps }),
            self.threshold.map(Schedule::Threshold),
            self.factor.map(Schedule::Factor),
            self.entropy_bound.map(Schedule::EntropyBound),
        ];
        let schedule = schedules.into_iter().flatten().next();
        let for_blocks = self.block_length.is_some() || schedule.is_some() || self.order.is_some();
        match &mut mode {
            Mode::Block(block) => {
                block.block_length = self.block_length.unwrap_or(block.block_length);
                block.schedule = schedule.unwrap_or(block.schedule);
                block.order = match self.order {
                    None | Some(OrderArg::Confidence) => Order::Confidence,
                    Some(OrderArg::Margin) => Order::Margin,
                    Some(OrderArg::Entropy) => Order::Entropy,
                    Some(OrderArg::Random) => Order::Random,
                };
            }
            Mode::Autoregressive if for_blocks => crate::usage(
                command,
                "--block-length, --steps, --threshold, --factor, --entropy-bound and --order are \
                 for --mode diffusion, and this model decodes autoregressively unless you say so",
            ),
            Mode::Autoregressive => {}
        }
        Ok(mode)
    }

    /// The options of an answer to a prompt of so many tokens; `command` is named where they make no sense.
    pub fn options(
        &self,
        command: &str,
        config: &LlamaConfig,
        prompt: usize,
    ) -> Result<DecodeOptions> {
        let room = config.context_length().saturating_sub(prompt).max(1);
        Ok(DecodeOptions {
            mode: self.mode(command, config)?,
            max_tokens: self.max_tokens.unwrap_or(DEFAULT_TOKENS.min(room)),
            sampling: Sampling {
                temperature: self.temperature,
                seed: self.seed,
                top_k: self.top_k,
                top_p: self.top_p,
                repetition_penalty: self.repetition_penalty,
                forbidden: Vec::new(),
            },
            ..DecodeOptions::autoregressive(config)
        })
    }
}

/// What to say of an answer that may run past its end: that no token ends one, or, where a model is `told` something by
/// its chat template, that the token which ends a turn there is none of those that end an answer. So it is in
/// transformers, too.
pub fn endless(tokenizer: &Tokenizer, config: &LlamaConfig, told: bool) -> Result<Option<String>> {
    let ends = &config.eos_token_ids;
    let name = |id: u32| tokenizer.id_to_token(id).unwrap_or_else(|| id.to_string());
    if ends.is_empty() {
        return Ok(Some(
            "the model's files name no token that ends an answer (eos_token_id of generation_config.json, or without \
             that file of config.json): only --max-tokens will"
                .into(),
        ));
    }
    let turn = if told { tokenizer.end_of_turn()? } else { None };
    Ok(turn.filter(|id| !ends.contains(id)).map(|id| {
        let ends: Vec<String> = ends.iter().map(|&id| name(id)).collect();
        format!(
            "the chat template ends a turn with {}, but the model's files name {} alone as the end: the answer may run on",
            name(id),
            ends.join(", ")
        )
    }))
}

/// Positions that a mode fills together.
pub fn block_length(mode: &Mode) -> usize {
    match mode {
        Mode::Block(block) => block.block_length,
        Mode::Autoregressive => 1,
    }
}

/// Its name in `--mode`.
pub fn mode_name(mode: &Mode) -> &'static str {
    match mode {
        Mode::Block(_) => "diffusion",
        Mode::Autoregressive => "ar",
    }
}

/// Its name in JSON.
pub fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Eos => "eos",
        FinishReason::Length => "length",
        FinishReason::Interrupted => "interrupted",
        FinishReason::NotFinite(_) => "not_finite",
    }
}
