//! A training recipe: one TOML file that says what is trained on what, how, and for how long.
//! Everything but the paths has a default that a first run can live with.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use demask_engine::model::LlamaConfig;
use serde::{Deserialize, Serialize};

use crate::data::Filter;
use crate::schedule::{Decay, LearningRate};

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Seeds weights, data order and noise.
    #[serde(default)]
    pub seed: u64,
    /// What to start from.
    pub model: ModelSource,
    /// Where the text comes from.
    pub data: Data,
    /// How weights move.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// Save a checkpoint after this many steps (and at each phase's end).
    #[serde(default = "default_save_every")]
    pub save_every: u64,
    /// Recompute each layer in the backward pass: less memory, about a third more time.
    #[serde(default)]
    pub recompute: bool,
    /// Objectives in order.
    pub phase: Vec<Phase>,
}

fn default_save_every() -> u64 {
    100
}

/// What to start from: a model on disk, or fresh weights of a shape with a tokenizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSource {
    /// Hugging Face folder or GGUF file to continue from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<PathBuf>,
    /// Shape of fresh weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fresh: Option<Fresh>,
    /// The token that stands for a hole, by its text, for a tokenizer that does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_token: Option<String>,
}

/// Shape of a model with fresh weights; its tokenizer is trained on the same text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fresh {
    /// Tokens of the byte-level BPE to train.
    pub vocab_size: usize,
    /// D.
    pub hidden_size: usize,
    /// F.
    pub intermediate_size: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Longest sequence the model is meant for.
    #[serde(default = "default_context")]
    pub context: usize,
}

fn default_context() -> usize {
    2048
}

/// Where the text comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Directories of source files.
    pub paths: Vec<PathBuf>,
    /// File extensions to read, without the dot.
    #[serde(default = "default_extensions")]
    pub extensions: Vec<String>,
    /// L: tokens of a sequence.
    #[serde(default = "default_length")]
    pub length: usize,
    /// Share of the text kept for validation, by package.
    #[serde(default = "default_held_out")]
    pub held_out: f64,
    /// Confine attention to a token's own document. Off is the paper's choice (§4.1).
    #[serde(default)]
    pub document_mask: bool,
}

fn default_extensions() -> Vec<String> {
    vec!["py".into()]
}

fn default_length() -> usize {
    256
}

fn default_held_out() -> f64 {
    0.01
}

/// AdamW and its batch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// Sequences of one step.
    pub batch: usize,
    /// Sequences that are on the device at once; gradients are accumulated over the rest.
    pub micro_batch: usize,
    /// First-moment decay.
    pub beta1: f64,
    /// Second-moment decay.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay of matrices, embeddings and norms excepted.
    pub weight_decay: f64,
    /// Largest norm of the whole gradient.
    pub clip: f32,
}

impl Default for Optimizer {
    fn default() -> Self {
        Optimizer {
            batch: 16,
            micro_batch: 16,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
        }
    }
}

/// One objective for a number of steps, with its own learning-rate schedule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// What is learnt.
    pub objective: Objective,
    /// Optimiser steps.
    pub steps: u64,
    /// Peak learning rate.
    pub lr: f32,
    /// Steps of linear learning-rate warm-up.
    #[serde(default)]
    pub lr_warmup: u64,
    /// Learning rate at the end, as a share of the peak; 1 keeps it constant.
    #[serde(default = "default_min_ratio")]
    pub lr_min_ratio: f32,
    /// B, for diffusion.
    #[serde(default = "default_block_length")]
    pub block_length: usize,
    /// Steps of corruption warm-up (arXiv 2601.15892 §3.2), for diffusion.
    #[serde(default)]
    pub corruption_warmup: u64,
    /// The warm-up's first mask rate.
    #[serde(default = "default_u_init")]
    pub u_init: f32,
}

fn default_min_ratio() -> f32 {
    0.1
}

fn default_block_length() -> usize {
    4
}

fn default_u_init() -> f32 {
    1e-3
}

/// What a phase learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// The next token under the causal mask.
    Ar,
    /// Masked tokens of each block from the clean blocks before it (block diffusion, two-copy pass).
    Diffusion,
}

impl Objective {
    /// Its name in recipes and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Objective::Ar => "ar",
            Objective::Diffusion => "diffusion",
        }
    }
}

impl Phase {
    /// Its learning-rate schedule over its own steps.
    pub fn learning_rate(&self) -> LearningRate {
        let decay = if self.lr_min_ratio >= 1.0 {
            Decay::Constant
        } else {
            Decay::Cosine { total_steps: self.steps, min_ratio: self.lr_min_ratio }
        };
        LearningRate { peak: self.lr, warmup_steps: self.lr_warmup, decay }
    }
}

impl Recipe {
    /// Reads and checks a recipe; relative paths in it are relative to its folder.
    pub fn read(path: &Path) -> Result<Recipe> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the recipe {}", path.display()))?;
        let mut recipe: Recipe =
            toml::from_str(&text).with_context(|| format!("in the recipe {}", path.display()))?;
        let base = path.parent().unwrap_or(Path::new("."));
        let from = recipe.model.from.iter_mut();
        for p in recipe.data.paths.iter_mut().chain(from) {
            *p = base.join(&p);
        }
        recipe.check().with_context(|| format!("in the recipe {}", path.display()))?;
        Ok(recipe)
    }

    /// Refuses what cannot be trained, naming the field.
    pub fn check(&self) -> Result<()> {
        match (&self.model.from, &self.model.fresh) {
            (Some(_), Some(_)) | (None, None) => {
                bail!("[model] needs either `from` (a model on disk) or `fresh` (a shape)")
            }
            _ => {}
        }
        let o = &self.optimizer;
        ensure!(!self.phase.is_empty(), "there is no [[phase]]: say what to train");
        ensure!(
            o.batch > 0 && o.micro_batch > 0,
            "optimizer: batch and micro_batch are at least 1"
        );
        ensure!(self.data.length >= 2, "data.length must be at least 2");
        ensure!(self.save_every > 0, "save_every must be at least 1");
        ensure!((0.0..1.0).contains(&self.data.held_out), "data.held_out must be in [0, 1)");
        ensure!(o.clip > 0.0 && o.eps > 0.0, "optimizer: clip and eps must be positive");
        let beta = |b: f64| (0.0..1.0).contains(&b);
        ensure!(beta(o.beta1) && beta(o.beta2), "optimizer: beta1 and beta2 must be in [0, 1)");
        for (i, phase) in self.phase.iter().enumerate() {
            ensure!(phase.steps > 0, "phase {i}: steps must be at least 1");
            ensure!(phase.lr.is_finite() && phase.lr > 0.0, "phase {i}: lr must be positive");
            ensure!(phase.block_length > 0, "phase {i}: block_length must be at least 1");
            ensure!(
                phase.objective == Objective::Ar
                    || self.data.length.is_multiple_of(phase.block_length),
                "phase {i}: data.length {} is no multiple of block_length {}",
                self.data.length,
                phase.block_length
            );
            ensure!(
                (0.0..=1.0).contains(&phase.u_init),
                "phase {i}: u_init is a mask rate, in [0, 1]"
            );
        }
        Ok(())
    }

    /// Steps of all phases.
    pub fn total_steps(&self) -> u64 {
        self.phase.iter().map(|p| p.steps).sum()
    }

    /// The phase of a step, and the step within it.
    pub fn at(&self, step: u64) -> Option<(&Phase, u64)> {
        let mut before = 0;
        for phase in &self.phase {
            if step < before + phase.steps {
                return Some((phase, step - before));
            }
            before += phase.steps;
        }
        None
    }

    /// The largest block length of any phase: what documents are aligned to under a document mask.
    pub fn alignment(&self) -> usize {
        let blocks = self.phase.iter().filter(|p| p.objective == Objective::Diffusion);
        blocks.map(|p| p.block_length).max().unwrap_or(1)
    }

    /// The filter for source files.
    pub fn filter(&self) -> Filter {
        let extensions: Vec<&str> = self.data.extensions.iter().map(String::as_str).collect();
        Filter::new(&extensions)
    }
}

impl Fresh {
    /// The Hugging Face configuration of this shape.
    pub fn config(&self, vocab_size: usize, eos: u32, mask: u32) -> LlamaConfig {
        LlamaConfig {
            vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.layers,
            num_attention_heads: self.heads,
            num_key_value_heads: self.kv_heads,
            head_dim: self.hidden_size / self.heads.max(1),
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: None,
            tie_word_embeddings: true,
            max_position_embeddings: self.context,
            bos_token_id: None,
            eos_token_ids: vec![eos],
            mask_token_id: Some(mask),
            pad_token_id: None,
            block_length: None,
        }
    }
}
