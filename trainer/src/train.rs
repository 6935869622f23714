//! The training loop: read this first. A run is a folder; it is resumed from its newest checkpoint and is, after a
//! kill, bit for bit the run it would have been.
//!
//!   run/{recipe.toml, metrics.jsonl, validation.jsonl, samples.jsonl, curve.svg, tensorboard/, checkpoints/,
//!        skipped/, model/}

use std::fs::{self, File, TryLockError};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use demask_engine::gpu::Gpu;
use demask_engine::model::merge::average;
use demask_engine::model::{Llama, StoredType, Tokenizer};

use crate::batch::{self, Reported, StepPlan};
use crate::checkpoint::{self, LogBytes, TrainerState};
use crate::data::build::Progress;
use crate::data::shards::Dataset;
use crate::disk::write_atomically;
use crate::guard::{History, Verdict};
use crate::metrics::{Log, Metrics, Sample, Validation, read_metrics};
use crate::noise::{Example, u_max};
use crate::optim::OptimizerState;
use crate::pack::{Packed, Part};
use crate::recipe::{Place, Recipe};
use crate::replay::{FailedBatch, Replay};
use crate::start::{self, MaskEmbedding};
use crate::tensorboard::TensorBoard;
use crate::validate::{samples, validate};
use crate::{curve, flops};

/// Buckets of the mask rate in the metrics.
const RATE_BUCKETS: usize = 8;

/// What a caller hears of a run.
pub enum Event<'a> {
    /// The recipe's paths are made into a dataset.
    Preparing(Progress),
    /// The dataset is open.
    Dataset(&'a Dataset),
    /// It became training sequences.
    Packed(&'a Packed),
    /// Training goes on after this many steps.
    Resumed(u64),
    /// A diffusion phase begins: what the mask token's embedding is like.
    MaskEmbedding(MaskEmbedding),
    /// One step was done, of so many.
    Step(&'a Metrics, u64),
    /// Held-out text was measured.
    Validated(&'a [Validation]),
    /// The model wrote something.
    Sampled(&'a Sample),
    /// Too many steps failed: back to the checkpoint of this step, for this reason.
    WentBack(u64, &'a str),
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
    /// Its fingerprint.
    dataset: u64,
    /// That of an adapter's frozen weights.
    base: Option<u64>,
    /// `None` where no text was kept aside, or it fills no sequence.
    held_out: Option<Packed>,
    mask_id: u32,
    step: u64,
    history: History,
    best: Option<(usize, f64)>,
    /// Operations that the device does in a second, if they were measured.
    device_flops: Option<f64>,
    metrics: Log,
    validation: Log,
    samples: Log,
    tensorboard: TensorBoard,
    /// Held while the run is open.
    _lock: File,
}

impl Trainer {
    /// Starts the run in folder `run`, or resumes it if it has a checkpoint.
    pub fn open(
        gpu: &Gpu,
        recipe: Recipe,
        run: &Path,
        hear: &(dyn Fn(Event<'_>) -> ControlFlow<()> + Sync),
    ) -> Result<Trainer> {
        recipe.check()?;
        fs::create_dir_all(run)
            .with_context(|| format!("cannot make the run's folder {}", run.display()))?;
        let lock = lock(run)?;
        checkpoint::recover(run)?;
        let resumed = checkpoint::list(run)?.pop();
        let state = resumed.as_ref().map(|(_, place)| checkpoint::state(place)).transpose()?;
        if let Some(state) = &state {
            checkpoint::same_recipe(&state.recipe, &recipe)?;
        }
        let dataset = start::dataset(&recipe, run, &|p| hear(Event::Preparing(p)).is_continue())?;
        let fingerprint = dataset.manifest.fingerprint;
        ensure!(
            state.as_ref().is_none_or(|s| s.dataset == fingerprint),
            "{} is not the dataset that this run was started with; start another run, or put it back",
            dataset.folder.display()
        );
        let base = start::base(&recipe)?;
        ensure!(
            state.as_ref().is_none_or(|s| s.base == base),
            "model.from has other weights than when this run was started, and the adapter is theirs; start another \
             run, or put them back"
        );
        let _ = hear(Event::Dataset(&dataset));
        let (model, optimizer, tokenizer) = match &resumed {
            Some((step, place)) => {
                let _ = hear(Event::Resumed(*step));
                checkpoint::load(gpu, place)?
            }
            None => {
                let (model, tokenizer) = start::model(gpu, &recipe, &dataset)?;
                let optimizer = OptimizerState::new(&model, &recipe.optimizer);
                (model, optimizer, tokenizer)
            }
        };
        let mask_id = start::mask_id(&recipe, &model, &tokenizer)?;
        let data = start::pack(&recipe, &dataset, Part::Train)?;
        let _ = hear(Event::Packed(&data));
        let held_out = start::pack(&recipe, &dataset, Part::HeldOut)?;
        let held_out = (held_out.n_sequences() > 0).then_some(held_out);
        ensure!(
            held_out.is_some() || recipe.validation.every == 0 || recipe.validation.sequences == 0,
            "validation.every is set, and the held-out text fills no sequence of {} tokens; keep more aside, shorten \
             the sequences, or set validation.sequences = 0",
            recipe.data.length
        );
        write_atomically(&run.join("recipe.toml"), toml::to_string_pretty(&recipe)?.as_bytes())?;
        let step = state.as_ref().map_or(0, |s| s.step);
        let logs = state.as_ref().map(|s| s.logs).unwrap_or_default();
        let log = |name: &str, bytes| Log::open(&run.join(name), bytes);
        Ok(Trainer {
            metrics: log("metrics.jsonl", logs.metrics)?,
            validation: log("validation.jsonl", logs.validation)?,
            samples: log("samples.jsonl", logs.samples)?,
            tensorboard: TensorBoard::open(&run.join("tensorboard"), step)?,
            step,
            best: state.as_ref().and_then(|s| s.best),
            history: state.map(|s| s.history).unwrap_or_default(),
            run: run.to_owned(),
            device_flops: None,
            recipe,
            model,
            tokenizer,
            optimizer,
            data,
            dataset: fingerprint,
            base,
            _lock: lock,
            held_out,
            mask_id,
        })
    }

    /// Trains to the end, or until `hear` says stop; then a checkpoint is written.
    pub fn run(&mut self, hear: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>) -> Result<Outcome> {
        let total = self.recipe.total_steps();
        while self.step < total {
            if let Some(mask) = self.enter_phase()? {
                let _ = hear(Event::MaskEmbedding(mask));
            }
            let (metrics, verdict) = self.train_step()?;
            self.metrics.write(&metrics)?;
            self.tensorboard.step(&metrics)?;
            let mut stop = hear(Event::Step(&metrics, total)).is_break();
            if let Verdict::GoBack(why) = &verdict {
                let step = self.go_back(why)?;
                stop |= hear(Event::WentBack(step, why)).is_break();
            } else if self.is_due(self.recipe.validation.every) {
                self.measure(hear)?;
            }
            if stop || self.is_due(self.recipe.checkpoints.every) {
                let place = self.save()?;
                let _ = hear(Event::Saved(&place));
            }
            if stop && self.step < total {
                return Ok(Outcome::Stopped(self.step));
            }
        }
        Ok(Outcome::Finished(self.write_model()?))
    }

    /// Whether something that is done every so many steps is done now; at the end of a phase it is.
    fn is_due(&self, every: u64) -> bool {
        let phase_ends = self.recipe.at(self.step).is_none_or(|place| place.phase_step == 0);
        every > 0 && (phase_ends || self.step.is_multiple_of(every))
    }

    /// What happens before the first step of a phase.
    fn enter_phase(&mut self) -> Result<Option<MaskEmbedding>> {
        let Some(Place { phase, phase_step, .. }) = self.recipe.at(self.step) else {
            return Ok(None);
        };
        let diffuses = phase.objective.is_diffusion();
        // Norms differ between objectives, and between a warm-up and what follows it.
        if phase_step == 0 || (diffuses && phase_step == phase.corruption_warmup) {
            self.history.forget();
        }
        let before = self.step.checked_sub(1).and_then(|step| self.recipe.at(step));
        let switches = phase_step == 0
            && diffuses
            && before.is_none_or(|place| !place.phase.objective.is_diffusion());
        switches.then(|| start::mask_embedding(&self.model, self.mask_id)).transpose()
    }

    /// One optimiser step: lay out examples, add up gradients over micro-batches, clip, update.
    pub fn train_step(&mut self) -> Result<(Metrics, Verdict)> {
        let start = Instant::now();
        let Some(place) = self.recipe.at(self.step) else {
            bail!("the run has done all of its {} steps", self.step)
        };
        let settings = &self.recipe.optimizer;
        let (plan, phase) = (self.plan(place), place.phase);
        let first = place.sequences + self.history.passed_over;
        let examples = plan.examples(&self.data, first);
        let mask = plan.mask();
        let (gradients, parts) =
            batch::gradients(&self.model, &self.recipe, &examples, mask, || {});
        let lr = phase.learning_rate().lr(place.phase_step);
        let limit = self.history.limit(&self.recipe.guard);
        let norm = self.optimizer.step(&self.model, &gradients, settings, lr, limit)?;
        drop(gradients);
        let (mut loss, mut ce) = (0.0, ByRate::default());
        for Reported { loss: share, per_row, rates } in parts {
            loss += f64::from(share.item()?);
            ce.add(&per_row.to_vec()?, &rates);
        }
        let norm = f64::from(norm.to_vec()?[0]);
        let verdict = self.history.judge(&self.recipe.guard, norm);
        let tokens = self.recipe.sequences_of_a_step(phase) * self.recipe.data.length as u64;
        let seconds = start.elapsed().as_secs_f64();
        let (config, frozen) = (self.model.config(), self.recipe.lora.is_some());
        let operations: f64 = examples
            .iter()
            .map(|e| flops::of_sequence(config, mask, e.spans.len(), e.n_supervised(), frozen))
            .sum();
        let warm = phase.objective.is_diffusion();
        let u_max = u_max(place.phase_step, phase.corruption_warmup, phase.u_init);
        self.step += 1;
        let metrics = Metrics {
            step: self.step,
            phase: phase.name().to_owned(),
            loss,
            grad_norm: norm,
            lr: f64::from(lr),
            tokens_per_second: tokens as f64 / seconds,
            tokens: (place.sequences + self.recipe.sequences_of_a_step(phase))
                * self.recipe.data.length as u64,
            ce_per_masked: ce.mean(),
            u_max: u_max.filter(|_| warm).map(f64::from),
            block_length: phase.decoded_block(place.phase_step),
            ce_by_rate: ce.means(),
            flop_utilisation: self.device_flops.map(|most| operations / seconds / most),
            peak_bytes: self.model.gpu().memory().peak,
            skipped: match &verdict {
                Verdict::Taken => None,
                Verdict::Skipped(why) | Verdict::GoBack(why) => Some(why.clone()),
            },
        };
        if let Some(why) = &metrics.skipped {
            self.keep_batch(&metrics, why, &examples, first)?;
        }
        Ok((metrics, verdict))
    }

    /// Runs a batch that a step failed on again, with the model as it stands, and moves nothing.
    pub fn replay(&self, batch: &FailedBatch) -> Result<Replay> {
        let place = batch.step.checked_sub(1).and_then(|step| self.recipe.at(step));
        let place = place.context("the batch is of a step that this recipe does not have")?;
        let vocabulary = self.model.config().vocab_size;
        ensure!(batch.fits(vocabulary), "the batch is damaged, or of another model");
        let mask = self.plan(place).mask();
        let (gradients, parts) =
            batch::gradients(&self.model, &self.recipe, &batch.examples, mask, || {});
        let (mut loss, mut ce) = (0.0, Vec::new());
        for Reported { loss: share, per_row, .. } in parts {
            loss += f64::from(share.item()?);
            ce.extend(per_row.to_vec()?);
        }
        let grad_norm = f64::from(self.optimizer.norm(&self.model, &gradients)?);
        let mut first = 0;
        let of_sequence = |e: &Example| {
            let rows = &ce[first..first + e.n_supervised()];
            first += rows.len();
            let sum: f64 = rows.iter().map(|&c| f64::from(c)).sum();
            (!rows.is_empty()).then(|| sum / rows.len() as f64)
        };
        let sequences = batch.examples.iter().map(of_sequence).collect();
        Ok(Replay { after: self.step, loss, grad_norm, sequences })
    }

    fn plan<'a>(&self, place: Place<'a>) -> StepPlan<'a> {
        let (seed, mask_id) = (self.recipe.seed, self.mask_id);
        let batch = self.recipe.optimizer.batch;
        StepPlan { place, step: self.step, batch, seed, mask_id }
    }

    /// Keeps what a step failed on, to look at it and to try it again.
    fn keep_batch(
        &self,
        metrics: &Metrics,
        why: &str,
        examples: &[Example],
        first: u64,
    ) -> Result<()> {
        let folder = self.run.join("skipped");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let batch = FailedBatch {
            step: metrics.step,
            why: why.to_owned(),
            loss: metrics.loss,
            grad_norm: metrics.grad_norm,
            first_sequence: first,
            texts: examples.iter().map(|e| self.tokenizer.decode(&e.tokens, false)).collect(),
            examples: examples.to_vec(),
        };
        let path = folder.join(format!("step-{:08}.json", metrics.step));
        write_atomically(&path, &serde_json::to_vec(&batch)?)
    }

    /// Back to the last checkpoint, and from there on with the text behind the step that failed.
    fn go_back(&mut self, why: &str) -> Result<u64> {
        let failed = self.step;
        let again = "lower the learning rate, lengthen its warm-up or the corruption's, or look at the batches in \
                     skipped/ of the run";
        let Some((_, place)) = checkpoint::list(&self.run)?.pop() else {
            bail!("step {failed} failed ({why}), and there is no checkpoint to go back to; {again}")
        };
        if self.history.rollbacks >= self.recipe.guard.rollbacks {
            bail!(
                "step {failed} failed ({why}), after going back {} times; {again}",
                self.history.rollbacks
            );
        }
        let state = checkpoint::state(&place)?;
        checkpoint::restore(&place, &state, &self.model, &mut self.optimizer)?;
        let cursor = |step| self.recipe.at(step).map_or(0, |place| place.sequences);
        let passed_over = self.history.passed_over + cursor(failed) - cursor(state.step);
        let rollbacks = self.history.rollbacks + 1;
        self.history = state.history;
        self.history.went_back(rollbacks, passed_over);
        self.step = state.step;
        self.tensorboard = TensorBoard::open(&self.run.join("tensorboard"), self.step)?;
        Ok(self.step)
    }

    /// Measures held-out text, keeps the best model, and lets it write.
    fn measure(&mut self, hear: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>) -> Result<()> {
        let recipe = self.recipe.clone();
        let Some(place) = recipe.at(self.step - 1) else { return Ok(()) };
        // Step 0 keys the noise: each time the same tokens are hidden.
        let plan = StepPlan { step: 0, ..self.plan(place) };
        let n = self.recipe.validation.sequences;
        if let Some(data) = self.held_out.as_ref().filter(|_| n > 0) {
            let all = validate(&self.recipe, &self.model, data, &plan, n, self.step)?;
            for entry in &all {
                self.validation.write(entry)?;
                self.tensorboard.validation(entry)?;
            }
            let phase = recipe.phase.iter().position(|p| std::ptr::eq(p, place.phase));
            let loss = all.last().map(|v| v.loss).filter(|l| l.is_finite());
            if let (Some(phase), Some(loss)) = (phase, loss)
                // A loss of another objective says nothing beside this one's.
                && self.best.is_none_or(|(p, before)| p != phase || loss < before)
            {
                self.best = Some((phase, loss));
                self.name_objective(place);
                checkpoint::save_best(&self.run, &self.model, &self.tokenizer, &recipe)?;
            }
            let _ = hear(Event::Validated(&all));
        }
        for sample in samples(&self.recipe, &self.model, &self.tokenizer, &plan, self.step)? {
            self.samples.write(&sample)?;
            self.tensorboard.sample(&sample)?;
            let _ = hear(Event::Sampled(&sample));
        }
        Ok(())
    }

    /// The model's configuration says how it was trained.
    fn name_objective(&mut self, place: Place<'_>) {
        if let Some(decoding) = place.phase.decoding(place.phase_step, self.mask_id) {
            decoding.apply(self.model.config_mut());
        }
    }

    /// Writes a checkpoint of the steps done so far, and the curve.
    pub fn save(&mut self) -> Result<PathBuf> {
        let recipe = self.recipe.clone();
        if let Some(place) = recipe.at(self.step.saturating_sub(1)) {
            self.name_objective(place);
        }
        let state = TrainerState {
            step: self.step,
            updates: self.optimizer.updates,
            logs: LogBytes {
                metrics: self.metrics.synced()?,
                validation: self.validation.synced()?,
                samples: self.samples.synced()?,
            },
            history: self.history.clone(),
            best: self.best,
            recipe,
            dataset: self.dataset,
            base: self.base,
        };
        self.tensorboard.flush()?;
        let place =
            checkpoint::save(&self.run, &self.model, &self.optimizer, &self.tokenizer, &state)?;
        let points = read_metrics(&self.run.join("metrics.jsonl"))?;
        curve::draw(&points, "training", &self.run.join("curve.svg"))?;
        Ok(place)
    }

    /// Writes what was trained, or the mean of the last checkpoints if the recipe wants it.
    fn write_model(&self) -> Result<PathBuf> {
        let folder = self.run.join("model");
        let n = self.recipe.checkpoints.average;
        if n == 1 {
            checkpoint::write_model(&folder, &self.model, &self.tokenizer, &self.recipe)?;
        } else {
            let newest = checkpoint::list(&self.run)?.into_iter().rev().take(n);
            let places: Vec<PathBuf> = newest.map(|(_, place)| place).collect();
            average(&places, &folder, StoredType::F32, &mut |_| {})?;
        }
        Ok(folder)
    }

    /// Mean cross-entropy in nats per supervised token (a masked one, under diffusion) over up to `sequences` sequences
    /// of held-out text, under the recipe's last phase; `None` where the held-out text fills no sequence. Each call
    /// hides the same tokens, so that models can be compared.
    pub fn held_out_ce(&self, sequences: usize) -> Result<Option<f64>> {
        let Some(data) = &self.held_out else { return Ok(None) };
        let last = self.recipe.total_steps() - 1;
        let place = self.recipe.at(last).context("a recipe has steps")?;
        let plan = StepPlan { step: 0, ..self.plan(place) };
        let all = validate(&self.recipe, &self.model, data, &plan, sequences, self.step)?;
        Ok(all.last().map(|v| v.ce))
    }

    /// Tells how many operations a second the device does at most, so that metrics can say what share of them was used.
    pub fn set_device_flops(&mut self, flops: f64) {
        self.device_flops = Some(flops);
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

/// Keeps other processes out of the run; the system lets go of it when this one ends, however it ends.
fn lock(run: &Path) -> Result<File> {
    let path = run.join(".lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!(
                "another process trains in {}; wait for it, or name another folder",
                run.display()
            )
        }
        // Some network file systems have no locks.
        Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(e)) => {
            Err(e).with_context(|| format!("locking {}", path.display()))
        }
    }
}

/// Cross-entropies, together and by mask rate.
#[derive(Default)]
struct ByRate {
    sum: f64,
    rows: usize,
    buckets: [(f64, usize); RATE_BUCKETS],
}

impl ByRate {
    fn add(&mut self, ce: &[f32], rates: &[f32]) {
        self.sum += ce.iter().map(|&c| f64::from(c)).sum::<f64>();
        self.rows += ce.len();
        for (&ce, &rate) in ce.iter().zip(rates) {
            let bucket = (rate * RATE_BUCKETS as f32).ceil() as usize;
            let (sum, rows) = &mut self.buckets[bucket.clamp(1, RATE_BUCKETS) - 1];
            *sum += f64::from(ce);
            *rows += 1;
        }
    }

    fn mean(&self) -> Option<f64> {
        (self.rows > 0).then(|| self.sum / self.rows as f64)
    }

    /// Of each bucket; nothing if no rates were given.
    fn means(&self) -> Vec<Option<f64>> {
        let mean = |&(sum, rows): &(f64, usize)| (rows > 0).then(|| sum / rows as f64);
        let means: Vec<_> = self.buckets.iter().map(mean).collect();
        if means.iter().any(Option::is_some) { means } else { Vec::new() }
    }
}
