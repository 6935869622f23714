//! The training loop: read this first. A run is a folder; it is resumed from its newest checkpoint and is, after a
//! kill, bit for bit the run it would have been.
//!
//!   run/{recipe.toml, corpus.json, metrics.jsonl, tensorboard/, curve.svg, checkpoints/step-N/, model/}

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use demask_engine::autograd::{Gradients, backward, without_recording};
use demask_engine::gpu::Gpu;
use demask_engine::model::{Llama, LlamaConfig, Precision, StoredType, Tokenizer};
use demask_engine::tensor::Tensor;

use crate::batch::{self, StepPlan};
use crate::checkpoint::{self, TrainerState};
use crate::data::{Corpus, Document, Report};
use crate::metrics::{Metrics, read_metrics};
use crate::optim::OptimizerState;
use crate::pack::{Packed, Packing, Visibility, tokenise};
use crate::recipe::{Fresh, Objective, Recipe};
use crate::tensorboard::TensorBoard;
use crate::{bpe, curve};

/// What a caller hears of a run.
pub enum Event<'a> {
    /// The text was read.
    Corpus(&'a Report),
    /// The tokenizer was trained on it: tokens of its vocabulary.
    Tokenizer(usize),
    /// Text became training sequences: sequences of one epoch, and tokens.
    Packed {
        /// Sequences of one epoch.
        sequences: u64,
        /// Tokens of one epoch.
        tokens: u64,
    },
    /// Training goes on after this many steps.
    Resumed(u64),
    /// One step was done, of so many.
    Step(&'a Metrics, u64),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps done; the model's folder.
    Finished(PathBuf),
    /// Stopped on request after this many steps, with a checkpoint.
    Stopped(u64),
}

/// One run, open on a device.
pub struct Trainer {
    recipe: Recipe,
    run: PathBuf,
    model: Llama,
    tokenizer: Tokenizer,
    optimizer: OptimizerState,
    data: Packed,
    mask_id: u32,
    step: u64,
    metrics: File,
    tensorboard: TensorBoard,
}

impl Trainer {
    /// Starts the run in folder `run`, or resumes it if it has a checkpoint.
    pub fn open(
        gpu: &Gpu,
        recipe: Recipe,
        run: &Path,
        hear: &mut dyn FnMut(Event<'_>),
    ) -> Result<Trainer> {
        recipe.check()?;
        fs::create_dir_all(run)
            .with_context(|| format!("cannot make the run's folder {}", run.display()))?;
        let corpus = read_corpus(&recipe)?;
        hear(Event::Corpus(&corpus.report));
        let resumed = checkpoint::list(run)?.pop();
        let (model, optimizer, tokenizer, step, metrics_bytes) = match resumed {
            Some((_, place)) => {
                let (model, optimizer, tokenizer, state) = checkpoint::load(gpu, &place)?;
                checkpoint::same_recipe(&state.recipe, &recipe)?;
                hear(Event::Resumed(state.step));
                (model, optimizer, tokenizer, state.step, state.metrics_bytes)
            }
            None => {
                let (model, tokenizer) = begin(gpu, &recipe, &corpus, run, hear)?;
                let optimizer = OptimizerState::new(&model);
                (model, optimizer, tokenizer, 0, 0)
            }
        };
        let mask_id = mask_id(&recipe, &model, &tokenizer)?;
        let train = corpus.split(recipe.data.held_out, recipe.seed).train;
        let data = pack(&recipe, &train, &tokenizer, model.config())?;
        let sequences = data.n_sequences();
        hear(Event::Packed { sequences, tokens: sequences * recipe.data.length as u64 });
        fs::write(run.join("recipe.toml"), toml::to_string_pretty(&recipe)?)?;
        fs::write(run.join("corpus.json"), serde_json::to_vec_pretty(&corpus.report)?)?;
        let metrics = open_metrics(&run.join("metrics.jsonl"), metrics_bytes)?;
        let tensorboard = TensorBoard::open(&run.join("tensorboard"), step)?;
        let run = run.to_owned();
        Ok(Trainer {
            recipe,
            run,
            model,
            tokenizer,
            optimizer,
            data,
            mask_id,
            step,
            metrics,
            tensorboard,
        })
    }

    /// Trains to the end, or until `hear` says stop; then a checkpoint is written.
    pub fn run(&mut self, hear: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>) -> Result<Outcome> {
        let total = self.recipe.total_steps();
        while self.step < total {
            let metrics = self.train_step()?;
            self.record(&metrics)?;
            let stop = hear(Event::Step(&metrics, total)).is_break();
            let phase_ends = self.recipe.at(self.step).is_none_or(|(_, within)| within == 0);
            if stop || phase_ends || self.step.is_multiple_of(self.recipe.save_every) {
                let place = self.save()?;
                let _ = hear(Event::Saved(&place));
            }
            if stop && self.step < total {
                return Ok(Outcome::Stopped(self.step));
            }
        }
        let folder = self.run.join("model");
        self.model.save(&folder, StoredType::F32, Some(&self.tokenizer))?;
        Ok(Outcome::Finished(folder))
    }

    /// One optimiser step: lay out examples, add up gradients over micro-batches, clip, update.
    pub fn train_step(&mut self) -> Result<Metrics> {
        let start = Instant::now();
        let Some((phase, phase_step)) = self.recipe.at(self.step) else {
            bail!("the run has done all of its {} steps", self.step)
        };
        let settings = &self.recipe.optimizer;
        let plan = StepPlan {
            phase,
            phase_step,
            step: self.step,
            seed: self.recipe.seed,
            mask_id: self.mask_id,
        };
        let first = self.step * settings.batch as u64;
        let examples = plan.examples(&self.data, first, settings.batch);
        let divisor = batch::divisor(&examples);
        let mut gradients = Gradients::new();
        let mut parts = Vec::new();
        for micro in examples.chunks(settings.micro_batch) {
            // Early in the warm-up a micro-batch may have no masked token, and then it teaches nothing.
            if micro.iter().all(|e| e.n_supervised() == 0) {
                continue;
            }
            let mask = plan.mask();
            let document_mask = self.recipe.data.document_mask;
            let ce = batch::loss(
                &self.model,
                micro,
                mask,
                divisor,
                document_mask,
                self.recipe.recompute,
            );
            let one = Tensor::from_f32(self.model.gpu(), &[1.0], [1]);
            backward(&ce.loss, &one, &mut gradients);
            parts.push((ce.loss.detach(), ce.per_row));
        }
        let lr = phase.learning_rate().lr(phase_step);
        let norm = self.optimizer.step(&self.model, &gradients, settings, lr)?;
        drop(gradients);
        let (mut loss, mut sum, mut rows) = (0.0, 0.0, 0);
        for (part, per_row) in parts {
            loss += f64::from(part.item()?);
            let ce = per_row.to_vec()?;
            rows += ce.len();
            sum += ce.iter().map(|&c| f64::from(c)).sum::<f64>();
        }
        let norm = f64::from(norm.to_vec()?[0]);
        let (objective, warmup) = (phase.objective, phase.corruption_warmup);
        let u_max = match objective {
            Objective::Ar => None,
            Objective::Diffusion => crate::noise::u_max(phase_step, warmup, phase.u_init),
        };
        self.step += 1;
        let tokens = settings.batch * self.recipe.data.length;
        Ok(Metrics {
            step: self.step,
            phase: objective.name().to_owned(),
            loss,
            grad_norm: norm,
            lr: f64::from(lr),
            tokens_per_second: tokens as f64 / start.elapsed().as_secs_f64(),
            ce_per_masked: (rows > 0).then(|| sum / rows as f64),
            u_max: u_max.map(f64::from),
            tokens: self.step * tokens as u64,
            peak_bytes: self.model.gpu().memory().peak,
            ..Metrics::default()
        })
    }

    fn record(&mut self, metrics: &Metrics) -> Result<()> {
        let path = self.run.join("metrics.jsonl");
        let line = serde_json::to_string(metrics)? + "\n";
        self.metrics
            .write_all(line.as_bytes())
            .with_context(|| format!("cannot write {}; make room and resume", path.display()))?;
        self.tensorboard.step(metrics)
    }

    /// Writes a checkpoint of the steps done so far, and the curve.
    pub fn save(&mut self) -> Result<PathBuf> {
        if let Some((phase, _)) = self.recipe.at(self.step.saturating_sub(1))
            && phase.objective == Objective::Diffusion
        {
            self.model.config_mut().block_length = Some(phase.block_length);
        }
        self.model.config_mut().mask_token_id = Some(self.mask_id);
        let state = TrainerState {
            step: self.step,
            updates: self.optimizer.updates,
            metrics_bytes: self.metrics.stream_position()?,
            recipe: self.recipe.clone(),
        };
        self.metrics.sync_all()?;
        self.tensorboard.flush()?;
        let place =
            checkpoint::save(&self.run, &self.model, &self.optimizer, &self.tokenizer, &state)?;
        let points = read_metrics(&self.run.join("metrics.jsonl"))?;
        curve::draw(&points, "training", &self.run.join("curve.svg"))?;
        Ok(place)
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The model as it stands.
    pub fn model(&self) -> &Llama {
        &self.model
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

/// Mean cross-entropy in nats per supervised token (a masked one, under diffusion) over up to `sequences` sequences
/// of the recipe's held-out text, under its last phase and without a warm-up. Each call hides the same tokens, so
/// that models can be compared. Not a likelihood: mask rates are clipped as in training. `None` where the held-out
/// text fills no sequence.
pub fn held_out_loss(
    recipe: &Recipe,
    model: &Llama,
    tokenizer: &Tokenizer,
    sequences: usize,
) -> Result<Option<f64>> {
    let corpus = read_corpus(recipe)?;
    let held_out = corpus.split(recipe.data.held_out, recipe.seed).held_out;
    let Ok(data) = pack(recipe, &held_out, tokenizer, model.config()) else { return Ok(None) };
    let phase = recipe.phase.last().context("there is no [[phase]]")?;
    let plan = StepPlan {
        phase,
        phase_step: phase.corruption_warmup,
        step: 0,
        seed: recipe.seed,
        mask_id: mask_id(recipe, model, tokenizer)?,
    };
    let examples = plan.examples(&data, 0, sequences.min(data.n_sequences() as usize));
    let (mut sum, mut rows) = (0.0, 0);
    for micro in examples.chunks(recipe.optimizer.micro_batch) {
        let document_mask = recipe.data.document_mask;
        let ce =
            without_recording(|| batch::loss(model, micro, plan.mask(), 1.0, document_mask, false));
        let per_row = ce.per_row.to_vec()?;
        rows += per_row.len();
        sum += per_row.iter().map(|&c| f64::from(c)).sum::<f64>();
    }
    Ok((rows > 0).then(|| sum / rows as f64))
}

/// Opens the metrics file and cuts off what was written after the checkpoint.
fn open_metrics(path: &Path, bytes: u64) -> Result<File> {
    let open = || -> std::io::Result<File> {
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        file.set_len(bytes)?;
        file.seek(SeekFrom::Start(bytes))?;
        Ok(file)
    };
    open().with_context(|| format!("cannot open {}", path.display()))
}

fn read_corpus(recipe: &Recipe) -> Result<Corpus> {
    let mut whole: Option<Corpus> = None;
    for path in &recipe.data.paths {
        let corpus = Corpus::read(path, &recipe.filter())?;
        whole = Some(match whole {
            Some(before) => before.join(corpus),
            None => corpus,
        });
    }
    whole.context("data.paths names no directory")
}

fn begin(
    gpu: &Gpu,
    recipe: &Recipe,
    corpus: &Corpus,
    run: &Path,
    hear: &mut dyn FnMut(Event<'_>),
) -> Result<(Llama, Tokenizer)> {
    if let Some(from) = &recipe.model.from {
        let model = Llama::load(gpu, from, Precision::F32)?.trainable();
        let tokenizer = Tokenizer::for_model(from, model.config())?;
        return Ok((model, tokenizer));
    }
    let fresh = recipe.model.fresh.as_ref().context("[model] names neither `from` nor `fresh`")?;
    let (config, tokenizer) = fresh_tokenizer(recipe, fresh, corpus, run)?;
    hear(Event::Tokenizer(config.vocab_size));
    Ok((Llama::random(gpu, &config, recipe.seed)?.trainable(), tokenizer))
}

fn fresh_tokenizer(
    recipe: &Recipe,
    fresh: &Fresh,
    corpus: &Corpus,
    run: &Path,
) -> Result<(LlamaConfig, Tokenizer)> {
    let folder = run.join("tokenizer");
    fs::create_dir_all(&folder)?;
    let train = corpus.split(recipe.data.held_out, recipe.seed).train;
    let texts = train.iter().map(|d| d.text.as_str());
    let size = bpe::train_bpe(texts, fresh.vocab_size, &folder.join("tokenizer.json"))?;
    let config = fresh.config(size, bpe::EOS_ID, bpe::MASK_ID);
    config.validate(&run.join("recipe.toml"))?;
    let tokenizer = Tokenizer::from_folder(&folder, &config)?;
    Ok((config, tokenizer))
}

fn mask_id(recipe: &Recipe, model: &Llama, tokenizer: &Tokenizer) -> Result<u32> {
    if let Some(token) = &recipe.model.mask_token {
        return tokenizer.token_id(token).with_context(|| {
            format!("model.mask_token {token:?} is no token of this tokenizer; name one it has")
        });
    }
    let known = model.config().mask_token_id.or_else(|| tokenizer.mask_token_id());
    let needed = recipe.phase.iter().any(|p| p.objective == Objective::Diffusion);
    ensure!(
        known.is_some() || !needed,
        "this model has no mask token; name a token it does not use otherwise with \
         model.mask_token, such as \"<empty_output>\" for SmolLM2"
    );
    Ok(known.unwrap_or(0))
}

fn pack(
    recipe: &Recipe,
    documents: &[&Document],
    tokenizer: &Tokenizer,
    config: &LlamaConfig,
) -> Result<Packed> {
    let ours = bpe::for_corpus(&tokenizer.to_json()?)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let documents = tokenise(documents, threads, &|text| bpe::encode(&ours, text))?;
    let eos = config.eos_token_ids.first().copied();
    let packing = Packing {
        length: recipe.data.length,
        eos: eos.context("the model's config.json names no eos_token_id")?,
        visibility: if recipe.data.document_mask {
            Visibility::Confined { alignment: recipe.alignment() }
        } else {
            Visibility::Mutual
        },
        seed: recipe.seed,
    };
    Packed::new(&documents, packing)
}
