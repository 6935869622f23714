//! One named weight in device memory: as what it rests there, where its values come from, and which ones lie one behind
//! the other so that a product can use them at once.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::config::LlamaConfig;
use super::weights::quant::repack;
use super::weights::{Fidelity, StoredType, Weights};
use crate::gpu::Gpu;
use crate::philox::Philox;
use crate::tensor::stored::{decode, encode};
use crate::tensor::{DType, QUANT_BLOCK, Tensor};
use crate::{Error, Result};

/// How weight matrices rest in device memory; norms are always f32. In files by its name in lower case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// As the file has them: floats unchanged, blocks as the type that [`StoredType::held_as`] names, exactly where
    /// that type holds them; [`conversions`] says what is not.
    Stored,
    /// f32, as training needs.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// 8-bit blocks of 32, [`DType::Q8`].
    Q8,
    /// 4-bit blocks of 32, [`DType::Q4`].
    Q4,
}

/// One named weight. A matrix larger than one storage binding is several tensors of consecutive rows.
#[derive(Clone)]
pub struct Parameter {
    /// Hugging Face name.
    pub name: String,
    /// Whole extents.
    pub shape: Vec<usize>,
    /// Row shards in order.
    pub shards: Vec<Tensor>,
}

impl Parameter {
    /// Its values as f32 on the host.
    pub(super) fn values(&self) -> Result<Vec<f32>> {
        let shards = self.shards.iter().map(widen).collect::<Result<Vec<_>>>()?;
        Ok(shards.concat())
    }

    /// Those of some rows, or of all.
    pub(super) fn values_of(&self, rows: Option<&[u32]>) -> Result<Vec<f32>> {
        let all = self.values()?;
        let Some(rows) = rows else { return Ok(all) };
        let columns = self.shape[1..].iter().product::<usize>();
        Ok(rows
            .iter()
            .flat_map(|&row| &all[row as usize * columns..][..columns])
            .copied()
            .collect())
    }

    /// Puts other values in the place of some of its rows, or of all; they are there.
    pub(super) fn replace(&self, rows: Option<&[u32]>, values: &[f32]) -> Result<()> {
        let columns = self.shape[1..].iter().product::<usize>();
        let mut first = 0;
        for shard in self.shards.iter().filter(|shard| !shard.gpu().is_dry()) {
            let n = shard.shape()[0];
            let encoded = |values: &[f32]| encode(values, shard.shape().last(), shard.dtype());
            match rows {
                None => shard.overwrite(&encoded(&values[first * columns..][..n * columns])),
                Some(rows) => {
                    let mut bytes = shard.to_bytes()?;
                    let length = bytes.len() / n.max(1);
                    for (&row, values) in rows.iter().zip(values.chunks(columns)) {
                        if let Some(at) = (row as usize).checked_sub(first).filter(|&at| at < n) {
                            bytes[at * length..][..length].copy_from_slice(&encoded(values));
                        }
                    }
                    shard.overwrite(&bytes);
                }
            }
            first += n;
        }
        Ok(())
    }

    /// The same values in memory of their own.
    pub(super) fn copy(&self, name: &str) -> Result<Parameter> {
        let copy = |shard: &Tensor| {
            let copy = Tensor::empty(shard.gpu(), shard.shape(), shard.dtype(), name);
            copy.overwrite(&shard.to_bytes()?);
            Ok(copy)
        };
        let shards = self.shards.iter().map(copy).collect::<Result<_>>()?;
        Ok(Parameter { name: name.to_owned(), shape: self.shape.clone(), shards })
    }
}

/// Where a model's weights come from.
pub(super) trait Source {
    /// How a parameter rests in memory.
    fn dtype(&self, name: &str, shape: &[usize]) -> Result<DType>;

    /// The bytes of some of its rows; they are asked for in order.
    fn rows(
        &mut self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        dtype: DType,
    ) -> Result<Vec<u8>>;

    /// Nothing more is asked of this parameter for now.
    fn forget(&self, _name: &str) {}
}

/// Weights of a file.
pub(super) struct Stored<'a> {
    pub weights: &'a Weights,
    pub precision: Precision,
}

/// What becomes of a model's matrices at [`Precision::Stored`] whose types no kernel reads as they are, in one line for
/// people: how many of which type rest as which, and how closely; `None` where there are none.
pub fn conversions(config: &LlamaConfig, weights: &Weights) -> Option<String> {
    let mut counts = BTreeMap::new();
    for (name, _) in config.parameters().iter().filter(|(_, shape)| shape.len() == 2) {
        *counts.entry(weights.dtype(name)).or_insert(0) += 1;
    }
    let parts = counts.into_iter().filter_map(|(dtype, n)| {
        let (held, fidelity) = dtype.held_as();
        let how = match fidelity {
            Fidelity::Same => return None,
            Fidelity::Exact => "exactly",
            Fidelity::ScalesRounded => "scales rounded to f16",
            Fidelity::Rounded => "rounded",
        };
        Some(format!("{n} of {dtype:?} as {held:?} ({how})"))
    });
    let parts = parts.collect::<Vec<_>>().join(", ");
    (!parts.is_empty()).then(|| format!("matrices are held in the nearest type: {parts}"))
}

/// Random weights.
pub(super) struct Fresh {
    seed: u64,
    /// Deviation of what writes to the residual stream.
    residual: f32,
    /// Parameters begun.
    index: u32,
    random: Philox,
}

impl Fresh {
    pub fn new(seed: u64, residual: f32) -> Fresh {
        Fresh { seed, residual, index: 0, random: Philox::new(seed, [0, 0, 0]) }
    }
}

/// A parameter of row shards that one binding can take.
pub(super) fn parameter(
    gpu: &Gpu,
    source: &mut impl Source,
    name: &str,
    shape: &[usize],
) -> Result<Parameter> {
    let dtype = source.dtype(name, shape)?;
    let row_bytes = dtype.row_bytes(shape[1..].iter().product());
    // Multiples of four rows keep every shard on the fast kernels.
    let most = ((gpu.max_binding() as usize / row_bytes.max(1)) & !3).max(1);
    let mut shards = Vec::new();
    for first in (0..shape[0]).step_by(most) {
        let range = first..(first + most).min(shape[0]);
        let extents = [&[range.len()], &shape[1..]].concat();
        let shard = Tensor::empty(gpu, extents, dtype, name);
        fill(source, &shard, name, shape, range)?;
        shards.push(shard);
    }
    Ok(Parameter { name: name.to_owned(), shape: shape.to_vec(), shards })
}

/// Elements of a parameter that are on the host at a time, about.
const PIECE: usize = 1 << 24;

/// Uploads some rows of a parameter; a device that only counts has no use for them.
fn fill(
    source: &mut impl Source,
    tensor: &Tensor,
    name: &str,
    shape: &[usize],
    rows: Range<usize>,
) -> Result<()> {
    if tensor.gpu().is_dry() {
        return Ok(());
    }
    let columns: usize = shape[1..].iter().product();
    let row_bytes = tensor.dtype().row_bytes(columns);
    // Even, so that a piece of rows of two-byte elements begins at a word.
    let most = (PIECE / columns.max(1)).max(2) & !1;
    let mut at = 0;
    for first in rows.clone().step_by(most) {
        let piece = first..(first + most).min(rows.end);
        let length = piece.len() * row_bytes;
        let bytes = source.rows(name, shape, piece, tensor.dtype())?;
        assert_eq!(bytes.len(), length, "{name}: bytes for {tensor:?}");
        tensor.gpu().write(tensor.buffer(), at as u64, &bytes);
        at += length;
    }
    source.forget(name);
    Ok(())
}

/// Matrices of equal row length, one behind the other in one tensor if their types, the size of a binding and the
/// device's alignment allow it.
pub(super) fn joined<const N: usize>(
    gpu: &Gpu,
    source: &mut impl Source,
    names: [String; N],
    shapes: &HashMap<String, Vec<usize>>,
) -> Result<([Parameter; N], Option<Tensor>)> {
    let columns = shapes[&names[0]][1];
    let dtype = source.dtype(&names[0], &shapes[&names[0]])?;
    let row_bytes = dtype.row_bytes(columns) as u64;
    let (mut rows, mut fit) = (0, true);
    for name in &names {
        let shape = &shapes[name];
        fit &= source.dtype(name, shape)? == dtype && shape[1] == columns;
        fit &= (rows as u64 * row_bytes).is_multiple_of(gpu.part_alignment());
        rows += shape[0];
    }
    fit &= rows as u64 * row_bytes <= gpu.max_binding();
    let whole = fit.then(|| Tensor::empty(gpu, [rows, columns], dtype, &names.join(" and ")));
    let (mut parameters, mut first) = (Vec::new(), 0);
    for name in names {
        let shape = &shapes[&name];
        parameters.push(match &whole {
            None => parameter(gpu, source, &name, shape)?,
            Some(whole) => {
                let part = whole.part(first, shape[0]);
                fill(source, &part, &name, shape, 0..shape[0])?;
                first += shape[0];
                Parameter { name, shape: shape.clone(), shards: vec![part] }
            }
        });
    }
    let parameters = parameters.try_into().unwrap_or_else(|_| unreachable!("one for each name"));
    Ok((parameters, whole))
}

impl Source for Stored<'_> {
    fn dtype(&self, name: &str, shape: &[usize]) -> Result<DType> {
        let dtype = match (shape.len(), self.precision) {
            (2, Precision::Stored) => self.weights.dtype(name).held_as().0,
            (2, Precision::Bf16) => DType::Bf16,
            (2, Precision::F16) => DType::F16,
            (2, Precision::Q8) => DType::Q8,
            (2, Precision::Q4) => DType::Q4,
            _ => DType::F32,
        };
        let columns: usize = shape[1..].iter().product();
        if matches!(dtype, DType::Q8 | DType::Q4) && !columns.is_multiple_of(QUANT_BLOCK) {
            return Err(Error::model(
                self.weights.path(),
                format!(
                    "{name} has rows of {columns}, which are no whole blocks of {QUANT_BLOCK}; load it in a \
                     precision without blocks (bf16, say)"
                ),
            ));
        }
        Ok(dtype)
    }

    fn rows(
        &mut self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        dtype: DType,
    ) -> Result<Vec<u8>> {
        let (stored, columns) = (self.weights.dtype(name), shape[1..].iter().product());
        if saved_type(stored) == dtype
            && let Some(bytes) = self.weights.rows_bytes(name, rows.clone())?
        {
            return Ok(bytes.into_owned());
        }
        if !stored.is_float() && stored.held_as().0 == dtype {
            return Ok(repack(stored, &self.weights.rows_stored(name, rows)?, columns));
        }
        Ok(encode(&self.weights.rows_f32(name, rows)?, columns, dtype))
    }

    fn forget(&self, name: &str) {
        self.weights.forget(name);
    }
}

impl Source for Fresh {
    fn dtype(&self, _: &str, _: &[usize]) -> Result<DType> {
        Ok(DType::F32)
    }

    fn rows(
        &mut self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        _: DType,
    ) -> Result<Vec<u8>> {
        if rows.start == 0 {
            self.index += 1;
            self.random = Philox::new(self.seed, [self.index, 0, 0]);
        }
        let std = match name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") {
            true => self.residual,
            false => 0.02,
        };
        let n = rows.len() * shape[1..].iter().product::<usize>();
        let values = (0..n).map(|_| match shape.len() {
            1 if name.ends_with(".bias") => 0.0,
            1 => 1.0,
            _ => std * self.random.normal(),
        });
        Ok(bytemuck::cast_slice(&values.collect::<Vec<f32>>()).to_vec())
    }
}

/// The type that weights are saved as.
pub(super) fn saved_type(dtype: StoredType) -> DType {
    match dtype {
        StoredType::BF16 => DType::Bf16,
        StoredType::F16 => DType::F16,
        _ => DType::F32,
    }
}

/// A shard's values as f32 on the host.
pub(super) fn widen(shard: &Tensor) -> Result<Vec<f32>> {
    Ok(decode(&shard.to_bytes()?, shard.shape().last(), shard.dtype()))
}
