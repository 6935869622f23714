//! Rotary frequencies and their long-context scaling. Not here: applying them (an op of the
//! engine).

use std::path::Path;

use serde_json::{Value, json};

use super::fields::{Fields, brief, shortest};
use crate::{Error, Result};

/// `rope_scaling` of HF `config.json`. The type `default` is expressed by its absence.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Every frequency divided by `factor`.
    Linear {
        /// At least 1.
        factor: f32,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// At least 1.
        factor: f32,
        /// Wavelengths above `original_max_position_embeddings` / this are divided in full.
        low_freq_factor: f32,
        /// Wavelengths below `original_max_position_embeddings` / this are kept.
        high_freq_factor: f32,
        /// Context length in tokens before the stretch.
        original_max_position_embeddings: usize,
    },
}

impl RopeScaling {
    /// Takes `rope_scaling` (or `rope_parameters`); `None` for the type `default`.
    pub(super) fn from_json(value: &Value, path: &Path) -> Result<Option<Self>> {
        let Some(map) = value.as_object() else {
            return Err(Error::model(
                path,
                format!("rope_scaling is {}; expected an object or null", brief(value)),
            ));
        };
        let fields = Fields { map, path };
        let need = |name: &str| {
            fields.f32(name)?.ok_or_else(|| {
                fields.error(format!("rope_scaling.{name} is missing; expected a number"))
            })
        };
        let kind =
            ["rope_type", "type"].iter().filter_map(|name| map.get(*name)).find(|v| !v.is_null());
        match kind.map(|v| v.as_str().unwrap_or("?")) {
            None | Some("default") => Ok(None),
            Some("linear") => Ok(Some(Self::Linear { factor: need("factor")? })),
            Some("llama3") => Ok(Some(Self::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position_embeddings: fields
                    .need_usize("original_max_position_embeddings")?,
            })),
            Some(other) => Err(fields.error(format!(
                "rope_scaling type {} is not supported; expected default, linear or llama3",
                brief(&json!(other))
            ))),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::Linear { factor } => json!({"rope_type": "linear", "factor": shortest(*factor)}),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => json!({
                "rope_type": "llama3",
                "factor": shortest(*factor),
                "low_freq_factor": shortest(*low_freq_factor),
                "high_freq_factor": shortest(*high_freq_factor),
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
        }
    }

    pub(super) fn validate(&self, path: &Path) -> Result<()> {
        let factor = match self {
            Self::Linear { factor } | Self::Llama3 { factor, .. } => *factor,
        };
        if !(1.0..=1e6).contains(&factor) {
            return Err(Error::model(
                path,
                format!("rope_scaling.factor is {factor}; expected 1 to 1e6"),
            ));
        }
        if let Self::Llama3 {
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
            ..
        } = self
        {
            let (low, high) = (*low_freq_factor, *high_freq_factor);
            if !(low > 0.0 && high > low && high <= 1e6) {
                let reason = format!(
                    "rope_scaling has low_freq_factor {low}, high_freq_factor {high}; expected 0 \
                     < low < high"
                );
                return Err(Error::model(path, reason));
            }
            let original = *original_max_position_embeddings;
            if original == 0 || original > 1 << 30 {
                let reason = format!(
                    "rope_scaling.original_max_position_embeddings is {original}; expected 1 to \
                     2^30"
                );
                return Err(Error::model(path, reason));
            }
        }
        Ok(())
    }
}

/// Frequencies `[head_dim / 2]` in radians per position, by the formulas of transformers'
/// `modeling_rope_utils`. The power is taken in f64 and rounded once, where transformers takes it in
/// f32, so the two may differ by 2 units in the last place.
pub(super) fn inv_freq(head_dim: usize, theta: f32, scaling: Option<&RopeScaling>) -> Vec<f32> {
    let base = |i: usize| {
        let exponent = i as f32 / head_dim as f32;
        1.0 / (theta as f64).powf(exponent as f64) as f32
    };
    let plain = (0..head_dim).step_by(2).map(base);
    match scaling {
        None => plain.collect(),
        Some(RopeScaling::Linear { factor }) => plain.map(|freq| freq / factor).collect(),
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings,
        }) => {
            let original = *original_max_position_embeddings as f32;
            let scale = |freq: f32| {
                let wavelength = 2.0 * std::f32::consts::PI / freq;
                if wavelength > original / low {
                    freq / factor
                } else if wavelength < original / high {
                    freq
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * freq / factor + smooth * freq
                }
            };
            plain.map(scale).collect()
        }
    }
}
