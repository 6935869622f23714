//! A linear layer of the model, with the low-rank adapter that may lie over it (see `lora.rs`):
//!   y = x · Wᵀ + s (x · Aᵀ) · Bᵀ                  x: [.., D]  W: [O, D]  A: [r, D]  B: [O, r]  y: [.., O]
//!   (A bias, where the model has one, is added after all that.)
//!   DoRA: y ⊙ m / ‖W + s B A‖                     m: [O], and the lengths of the rows, constant in the derivative
//! W may be of any type and is never widened or merged: the adapter is two thin products beside it.

use super::lora::{Lora, LowRank};
use super::parameter::{Parameter, widen};
use crate::autograd::without_recording;
use crate::gpu::Gpu;
use crate::ops::{Layout, add, div, linear, linear_onto, matmul, mul, scale, sqrt, sum};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// A weight and its adapter.
pub(super) struct Projection {
    pub weight: Parameter,
    /// Added to what the weight and its adapter give: [O].
    pub bias: Option<Parameter>,
    pub adapter: Option<Adapter>,
}

/// [`LowRank`] on the device.
pub(super) struct Adapter {
    pub a: Parameter,
    pub b: Parameter,
    alpha: f64,
    by_root: bool,
    scale: f32,
    pub magnitude: Option<Magnitude>,
}

/// What DoRA needs.
pub(super) struct Magnitude {
    pub m: Parameter,
    /// ‖W‖² of each row: [O].
    squares: Tensor,
    /// [r, r]: turns a product round.
    identity: Tensor,
}

impl Projection {
    pub fn with_bias(weight: Parameter, bias: Option<Parameter>) -> Projection {
        Projection { weight, bias, adapter: None }
    }

    /// Nothing is added to the product with its weight.
    pub fn is_plain(&self) -> bool {
        self.adapter.is_none() && self.bias.is_none()
    }

    /// [.., D] → [.., O].
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let y = linear(x, &self.weight.shards);
        let y = match &self.adapter {
            None => y,
            Some(adapter) => adapter.adapt(x, &y, &self.weight.shards),
        };
        match &self.bias {
            None => y,
            Some(bias) => add(&y, &bias.shards[0]),
        }
    }

    /// residual [.., O] + [`Projection::forward`].
    pub fn onto(&self, residual: &Tensor, x: &Tensor) -> Tensor {
        let y = match &self.adapter {
            None => linear_onto(residual, x, &self.weight.shards),
            // The residual is no part of what DoRA scales.
            Some(Adapter { magnitude: Some(_), .. }) => return add(residual, &self.forward(x)),
            Some(adapter) => adapter.add(x, &linear_onto(residual, x, &self.weight.shards)),
        };
        match &self.bias {
            None => y,
            Some(bias) => add(&y, &bias.shards[0]),
        }
    }

    /// Lays an adapter over the weight.
    pub fn adapt(&mut self, gpu: &Gpu, low: &LowRank, lora: &Lora) -> Result<()> {
        let rank = low.rank;
        let [o, d] = [self.weight.shape[0], self.weight.shape[1]];
        let module = self.weight.name.trim_end_matches(".weight");
        let parameter = |part: &str, values: &[f32], shape: &[usize]| Parameter {
            name: format!("{module}.{part}"),
            shape: shape.to_vec(),
            shards: vec![Tensor::from_f32(gpu, values, shape)],
        };
        let magnitude = match lora.dora {
            true => {
                let squares = self.squares()?;
                let lengths = || squares.iter().map(|s| s.sqrt()).collect();
                let m = if low.magnitude.is_empty() { lengths() } else { low.magnitude.clone() };
                let unit = |i: usize| if i.is_multiple_of(rank + 1) { 1.0 } else { 0.0 };
                let identity: Vec<f32> = (0..rank * rank).map(unit).collect();
                Some(Magnitude {
                    m: parameter("lora_magnitude_vector", &m, &[o]),
                    squares: Tensor::from_f32(gpu, &squares, [o]),
                    identity: Tensor::from_f32(gpu, &identity, [rank, rank]),
                })
            }
            false => None,
        };
        self.adapter = Some(Adapter {
            a: parameter("lora_A.weight", &low.a, &[rank, d]),
            b: parameter("lora_B.weight", &low.b, &[o, rank]),
            alpha: low.alpha,
            by_root: lora.by_root,
            scale: lora.scale(low),
            magnitude,
        });
        Ok(())
    }

    /// Sums of the squares of the weight's rows.
    fn squares(&self) -> Result<Vec<f32>> {
        let mut squares = Vec::with_capacity(self.weight.shape[0]);
        for shard in &self.weight.shards {
            let square = |row: &[f32]| row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>();
            let values = widen(shard)?;
            squares.extend(values.chunks(shard.shape().last()).map(|row| square(row) as f32));
        }
        Ok(squares)
    }
}

impl Adapter {
    /// Its tensors, in the order of an optimiser.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        [&self.a, &self.b].into_iter().chain(self.magnitude.as_ref().map(|m| &m.m))
    }

    /// Makes its tensors trainable leaves.
    pub fn train(&mut self) {
        let Adapter { a, b, magnitude, .. } = self;
        for p in [a, b].into_iter().chain(magnitude.as_mut().map(|m| &mut m.m)) {
            p.shards.iter_mut().for_each(|t| *t = t.trainable());
        }
    }

    /// An adapter of its kind without modules.
    pub fn empty(&self) -> Lora {
        Lora::empty(self.by_root, self.magnitude.is_some())
    }

    /// Its values on the host.
    pub fn read(&self) -> Result<LowRank> {
        let values = |p: &Parameter| p.shards[0].to_vec();
        Ok(LowRank {
            rank: self.a.shape[0],
            alpha: self.alpha,
            a: values(&self.a)?,
            b: values(&self.b)?,
            magnitude: self.magnitude.as_ref().map_or(Ok(vec![]), |m| values(&m.m))?,
        })
    }

    /// The way back of [`Adapter::read`].
    pub fn overwrite(&self, low: &LowRank) -> Result<()> {
        let magnitude = self.magnitude.as_ref().map(|m| (&m.m, &low.magnitude));
        for (p, values) in [(&self.a, &low.a), (&self.b, &low.b)].into_iter().chain(magnitude) {
            if values.len() != p.shards[0].numel() {
                let reason = format!("{} has {} values in another adapter", p.name, values.len());
                return Err(Error::Request(reason));
            }
            p.shards[0].overwrite(values);
        }
        Ok(())
    }

    /// y + s (x · Aᵀ) · Bᵀ.
    fn add(&self, x: &Tensor, y: &Tensor) -> Tensor {
        linear_onto(y, &scale(&linear(x, &self.a.shards), self.scale), &self.b.shards)
    }

    fn adapt(&self, x: &Tensor, y: &Tensor, weight: &[Tensor]) -> Tensor {
        let y = self.add(x, y);
        match &self.magnitude {
            None => y,
            Some(magnitude) => {
                let lengths = without_recording(|| self.lengths(magnitude, weight));
                mul(&y, &div(&magnitude.m.shards[0], &lengths))
            }
        }
    }

    /// ‖W + s B A‖ of each row, [O], without that sum in memory:
    ///   ‖W_o + s B_o A‖² = ‖W_o‖² + B_o · (2 s A W_oᵀ + s² A Aᵀ B_oᵀ)
    fn lengths(&self, magnitude: &Magnitude, weight: &[Tensor]) -> Tensor {
        let (a, b, s) = (&self.a.shards[0], &self.b.shards[0], self.scale);
        let wa = matmul(&linear(a, weight), &magnitude.identity, Layout::TN);
        let baa = matmul(b, &matmul(a, a, Layout::NT), Layout::NN);
        let cross = mul(b, &add(&scale(&wa, 2.0 * s), &scale(&baa, s * s)));
        sqrt(&add(&magnitude.squares, &sum(&cross, 1)))
    }
}
