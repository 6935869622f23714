//! `demask demo`: a small model writes code before your eyes, learns for a minute from source code
//! found on this machine, and writes again. The model on disk is never changed.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use demask_engine::decode::{DecodeOptions, Generation, Mode, Schedule};
use demask_engine::gpu::Gpu;
use demask_engine::model::{Llama, LlamaConfig, Precision, Tokenizer, Weights, hub};
use demask_trainer::recipe::{
    BlockLength, Checkpoints, Data, Guard, ModelSource, Objective, Optimizer, Phase, Recipe,
    Validation,
};
use demask_trainer::train::{Event, Trainer};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::args::Common;
use crate::generate::{Output, stream, summary};
use crate::show::{answer_text, legend};
use crate::sources::{Language, PYTHON, Sources};
use crate::{interrupt, ui};

const EXAMPLES: &str = "\
Examples:
  demask demo
  demask demo --seconds 20 --code ~/src/my-project
  demask demo --model runs/first/model --keep runs/demo

The model that comes with demask is looked for in ../share/demask/small-coder beside
the program, then in trainer/models/small-coder of the source tree.";

/// Tokens of each answer.
const ANSWER: usize = 64;
/// Sequences on which the loss is measured before and after.
const MEASURED: usize = 24;
/// Most text to learn from: reading it should not take longer than a breath.
const MOST_BYTES: u64 = 2 << 20;
/// More steps than any demo takes: the time decides.
const MANY_STEPS: u64 = 1_000_000;

/// Watch a small model write code, learn for a minute from code on this machine, and write again
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A block-diffusion model instead of the one that comes with demask: Hugging Face folder or
    /// GGUF
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,

    /// How long to train
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,

    /// Learn from the source code in this folder [default: Python's standard library, else Rust
    /// crates that cargo has fetched]
    #[arg(long, value_name = "DIR")]
    code: Option<PathBuf>,

    /// Keep the trained model and the run's files in this folder
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,

    /// Names the random draws of the training
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    #[command(flatten)]
    common: Common,
}

/// A small model is seldom sure of a token and repeats itself when it must always take the likeliest: it may draw, and
/// commits what it holds for more likely than not.
fn answer_options(config: &LlamaConfig, seed: u64) -> Result<DecodeOptions> {
    let mut options = DecodeOptions::block(config)?;
    options.max_tokens = ANSWER;
    options.sampling.temperature = 0.6;
    options.sampling.seed = seed;
    if let Mode::Block(block) = &mut options.mode {
        block.schedule = Schedule::Threshold(0.5);
    }
    Ok(options)
}

pub fn run(args: Args) -> Result<ExitCode> {
    interrupt::listen("leaving after this step");
    let path = match &args.model {
        Some(path) => hub::resolve(path)?,
        None => shipped_model()?,
    };
    let (config, weights) = Weights::open(&path)?;
    let tokenizer = Tokenizer::for_model(&path, &config)?;
    if config.mask_token_id.is_none() {
        bail!("{}: this model has no mask token; demo needs one of block diffusion", path.display())
    }
    let options = answer_options(&config, args.seed)?;
    let sources = Sources::find(args.code.as_deref())?;
    let gpu = args.common.open_gpu()?;
    let model = Llama::from_weights(&gpu, &config, &weights, Precision::Stored)?;
    let software = gpu.adapter().is_software();
    let stage = Stage { json: args.common.output.json, software, tokenizer, options };
    stage.introduce(&gpu, &path, &config)?;

    let language = sources.language;
    let mut python = None;
    if language.name != PYTHON.name {
        stage.title("It continues Python, a block at a time")?;
        python = Some(stage.show(&model, PYTHON)?);
    }
    stage.title(&format!("{}, before learning", language.name))?;
    let before = stage.show(&model, language)?;
    drop(model);
    if interrupt::asked() {
        return Ok(ExitCode::SUCCESS);
    }

    // Dropped, and with it removed, at the end.
    let temporary = tempfile::tempdir().context("cannot make a temporary folder")?;
    let folder = std::path::absolute(args.keep.as_deref().unwrap_or(temporary.path()))?;
    let recipe = recipe(&config, &path, &folder.join("code"), language, software, args.seed)?;
    let (trainer, learnt) = learn(&gpu, recipe, &folder, &sources, &stage, &args)?;
    if interrupt::asked() {
        return Ok(ExitCode::SUCCESS);
    }
    stage.title(&format!("{}, after {} steps of learning", language.name, learnt.steps))?;
    let after = stage.show(trainer.model(), language)?;

    let kept = args.keep.as_ref().map(|_| learnt.checkpoint.display().to_string());
    if args.common.output.json {
        ui::print_json(&json!({
            "adapter": gpu.adapter().describe(),
            "model": path.display().to_string(),
            "code": sources.root.display().to_string(),
            "language": language.name,
            "python": python.as_ref().map(|g| stage.as_json(g, PYTHON)),
            "before": stage.as_json(&before, language),
            "after": stage.as_json(&after, language),
            "held_out_loss_before": learnt.held_out_before,
            "held_out_loss_after": learnt.held_out_after,
            "steps": learnt.steps,
            "losses": learnt.losses,
            "seconds": learnt.seconds,
            "peak_bytes": gpu.memory().peak,
            "kept": kept,
        }))?;
    }
    stage.title("What next")?;
    match kept {
        Some(model) => stage.say(&format!("demask generate --show --model {model} --prompt …"))?,
        None => stage.say("The model on disk is unchanged; --keep DIR keeps what was learnt.")?,
    }
    stage.say("demask train --help shows how to train a model of your own.")?;
    Ok(ExitCode::SUCCESS)
}

/// The model that comes with demask.
fn shipped_model() -> Result<PathBuf> {
    let program = std::env::current_exe().unwrap_or_default();
    let installed = program.parent().map(|bin| bin.join("../share/demask/small-coder"));
    let source = Path::new(demask_trainer::MODELS).join("small-coder");
    let places: Vec<PathBuf> = installed.into_iter().chain([source]).collect();
    let found = places.iter().find(|place| place.join("model.gguf").exists());
    found.cloned().with_context(|| {
        let places: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
        format!(
            "the model that comes with demask is in none of {}; name one with --model",
            places.join(", ")
        )
    })
}

fn block_length(config: &LlamaConfig) -> usize {
    config.block_length.unwrap_or(4)
}

fn recipe(
    config: &LlamaConfig,
    model: &Path,
    code: &Path,
    language: Language,
    software: bool,
    seed: u64,
) -> Result<Recipe> {
    let model = std::path::absolute(model)?;
    // Steps of about a second, so that the curve has points on a CPU too.
    let (batch, length) = if software { (4, 128) } else { (16, 256) };
    let block_length = block_length(config);
    let length = length.min(config.max_position_embeddings).max(block_length);
    Ok(Recipe {
        seed,
        model: ModelSource { from: Some(model), fresh: None, mask_token: None },
        lora: None,
        data: Data {
            extensions: language.extensions.iter().map(|e| e.to_string()).collect(),
            length: length / block_length * block_length,
            held_out: 0.1,
            ..Data::of_paths(vec![code.to_owned()])
        },
        optimizer: Optimizer { batch, micro_batch: batch, ..Optimizer::default() },
        checkpoints: Checkpoints { every: MANY_STEPS, ..Checkpoints::default() },
        validation: Validation::default(),
        guard: Guard::default(),
        recompute: false,
        phase: vec![Phase {
            lr_warmup: 5,
            lr_min_ratio: 1.0,
            block_length: BlockLength::Fixed(block_length),
            ..Phase::new(Objective::BlockDiffusion, MANY_STEPS, 1e-4)
        }],
    })
}

/// What a minute of training gave.
struct Learnt {
    steps: u64,
    losses: Vec<f64>,
    seconds: f64,
    checkpoint: PathBuf,
    held_out_before: Option<f64>,
    held_out_after: Option<f64>,
}

/// Copies the code, trains on it, and measures before and after.
fn learn(
    gpu: &Gpu,
    recipe: Recipe,
    folder: &Path,
    sources: &Sources,
    stage: &Stage,
    args: &Args,
) -> Result<(Trainer, Learnt)> {
    let size = sources.copy(&folder.join("code"), MOST_BYTES)?;
    stage.title(&format!("Learning {} for {} s", sources.language.name, args.seconds))?;
    stage.say(&ui::dim(&format!("from {} of {}", ui::bytes(size), sources.root.display())))?;
    let mut trainer =
        Trainer::open(gpu, recipe, &folder.join("run"), &|_| ControlFlow::Continue(()))?;
    let loss = |t: &Trainer| t.held_out_ce(MEASURED);
    let held_out_before = loss(&trainer)?;
    let (first, began) = (trainer.step(), Instant::now());
    let (losses, checkpoint) = train(&mut trainer, args)?;
    let seconds = began.elapsed().as_secs_f64();
    let held_out_after = loss(&trainer)?;
    if let (Some(before), Some(after)) = (held_out_before, held_out_after) {
        stage.say(&format!(
            "On files kept aside: loss {before:.3} → {after:.3},\n\
             as if each hidden token were a choice among {} → {}.",
            ui::count(before.exp()),
            ui::count(after.exp())
        ))?;
    }
    let steps = trainer.step() - first;
    let learnt = Learnt { steps, losses, seconds, checkpoint, held_out_before, held_out_after };
    Ok((trainer, learnt))
}

/// Trains until the time is up, with a live curve. Returns each step's loss, and the checkpoint.
fn train(trainer: &mut Trainer, args: &Args) -> Result<(Vec<f64>, PathBuf)> {
    let notices = args.common.notices();
    let target = match notices.animated() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let bar = ProgressBar::with_draw_target(Some(args.seconds.max(1)), target);
    let style = ProgressStyle::with_template("{bar:20} {wide_msg}").expect("a valid template");
    bar.set_style(style.progress_chars("━╸─"));
    bar.set_message("first step …");
    bar.tick();
    let began = Instant::now();
    let limit = Duration::from_secs(args.seconds);
    let mut losses = Vec::new();
    let mut checkpoint = PathBuf::new();
    let mut line_at = Duration::ZERO;
    trainer.run(&mut |event| {
        match event {
            Event::Step(metrics, _) => {
                // The unweighted loss, as the held-out one is.
                losses.extend(metrics.ce_per_masked);
                let spent = began.elapsed();
                let recent = &losses[losses.len().saturating_sub(8)..];
                let mean = recent.iter().sum::<f64>() / recent.len().max(1) as f64;
                let text = format!(
                    "{}  loss {mean:.3}  step {}  {} tokens/s  {} left",
                    ui::sparkline(&losses, 24),
                    metrics.step,
                    ui::count(metrics.tokens_per_second),
                    ui::duration(limit.saturating_sub(spent))
                );
                bar.set_position(spent.as_secs().min(args.seconds));
                bar.set_message(text.clone());
                if !notices.animated() && spent >= line_at {
                    notices.say(&text);
                    line_at = spent + Duration::from_secs(10);
                }
                if spent >= limit || interrupt::asked() {
                    return ControlFlow::Break(());
                }
            }
            Event::Saved(place) => checkpoint = place.to_owned(),
            _ => {}
        }
        ControlFlow::Continue(())
    })?;
    bar.abandon();
    Ok((losses, checkpoint))
}

/// Where the demo is played: the terminal, or nowhere with `--json`.
struct Stage {
    json: bool,
    software: bool,
    tokenizer: Tokenizer,
    options: DecodeOptions,
}

impl Stage {
    fn say(&self, line: &str) -> Result<()> {
        if self.json {
            return Ok(());
        }
        ui::print(&format!("{line}\n"))
    }

    fn title(&self, text: &str) -> Result<()> {
        self.say(&format!("\n{}", ui::heading(text)))
    }

    fn introduce(&self, gpu: &Gpu, path: &Path, config: &LlamaConfig) -> Result<()> {
        self.say(&format!("{}  {}", ui::heading("Device"), gpu.adapter().describe()))?;
        self.say(&format!(
            "{}   {}, {} parameters, blocks of {} tokens",
            ui::heading("Model"),
            path.display(),
            ui::count(config.num_parameters() as f64),
            block_length(config)
        ))?;
        match ui::stdout_is_terminal() {
            true => self.say(&format!("        {}", legend())),
            false => Ok(()),
        }
    }

    /// Shows how the model goes on with the language's prompt.
    fn show(&self, model: &Llama, language: Language) -> Result<Generation> {
        let ids = self.tokenizer.encode(language.prompt, true)?;
        let room = model.config().max_position_embeddings.saturating_sub(ids.len());
        let options = DecodeOptions { max_tokens: ANSWER.min(room), ..self.options.clone() };
        let drawn = ui::stdout_is_terminal();
        // A GPU would be done before anyone saw a block.
        let pace = Duration::from_millis(if self.software { 0 } else { 60 });
        let output = match (self.json, drawn) {
            (true, _) => Output::Nothing,
            (false, true) => Output::Live(pace),
            (false, false) => Output::Stream,
        };
        if !drawn && !self.json {
            ui::print(language.prompt)?;
        }
        let answer = stream(model, &self.tokenizer, language.prompt, &ids, &options, output, None)?;
        if !drawn {
            self.say("")?;
        }
        self.say(&ui::dim(&summary(&answer, "diffusion")))?;
        Ok(answer)
    }

    fn as_json(&self, answer: &Generation, language: Language) -> serde_json::Value {
        json!({
            "prompt": language.prompt,
            "text": answer_text(&self.tokenizer, &answer.prompt_token_ids, &answer.token_ids),
            "token_ids": answer.token_ids,
            "seconds": answer.seconds,
            "forwards": answer.forwards,
        })
    }
}
