//! Writing a model as a Hugging Face folder that transformers loads unchanged. Not here: reading
//! (`weights.rs`).
//!
//! Every file is written under a temporary name beside its place, synced, and renamed when all are
//! complete, so a crash leaves the old model or the new one, or at worst old weights beside new
//! configuration of the same folder during the few renames. Weights are streamed; at most one
//! caller's chunk is in memory.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use ::safetensors::Dtype;
use ::safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Value, json};

use super::config::{LlamaConfig, generation};
use super::weights::StoredType;
use crate::{Error, Result};

/// A shard is closed before it passes this many bytes of tensors, as transformers does.
const SHARD_BYTES: u64 = 5_000_000_000;

/// One parameter to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct SaveTensor {
    /// HF name, one of [`LlamaConfig::parameters`].
    pub name: String,
    /// Its shape in [`LlamaConfig::parameters`].
    pub shape: Vec<usize>,
    /// `F32`, `F16` or `BF16`.
    pub dtype: StoredType,
}

/// Takes the next bytes of the tensor being written.
pub type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// Writes `config.json`, `generation_config.json`, the weights (`model.safetensors`, or shards and
/// index above 5 GB) and `files` (name and contents, as from `Tokenizer::files`) into `dir`, which
/// is made if need be.
///
/// `tensors` are exactly the configuration's parameters, in any order. `fill` is called once for
/// each, and hands all of its little-endian bytes to the sink in row order, in chunks of any size.
/// Weight files of an earlier save in `dir` that the new ones do not replace are removed.
pub fn save_model(
    dir: &Path,
    config: &LlamaConfig,
    tensors: &[SaveTensor],
    fill: impl FnMut(&SaveTensor, &mut Sink) -> Result<()>,
    files: &[(String, Vec<u8>)],
) -> Result<()> {
    save_sharded(dir, config, tensors, fill, files, SHARD_BYTES)
}

/// Writes small files (name and contents) into `dir`, which must exist, all or none.
pub(crate) fn save_files(dir: &Path, files: &[(String, Vec<u8>)]) -> Result<()> {
    let mut staged = Staged { dir, files: vec![] };
    for (name, contents) in files {
        staged.write_file(name, contents)?;
    }
    staged.publish(false)
}

/// Writes one file, whole or not at all.
pub(crate) fn write_file(
    path: &Path,
    body: impl FnOnce(&mut BufWriter<File>, &Path) -> Result<()>,
) -> Result<()> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        return Err(Error::model(path, "is no name of a file; give one"));
    };
    let mut staged = Staged { dir, files: vec![] };
    staged.write(name, body)?;
    staged.publish(false)
}

fn save_sharded(
    dir: &Path,
    config: &LlamaConfig,
    tensors: &[SaveTensor],
    mut fill: impl FnMut(&SaveTensor, &mut Sink) -> Result<()>,
    files: &[(String, Vec<u8>)],
    shard_bytes: u64,
) -> Result<()> {
    config.validate(&dir.join("config.json"))?;
    check_parameters(dir, config, tensors)?;
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let shards = plan_shards(tensors, shard_bytes);
    let mut staged = Staged { dir, files: vec![] };
    let mut weight_map = BTreeMap::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", number + 1),
        };
        staged.write(&name, |out, path| write_shard(out, path, shard, &mut fill))?;
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), name.clone())));
    }
    if shards.len() > 1 {
        let total: u64 = tensors.iter().map(byte_length).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        staged.write_json("model.safetensors.index.json", &index)?;
    }
    staged.write_json("config.json", &config.to_json(main_dtype(tensors).torch_dtype()))?;
    staged.write_json(generation::FILE, &generation::to_json(config))?;
    for (name, contents) in files {
        staged.write_file(name, contents)?;
    }
    staged.publish(true)
}

/// The type of most bytes names the model's `torch_dtype`.
fn main_dtype(tensors: &[SaveTensor]) -> StoredType {
    let bytes_of =
        |dtype| tensors.iter().filter(|t| t.dtype == dtype).map(byte_length).sum::<u64>();
    let all = [StoredType::F32, StoredType::F16, StoredType::BF16];
    all.into_iter().max_by_key(|&dtype| bytes_of(dtype)).unwrap_or(StoredType::F32)
}

fn byte_length(tensor: &SaveTensor) -> u64 {
    tensor.shape.iter().map(|&n| n as u64).product::<u64>() * tensor.dtype.block_bytes() as u64
}

/// The tensors must be exactly the configuration's parameters.
fn check_parameters(dir: &Path, config: &LlamaConfig, tensors: &[SaveTensor]) -> Result<()> {
    let mut expected: HashMap<String, Vec<usize>> = config.parameters().into_iter().collect();
    for SaveTensor { name, shape, dtype } in tensors {
        match expected.remove(name) {
            Some(right) if right == *shape && dtype.is_float() => {}
            Some(right) => {
                let reason = format!(
                    "cannot save {name} as {dtype:?} {shape:?}; expected floats of shape {right:?}"
                );
                return Err(Error::model(dir, reason));
            }
            None => {
                let reason = format!(
                    "cannot save {name}: given twice, or not a parameter of this configuration"
                );
                return Err(Error::model(dir, reason));
            }
        }
    }
    match expected.keys().min() {
        Some(name) => Err(Error::model(dir, format!("cannot save without {name}"))),
        None => Ok(()),
    }
}

/// Cuts the tensors, in their order, into shards. Within a shard f32 comes first, so that every
/// tensor is aligned to its element.
fn plan_shards(tensors: &[SaveTensor], shard_bytes: u64) -> Vec<Vec<&SaveTensor>> {
    let mut shards = vec![vec![]];
    let mut used = 0;
    for tensor in tensors {
        let bytes = byte_length(tensor);
        if used > 0 && used + bytes > shard_bytes {
            shards.push(vec![]);
            used = 0;
        }
        used += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    for shard in &mut shards {
        shard.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.block_bytes()));
    }
    shards
}

fn write_shard(
    out: &mut BufWriter<File>,
    path: &Path,
    shard: &[&SaveTensor],
    fill: &mut impl FnMut(&SaveTensor, &mut Sink) -> Result<()>,
) -> Result<()> {
    let mut offset = 0;
    let mut infos = vec![];
    for tensor in shard {
        let dtype = match tensor.dtype {
            StoredType::F16 => Dtype::F16,
            StoredType::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        };
        let end = offset + byte_length(tensor) as usize;
        infos.push((
            tensor.name.clone(),
            TensorInfo { dtype, shape: tensor.shape.clone(), data_offsets: (offset, end) },
        ));
        offset = end;
    }
    // transformers refuses a file without this mark.
    let mark = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata =
        Metadata::new(Some(mark), infos).map_err(|e| Error::model(path, e.to_string()))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| Error::io(path, e))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let io = |e| Error::io(path, e);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    out.write_all(&header).map_err(io)?;
    for tensor in shard {
        let length = byte_length(tensor);
        let mut written = 0;
        fill(tensor, &mut |chunk: &[u8]| {
            written += chunk.len() as u64;
            out.write_all(chunk).map_err(io)
        })?;
        if written != length {
            let reason = format!(
                "{} takes {length} bytes, but {written} were given to be saved",
                tensor.name
            );
            return Err(Error::model(path, reason));
        }
    }
    Ok(())
}

/// Files written under temporary names; those not yet published are removed when this is dropped.
struct Staged<'a> {
    dir: &'a Path,
    /// Final names.
    files: Vec<String>,
}

impl Staged<'_> {
    fn temporary(&self, name: &str) -> PathBuf {
        self.dir.join(format!(".{name}.{}.tmp", std::process::id()))
    }

    fn write(
        &mut self,
        name: &str,
        body: impl FnOnce(&mut BufWriter<File>, &Path) -> Result<()>,
    ) -> Result<()> {
        let path = self.temporary(name);
        self.files.push(name.to_owned());
        let io = |e| Error::io(&path, e);
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(io)?);
        body(&mut out, &path)?;
        let file = out.into_inner().map_err(|e| Error::io(&path, e.error()))?;
        file.sync_all().map_err(io)
    }

    fn write_json(&mut self, name: &str, value: &Value) -> Result<()> {
        self.write_file(name, format!("{value:#}\n").as_bytes())
    }

    fn write_file(&mut self, name: &str, contents: &[u8]) -> Result<()> {
        if name.contains(['/', '\\']) || self.files.iter().any(|other| other == name) {
            return Err(Error::model(
                self.dir,
                format!("file {name:?} cannot be saved under that name, or twice"),
            ));
        }
        self.write(name, |out, path| out.write_all(contents).map_err(|e| Error::io(path, e)))
    }

    /// Moves every file into place, and syncs the folder. After a whole model, weight files that
    /// are not of it are removed: a stale `model.safetensors` would be read instead of new shards.
    fn publish(mut self, whole_model: bool) -> Result<()> {
        let names = std::mem::take(&mut self.files);
        for (done, name) in names.iter().enumerate() {
            let path = self.dir.join(name);
            if let Err(e) = std::fs::rename(self.temporary(name), &path) {
                self.files = names[done..].to_vec();
                return Err(Error::io(path, e));
            }
        }
        for entry in std::fs::read_dir(self.dir).map_err(|e| Error::io(self.dir, e))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if whole_model && is_weight_file(&name) && !names.contains(&name) {
                std::fs::remove_file(entry.path()).map_err(|e| Error::io(entry.path(), e))?;
            }
        }
        // A rename is durable once its folder is; only unix lets a folder be opened for that.
        #[cfg(unix)]
        File::open(self.dir).and_then(|dir| dir.sync_all()).map_err(|e| Error::io(self.dir, e))?;
        Ok(())
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        for name in &self.files {
            // Best effort: the error that led here is the one to report.
            let _ = std::fs::remove_file(self.temporary(name));
        }
    }
}

/// `model.safetensors`, its index, or `model-00001-of-00002.safetensors`.
fn is_weight_file(name: &str) -> bool {
    if name == "model.safetensors" || name == "model.safetensors.index.json" {
        return true;
    }
    let numbers = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    numbers.and_then(|rest| rest.split_once("-of-")).is_some_and(|(n, of)| digits(n) && digits(of))
}

#[cfg(test)]
mod tests;
