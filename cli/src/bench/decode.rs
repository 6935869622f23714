//! `demask bench decode`: how fast a model decodes on this device, and what bounds it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use demask_benches::decode::{self, Answer, Decoding, Pass};
use demask_benches::measure;
use demask_benches::record::Limits;
use demask_engine::decode::{DEFAULT_THRESHOLD, DecodeOptions, Mode, Request, Schedule};
use demask_engine::model::{DiffusionAttention, LlamaConfig, Tokenizer, hub};
use demask_engine::tune;
use serde_json::json;

use super::Progress;
use crate::args::{Common, ModelArgs, read_text};
use crate::decoding::ModeArg;
use crate::sources::PYTHON;
use crate::tune::TuneArgs;
use crate::{interrupt, ui};

const EXAMPLES: &str = "\
Examples:
  demask bench decode --model DIR
  demask bench decode --model DIR --threshold 0.95 --threshold 0.8 --steps 2
  demask bench decode --model model.gguf --tokens 4096 --rounds 1 --json > speed.json
  demask bench decode --model 8b.gguf --tokens 0 --depths 64,4096

First the time of a forward pass, by its rows (one token; the tokens of a block, 4
for a model without blocks; these with the block before, as the first pass over a
block has them) and by the tokens before it. Then whole answers, in turn: one token
at a time, which a model of the same size takes whatever it was trained for, and for
a diffusion model each --threshold and --steps. Stop tokens are forbidden, so that
all answers have the same length; how many tokens a pass settles depends on model
and prompt. Tokens a second are the median's, milliseconds a token the fastest's.";

/// Tokens per second of a model: by rows, by length, by mode
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// Tokens of an answer; 0 measures passes only
    #[arg(long, value_name = "N", default_value_t = 256)]
    tokens: usize,

    /// A file whose beginning is the prompt, UTF-8 [default: a few lines of Python, or any tokens of
    /// a model without a tokenizer]
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Tokens that are taken of it
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,

    /// Tokens before a pass, in whole blocks; those that the context has no room for are left out
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "64,512,4096")]
    depths: Vec<usize>,

    /// Block diffusion that commits what is at least this probable; may be given again [default: 0.95]
    #[arg(long, value_name = "P")]
    threshold: Vec<f32>,

    /// Block diffusion in so many passes a block; may be given again
    #[arg(long, value_name = "N")]
    steps: Vec<usize>,

    /// Times that each answer is given
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,

    #[command(flatten)]
    tune: TuneArgs,

    #[command(flatten)]
    common: Common,
}

pub fn run(args: Args) -> Result<ExitCode> {
    interrupt::listen("nothing is written");
    let notices = args.common.notices();
    let model = args.model.open()?;
    let config = &model.config;
    let prompt = args.prompt(config)?;
    let answers = args.answers(config, &prompt)?;
    let block = match DecodeOptions::block(config).map(|options| options.mode) {
        Ok(Mode::Block(block)) => block.block_length,
        _ => 4,
    };
    let room = config.context_length();
    let fits = |depth: &usize| depth.checked_add(block).is_some_and(|end| end <= room);
    let depths = args.depths.iter().map(|depth| depth / block * block).filter(fits);
    let depths: Vec<usize> = match config.diffusion_attention {
        // Each of its passes reads the whole text: no pass is like these.
        DiffusionAttention::Full => Vec::new(),
        _ => depths.collect(),
    };
    ensure!(
        !depths.is_empty() || config.diffusion_attention == DiffusionAttention::Full,
        "--depths: the model has a context of {room} tokens; name fewer tokens than that"
    );
    let gpu = args.common.open_gpu_for(&args.model)?;
    let llama = model.load(&gpu, notices)?;
    let rows = [1, block, 2 * block, prompt.len().clamp(1, 512)];
    args.tune.prepare(&gpu, &tune::products(&llama, &rows, false), notices)?;
    let mut limits = measure::limits(&gpu)?;
    let options = decode::Options { block, depths, answers, rounds: usize::from(args.rounds) };
    let mut progress = Progress::new(notices);
    let done = decode::run(&llama, &options, &mut |what, share| progress.step(what, share))?;
    drop(progress);
    let Some(done) = done else { bail!("interrupted; nothing was written") };
    // Again, because a limit that another program took part of is none.
    let after = measure::limits(&gpu)?;
    limits.gflops = limits.gflops.max(after.gflops);
    limits.gbytes = limits.gbytes.max(after.gbytes);
    if args.common.output.json {
        let mut told = serde_json::to_value(&done)?;
        told["model"] = json!(args.model.model.display().to_string());
        told["adapter"] = json!(gpu.adapter().describe());
        told["parameters"] = json!(config.num_parameters());
        told["limits"] = serde_json::to_value(limits)?;
        told["prompt_tokens"] = json!(prompt.len());
        ui::print_json(&told)?;
    } else {
        ui::print(&passes(&done.passes, limits))?;
        ui::print(&answers_table(&done, prompt.len()))?;
    }
    notices.say(&format!(
        "{} on {}, {} of device memory",
        args.model.model.display(),
        gpu.adapter().describe(),
        ui::bytes(done.peak_bytes)
    ));
    Ok(ExitCode::SUCCESS)
}

impl Args {
    /// The answers to time; nothing where only passes are wanted.
    fn answers(&self, config: &LlamaConfig, prompt: &[u32]) -> Result<Vec<(String, Request)>> {
        let diffusion = ModeArg::Auto.mode(config)? != Mode::Autoregressive;
        let schedules = !(self.threshold.is_empty() && self.steps.is_empty());
        if schedules && !diffusion {
            crate::usage("bench", "--threshold and --steps are for block-diffusion models");
        }
        let one =
            DecodeOptions { max_tokens: self.tokens, ..DecodeOptions::autoregressive(config) };
        let mut all = vec![("one token at a time".to_owned(), one)];
        let thresholds: &[f32] = match schedules || !diffusion {
            true => &self.threshold,
            false => &[DEFAULT_THRESHOLD],
        };
        let by_threshold =
            thresholds.iter().map(|&p| (format!("threshold {p}"), Schedule::Threshold(p)));
        let by_steps = self.steps.iter();
        let by_steps =
            by_steps.map(|&steps| (format!("{steps} steps a block"), Schedule::Fixed { steps }));
        for (name, schedule) in by_threshold.chain(by_steps) {
            let mut options = DecodeOptions::block(config)?;
            options.max_tokens = self.tokens;
            if let Mode::Block(block) = &mut options.mode {
                block.schedule = schedule;
            }
            all.push((name, options));
        }
        if self.tokens == 0 {
            return Ok(Vec::new());
        }
        let (total, room) = (prompt.len().saturating_add(self.tokens), config.context_length());
        ensure!(
            total <= room,
            "a prompt of {} tokens and --tokens {} do not fit the model's context of {room}",
            prompt.len(),
            self.tokens
        );
        let request = |(name, options)| Ok((name, decode::full_length(config, prompt, options)?));
        all.into_iter().map(request).collect()
    }

    fn prompt(&self, config: &LlamaConfig) -> Result<Vec<u32>> {
        if self.tokens == 0 {
            return Ok(Vec::new());
        }
        let path = &hub::resolve(&self.model.model)?;
        if self.file.is_none()
            && path.join("config.json").exists()
            && !path.join("tokenizer.json").exists()
        {
            // Random weights need no tokenizer to be timed.
            return Ok((1..17.min(config.vocab_size as u32)).collect());
        }
        let tokenizer = Tokenizer::for_model(path, config)?;
        let text = match &self.file {
            Some(file) => read_text(file)?,
            None => PYTHON.prompt.to_owned(),
        };
        let mut ids = tokenizer.encode(&text, true)?;
        ids.truncate(self.prompt_tokens as usize);
        ensure!(!ids.is_empty(), "the prompt is empty; name another --file");
        Ok(ids)
    }
}

fn passes(passes: &[Pass], limits: Limits) -> String {
    if passes.is_empty() {
        return "each pass of this model reads its whole text; only answers are timed\n".to_owned();
    }
    let head = format!(
        "{:>4}  {:>6}  {:>10}  {:>10}  {:>8}  {:>16}  {:>16}",
        "rows", "after", "a pass", "a row", "growth", "GFLOP/s", "GB/s"
    );
    let mut text = ui::heading(&head) + "\n";
    for pass in passes {
        let of = |rate: f64, limit: f64| format!("{rate:.1} ({:.0} %)", 100.0 * rate / limit);
        text += &format!(
            "{:>4}  {:>6}  {:>7.2} ms  {:>7.2} ms  {:>6.2} ×  {:>16}  {:>16}\n",
            pass.rows,
            pass.depth,
            1e3 * pass.seconds,
            1e3 * pass.seconds / pass.rows as f64,
            pass.growth,
            of(pass.gflops, limits.gflops),
            of(pass.gbytes, limits.gbytes),
        );
    }
    text + &format!(
        "in brackets: of what this device does at most, {:.0} GFLOP/s and {:.1} GB/s, measured\n",
        limits.gflops, limits.gbytes
    )
}

fn answers_table(done: &Decoding, prompt: usize) -> String {
    let Some(one) = done.answers.first() else { return String::new() };
    let width = done.answers.iter().map(|a| a.mode.len()).max().unwrap_or(0);
    let head = format!(
        "{:width$}  {:>8}  {:^15}  {:>12}  {:>10}",
        format!("{} tokens", one.tokens),
        "tokens/s",
        "range",
        "tokens/pass",
        "speed"
    );
    let rate = |a: &Answer, seconds: f64| a.tokens as f64 / seconds.max(1e-9);
    let mut text = format!("\n{}\n", ui::heading(&head));
    for a in &done.answers {
        let range = format!("{:.1} – {:.1}", rate(a, a.range[1]), rate(a, a.range[0]));
        text += &format!(
            "{:width$}  {:>8.1}  {range:^15}  {:>12.2}  {:>8.2} ×\n",
            a.mode,
            rate(a, a.seconds),
            a.tokens as f64 / a.forwards.max(1) as f64,
            rate(a, a.seconds) / rate(one, one.seconds),
        );
    }
    let head =
        one.parts.iter().map(|(first, end, _)| format!("  {:>11}", format!("{first}–{end}")));
    let head = format!("{:width$}{}", "ms a token, from – to", head.collect::<String>());
    text += &format!("\n{}\n", ui::heading(&head));
    for a in &done.answers {
        let wide = width.max("ms a token, from – to".chars().count());
        let parts = a.parts.iter().map(|(_, _, seconds)| format!("  {:>11.2}", 1e3 * seconds));
        text += &format!("{:wide$}{}\n", a.mode, parts.collect::<String>());
    }
    let read = Duration::from_secs_f64(one.prompt_seconds);
    text + &format!("prompt of {prompt} tokens read in {}\n", ui::duration(read))
}
