//! `demask train`: runs a recipe into a folder, and resumes it from there.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::Result;
use demask_benches::measure::multiply_adds;
use demask_engine::tune;
use demask_trainer::metrics::{Metrics, Validation};
use demask_trainer::recipe::Recipe;
use demask_trainer::replay::FailedBatch;
use demask_trainer::train::{Event, Outcome, Trainer};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::args::{Bytes, Common};
use crate::data::Bar;
use crate::tune::{TuneArgs, rows_of};
use crate::ui::Notices;
use crate::{interrupt, plan, ui};

const EXAMPLES: &str = "\
Examples:
  demask train recipe.toml --out runs/first
  demask train recipe.toml --out runs/first        the same again resumes
  demask train recipe.toml --out runs/first --stop-after 1000
  demask train recipe.toml --out runs/first --replay runs/first/skipped/step-00000120.json
  demask train recipe.toml --out runs/first --plan --memory 8GiB

A recipe, short:
  [model.fresh]                  # or: model.from = \"DIR\"
  vocab_size = 4096
  hidden_size = 256
  intermediate_size = 704
  layers = 6
  heads = 8
  kv_heads = 4
  [data]
  paths = [\"src\"]
  [[phase]]
  objective = \"ar\"
  steps = 300
  lr = 1e-3
  [[phase]]
  objective = \"block_diffusion\"
  steps = 300
  lr = 1e-3
  block_length = 4
  corruption_warmup = 100

With `lora = { base = \"q4\" }` beside model.from, the model's weights are frozen in 4
bits and an adapter is trained; `demask merge` puts it into the weights.

The folder gets metrics.jsonl (one line a step), curve.svg, tensorboard/,
checkpoints/ and, at the end, model/ in Hugging Face layout; `demask report` makes
a page of it. Ctrl-C saves a checkpoint and leaves; a killed run resumes from its
last one, bit for bit.";

/// Lines of progress are at least this far apart where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Train a model by a recipe; resumes if the folder has a checkpoint
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The recipe, a TOML file; paths in it are relative to its folder
    #[arg(value_name = "RECIPE.toml")]
    recipe: PathBuf,

    /// Folder of the run, made if it does not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Leave with a checkpoint after step N of the run, to go on later
    #[arg(long, value_name = "N")]
    stop_after: Option<u64>,

    /// Run a batch from the run's skipped/ again with the newest checkpoint, moving nothing
    #[arg(long, value_name = "FILE.json", conflicts_with = "stop_after")]
    replay: Option<PathBuf>,

    /// Print what the run would take of the device's memory, and leave without having taken or written any
    ///
    /// The run is rehearsed on a device that only counts. With --memory, says whether it fits, and if
    /// not which change of the recipe would make it fit; exit code 1 if it does not fit.
    #[arg(long, conflicts_with = "stop_after")]
    plan: bool,

    /// Use this much of the device's memory at most, as in 8GiB; without it, what the device gives
    ///
    /// Counted are the buffers of the run; the driver takes some more.
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,

    #[command(flatten)]
    tune: TuneArgs,

    #[command(flatten)]
    common: Common,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let memory = args.memory.map(|Bytes(bytes)| bytes);
    let recipe = Recipe::read(&args.recipe)?;
    if args.plan {
        return plan::run(&recipe, &args.out, memory, &args.tune, &args.common);
    }
    interrupt::listen("saving a checkpoint after this step");
    let notices = args.common.notices();
    let (length, batch) = (recipe.data.length, recipe.optimizer.batch);
    let rows = rows_of(&recipe);
    let total = recipe.total_steps();
    let gpu = args.common.open_gpu_within(memory)?;
    notices.say(&format!("device     {}", gpu.adapter().describe()));
    let bar = OnceLock::new();
    let mut trainer = Trainer::open(&gpu, recipe, &args.out, &|event| {
        match event {
            Event::Preparing(progress) => bar.get_or_init(|| Bar::new(notices)).show(progress),
            Event::Dataset(_) => bar.get().into_iter().for_each(Bar::finish),
            _ => {}
        }
        announce(notices, &event);
        match interrupt::asked() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    })?;
    let parameters = trainer.model().config().num_parameters();
    notices.say(&format!("model      {} parameters", ui::count(parameters as f64)));

    if let Some(path) = &args.replay {
        return replay(&trainer, path, args.common.output.json);
    }

    let products = tune::products(trainer.model(), &rows, true);
    args.tune.prepare(&gpu, &products, notices)?;

    trainer.set_device_flops(multiply_adds(&gpu)?);

    let first = trainer.step();
    let mut last = None;
    let mut checkpoint = None;
    let stop_after = args.stop_after.unwrap_or(u64::MAX);
    let began = Instant::now();
    // Stopping is decided after a step, and here not even one is wanted.
    let outcome = if first >= stop_after && first < total {
        Outcome::Stopped(first)
    } else {
        let mut progress = Progress::new(notices, first, total);
        trainer.run(&mut |event| match event {
            Event::Step(metrics, _) => {
                progress.step(metrics);
                last = Some(metrics.clone());
                match interrupt::asked() || metrics.step >= stop_after {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            }
            Event::Saved(place) => {
                checkpoint = Some(place.to_owned());
                ControlFlow::Continue(())
            }
            event => {
                progress.aside(|| announce(notices, &event));
                ControlFlow::Continue(())
            }
        })?
    };
    let seconds = began.elapsed().as_secs_f64();
    let steps = trainer.step() - first;
    let tokens = steps * (length * batch) as u64;
    let peak = gpu.memory().peak;
    let out = args.out.display();
    let again = format!("demask train {} --out {out}", args.recipe.display());
    notices.say(&match &outcome {
        Outcome::Finished(_) => format!("finished: {total} steps"),
        Outcome::Stopped(step) => format!("stopped after step {step} of {total}; go on: {again}"),
    });
    if steps > 0 {
        notices.say(&format!(
            "{steps} steps, {} tokens in {} ({} tokens/s); device memory at most {}; curve: {}",
            ui::count(tokens as f64),
            ui::duration(Duration::from_secs_f64(seconds)),
            ui::count(tokens as f64 / seconds.max(1e-9)),
            ui::bytes(peak),
            args.out.join("curve.svg").display()
        ));
    }
    let model = match &outcome {
        Outcome::Finished(model) => Some(model.clone()),
        Outcome::Stopped(_) => None,
    };
    if args.common.output.json {
        ui::print_json(&json!({
            "finished": model.is_some(),
            "step": trainer.step(),
            "total_steps": total,
            "resumed_from": first,
            "loss": last.as_ref().map(|m| m.loss),
            "ce_per_masked": last.as_ref().and_then(|m| m.ce_per_masked),
            "grad_norm": last.as_ref().map(|m| m.grad_norm),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens as f64 / seconds.max(1e-9),
            "parameters": parameters,
            "peak_bytes": peak,
            "adapter": gpu.adapter().describe(),
            "out": out.to_string(),
            "checkpoint": checkpoint.map(|c| c.display().to_string()),
            "model": model.map(|m| m.display().to_string()),
        }))?;
    } else if let Some(model) = model {
        ui::print(&format!("{}\n", model.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Says of a failed batch what it gives now, worst sequences first.
fn replay(trainer: &Trainer, path: &Path, json: bool) -> Result<ExitCode> {
    let batch = FailedBatch::read(path)?;
    let now = trainer.replay(&batch)?;
    if json {
        ui::print_json(&json!({
            "step": batch.step,
            "why": batch.why,
            "loss": batch.loss,
            "grad_norm": batch.grad_norm,
            "now": now,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    ui::print(&format!(
        "step {} failed: {}\nthen            loss {:.4}  gradient norm {:.3e}\nafter step {:<5}loss {:.4}  \
         gradient norm {:.3e}\n\nnats a token of each sequence, worst first:\n",
        batch.step, batch.why, batch.loss, batch.grad_norm, now.after, now.loss, now.grad_norm
    ))?;
    let mut order: Vec<usize> = (0..batch.examples.len()).collect();
    let ce = |i: usize| now.sequences[i].unwrap_or(0.0);
    order.sort_by(|&a, &b| ce(b).total_cmp(&ce(a)));
    for i in order {
        let text: String = batch.texts.get(i).map_or("", |t| t).escape_debug().take(80).collect();
        ui::print(&format!("{:>8.3}  {text}\n", ce(i)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What is worth a line of its own.
fn announce(notices: Notices, event: &Event<'_>) {
    let line = match event {
        Event::Dataset(dataset) => {
            let sources = dataset.manifest.sources.iter().map(|source| {
                let tokens: u64 = source.train.iter().map(|s| s.tokens).sum();
                format!("{} {}", source.name, ui::count(tokens as f64))
            });
            format!("dataset    tokens: {}", sources.collect::<Vec<_>>().join(", "))
        }
        Event::Packed(packed) => {
            let mut line = format!("data       {} sequences an epoch", packed.n_sequences());
            for (name, _, left_out) in packed.sources().filter(|(.., n)| *n > 0) {
                line += &format!(
                    "\n           {name}: {left_out} conversations are longer than a sequence and left out"
                );
            }
            line
        }
        Event::Resumed(step) => format!("resuming after step {step}"),
        Event::MaskEmbedding(mask) => format!(
            "mask token's embedding has length {:.3}, the mean is {:.3}{}",
            mask.norm,
            mask.mean,
            if mask.mended { ": set to the mean" } else { "" }
        ),
        Event::Validated(all) => {
            let of = |v: &Validation| format!("{} {:.4}", v.text, v.loss);
            format!("held out   {}", all.iter().rev().map(of).collect::<Vec<_>>().join("  "))
        }
        Event::WentBack(step, why) => format!("going back to step {step}: {why}"),
        _ => return,
    };
    notices.say(&line);
}

/// A bar on a terminal, a line now and then elsewhere.
struct Progress {
    bar: ProgressBar,
    notices: Notices,
    first: u64,
    total: u64,
    began: Instant,
    last_line: Option<Instant>,
}

impl Progress {
    fn new(notices: Notices, first: u64, total: u64) -> Self {
        let target = match notices.animated() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(total), target).with_position(first);
        let style = ProgressStyle::with_template("{bar:24} {pos}/{len}  {wide_msg}");
        bar.set_style(style.expect("the template is valid").progress_chars("━╸─"));
        bar.set_message("first step …");
        bar.tick();
        Progress { bar, notices, first, total, began: Instant::now(), last_line: None }
    }

    /// Lines that are not overwritten.
    fn aside(&self, say: impl FnOnce()) {
        self.bar.suspend(say);
    }

    fn step(&mut self, metrics: &Metrics) {
        let done = metrics.step - self.first;
        let left = self.total.saturating_sub(metrics.step);
        let eta = self.began.elapsed().mul_f64(left as f64 / done.max(1) as f64);
        let ce = metrics.ce_per_masked.filter(|_| metrics.phase != "ar");
        let ce = ce.map_or(String::new(), |ce| format!("  ce {ce:.3}"));
        let text = format!(
            "{}  loss {:.4}{ce}  grad {}  {} tokens/s  ETA {}",
            metrics.phase,
            metrics.loss,
            ui::count(metrics.grad_norm),
            ui::count(metrics.tokens_per_second),
            ui::duration(eta)
        );
        if let Some(why) = &metrics.skipped {
            self.aside(|| self.notices.say(&format!("step {} skipped: {why}", metrics.step)));
        }
        if self.notices.animated() {
            self.bar.set_position(metrics.step);
            self.bar.set_message(text);
            return;
        }
        let due = self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY);
        if due || metrics.step == self.total {
            self.notices.say(&format!("step {}/{}  {text}", metrics.step, self.total));
            self.last_line = Some(Instant::now());
        }
    }
}

impl Drop for Progress {
    /// Leaves the bar as it is.
    fn drop(&mut self) {
        self.bar.abandon();
    }
}
