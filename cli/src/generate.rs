//! `demask generate`: an answer to a prompt, streamed as it is settled.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use demask_engine::decode::{self, DecodeOptions, Event, FinishReason, Generation, Request};
use demask_engine::model::{Llama, Tokenizer};
use demask_engine::tune;
use serde_json::{Value, json};

use crate::args::{Common, ModelArgs, read_text};
use crate::chat::{ChatArgs, user_message};
use crate::decoding::{DecodingArgs, block_length, endless, mode_name, pass_rows, reason_name};
use crate::show::{Live, Stream, answer_text, harmless};
use crate::steps::{Steps, StepsArgs};
use crate::tune::TuneArgs;
use crate::{interrupt, ui};

const EXAMPLES: &str = "\
Examples:
  demask generate --model DIR --prompt 'def fibonacci(n):'
  demask generate --model DIR --prompt-file main.py --max-tokens 64 --show
  demask generate --model model.gguf --prompt 'Once upon' --temperature 0.8 --seed 7
  demask generate --model DIR --chat --prompt 'Write a function that adds two numbers.'
  demask generate --model DIR --chat --prompt 'What is 2 + 3?' --chat-arg enable_thinking=false
  demask generate --model DIR --prompt 'class Stack:' --trace steps.html --explain-steps
  echo 'import os' | demask generate --model DIR --prompt-file - --json | jq -r .text

Block diffusion fills a block of tokens in a few forward passes: with --threshold
a pass commits every token the model is that sure of, with --steps a fixed share;
--factor and --entropy-bound are other rules for the same. --order says which
tokens come first.
Autoregressive decoding commits one token per pass. The text goes to stdout, its
speed to stderr.";

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

    /// Answer the text as a user's message, by the model's chat template, instead of continuing it
    #[arg(long)]
    chat: bool,

    #[command(flatten)]
    chat_args: ChatArgs,

    #[command(flatten)]
    decoding: DecodingArgs,

    /// Draw the block being unmasked (on a terminal): ░ is open, colours tell the confidence
    #[arg(long, conflicts_with = "json")]
    show: bool,

    #[command(flatten)]
    steps: StepsArgs,

    #[command(flatten)]
    tune: TuneArgs,

    #[command(flatten)]
    common: Common,
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
    let ids = match args.chat {
        true => user_message(&tokenizer, &prompt, &args.chat_args)
            .with_context(|| format!("--chat with {}", path.display()))?,
        false => tokenizer.encode(&prompt, true)?,
    };
    let options = args.decoding.options("generate", &model.config, ids.len())?;
    if let Some(warning) = endless(&tokenizer, &model.config, args.chat)? {
        args.common.notices().say(&warning);
    }
    let gpu = args.common.open_gpu_for(&args.model)?;
    let llama = model.load(&gpu, args.common.notices())?;

    let rows = [1, pass_rows(&options), ids.len().clamp(1, 512)];
    let products = tune::products(&llama, &rows, false);
    args.tune.recall(&gpu, &products, args.common.notices())?;

    let output = Output::of(args.common.output.json, args.show);
    let request = Request::answer(&model.config, &ids, &options)?;
    let mut steps = args.steps.wanted().then(|| Steps::new(&tokenizer, &request));
    let shown = if args.chat { prompt + "\n" } else { prompt };
    let generation = stream(&llama, &tokenizer, &shown, &ids, &options, output, steps.as_mut())?;
    let mode = mode_name(&options.mode);
    let notices = args.common.notices();
    let facts = [path.display().to_string(), gpu.adapter().describe(), summary(&generation, mode)];
    let told = match &steps {
        Some(steps) => args.steps.tell(steps, &facts, notices)?,
        None => None,
    };
    if args.common.output.json {
        let mut answer = as_json(&tokenizer, &generation, mode);
        answer["model"] = json!(path.display().to_string());
        answer["adapter"] = json!(gpu.adapter().describe());
        answer["peak_bytes"] = json!(gpu.memory().peak);
        if let Some(told) = told {
            answer["steps"] = told;
        }
        ui::print_json(&answer)?;
    }
    notices.say(&summary(&generation, mode));
    Ok(ExitCode::SUCCESS)
}

/// An answer for programs.
pub fn as_json(tokenizer: &Tokenizer, generation: &Generation, mode: &str) -> Value {
    let Generation { prompt_token_ids, token_ids, forwards, seconds, finish_reason, .. } =
        generation;
    let n = token_ids.len() as f64;
    json!({
        "prompt_token_ids": prompt_token_ids,
        "token_ids": token_ids,
        "text": answer_text(tokenizer, prompt_token_ids, token_ids),
        "tokens_per_second": n / seconds.max(1e-9),
        "tokens_per_forward": n / (*forwards).max(1) as f64,
        "forwards": forwards,
        "seconds": seconds,
        "mode": mode,
        "finish_reason": reason_name(*finish_reason),
    })
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

impl Output {
    /// As the options and the terminal have it.
    pub fn of(json: bool, show: bool) -> Output {
        match (json, show && ui::stdout_is_terminal()) {
            (true, _) => Output::Nothing,
            (false, true) => Output::Live(Duration::ZERO),
            (false, false) => Output::Stream,
        }
    }
}

/// Generates and shows the answer; Ctrl-C ends it early. The time excludes waiting for the eye.
pub fn stream(
    llama: &Llama,
    tokenizer: &Tokenizer,
    prompt: &str,
    ids: &[u32],
    options: &DecodeOptions,
    output: Output,
    mut steps: Option<&mut Steps>,
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
        if let Some(steps) = &mut steps {
            steps.hear(event);
        }
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
