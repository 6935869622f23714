//! A batch that a step failed on, kept to look at it and to run it again.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::metrics::null_is_nan;
use crate::noise::Example;

/// `skipped/step-N.json` of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailedBatch {
    /// The step that failed.
    pub step: u64,
    /// Why.
    pub why: String,
    /// Its loss; NaN (null in the file) if it had none.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Norm of its gradient; NaN as above.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// Where its sequences stand in the order of the run.
    pub first_sequence: u64,
    /// The sequences as text.
    pub texts: Vec<String>,
    /// The sequences as they were trained on, noise included.
    pub examples: Vec<Example>,
}

/// What a failed batch gives with the model as it stands.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Replay {
    /// Steps that the model has done.
    pub after: u64,
    /// The training loss.
    pub loss: f64,
    /// Norm of the gradient.
    pub grad_norm: f64,
    /// Mean cross-entropy of each sequence's supervised tokens, in nats; `None` where it has none.
    pub sequences: Vec<Option<f64>>,
}

impl FailedBatch {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<FailedBatch> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the batch {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is no batch that a run kept", path.display()))
    }

    /// Whether a model of this vocabulary can run it.
    pub fn fits(&self, vocabulary: usize) -> bool {
        let Some(first) = self.examples.first() else { return false };
        self.examples.iter().all(|e| {
            let (rows, n) = (e.tokens.len(), e.supervised.len());
            let known = |ids: &[u32]| ids.iter().all(|&id| (id as usize) < vocabulary);
            rows > 0
                && (rows, e.spans.len()) == (first.tokens.len(), first.spans.len())
                && e.positions.len() == rows
                && (e.targets.len(), e.weights.len()) == (n, n)
                && (e.rates.is_empty() || e.rates.len() == n)
                && known(&e.tokens)
                && known(&e.targets)
                && e.supervised.iter().all(|&row| (row as usize) < rows)
        })
    }
}
