//! Checkpoints: a Hugging Face folder with the trainer's state beside it, written next to its place and renamed, so
//! that a kill at any moment leaves the previous one intact.
//!
//!   checkpoints/step-00000100/{config.json, model.safetensors, tokenizer.json, optimizer.safetensors, trainer.json}
//!   checkpoints/best/{config.json, model.safetensors, tokenizer.json}
//!
//! Where an adapter is trained, adapter_config.json and adapter_model.safetensors stand for the model.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use demask_engine::gpu::Gpu;
use demask_engine::model::{Llama, Lora, Precision, StoredType, Tokenizer, Weights, hub};
use demask_engine::tensor::{DType, Tensor};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, View};
use serde::{Deserialize, Serialize};

use crate::disk::{put_folder, settle};
use crate::guard::History;
use crate::optim::OptimizerState;
use crate::recipe::Recipe;

/// The host's part of the state. The data cursor and the noise are functions of the step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Steps done.
    pub step: u64,
    /// Optimiser updates done.
    pub updates: u64,
    /// Bytes of the run's logs when this was written; a resumed run continues them from there.
    pub logs: LogBytes,
    /// Gradient norms, and what was skipped.
    pub history: History,
    /// Phase and validation loss of checkpoints/best.
    pub best: Option<(usize, f64)>,
    /// What was being trained; another recipe is refused on resume.
    pub recipe: Recipe,
    /// Fingerprint of the dataset; another one is refused too.
    pub dataset: u64,
    /// Fingerprint of the weights under an adapter, which no checkpoint holds; others are refused too.
    pub base: Option<u64>,
}

/// Bytes of a run's logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogBytes {
    /// metrics.jsonl
    pub metrics: u64,
    /// validation.jsonl
    pub validation: u64,
    /// samples.jsonl
    pub samples: u64,
}

/// Writes the state after `state.step` steps under `run`/checkpoints and removes old ones.
pub fn save(
    run: &Path,
    model: &Llama,
    optimizer: &OptimizerState,
    tokenizer: &Tokenizer,
    state: &TrainerState,
) -> Result<PathBuf> {
    let name = format!("step-{:08}", state.step);
    let place = put(run, &name, &|fresh| {
        write_model(fresh, model, tokenizer, &state.recipe)?;
        write_moments(&fresh.join("optimizer.safetensors"), model, optimizer)?;
        let path = fresh.join("trainer.json");
        fs::write(&path, serde_json::to_vec_pretty(state)?)?;
        Ok(File::open(&path)?.sync_all()?)
    })?;
    let all = list(run)?;
    for (_, old) in all.iter().rev().skip(state.recipe.checkpoints.keep) {
        fs::remove_dir_all(old)
            .with_context(|| format!("cannot remove the old checkpoint {}", old.display()))?;
    }
    Ok(place)
}

/// Writes the model alone as checkpoints/best.
pub fn save_best(
    run: &Path,
    model: &Llama,
    tokenizer: &Tokenizer,
    recipe: &Recipe,
) -> Result<PathBuf> {
    put(run, "best", &|fresh| write_model(fresh, model, tokenizer, recipe))
}

/// Writes what was trained: a Hugging Face folder, or an adapter's in PEFT's format; with the tokenizer.
pub fn write_model(
    folder: &Path,
    model: &Llama,
    tokenizer: &Tokenizer,
    recipe: &Recipe,
) -> Result<()> {
    let Some(lora) = model.adapter()? else {
        return Ok(model.save(folder, StoredType::F32, Some(tokenizer))?);
    };
    let base = recipe.model.from.as_deref().context("an adapter has a base")?;
    // A name on the hub is what PEFT wants; a path is good from anywhere only if it is whole.
    let base = if hub::may_name(base) { base.to_owned() } else { std::path::absolute(base)? };
    lora.write(folder, &base.to_string_lossy())?;
    Ok(tokenizer.save(folder)?)
}

fn put(run: &Path, name: &str, fill: &dyn Fn(&Path) -> Result<()>) -> Result<PathBuf> {
    let folder = run.join("checkpoints");
    let place = folder.join(name);
    put_folder(&folder, name, fill).with_context(|| {
        let _ = settle(&folder);
        format!(
            "cannot write the checkpoint {}; the previous one is intact: make room and resume",
            place.display()
        )
    })?;
    Ok(place)
}

/// Clears up behind a killed run.
pub fn recover(run: &Path) -> Result<()> {
    let folder = run.join("checkpoints");
    settle(&folder).with_context(|| format!("cannot clear up in {}", folder.display()))
}

/// Complete checkpoints of a run by step, oldest first.
pub fn list(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let folder = run.join("checkpoints");
    let mut found = Vec::new();
    if !folder.exists() {
        return Ok(found);
    }
    let entries = fs::read_dir(&folder)
        .with_context(|| format!("cannot list the checkpoints in {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if let Some(step) = name.strip_prefix("step-").and_then(|s| s.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// The host's part of a checkpoint.
pub fn state(place: &Path) -> Result<TrainerState> {
    let path = place.join("trainer.json");
    let text = fs::read_to_string(&path).with_context(|| {
        format!("{}: no readable trainer state; is it a checkpoint?", path.display())
    })?;
    serde_json::from_str(&text).with_context(|| format!("{}", path.display()))
}

/// Reads a checkpoint back exactly as it was written.
pub fn load(gpu: &Gpu, place: &Path) -> Result<(Llama, OptimizerState, Tokenizer)> {
    let state = state(place)?;
    let (model, tokenizer) = match (&state.recipe.lora, &state.recipe.model.from) {
        (Some(settings), Some(base)) => {
            let model = Llama::load(gpu, base, settings.base)?.adapted(&Lora::read(place)?)?;
            let tokenizer = Tokenizer::from_folder(place, model.config())?;
            (model.trainable(), tokenizer)
        }
        _ => {
            let model = Llama::load(gpu, place, Precision::F32)?.trainable();
            let tokenizer = Tokenizer::for_model(place, model.config())?;
            (model, tokenizer)
        }
    };
    let mut optimizer = OptimizerState::new(&model, &state.recipe.optimizer);
    optimizer.updates = state.updates;
    read_moments(&place.join("optimizer.safetensors"), &model, &optimizer)?;
    gpu.sync()?;
    Ok((model, optimizer, tokenizer))
}

/// Puts a checkpoint of this run in the place of what its model and optimiser hold, so that no memory is taken twice.
pub fn restore(
    place: &Path,
    state: &TrainerState,
    model: &Llama,
    optimizer: &mut OptimizerState,
) -> Result<()> {
    if state.recipe.lora.is_some() {
        model.overwrite_adapter(&Lora::read(place)?)?;
    } else {
        let (_, weights) = Weights::open(place)?;
        for parameter in model.parameters() {
            let mut first = 0;
            for shard in &parameter.shards {
                let rows = first..first + shard.shape()[0];
                first = rows.end;
                shard.overwrite(&weights.rows_f32(&parameter.name, rows)?);
            }
        }
    }
    optimizer.updates = state.updates;
    read_moments(&place.join("optimizer.safetensors"), model, optimizer)?;
    Ok(model.gpu().sync()?)
}

/// The optimiser's tensors with their names in the file.
fn moments<'a>(model: &Llama, optimizer: &'a OptimizerState) -> Vec<(String, &'a Tensor)> {
    let mut all = Vec::new();
    for (parameter, shards) in model.trained().iter().zip(&optimizer.moments) {
        for (i, moments) in shards.iter().enumerate() {
            let named = moments.tensors().into_iter();
            all.extend(named.map(|(part, t)| (format!("{}.{i}.{part}", parameter.name), t)));
        }
    }
    all
}

fn stored_type(tensor: &Tensor) -> Dtype {
    if tensor.dtype() == DType::U32 { Dtype::U32 } else { Dtype::F32 }
}

/// A tensor that is read from the device when its turn to be written comes, so that one at a time is in memory.
struct OnDevice<'a> {
    tensor: &'a Tensor,
    /// What reading met; the format's trait has no place for it.
    fault: &'a RefCell<Option<demask_engine::Error>>,
}

impl View for OnDevice<'_> {
    fn dtype(&self) -> Dtype {
        stored_type(self.tensor)
    }

    fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = self.tensor.to_bytes().unwrap_or_else(|fault| {
            self.fault.borrow_mut().get_or_insert(fault);
            vec![0; self.data_len()]
        });
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        4 * self.tensor.numel()
    }
}

fn write_moments(path: &Path, model: &Llama, optimizer: &OptimizerState) -> Result<()> {
    let fault = RefCell::new(None);
    let all = moments(model, optimizer);
    let views = all.iter().map(|(name, tensor)| (name, OnDevice { tensor, fault: &fault }));
    safetensors::serialize_to_file(views, None, path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    fault.into_inner().map_or(Ok(()), Err)?;
    Ok(File::open(path)?.sync_all()?)
}

fn read_moments(path: &Path, model: &Llama, optimizer: &OptimizerState) -> Result<()> {
    let map = || -> std::io::Result<Mmap> {
        // SAFETY: checkpoints are written under another name and never changed in place.
        unsafe { Mmap::map(&File::open(path)?) }
    };
    let bytes = map().with_context(|| format!("cannot read {}", path.display()))?;
    let file = SafeTensors::deserialize(&bytes).with_context(|| format!("{}", path.display()))?;
    for (name, tensor) in moments(model, optimizer) {
        let view = file.tensor(&name).with_context(|| {
            format!(
                "{}: {name}; moments are kept per row shard, so resume on a device with the same \
                 binding limit",
                path.display()
            )
        })?;
        ensure!(
            view.dtype() == stored_type(tensor) && view.shape() == &**tensor.shape(),
            "{}: {name} is {:?} {:?}, expected {:?} {}",
            path.display(),
            view.dtype(),
            view.shape(),
            stored_type(tensor),
            tensor.shape()
        );
        tensor.overwrite(view.data());
    }
    Ok(())
}

/// Refuses to resume under another recipe, and shows what differs.
pub fn same_recipe(before: &Recipe, now: &Recipe) -> Result<()> {
    if before == now {
        return Ok(());
    }
    let (before, now) = (toml::to_string_pretty(before)?, toml::to_string_pretty(now)?);
    let gone = before.lines().filter(|l| !now.lines().any(|n| n == *l)).map(|l| format!("- {l}"));
    let new = now.lines().filter(|l| !before.lines().any(|b| b == *l)).map(|l| format!("+ {l}"));
    bail!(
        "the recipe differs from the one this run was started with; start another run, or undo:\n{}",
        gone.chain(new).collect::<Vec<_>>().join("\n")
    )
}
