//! Checkpoints: a Hugging Face folder with the trainer's state beside it, written next to its place and renamed, so
//! that a kill at any moment leaves the previous one intact.
//!
//!   checkpoints/step-00000100/{config.json, model.safetensors, tokenizer.json, optimizer.safetensors, trainer.json}
//!   checkpoints/best/{config.json, model.safetensors, tokenizer.json}

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use demask_engine::gpu::Gpu;
use demask_engine::model::{Llama, Precision, StoredType, Tokenizer, Weights};
use demask_engine::tensor::{DType, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

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
        model.save(fresh, StoredType::F32, Some(tokenizer))?;
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
pub fn save_best(run: &Path, model: &Llama, tokenizer: &Tokenizer) -> Result<PathBuf> {
    put(run, "best", &|fresh| Ok(model.save(fresh, StoredType::F32, Some(tokenizer))?))
}

/// Fills a folder beside its place and renames it.
fn put(run: &Path, name: &str, fill: &dyn Fn(&Path) -> Result<()>) -> Result<PathBuf> {
    let folder = run.join("checkpoints");
    let place = folder.join(name);
    let fresh = folder.join(format!(".writing-{name}"));
    let write = || -> Result<()> {
        clear(&folder)?;
        fs::create_dir_all(&fresh)?;
        fill(&fresh)?;
        File::open(&fresh)?.sync_all()?;
        if place.exists() {
            fs::remove_dir_all(&place)?;
        }
        fs::rename(&fresh, &place)?;
        Ok(File::open(&folder)?.sync_all()?)
    };
    write().with_context(|| {
        let _ = clear(&folder);
        format!(
            "cannot write the checkpoint {}; the previous one is intact: make room and resume",
            place.display()
        )
    })?;
    Ok(place)
}

/// Removes what an interrupted write left: it may fill the disk.
fn clear(folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
        if name.is_some_and(|name| name.starts_with(".writing")) {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

/// The mean of several models of one shape, weight by weight, in the place of `model`'s weights (LLaDA2.0 merges its
/// checkpoints).
pub fn average(model: &Llama, places: &[PathBuf]) -> Result<()> {
    ensure!(!places.is_empty(), "there is no checkpoint to average");
    let opened =
        places.iter().map(|place| Ok(Weights::open(place)?)).collect::<Result<Vec<_>>>()?;
    for (place, (config, _)) in places.iter().zip(&opened) {
        let (ours, theirs) = (model.config().parameters(), config.parameters());
        ensure!(ours == theirs, "{} has another shape; average models of one run", place.display());
    }
    for parameter in model.parameters() {
        let mut first = 0;
        for shard in &parameter.shards {
            let rows = first..first + shard.shape()[0];
            let mut mean: Vec<f64> = Vec::new();
            for (_, weights) in &opened {
                let values = weights.rows_f32(&parameter.name, rows.clone())?;
                mean.resize(values.len(), 0.0);
                mean.iter_mut().zip(values).for_each(|(m, v)| *m += f64::from(v));
            }
            let n = opened.len() as f64;
            let bytes: Vec<u8> = mean.iter().flat_map(|m| ((m / n) as f32).to_le_bytes()).collect();
            shard.overwrite(&bytes);
            first = rows.end;
        }
    }
    Ok(())
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
    let model = Llama::load(gpu, place, Precision::F32)?.trainable();
    let tokenizer = Tokenizer::for_model(place, model.config())?;
    let state = state(place)?;
    let mut optimizer = OptimizerState::new(&model, &state.recipe.optimizer);
    optimizer.updates = state.updates;
    read_moments(&place.join("optimizer.safetensors"), &model, &optimizer)?;
    gpu.sync()?;
    Ok((model, optimizer, tokenizer))
}

/// The optimiser's tensors with their names in the file.
fn moments<'a>(model: &Llama, optimizer: &'a OptimizerState) -> Vec<(String, &'a Tensor)> {
    let mut all = Vec::new();
    for (parameter, shards) in model.parameters().iter().zip(&optimizer.moments) {
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

fn write_moments(path: &Path, model: &Llama, optimizer: &OptimizerState) -> Result<()> {
    let mut stored = Vec::new();
    for (name, tensor) in moments(model, optimizer) {
        stored.push((name, tensor.shape().to_vec(), stored_type(tensor), tensor.to_bytes()?));
    }
    let views = stored
        .iter()
        .map(|(name, shape, dtype, bytes)| {
            Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?))
        })
        .collect::<Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    File::open(path)?.sync_all()?;
    Ok(())
}

fn read_moments(path: &Path, model: &Llama, optimizer: &OptimizerState) -> Result<()> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
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
