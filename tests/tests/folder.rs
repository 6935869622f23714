//! Model and adapter folders that say more than the usual, against transformers and PEFT (golden/generate_folder.py):
//! rotary scalings, biases, a head beside a tied configuration, and everything that an adapter may hold.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use demask_engine::autograd::{Gradients, backward, without_recording};
use demask_engine::decode::{DecodeOptions, Decoder, Mode, Request, Room, score};
use demask_engine::gpu::Gpu;
use demask_engine::model::merge::merge;
use demask_engine::model::{Inputs, Llama, Lora, Precision, StoredType, Weights};
use demask_engine::ops::{AttentionOptions, Mask, Supervision, linear_cross_entropy};
use demask_engine::tensor::Tensor;
use demask_tests::{golden, gpu, report};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::{Map, Value};

/// What float32 of two summation orders differs by.
const CLOSE: f32 = 5e-5;

#[derive(Deserialize)]
struct Case {
    name: String,
    /// A folder beside the cases, changed in these fields and without these tensors.
    model: String,
    config: Map<String, Value>,
    drop: Vec<String>,
    adapter: Option<String>,
    texts: Vec<Text>,
    #[serde(default)]
    greedy: Vec<u32>,
}

#[derive(Deserialize)]
struct Text {
    ids: Vec<u32>,
    /// Of each token but the first.
    scores: Vec<f32>,
}

impl Case {
    /// Its model's folder, made in `work`.
    fn folder(&self, work: &Path) -> PathBuf {
        let (from, to) = (golden("folder").join(&self.model), work.join(&self.name));
        std::fs::create_dir_all(&to).unwrap();
        let mut config: Map<String, Value> = read(&from.join("config.json"));
        for (key, value) in &self.config {
            match value {
                Value::Null => config.remove(key),
                value => config.insert(key.clone(), value.clone()),
            };
        }
        std::fs::write(to.join("config.json"), Value::from(config).to_string()).unwrap();
        let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let kept = |name: &str| !self.drop.iter().any(|part| name.contains(part.as_str()));
        let views: HashMap<_, _> =
            file.tensors().into_iter().filter(|(name, _)| kept(name)).collect();
        safetensors::serialize_to_file(views, None, &to.join("model.safetensors")).unwrap();
        to
    }

    fn adapter(&self) -> Option<Lora> {
        let folder = golden("folder").join(self.adapter.as_ref()?);
        Some(Lora::read(&folder).unwrap())
    }

    fn load(&self, gpu: &Gpu, work: &Path) -> Llama {
        let base = Llama::load(gpu, &self.folder(work), Precision::F32).unwrap();
        match self.adapter() {
            None => base,
            Some(lora) => base.adapted(&lora).unwrap(),
        }
    }

    /// How far the scores of a model lie from these, if that is too far.
    fn check(&self, what: &str, model: &Llama) -> Vec<String> {
        let of = |text: &Text| {
            let got = score(model, &text.ids, &Mode::Autoregressive).unwrap();
            let got: Vec<f32> = got.into_iter().skip(1).map(Option::unwrap).collect();
            let off = furthest(&got, &text.scores);
            let n = text.ids.len();
            (off > CLOSE || off.is_nan())
                .then(|| format!("{} {what}, {n} tokens: off by {off}", self.name))
        };
        self.texts.iter().filter_map(of).collect()
    }
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> T {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn cases() -> Vec<Case> {
    read(&golden("folder/cases.json"))
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let off = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    off.fold(0.0, |most, x| if x > most || x.is_nan() { x } else { most })
}

fn inputs(gpu: &Gpu, ids: &[u32]) -> Inputs {
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    Inputs {
        tokens: Tensor::from_u32(gpu, ids, [1, ids.len()]),
        positions: Tensor::from_u32(gpu, &positions, [1, ids.len()]),
        attention: AttentionOptions::new(Mask::Causal),
    }
}

/// −Σ of the scores, by the pass that training runs.
fn loss(model: &Llama, ids: &[u32]) -> Tensor {
    let (gpu, n) = (model.gpu(), ids.len() - 1);
    let rows: Vec<u32> = (0..n as u32).collect();
    let supervision = Supervision {
        targets: Tensor::from_u32(gpu, &ids[1..], [n]),
        weights: Tensor::from_f32(gpu, &vec![1.0; n], [n]),
        divisor: 1.0,
    };
    let rows = Tensor::from_u32(gpu, &rows, [n]);
    let hidden = model.hidden_at(&inputs(gpu, ids), &rows, false);
    linear_cross_entropy(&hidden, model.head(), &supervision).loss
}

#[test]
fn folders_score_as_transformers_and_peft_do() {
    let Some(gpu) = gpu() else { return };
    let work = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    for case in cases() {
        let model = case.load(&gpu, work.path());
        failures.extend(case.check("decoding", &model));
        for text in &case.texts {
            let want = -text.scores.iter().sum::<f32>();
            let got = without_recording(|| loss(&model, &text.ids)).item().unwrap();
            if (got - want).abs().partial_cmp(&1e-3) != Some(std::cmp::Ordering::Less) {
                let n = text.ids.len();
                failures.push(format!("{} training, {n} tokens: {got}, not {want}", case.name));
            }
        }
    }
    report(failures);
}

#[test]
fn merged_adapters_score_as_they_did() {
    let Some(gpu) = gpu() else { return };
    let work = tempfile::tempdir().unwrap();
    let merged = work.path().join("merged");
    let mut failures = Vec::new();
    for case in cases() {
        let Some(lora) = case.adapter() else { continue };
        let folder = case.folder(work.path());
        merge(&folder, &lora, &merged, StoredType::F32, &mut |_| {}).unwrap();
        failures.extend(case.check("merged", &Llama::load(&gpu, &merged, Precision::F32).unwrap()));
        // What a model says of its adapter is an adapter of the same model, through files too.
        let adapted = Llama::load(&gpu, &folder, Precision::F32).unwrap().adapted(&lora).unwrap();
        let own = adapted.adapter().unwrap().unwrap();
        let files = work.path().join("adapter");
        own.write(&files, "").unwrap();
        assert_eq!(Lora::read(&files).unwrap(), own, "{}", case.name);
        let again = Llama::load(&gpu, &folder, Precision::F32).unwrap().adapted(&own).unwrap();
        failures.extend(case.check("written", &again));
    }
    report(failures);
}

/// One token at a time over a cache whose keys stay as they were rotated, alone and in company.
#[test]
fn continuations_beyond_the_context_are_those_of_transformers() {
    let Some(gpu) = gpu() else { return };
    let work = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    for case in cases().into_iter().filter(|case| !case.greedy.is_empty()) {
        let model = case.load(&gpu, work.path());
        let mut options = DecodeOptions::autoregressive(model.config());
        (options.eos_ids, options.max_tokens) = (vec![], case.greedy.len());
        let prompt = &case.texts[0].ids;
        let request = || Request::answer(model.config(), prompt, &options).unwrap();
        let room = Room { tokens: 200, sequences: 3 };
        let mut decoder = Decoder::new(&model, room);
        // The same prompt again finds it read; another one has its own length at each pass.
        let mut ids = vec![decoder.submit(request()).unwrap()];
        let mut events = Vec::new();
        (0..6).for_each(|_| decoder.advance(&mut events).unwrap());
        let other = Request::answer(model.config(), &prompt[..5], &options).unwrap();
        let other = decoder.submit(other).unwrap();
        ids.push(decoder.submit(request()).unwrap());
        while !decoder.is_idle() {
            decoder.advance(&mut events).unwrap();
        }
        ids.push(decoder.submit(request()).unwrap());
        while !decoder.is_idle() {
            decoder.advance(&mut events).unwrap();
        }
        assert!(decoder.take(other).is_some());
        for (nth, id) in ids.into_iter().enumerate() {
            let got = decoder.take(id).unwrap().token_ids;
            if got != case.greedy {
                failures
                    .push(format!("{} request {nth}: {got:?}, not {:?}", case.name, case.greedy));
            }
        }
    }
    report(failures);
}

fn named(name: &str) -> Case {
    cases().into_iter().find(|case| case.name == name).unwrap()
}

#[test]
fn biases_learn_and_are_saved() {
    let Some(gpu) = gpu() else { return };
    let work = tempfile::tempdir().unwrap();
    let case = named("all_biases");
    let model = case.load(&gpu, work.path()).trainable();
    let ids = &case.texts[0].ids;
    let mut gradients = Gradients::new();
    let one = Tensor::from_f32(&gpu, &[1.0], [1]);
    backward(&loss(&model, ids), &one, &mut gradients);
    let names: Vec<String> =
        model.config().parameters().into_iter().map(|(name, _)| name).collect();
    assert_eq!(model.parameters().iter().map(|p| p.name.clone()).collect::<Vec<_>>(), names);
    // A step along a bias's gradient changes the loss by the gradient's length.
    for p in model.parameters().into_iter().filter(|p| p.name.ends_with(".bias")) {
        let gradient = gradients.get(&p.shards[0]).unwrap().to_vec().unwrap();
        let length = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        if p.name.contains("k_proj") {
            // The same for all keys of a query, as far as rotation lets it be.
            continue;
        }
        let values = p.shards[0].to_vec().unwrap();
        let at = |step: f64| {
            let moved = values.iter().zip(&gradient);
            let moved = moved.map(|(v, g)| (f64::from(*v) + step * f64::from(*g) / length) as f32);
            p.shards[0].overwrite(&moved.collect::<Vec<f32>>());
            f64::from(without_recording(|| loss(&model, ids)).item().unwrap())
        };
        let slope = (at(0.01) - at(-0.01)) / 0.02;
        at(0.0);
        assert!((slope - length).abs() < 0.02 * length, "{}: {slope}, not {length}", p.name);
    }
    let saved = work.path().join("saved");
    model.save(&saved, StoredType::F32, None).unwrap();
    let again = Llama::load(&gpu, &saved, Precision::F32).unwrap();
    assert_eq!(again.config(), model.config());
    report(case.check("saved", &again));
}

#[test]
fn a_model_with_biases_plans_and_trains_an_adapter_over_blocks() {
    let Some(gpu) = gpu() else { return };
    let work = tempfile::tempdir().unwrap();
    let case = named("all_biases");
    let folder = case.folder(work.path());
    let (config, _) = Weights::open(&folder).unwrap();
    let targets = demask_engine::model::lora::TARGETS.map(String::from);
    for dora in [false, true] {
        let lora = Lora::fresh(&config, 4, 8.0, dora, &targets, 3);
        // A fresh adapter changes nothing, whatever stands beside it.
        let model = Llama::load(&gpu, &folder, Precision::F32).unwrap().adapted(&lora).unwrap();
        report(case.check("under a fresh adapter", &model));
    }
}

/// As the hub's tools leave it: a snapshot of links, named by a revision.
#[cfg(unix)]
#[test]
fn a_snapshot_of_links_opens() {
    let Some(gpu) = gpu() else { return };
    let work = tempfile::tempdir().unwrap();
    let case = named("attention_bias");
    let files = case.folder(work.path());
    let repository = work.path().join("models--some-org--tiny");
    let (blobs, snapshot) = (repository.join("blobs"), repository.join("snapshots/abc"));
    for folder in [&blobs, &snapshot, &repository.join("refs")] {
        std::fs::create_dir_all(folder).unwrap();
    }
    std::fs::write(repository.join("refs/main"), "abc").unwrap();
    for (i, name) in ["config.json", "model.safetensors"].iter().enumerate() {
        std::fs::copy(files.join(name), blobs.join(i.to_string())).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{i}"), snapshot.join(name)).unwrap();
    }
    report(case.check("linked", &Llama::load(&gpu, &repository, Precision::F32).unwrap()));
    std::fs::remove_file(blobs.join("1")).unwrap();
    let error = Weights::open(&repository).err().unwrap().to_string();
    assert!(error.contains("model.safetensors") && error.contains("a link to"), "{error}");
}

#[test]
fn a_folder_of_several_files_says_which_there_are() {
    let work = tempfile::tempdir().unwrap();
    let names =
        ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.Q4_K_M.gguf", "c.GGUF", "d.txt"];
    names.iter().for_each(|name| std::fs::write(work.path().join(name), "x").unwrap());
    let error = Weights::open(work.path()).err().unwrap().to_string();
    let told = "holds 3 GGUF models: a-00001-of-00002.gguf (2 parts), b.Q4_K_M.gguf, c.GGUF; name the one you mean, as in";
    assert!(error.contains(told), "{error}");
    names[2..4].iter().for_each(|name| std::fs::remove_file(work.path().join(name)).unwrap());
    // The parts are one model, so it is opened, and then refused for what it is.
    let error = Weights::open(work.path()).err().unwrap().to_string();
    assert!(error.contains("a-00001-of-00002.gguf") && !error.contains("holds"), "{error}");
}

#[test]
fn adapters_that_cannot_be_computed_are_refused_by_name() {
    let work = tempfile::tempdir().unwrap();
    let from = golden("folder/pissa");
    let refused = |field: &str, value: Value, named: &[&str]| {
        let weights = "adapter_model.safetensors";
        std::fs::copy(from.join(weights), work.path().join(weights)).unwrap();
        let mut config: Value = read(&from.join("adapter_config.json"));
        config[field] = value;
        std::fs::write(work.path().join("adapter_config.json"), config.to_string()).unwrap();
        let error = Lora::read(work.path()).expect_err(field).to_string();
        assert!(named.iter().all(|name| error.contains(name)), "{error}");
    };
    for init in ["pissa_niter_4", "corda", "loftq", "lora_ga", "something_new"] {
        refused("init_lora_weights", init.into(), &["init_lora_weights", init]);
    }
    refused("rank_pattern", serde_json::json!({"q_proj": 2}), &["q_proj", "rank 2"]);
    refused("rank_pattern", serde_json::json!({"q_proj": 0.5}), &["rank_pattern", "q_proj"]);
    refused("rank_pattern", serde_json::json!({"q_proj(": 3}), &["rank_pattern", "q_proj("]);
    refused("target_parameters", serde_json::json!(["x"]), &["target_parameters"]);
}
