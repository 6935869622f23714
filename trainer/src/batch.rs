//! From packed sequences to a loss on the device: lays out the examples of one step under an objective and runs
//! them in micro-batches. What a step draws depends on (seed, step, sequence), never on the split.

use demask_engine::autograd::{Gradients, backward};
use demask_engine::gpu::Gpu;
use demask_engine::model::{Inputs, Llama};
use demask_engine::ops::{AttentionOptions, CrossEntropy, Mask, Supervision, linear_cross_entropy};
use demask_engine::tensor::Tensor;

use crate::noise::{Corrupted, Corruption, Example, NoiseKey, Schedule, Strata};
use crate::pack::{Packed, Sequence};
use crate::recipe::{Objective, Place, Recipe};

/// How one step turns sequences into examples.
pub struct StepPlan<'a> {
    /// The phase and the step within it.
    pub place: Place<'a>,
    /// Step of the run: keys the noise.
    pub step: u64,
    /// Sequences of a step.
    pub batch: usize,
    /// The run's seed.
    pub seed: u64,
    /// The token of a hole.
    pub mask_id: u32,
}

impl StepPlan<'_> {
    /// The examples of a step whose first sequence is `first` of the run.
    pub fn examples(&self, data: &Packed, first: u64) -> Vec<Example> {
        let phase = self.place.phase;
        (0..self.batch as u64)
            .map(|i| {
                let pair = if phase.complementary { 2 } else { 1 };
                let sequence = data.sequence(first + i / pair);
                self.example(sequence, i as u32)
            })
            .collect()
    }

    /// The example of sequence `i` of the step.
    pub fn example(&self, sequence: Sequence, i: u32) -> Example {
        let Sequence { tokens, learnt, spans } = sequence;
        let (phase, step) = (self.place.phase, self.place.phase_step);
        if !phase.objective.is_diffusion() {
            return Example::autoregressive(&tokens, &learnt, spans);
        }
        let schedule = Schedule::at(step, phase.corruption_warmup, phase.u_init, phase.clip);
        let (xt, warm) = self.corrupted(&tokens, &learnt, i, schedule);
        let xt = if phase.complementary && i % 2 == 1 && !warm {
            // The same noise as its pair's, turned round. Not in the warm-up, where nearly all would be masked.
            let (pair, _) = self.corrupted(&tokens, &learnt, i - 1, schedule);
            self.corruption(tokens.len(), schedule).complement(&tokens, &learnt, &pair)
        } else {
            xt
        };
        match phase.objective {
            Objective::BlockDiffusion => Example::two_copy(&tokens, &learnt, spans, &xt),
            _ => Example::single_copy(&tokens, &learnt, spans, &xt),
        }
    }

    /// The example by which a model is measured: of the unclipped schedule, whose weighted loss bounds the likelihood.
    pub fn measured(&self, sequence: Sequence, i: u32) -> Example {
        let Sequence { tokens, learnt, spans } = sequence;
        let objective = self.place.phase.objective;
        if !objective.is_diffusion() {
            return Example::autoregressive(&tokens, &learnt, spans);
        }
        let (xt, _) = self.corrupted(&tokens, &learnt, i, Schedule::Unclipped);
        match objective {
            Objective::BlockDiffusion => Example::two_copy(&tokens, &learnt, spans, &xt),
            _ => Example::single_copy(&tokens, &learnt, spans, &xt),
        }
    }

    fn corrupted(
        &self,
        tokens: &[u32],
        learnt: &[bool],
        i: u32,
        schedule: Schedule,
    ) -> (Corrupted, bool) {
        let key = NoiseKey { seed: self.seed, step: self.step as u32, sequence: i };
        let xt = self.corruption(tokens.len(), schedule).corrupt(tokens, learnt, key);
        (xt, matches!(schedule, Schedule::Warmup { .. }))
    }

    fn corruption(&self, length: usize, schedule: Schedule) -> Corruption {
        let Place { phase, phase_step, .. } = self.place;
        let blocks = phase.objective == Objective::BlockDiffusion;
        Corruption {
            block_length: if blocks { phase.block_length.at(phase_step) } else { length },
            mask_id: self.mask_id,
            schedule,
            strata: match (phase.stratified, blocks) {
                (false, _) => Strata::Independent,
                (true, true) => Strata::Blocks,
                (true, false) => Strata::Sequences(self.batch as u32),
            },
        }
    }

    /// The attention mask of this step.
    pub fn mask(&self) -> Mask {
        self.place.phase.mask(self.place.phase_step)
    }
}

/// What `Σ weight · CE` of the whole step is divided by: every token that could have been supervised. It is the
/// sum over the step's sequences, so splitting a step into micro-batches changes nothing.
pub fn divisor(examples: &[Example]) -> f32 {
    examples.iter().map(|e| e.divisor).sum::<f32>().max(1.0)
}

/// What is reported of a micro-batch.
pub struct Reported {
    /// f32 [1]: its share of the step's loss.
    pub loss: Tensor,
    /// f32 [R]: cross-entropy of each supervised row.
    pub per_row: Tensor,
    /// Mask rate of each of them; none under an autoregressive objective.
    pub rates: Vec<f32>,
}

/// Adds up a step's gradients over its micro-batches. `between` is called between each one's passes forward and back,
/// when the device holds all that the way back needs.
pub fn gradients(
    model: &Llama,
    recipe: &Recipe,
    examples: &[Example],
    mask: Mask,
    mut between: impl FnMut(),
) -> (Gradients, Vec<Reported>) {
    let divisor = divisor(examples);
    let mut gradients = Gradients::new();
    let mut parts = Vec::new();
    for micro in examples.chunks(recipe.optimizer.micro_batch) {
        // Early in the warm-up a micro-batch may have no masked token, and then it teaches nothing.
        if micro.iter().all(|e| e.n_supervised() == 0) {
            continue;
        }
        let (document_mask, recompute) = (recipe.data.document_mask, recipe.recompute);
        let ce = loss(model, micro, mask, divisor, document_mask, recompute);
        between();
        let one = Tensor::from_f32(model.gpu(), &[1.0], [1]);
        backward(&ce.loss, &one, &mut gradients);
        let rates = micro.iter().flat_map(|e| e.rates.iter().copied()).collect();
        parts.push(Reported { loss: ce.loss.detach(), per_row: ce.per_row, rates });
    }
    (gradients, parts)
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
    // Supervised rows, counted over the micro-batch.
    let offset = |(i, e): (usize, &Example)| -> Vec<u32> {
        e.supervised.iter().map(|r| r + (i * rows) as u32).collect()
    };
    let supervised: Vec<u32> = examples.iter().enumerate().flat_map(offset).collect();
    let supervised = Tensor::from_u32(gpu, &supervised, [supervised.len()]);
    let hidden = model.hidden_at(&inputs, &supervised, recompute);
    linear_cross_entropy(&hidden, model.head(), &supervision(gpu, examples, divisor))
}

/// What the supervised rows of all examples should say.
fn supervision(gpu: &Gpu, examples: &[Example], divisor: f32) -> Supervision {
    let targets: Vec<u32> = examples.iter().flat_map(|e| e.targets.iter().copied()).collect();
    let weights: Vec<f32> = examples.iter().flat_map(|e| e.weights.iter().copied()).collect();
    let n = targets.len();
    Supervision {
        targets: Tensor::from_u32(gpu, &targets, [n]),
        weights: Tensor::from_f32(gpu, &weights, [n]),
        divisor,
    }
}
