//! Low-rank adapters over frozen weights: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353).
//!   W' = W + s B A                                A: [r, D]  B: [O, r]  s = alpha / r
//!   DoRA: row o of that, at the length m[o]       m: [O]
//! This is an adapter on the host. Its files are read and written in `lora/files.rs`; what it does to a forward pass is
//! in `projection.rs`, how it becomes part of the weights in `merge.rs`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::config::{DiffusionAttention, LlamaConfig};
use crate::philox::Philox;
use crate::{Error, Result};

mod files;
mod share;
mod singular;

/// Keeps the stream of A's values apart from others drawn under the same user seed.
const STREAM: u64 = u64::from_le_bytes(*b"lora_a\0\0");

/// Names of the two matrices over the vocabulary.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const HEAD: &str = "lm_head.weight";

/// The matrices of a layer that can be adapted.
pub const TARGETS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// An adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// s = alpha / √r instead (rsLoRA, arXiv 2312.03732).
    pub by_root: bool,
    /// Base rows get a length of their own.
    pub dora: bool,
    /// The share of a base weight that B A began with, and that is taken out of the weight.
    pub share: Share,
    /// By the weight's Hugging Face name without `.weight`.
    pub modules: BTreeMap<String, LowRank>,
    /// Parameters of the base, by name, that the adapter brings values of its own for.
    pub replaced: BTreeMap<String, Replaced>,
    /// Block length and mask token of the adapted model, where training set them.
    pub decoding: Decoding,
}

/// What adapts one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// r.
    pub rank: usize,
    /// What the product is scaled by, times r (or its root).
    pub alpha: f64,
    /// [r, D]
    pub a: Vec<f32>,
    /// [O, r]
    pub b: Vec<f32>,
    /// [O], for DoRA; empty in a fresh adapter, which takes the lengths of the base's rows.
    pub magnitude: Vec<f32>,
}

/// What of the base's weights an adapter was made of. Its base is then W − (that share), which PEFT computes anew
/// whenever it loads such an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Share {
    /// Nothing: B A began with zero, or beside the weights.
    #[default]
    None,
    /// The part of the r largest singular values (PiSSA, arXiv 2404.02948).
    Pissa,
    /// The part in the space of the first r columns (OLoRA, arXiv 2406.01775), times s.
    Olora,
}

/// Values in the place of a base parameter's.
#[derive(Clone, Debug, PartialEq)]
pub struct Replaced {
    /// Extents of `values`.
    pub shape: Vec<usize>,
    /// The values.
    pub values: Vec<f32>,
    /// The rows that they are; `None` for all.
    pub rows: Option<Vec<u32>>,
    /// Of the embedding: a head that is tied to it goes with it, instead of keeping the base's values.
    pub tied: bool,
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
        let mut lora = Lora::empty(false, dora);
        for (name, [o, d]) in matrices(config) {
            if !targets.iter().any(|target| name.ends_with(target.as_str())) {
                continue;
            }
            let mut random = Philox::new(seed ^ STREAM, [lora.modules.len() as u32, 0, 0]);
            let most = 1.0 / (d as f32).sqrt();
            let a = (0..rank * d).map(|_| (2.0 * random.uniform() - 1.0) * most).collect();
            let low = LowRank { rank, alpha, a, b: vec![0.0; o * rank], magnitude: vec![] };
            lora.modules.insert(name, low);
        }
        lora
    }

    /// One without modules.
    pub(super) fn empty(by_root: bool, dora: bool) -> Lora {
        Lora {
            by_root,
            dora,
            share: Share::None,
            modules: BTreeMap::new(),
            replaced: BTreeMap::new(),
            decoding: Decoding::default(),
        }
    }

    /// Refuses an adapter of another model.
    pub fn check(&self, config: &LlamaConfig) -> Result<()> {
        let known: BTreeMap<_, _> = matrices(config).collect();
        for (name, LowRank { rank, a, b, magnitude, .. }) in &self.modules {
            let Some([o, d]) = known.get(name) else {
                return Err(Error::Request(format!(
                    "the adapter changes {name}, which this model does not have, or not as a matrix of a layer"
                )));
            };
            let right = a.len() == rank * d
                && b.len() == o * rank
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
        let mut parameters: BTreeMap<_, _> = config.parameters().into_iter().collect();
        if let Some(embedding) = parameters.get(EMBEDDING).cloned() {
            // A tied head has no parameter of its own before the adapter brings one.
            parameters.entry(HEAD.into()).or_insert(embedding);
        }
        for (name, Replaced { shape, rows, .. }) in &self.replaced {
            let Some(base) = parameters.get(name) else {
                return Err(Error::Request(format!(
                    "the adapter brings a {name}, which this model does not have; was it trained on another model?"
                )));
            };
            let n = rows.as_ref().map_or(base[0], Vec::len);
            if shape[..] != [&[n], &base[1..]].concat() {
                return Err(Error::Request(format!(
                    "the adapter's values for {name} have the shape {shape:?}, the model's {base:?}; was it trained on \
                     another model, or on one with more tokens?"
                )));
            }
            let beyond = rows.iter().flatten().find(|&&row| row as usize >= base[0]);
            if let Some(row) = beyond {
                return Err(Error::Request(format!(
                    "the adapter brings row {row} of {name}, which has {}",
                    base[0]
                )));
            }
        }
        Ok(())
    }

    /// s of a module.
    pub fn scale(&self, module: &LowRank) -> f32 {
        let rank = module.rank as f64;
        (module.alpha / if self.by_root { rank.sqrt() } else { rank }) as f32
    }

    /// Whether it gives a tied model a head of its own.
    pub(super) fn unties(&self, config: &LlamaConfig) -> bool {
        let alone = self.replaced.get(EMBEDDING).is_some_and(|embedding| !embedding.tied);
        config.tie_word_embeddings && (alone || self.replaced.contains_key(HEAD))
    }

    /// A module of an adapter that computes the same over W as this one does over W without its share. `weight` is
    /// W, [O, D], and is only asked for where it matters.
    ///
    /// # Errors
    /// Those of `weight`; if the module is scaled by zero, which takes no finite share.
    pub(super) fn over_whole_weight(
        &self,
        name: &str,
        module: &LowRank,
        weight: impl FnOnce() -> Result<Vec<f32>>,
    ) -> Result<LowRank> {
        if self.share == Share::None {
            return Ok(module.clone());
        }
        if module.alpha == 0.0 {
            return Err(Error::Request(format!("the adapter scales {name} by 0")));
        }
        let (columns, rows) = (module.a.len() / module.rank, module.b.len() / module.rank);
        if module.rank > columns.min(rows) {
            return Err(Error::Request(format!(
                "the adapter of {name} has the rank {}, and its {rows} rows of {columns} have no such share",
                module.rank
            )));
        }
        let share = share::of(self.share, &weight()?, columns, module.rank);
        // s (B A − L R) with L R the share over s, or as it is: one adapter of twice the rank at the same scale.
        let over = match self.share {
            Share::Pissa => f64::from(self.scale(module)),
            _ => 1.0,
        };
        let rows = module.b.chunks(module.rank).zip(share.left.chunks(module.rank));
        let negative = |l: &f64| (-l / over) as f32;
        let grows = if self.by_root { std::f64::consts::SQRT_2 } else { 2.0 };
        Ok(LowRank {
            rank: 2 * module.rank,
            alpha: module.alpha * grows,
            a: module.a.iter().copied().chain(share.right.iter().map(|&r| r as f32)).collect(),
            b: rows.flat_map(|(b, l)| b.iter().copied().chain(l.iter().map(negative))).collect(),
            magnitude: module.magnitude.clone(),
        })
    }

    /// W' of row `o` of a module's weight, in the place of W.
    pub(super) fn merge_row(&self, module: &LowRank, o: usize, row: &mut [f32]) {
        let scale = self.scale(module);
        for (a, b) in module.a.chunks(row.len()).zip(&module.b[o * module.rank..]) {
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

/// Names without `.weight` and extents of what can be adapted.
fn matrices(config: &LlamaConfig) -> impl Iterator<Item = (String, [usize; 2])> {
    config.parameters().into_iter().filter_map(|(name, shape)| {
        let name = name.strip_suffix(".weight")?.to_owned();
        let [o, d] = shape[..] else { return None };
        TARGETS.iter().any(|target| name.ends_with(target)).then_some((name, [o, d]))
    })
}
