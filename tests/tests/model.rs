//! The model against goldens of an independent framework (tests/golden/README.md says how they were made and where
//! the tolerances come from), and against itself: cached passes, sharded weights, recomputed layers, saved files.

use std::collections::HashMap;
use std::path::Path;

use demask_engine::autograd::{Gradients, backward};
use demask_engine::gpu::{Gpu, GpuOptions};
use demask_engine::model::{Inputs, Llama, LlamaConfig, Precision, StoredType, Tokenizer, Weights};
use demask_engine::ops::case::Tolerance;
use demask_engine::ops::{AttentionOptions, Mask, Supervision, linear_cross_entropy};
use demask_engine::tensor::Tensor;
use demask_tests::{compare, golden, gpu, open, report, shared_data};
use demask_trainer::optim::{OptimizerState, decays};
use demask_trainer::recipe::Optimizer;
use safetensors::SafeTensors;
use serde_json::Value;

const TINY: [&str; 2] = ["tiny", "tiny_tied"];
const LOGITS: Tolerance = Tolerance { absolute: 5e-5, relative: 5e-6 };
const LOSS: Tolerance = Tolerance { absolute: 1e-5, relative: 0.0 };
const GRADIENT: Tolerance = Tolerance { absolute: 1e-5, relative: 1e-5 };

/// A golden's tensors and numbers.
struct Golden {
    bytes: Vec<u8>,
    json: Value,
}

impl Golden {
    fn read(name: &str) -> Golden {
        let bytes = std::fs::read(golden(name).join("golden.safetensors")).unwrap();
        let json = std::fs::read(golden(name).join("golden.json")).unwrap();
        Golden { bytes, json: serde_json::from_slice(&json).unwrap() }
    }

    fn view<T: bytemuck::Pod>(&self, key: &str) -> (Vec<usize>, Vec<T>) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(key).unwrap();
        (view.shape().to_vec(), bytemuck::pod_collect_to_vec(view.data()))
    }

    fn ids(&self, key: &str) -> (Vec<usize>, Vec<u32>) {
        self.view(key)
    }

    fn f64s(&self, key: &str) -> Vec<f64> {
        self.view::<f32>(key).1.into_iter().map(f64::from).collect()
    }

    fn number(&self, path: &str) -> f64 {
        self.json.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path}"))
    }

    /// Spans [B, L, 2] of the document lengths at `path`.
    fn spans(&self, gpu: &Gpu, path: &str) -> Tensor {
        let rows: Vec<Vec<u32>> =
            serde_json::from_value(self.json.pointer(path).unwrap().clone()).unwrap();
        let mut spans = Vec::new();
        for row in &rows {
            let mut first = 0;
            for &length in row {
                spans.extend((0..length).flat_map(|_| [first, first + length]));
                first += length;
            }
        }
        let length = spans.len() / 2 / rows.len();
        Tensor::from_u32(gpu, &spans, [rows.len(), length, 2])
    }
}

/// Both tiny goldens on a device, or nothing where there is none.
fn each_tiny(check: impl Fn(&Gpu, &Golden, &Path) -> Vec<String>) {
    let Some(gpu) = gpu() else { return };
    let run = |name: &&str| check(&gpu, &Golden::read(name), &golden(name));
    report(TINY.iter().flat_map(run).collect());
}

fn inputs(gpu: &Gpu, tokens: &[u32], shape: [usize; 2], attention: AttentionOptions) -> Inputs {
    let [b, t] = shape;
    let length = if matches!(attention.mask, Mask::TwoCopy(_)) { t / 2 } else { t };
    let positions: Vec<u32> = (0..b * t).map(|i| (i % t % length) as u32).collect();
    Inputs {
        tokens: Tensor::from_u32(gpu, tokens, [b, t]),
        positions: Tensor::from_u32(gpu, &positions, [b, t]),
        attention,
    }
}

/// Logits [B, T, V] of a whole pass.
fn logits(
    model: &Llama,
    tokens: &[u32],
    shape: [usize; 2],
    attention: AttentionOptions,
) -> Vec<f32> {
    let hidden = model.hidden(&inputs(model.gpu(), tokens, shape, attention), false);
    let [rows, d] = hidden.shape().matrix();
    model.logits(&hidden.reshape([rows, d])).to_vec().unwrap()
}

/// x_t ⊕ x_0 of each row of the golden's batch.
fn two_copy(golden: &Golden) -> (Vec<u32>, [usize; 2]) {
    let (shape, x0) = golden.ids("bd.x0");
    let (_, xt) = golden.ids("bd.xt");
    let l = shape[1];
    let rows = xt.chunks(l).zip(x0.chunks(l));
    (rows.flat_map(|(t, c)| t.iter().chain(c).copied()).collect(), [shape[0], 2 * l])
}

/// The first half of the rows of each sequence.
fn noisy_half(values: &[f32], [b, t]: [usize; 2]) -> Vec<f32> {
    let row = values.len() / (b * t);
    values.chunks(t * row).flat_map(|s| s[..t / 2 * row].to_vec()).collect()
}

#[test]
fn logits_match_the_golden_under_every_mask() {
    each_tiny(|gpu, golden, path| {
        let model = Llama::load(gpu, path, Precision::F32).unwrap();
        let (shape, tokens) = golden.ids("ar.tokens");
        let shape = [shape[0], shape[1]];
        let with = |mask, spans| AttentionOptions { spans, ..AttentionOptions::new(mask) };
        let check = |key: &str, got: Vec<f32>| compare(key, &got, &golden.f64s(key), LOGITS).err();
        let documents = golden.spans(gpu, "/ar_doc/documents");
        let (both, both_shape) = two_copy(golden);
        let noisy = |spans| {
            noisy_half(
                &logits(&model, &both, both_shape, with(Mask::TwoCopy(4), spans)),
                both_shape,
            )
        };
        [
            check("ar.logits", logits(&model, &tokens, shape, with(Mask::Causal, None))),
            check(
                "ar_doc.logits",
                logits(&model, &tokens, shape, with(Mask::Causal, Some(documents))),
            ),
            check(
                "block_causal.logits",
                logits(&model, &tokens, shape, with(Mask::BlockCausal(4), None)),
            ),
            check("bd.logits", noisy(None)),
            check("bd_doc.logits", noisy(Some(golden.spans(gpu, "/bd_doc/documents")))),
        ]
        .into_iter()
        .flatten()
        .collect()
    });
}

/// Rows, targets and weights of the golden's autoregressive loss: row i predicts token i + 1.
fn ar_loss(model: &Llama, golden: &Golden, recompute: bool) -> Tensor {
    let gpu = model.gpu();
    let (shape, tokens) = golden.ids("ar.tokens");
    let t = shape[1];
    let rows: Vec<u32> =
        (0..tokens.len() as u32).filter(|i| !(*i as usize + 1).is_multiple_of(t)).collect();
    let targets: Vec<u32> = rows.iter().map(|&i| tokens[i as usize + 1]).collect();
    let n = rows.len();
    let supervision = Supervision {
        targets: Tensor::from_u32(gpu, &targets, [n]),
        weights: Tensor::from_f32(gpu, &vec![1.0; n], [n]),
        divisor: n as f32,
    };
    let inputs = inputs(gpu, &tokens, [shape[0], t], AttentionOptions::new(Mask::Causal));
    let hidden = model.hidden_at(&inputs, &Tensor::from_u32(gpu, &rows, [n]), recompute);
    linear_cross_entropy(&hidden, model.head(), &supervision).loss
}

/// The golden's block-diffusion loss over the two-copy pass.
fn diffusion_loss(model: &Llama, golden: &Golden) -> Tensor {
    let gpu = model.gpu();
    let (tokens, shape) = two_copy(golden);
    let (_, x0) = golden.ids("bd.x0");
    let (_, weights) = golden.view::<f32>("bd.weights");
    let l = shape[1] / 2;
    let masked: Vec<usize> = (0..x0.len()).filter(|&i| weights[i] > 0.0).collect();
    let pick = |f: &dyn Fn(usize) -> u32| masked.iter().map(|&i| f(i)).collect::<Vec<u32>>();
    let w: Vec<f32> = masked.iter().map(|&i| weights[i]).collect();
    let n = masked.len();
    let supervision = Supervision {
        targets: Tensor::from_u32(gpu, &pick(&|i| x0[i]), [n]),
        weights: Tensor::from_f32(gpu, &w, [n]),
        divisor: golden.number("/bd/divisor") as f32,
    };
    let inputs = inputs(gpu, &tokens, shape, AttentionOptions::new(Mask::TwoCopy(4)));
    let rows = Tensor::from_u32(gpu, &pick(&|i| (i / l * 2 * l + i % l) as u32), [n]);
    let hidden = model.hidden_at(&inputs, &rows, false);
    linear_cross_entropy(&hidden, model.head(), &supervision).loss
}

fn gradients(loss: &Tensor) -> Gradients {
    let mut gradients = Gradients::new();
    backward(loss, &Tensor::from_f32(loss.gpu(), &[1.0], [1]), &mut gradients);
    gradients
}

/// A parameter's gradient, its shards together.
fn gradient_of(gradients: &Gradients, shards: &[Tensor]) -> Vec<f32> {
    shards.iter().flat_map(|s| gradients.get(s).expect("a gradient").to_vec().unwrap()).collect()
}

fn check_loss(model: &Llama, golden: &Golden, part: &str, loss: &Tensor) -> Vec<String> {
    let want = golden.number(&format!("/{part}/loss"));
    let mut failures: Vec<String> =
        compare(part, &loss.to_vec().unwrap(), &[want], LOSS).err().into_iter().collect();
    let gradients = gradients(loss);
    for parameter in model.parameters() {
        let key = format!("{part}.grad.{}", parameter.name);
        let got = gradient_of(&gradients, &parameter.shards);
        failures.extend(compare(&key, &got, &golden.f64s(&key), GRADIENT).err());
    }
    failures
}

#[test]
fn losses_and_every_gradient_match_the_golden() {
    each_tiny(|gpu, golden, path| {
        let model = Llama::load(gpu, path, Precision::F32).unwrap().trainable();
        let mut failures = check_loss(&model, golden, "ar", &ar_loss(&model, golden, false));
        failures.extend(check_loss(&model, golden, "bd", &diffusion_loss(&model, golden)));
        // Recomputing layers changes memory, not numbers.
        failures.extend(check_loss(&model, golden, "ar", &ar_loss(&model, golden, true)));
        failures
    });
}

#[test]
fn five_adamw_steps_match_the_golden() {
    each_tiny(|gpu, golden, path| {
        let model = Llama::load(gpu, path, Precision::F32).unwrap().trainable();
        let listed = golden.json.pointer("/adamw/decayed").unwrap().clone();
        let mut decayed: Vec<String> = serde_json::from_value(listed).unwrap();
        let mut ours: Vec<String> =
            model.parameters().iter().filter(|p| decays(p)).map(|p| p.name.clone()).collect();
        decayed.sort();
        ours.sort();
        assert_eq!(ours, decayed);
        let settings = Optimizer {
            weight_decay: golden.number("/adamw/weight_decay"),
            ..Optimizer::default()
        };
        let mut failures = adamw(gpu, golden, path, "adamw", &settings, &diffusion_loss);
        let ar = |model: &Llama, golden: &Golden| ar_loss(model, golden, false);
        failures.extend(adamw(gpu, golden, path, "ar_adamw", &settings, &ar));
        failures
    });
}

/// Five steps on one loss, against the part of the golden with its curve and its weights.
fn adamw(
    gpu: &Gpu,
    golden: &Golden,
    path: &Path,
    part: &str,
    settings: &Optimizer,
    loss_of: &dyn Fn(&Llama, &Golden) -> Tensor,
) -> Vec<String> {
    let model = Llama::load(gpu, path, Precision::F32).unwrap().trainable();
    let mut optimizer = OptimizerState::new(&model, settings);
    let mut failures = Vec::new();
    for step in 0..5 {
        let loss = loss_of(&model, golden);
        let want = golden.number(&format!("/{part}/losses/{step}"));
        failures.extend(compare(part, &loss.to_vec().unwrap(), &[want], LOSS).err());
        let lr = golden.number(&format!("/adamw/lr/{step}")) as f32;
        let norm = optimizer.step(&model, &gradients(&loss), settings, lr, f32::INFINITY).unwrap();
        let want = golden.number(&format!("/{part}/grad_norms/{step}"));
        let bound = Tolerance { absolute: 1e-4, relative: 0.0 };
        failures.extend(compare(part, &norm.to_vec().unwrap()[..1], &[want], bound).err());
    }
    for parameter in model.parameters() {
        let key = format!("{part}.param.{}", parameter.name);
        let got: Vec<f32> = parameter.shards.iter().flat_map(|s| s.to_vec().unwrap()).collect();
        let bound = Tolerance { absolute: 5e-5, relative: 0.0 };
        failures.extend(compare(&key, &got, &golden.f64s(&key), bound).err());
    }
    failures
}

/// The claim that block diffusion's cache is exact (arXiv 2601.15892 §2.2): each noisy block of the two-copy pass has
/// the logits of the cached pass over the same tokens.
#[test]
fn the_two_copy_pass_equals_cached_block_by_block_passes() {
    let Some(gpu) = gpu() else { return };
    let model = Llama::load(&gpu, &golden("tiny"), Precision::F32).unwrap();
    let v = model.config().vocab_size;
    let mut failures = Vec::new();
    for b in [1, 2, 4, 8, 32] {
        let l = if b == 32 { 96 } else { 5 * b + 8 * b };
        let x0: Vec<u32> = (0..l).map(|i| (i * 31 % 90) as u32).collect();
        let xt: Vec<u32> = (0..l).map(|i| if i % 3 == 0 { 96 } else { x0[i] }).collect();
        let both = [&xt[..], &x0].concat();
        let whole = logits(&model, &both, [1, 2 * l], AttentionOptions::new(Mask::TwoCopy(b)));
        let mut cache = model.cache(l);
        for start in (0..l).step_by(b) {
            let end = start + b;
            let noisy = model.step(&xt[start..end], start, Mask::BlockCausal(b), &mut cache);
            let got = model.logits(&noisy).to_vec().unwrap();
            let want: Vec<f64> = whole[start * v..end * v].iter().map(|&x| f64::from(x)).collect();
            failures.extend(compare(&format!("B {b} block at {start}"), &got, &want, LOGITS).err());
            model.step(&x0[start..end], start, Mask::BlockCausal(b), &mut cache);
        }
    }
    report(failures);
}

/// A prompt of every length modulo B: the aligned prefix in one pass, then blocks, equals one whole pass; so does the
/// fused pass over a clean block and the noisy one behind it.
#[test]
fn cached_passes_equal_whole_passes_for_prompts_of_every_length() {
    let Some(gpu) = gpu() else { return };
    let model = Llama::load(&gpu, &golden("tiny"), Precision::F32).unwrap();
    let v = model.config().vocab_size;
    let mut failures = Vec::new();
    for b in [1, 2, 4, 8, 32] {
        for p in 2 * b..3 * b {
            let prefix = p / b * b;
            let l = prefix + 2 * b;
            let tokens: Vec<u32> = (0..l).map(|i| (i * 17 % 96) as u32).collect();
            let mask = Mask::BlockCausal(b);
            let whole = logits(&model, &tokens, [1, l], AttentionOptions::new(mask));
            let mut cache = model.cache(l + 3);
            model.step(&tokens[..prefix], 0, mask, &mut cache);
            // What a denoising pass left in the cache must not matter once the block is clean.
            model.step(&vec![96; b], prefix, mask, &mut cache);
            let fused = model.step(&tokens[prefix..], prefix, mask, &mut cache);
            let got = model.logits(&fused).to_vec().unwrap();
            let want: Vec<f64> = whole[prefix * v..].iter().map(|&x| f64::from(x)).collect();
            failures.extend(compare(&format!("B {b} prompt {p}"), &got, &want, LOGITS).err());
        }
    }
    report(failures);
}

/// Weights larger than one binding are row shards; the numbers stay.
#[test]
fn sharded_weights_give_the_same_numbers() {
    let limited = GpuOptions { max_binding: Some(2_560), checked: true, ..GpuOptions::default() };
    let Some(small) = open(limited) else { return };
    let golden_tiny = Golden::read("tiny");
    let model = Llama::load(&small, &golden("tiny"), Precision::F32).unwrap();
    let most = model.parameters().iter().map(|p| p.shards.len()).max().unwrap();
    assert!(most > 4, "the limit shards the embedding, got {most} shards");
    // One short row: activations must fit the limit too.
    let (_, tokens) = golden_tiny.ids("ar.tokens");
    let hidden = model
        .hidden(&inputs(&small, &tokens[..6], [1, 6], AttentionOptions::new(Mask::Causal)), false);
    let got = model.logits(&hidden.reshape([6, 48])).to_vec().unwrap();
    compare("sharded", &got, &golden_tiny.f64s("ar.logits")[..6 * 97], LOGITS).unwrap();
}

#[test]
fn saved_models_load_again_bit_for_bit() {
    let Some(gpu) = gpu() else { return };
    for name in TINY {
        let model = Llama::load(&gpu, &golden(name), Precision::F32).unwrap();
        let folder = tempfile::tempdir().unwrap();
        model.save(folder.path(), StoredType::F32, None).unwrap();
        let again = Llama::load(&gpu, folder.path(), Precision::Stored).unwrap();
        assert_eq!(model.config(), again.config());
        for (a, b) in model.parameters().iter().zip(again.parameters()) {
            for (a, b) in a.shards.iter().zip(&b.shards) {
                assert_eq!(a.to_bytes().unwrap(), b.to_bytes().unwrap());
            }
        }
    }
}

/// A bf16 or f16 copy computes with weights rounded to that type, and nothing else differs.
#[test]
fn half_precision_weights_are_rounded_weights() {
    let Some(gpu) = gpu() else { return };
    let tokens: Vec<u32> = (0..20).collect();
    for precision in [Precision::Bf16, Precision::F16] {
        let half = Llama::load(&gpu, &golden("tiny"), precision).unwrap();
        let folder = tempfile::tempdir().unwrap();
        half.save(folder.path(), StoredType::F32, None).unwrap();
        let rounded = Llama::load(&gpu, folder.path(), Precision::F32).unwrap();
        let run = |m: &Llama| logits(m, &tokens, [1, 20], AttentionOptions::new(Mask::Causal));
        let want: Vec<f64> = run(&rounded).into_iter().map(f64::from).collect();
        compare("half", &run(&half), &want, LOGITS).unwrap();
        let exact = Llama::load(&gpu, &golden("tiny"), Precision::F32).unwrap();
        assert_ne!(run(&exact), run(&rounded), "rounding must show");
    }
}

/// 8- and 4-bit copies compute with the weights that their blocks stand for; what has no whole blocks is refused.
#[test]
fn quantised_weights_are_what_their_blocks_decode_to() {
    let Some(gpu) = gpu() else { return };
    let mut config = LlamaConfig::read(&golden("tiny")).unwrap();
    (config.hidden_size, config.intermediate_size, config.head_dim) = (96, 160, 16);
    let folder = tempfile::tempdir().unwrap();
    Llama::random(&gpu, &config, 5).unwrap().save(folder.path(), StoredType::F32, None).unwrap();
    let tokens: Vec<u32> = (0..20).collect();
    let run = |m: &Llama| logits(m, &tokens, [1, 20], AttentionOptions::new(Mask::Causal));
    let exact = run(&Llama::load(&gpu, folder.path(), Precision::F32).unwrap());
    for precision in [Precision::Q8, Precision::Q4] {
        let blocks = Llama::load(&gpu, folder.path(), precision).unwrap();
        let decoded = tempfile::tempdir().unwrap();
        blocks.save(decoded.path(), StoredType::F32, None).unwrap();
        let decoded = Llama::load(&gpu, decoded.path(), Precision::F32).unwrap();
        let want: Vec<f64> = run(&decoded).into_iter().map(f64::from).collect();
        compare("quantised", &run(&blocks), &want, LOGITS).unwrap();
        assert_ne!(exact, run(&decoded), "rounding must show");
        let refused = Llama::load(&gpu, &golden("tiny"), precision).err().unwrap().to_string();
        assert!(refused.contains("rows of 48") && refused.contains("embed"), "{refused}");
    }
}

/// The real 260 k-parameter model: loss, last logits and the norm of each gradient, of an f64 reference.
#[test]
fn stories260k_matches_its_golden() {
    let (Some(gpu), Some(folder)) = (gpu(), shared_data("stories260K")) else { return };
    let text = std::fs::read(folder.join("golden.json")).unwrap();
    let golden: Value = serde_json::from_slice(&text).unwrap();
    let ids: Vec<u32> = serde_json::from_value(golden["ids"].clone()).unwrap();
    let last: Vec<f64> = serde_json::from_value(golden["logits_last_f64"].clone()).unwrap();
    let norms: HashMap<String, f64> = serde_json::from_value(golden["grad_l2"].clone()).unwrap();
    let model = Llama::load(&gpu, &folder.join("hf"), Precision::F32).unwrap().trainable();
    let t = ids.len();
    let got = logits(&model, &ids, [1, t], AttentionOptions::new(Mask::Causal));
    compare(
        "logits",
        &got[got.len() - last.len()..],
        &last,
        Tolerance { absolute: 1e-4, relative: 1e-5 },
    )
    .unwrap();
    let rows: Vec<u32> = (0..t as u32 - 1).collect();
    let supervision = Supervision {
        targets: Tensor::from_u32(&gpu, &ids[1..], [t - 1]),
        weights: Tensor::from_f32(&gpu, &vec![1.0; t - 1], [t - 1]),
        divisor: (t - 1) as f32,
    };
    let inputs = inputs(&gpu, &ids, [1, t], AttentionOptions::new(Mask::Causal));
    let hidden = model.hidden_at(&inputs, &Tensor::from_u32(&gpu, &rows, [t - 1]), false);
    let loss = linear_cross_entropy(&hidden, model.head(), &supervision).loss;
    let want = golden["loss_f64"].as_f64().unwrap();
    compare("loss", &loss.to_vec().unwrap(), &[want], Tolerance { absolute: 1e-5, relative: 0.0 })
        .unwrap();
    let gradients = gradients(&loss);
    for parameter in model.parameters() {
        let g = gradient_of(&gradients, &parameter.shards);
        let norm = g.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt() as f32;
        let bound = Tolerance { absolute: 1e-5, relative: 1e-4 };
        compare(&parameter.name, &[norm], &[norms[&parameter.name]], bound).unwrap();
    }
}

/// The tokenizer of that model, which a GGUF or a folder must agree on with the weights.
#[test]
fn stories260k_tokenizer_fits_its_weights() {
    let Some(folder) = shared_data("stories260K/hf") else { return };
    let (config, _) = Weights::open(&folder).unwrap();
    let tokenizer = Tokenizer::for_model(&folder, &config).unwrap();
    let ids = tokenizer.encode("Once upon a time", true).unwrap();
    // As transformers 5 does, whose files add a beginning by their post-processor or not at all.
    assert_eq!(ids[..2], [403, 407]);
    let smaller = LlamaConfig { vocab_size: 500, ..config };
    assert!(Tokenizer::for_model(&folder, &smaller).is_err());
}
