//! One f32 training step: forward, mean cross-entropy, backward; the gradients stay on the device, no optimiser.
//! Compared are the loss and the norms of three gradients.

use std::path::Path;

use anyhow::{Context as _, Result};
use demask_engine::autograd::{Gradients, backward};
use demask_engine::gpu::{Gpu, GpuOptions};
use demask_engine::model::{Inputs, Llama, Precision};
use demask_engine::ops::{AttentionOptions, Mask, Supervision, linear_cross_entropy};
use demask_engine::tensor::Tensor;

use crate::race::Results;
use crate::work::{COMPARED, step_tokens};
use crate::worker::{Job, Prepared, timed};

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

struct Demask {
    model: Llama,
    inputs: Inputs,
    supervision: Supervision,
    last: Option<(Tensor, Gradients)>,
}

/// demask's job.
pub fn demask(folder: &Path, tokens: usize) -> Result<Prepared> {
    let gpu = Gpu::open(GpuOptions::default())?;
    let model = Llama::load(&gpu, folder, Precision::F32)?.trainable();
    let (ids, targets) = step_tokens(tokens);
    let positions: Vec<u32> = (0..tokens as u32).collect();
    let inputs = Inputs {
        tokens: Tensor::from_u32(&gpu, &ids, [1, tokens]),
        positions: Tensor::from_u32(&gpu, &positions, [1, tokens]),
        attention: AttentionOptions::new(Mask::Causal),
    };
    let supervision = Supervision {
        targets: Tensor::from_u32(&gpu, &targets, [tokens]),
        weights: Tensor::from_f32(&gpu, &vec![1.0; tokens], [tokens]),
        divisor: tokens as f32,
    };
    let device = gpu.adapter().describe();
    Ok(Prepared::Job(device, Box::new(Demask { model, inputs, supervision, last: None })))
}

impl Job for Demask {
    fn run(&mut self, times: usize) -> Result<f64> {
        let model = &self.model;
        timed(|| {
            for _ in 0..times {
                let hidden = model.hidden(&self.inputs, false);
                let loss = linear_cross_entropy(&hidden, model.head(), &self.supervision).loss;
                let mut gradients = Gradients::new();
                let one = Tensor::from_f32(model.gpu(), &[1.0], [1]);
                // The last step's gradients make room first.
                drop(self.last.take());
                backward(&loss, &one, &mut gradients);
                self.last = Some((loss, gradients));
            }
            Ok(model.gpu().sync()?)
        })
    }

    fn results(&mut self) -> Result<Results> {
        let (loss, gradients) = self.last.as_ref().expect("run first");
        let mut results = vec![("loss".to_owned(), vec![f64::from(loss.item()?)])];
        for name in COMPARED {
            let parameters = self.model.parameters();
            let parameter = parameters.iter().find(|p| p.name == name);
            let parameter = parameter.with_context(|| format!("the model has no {name}"))?;
            let mut values = Vec::new();
            for shard in &parameter.shards {
                let gradient =
                    gradients.get(shard).with_context(|| format!("{name} got no gradient"))?;
                values.extend(gradient.to_vec()?);
            }
            results.push((name.to_owned(), vec![norm(&values)]));
        }
        Ok(results)
    }
}

#[cfg(feature = "burn")]
pub use with_burn::burn;

#[cfg(feature = "burn")]
mod with_burn {
    use burn::tensor::Tensor;

    use super::*;
    use crate::burn_llama::{BurnLlama, device, numbers, wait};

    struct Burn {
        model: BurnLlama,
        last: Option<(Tensor<1>, Vec<Tensor<2>>)>,
    }

    /// Burn's job.
    pub fn burn(folder: &Path, tokens: usize) -> Result<Prepared> {
        let (device, name) = device()?;
        let model = BurnLlama::load(folder, tokens, &device.autodiff())?;
        Ok(Prepared::Job(name, Box::new(Burn { model, last: None })))
    }

    impl Job for Burn {
        fn run(&mut self, times: usize) -> Result<f64> {
            timed(|| {
                for _ in 0..times {
                    let loss = self.model.loss();
                    drop(self.last.take());
                    let gradients = loss.backward();
                    let gradient = |name: &str| {
                        let gradient = self.model.parameter(name)?.grad(&gradients);
                        gradient.with_context(|| format!("{name} got no gradient"))
                    };
                    let kept = COMPARED.into_iter().map(gradient).collect::<Result<Vec<_>>>()?;
                    self.last = Some((loss.inner(), kept));
                }
                let (loss, kept) = self.last.clone().expect("just run");
                wait(loss)?;
                // The embedding's gradient comes last: the device is through when it is there.
                kept.into_iter().try_for_each(wait)
            })
        }

        fn results(&mut self) -> Result<Results> {
            let (loss, kept) = self.last.clone().expect("run first");
            let mut results = vec![("loss".to_owned(), vec![f64::from(numbers(loss)?[0])])];
            for (name, gradient) in COMPARED.into_iter().zip(kept) {
                results.push((name.to_owned(), vec![norm(&numbers(gradient)?)]));
            }
            Ok(results)
        }
    }
}

#[cfg(feature = "meganeura")]
pub use with_meganeura::meganeura;

#[cfg(feature = "meganeura")]
mod with_meganeura {
    use ::meganeura::models::smollm2::{
        SmolLM2Config, build_training_graph, transposed_weight_names, weight_names,
    };
    use ::meganeura::{Session, SessionConfig};

    use super::*;
    use crate::checkpoint::Checkpoint;

    struct Meganeura {
        session: Session,
    }

    /// meganeura's job, by its own builder of this model. Without a learning rate it runs no optimiser.
    pub fn meganeura(folder: &Path, tokens: usize) -> Result<Prepared> {
        let checkpoint = Checkpoint::read(folder)?;
        let shape = checkpoint.shape()?;
        let config = SmolLM2Config {
            vocab_size: shape.vocabulary,
            hidden_size: shape.width,
            num_hidden_layers: shape.layers,
            num_attention_heads: shape.heads as u32,
            num_key_value_heads: shape.kv_heads as u32,
            intermediate_size: shape.inner,
            rms_norm_eps: shape.eps,
            rope_theta: shape.rope_theta,
            tie_word_embeddings: true,
        };
        let graph = build_training_graph(&config, tokens);
        let mut session = crate::matmul::open(&graph, SessionConfig::from_env())?;
        let turned = transposed_weight_names(&config);
        for name in weight_names(&config) {
            let values = match turned.contains(&name) {
                true => {
                    let (values, rows, columns) = checkpoint.matrix(&name)?;
                    crate::checkpoint::transposed(&values, rows, columns)
                }
                false => checkpoint.values(&name)?,
            };
            session.set_parameter(&name, &values);
        }
        let (ids, targets) = step_tokens(tokens);
        let mut labels = vec![0.0; tokens * shape.vocabulary];
        for (row, target) in targets.into_iter().enumerate() {
            labels[row * shape.vocabulary + target as usize] = 1.0;
        }
        session.set_input_u32("token_ids", &ids);
        session.set_input("labels", &labels);
        let device = crate::matmul::describe(&session);
        Ok(Prepared::Job(device, Box::new(Meganeura { session })))
    }

    impl Job for Meganeura {
        fn run(&mut self, times: usize) -> Result<f64> {
            timed(|| {
                for _ in 0..times {
                    self.session.step();
                }
                self.session.wait();
                Ok(())
            })
        }

        fn results(&mut self) -> Result<Results> {
            let loss = f64::from(self.session.read_loss());
            let mut results = vec![("loss".to_owned(), vec![loss])];
            for name in COMPARED {
                let len = self.session.param_size(name).with_context(|| format!("no {name}"))?;
                let mut gradient = vec![0.0; len];
                self.session.read_param_grad(name, &mut gradient);
                results.push((name.to_owned(), vec![norm(&gradient)]));
            }
            Ok(results)
        }
    }
}
