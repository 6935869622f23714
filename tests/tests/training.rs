//! Training runs: an interrupted run is bit for bit the unbroken one, losses fall, the split into micro-batches does
//! not matter, and recipes and checkpoints refuse what does not fit.

use std::ops::ControlFlow;
use std::path::Path;

use demask_engine::gpu::Gpu;
use demask_engine::model::merge::{average, merge};
use demask_engine::model::{Llama, Lora, Precision, StoredType, Tokenizer};
use demask_tests::{gpu, small_corpus, small_recipe};
use demask_trainer::batch::StepPlan;
use demask_trainer::data::recipe::CorpusRecipe;
use demask_trainer::metrics::{Metrics, read_metrics};
use demask_trainer::pack::Part;
use demask_trainer::recipe::{
    BlockLength, Guard, LoraSettings, MomentType, Objective, Phase, Recipe,
};
use demask_trainer::replay::FailedBatch;
use demask_trainer::train::{Event, Outcome, Trainer};
use demask_trainer::validate::validate;
use demask_trainer::{bpe, checkpoint, start};

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
    small_corpus(&folder.path().join("corpus"));
    let mut recipe = small_recipe(&folder.path().join("corpus"));
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
    small_corpus(&folder.path().join("corpus"));
    let mut recipe = small_recipe(&folder.path().join("corpus"));
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
    small_corpus(&folder.path().join("corpus"));
    let mut recipe = small_recipe(&folder.path().join("corpus"));
    recipe.guard = Guard { spike: 1.001, window: 2, patience: 2, rollbacks: 1 };
    recipe.checkpoints.every = 2;
    recipe.phase[0].lr = 1.0;
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
    small_corpus(&folder.path().join("corpus"));
    let mut recipe = small_recipe(&folder.path().join("corpus"));
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
    small_corpus(&text);
    let base_run = folder.path().join("base");
    run_for(&gpu, &small_recipe(&text), &base_run, u64::MAX);
    let base = base_run.join("model");

    // Of real text little can be learnt over so small a base; of this some.
    let song = folder.path().join("song");
    for (i, package) in ["a", "b", "c", "d"].iter().enumerate() {
        let verses: String =
            (0..60 + i).map(|_| "for i in 0..10 {\n    total += i;\n}\n").collect();
        std::fs::create_dir_all(song.join(package)).unwrap();
        std::fs::write(song.join(package).join("song.rs"), verses).unwrap();
    }
    let mut recipe = small_recipe(&song);
    recipe.model.from = Some(base.clone());
    recipe.model.fresh = None;
    recipe.phase.truncate(1);
    recipe.phase[0].steps = 40;
    recipe.phase[0].lr = 2e-2;
    let settings =
        LoraSettings { rank: 4, dora: true, base: Precision::Bf16, ..Default::default() };
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

    // Going back puts the checkpoint's adapter in the place of the one that is held.
    let [(_, older), (_, newest)] = &checkpoint::list(&whole).unwrap()[..] else { panic!() };
    let (model, mut optimizer, _) = checkpoint::load(&gpu, newest).unwrap();
    let state = checkpoint::state(older).unwrap();
    let before = Lora::read(older).unwrap();
    assert_ne!(model.adapter().unwrap().unwrap().modules, before.modules);
    checkpoint::restore(older, &state, &model, &mut optimizer).unwrap();
    assert_eq!(model.adapter().unwrap().unwrap().modules, before.modules);
    assert_eq!(optimizer.updates, state.updates);

    // Other weights under the adapter are refused.
    let base_file = base.join("model.safetensors");
    let bytes = std::fs::read(&base_file).unwrap();
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    std::fs::write(&base_file, other).unwrap();
    let error = Trainer::open(&gpu, recipe.clone(), &whole, &go_on).err().expect("refused");
    assert!(error.to_string().contains("other weights"), "{error}");
    std::fs::write(&base_file, bytes).unwrap();

    // What was learnt is in the adapter, and stays when it is merged.
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
    assert!(after < before - 0.1, "{before} before, {after} after");
}

#[test]
fn another_recipe_is_refused_and_shown() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    small_corpus(&folder.path().join("corpus"));
    let recipe = small_recipe(&folder.path().join("corpus"));
    let run = folder.path().join("run");
    run_for(&gpu, &recipe, &run, 5);
    let mut other = recipe.clone();
    other.optimizer.clip = 2.0;
    let error = Trainer::open(&gpu, other, &run, &go_on).err().expect("refused");
    let text = format!("{error:#}");
    assert!(text.contains("- clip = 1.0") && text.contains("+ clip = 2.0"), "{text}");
}

#[test]
fn a_run_is_trained_by_one_at_a_time_and_keeps_its_dataset() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("corpus");
    small_corpus(&text);
    let recipe = small_recipe(&text);
    let run = folder.path().join("run");
    let open = || Trainer::open(&gpu, recipe.clone(), &run, &go_on);
    let first = open().unwrap();
    let error = open().err().expect("refused").to_string();
    assert!(error.contains("another process"), "{error}");
    drop(first);
    run_for(&gpu, &recipe, &run, 5);
    // The dataset is made anew, of other text.
    std::fs::remove_dir_all(run.join("data")).unwrap();
    std::fs::write(text.join("a/more.rs"), "fn more() {}\n".repeat(9)).unwrap();
    let error = open().err().expect("refused").to_string();
    assert!(error.contains("not the dataset"), "{error}");
}

#[test]
fn a_checkpoint_is_a_model_and_old_ones_go() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    small_corpus(&folder.path().join("corpus"));
    let recipe = small_recipe(&folder.path().join("corpus"));
    let run = folder.path().join("run");
    run_for(&gpu, &recipe, &run, u64::MAX);
    let kept: Vec<u64> = checkpoint::list(&run).unwrap().iter().map(|c| c.0).collect();
    assert_eq!(kept, [16, 18]);
    let model = Llama::load(&gpu, &run.join("model"), Precision::Stored).unwrap();
    assert_eq!((model.config().block_length, model.config().mask_token_id), (Some(4), Some(1)));
}

/// A random model of the recipe's shape.
fn random(gpu: &Gpu, recipe: &Recipe, seed: u64) -> Llama {
    let config = recipe.model.fresh.as_ref().unwrap().config(300, Some(0), Some(1));
    Llama::random(gpu, &config, seed).unwrap().trainable()
}

/// All weights, parameter by parameter.
fn weights(model: &Llama) -> Vec<Vec<f32>> {
    let shards = |p: &demask_engine::model::Parameter| {
        p.shards.iter().flat_map(|s| s.to_vec().unwrap()).collect()
    };
    model.parameters().into_iter().map(shards).collect()
}

#[test]
fn checkpoints_are_averaged_weight_by_weight() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut recipe = small_recipe(folder.path());
    let models: Vec<Llama> = (1..4).map(|seed| random(&gpu, &recipe, seed)).collect();
    let place = |i: usize| folder.path().join(i.to_string());
    for (i, model) in models.iter().enumerate() {
        model.save(&place(i), StoredType::F32, None).unwrap();
    }
    let out = folder.path().join("mean");
    let mean = |models: &[usize]| {
        let models: Vec<_> = models.iter().map(|&i| place(i)).collect();
        average(&models, &out, StoredType::F32, &mut |_| {})?;
        Ok::<_, demask_engine::Error>(weights(&Llama::load(&gpu, &out, Precision::F32)?))
    };
    let all: Vec<Vec<Vec<f32>>> = models.iter().map(weights).collect();
    for (p, got) in mean(&[0, 1, 2]).unwrap().iter().enumerate() {
        for (i, &got) in got.iter().enumerate() {
            let sum: f64 = all.iter().map(|model| f64::from(model[p][i])).sum();
            assert_eq!(got, (sum / 3.0) as f32, "parameter {p}, element {i}");
        }
    }
    // One alone is itself; another shape is refused.
    assert_eq!(mean(&[1]).unwrap(), all[1]);
    recipe.model.fresh.as_mut().unwrap().layers = 1;
    random(&gpu, &recipe, 1).save(&place(3), StoredType::F32, None).unwrap();
    let error = mean(&[0, 3]).unwrap_err();
    assert!(error.to_string().contains("shape differs"), "{error}");
    assert!(mean(&[]).is_err());
}

#[test]
fn a_sick_mask_embedding_gets_the_mean_length_and_a_healthy_one_is_left() {
    let Some(gpu) = gpu() else { return };
    const MASK: usize = 7;
    let model = random(&gpu, &small_recipe(Path::new("corpus")), 1);
    let before = weights(&model);
    let width = 32;
    let row = |all: &[Vec<f32>]| all[0][MASK * width..][..width].to_vec();
    let norm = |row: &[f32]| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let found = start::mask_embedding(&model, MASK as u32).unwrap();
    assert!(!found.mended && (found.norm - norm(&row(&before))).abs() < 1e-6, "{found:?}");
    assert_eq!(weights(&model), before);
    for factor in [0.0, 1e-3, 0.2, 5.0, 1e3] {
        let mut embedding = before[0].clone();
        embedding[MASK * width..][..width].iter_mut().for_each(|x| *x *= factor);
        model.parameters()[0].shards[0].overwrite(&embedding);
        let found = start::mask_embedding(&model, MASK as u32).unwrap();
        let after = weights(&model);
        assert_eq!(found.mended, !(0.1..10.0).contains(&factor), "{factor}: {found:?}");
        if !found.mended {
            assert_eq!(after[0], embedding);
            continue;
        }
        let mended = row(&after);
        assert!((norm(&mended) / found.mean - 1.0).abs() < 1e-5, "{factor}: {found:?}");
        // Its direction is kept where it had one, and so is everything else.
        let dot: f64 =
            mended.iter().zip(row(&before)).map(|(&a, b)| f64::from(a) * f64::from(b)).sum();
        let cosine = dot / norm(&mended) / norm(&row(&before));
        assert!(factor == 0.0 || cosine > 0.999_999, "{factor}: cosine {cosine}");
        embedding[MASK * width..][..width].copy_from_slice(&mended);
        assert_eq!(after[0], embedding);
        assert_eq!(after[1..], before[1..]);
    }
    assert!(start::mask_embedding(&model, 300).is_err());
}

#[test]
fn a_model_with_other_tokens_than_the_dataset_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (text, own, other) =
        (folder.path().join("text"), folder.path().join("own"), folder.path().join("other"));
    small_corpus(&text);
    let recipe = small_recipe(&text);
    let dataset = start::dataset(&recipe, &folder.path().join("run"), &|_| true).unwrap();
    let config = recipe.model.fresh.as_ref().unwrap().config(300, Some(0), Some(1));
    let trained = |on: &Path, place: &Path| {
        bpe::train(&CorpusRecipe::of_paths(&[on.to_owned()], &[]), 300, 1 << 20, place).unwrap();
        Tokenizer::from_folder(place, &config).unwrap()
    };
    start::same_tokens(&trained(&text, &own), &dataset).unwrap();
    let sums = folder.path().join("sums");
    std::fs::create_dir(&sums).unwrap();
    std::fs::write(sums.join("a.py"), "zx zx qj qj qj zx\n".repeat(50)).unwrap();
    let error = start::same_tokens(&trained(&sums, &other), &dataset).unwrap_err().to_string();
    assert!(error.contains("another tokenizer") && error.contains("token 263"), "{error}");
}

#[test]
fn tokens_of_sequences_without_a_hole_count_when_measured() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    small_corpus(&folder.path().join("corpus"));
    let mut recipe = small_recipe(&folder.path().join("corpus"));
    recipe.data.held_out = 0.3;
    // One block a sequence: a fifth of the sequences have nothing masked.
    recipe.data.length = 4;
    let dataset = start::dataset(&recipe, &folder.path().join("run"), &|_| true).unwrap();
    let (model, _) = start::model(&gpu, &recipe, &dataset).unwrap();
    let data = start::pack(&recipe, &dataset, Part::HeldOut).unwrap();
    let diffusion = recipe.clone();
    let place = diffusion.at(9).unwrap();
    let plan = StepPlan { place, step: 0, batch: 4, seed: 3, mask_id: 1 };
    let sequences = data.of_source(0).take(40).zip(0..);
    let examples: Vec<_> = sequences.map(|(sequence, i)| plan.measured(sequence, i)).collect();
    let empty = examples.iter().filter(|e| e.n_supervised() == 0).count();
    assert!(empty >= 3, "{empty} of 40 without a hole");
    let expected: f32 = examples.iter().map(|e| e.divisor).sum();
    for micro_batch in [1, 3, 64] {
        recipe.optimizer.micro_batch = micro_batch;
        let measured = validate(&recipe, &model, &data, &plan, 40, 0).unwrap();
        assert_eq!(measured[0].tokens, expected as u64, "micro-batches of {micro_batch}");
    }
}

#[test]
fn recipes_are_checked() {
    let folder = Path::new("corpus");
    let good = toml::to_string(&small_recipe(folder)).unwrap();
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
    assert!(all.len() >= 7, "{all:?}");
    all.iter().for_each(|path| assert!(Recipe::read(path).is_ok(), "{}", path.display()));
    let unknown = good.replacen("steps = 9", "stepz = 9", 1);
    assert!(toml::from_str::<Recipe>(&unknown).unwrap_err().to_string().contains("stepz"));
}
