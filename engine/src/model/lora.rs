//! Low-rank adapters over frozen weights, in the format of Hugging Face PEFT (`adapter_config.json` beside
//! `adapter_model.safetensors`): LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353).
//!   W' = W + s B A                                A: [r, D]  B: [O, r]  s = alpha / r
//!   DoRA: row o of that, at the length m[o]       m: [O]
//! This is an adapter on the host: made, read, written. What it does to a
//! forward pass is in `projection.rs`, how it becomes part of the weights in `merge.rs`.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::config::{DiffusionAttention, LlamaConfig};
use super::save::save_files;
use crate::philox::Philox;
use crate::tensor::stored::decode;
use crate::tensor::{DType, Shape};
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT has no field for: how the adapted model decodes.
const DECODING: &str = "decoding.json";
/// What PEFT puts before the names of the base model.
const PREFIX: &str = "base_model.model.";
/// Keeps the stream of A's values apart from others drawn under the same user seed.
const STREAM: u64 = u64::from_le_bytes(*b"lora_a\0\0");

/// The matrices of a layer that can be adapted.
pub const TARGETS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// An adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// r.
    pub rank: usize,
    /// What the product is scaled by, times r.
    pub alpha: f64,
    /// s = alpha / √r instead (rsLoRA, arXiv 2312.03732).
    pub by_root: bool,
    /// Base rows get a length of their own.
    pub dora: bool,
    /// By the weight's Hugging Face name without `.weight`.
    pub modules: BTreeMap<String, LowRank>,
    /// Block length and mask token of the adapted model, where training set them.
    pub decoding: Decoding,
}

/// What adapts one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// [r, D]
    pub a: Vec<f32>,
    /// [O, r]
    pub b: Vec<f32>,
    /// [O], for DoRA; empty in a fresh adapter, which takes the lengths of the base's rows.
    pub magnitude: Vec<f32>,
}

/// Fields of a model's configuration that diffusion sets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Decoding {
    /// B.
    pub block_length: Option<usize>,
    /// The token of a hole.
    pub mask_token_id: Option<u32>,
    /// What the tokens see.
    pub diffusion_attention: DiffusionAttention,
}

impl Decoding {
    /// What a configuration says.
    pub fn of(config: &LlamaConfig) -> Decoding {
        Decoding {
            block_length: config.block_length,
            mask_token_id: config.mask_token_id,
            diffusion_attention: config.diffusion_attention,
        }
    }

    /// Sets what is known in a configuration.
    pub fn apply(self, config: &mut LlamaConfig) {
        if self == Decoding::default() {
            return;
        }
        config.block_length = self.block_length;
        config.mask_token_id = self.mask_token_id.or(config.mask_token_id);
        config.diffusion_attention = self.diffusion_attention;
    }
}

impl Lora {
    /// One that changes nothing yet: A uniform in ±1/√D, B zero. `targets` are of [`TARGETS`].
    pub fn fresh(
        config: &LlamaConfig,
        rank: usize,
        alpha: f64,
        dora: bool,
        targets: &[String],
        seed: u64,
    ) -> Lora {
        let mut modules = BTreeMap::new();
        for (name, shape) in matrices(config) {
            if !targets.iter().any(|target| name.ends_with(target.as_str())) {
                continue;
            }
            let [o, d] = shape;
            let mut random = Philox::new(seed ^ STREAM, [modules.len() as u32, 0, 0]);
            let most = 1.0 / (d as f32).sqrt();
            let a = (0..rank * d).map(|_| (2.0 * random.uniform() - 1.0) * most).collect();
            modules.insert(name, LowRank { a, b: vec![0.0; o * rank], magnitude: vec![] });
        }
        Lora { rank, alpha, by_root: false, dora, modules, decoding: Decoding::default() }
    }

    /// Reads an adapter's folder, as PEFT or [`Lora::write`] wrote it. What would be left out silently is refused.
    pub fn read(dir: &Path) -> Result<Lora> {
        let path = dir.join(CONFIG);
        let config = read_json(&path)?;
        let fail = |reason: String| Error::model(&path, reason);
        let kind = config["peft_type"].as_str().unwrap_or("missing");
        if kind != "LORA" {
            return Err(fail(format!("peft_type is {kind}; only LORA adapters can be read")));
        }
        for field in UNSUPPORTED {
            if is_set(&config[*field]) {
                return Err(fail(format!("{field} = {} is not supported", config[*field])));
            }
        }
        let number = |field: &str| {
            let value = config[field].as_f64().filter(|v| *v > 0.0 && v.is_finite());
            value.ok_or_else(|| fail(format!("{field} is no positive number")))
        };
        let (rank, alpha) = (number("r")? as usize, number("lora_alpha")?);
        let flag = |field: &str| config[field].as_bool().unwrap_or(false);
        let mut lora = Lora {
            rank,
            alpha,
            by_root: flag("use_rslora"),
            dora: flag("use_dora"),
            modules: BTreeMap::new(),
            decoding: read_decoding(&dir.join(DECODING))?,
        };
        lora.read_weights(&dir.join(WEIGHTS))?;
        Ok(lora)
    }

    fn read_weights(&mut self, path: &Path) -> Result<()> {
        let fail = |reason: String| Error::model(path, reason);
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| fail(e.to_string()))?;
        let empty = || LowRank { a: vec![], b: vec![], magnitude: vec![] };
        for (name, view) in file.tensors() {
            let inner = name.strip_prefix(PREFIX).unwrap_or(&name);
            let dtype = match view.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::Bf16,
                other => return Err(fail(format!("{name} is {other:?}, not F32, F16 or BF16"))),
            };
            let shape = Shape::from(view.shape());
            let values = || decode(view.data(), shape.last(), dtype);
            let rank = self.rank;
            if let Some(module) = inner.strip_suffix(".lora_A.weight")
                && shape.first() == Some(&rank)
            {
                self.modules.entry(module.into()).or_insert_with(empty).a = values();
            } else if let Some(module) = inner.strip_suffix(".lora_B.weight")
                && shape.len() == 2
                && shape.last() == rank
            {
                self.modules.entry(module.into()).or_insert_with(empty).b = values();
            } else if let Some(module) = inner.strip_suffix(".lora_magnitude_vector")
                && self.dora
            {
                self.modules.entry(module.into()).or_insert_with(empty).magnitude = values();
            } else {
                return Err(fail(format!(
                    "{name} {shape} is no part of an adapter of rank {rank} that can be read"
                )));
            }
        }
        if self.modules.is_empty() {
            return Err(fail("it adapts nothing".into()));
        }
        Ok(())
    }

    /// Writes the folder that PEFT loads onto `base` (a path or the name of a repository).
    pub fn write(&self, dir: &Path, base: &str) -> Result<()> {
        let mut targets: Vec<&str> =
            self.modules.keys().filter_map(|name| name.rsplit('.').next()).collect();
        targets.sort_unstable();
        targets.dedup();
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": targets,
            "use_dora": self.dora,
            "use_rslora": self.by_root,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "modules_to_save": null,
        });
        let mut tensors = Vec::new();
        for (module, LowRank { a, b, magnitude }) in &self.modules {
            let (d, o) = (a.len() / self.rank, b.len() / self.rank);
            tensors.push((format!("{PREFIX}{module}.lora_A.weight"), vec![self.rank, d], a));
            tensors.push((format!("{PREFIX}{module}.lora_B.weight"), vec![o, self.rank], b));
            if self.dora {
                tensors.push((
                    format!("{PREFIX}{module}.lora_magnitude_vector"),
                    vec![o],
                    magnitude,
                ));
            }
        }
        let broken = |e: safetensors::SafeTensorError| Error::model(dir, e.to_string());
        let views = tensors
            .iter()
            .map(|(name, shape, values)| {
                let bytes = bytemuck::cast_slice(values);
                Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(broken)?))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut files = vec![
            (WEIGHTS.to_owned(), serialize(views, None).map_err(broken)?),
            (CONFIG.to_owned(), pretty(&config)),
        ];
        if self.decoding != Decoding::default() {
            files.push((DECODING.to_owned(), pretty(&json!(self.decoding))));
        }
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        save_files(dir, &files)
    }

    /// Refuses an adapter of another model.
    pub fn check(&self, config: &LlamaConfig) -> Result<()> {
        let known: BTreeMap<_, _> = matrices(config).collect();
        for (name, LowRank { a, b, magnitude }) in &self.modules {
            let Some([o, d]) = known.get(name) else {
                return Err(Error::Request(format!(
                    "the adapter changes {name}, which this model does not have, or not as a matrix of a layer"
                )));
            };
            let right = a.len() == self.rank * d
                && b.len() == o * self.rank
                && (magnitude.len() == *o || magnitude.is_empty());
            if !right {
                return Err(Error::Request(format!(
                    "the adapter's tensors for {name} do not fit its {o} rows of {d}: A has {} values, B {}, the \
                     magnitude {}; was it trained on another model?",
                    a.len(),
                    b.len(),
                    magnitude.len()
                )));
            }
        }
        Ok(())
    }

    /// s.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.by_root { rank.sqrt() } else { rank }) as f32
    }

    /// W' of row `o` of a module's weight, in the place of W.
    pub(super) fn merge_row(&self, module: &LowRank, o: usize, row: &mut [f32]) {
        let scale = self.scale();
        for (a, b) in module.a.chunks(row.len()).zip(&module.b[o * self.rank..]) {
            let factor = scale * b;
            row.iter_mut().zip(a).for_each(|(w, a)| *w += factor * a);
        }
        if self.dora && !module.magnitude.is_empty() {
            let length = row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
            let factor = (f64::from(module.magnitude[o]) / length) as f32;
            row.iter_mut().for_each(|w| *w *= factor);
        }
    }
}

/// Settings of PEFT that change what an adapter computes, and that nothing here does.
const UNSUPPORTED: &[&str] = &[
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "bias",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "alora_invocation_tokens",
];

/// Whether a setting is more than PEFT's way of saying no.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(all) => !all.is_empty(),
        Value::Object(all) => !all.is_empty(),
        Value::String(text) => text != "none",
        _ => true,
    }
}

/// Names without `.weight` and extents of what can be adapted.
fn matrices(config: &LlamaConfig) -> impl Iterator<Item = (String, [usize; 2])> {
    config.parameters().into_iter().filter_map(|(name, shape)| {
        let name = name.strip_suffix(".weight")?.to_owned();
        let [o, d] = shape[..] else { return None };
        TARGETS.iter().any(|target| name.ends_with(target)).then_some((name, [o, d]))
    })
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_str(&text).map_err(|e| Error::model(path, e.to_string()))
}

fn read_decoding(path: &Path) -> Result<Decoding> {
    if !path.exists() {
        return Ok(Decoding::default());
    }
    serde_json::from_value(read_json(path)?).map_err(|e| Error::model(path, e.to_string()))
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}
