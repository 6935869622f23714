//! The memory plan of a run beside what the run then takes, and what the command line makes of it.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use demask_engine::gpu::{Gpu, GpuOptions};
use demask_engine::model::{LlamaConfig, Precision};
use demask_tests::{binary, gpu, open};
use demask_trainer::plan::{Plan, plan, switches};
use demask_trainer::recipe::{MomentType, Recipe};
use demask_trainer::train::Trainer;
use serde_json::Value;

/// Of the measured peak: how far a plan may be off.
const TOLERANCE: f64 = 0.05;

/// A folder with this crate's own tests as its text.
fn corpus(folder: &Path) -> PathBuf {
    let text = folder.join("text");
    std::fs::create_dir_all(&text).unwrap();
    for (name, source) in [
        ("model.rs", include_str!("model.rs")),
        ("ops.rs", include_str!("ops.rs")),
        ("training.rs", include_str!("training.rs")),
        ("decode.rs", include_str!("decode.rs")),
    ] {
        std::fs::write(text.join(name), source).unwrap();
    }
    text
}

/// A small run: a model of 0.4 million numbers, two steps in each phase.
fn recipe(text: &Path, objectives: &[&str]) -> String {
    let mut recipe = format!(
        r#"
        [model.fresh]
        vocab_size = 1024
        hidden_size = 128
        intermediate_size = 320
        layers = 2
        heads = 4
        kv_heads = 2
        [data]
        paths = [{text:?}]
        extensions = ["rs"]
        held_out = 0.2
        length = 128
        [optimizer]
        batch = 8
        micro_batch = 4
        "#
    );
    for objective in objectives {
        recipe += &format!("[[phase]]\nobjective = {objective:?}\nsteps = 2\nlr = 1e-3\n");
    }
    recipe
}

fn dry() -> Option<Gpu> {
    open(GpuOptions { dry: true, ..GpuOptions::default() })
}

fn planned(gpu: &Gpu, recipe: &Recipe, run: &Path) -> Plan {
    plan(gpu, recipe, run, &|_| ()).unwrap()
}

/// What the run takes, with the usual kernels.
fn measured(gpu: &Gpu, recipe: &Recipe, run: &Path) -> u64 {
    assert_eq!(gpu.memory().live, 0, "an earlier run holds memory");
    gpu.reset_peak();
    let go_on = |_: demask_trainer::train::Event<'_>| ControlFlow::Continue(());
    let mut trainer = Trainer::open(gpu, recipe.clone(), run, &go_on).unwrap();
    trainer.run(&mut |_| ControlFlow::Continue(())).unwrap();
    gpu.memory().peak
}

fn is_near(planned: u64, measured: u64) -> bool {
    (planned as f64 / measured as f64 - 1.0).abs() <= TOLERANCE
}

#[test]
fn a_plan_tells_what_the_run_takes() {
    let (Some(gpu), Some(dry)) = (gpu(), dry()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let text = corpus(folder.path());
    let base =
        |objectives: &[&str]| -> Recipe { toml::from_str(&recipe(&text, objectives)).unwrap() };
    let both = base(&["ar", "block_diffusion"]);
    let mut lean = base(&["full_diffusion"]);
    lean.recompute = true;
    lean.optimizer.moments = MomentType::Eight;
    lean.optimizer.micro_batch = 8;
    // The cache of a long answer outweighs what training a short sequence takes.
    let mut talker = base(&["ar"]);
    talker.data.length = 16;
    talker.model.fresh.as_mut().unwrap().context = 8192;
    talker.validation.every = 1;
    talker.validation.prompts = vec!["fn main".into()];
    talker.validation.sample_tokens = 8000;
    let mut peaks = Vec::new();
    for (name, recipe) in [("both", both), ("lean", lean), ("talker", talker.clone())] {
        let run = folder.path().join(name);
        let before = planned(&dry, &recipe, &run);
        assert!(!run.exists(), "{name}: a plan wrote something");
        assert_eq!(before.vocabulary_asked, Some(1024));
        // Answers are long to hold, not to write.
        let tokens = recipe.validation.sample_tokens;
        let peak = match tokens > 64 {
            true => session_peak(&gpu, &recipe),
            false => measured(&gpu, &recipe, &run),
        };
        println!("{name}: planned {before:?}, measured {peak}");
        assert!(is_near(before.peak, peak), "{name}: planned {before:?}, measured {peak}");
        let parts = [before.weights, before.gradients, before.moments, before.activations];
        assert_eq!(parts.iter().sum::<u64>() + before.workspace, before.peak, "{name}: {before:?}");
        peaks.push(before.peak);
    }
    // The measure can tell one run from another.
    assert!(!is_near(peaks[0], peaks[1]) && !is_near(peaks[0], peaks[2]), "{peaks:?}");
    talker.validation.every = 0;
    assert!(!is_near(planned(&dry, &talker, folder.path()).peak, peaks[2]), "{peaks:?}");
    assert_eq!(dry.memory().live, 0, "a plan holds nothing when it is done");
}

/// What weights, moments and the beginning of the recipe's first answer take.
fn session_peak(gpu: &Gpu, recipe: &Recipe) -> u64 {
    use demask_engine::decode::{DecodeOptions, Decoder, Request};
    use demask_trainer::optim::OptimizerState;
    gpu.reset_peak();
    let fresh = recipe.model.fresh.as_ref().unwrap();
    let config: LlamaConfig = fresh.config(fresh.vocab_size, None, None);
    let model = demask_engine::model::Llama::random(gpu, &config, 0).unwrap().trainable();
    let _moments = OptimizerState::new(&model, &recipe.optimizer);
    let max_tokens = recipe.validation.sample_tokens;
    let options = DecodeOptions { max_tokens, ..DecodeOptions::autoregressive(&config) };
    let request = Request::answer(&config, &[1; 8], &options).unwrap();
    let mut decoder = Decoder::for_one(&model, &request);
    decoder.submit(request).unwrap();
    // The first reads the prompt.
    decoder.advance(&mut Vec::new()).unwrap();
    decoder.advance(&mut Vec::new()).unwrap();
    gpu.memory().peak
}

#[test]
fn every_change_takes_less_and_together_they_take_least() {
    let Some(dry) = dry() else { return };
    let run = tempfile::tempdir().unwrap();
    let recipe: Recipe = toml::from_str(&recipe(Path::new("text"), &["block_diffusion"])).unwrap();
    let own = planned(&dry, &recipe, run.path()).peak;
    let tried = switches(&recipe);
    let peaks: Vec<u64> = tried.iter().map(|s| planned(&dry, &s.recipe, run.path()).peak).collect();
    assert!(peaks.iter().all(|&peak| peak < own), "{own}: {peaks:?}");
    assert_eq!(peaks.iter().min(), peaks.last(), "{tried:?}: {peaks:?}");
}

#[test]
fn a_large_model_is_planned_on_any_machine() {
    let Some(dry) = dry() else { return };
    let mut recipe: Recipe =
        toml::from_str(&recipe(Path::new("text"), &["block_diffusion"])).unwrap();
    let fresh = recipe.model.fresh.as_mut().unwrap();
    fresh.vocab_size = 32_000;
    (fresh.hidden_size, fresh.intermediate_size) = (4096, 11_008);
    (fresh.layers, fresh.heads, fresh.kv_heads) = (32, 32, 32);
    let own = planned(&dry, &recipe, Path::new("nowhere"));
    // Weights, gradients and moments in f32: 4, 4 and 8 bytes; a buffer may be an eighth larger than what it holds.
    let numbers = own.parameters;
    assert!((6_400_000_000..6_800_000_000).contains(&numbers), "{own:?}");
    let bytes = own.weights + own.gradients + own.moments;
    assert!(bytes >= 15 * numbers && bytes <= 18 * numbers, "{own:?}");
    // A gradient that is there at the end need not be there at the peak; moments are.
    assert!(own.moments >= 8 * numbers && own.activations > 0, "{own:?}");
}

#[test]
fn the_counting_device_is_like_the_counted_one() {
    let (Some(gpu), Some(dry)) = (gpu(), dry()) else { return };
    let folder = demask_tests::golden("tiny");
    let load = |gpu: &Gpu| {
        let model = demask_engine::model::Llama::load(gpu, &folder, Precision::Q8);
        model.map(|_model| gpu.memory()).map_err(|e| e.to_string())
    };
    // The same memory, or the same complaint.
    assert_eq!(load(&gpu), load(&dry));
    assert!(!gpu.is_dry() && gpu.holdings().at_peak.is_empty());
}

fn demask(args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(binary());
    command.args(args).stdin(Stdio::null()).env("DEMASK_CACHE", env!("CARGO_TARGET_TMPDIR"));
    let output = command.output().expect("the binary runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_command_names_what_makes_a_run_fit() {
    if gpu().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let text = corpus(folder.path());
    let path = folder.path().join("recipe.toml");
    std::fs::write(&path, recipe(&text, &["block_diffusion"])).unwrap();
    let (file, out) = (path.display().to_string(), folder.path().join("run"));
    let place = out.display().to_string();
    let usual = ["train", &file, "--out", &place, "--no-tune"];
    let train = |more: &[&str]| demask(&[&usual[..], more].concat());

    let (code, table, complaint) = train(&["--plan"]);
    assert_eq!(code, 0, "{complaint}");
    for word in ["weights", "gradients", "moments", "activations", "workspace", "unknown"] {
        assert!(table.contains(word), "{word}: {table}");
    }
    let (code, stdout, _) = train(&["--plan", "--json", "--memory", "1GiB"]);
    let own: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &own["fits"]), (0, &Value::Bool(true)));
    let peak = own["peak_bytes"].as_u64().unwrap();

    let less = (peak * 9 / 10).to_string();
    let (code, stdout, complaint) = train(&["--plan", "--json", "--memory", &less]);
    let short: Value = serde_json::from_str(&stdout).unwrap();
    let remedy = short["changes"].as_array().unwrap().last().unwrap().clone();
    assert_eq!(
        (code, &short["fits"], &remedy["fits"]),
        (1, &Value::Bool(false), &Value::Bool(true))
    );
    assert!(complaint.contains(remedy["change"].as_str().unwrap()), "{complaint}");
    let (code, _, complaint) = train(&["--plan", "--memory", "64KiB"]);
    assert!(code == 1 && complaint.contains("smaller model"), "{complaint}");
    assert!(!out.exists(), "a plan wrote into the run's folder");

    // The plan holds: within it the run goes through, with less it does not.
    let (code, _, complaint) = train(&["--memory", &less]);
    assert!(code == 1 && complaint.contains("memory"), "{complaint}");
    let enough = (peak + peak / 20).to_string();
    let (code, _, complaint) = train(&["--memory", &enough]);
    assert_eq!(code, 0, "{complaint}");
}
