//! Weights of a Llama at rest: a Hugging Face folder (safetensors, sharded or not) or a GGUF file,
//! mapped and handed out by rows under Hugging Face names. Not here: the GPU, and writing
//! (`save.rs`).
//!
//! Files are read as if they were hostile. Opening allocates at most 128 MiB beside the mapped
//! files, whatever they claim: headers and directories are capped, counts are never trusted, and
//! every tensor is checked against the configuration and against the end of its file.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use ::safetensors::Dtype;
use memmap2::Mmap;

use super::config::LlamaConfig;
use super::gguf::llama::{self, ROPE_FREQS, RowOrder};
use super::gguf::split::Parts;
use super::lora::{EMBEDDING, HEAD};
use crate::{Error, Result};

mod block32;
mod kquant;
pub(crate) mod quant;
mod safetensors;
pub(crate) mod source;

pub use quant::{Fidelity, StoredType};
use source::{Source, locate, map_file, read_capped};

/// Largest `model.safetensors.index.json`, in bytes. A thousand layers need 1 MB.
const MAX_INDEX_BYTES: u64 = 4 << 20;
/// Most shards of one model.
const MAX_SHARDS: usize = 1024;
/// Most tensors of one model, extras included; a thousand layers have 9,219.
const MAX_TENSORS: usize = 1 << 16;

/// All weights of one model, under the names of [`LlamaConfig::parameters`]. `Send` and `Sync`;
/// rows may be read from several threads.
pub struct Weights {
    path: PathBuf,
    files: Vec<Mmap>,
    tensors: HashMap<String, Tensor>,
}

/// Where one tensor lies. `start + bytes of shape` is inside the file.
struct Tensor {
    file: usize,
    start: usize,
    dtype: StoredType,
    shape: Vec<usize>,
    order: RowOrder,
}

/// A tensor found in a file, before it is matched with the configuration.
struct Found {
    name: String,
    /// The type's name where it is not supported.
    dtype: std::result::Result<StoredType, String>,
    shape: Vec<usize>,
    file: usize,
    start: usize,
    order: RowOrder,
}

impl Weights {
    /// Opens a Hugging Face folder (`config.json` beside `model.safetensors` or its shards and
    /// index), a `.gguf` file or any part of a split one, or a folder with exactly one such model.
    /// Every parameter is present with its shape afterwards. No file may shrink while it is open.
    pub fn open(path: &Path) -> Result<(LlamaConfig, Self)> {
        match locate(path)? {
            Source::Folder(dir) => Self::open_folder(&dir),
            Source::Gguf(file) => Self::open_gguf(&file),
        }
    }

    fn open_folder(dir: &Path) -> Result<(LlamaConfig, Self)> {
        let mut config = LlamaConfig::read(dir)?;
        let single = dir.join("model.safetensors");
        let mut found = vec![];
        let mut files = vec![];
        // transformers prefers the single file too.
        if single.exists() {
            files.push(read_shard(&single, 0, &mut found)?);
        } else {
            let index = dir.join("model.safetensors.index.json");
            let shards = read_index(&index)?;
            for (number, (shard, names)) in shards.iter().enumerate() {
                let before = found.len();
                files.push(read_shard(&dir.join(shard), number, &mut found)?);
                let same = found.len() - before == names.len()
                    && found[before..].iter().all(|tensor| names.contains(&tensor.name));
                if !same {
                    let reason =
                        format!("its weight_map and the header of {shard} name different tensors");
                    return Err(Error::model(&index, reason));
                }
            }
        }
        if config.tie_word_embeddings {
            settle_tie(&mut config, &files, &mut found)?;
        }
        let weights = Self::matched(dir, &config, files, found)?;
        Ok((config, weights))
    }

    fn open_gguf(path: &Path) -> Result<(LlamaConfig, Self)> {
        let parts = Parts::open(path)?;
        let mut found = vec![];
        let gguf = parts.gguf()?;
        let config = llama::config(&gguf)?;
        let architecture = gguf.text("general.architecture")?.unwrap_or_default();
        for tensor in gguf.tensors().iter().filter(|tensor| tensor.name != ROPE_FREQS) {
            let Some(name) = llama::hf_name(tensor.name) else {
                let reason = format!(
                    "tensor {:?} belongs to no plain Llama; this architecture is not supported",
                    tensor.name
                );
                return Err(Error::model(path, reason));
            };
            let order = llama::row_order(&name, architecture, &config);
            let (dtype, shape) = (Ok(tensor.dtype), tensor.shape.clone());
            let (file, start) = (tensor.file, tensor.start);
            found.push(Found { name, dtype, shape, file, start, order });
        }
        let weights = Self::matched(path, &config, parts.maps, found)?;
        Ok((config, weights))
    }

    /// Matches what the files hold with what the configuration expects.
    fn matched(
        path: &Path,
        config: &LlamaConfig,
        files: Vec<Mmap>,
        found: Vec<Found>,
    ) -> Result<Self> {
        let expected: HashMap<String, Vec<usize>> = config.parameters().into_iter().collect();
        let mut tensors = HashMap::new();
        for Found { name, dtype, shape, file, start, order } in found {
            let Some(right) = expected.get(&name) else {
                // Old checkpoints carry the frequencies.
                if name.ends_with(".rotary_emb.inv_freq") {
                    continue;
                }
                let reason = format!(
                    "tensor {name:?} of shape {shape:?} is not part of the model that config.json \
                     describes"
                );
                return Err(Error::model(path, reason));
            };
            if shape != *right {
                let reason = format!(
                    "tensor {name} has shape {shape:?}; the configuration asks for {right:?}"
                );
                return Err(Error::model(path, reason));
            }
            let dtype = dtype.map_err(|dtype| {
                Error::model(
                    path,
                    format!("tensor {name} is {dtype}; convert it to BF16, F16 or F32"),
                )
            })?;
            if tensors.insert(name.clone(), Tensor { file, start, dtype, shape, order }).is_some() {
                return Err(Error::model(path, format!("tensor {name} is stored twice")));
            }
        }
        let missing = config.parameters().into_iter().find(|(name, _)| !tensors.contains_key(name));
        if let Some((name, shape)) = missing {
            let reason = format!(
                "tensor {name} of shape {shape:?} is missing; fetch the files again, or correct \
                 config.json"
            );
            return Err(Error::model(path, reason));
        }
        Ok(Self { path: path.to_owned(), files, tensors })
    }

    /// The folder or GGUF file the weights come from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How a parameter is stored. Panics on a name that is not in [`LlamaConfig::parameters`].
    #[track_caller]
    pub fn dtype(&self, name: &str) -> StoredType {
        self.tensor(name).dtype
    }

    /// Shape of a parameter, `[rows, columns]` or `[rows]`.
    /// Panics on a name that is not in [`LlamaConfig::parameters`].
    #[track_caller]
    pub fn shape(&self, name: &str) -> &[usize] {
        &self.tensor(name).shape
    }

    /// Rows as f32, dequantised, in HF row order; `rows.len() × columns` values. A vector has one
    /// element a row.
    pub fn rows_f32(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let mut values = Vec::new();
        self.append_rows(name, rows, &mut values)?;
        Ok(values)
    }

    /// Appends what [`Weights::rows_f32`] gives.
    pub(crate) fn append_rows(
        &self,
        name: &str,
        rows: Range<usize>,
        values: &mut Vec<f32>,
    ) -> Result<()> {
        let bytes = self.rows_stored(name, rows)?;
        let dtype = self.tensors[name].dtype;
        values.reserve(bytes.len() / dtype.block_bytes() * dtype.block_elements());
        quant::dequantise(dtype, &bytes, values);
        Ok(())
    }

    /// Rows as little-endian F32, F16 or BF16 bytes (see [`Weights::dtype`]), in HF row order,
    /// without a copy where the file has that order; `None` for a quantised tensor.
    pub fn rows_bytes(&self, name: &str, rows: Range<usize>) -> Result<Option<Cow<'_, [u8]>>> {
        let bytes = self.rows_stored(name, rows)?;
        Ok(Some(bytes).filter(|_| self.tensors[name].dtype.is_float()))
    }

    /// Rows as stored, blocks of quantised types included, in HF row order.
    pub fn rows_stored(&self, name: &str, rows: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let Some(tensor) = self.tensors.get(name) else {
            return Err(Error::model(&self.path, format!("no parameter is named {name:?}")));
        };
        let n_rows = tensor.shape[0];
        if rows.start > rows.end || rows.end > n_rows {
            let reason = format!("rows {rows:?} of {name} were asked for, it has {n_rows}");
            return Err(Error::model(&self.path, reason));
        }
        // Rows hold whole blocks: checked when the file was opened.
        let columns: usize = tensor.shape[1..].iter().product();
        let row_bytes = columns / tensor.dtype.block_elements() * tensor.dtype.block_bytes();
        let data = &self.files[tensor.file][tensor.start..][..n_rows * row_bytes];
        if tensor.order == RowOrder::Same {
            return Ok(Cow::Borrowed(&data[rows.start * row_bytes..rows.end * row_bytes]));
        }
        let stored = rows.map(|row| tensor.order.stored_row(row) * row_bytes);
        Ok(Cow::Owned(stored.flat_map(|at| &data[at..at + row_bytes]).copied().collect()))
    }

    /// Lets the system have the memory back in which pages of a parameter lie; they are read again when they are
    /// needed. Of a model that has gone to the device nothing needs to stay on the host.
    pub fn forget(&self, name: &str) {
        if let Some(tensor) = self.tensors.get(name) {
            self.forget_rows(name, 0..tensor.shape[0]);
        }
    }

    /// The same for the rows that are stored there.
    pub(crate) fn forget_rows(&self, name: &str, stored: Range<usize>) {
        let Some(tensor) = self.tensors.get(name) else { return };
        let columns: usize = tensor.shape[1..].iter().product();
        let row_bytes = columns / tensor.dtype.block_elements() * tensor.dtype.block_bytes();
        let (start, bytes) = (tensor.start + stored.start * row_bytes, stored.len() * row_bytes);
        #[cfg(unix)]
        // SAFETY: the map is read-only and backed by the file, so a page that goes comes back as it was.
        let _ = unsafe {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            self.files[tensor.file].unchecked_advise_range(advice, start, bytes)
        };
        #[cfg(not(unix))]
        let _ = (start, bytes);
    }

    #[track_caller]
    fn tensor(&self, name: &str) -> &Tensor {
        match self.tensors.get(name) {
            Some(tensor) => tensor,
            None => panic!("{}: no parameter is named {name:?}", self.path.display()),
        }
    }
}

/// What a folder that says its head is tied to its embedding holds, read as transformers reads it: a head with values
/// of its own wins, a copy is left out, and a head alone is the embedding too.
fn settle_tie(config: &mut LlamaConfig, files: &[Mmap], found: &mut Vec<Found>) -> Result<()> {
    let place = |name: &str| found.iter().position(|tensor| tensor.name == name);
    let Some(head) = place(HEAD) else { return Ok(()) };
    let Some(embedding) = place(EMBEDDING) else {
        found[head].name = EMBEDDING.into();
        return Ok(());
    };
    let (a, b) = (&found[head], &found[embedding]);
    let same = a.shape == b.shape && a.dtype == b.dtype && {
        let bytes = |tensor: &Found| -> &[u8] {
            let elements: usize = tensor.shape.iter().product();
            let length = tensor.dtype.as_ref().map_or(0, |t| elements * t.block_bytes());
            &files[tensor.file][tensor.start..][..length]
        };
        bytes(a) == bytes(b)
    };
    if same {
        found.remove(head);
    } else {
        config.tie_word_embeddings = false;
    }
    Ok(())
}

/// Maps one safetensors file as number `file`, and adds its tensors to `found`.
fn read_shard(path: &Path, file: usize, found: &mut Vec<Found>) -> Result<Mmap> {
    let map = map_file(path)?;
    let header = safetensors::read_header(path, &map)?;
    if found.len() + header.tensors.len() > MAX_TENSORS {
        return Err(Error::model(
            path,
            format!("more than {MAX_TENSORS} tensors; is this a Llama?"),
        ));
    }
    for (name, info) in header.tensors {
        let dtype = match info.dtype {
            Dtype::F32 => Ok(StoredType::F32),
            Dtype::F16 => Ok(StoredType::F16),
            Dtype::BF16 => Ok(StoredType::BF16),
            other => Err(other.to_string()),
        };
        let start = header.data_start + info.data_offsets.0;
        found.push(Found { name, dtype, shape: info.shape, file, start, order: RowOrder::Same });
    }
    Ok(map)
}

/// The shards that `model.safetensors.index.json` names, and the tensors it expects in each.
fn read_index(path: &Path) -> Result<BTreeMap<String, BTreeSet<String>>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let bytes = read_capped(path, MAX_INDEX_BYTES)?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|e| {
        Error::model(
            path,
            format!("not a safetensors index ({e}); expected {{\"weight_map\": {{…}}}}"),
        )
    })?;
    let mut shards = BTreeMap::<String, BTreeSet<String>>::new();
    for (name, shard) in index.weight_map {
        // A shard lies beside its index: no folders, drives or parents.
        let plain = shard.ends_with(".safetensors") && !shard.contains(['/', '\\', ':', '\0']);
        if !plain {
            let reason = format!(
                "weight_map sends {name:?} to {shard:?}; expected the name of a .safetensors file \
                 beside it"
            );
            return Err(Error::model(path, reason));
        }
        shards.entry(shard).or_default().insert(name);
    }
    if shards.len() > MAX_SHARDS {
        return Err(Error::model(
            path,
            format!("names {} shards; at most {MAX_SHARDS} are accepted", shards.len()),
        ));
    }
    Ok(shards)
}

#[cfg(test)]
pub(crate) mod tests;

#[cfg(test)]
mod mutations;
