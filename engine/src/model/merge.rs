//! New models of old ones, on the host and row by row: a base with an adapter in its weights, the mean of checkpoints,
//! the same model in another type or format.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::config::LlamaConfig;
use super::gguf::write::write_gguf;
use super::hub;
use super::lora::{EMBEDDING, HEAD, Lora, LowRank, Replaced};
use super::parameter::saved_type;
use super::save::{SaveTensor, Sink, save_model};
use super::tokenizer::Tokenizer;
use super::weights::{StoredType, Weights};
use crate::tensor::stored::encode;
use crate::{Error, Result};

/// Rows of a weight that are in memory at once.
const ROWS: usize = 256;

/// Hears after each tensor what share is done.
pub type Hear<'a> = &'a mut dyn FnMut(f64);

/// Writes the model in `base` with the adapter in its weights to the folder `out`.
pub fn merge(
    base: &Path,
    lora: &Lora,
    out: &Path,
    dtype: StoredType,
    hear: Hear<'_>,
) -> Result<()> {
    let base = &hub::resolve(base)?;
    let (mut config, weights) = Weights::open(base)?;
    lora.check(&config)?;
    let files = tokenizer_files(base, &config)?;
    let tied = config.tie_word_embeddings;
    config.tie_word_embeddings &= !lora.unties(&config);
    lora.decoding.apply(&mut config);
    // Of the matrix that is being written; what it needs of the whole of it is found once.
    let mut module: Option<(String, LowRank)> = None;
    let rows = |name: &str, range: Range<usize>| {
        let replaced = lora.replaced.get(name);
        let columns = weights.shape(source(name, tied))[1..].iter().product::<usize>();
        let mut values = match replaced {
            Some(Replaced { rows: None, values, .. }) => {
                values[range.start * columns..range.end * columns].to_vec()
            }
            _ => weights.rows_f32(source(name, tied), range.clone())?,
        };
        if let Some(Replaced { rows: Some(rows), values: new, .. }) = replaced {
            for (&row, new) in rows.iter().zip(new.chunks(columns)) {
                if let Some(at) = range.clone().position(|o| o == row as usize) {
                    values[at * columns..][..columns].copy_from_slice(new);
                }
            }
        }
        let named = name.strip_suffix(".weight").unwrap_or_default();
        if let Some(low) = lora.modules.get(named) {
            if module.as_ref().is_none_or(|(of, _)| of != named) {
                let whole = || match replaced {
                    Some(Replaced { rows: None, values, .. }) => Ok(values.clone()),
                    _ => weights.rows_f32(name, 0..weights.shape(name)[0]),
                };
                module = Some((named.into(), lora.over_whole_weight(named, low, whole)?));
            }
            if let Some((_, module)) = &module {
                for (row, o) in values.chunks_mut(columns.max(1)).zip(range) {
                    lora.merge_row(module, o, row);
                }
            }
        }
        Ok(values)
    };
    write(out, &config, dtype, &files, hear, rows)
}

/// Where a model has the values of a parameter.
fn source(name: &str, tied: bool) -> &str {
    if tied && name == HEAD { EMBEDDING } else { name }
}

/// Writes the mean of models of one shape, weight by weight, to the folder `out`, with the configuration and the
/// tokenizer of the first.
pub fn average(models: &[PathBuf], out: &Path, dtype: StoredType, hear: Hear<'_>) -> Result<()> {
    let models = &models.iter().map(|m| hub::resolve(m)).collect::<Result<Vec<_>>>()?[..];
    let opened = models.iter().map(|m| Weights::open(m)).collect::<Result<Vec<_>>>()?;
    let Some((config, _)) = opened.first() else {
        return Err(Error::Request("there is no model to average".into()));
    };
    for (path, (other, _)) in models.iter().zip(&opened) {
        if other.parameters() != config.parameters() {
            let reason = format!("its shape differs from that of {}", models[0].display());
            return Err(Error::model(path, reason));
        }
    }
    let files = tokenizer_files(&models[0], config)?;
    let rows = |name: &str, range: Range<usize>| {
        let mut mean: Vec<f64> = Vec::new();
        for (_, weights) in &opened {
            let values = weights.rows_f32(name, range.clone())?;
            mean.resize(values.len(), 0.0);
            mean.iter_mut().zip(values).for_each(|(m, v)| *m += f64::from(v));
        }
        Ok(mean.iter().map(|m| (m / opened.len() as f64) as f32).collect())
    };
    write(out, config, dtype, &files, hear, rows)
}

/// What [`convert`] writes.
pub struct ConvertOptions {
    /// Type of the matrices.
    pub dtype: StoredType,
    /// Leave away what a GGUF file has no place for of a tokenizer, instead of refusing.
    pub lossy_tokenizer: bool,
}

impl From<StoredType> for ConvertOptions {
    fn from(dtype: StoredType) -> Self {
        Self { dtype, lossy_tokenizer: false }
    }
}

/// Writes a model anew: to a GGUF file if `out` ends so, else to a Hugging Face folder, which holds floats. Returns
/// what was lost of the tokenizer, a line for each token.
pub fn convert(
    model: &Path,
    out: &Path,
    options: impl Into<ConvertOptions>,
    hear: Hear<'_>,
) -> Result<Vec<String>> {
    let ConvertOptions { dtype, lossy_tokenizer } = options.into();
    if out.extension().is_some_and(|extension| extension == "gguf") {
        let (config, weights) = Weights::open(model)?;
        let tokenizer = Tokenizer::for_model(model, &config)?;
        let lost = tokenizer.lost_in_gguf()?;
        if !lost.is_empty() && !lossy_tokenizer {
            let reason = format!(
                "a GGUF file has no place for flags of added tokens, and would split other text: {}; \
                 --lossy-tokenizer writes it without them",
                lost.join(", ")
            );
            return Err(Error::model(out, reason));
        }
        let tokenizer = tokenizer.to_gguf(out, &config)?;
        write_gguf(out, &config, &weights, tokenizer, dtype, hear)?;
        return Ok(lost);
    }
    if !dtype.is_float() {
        let reason = format!(
            "a Hugging Face folder holds no {dtype:?}; give a name that ends in .gguf, or a float type"
        );
        return Err(Error::model(out, reason));
    }
    average(&[model.to_owned()], out, dtype, hear)?;
    Ok(Vec::new())
}

/// The type a model is written in where nobody says: its own, or bf16 for one of quantised blocks.
pub fn written_type(model: &Path) -> Result<StoredType> {
    let (config, weights) = Weights::open(model)?;
    let all = config.parameters();
    let matrix = all.iter().find(|(_, shape)| shape.len() == 2).map_or("", |(name, _)| name);
    Ok(match weights.dtype(matrix) {
        own @ (StoredType::F32 | StoredType::F16 | StoredType::BF16) => own,
        _ => StoredType::BF16,
    })
}

/// The files of a model's tokenizer; none for a folder that has none.
fn tokenizer_files(model: &Path, config: &LlamaConfig) -> Result<Vec<(String, Vec<u8>)>> {
    if model.is_dir()
        && model.join("config.json").exists()
        && !model.join("tokenizer.json").exists()
    {
        return Ok(Vec::new());
    }
    Tokenizer::for_model(model, config)?.files()
}

fn write(
    out: &Path,
    config: &LlamaConfig,
    dtype: StoredType,
    files: &[(String, Vec<u8>)],
    hear: Hear<'_>,
    mut rows: impl FnMut(&str, Range<usize>) -> Result<Vec<f32>>,
) -> Result<()> {
    let parameters = config.parameters().into_iter();
    let tensors: Vec<SaveTensor> =
        parameters.map(|(name, shape)| SaveTensor { name, shape, dtype }).collect();
    let mut done = 0;
    let fill = |tensor: &SaveTensor, sink: &mut Sink<'_>| {
        let (n, columns) = (tensor.shape[0], tensor.shape[1..].iter().product());
        for first in (0..n).step_by(ROWS) {
            let values = rows(&tensor.name, first..(first + ROWS).min(n))?;
            sink(&encode(&values, columns, saved_type(dtype)))?;
        }
        done += 1;
        hear(f64::from(done) / tensors.len() as f64);
        Ok(())
    };
    save_model(out, config, &tensors, fill, files)
}
