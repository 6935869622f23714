//! AdamW over a model's parameters: moments beside each row shard, one norm over the whole gradient.

use anyhow::Result;
use demask_engine::autograd::Gradients;
use demask_engine::model::{Llama, Parameter};
use demask_engine::ops::{AdamW, Moments8, adamw_step, adamw8_step, grad_norm_within};
use demask_engine::tensor::{DType, Tensor};

use crate::recipe::{MomentType, Optimizer};

/// Moments of one row shard.
pub enum Moments {
    /// First and second, in f32: 8 bytes a weight.
    F32 {
        /// First moment.
        m: Tensor,
        /// Second moment.
        v: Tensor,
    },
    /// 2 bytes a weight.
    Eight(Moments8),
}

impl Moments {
    fn zeros(weight: &Tensor, kind: MomentType) -> Moments {
        let zeros = || Tensor::zeros(weight.gpu(), weight.shape(), DType::F32, "adamw moment");
        match kind {
            MomentType::F32 => Moments::F32 { m: zeros(), v: zeros() },
            MomentType::Eight => Moments::Eight(Moments8::zeros(weight.gpu(), weight.numel())),
        }
    }

    /// What a checkpoint stores, by name.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Moments::F32 { m, v } => vec![("m", m), ("v", v)],
            Moments::Eight(Moments8 { m, v, scales }) => {
                vec![("m8", m), ("v8", v), ("scales", scales)]
            }
        }
    }
}

/// The optimiser's state.
pub struct OptimizerState {
    /// Updates done; AdamW's bias correction counts from it.
    pub updates: u64,
    /// For each parameter, in the model's order, its shards' moments.
    pub moments: Vec<Vec<Moments>>,
}

impl OptimizerState {
    /// Zero moments for every weight of `model` that is trained.
    pub fn new(model: &Llama, settings: &Optimizer) -> OptimizerState {
        let zeros = |shard: &Tensor| Moments::zeros(shard, settings.moments);
        let moments =
            model.trained().iter().map(|p| p.shards.iter().map(zeros).collect()).collect();
        OptimizerState { updates: 0, moments }
    }

    /// The gradient's norm, without an update; 0 where nothing has a gradient.
    pub fn norm(&self, model: &Llama, gradients: &Gradients) -> Result<f32> {
        let trained = model.trained();
        let shards = trained.iter().flat_map(|p| &p.shards);
        let all: Vec<&Tensor> = shards.filter_map(|shard| gradients.get(shard)).collect();
        if all.is_empty() {
            return Ok(0.0);
        }
        Ok(grad_norm_within(&all, 1.0, f32::INFINITY, f32::INFINITY).to_vec()?[0])
    }

    /// One update in place. Returns f32 [2] on the device: the gradient's norm before clipping and the factor
    /// it was scaled by (0 if the norm is not finite or above `limit`, and then nothing moved). Without any
    /// gradient (early in the warm-up a step may mask nothing) nothing moves and the norm is 0.
    pub fn step(
        &mut self,
        model: &Llama,
        gradients: &Gradients,
        settings: &Optimizer,
        lr: f32,
        limit: f32,
    ) -> Result<Tensor> {
        let parameters = model.trained();
        let all: Vec<&Tensor> = parameters
            .iter()
            .flat_map(|p| &p.shards)
            .filter_map(|shard| gradients.get(shard))
            .collect();
        if all.is_empty() {
            return Ok(Tensor::from_f32(model.gpu(), &[0.0, 1.0], [2]));
        }
        self.updates += 1;
        let norm_and_scale = grad_norm_within(&all, 1.0, settings.clip, limit);
        // Names the draws by which a shard's 8-bit moments are rounded.
        let mut seed = 0;
        for (parameter, moments) in parameters.iter().zip(&self.moments) {
            let options = AdamW {
                lr: f64::from(lr),
                beta1: settings.beta1,
                beta2: settings.beta2,
                eps: settings.eps,
                weight_decay: if decays(parameter) { settings.weight_decay } else { 0.0 },
                step: self.updates as u32,
            };
            for (shard, state) in parameter.shards.iter().zip(moments) {
                seed += 1;
                // A weight that nothing flowed into (an unused head, say) stays as it is.
                let Some(gradient) = gradients.get(shard) else { continue };
                match state {
                    Moments::F32 { m, v } => {
                        adamw_step(shard, gradient, m, v, &norm_and_scale, options, 1.0);
                    }
                    Moments::Eight(eight) => {
                        adamw8_step(shard, gradient, eight, &norm_and_scale, options, 1.0, seed);
                    }
                }
            }
        }
        Ok(norm_and_scale)
    }
}

/// Matrices decay; norms do not, nor does the embedding: the mask token's row gets no gradient before the switch
/// to diffusion, and decay would shrink it to nothing by then.
pub fn decays(parameter: &Parameter) -> bool {
    parameter.shape.len() == 2 && parameter.name != "model.embed_tokens.weight"
}
