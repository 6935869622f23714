//! What a recipe says of an adapter.

use anyhow::{Result, bail, ensure};
use demask_engine::model::Precision;
use demask_engine::model::lora::TARGETS;
use serde::{Deserialize, Serialize};

use super::Recipe;

/// A low-rank adapter over frozen weights (LoRA, arXiv 2106.09685).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSettings {
    /// r; multiples of 8 are the fast ones.
    pub rank: usize,
    /// The adapter's product is scaled by alpha / rank.
    pub alpha: f64,
    /// Which matrices of each layer.
    pub targets: Vec<String>,
    /// Learn a length for each row too (DoRA, arXiv 2402.09353).
    pub dora: bool,
    /// How the frozen matrices rest in memory.
    pub base: Precision,
}

impl Default for LoraSettings {
    fn default() -> Self {
        let targets = TARGETS.map(String::from).to_vec();
        LoraSettings { rank: 16, alpha: 32.0, targets, dora: false, base: Precision::Stored }
    }
}

impl LoraSettings {
    pub(super) fn check(&self, recipe: &Recipe) -> Result<()> {
        ensure!(recipe.model.from.is_some(), "lora: an adapter needs a model to adapt, model.from");
        ensure!(
            self.rank > 0 && self.alpha.is_finite() && self.alpha > 0.0,
            "lora: rank and alpha must be positive"
        );
        ensure!(!self.targets.is_empty(), "lora: targets names no matrix");
        if let Some(target) = self.targets.iter().find(|t| !TARGETS.contains(&t.as_str())) {
            bail!("lora: there is no target {target:?}; targets are of {}", TARGETS.join(", "));
        }
        ensure!(
            recipe.checkpoints.average == 1,
            "lora: the mean of adapters is not the adapter of the mean; set checkpoints.average = 1"
        );
        Ok(())
    }
}
