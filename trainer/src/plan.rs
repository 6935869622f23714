//! What a run will take of a device's memory, before anything is taken: the run is rehearsed on a device that only
//! counts (`GpuOptions::dry`), through the code that trains. Nothing is computed, read of the data or written.
//!
//! What depends on data is the number of supervised rows. The noise is the run's own, drawn for a share of its steps
//! over text that is learnt everywhere; text with prompts takes less.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use anyhow::{Result, ensure};
use demask_engine::autograd::without_recording;
use demask_engine::decode::{DecodeOptions, Decoder, Request};
use demask_engine::gpu::Gpu;
use demask_engine::model::{Llama, LlamaConfig, Precision};

use crate::batch::{self, StepPlan};
use crate::data::sample::Vocabulary;
use crate::data::shards::Dataset;
use crate::noise::Example;
use crate::optim::OptimizerState;
use crate::pack::Sequence;
use crate::recipe::{BlockLength, MomentType, Phase, Recipe};
use crate::start;
use crate::validate::decoding;

/// Tokens whose noise is drawn for a phase, about.
const DRAWN_TOKENS: usize = 4 << 20;
/// Steps of a phase whose noise is drawn, beside those where something changes.
const DRAWN_STEPS: usize = 64;
/// Sequences are not proposed to be shorter than this.
const SHORTEST: usize = 64;

/// What a run takes of a device's memory when it takes most, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Numbers in the model.
    pub parameters: u64,
    /// They themselves.
    pub weights: u64,
    /// Their gradients.
    pub gradients: u64,
    /// The optimiser's moments.
    pub moments: u64,
    /// What a pass forward leaves for the way back.
    pub activations: u64,
    /// What is held in passing: logits, cotangents, a layer that is computed again.
    pub workspace: u64,
    /// All of these.
    pub peak: u64,
    /// What the run does then.
    pub when: String,
    /// The run will train its tokenizer, and the vocabulary is taken as large as was asked for; the text may give a
    /// smaller one.
    pub vocabulary_asked: Option<usize>,
}

/// A change of a recipe that takes less memory.
#[derive(Clone, Debug)]
pub struct Switch {
    /// As one writes it into the recipe.
    pub text: String,
    /// The recipe with it.
    pub recipe: Recipe,
    /// It is more than one change.
    pub several: bool,
}

/// A run being rehearsed.
struct Rehearsal<'a> {
    gpu: &'a Gpu,
    recipe: &'a Recipe,
    model: Llama,
    optimizer: OptimizerState,
    weights: HashSet<u64>,
    moments: HashSet<u64>,
    plan: Plan,
}

/// Plans the run of `recipe` in the folder `run` on a device opened with `GpuOptions::dry`. `prepare` is called where a
/// run chooses its kernels.
///
/// # Errors
/// What the run itself would stumble over: a model that cannot be read, a tensor too large for the device.
pub fn plan(gpu: &Gpu, recipe: &Recipe, run: &Path, prepare: &dyn Fn(&Llama)) -> Result<Plan> {
    ensure!(gpu.is_dry(), "a plan needs a device that only counts");
    recipe.check()?;
    // What an earlier plan failed on is not this one's.
    let _ = gpu.sync();
    gpu.reset_peak();
    let (shape, vocabulary_asked) = shape(recipe, run)?;
    let model = start::weights(gpu, recipe, shape.as_ref())?;
    let weights = held(gpu);
    let optimizer = OptimizerState::new(&model, &recipe.optimizer);
    let moments = &held(gpu) - &weights;
    prepare(&model);
    let parameters = model.config().num_parameters();
    let plan = Plan { parameters, vocabulary_asked, ..Plan::default() };
    let mut rehearsal = Rehearsal { gpu, recipe, model, optimizer, weights, moments, plan };
    rehearsal.note("choosing kernels", &HashSet::new(), &HashSet::new());
    let mut first = 0;
    for phase in &recipe.phase {
        rehearsal.phase(phase, first)?;
        first += phase.steps;
    }
    // A tensor that no binding of the device can take shows here.
    gpu.sync()?;
    Ok(rehearsal.plan)
}

/// What can be changed in a recipe to take less memory, what costs least first: the split into micro-batches changes
/// no result, 8-bit moments round, recomputing takes a third more time, shorter sequences teach something else, and an
/// adapter learns less than all weights do.
pub fn switches(recipe: &Recipe) -> Vec<Switch> {
    let mut all: Vec<Switch> = Vec::new();
    let mut add = |changes: &[Change]| {
        let mut recipe = recipe.clone();
        changes.iter().for_each(|change| change.make(&mut recipe));
        let text = changes.iter().map(Change::text).collect::<Vec<_>>().join(", ");
        if recipe.check().is_ok() {
            all.push(Switch { text, recipe, several: changes.len() > 1 });
        }
    };
    let largest = recipe.optimizer.micro_batch.min(recipe.optimizer.batch);
    let micro: Vec<Change> = halves(largest, 1).map(Change::MicroBatch).collect();
    let lengths: Vec<Change> = halves(recipe.data.length, SHORTEST).map(Change::Length).collect();
    let eight = recipe.optimizer.moments == MomentType::F32;
    let eight: Vec<Change> = eight.then_some(Change::Moments).into_iter().collect();
    let again: Vec<Change> = (!recipe.recompute).then_some(Change::Recompute).into_iter().collect();
    let base = recipe.lora.as_ref().map(|lora| lora.base);
    let smaller =
        [Precision::Q8, Precision::Q4].into_iter().filter(|b| base.is_some_and(|now| now != *b));
    let bases: Vec<Change> = smaller.map(Change::Base).collect();
    let alone = micro.iter().chain(&eight).chain(&again).chain(&bases);
    for &change in alone.chain(lengths.first()) {
        add(&[change]);
    }
    let both = [eight, again].concat();
    if both.len() > 1 {
        add(&both);
    }
    if !both.is_empty() {
        micro.iter().for_each(|&micro| add(&[&both[..], &[micro]].concat()));
    }
    let all_but_length: Vec<Change> = both.into_iter().chain(micro.last().copied()).collect();
    for &length in lengths.iter().skip(usize::from(all_but_length.is_empty())) {
        add(&[&all_but_length[..], &[length]].concat());
    }
    if base.is_none() {
        for base in [Precision::Bf16, Precision::Q8, Precision::Q4] {
            add(&[Change::Base(base)]);
            add(&[&all_but_length[..], &[Change::Base(base)]].concat());
        }
    }
    all
}

#[derive(Clone, Copy)]
enum Change {
    MicroBatch(usize),
    Moments,
    Recompute,
    Length(usize),
    /// Of an adapter's frozen weights, which it adds where there is none.
    Base(Precision),
}

impl Change {
    fn make(&self, recipe: &mut Recipe) {
        match *self {
            Change::MicroBatch(n) => recipe.optimizer.micro_batch = n,
            Change::Moments => recipe.optimizer.moments = MomentType::Eight,
            Change::Recompute => recipe.recompute = true,
            Change::Length(n) => recipe.data.length = n,
            Change::Base(base) => recipe.lora.get_or_insert_default().base = base,
        }
    }

    fn text(&self) -> String {
        match self {
            Change::MicroBatch(n) => format!("optimizer.micro_batch = {n}"),
            Change::Moments => "optimizer.moments = \"8bit\"".to_owned(),
            Change::Recompute => "recompute = true".to_owned(),
            Change::Length(n) => format!("data.length = {n}"),
            Change::Base(base) => format!("lora.base = \"{}\"", format!("{base:?}").to_lowercase()),
        }
    }
}

/// n / 2, n / 4, …, down to `least`.
fn halves(n: usize, least: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(n / 2), |n| Some(n / 2)).take_while(move |&n| n >= least.max(1))
}

impl Rehearsal<'_> {
    /// A phase whose first step is `first` of the run.
    fn phase(&mut self, phase: &Phase, first: u64) -> Result<()> {
        let steps = drawn_steps(self.recipe, phase).into_iter().map(|step| first + step);
        let all: Vec<(u64, [usize; 2])> =
            steps.filter_map(|step| Some((step, supervised(&draw(self.recipe, step)?)))).collect();
        // A later micro-batch runs beside gradients, the first without. The fewest supervised rows can take more than
        // the most, where one chunk of logits is kept.
        let chosen = [
            all.iter().max_by_key(|(_, [_, later])| *later),
            all.iter().max_by_key(|(_, [first, _])| *first),
            all.iter().min_by_key(|(_, [_, later])| *later),
        ];
        for step in chosen.into_iter().flatten().map(|(step, _)| *step).collect::<BTreeSet<_>>() {
            self.step(step)?;
        }
        if self.recipe.validation.every > 0 {
            self.validation(first + phase.steps - 1)?;
        }
        Ok(())
    }

    /// What `Trainer::train_step` does.
    fn step(&mut self, step: u64) -> Result<()> {
        let (gpu, recipe) = (self.gpu, self.recipe);
        let Some((plan, micro)) = step_plan(recipe, step).zip(draw(recipe, step)) else {
            return Ok(());
        };
        let examples = micro.concat();
        gpu.reset_peak();
        let mut forward = HashSet::new();
        let (gradients, parts) =
            batch::gradients(&self.model, recipe, &examples, plan.mask(), || {
                forward.extend(held(gpu));
            });
        let left = held(gpu);
        let (settings, limit) = (&recipe.optimizer, f32::INFINITY);
        self.optimizer.step(&self.model, &gradients, settings, 0.0, limit)?;
        drop((gradients, parts));
        let name = plan.place.phase.name();
        self.note(&format!("training, phase {name}"), &left, &forward);
        Ok(())
    }

    /// What `Trainer` does at the end of a phase whose last step is `step`: held-out text is measured, and the model
    /// writes.
    fn validation(&mut self, step: u64) -> Result<()> {
        let (recipe, model) = (self.recipe, &self.model);
        let Some(plan) = step_plan(recipe, step) else { return Ok(()) };
        self.gpu.reset_peak();
        let n = recipe.optimizer.micro_batch.min(recipe.validation.sequences);
        let measured = |i| plan.measured(text(recipe), i as u32);
        let micro: Vec<Example> = (0..n).map(measured).filter(|e| e.n_supervised() > 0).collect();
        if !micro.is_empty() && recipe.data.held_out > 0.0 {
            let documents = recipe.data.document_mask;
            without_recording(|| batch::loss(model, &micro, plan.mask(), 1.0, documents, false));
        }
        let options = decoding(model, &plan)?;
        for prompt in &recipe.validation.prompts {
            let room = model.config().max_position_embeddings;
            // A token is at least a byte, but for the one that begins a text.
            let prompt = vec![0; (prompt.len() + 1).min(room)];
            let max_tokens = recipe.validation.sample_tokens.min(room - prompt.len());
            // What is read back is no text; nothing should look like its end.
            let eos_ids = Vec::new();
            let options = DecodeOptions { max_tokens, eos_ids, ..options.clone() };
            let request = Request::answer(model.config(), &prompt, &options)?;
            let mut decoder = Decoder::for_one(model, &request);
            let id = decoder.submit(request)?;
            // All passes behind the first take what that one takes.
            while decoder.counters(id).is_none_or(|done| done.passes == 0) && !decoder.is_idle() {
                decoder.advance(&mut Vec::new())?;
            }
        }
        self.note("measuring held-out text", &HashSet::new(), &HashSet::new());
        Ok(())
    }

    /// Keeps the peak since it was reset if it is the largest so far. `left` was held when all gradients were there,
    /// `forward` at the end of passes forward.
    fn note(&mut self, when: &str, left: &HashSet<u64>, forward: &HashSet<u64>) {
        let peak = self.gpu.memory().peak;
        if peak <= self.plan.peak {
            return;
        }
        let Plan { parameters, vocabulary_asked, .. } = self.plan;
        let when = when.to_owned();
        let mut plan = Plan { parameters, vocabulary_asked, peak, when, ..Plan::default() };
        for (id, bytes) in self.gpu.holdings().at_peak {
            let kinds = [
                (&self.weights, &mut plan.weights),
                (&self.moments, &mut plan.moments),
                (left, &mut plan.gradients),
                (forward, &mut plan.activations),
            ];
            match kinds.into_iter().find(|(ids, _)| ids.contains(&id)) {
                Some((_, sum)) => *sum += bytes,
                None => plan.workspace += bytes,
            }
        }
        self.plan = plan;
    }
}

/// The allocations that are live.
fn held(gpu: &Gpu) -> HashSet<u64> {
    gpu.holdings().now.into_keys().collect()
}

/// The shape of a fresh model, and its vocabulary if that is only what was asked for; nothing for a model on disk.
fn shape(recipe: &Recipe, run: &Path) -> Result<(Option<LlamaConfig>, Option<usize>)> {
    let Some(fresh) = &recipe.model.fresh else { return Ok((None, None)) };
    let tokenizer = match &recipe.data.dataset {
        Some(folder) => Dataset::open(folder)?.tokenizer(),
        None => run.join("tokenizer"),
    };
    let known = recipe.data.dataset.is_some() || tokenizer.join("tokenizer_config.json").exists();
    let asked = (!known).then_some(fresh.vocab_size);
    let size = asked.map_or_else(|| Ok(Vocabulary::open(&tokenizer)?.size), anyhow::Ok)?;
    let config = fresh.config(size, None, None);
    config.validate(&tokenizer)?;
    Ok((Some(config), asked))
}

/// The steps of a phase whose noise is drawn, counted from its first: spread over all of them, and where the block
/// length or the schedule changes.
fn drawn_steps(recipe: &Recipe, phase: &Phase) -> BTreeSet<u64> {
    if !phase.objective.is_diffusion() {
        return BTreeSet::from([0]);
    }
    let tokens = recipe.optimizer.batch.saturating_mul(recipe.data.length);
    let most = (DRAWN_TOKENS / tokens.max(1)).clamp(4, DRAWN_STEPS);
    let spread = (0..phase.steps).step_by(phase.steps.div_ceil(most as u64) as usize);
    let turns = match &phase.block_length {
        BlockLength::Fixed(_) => Vec::new(),
        BlockLength::Steps(pairs) => pairs.iter().map(|(step, _)| *step).collect(),
    };
    let all = spread.chain(turns).chain([phase.corruption_warmup, phase.steps - 1]);
    all.filter(|&step| step < phase.steps).collect()
}

fn step_plan(recipe: &Recipe, step: u64) -> Option<StepPlan<'_>> {
    let place = recipe.at(step)?;
    Some(StepPlan { place, step, batch: recipe.optimizer.batch, seed: recipe.seed, mask_id: 0 })
}

/// A sequence of text that is learnt everywhere. Which tokens makes no difference.
fn text(recipe: &Recipe) -> Sequence {
    let length = recipe.data.length;
    Sequence {
        tokens: vec![1; length],
        learnt: vec![true; length],
        spans: vec![[0, length as u32]; length],
    }
}

/// A step's micro-batches, as many as tell how it goes: the first, the fullest of those behind it, which add to the
/// gradients of others, and one that is not whole.
fn draw(recipe: &Recipe, step: u64) -> Option<Vec<Vec<Example>>> {
    let plan = step_plan(recipe, step)?;
    let (n, micro) = (recipe.optimizer.batch, recipe.optimizer.micro_batch);
    let mut examples = (0..n).map(|i| plan.example(text(recipe), i as u32));
    let mut parts: Vec<Vec<Example>> = Vec::new();
    loop {
        let part: Vec<Example> = examples.by_ref().take(micro).collect();
        match parts.len() {
            _ if part.is_empty() => break,
            2 if part.len() == micro && rows(&part) <= rows(&parts[1]) => {}
            2 if part.len() == micro => parts[1] = part,
            _ => parts.push(part),
        }
    }
    Some(parts)
}

fn rows(micro: &[Example]) -> usize {
    micro.iter().map(Example::n_supervised).sum()
}

/// Supervised rows of the first micro-batch, and of the fullest behind it.
fn supervised(micro: &[Vec<Example>]) -> [usize; 2] {
    let rows = |part: &Vec<Example>| rows(part);
    [micro.first().map_or(0, rows), micro.iter().skip(1).map(rows).max().unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::{halves, switches};
    use crate::recipe::Recipe;

    #[test]
    fn the_cheapest_change_comes_first_and_the_largest_last() {
        let recipe: Recipe = toml::from_str(
            "model.from = \"m\"\ndata = { dataset = \"d\", length = 256 }\noptimizer = { batch = 8, micro_batch = 4 }\n\
             [[phase]]\nobjective = \"ar\"\nsteps = 1\nlr = 1.0\n",
        )
        .unwrap();
        let texts: Vec<String> = switches(&recipe).into_iter().map(|s| s.text).collect();
        let all = "optimizer.moments = \"8bit\", recompute = true, optimizer.micro_batch = 1";
        assert_eq!(texts[0], "optimizer.micro_batch = 2");
        assert_eq!(
            texts[2..5],
            ["optimizer.moments = \"8bit\"", "recompute = true", "data.length = 128"]
        );
        assert!(texts.contains(&all.to_owned()), "{texts:?}");
        assert!(texts.contains(&format!("{all}, data.length = 64")), "{texts:?}");
        assert_eq!(texts.last(), Some(&format!("{all}, lora.base = \"q4\"")));
        assert!(switches(&recipe).iter().all(|s| s.several == s.text.contains(", ")));
        assert_eq!(halves(6, 1).collect::<Vec<_>>(), [3, 1]);
    }
}
