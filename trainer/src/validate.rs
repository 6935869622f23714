//! Measuring a model on held-out text, and letting it write.

use std::ops::ControlFlow;

use anyhow::Result;
use demask_engine::autograd::without_recording;
use demask_engine::decode::{DecodeOptions, generate};
use demask_engine::model::{Llama, Tokenizer};

use crate::batch::{self, StepPlan};
use crate::metrics::{Sample, Validation};
use crate::noise::Example;
use crate::pack::Packed;
use crate::recipe::Recipe;

/// Measures the first sequences of each source's held-out text under the plan's phase. Each call hides the same tokens
/// (the plan's step should be the same), so that models can be compared. The last entry is over all sources.
pub fn validate(
    recipe: &Recipe,
    model: &Llama,
    data: &Packed,
    plan: &StepPlan<'_>,
    sequences: usize,
    step: u64,
) -> Result<Vec<Validation>> {
    let mut all = Vec::new();
    let mut total = Sum::default();
    for (i, (name, ..)) in data.sources().enumerate() {
        let sequences = data.of_source(i).take(sequences).enumerate();
        let (mut sum, mut micro) = (Sum::default(), Vec::new());
        for example in sequences.map(|(i, sequence)| plan.measured(sequence, i as u32)) {
            sum.tokens += f64::from(example.divisor);
            // Nothing in it came out masked: its tokens count, at no loss.
            if example.n_supervised() > 0 {
                micro.push(example);
            }
            if micro.len() == recipe.optimizer.micro_batch {
                sum.add(recipe, model, plan, &std::mem::take(&mut micro))?;
            }
        }
        if !micro.is_empty() {
            sum.add(recipe, model, plan, &micro)?;
        }
        total.join(&sum);
        all.extend(sum.entry(plan, step, name));
    }
    all.extend(total.entry(plan, step, "held_out"));
    Ok(all)
}

#[derive(Default)]
struct Sum {
    weighted: f64,
    tokens: f64,
    ce: f64,
    rows: usize,
}

impl Sum {
    fn add(
        &mut self,
        recipe: &Recipe,
        model: &Llama,
        plan: &StepPlan<'_>,
        micro: &[Example],
    ) -> Result<()> {
        let document_mask = recipe.data.document_mask;
        let mask = plan.mask();
        let ce = without_recording(|| batch::loss(model, micro, mask, 1.0, document_mask, false));
        self.weighted += f64::from(ce.loss.item()?);
        let per_row = ce.per_row.to_vec()?;
        self.rows += per_row.len();
        self.ce += per_row.iter().map(|&c| f64::from(c)).sum::<f64>();
        Ok(())
    }

    fn join(&mut self, other: &Sum) {
        self.weighted += other.weighted;
        self.tokens += other.tokens;
        self.ce += other.ce;
        self.rows += other.rows;
    }

    fn entry(&self, plan: &StepPlan<'_>, step: u64, text: &str) -> Option<Validation> {
        (self.rows > 0).then(|| Validation {
            step,
            phase: plan.place.phase.name().to_owned(),
            text: text.to_owned(),
            loss: self.weighted / self.tokens,
            ce: self.ce / self.rows as f64,
            tokens: self.tokens as u64,
        })
    }
}

/// How a model is decoded greedily under the plan's objective.
pub fn decoding(model: &Llama, plan: &StepPlan<'_>) -> Result<DecodeOptions> {
    let Some(decoding) = plan.place.phase.decoding(plan.place.phase_step, plan.mask_id) else {
        return Ok(DecodeOptions::autoregressive(model.config()));
    };
    let mut config = model.config().clone();
    decoding.apply(&mut config);
    Ok(DecodeOptions::block(&config)?)
}

/// What the model makes of each of the recipe's prompts, greedily.
pub fn samples(
    recipe: &Recipe,
    model: &Llama,
    tokenizer: &Tokenizer,
    plan: &StepPlan<'_>,
    step: u64,
) -> Result<Vec<Sample>> {
    let options = decoding(model, plan)?;
    let mut samples = Vec::new();
    for prompt in &recipe.validation.prompts {
        let ids = tokenizer.encode(prompt, true)?;
        let room = model.config().context_length().saturating_sub(ids.len());
        let max_tokens = recipe.validation.sample_tokens.min(room);
        let options = DecodeOptions { max_tokens, ..options.clone() };
        let answer = generate(model, &ids, &options, |_| ControlFlow::Continue(()))?;
        let text = tokenizer.decode(&answer.token_ids, true);
        samples.push(Sample { step, prompt: prompt.clone(), text });
    }
    Ok(samples)
}
