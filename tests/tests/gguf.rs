//! GGUF files that others write: types that demask only reads, and split ones. Values to the bit as the gguf package
//! decodes them, and scores as numpy computes them from those (`golden/generate_gguf.py`).

use std::path::PathBuf;

use demask_engine::decode::{Mode, score};
use demask_engine::model::{Fidelity, Llama, Precision, StoredType, Weights, conversions};
use demask_tests::checked_gpu;
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/gguf").join(name)
}

/// Ids that all files are scored on, and what each file must give.
fn expected() -> (Vec<u32>, serde_json::Map<String, Value>) {
    let text = std::fs::read(golden("expected.json")).expect("the golden is there");
    let json: Value = serde_json::from_slice(&text).expect("it is JSON");
    let ids = json["ids"].as_array().expect("ids").iter().map(|id| id.as_u64().unwrap() as u32);
    (ids.collect(), json["files"].as_object().expect("files").clone())
}

/// CRC-32 of zlib.
fn crc32(bytes: &[u8]) -> u64 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & 0u32.wrapping_sub(crc & 1));
        }
    }
    u64::from(!crc)
}

/// Hugging Face's name of a tensor in these files.
fn hf_name(name: &str) -> String {
    let stem = name.strip_suffix(".weight").unwrap();
    let parts = [
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
    ];
    let last = stem.rsplit('.').next().unwrap();
    let (_, hf) = parts.iter().find(|(gguf, _)| *gguf == last).unwrap();
    match stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((layer, _)) => format!("model.layers.{layer}.{hf}.weight"),
        None => format!("{hf}.weight"),
    }
}

#[test]
fn values_are_those_of_the_gguf_package() {
    let (_, files) = expected();
    let mut seen = Vec::new();
    for (name, want) in &files {
        let (config, weights) = Weights::open(&golden(name)).unwrap();
        let checks = want["crc32"].as_object().unwrap();
        assert_eq!(checks.len(), config.parameters().len(), "{name}");
        for (tensor, crc) in checks {
            let tensor = hf_name(tensor);
            let rows = 0..weights.shape(&tensor)[0];
            let values = weights.rows_f32(&tensor, rows).unwrap();
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!(Some(crc32(&bytes)), crc.as_u64(), "{name}: {tensor}");
            seen.push(weights.dtype(&tensor));
        }
    }
    let read_only = StoredType::ALL.into_iter().filter(|dtype| !dtype.is_written());
    for dtype in read_only {
        assert!(seen.contains(&dtype), "no file holds {dtype:?}");
    }
}

/// Largest difference of scores, in nats.
fn worst(llama: &Llama, ids: &[u32], want: &Value) -> f64 {
    let got = score(llama, ids, &Mode::Autoregressive).unwrap();
    let want: Vec<f64> = want.as_array().unwrap().iter().map(|p| p.as_f64().unwrap()).collect();
    assert_eq!((got.len(), got[0]), (want.len() + 1, None));
    let pairs = got[1..].iter().zip(&want);
    pairs.map(|(got, want)| (f64::from(got.unwrap()) - want).abs()).fold(0.0, f64::max)
}

#[test]
fn scores_are_those_of_the_decoded_weights() {
    let Some(gpu) = checked_gpu() else { return };
    let (ids, files) = expected();
    for (name, want) in &files {
        let (config, weights) = Weights::open(&golden(name)).unwrap();
        let run = |precision| {
            let llama = Llama::from_weights(&gpu, &config, &weights, precision).unwrap();
            worst(&llama, &ids, &want["logprobs"])
        };
        let fidelities =
            config.parameters().into_iter().map(|(p, _)| weights.dtype(&p).held_as().1);
        // Rounding anew moves a weight by up to 1/254 of its block's largest; likelihoods here go down to e⁻²⁰.
        let bound = match fidelities.max() {
            Some(Fidelity::Rounded) => 0.5,
            Some(Fidelity::ScalesRounded) => 0.02,
            _ => 2e-4,
        };
        let (exact, stored) = (run(Precision::F32), run(Precision::Stored));
        println!("{name}: {exact:.1e} in f32, {stored:.1e} as stored");
        assert!(exact < 2e-4, "{name} in f32: off by {exact}");
        assert!(stored < bound, "{name} as stored: off by {stored}");
    }
}

#[test]
fn what_becomes_of_types_is_said_in_a_line() {
    let line = |name: &str| {
        let (config, weights) = Weights::open(&golden(name)).unwrap();
        conversions(&config, &weights)
    };
    let held = |rest: &str| Some(format!("matrices are held in the nearest type: {rest}"));
    assert_eq!(line("q5_0.gguf"), held("15 of Q5_0 as Q8 (exactly)"));
    assert_eq!(line("q5_k.gguf"), held("2 of Q5_1 as Q8 (rounded), 6 of Q5_K as Q8 (rounded)"));
    let scales = "2 of IQ4_NL as Q8 (exactly), 6 of IQ4_XS as Q8 (scales rounded to f16)";
    assert_eq!(line("iq4_xs.gguf"), held(scales));
    assert_eq!(line("split-00001-of-00004.gguf"), None);
}

#[test]
fn any_part_names_a_split_model() {
    let (config, want) = Weights::open(&golden("split-00001-of-00004.gguf")).unwrap();
    for part in 1..=4 {
        let from = golden(&format!("split-0000{part}-of-00004.gguf"));
        let (read, weights) = Weights::open(&from).unwrap();
        assert_eq!(read, config);
        for (name, shape) in config.parameters() {
            let rows = |of: &Weights| of.rows_f32(&name, 0..shape[0]).unwrap();
            assert_eq!(rows(&weights), rows(&want), "{name}");
        }
    }
}
