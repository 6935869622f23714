//! A training recipe: one TOML file that says what is trained on what, how, and for how long.
//! Everything but the paths has a default that a first run can live with.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use demask_engine::model::lora::Decoding;
use demask_engine::model::{DiffusionAttention, LlamaConfig, hub};
use demask_engine::ops::Mask;
use serde::{Deserialize, Serialize};

use crate::schedule::{Decay, LearningRate};

mod lora;

pub use lora::LoraSettings;

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Seeds weights, data order and noise.
    #[serde(default)]
    pub seed: u64,
    /// What to start from.
    pub model: ModelSource,
    /// Train an adapter over the model, whose weights stay as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSettings>,
    /// Where the text comes from.
    pub data: Data,
    /// How weights move.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// What is written while it trains.
    #[serde(default)]
    pub checkpoints: Checkpoints,
    /// What is measured while it trains.
    #[serde(default)]
    pub validation: Validation,
    /// When a step is not trusted.
    #[serde(default)]
    pub guard: Guard,
    /// Recompute each layer in the backward pass: less memory, about a third more time.
    #[serde(default)]
    pub recompute: bool,
    /// Objectives in order.
    pub phase: Vec<Phase>,
}

/// What to start from: a model on disk, or fresh weights of a shape with the dataset's tokenizer.
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

/// Shape of a model with fresh weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fresh {
    /// Tokens of the byte-level BPE to train on `data.paths`; a dataset brings its own tokenizer.
    #[serde(default = "default_vocab_size")]
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
    /// Base of the rotary frequencies.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f32,
}

fn default_vocab_size() -> usize {
    4096
}

fn default_context() -> usize {
    2048
}

fn default_rope_theta() -> f32 {
    10_000.0
}

/// Where the text comes from: a dataset, or directories of which one is made in the run's folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// A folder made by `demask data build`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset: Option<PathBuf>,
    /// Directories of source files, JSONL or Parquet files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<PathBuf>,
    /// Of `paths`: file extensions to read, without the dot; all known languages' if none is named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extensions: Vec<String>,
    /// Of `paths`: share of the text kept for validation, by package.
    #[serde(default = "default_held_out")]
    pub held_out: f64,
    /// Share of the sequences that each of the dataset's sources gets, instead of what the dataset says.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub weights: BTreeMap<String, f64>,
    /// L: tokens of a sequence.
    #[serde(default = "default_length")]
    pub length: usize,
    /// Confine attention to a token's own document. Off is the paper's choice (§4.1).
    #[serde(default)]
    pub document_mask: bool,
}

impl Data {
    /// Directories of source files with the defaults of a recipe.
    pub fn of_paths(paths: Vec<PathBuf>) -> Data {
        Data {
            dataset: None,
            paths,
            extensions: Vec::new(),
            held_out: default_held_out(),
            weights: BTreeMap::new(),
            length: default_length(),
            document_mask: false,
        }
    }
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
    /// How its two moments rest in memory.
    pub moments: MomentType,
}

/// How AdamW's moments rest in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MomentType {
    /// 8 bytes a weight.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// 2 bytes a weight, rounded at random without bias.
    #[serde(rename = "8bit")]
    Eight,
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
            moments: MomentType::F32,
        }
    }
}

/// What is written while it trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoints {
    /// Steps between two; each phase's end is one too.
    pub every: u64,
    /// How many of the newest are kept, beside the best by validation.
    pub keep: usize,
    /// The model at the end is the mean of this many of the newest checkpoints.
    pub average: usize,
}

impl Default for Checkpoints {
    fn default() -> Self {
        Checkpoints { every: 100, keep: 2, average: 1 }
    }
}

/// What is measured while it trains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Validation {
    /// Steps between two; 0 never measures.
    pub every: u64,
    /// Most sequences of each source's held-out text.
    pub sequences: usize,
    /// What the model is given to go on with at each validation.
    pub prompts: Vec<String>,
    /// Tokens of each answer.
    pub sample_tokens: usize,
}

impl Default for Validation {
    fn default() -> Self {
        Validation { every: 0, sequences: 32, prompts: Vec::new(), sample_tokens: 64 }
    }
}

/// When a step is not trusted. A step whose gradient is not finite never moves the weights; nor does one whose norm is
/// `spike` times the median of the last `window` steps. After `patience` such steps in a row the run goes back to its
/// last checkpoint and on with the text behind the one that failed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Guard {
    /// How many times the median norm a step may have.
    pub spike: f64,
    /// Steps that the median is over; until there are as many, only what is not finite is skipped.
    pub window: usize,
    /// Skipped steps in a row before the run goes back.
    pub patience: usize,
    /// How often it goes back before it gives up.
    pub rollbacks: usize,
}

impl Default for Guard {
    fn default() -> Self {
        Guard { spike: 20.0, window: 50, patience: 4, rollbacks: 3 }
    }
}

/// One objective for a number of steps, with its own learning-rate schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// Its name in metrics; the objective's, if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
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
    /// B, for block diffusion.
    #[serde(default)]
    pub block_length: BlockLength,
    /// Steps of corruption warm-up (arXiv 2601.15892 §3.2), for diffusion.
    #[serde(default)]
    pub corruption_warmup: u64,
    /// The warm-up's first mask rate.
    #[serde(default = "default_u_init")]
    pub u_init: f32,
    /// Clip a block's mask rate at 1/B and force one mask (§3.3); off draws it from all of (0, 1).
    #[serde(default = "default_true")]
    pub clip: bool,
    /// Spread the mask rates of a step evenly.
    #[serde(default = "default_true")]
    pub stratified: bool,
    /// Train each sequence twice in a step, the second time with what was visible masked and the other way round.
    #[serde(default)]
    pub complementary: bool,
}

fn default_min_ratio() -> f32 {
    0.1
}

fn default_u_init() -> f32 {
    1e-3
}

fn default_true() -> bool {
    true
}

/// B: one for the whole phase, or pairs [step, B] in ascending order, from step 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BlockLength {
    /// The whole phase.
    Fixed(usize),
    /// From each step on.
    Steps(Vec<(u64, usize)>),
}

impl Default for BlockLength {
    fn default() -> Self {
        BlockLength::Fixed(4)
    }
}

impl BlockLength {
    /// B at a step of the phase.
    pub fn at(&self, step: u64) -> usize {
        match self {
            BlockLength::Fixed(b) => *b,
            BlockLength::Steps(pairs) => {
                let passed = pairs.iter().take_while(|(from, _)| *from <= step);
                passed.last().map_or(1, |(_, b)| *b)
            }
        }
    }

    /// Every B that it takes.
    pub fn all(&self) -> Vec<usize> {
        match self {
            BlockLength::Fixed(b) => vec![*b],
            BlockLength::Steps(pairs) => pairs.iter().map(|(_, b)| *b).collect(),
        }
    }
}

/// What a phase learns. The three diffusion objectives share the forward process (each token of a block is masked with
/// the block's rate) and predict a masked token at its own place; they differ in who sees whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// The next token under the causal mask.
    Ar,
    /// Masked tokens of each block from the clean blocks before it and the rest of the block (two-copy pass).
    BlockDiffusion,
    /// Masked tokens of a sequence from all the others: one rate a sequence, attention in both directions.
    FullDiffusion,
    /// Masked tokens from those before them, masked or not: one rate a sequence, causal attention (the paper's
    /// ARDLLM, §3.1).
    CausalDiffusion,
}

impl Objective {
    /// Its name in recipes and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Objective::Ar => "ar",
            Objective::BlockDiffusion => "block_diffusion",
            Objective::FullDiffusion => "full_diffusion",
            Objective::CausalDiffusion => "causal_diffusion",
        }
    }

    /// Whether tokens are masked.
    pub fn is_diffusion(self) -> bool {
        self != Objective::Ar
    }
}

impl Phase {
    /// A phase with the defaults of a recipe.
    pub fn new(objective: Objective, steps: u64, lr: f32) -> Phase {
        Phase {
            name: None,
            objective,
            steps,
            lr,
            lr_warmup: 0,
            lr_min_ratio: default_min_ratio(),
            block_length: BlockLength::default(),
            corruption_warmup: 0,
            u_init: default_u_init(),
            clip: true,
            stratified: true,
            complementary: false,
        }
    }

    /// Its name in metrics.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(self.objective.name())
    }

    /// Its learning-rate schedule over its own steps.
    pub fn learning_rate(&self) -> LearningRate {
        let decay = if self.lr_min_ratio >= 1.0 {
            Decay::Constant
        } else {
            Decay::Cosine { total_steps: self.steps, min_ratio: self.lr_min_ratio }
        };
        LearningRate { peak: self.lr, warmup_steps: self.lr_warmup, decay }
    }

    /// Who sees whom at a step of the phase.
    pub fn mask(&self, step: u64) -> Mask {
        match self.objective {
            Objective::Ar | Objective::CausalDiffusion => Mask::Causal,
            Objective::BlockDiffusion => Mask::TwoCopy(self.block_length.at(step)),
            Objective::FullDiffusion => Mask::Full,
        }
    }

    /// The block length that its models are decoded with, after `step` steps; `None` for other objectives.
    pub fn decoded_block(&self, step: u64) -> Option<usize> {
        (self.objective == Objective::BlockDiffusion).then(|| self.block_length.at(step))
    }

    /// How its models are decoded after `step` steps; `None` if one token at a time.
    pub fn decoding(&self, step: u64, mask_id: u32) -> Option<Decoding> {
        let diffusion_attention = match self.objective {
            Objective::Ar => return None,
            Objective::BlockDiffusion => DiffusionAttention::Block,
            Objective::FullDiffusion => DiffusionAttention::Full,
            Objective::CausalDiffusion => DiffusionAttention::Causal,
        };
        let block_length = self.decoded_block(step);
        Some(Decoding { block_length, mask_token_id: Some(mask_id), diffusion_attention })
    }

    fn check(&self, data: &Data, batch: usize) -> Result<()> {
        ensure!(self.steps > 0, "steps must be at least 1");
        ensure!(self.lr.is_finite() && self.lr > 0.0, "lr must be positive");
        if let BlockLength::Steps(pairs) = &self.block_length {
            let ascends = pairs.windows(2).all(|w| w[0].0 < w[1].0);
            ensure!(
                pairs.first().is_some_and(|p| p.0 == 0) && ascends,
                "block_length as [step, B] pairs begins at step 0 and ascends"
            );
        }
        let all = self.block_length.all();
        let largest = all.iter().copied().max().unwrap_or(1);
        for b in all {
            ensure!(b > 0, "block_length must be at least 1");
            ensure!(
                self.objective != Objective::BlockDiffusion
                    || (data.length.is_multiple_of(b) && largest.is_multiple_of(b)),
                "data.length {} is no multiple of block_length {b}, or {largest} is none",
                data.length
            );
        }
        ensure!((0.0..=1.0).contains(&self.u_init), "u_init is a mask rate, in [0, 1]");
        ensure!(
            !self.complementary || (self.objective.is_diffusion() && batch.is_multiple_of(2)),
            "complementary masks need a diffusion objective and an even optimizer.batch"
        );
        Ok(())
    }
}

/// Where a step of a run stands.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The phase.
    pub phase: &'a Phase,
    /// Step within the phase.
    pub phase_step: u64,
    /// Sequences that were trained on before.
    pub sequences: u64,
}

impl Recipe {
    /// Reads and checks a recipe; relative paths in it are relative to its folder.
    pub fn read(path: &Path) -> Result<Recipe> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the recipe {}", path.display()))?;
        let mut recipe: Recipe =
            toml::from_str(&text).with_context(|| format!("in the recipe {}", path.display()))?;
        let base = path.parent().unwrap_or(Path::new("."));
        let (model, data) = (&mut recipe.model, &mut recipe.data);
        for p in data.paths.iter_mut().chain(&mut data.dataset) {
            *p = base.join(&p);
        }
        if let Some(from) = &mut model.from {
            let beside = base.join(&from);
            // What lies beside the recipe goes first, as with the hub's own tools.
            if beside.exists() || !hub::may_name(from) {
                *from = beside;
            }
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
        match (&self.data.dataset, self.data.paths.is_empty()) {
            (Some(_), false) | (None, true) => {
                bail!("[data] needs either `dataset` (made by demask data build) or `paths`")
            }
            _ => {}
        }
        if let Some(lora) = &self.lora {
            lora.check(self)?;
        }
        let o = &self.optimizer;
        ensure!(!self.phase.is_empty(), "there is no [[phase]]: say what to train");
        ensure!(
            o.batch > 0 && o.micro_batch > 0,
            "optimizer: batch and micro_batch are at least 1"
        );
        ensure!(self.data.length >= 2, "data.length must be at least 2");
        let c = &self.checkpoints;
        ensure!(
            c.every > 0 && c.keep > 0 && c.average > 0,
            "checkpoints: every, keep and average are at least 1"
        );
        ensure!(
            c.average <= c.keep,
            "checkpoints: average {} needs keep to be as large, it is {}",
            c.average,
            c.keep
        );
        ensure!((0.0..1.0).contains(&self.data.held_out), "data.held_out must be in [0, 1)");
        ensure!(o.clip > 0.0 && o.eps > 0.0, "optimizer: clip and eps must be positive");
        let beta = |b: f64| (0.0..1.0).contains(&b);
        ensure!(beta(o.beta1) && beta(o.beta2), "optimizer: beta1 and beta2 must be in [0, 1)");
        let g = &self.guard;
        ensure!(
            g.spike > 1.0 && g.window > 0 && g.patience > 0,
            "guard: spike must be above 1, window and patience at least 1"
        );
        for (i, phase) in self.phase.iter().enumerate() {
            phase.check(&self.data, o.batch).with_context(|| format!("phase {i}"))?;
        }
        Ok(())
    }

    /// Steps of all phases.
    pub fn total_steps(&self) -> u64 {
        self.phase.iter().map(|p| p.steps).sum()
    }

    /// Where a step stands; `None` after the last one.
    pub fn at(&self, step: u64) -> Option<Place<'_>> {
        let (mut before, mut sequences) = (0, 0);
        for phase in &self.phase {
            let a_step = self.sequences_of_a_step(phase);
            if step < before + phase.steps {
                let phase_step = step - before;
                return Some(Place {
                    phase,
                    phase_step,
                    sequences: sequences + phase_step * a_step,
                });
            }
            before += phase.steps;
            sequences += phase.steps * a_step;
        }
        None
    }

    /// Different sequences of one step.
    pub fn sequences_of_a_step(&self, phase: &Phase) -> u64 {
        self.optimizer.batch as u64 / if phase.complementary { 2 } else { 1 }
    }

    /// The largest block length of any phase: what documents are aligned to under a document mask.
    pub fn alignment(&self) -> usize {
        let blocks = self.phase.iter().filter(|p| p.objective == Objective::BlockDiffusion);
        blocks.flat_map(|p| p.block_length.all()).max().unwrap_or(1)
    }
}

impl Default for Fresh {
    fn default() -> Self {
        Fresh {
            vocab_size: default_vocab_size(),
            hidden_size: 256,
            intermediate_size: 704,
            layers: 6,
            heads: 4,
            kv_heads: 2,
            context: default_context(),
            rope_theta: default_rope_theta(),
        }
    }
}

impl Fresh {
    /// The Hugging Face configuration of this shape.
    pub fn config(&self, vocab_size: usize, eos: Option<u32>, mask: Option<u32>) -> LlamaConfig {
        LlamaConfig {
            vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.layers,
            num_attention_heads: self.heads,
            num_key_value_heads: self.kv_heads,
            head_dim: self.hidden_size / self.heads.max(1),
            rms_norm_eps: 1e-5,
            rope_theta: self.rope_theta,
            rope_scaling: None,
            tie_word_embeddings: true,
            max_position_embeddings: self.context,
            bos_token_id: None,
            eos_token_ids: eos.into_iter().collect(),
            mask_token_id: mask,
            pad_token_id: None,
            generation: serde_json::Map::new(),
            block_length: None,
            diffusion_attention: DiffusionAttention::default(),
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
        }
    }
}
