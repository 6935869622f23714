//! From packed sequences to a loss on the device: lays out the examples of one step under an objective and runs
//! them in micro-batches. What a step draws depends on (seed, step, sequence), never on the split.

use demask_engine::gpu::Gpu;
use demask_engine::model::{Inputs, Llama};
use demask_engine::ops::{AttentionOptions, CrossEntropy, Mask, Supervision, linear_cross_entropy};
use demask_engine::tensor::Tensor;

use crate::noise::{Corruption, Example, NoiseKey, Schedule};
use crate::pack::Packed;
use crate::recipe::{Objective, Phase};

/// How one step turns sequences into examples.
pub struct StepPlan<'a> {
    /// The objective and its settings.
    pub phase: &'a Phase,
    /// Step within the phase: decides the corruption schedule.
    pub phase_step: u64,
    /// Step of the run: keys the noise.
    pub step: u64,
    /// The run's seed.
    pub seed: u64,
    /// The token of a hole.
    pub mask_id: u32,
}

impl StepPlan<'_> {
    /// The examples of sequences `first`.. of the run, one per sequence of the batch.
    pub fn examples(&self, data: &Packed, first: u64, n: usize) -> Vec<Example> {
        (0..n as u64)
            .map(|i| {
                let sequence = data.sequence(first + i);
                let everything = vec![true; sequence.tokens.len()];
                match self.phase.objective {
                    Objective::Ar => {
                        Example::autoregressive(sequence.tokens, &everything, sequence.spans)
                    }
                    Objective::Diffusion => {
                        let key = NoiseKey {
                            seed: self.seed,
                            step: self.step as u32,
                            sequence: i as u32,
                        };
                        let xt = self.corruption().corrupt(sequence.tokens, &everything, key);
                        Example::two_copy(sequence.tokens, &everything, sequence.spans, &xt)
                    }
                }
            })
            .collect()
    }

    fn corruption(&self) -> Corruption {
        let Phase { corruption_warmup, u_init, block_length, .. } = *self.phase;
        Corruption {
            block_length,
            mask_id: self.mask_id,
            schedule: Schedule::at(self.phase_step, corruption_warmup, u_init),
            stratified: true,
        }
    }

    /// The attention mask of this objective.
    pub fn mask(&self) -> Mask {
        match self.phase.objective {
            Objective::Ar => Mask::Causal,
            Objective::Diffusion => Mask::TwoCopy(self.phase.block_length),
        }
    }
}

/// What `Σ weight · CE` of the whole step is divided by: every token that could have been supervised. It is the
/// sum over the step's sequences, so splitting a step into micro-batches changes nothing.
pub fn divisor(examples: &[Example]) -> f32 {
    examples.iter().map(|e| e.divisor).sum::<f32>().max(1.0)
}

/// Runs one micro-batch and returns its share of the step's loss. Examples are equally long.
///
/// # Panics
/// If there are none, or their lengths differ.
pub fn loss(
    model: &Llama,
    examples: &[Example],
    mask: Mask,
    divisor: f32,
    document_mask: bool,
    recompute: bool,
) -> CrossEntropy {
    let gpu = model.gpu();
    let (b, rows, length) = (examples.len(), examples[0].tokens.len(), examples[0].spans.len());
    let tokens: Vec<u32> = examples.iter().flat_map(|e| e.tokens.iter().copied()).collect();
    let positions: Vec<u32> = examples.iter().flat_map(|e| e.positions.iter().copied()).collect();
    let spans = document_mask.then(|| {
        let flat: Vec<u32> =
            examples.iter().flat_map(|e| e.spans.iter().flatten().copied()).collect();
        Tensor::from_u32(gpu, &flat, [b, length, 2])
    });
    let inputs = Inputs {
        tokens: Tensor::from_u32(gpu, &tokens, [b, rows]),
        positions: Tensor::from_u32(gpu, &positions, [b, rows]),
        attention: AttentionOptions { spans, ..AttentionOptions::new(mask) },
    };
    let hidden = model.hidden(&inputs, recompute);
    linear_cross_entropy(&hidden, model.head(), &supervision(gpu, examples, rows, divisor))
}

/// The supervised rows of all examples, counted over the micro-batch.
fn supervision(gpu: &Gpu, examples: &[Example], rows: usize, divisor: f32) -> Supervision {
    let offset = |(i, e): (usize, &Example)| -> Vec<u32> {
        e.supervised.iter().map(|r| r + (i * rows) as u32).collect()
    };
    let supervised: Vec<u32> = examples.iter().enumerate().flat_map(offset).collect();
    let targets: Vec<u32> = examples.iter().flat_map(|e| e.targets.iter().copied()).collect();
    let weights: Vec<f32> = examples.iter().flat_map(|e| e.weights.iter().copied()).collect();
    let n = supervised.len();
    Supervision {
        rows: Tensor::from_u32(gpu, &supervised, [n]),
        targets: Tensor::from_u32(gpu, &targets, [n]),
        weights: Tensor::from_f32(gpu, &weights, [n]),
        divisor,
    }
}
