//! Checkpoints: a Hugging Face folder with the trainer's state beside it, written next to its place and renamed, so
//! that a kill at any moment leaves the previous one intact.
//!
//!   checkpoints/step-00000100/{config.json, model.safetensors, tokenizer.json, optimizer.safetensors, trainer.json}

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use demask_engine::gpu::Gpu;
use demask_engine::model::{Llama, Precision, StoredType, Tokenizer};
use demask_engine::tensor::Tensor;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::optim::OptimizerState;
use crate::recipe::Recipe;

/// Checkpoints that are kept: the newest, and the one before it in case the disk lied.
const KEPT: usize = 2;

/// The host's part of the state. The data cursor and the noise are functions of the step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrainerState {
    /// Steps done.
    pub step: u64,
    /// Optimiser updates done.
    pub updates: u64,
    /// Bytes of the metrics file when this was written; a resumed run continues it from there.
    pub metrics_bytes: u64,
    /// What was being trained; another recipe is refused on resume.
    pub recipe: Recipe,
}

/// Writes the state after `state.step` steps under `run`/checkpoints and removes old ones.
pub fn save(
    run: &Path,
    model: &Llama,
    optimizer: &OptimizerState,
    tokenizer: &Tokenizer,
    state: &TrainerState,
) -> Result<PathBuf> {
    let folder = run.join("checkpoints");
    let place = folder.join(format!("step-{:08}", state.step));
    let fresh = folder.join(".writing");
    if fresh.exists() {
        fs::remove_dir_all(&fresh)?;
    }
    let write = || -> Result<()> {
        fs::create_dir_all(&fresh)?;
        model.save(&fresh, StoredType::F32, Some(tokenizer))?;
        write_moments(&fresh.join("optimizer.safetensors"), model, optimizer)?;
        let path = fresh.join("trainer.json");
        fs::write(&path, serde_json::to_vec_pretty(state)?)?;
        File::open(&path)?.sync_all()?;
        File::open(&fresh)?.sync_all()?;
        if place.exists() {
            fs::remove_dir_all(&place)?;
        }
        fs::rename(&fresh, &place)?;
        File::open(&folder)?.sync_all()?;
        Ok(())
    };
    write().with_context(|| {
        format!(
            "cannot write the checkpoint {}; the previous one is intact: make room and resume",
            place.display()
        )
    })?;
    let all = list(run)?;
    for (_, old) in all.iter().rev().skip(KEPT) {
        fs::remove_dir_all(old)
            .with_context(|| format!("cannot remove the old checkpoint {}", old.display()))?;
    }
    Ok(place)
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

/// Reads a checkpoint back exactly as it was written.
pub fn load(gpu: &Gpu, place: &Path) -> Result<(Llama, OptimizerState, Tokenizer, TrainerState)> {
    let path = place.join("trainer.json");
    let text = fs::read_to_string(&path).with_context(|| {
        format!("{}: no readable trainer state; is it a checkpoint?", path.display())
    })?;
    let state: TrainerState =
        serde_json::from_str(&text).with_context(|| format!("{}", path.display()))?;
    let model = Llama::load(gpu, place, Precision::F32)?.trainable();
    let tokenizer = Tokenizer::for_model(place, model.config())?;
    let mut optimizer = OptimizerState::new(&model);
    optimizer.updates = state.updates;
    read_moments(&place.join("optimizer.safetensors"), &model, &optimizer)?;
    gpu.sync()?;
    Ok((model, optimizer, tokenizer, state))
}

/// Names of a shard's moments.
fn names(parameter: &str, shard: usize) -> [String; 2] {
    [format!("{parameter}.{shard}.m"), format!("{parameter}.{shard}.v")]
}

fn write_moments(path: &Path, model: &Llama, optimizer: &OptimizerState) -> Result<()> {
    let mut stored: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (parameter, shards) in model.parameters().iter().zip(&optimizer.moments) {
        for (i, moments) in shards.iter().enumerate() {
            for (name, tensor) in
                names(&parameter.name, i).into_iter().zip([&moments.m, &moments.v])
            {
                stored.push((name, tensor.shape().to_vec(), tensor.to_bytes()?));
            }
        }
    }
    let views = stored
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    File::open(path)?.sync_all()?;
    Ok(())
}

fn read_moments(path: &Path, model: &Llama, optimizer: &OptimizerState) -> Result<()> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file = SafeTensors::deserialize(&bytes).with_context(|| format!("{}", path.display()))?;
    for (parameter, shards) in model.parameters().iter().zip(&optimizer.moments) {
        for (i, moments) in shards.iter().enumerate() {
            for (name, tensor) in names(&parameter.name, i).iter().zip([&moments.m, &moments.v]) {
                let view = file.tensor(name).with_context(|| {
                    format!(
                        "{}: {name}; moments are kept per row shard, so resume on a device with the same \
                         binding limit",
                        path.display()
                    )
                })?;
                fill(tensor, &view).with_context(|| format!("{}: {name}", path.display()))?;
            }
        }
    }
    Ok(())
}

fn fill(tensor: &Tensor, view: &TensorView<'_>) -> Result<()> {
    ensure!(
        view.dtype() == Dtype::F32 && view.shape() == &**tensor.shape(),
        "is {:?} {:?}, expected f32 {}",
        view.dtype(),
        view.shape(),
        tensor.shape()
    );
    tensor.overwrite(view.data());
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
