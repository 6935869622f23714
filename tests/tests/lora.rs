//! Low-rank adapters: beside the weights they compute what merged weights compute, for every type of base; their
//! gradients are those of the loss; PEFT's files go in and out; what cannot be read is refused.

use std::path::Path;

use demask_engine::autograd::{Gradients, backward, without_recording};
use demask_engine::model::lora::{Decoding, Lora, TARGETS};
use demask_engine::model::merge::merge;
use demask_engine::model::{Inputs, Llama, LlamaConfig, Precision, StoredType};
use demask_engine::ops::{AttentionOptions, Mask, Supervision, linear_cross_entropy};
use demask_engine::philox::Philox;
use demask_engine::tensor::Tensor;
use demask_tests::{golden, gpu};

/// An adapter that changes every matrix.
fn random(config: &LlamaConfig, dora: bool) -> Lora {
    let targets = TARGETS.map(String::from);
    let mut lora = Lora::fresh(config, 4, 8.0, dora, &targets, 3);
    let mut random = Philox::new(5, [0, 0, 0]);
    for low in lora.modules.values_mut() {
        low.b.iter_mut().for_each(|b| *b = 0.1 * random.normal());
        if dora {
            let rows = low.b.len() / 4;
            low.magnitude = (0..rows).map(|_| 0.5 + random.uniform()).collect();
        }
    }
    lora
}

fn ids(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 37 + 11) % 96).collect()
}

fn inputs(model: &Llama, ids: &[u32]) -> Inputs {
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    Inputs {
        tokens: Tensor::from_u32(model.gpu(), ids, [1, ids.len()]),
        positions: Tensor::from_u32(model.gpu(), &positions, [1, ids.len()]),
        attention: AttentionOptions::new(Mask::Causal),
    }
}

fn hidden(model: &Llama, ids: &[u32]) -> Tensor {
    model.hidden(&inputs(model, ids), false)
}

/// Of all rows that have a next token.
fn hidden_before_last(model: &Llama, ids: &[u32]) -> Tensor {
    let rows: Vec<u32> = (0..ids.len() as u32 - 1).collect();
    let rows = Tensor::from_u32(model.gpu(), &rows, [rows.len()]);
    model.hidden_at(&inputs(model, ids), &rows, false)
}

fn logits(model: &Llama, ids: &[u32]) -> Vec<f32> {
    let hidden = without_recording(|| hidden(model, ids));
    model.logits(&hidden.reshape([ids.len(), model.config().hidden_size])).to_vec().unwrap()
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Rows of the goldens' models are no whole blocks of 32; this one's are.
fn blocks_model(folder: &Path) {
    let gpu = gpu().unwrap();
    let (mut config, _) = demask_engine::model::Weights::open(&golden("tiny")).unwrap();
    (config.hidden_size, config.intermediate_size) = (64, 96);
    (config.num_attention_heads, config.num_key_value_heads, config.head_dim) = (4, 2, 16);
    let model = Llama::random(&gpu, &config, 1).unwrap();
    model.save(folder, StoredType::F32, None).unwrap();
}

#[test]
fn an_adapter_computes_what_merged_weights_compute() {
    let Some(gpu) = gpu() else { return };
    let work = tempfile::tempdir().unwrap();
    let (model, merged) = (work.path().join("model"), work.path().join("merged"));
    blocks_model(&model);
    let ids = ids(29);
    for dora in [false, true] {
        for precision in
            [Precision::F32, Precision::Bf16, Precision::F16, Precision::Q8, Precision::Q4]
        {
            let base = Llama::load(&gpu, &model, precision).unwrap();
            let lora = random(base.config(), dora);
            // The weights as they rest in memory, widened, are what is merged into.
            let widened = work.path().join("widened");
            base.save(&widened, StoredType::F32, None).unwrap();
            merge(&widened, &lora, &merged, StoredType::F32, &mut |_| {}).unwrap();
            let plain = logits(&base, &ids);
            let adapted = base.adapted(&lora).unwrap();
            let one = logits(&adapted, &ids);
            let other = logits(&Llama::load(&gpu, &merged, Precision::F32).unwrap(), &ids);
            let off = furthest(&one, &other);
            assert!(off < 2e-4, "{precision:?} dora {dora}: {off}");
            assert!(furthest(&one, &plain) > 0.05, "{precision:?}: the adapter changes nothing");
            // Decoding takes another path through the same weights.
            let mut cache = adapted.cache(ids.len());
            for (at, part) in [(0, &ids[..9]), (9, &ids[9..10]), (10, &ids[10..])] {
                let hidden = adapted.step(part, at, Mask::Causal, &mut cache);
                let v = adapted.config().vocab_size;
                let decoded = adapted.logits(&hidden).to_vec().unwrap();
                let off = furthest(&decoded, &one[at * v..(at + part.len()) * v]);
                assert!(off < 2e-4, "decoding {precision:?} dora {dora} at {at}: {off}");
            }
        }
    }
}

/// A step along the gradient changes the loss by the gradient's square, for each kind of tensor.
#[test]
fn gradients_of_adapters_are_those_of_the_loss() {
    let Some(gpu) = gpu() else { return };
    let ids = ids(24);
    for dora in [false, true] {
        let base = Llama::load(&gpu, &golden("tiny"), Precision::F32).unwrap();
        let lora = random(base.config(), dora);
        let model = base.adapted(&lora).unwrap().trainable();
        let loss = || {
            let supervision = Supervision {
                targets: Tensor::from_u32(&gpu, &ids[1..], [23]),
                weights: Tensor::from_f32(&gpu, &[1.0; 23], [23]),
                divisor: 1.0,
            };
            let hidden = hidden_before_last(&model, &ids);
            linear_cross_entropy(&hidden, model.head(), &supervision).loss
        };
        let mut gradients = Gradients::new();
        backward(&loss(), &Tensor::from_f32(&gpu, &[1.0], [1]), &mut gradients);
        let trained = model.trained();
        assert_eq!(trained.len(), 2 * 7 * if dora { 3 } else { 2 });
        for kind in ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"] {
            let of_kind = || trained.iter().filter(|p| p.name.ends_with(kind));
            let norm = of_kind()
                .flat_map(|p| gradients.get(&p.shards[0]).unwrap().to_vec().unwrap())
                .map(|g| f64::from(g).powi(2))
                .sum::<f64>()
                .sqrt();
            if norm == 0.0 {
                assert!(!dora && kind == "lora_magnitude_vector", "{kind} gets no gradient");
                continue;
            }
            let moved = |step: f64| {
                for p in of_kind() {
                    let g = gradients.get(&p.shards[0]).unwrap().to_vec().unwrap();
                    let values = p.shards[0].to_vec().unwrap();
                    let new: Vec<f32> = values
                        .iter()
                        .zip(&g)
                        .map(|(v, g)| (f64::from(*v) + step * f64::from(*g) / norm) as f32)
                        .collect();
                    p.shards[0].overwrite(&new);
                }
            };
            let step = 0.02;
            moved(step);
            let up = f64::from(without_recording(loss).item().unwrap());
            moved(-2.0 * step);
            let down = f64::from(without_recording(loss).item().unwrap());
            moved(step);
            let slope = (up - down) / (2.0 * step);
            let off = (slope - norm).abs() / norm;
            // DoRA holds the lengths of rows constant, so A and B have another gradient than the loss's there: PEFT's
            // goldens have it.
            let exact = !dora || kind == "lora_magnitude_vector";
            assert!(
                off < if exact { 0.01 } else { 0.1 },
                "{kind} dora {dora}: the loss rises by {slope}, the norm is {norm}"
            );
        }
        let frozen = model.parameters().iter().all(|p| gradients.get(&p.shards[0]).is_none());
        assert!(frozen, "a frozen weight got a gradient");
    }
}

/// Logits and gradients of adapters that PEFT made.
#[test]
fn adapters_of_peft_compute_what_they_do_there() {
    let Some(gpu) = gpu() else { return };
    for folder in ["lora", "dora"].map(golden) {
        let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let f32s = |name: &str| -> Vec<f32> {
            bytemuck::pod_collect_to_vec(
                file.tensor(name).unwrap_or_else(|_| panic!("{name}")).data(),
            )
        };
        let ids: Vec<u32> = bytemuck::pod_collect_to_vec(file.tensor("ids").unwrap().data());
        let lora = Lora::read(&folder).unwrap();
        let base = Llama::load(&gpu, &golden("tiny"), Precision::F32).unwrap();
        let model = base.adapted(&lora).unwrap().trainable();

        let got: Vec<f32> = ids.chunks(24).flat_map(|row| logits(&model, row)).collect();
        let off = furthest(&got, &f32s("logits"));
        assert!(off < 1e-4, "{}: logits differ by {off}", folder.display());

        let mut gradients = Gradients::new();
        for row in ids.chunks(24) {
            let supervision = Supervision {
                targets: Tensor::from_u32(&gpu, &row[1..], [23]),
                weights: Tensor::from_f32(&gpu, &[1.0; 23], [23]),
                divisor: 46.0,
            };
            let hidden = hidden_before_last(&model, row);
            let ce = linear_cross_entropy(&hidden, model.head(), &supervision);
            backward(&ce.loss, &Tensor::from_f32(&gpu, &[1.0], [1]), &mut gradients);
        }
        for p in model.trained() {
            let got = gradients.get(&p.shards[0]).unwrap().to_vec().unwrap();
            let off = furthest(&got, &f32s(&format!("grad.base_model.model.{}", p.name)));
            assert!(
                off < 2e-5,
                "{}: the gradient of {} differs by {off}",
                folder.display(),
                p.name
            );
        }
    }
}

#[test]
fn an_adapter_goes_through_its_files() {
    let Some(gpu) = gpu() else { return };
    let work = tempfile::tempdir().unwrap();
    let base = Llama::load(&gpu, &golden("tiny"), Precision::F32).unwrap();
    for dora in [false, true] {
        let mut lora = random(base.config(), dora);
        lora.decoding =
            Decoding { block_length: Some(4), mask_token_id: Some(96), ..Decoding::default() };
        lora.write(work.path(), "base").unwrap();
        assert_eq!(Lora::read(work.path()).unwrap(), lora);
        let model =
            Llama::load(&gpu, &golden("tiny"), Precision::F32).unwrap().adapted(&lora).unwrap();
        assert_eq!(model.adapter().unwrap(), Some(lora));
        assert_eq!(model.config().block_length, Some(4));
    }
}

#[test]
fn what_cannot_be_read_is_named() {
    let Some(gpu) = gpu() else { return };
    let work = tempfile::tempdir().unwrap();
    let base = Llama::load(&gpu, &golden("tiny"), Precision::F32).unwrap();
    let lora = random(base.config(), false);
    let refused = |edit: &dyn Fn(&mut serde_json::Value), named: &str| {
        lora.write(work.path(), "base").unwrap();
        let path = work.path().join("adapter_config.json");
        let mut config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut config);
        std::fs::write(&path, config.to_string()).unwrap();
        let error = Lora::read(work.path()).expect_err(named).to_string();
        assert!(error.contains(named), "{error}");
    };
    refused(&|c| c["peft_type"] = "IA3".into(), "IA3");
    refused(&|c| c["r"] = 0.into(), "r is no positive");
    refused(&|c| c["r"] = 8.into(), "rank 8");
    refused(&|c| c["modules_to_save"] = 3.into(), "modules_to_save");
    refused(&|c| c["rank_pattern"] = serde_json::json!({"q_proj": 2}), "rank 2");
    refused(&|c| c["bias"] = "all".into(), "bias");

    lora.write(work.path(), "base").unwrap();
    let path = work.path().join("adapter_model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let error = Lora::read(work.path()).unwrap_err().to_string();
    assert!(error.contains("adapter_model.safetensors"), "{error}");

    let mut other = lora.clone();
    let (name, low) = other.modules.pop_first().unwrap();
    other.modules.insert(name.replace("layers.0", "layers.7"), low);
    let error = other.check(base.config()).unwrap_err().to_string();
    assert!(error.contains("layers.7"), "{error}");
    let mut other = lora.clone();
    other.modules.first_entry().unwrap().get_mut().a.pop();
    assert!(other.check(base.config()).unwrap_err().to_string().contains("do not fit"));
}
