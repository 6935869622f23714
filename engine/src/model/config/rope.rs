//! Rotary frequencies and their long-context scaling, by the formulas of transformers 5's `modeling_rope_utils`. Not
//! here: applying them (`ops/rope.rs`).

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
    /// Frequencies of a base that grows with the text, once that is longer than `max_position_embeddings`.
    Dynamic {
        /// At least 1: how fast the base grows.
        factor: f32,
    },
    /// YaRN (arXiv 2309.00071): as Llama 3.1 with a ramp over the frequencies' indices, and attention made sharper.
    Yarn(Yarn),
    /// LongRoPE (arXiv 2402.13753): each frequency has a divisor of its own, another one in texts beyond the original
    /// context.
    LongRope(LongRope),
}

/// The numbers of [`RopeScaling::Yarn`].
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// At least 1.
    pub factor: f32,
    /// Context length in tokens before the stretch.
    pub original_max_position_embeddings: usize,
    /// Frequencies that turn more often than this in the original context are kept.
    pub beta_fast: f32,
    /// Frequencies that turn less often than this in the original context are divided in full.
    pub beta_slow: f32,
    /// Whether the ramp begins and ends at whole indices.
    pub truncate: bool,
    /// What sine and cosine are multiplied by; `None` follows from `factor` and `mscale`.
    pub attention_factor: Option<f32>,
    /// `mscale` and `mscale_all_dim`, where both are there and not 0.
    pub mscale: Option<[f32; 2]>,
}

/// The numbers of [`RopeScaling::LongRope`].
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    /// Divisors in texts of up to `original_max_position_embeddings` tokens, one a frequency: [head_dim / 2].
    pub short_factor: Vec<f32>,
    /// Divisors in longer texts.
    pub long_factor: Vec<f32>,
    /// Context length in tokens before the stretch.
    pub original_max_position_embeddings: usize,
    /// How far the context was stretched, where the file says so.
    pub factor: Option<f32>,
    /// What sine and cosine are multiplied by; `None` follows from the stretch.
    pub attention_factor: Option<f32>,
}

/// What the rotary formulas need of a model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rope<'a> {
    pub head_dim: usize,
    pub theta: f32,
    pub max_position_embeddings: usize,
    pub scaling: Option<&'a RopeScaling>,
}

impl RopeScaling {
    /// Takes `rope_scaling` or `rope_parameters`; `None` for the type `default`. `root` is the whole `config.json`.
    pub(super) fn from_json(fields: &Fields<'_>, root: &Fields<'_>) -> Result<Option<Self>> {
        let missing =
            |name: &str| fields.error(format!("rope_scaling.{name} is missing; expected a number"));
        let need = |name: &str| fields.f32(name)?.ok_or_else(|| missing(name));
        // The number beside the others wins over the one among them, as in transformers.
        let original = || -> Result<usize> {
            let name = "original_max_position_embeddings";
            let named = root.usize(name)?.map_or_else(|| fields.usize(name), |n| Ok(Some(n)))?;
            Ok(named.or(root.usize("max_position_embeddings")?).unwrap_or(2048))
        };
        let kind = ["rope_type", "type"].iter().filter_map(|name| fields.map.get(*name));
        match kind.filter(|v| !v.is_null()).map(|v| v.as_str().unwrap_or("?")).next() {
            None | Some("default") => Ok(None),
            Some("linear") => Ok(Some(Self::Linear { factor: need("factor")? })),
            Some("dynamic") => Ok(Some(Self::Dynamic { factor: need("factor")? })),
            Some("llama3") => Ok(Some(Self::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position_embeddings: original()?,
            })),
            Some("yarn") => {
                let some = |name: &str| Ok(fields.f32(name)?.filter(|&x| x != 0.0));
                Ok(Some(Self::Yarn(Yarn {
                    factor: need("factor")?,
                    original_max_position_embeddings: original()?,
                    beta_fast: some("beta_fast")?.unwrap_or(32.0),
                    beta_slow: some("beta_slow")?.unwrap_or(1.0),
                    truncate: fields.bool("truncate")?.unwrap_or(true),
                    attention_factor: fields.f32("attention_factor")?,
                    mscale: some("mscale")?.zip(some("mscale_all_dim")?).map(|(a, b)| [a, b]),
                })))
            }
            Some("longrope") => {
                let list = |name: &str| fields.f32s(name)?.ok_or_else(|| missing(name));
                Ok(Some(Self::LongRope(LongRope {
                    short_factor: list("short_factor")?,
                    long_factor: list("long_factor")?,
                    original_max_position_embeddings: original()?,
                    factor: fields.f32("factor")?,
                    attention_factor: fields.f32("attention_factor")?,
                })))
            }
            Some(other) => Err(fields.error(format!(
                "rope_scaling type {} is not supported; expected default, linear, dynamic, llama3, yarn or longrope",
                brief(&json!(other))
            ))),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        let mut value = match self {
            Self::Linear { factor } => json!({"rope_type": "linear", "factor": shortest(*factor)}),
            Self::Dynamic { factor } => {
                json!({"rope_type": "dynamic", "factor": shortest(*factor)})
            }
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
            Self::Yarn(yarn) => json!({
                "rope_type": "yarn",
                "factor": shortest(yarn.factor),
                "original_max_position_embeddings": yarn.original_max_position_embeddings,
                "beta_fast": shortest(yarn.beta_fast),
                "beta_slow": shortest(yarn.beta_slow),
                "truncate": yarn.truncate,
                "attention_factor": yarn.attention_factor.map(shortest),
                "mscale": yarn.mscale.map(|m| shortest(m[0])),
                "mscale_all_dim": yarn.mscale.map(|m| shortest(m[1])),
            }),
            Self::LongRope(long) => {
                let list = |values: &[f32]| values.iter().map(|&x| shortest(x)).collect::<Vec<_>>();
                json!({
                    "rope_type": "longrope",
                    "short_factor": list(&long.short_factor),
                    "long_factor": list(&long.long_factor),
                    "original_max_position_embeddings": long.original_max_position_embeddings,
                    "factor": long.factor.map(shortest),
                    "attention_factor": long.attention_factor.map(shortest),
                })
            }
        };
        if let Some(map) = value.as_object_mut() {
            map.retain(|_, value| !value.is_null());
        }
        value
    }

    pub(super) fn validate(&self, head_dim: usize, path: &Path) -> Result<()> {
        let bad = |name: &str, found: String, right: &str| {
            Err(Error::model(path, format!("rope_scaling.{name} is {found}; expected {right}")))
        };
        let (factor, original, attention) = match self {
            Self::Linear { factor } | Self::Dynamic { factor } => (Some(*factor), None, None),
            Self::Llama3 { factor, original_max_position_embeddings, .. } => {
                (Some(*factor), Some(*original_max_position_embeddings), None)
            }
            Self::Yarn(y) => {
                (Some(y.factor), Some(y.original_max_position_embeddings), y.attention_factor)
            }
            Self::LongRope(l) => {
                (l.factor, Some(l.original_max_position_embeddings), l.attention_factor)
            }
        };
        if let Some(factor) = factor.filter(|factor| !(1.0..=1e6).contains(factor)) {
            return bad("factor", factor.to_string(), "1 to 1e6");
        }
        if let Some(original) = original.filter(|&n| n == 0 || n > 1 << 30) {
            return bad("original_max_position_embeddings", original.to_string(), "1 to 2^30");
        }
        if let Some(factor) = attention.filter(|factor| !(0.0..=1e6).contains(factor)) {
            return bad("attention_factor", factor.to_string(), "0 to 1e6");
        }
        match self {
            Self::Llama3 { low_freq_factor: low, high_freq_factor: high, .. }
                if !(*low > 0.0 && high > low && *high <= 1e6) =>
            {
                let reason = format!(
                    "rope_scaling has low_freq_factor {low}, high_freq_factor {high}; expected 0 \
                     < low < high"
                );
                Err(Error::model(path, reason))
            }
            Self::Yarn(Yarn { beta_fast: fast, beta_slow: slow, .. })
                if !(*slow > 0.0 && fast >= slow && *fast <= 1e6) =>
            {
                let reason = format!(
                    "rope_scaling has beta_slow {slow}, beta_fast {fast}; expected 0 < slow <= fast"
                );
                Err(Error::model(path, reason))
            }
            Self::Yarn(Yarn { mscale: Some(m), .. })
                if !m.iter().all(|m| (0.0..=1e6).contains(m)) =>
            {
                bad("mscale", format!("{m:?}"), "numbers from 0 to 1e6")
            }
            // The exponent of the base is head_dim / (head_dim - 2).
            Self::Dynamic { .. } if head_dim <= 2 => {
                bad("rope_type", "dynamic".into(), "another one for heads of two elements")
            }
            Self::LongRope(long) => {
                for (name, list) in
                    [("short_factor", &long.short_factor), ("long_factor", &long.long_factor)]
                {
                    if list.len() != head_dim / 2 {
                        let right = format!("{}, one a frequency", head_dim / 2);
                        return bad(name, format!("a list of {}", list.len()), &right);
                    }
                    if let Some(x) = list.iter().find(|x| !(1e-6..=1e6).contains(*x)) {
                        return bad(name, format!("a list with {x}"), "1e-6 to 1e6");
                    }
                }
                match long.original_max_position_embeddings {
                    // Its logarithm is divided by.
                    1 => bad("original_max_position_embeddings", "1".into(), "2 to 2^30"),
                    _ => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }
}

impl Rope<'_> {
    /// The longest text, in tokens, that has the frequencies of short ones; longer ones have their own.
    pub fn steady_length(&self) -> usize {
        match self.scaling {
            Some(RopeScaling::Dynamic { .. }) => self.max_position_embeddings,
            Some(RopeScaling::LongRope(long)) => long.original_max_position_embeddings,
            _ => usize::MAX,
        }
    }

    /// What sine and cosine are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        let mscale =
            |scale: f64, m: f64| if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 };
        let factor = match self.scaling {
            Some(RopeScaling::Yarn(yarn)) => match (yarn.attention_factor, yarn.mscale) {
                (Some(given), _) => return given,
                (None, Some([a, b])) => {
                    let (factor, a, b) = (f64::from(yarn.factor), f64::from(a), f64::from(b));
                    mscale(factor, a) / mscale(factor, b)
                }
                (None, None) => mscale(f64::from(yarn.factor), 1.0),
            },
            Some(RopeScaling::LongRope(long)) => {
                let original = long.original_max_position_embeddings as f64;
                let stretch = self.max_position_embeddings as f64 / original;
                match (long.attention_factor, long.factor.map_or(stretch, f64::from)) {
                    (Some(given), _) => return given,
                    (None, factor) if factor <= 1.0 => 1.0,
                    (None, factor) => (1.0 + factor.ln() / original.ln()).sqrt(),
                }
            }
            _ => 1.0,
        };
        factor as f32
    }

    /// Frequencies `[head_dim / 2]` in radians per position, in a text of `length` tokens. Powers are taken in f64 and
    /// rounded once, where transformers takes them in f32, so the two may differ by 2 units in the last place.
    pub fn frequencies(&self, length: usize) -> Vec<f32> {
        match self.scaling {
            None => self.plain(self.theta).collect(),
            Some(RopeScaling::Linear { factor }) => {
                self.plain(self.theta).map(|freq| freq / factor).collect()
            }
            Some(RopeScaling::Dynamic { factor }) => {
                self.plain(self.dynamic_theta(*factor, length)).collect()
            }
            Some(RopeScaling::Yarn(yarn)) => self.yarn(yarn),
            Some(RopeScaling::LongRope(long)) => {
                let divisors = match length > long.original_max_position_embeddings {
                    true => &long.long_factor,
                    false => &long.short_factor,
                };
                self.powers(self.theta).zip(divisors).map(|(power, d)| 1.0 / (d * power)).collect()
            }
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
                self.plain(self.theta).map(scale).collect()
            }
        }
    }

    /// Positions per radian: base to the power of 2 i / head_dim.
    fn powers(&self, base: f32) -> impl Iterator<Item = f32> {
        let head_dim = self.head_dim;
        (0..head_dim).step_by(2).map(move |i| {
            let exponent = i as f32 / head_dim as f32;
            f64::from(base).powf(f64::from(exponent)) as f32
        })
    }

    fn plain(&self, base: f32) -> impl Iterator<Item = f32> {
        self.powers(base).map(|power| 1.0 / power)
    }

    /// The base in a text of `length` tokens.
    fn dynamic_theta(&self, factor: f32, length: usize) -> f32 {
        let most = self.max_position_embeddings as f32;
        if length <= self.max_position_embeddings {
            return self.theta;
        }
        let exponent = self.head_dim as f64 / (self.head_dim as f64 - 2.0);
        let stretch = factor * length as f32 / most - (factor - 1.0);
        self.theta * f64::from(stretch).powf(exponent) as f32
    }

    fn yarn(&self, yarn: &Yarn) -> Vec<f32> {
        let (theta, dim) = (f64::from(self.theta), self.head_dim as f64);
        let original = yarn.original_max_position_embeddings as f64;
        // The index of the frequency that turns so often in the original context.
        let index = |turns: f32| {
            let wavelength = original / (f64::from(turns) * 2.0 * std::f64::consts::PI);
            dim * wavelength.ln() / (2.0 * theta.ln())
        };
        let (low, high) = (index(yarn.beta_fast), index(yarn.beta_slow));
        let (low, high) = if yarn.truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        let high = if low == high { high + 0.001 } else { high };
        let (low, width) = (low as f32, (high - low) as f32);
        let scale = |(i, power): (usize, f32)| {
            let kept = 1.0 - ((i as f32 - low) / width).clamp(0.0, 1.0);
            1.0 / (yarn.factor * power) * (1.0 - kept) + 1.0 / power * kept
        };
        self.powers(self.theta).enumerate().map(scale).collect()
    }
}
