//! Training runs: an interrupted run is bit for bit the unbroken one, losses fall, the split into micro-batches does
//! not matter, and recipes and checkpoints refuse what does not fit.

use std::ops::ControlFlow;
use std::path::Path;

use demask_engine::gpu::Gpu;
use demask_engine::model::merge::merge;
use demask_engine::model::{Llama, Lora, Precision, StoredType};
use demask_tests::gpu;
use demask_trainer::checkpoint;
use demask_trainer::metrics::{Metrics, read_metrics};
use demask_trainer::recipe::{
    BaseType, BlockLength, Guard, LoraSettings, MomentType, Objective, Phase, Recipe,
};
use demask_trainer::replay::FailedBatch;
use demask_trainer::train::{Event, Outcome, Trainer};

/// A folder of small source files: real text, this workspace's own.
fn corpus(folder: &Path) {
    let sources = [
        ("a/model.py", include_str!("model.rs")),
        ("b/ops.py", include_str!("ops.rs")),
        ("c/training.py", include_str!("training.rs")),
        ("d/tests.py", include_str!("../src/lib.rs")),
    ];
    for (name, text) in sources {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}

fn recipe(corpus: &Path, text: &str) -> Recipe {
    let base = format!(
        r#"
        seed = 3
        checkpoints.every = 4
        {text}
        [model.fresh]
        vocab_size = 300
        hidden_size = 32
        intermediate_size = 48
        layers = 2
        heads = 4
        kv_heads = 2
        [data]
        paths = [{corpus:?}]
        length = 32
        [optimizer]
        batch = 4
        micro_batch = 2
        [[phase]]
        objective = "ar"
        steps = 9
        lr = 1e-2
        lr_warmup = 2
        [[phase]]
        objective = "block_diffusion"
        steps = 9
        lr = 1e-2
        block_length = 4
        corruption_warmup = 4
        u_init = 0.2
        "#
    );
    let recipe: Recipe = toml::from_str(&base).unwrap();
    recipe.check().unwrap();
    recipe
}

fn go_on(_: Event<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Runs until `stop` steps are done in this process, without a word to the trainer: as a kill would.
fn run_for(gpu: &Gpu, recipe: &Recipe, run: &Path, stop: u64) -> Option<Outcome> {
    let mut trainer = Trainer::open(gpu, recipe.clone(), run, &go_on).unwrap();
    struct Killed;
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        trainer.run(&mut |event| {
            if let Event::Step(metrics, _) = event
                && metrics.step == stop
            {
                std::panic::panic_any(Killed);
            }
            ControlFlow::Continue(())
        })
    }));
    match outcome {
        Ok(outcome) => Some(outcome.unwrap()),
        Err(cause) if cause.is::<Killed>() => None,
        Err(cause) => std::panic::resume_unwind(cause),
    }
}

/// What must be equal to the bit; speeds may differ.
fn bits(metrics: &[Metrics]) -> Vec<(u64, u64, u64, Option<u64>)> {
    metrics
        .iter()
        .map(|m| {
            (m.step, m.loss.to_bits(), m.grad_norm.to_bits(), m.ce_per_masked.map(f64::to_bits))
        })
        .collect()
}

#[test]
fn an_interrupted_run_is_bit_for_bit_the_unbroken_one() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    corpus(&folder.path().join("corpus"));
    let mut recipe = recipe(&folder.path().join("corpus"), "");
    recipe.optimizer.moments = MomentType::Eight;
    recipe.phase[1].complementary = true;
    recipe.phase[1].block_length = BlockLength::Steps(vec![(0, 2), (5, 8)]);
    recipe.validation.every = 5;
    recipe.validation.prompts = vec!["fn main".into()];
    recipe.data.held_out = 0.3;
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    assert!(matches!(run_for(&gpu, &recipe, &whole, u64::MAX), Some(Outcome::Finished(_))));
    // Before the first checkpoint, right after one, in the warm-up of the second phase, near the end.
    for stop in [3, 8, 11, 17] {
        assert_eq!(run_for(&gpu, &recipe, &broken, stop), None);
    }
    assert!(matches!(run_for(&gpu, &recipe, &broken, u64::MAX), Some(Outcome::Finished(_))));
    let read = |run: &Path| bits(&read_metrics(&run.join("metrics.jsonl")).unwrap());
    assert_eq!(read(&whole).len(), 18);
    assert_eq!(read(&whole), read(&broken));
    for log in ["validation.jsonl", "samples.jsonl"] {
        let read = |run: &Path| std::fs::read_to_string(run.join(log)).unwrap();
        assert!(read(&whole).lines().count() >= 4, "{log}: {}", read(&whole));
        assert_eq!(read(&whole), read(&broken));
    }
    assert!(whole.join("checkpoints/best/model.safetensors").exists());
    let weights = |run: &Path| std::fs::read(run.join("model/model.safetensors")).unwrap();
    assert!(weights(&whole) == weights(&broken), "final weights differ");
    let curve = std::fs::read_to_string(whole.join("curve.svg")).unwrap();
    assert!(curve.contains("<svg"));
}

#[test]
fn losses_fall_and_the_split_into_micro_batches_does_not_matter() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    corpus(&folder.path().join("corpus"));
    let mut recipe = recipe(&folder.path().join("corpus"), "");
    recipe.phase[0].steps = 40;
    let losses = |recipe: &Recipe, name: &str, steps: u64| {
        let run = folder.path().join(name);
        let mut trainer = Trainer::open(&gpu, recipe.clone(), &run, &go_on).unwrap();
        (0..steps).map(|_| trainer.train_step().unwrap().0.loss).collect::<Vec<f64>>()
    };
    let split = losses(&recipe, "split", 30);
    assert!(split[29] < split[0] - 0.8, "from {} to {}", split[0], split[29]);
    recipe.optimizer.micro_batch = 4;
    for (a, b) in split.iter().zip(losses(&recipe, "whole", 5)) {
        assert!((a - b).abs() < 1e-4 * b.abs(), "{a} split, {b} whole");
    }
}

#[test]
fn a_run_that_diverges_goes_back_and_then_says_so() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    corpus(&folder.path().join("corpus"));
    let mut recipe = recipe(&folder.path().join("corpus"), "");
    recipe.guard = Guard { spike: 1.001, window: 2, patience: 2, rollbacks: 1 };
    recipe.checkpoints.every = 2;
    let run = folder.path().join("run");
    let mut trainer = Trainer::open(&gpu, recipe.clone(), &run, &go_on).unwrap();
    let (mut skipped, mut went_back) = (Vec::new(), Vec::new());
    let mut weights = Vec::new();
    let outcome = trainer.run(&mut |event| {
        match event {
            Event::Step(metrics, _) if metrics.skipped.is_some() => skipped.push(metrics.step),
            Event::WentBack(step, why) => went_back.push((step, why.to_owned())),
            Event::Saved(place) => {
                weights.push(std::fs::read(place.join("model.safetensors")).unwrap())
            }
            _ => {}
        }
        ControlFlow::Continue(())
    });
    let error = format!("{:#}", outcome.unwrap_err());
    assert!(
        error.contains("after going back 1 times") && error.contains("learning rate"),
        "{error}"
    );
    assert_eq!(went_back.len(), 1);
    assert!(went_back[0].1.contains("is above"), "{}", went_back[0].1);
    assert!(went_back[0].0.is_multiple_of(2) && skipped.len() >= 4, "{skipped:?}");
    let kept = run.join(format!("skipped/step-{:08}.json", skipped[0]));
    let batch = FailedBatch::read(&kept).unwrap();
    let now = trainer.replay(&batch).unwrap();
    assert_eq!((now.sequences.len(), batch.examples.len()), (4, 4));
    assert!(batch.texts[0].len() > 10, "{:?}", batch.texts);
    assert!(now.loss.is_finite() && now.sequences.iter().flatten().count() > 0, "{now:?}");
    let mut damaged = batch.clone();
    damaged.examples[1].tokens[0] = 1 << 30;
    assert!(trainer.replay(&damaged).unwrap_err().to_string().contains("damaged"));
    // What is not finite: the same, and the weights stay what they were.
    let run = folder.path().join("not finite");
    recipe.guard = Guard { patience: 3, rollbacks: 0, ..Guard::default() };
    recipe.phase[0].lr = 1e30;
    let mut trainer = Trainer::open(&gpu, recipe, &run, &go_on).unwrap();
    let error = format!("{:#}", trainer.run(&mut go_on).unwrap_err());
    assert!(error.contains("not finite"), "{error}");
}

#[test]
fn every_objective_trains_and_is_measured() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    corpus(&folder.path().join("corpus"));
    let mut recipe = recipe(&folder.path().join("corpus"), "");
    recipe.validation.every = 20;
    recipe.data.held_out = 0.3;
    let all = [
        Objective::Ar,
        Objective::BlockDiffusion,
        Objective::FullDiffusion,
        Objective::CausalDiffusion,
    ];
    for objective in all {
        for document_mask in [false, true] {
            recipe.data.document_mask = document_mask;
            recipe.phase = vec![Phase { corruption_warmup: 3, ..Phase::new(objective, 40, 1e-2) }];
            let run = folder.path().join(format!("{} {document_mask}", objective.name()));
            let mut trainer = Trainer::open(&gpu, recipe.clone(), &run, &go_on).unwrap();
            let mut validated = Vec::new();
            trainer
                .run(&mut |event| {
                    if let Event::Validated(all) = event {
                        validated.extend(all.iter().filter(|v| v.text == "held_out").cloned());
                    }
                    ControlFlow::Continue(())
                })
                .unwrap();
            let [first, last] = &validated[..] else { panic!("{validated:?}") };
            // ln 300 = 5.7 before anything is learnt.
            assert!(last.loss.is_finite() && last.ce < 4.5 && first.tokens > 200, "{validated:?}");
            let metrics = read_metrics(&run.join("metrics.jsonl")).unwrap();
            let rates = metrics.iter().filter(|m| !m.ce_by_rate.is_empty()).count();
            assert_eq!(rates > 30, objective.is_diffusion(), "{rates} steps with rates");
        }
    }
}

#[test]
fn an_adapter_is_trained_resumed_and_merged() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("corpus");
    corpus(&text);
    let base_run = folder.path().join("base");
    run_for(&gpu, &recipe(&text, ""), &base_run, u64::MAX);
    let base = base_run.join("model");

    let mut recipe = recipe(&text, "");
    recipe.model.from = Some(base.clone());
    recipe.model.fresh = None;
    recipe.phase.remove(0);
    recipe.phase[0].steps = 12;
    recipe.phase[0].corruption_warmup = 0;
    let settings = LoraSettings { rank: 4, dora: true, base: BaseType::Bf16, ..Default::default() };
    recipe.lora = Some(settings);
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    run_for(&gpu, &recipe, &whole, u64::MAX);
    run_for(&gpu, &recipe, &broken, 6);
    run_for(&gpu, &recipe, &broken, u64::MAX);
    let metrics = |run: &Path| read_metrics(&run.join("metrics.jsonl")).unwrap();
    let (a, b) = (metrics(&whole), metrics(&broken));
    assert_eq!(bits(&a), bits(&b));
    let adapter = |run: &Path| std::fs::read(run.join("model/adapter_model.safetensors")).unwrap();
    assert_eq!(adapter(&whole), adapter(&broken));

    // Of a small model every bit counts: what was learnt is in the adapter, and stays when it is merged.
    let merged = folder.path().join("merged");
    let lora = Lora::read(&whole.join("model")).unwrap();
    merge(&base, &lora, &merged, StoredType::F32, &mut |_| {}).unwrap();
    let ce = |from: &Path| {
        let mut recipe = recipe.clone();
        (recipe.lora, recipe.model.from) = (None, Some(from.to_owned()));
        recipe.data.held_out = 0.3;
        let run = tempfile::tempdir().unwrap();
        let trainer = Trainer::open(&gpu, recipe, run.path(), &go_on).unwrap();
        trainer.held_out_ce(16).unwrap().expect("some text is held out")
    };
    let (before, after) = (ce(&base), ce(&merged));
    assert!(after < before - 0.02, "{before} before, {after} after");
}

#[test]
fn another_recipe_is_refused_and_shown() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    corpus(&folder.path().join("corpus"));
    let recipe = recipe(&folder.path().join("corpus"), "");
    let run = folder.path().join("run");
    run_for(&gpu, &recipe, &run, 5);
    let mut other = recipe.clone();
    other.optimizer.clip = 2.0;
    let error = Trainer::open(&gpu, other, &run, &go_on).err().expect("refused");
    let text = format!("{error:#}");
    assert!(text.contains("- clip = 1.0") && text.contains("+ clip = 2.0"), "{text}");
}

#[test]
fn a_checkpoint_is_a_model_and_old_ones_go() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    corpus(&folder.path().join("corpus"));
    let recipe = recipe(&folder.path().join("corpus"), "");
    let run = folder.path().join("run");
    run_for(&gpu, &recipe, &run, u64::MAX);
    let kept: Vec<u64> = checkpoint::list(&run).unwrap().iter().map(|c| c.0).collect();
    assert_eq!(kept, [16, 18]);
    let model = Llama::load(&gpu, &run.join("model"), Precision::Stored).unwrap();
    assert_eq!((model.config().block_length, model.config().mask_token_id), (Some(4), Some(1)));
}

#[test]
fn recipes_are_checked() {
    let folder = Path::new("corpus");
    let good = toml::to_string(&recipe(folder, "")).unwrap();
    let broken = [
        ("steps = 9", "steps = 0", "steps"),
        ("batch = 4", "batch = 0", "batch"),
        ("length = 32", "length = 30", "block_length"),
        ("clip = 1.0", "clip = 0.0", "clip"),
        ("held_out = 0.01", "held_out = 1.5", "held_out"),
    ];
    for (from, to, named) in broken {
        assert!(good.contains(from), "{from} in {good}");
        let recipe: Recipe = toml::from_str(&good.replacen(from, to, 1)).unwrap();
        let error = format!("{:#}", recipe.check().unwrap_err());
        assert!(error.contains(named), "{error}");
    }
    // Those that come with demask.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/recipes");
    let all: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(all.len() >= 8, "{all:?}");
    all.iter().for_each(|path| assert!(Recipe::read(path).is_ok(), "{}", path.display()));
    let unknown = good.replacen("steps = 9", "stepz = 9", 1);
    assert!(toml::from_str::<Recipe>(&unknown).unwrap_err().to_string().contains("stepz"));
}
