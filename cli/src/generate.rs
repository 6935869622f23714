//! `demask generate`: an answer to a prompt, streamed as it is settled.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use demask_engine::decode::{
    self, DecodeOptions, Event, FinishReason, Generation, Mode, Order, Sampling, Schedule,
};
use demask_engine::model::{Llama, LlamaConfig, Tokenizer};
use demask_engine::tune;
use serde_json::json;

use crate::args::{Common, ModelArgs, read_text};
use crate::show::{Live, Stream, answer_text, harmless};
use crate::tune::TuneArgs;
use crate::{interrupt, ui};

const EXAMPLES: &str = "\
Examples:
  demask generate --model DIR --prompt 'def fibonacci(n):'
  demask generate --model DIR --prompt-file main.py --max-tokens 64 --show
  demask generate --model model.gguf --prompt 'Once upon' --temperature 0.8 --seed 7
  echo 'import os' | demask generate --model DIR --prompt-file - --json | jq -r .text

Block diffusion fills a block of tokens in a few forward passes: with --threshold
a pass commits every token the model is that sure of, with --steps a fixed share;
--factor and --entropy-bound are other rules for the same. --order says which
tokens come first.
Autoregressive decoding commits one token per pass. The text goes to stdout, its
speed to stderr.";

/// Tokens of an answer where --max-tokens does not say.
const DEFAULT_TOKENS: usize = 256;

/// Continue a prompt, by block diffusion or one token at a time
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
#[command(group(clap::ArgGroup::new("input").required(true).args(["prompt", "prompt_file"])))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// The text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,

    /// A file with the text to continue, UTF-8; - is stdin
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,

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

    /// Draw the block being unmasked (on a terminal): ░ is open, colours tell the confidence
    #[arg(long, conflicts_with = "json")]
    show: bool,

    #[command(flatten)]
    tune: TuneArgs,

    #[command(flatten)]
    common: Common,
}

/// How to decode.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum ModeArg {
    /// Diffusion if the model's config says that it was trained so, else ar
    Auto,
    /// One token per forward pass
    Ar,
    /// Block by block, several tokens per forward pass
    Diffusion,
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

pub fn run(args: Args) -> Result<ExitCode> {
    interrupt::listen("printing what there is");
    let path = &args.model.model;
    let model = args.model.open()?;
    let tokenizer = Tokenizer::for_model(path, &model.config)?;
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => text.clone(),
        (None, Some(file)) => read_text(file)?,
        (None, None) => crate::usage("generate", "give --prompt or --prompt-file"),
    };
    let ids = tokenizer.encode(&prompt, true)?;
    let options = args.options(&model.config, ids.len())?;
    let gpu = args.common.open_gpu_for(&args.model)?;
    let llama = model.load(&gpu)?;

    let rows = [1, pass_rows(&options), ids.len().clamp(1, 512)];
    let products = tune::products(&llama, &rows, false);
    args.tune.prepare(&gpu, &products, args.common.notices())?;

    let output = match (args.common.output.json, args.show && ui::stdout_is_terminal()) {
        (true, _) => Output::Nothing,
        (false, true) => Output::Live(Duration::ZERO),
        (false, false) => Output::Stream,
    };
    let generation = stream(&llama, &tokenizer, &prompt, &ids, &options, output)?;
    let mode = mode_name(&options.mode);
    if args.common.output.json {
        let Generation { prompt_token_ids, token_ids, forwards, seconds, .. } = &generation;
        let n = token_ids.len() as f64;
        ui::print_json(&json!({
            "prompt_token_ids": prompt_token_ids,
            "token_ids": token_ids,
            "text": answer_text(&tokenizer, &ids, token_ids),
            "tokens_per_second": n / seconds.max(1e-9),
            "tokens_per_forward": n / (*forwards).max(1) as f64,
            "forwards": forwards,
            "seconds": seconds,
            "mode": mode,
            "finish_reason": reason_name(generation.finish_reason),
            "model": path.display().to_string(),
            "adapter": gpu.adapter().describe(),
            "peak_bytes": gpu.memory().peak,
        }))?;
    }
    args.common.notices().say(&summary(&generation, mode));
    Ok(ExitCode::SUCCESS)
}

/// Rows of the passes that fill positions.
fn pass_rows(options: &DecodeOptions) -> usize {
    match &options.mode {
        // With the block before, whose keys are still to be written.
        Mode::Block(block) => 2 * block.block_length,
        Mode::Autoregressive => 1,
    }
}

impl Args {
    fn options(&self, config: &LlamaConfig, prompt: usize) -> Result<DecodeOptions> {
        let diffusion = match self.mode {
            ModeArg::Auto => config.is_diffusion(),
            ModeArg::Ar => false,
            ModeArg::Diffusion => true,
        };
        let mut options = match diffusion {
            true => DecodeOptions::block(config).context("--mode diffusion")?,
            false => DecodeOptions::autoregressive(config),
        };
        let schedules = [
            self.steps.map(|steps| Schedule::Fixed { steps }),
            self.threshold.map(Schedule::Threshold),
            self.factor.map(Schedule::Factor),
            self.entropy_bound.map(Schedule::EntropyBound),
        ];
        let schedule = schedules.into_iter().flatten().next();
        let for_blocks = self.block_length.is_some() || schedule.is_some() || self.order.is_some();
        match &mut options.mode {
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
                "generate",
                "--block-length, --steps, --threshold, --factor, --entropy-bound and --order are \
                 for --mode diffusion, and this model decodes autoregressively unless you say so",
            ),
            Mode::Autoregressive => {}
        }
        let room = config.max_position_embeddings.saturating_sub(prompt).max(1);
        options.max_tokens = self.max_tokens.unwrap_or(DEFAULT_TOKENS.min(room));
        options.sampling = Sampling {
            temperature: self.temperature,
            seed: self.seed,
            top_k: self.top_k,
            top_p: self.top_p,
            repetition_penalty: self.repetition_penalty,
            forbidden: Vec::new(),
        };
        Ok(options)
    }
}

/// Where an answer goes while it comes into being.
pub enum Output {
    /// Nowhere.
    Nothing,
    /// Settled text, to stdout.
    Stream,
    /// Prompt and open block, drawn on the terminal at most this fast per pass.
    Live(Duration),
}

/// Generates and shows the answer; Ctrl-C ends it early. The time excludes waiting for the eye.
pub fn stream(
    llama: &Llama,
    tokenizer: &Tokenizer,
    prompt: &str,
    ids: &[u32],
    options: &DecodeOptions,
    output: Output,
) -> Result<Generation> {
    let mut settled = Stream::new(tokenizer, ids, &options.eos_ids);
    let mut live = None;
    if let Output::Live(pace) = output {
        let (block_length, total) = (block_length(&options.mode), ids.len() + options.max_tokens);
        let prompt = ui::dim_lines(&harmless(prompt));
        ui::print(&prompt)?;
        let line = prompt.rsplit('\n').next().unwrap_or_default();
        live = Some(Live::new(tokenizer, line, block_length, [ids.len(), total], pace));
    }
    let on_terminal = ui::stdout_is_terminal();
    let is_stream = matches!(output, Output::Stream);
    let emit = |text: String| match on_terminal {
        true => ui::print(&harmless(&text)),
        false => ui::print(&text),
    };
    let mut failed = None;
    let mut ends_line = true;
    let mut hear = |event: &Event| -> Result<()> {
        if let Some(live) = &mut live {
            return live.hear(event);
        }
        let text = settled.hear(event);
        if is_stream && !text.is_empty() {
            ends_line = text.ends_with('\n');
            emit(text)?;
        }
        Ok(())
    };
    let mut generation = decode::generate(llama, ids, options, |event| {
        failed = hear(event).err();
        match failed.is_some() || interrupt::asked() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    if let Some(live) = live {
        generation.seconds -= live.waited().as_secs_f64();
        ui::print("\n")?;
    } else if is_stream {
        let rest = settled.finish();
        ends_line &= rest.is_empty();
        emit(rest)?;
        // A shell's prompt should not stick to the answer; a file gets the answer as it is.
        if on_terminal && !ends_line {
            ui::print("\n")?;
        }
    }
    Ok(generation)
}

/// Positions that a mode fills together.
fn block_length(mode: &Mode) -> usize {
    match mode {
        Mode::Block(block) => block.block_length,
        Mode::Autoregressive => 1,
    }
}

fn mode_name(mode: &Mode) -> &'static str {
    match mode {
        Mode::Block(_) => "diffusion",
        Mode::Autoregressive => "ar",
    }
}

fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Eos => "eos",
        FinishReason::Length => "length",
        FinishReason::Interrupted => "interrupted",
        FinishReason::NotFinite(_) => "not_finite",
    }
}

/// One line about an answer and its speed.
pub fn summary(generation: &Generation, mode: &str) -> String {
    let Generation { token_ids, forwards, seconds, finish_reason, .. } = generation;
    let n = token_ids.len() as f64;
    let why = match finish_reason {
        FinishReason::Eos => "ended by the model",
        FinishReason::Length => "full length",
        FinishReason::Interrupted => "interrupted",
        FinishReason::NotFinite(_) => "broken off: the logits are not finite",
    };
    format!(
        "{n} tokens in {}: {} tokens/s, {} per forward pass ({mode}, {forwards} passes; {why})",
        ui::duration(Duration::from_secs_f64(seconds.max(0.0))),
        ui::count(n / seconds.max(1e-9)),
        ui::count(n / (*forwards).max(1) as f64),
    )
}
